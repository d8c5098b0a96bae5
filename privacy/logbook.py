"""A program's log: one JSON object a line in a file, and a short sentence on standard error for who sits there.

What is said is fixed text; what varies are named fields. Nobody puts a record, an update or a key there, and an error
only as the one line that a `FedchorusError` has.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

MOST_BYTES = 16 * 2**20  # Then the file becomes FILE.1, and the one before that is gone.


class Logbook:
    """Log events of `program` to `path` (None: nowhere) and, readably, to `stream`. Safe between threads."""

    def __init__(self, program: str, path: Path | None, *, stream: TextIO | None = sys.stderr) -> None:
        self._program, self._path, self._stream, self._lock = program, path, stream, threading.Lock()

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        line = {"time": now.isoformat(timespec="milliseconds"), "level": level, "program": self._program}
        with self._lock:
            if self._path is not None:
                self._append(json.dumps({**line, "event": event, **fields}, default=str))
            if self._stream is not None:
                said = ", ".join(f"{name} {_short(value)}" for name, value in fields.items())
                mark = "" if level == "info" else f"{level}: "
                print(
                    f"{now:%H:%M:%S} {self._program}: {mark}{event}{' (' + said + ')' if said else ''}",
                    file=self._stream,
                )
                self._stream.flush()

    def _append(self, line: str) -> None:
        assert self._path is not None
        if self._path.exists() and self._path.stat().st_size > MOST_BYTES:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return f"{text[:12]}" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text

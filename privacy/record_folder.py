"""A folder of records on disk: JSON files replaced whole, JSON lines appended, one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privacy.durable import write_atomically
from privacy.errors import RunError


class RecordFolder:
    """Files of one run; every write of a whole file is atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> dict[str, Any]:
        try:
            loaded = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            raise RunError(f"{self.path}: {name} is missing") from None
        except ValueError:
            loaded = None
        if not isinstance(loaded, dict):
            raise RunError(f"{self.path}: {name} is damaged")
        return loaded

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        self.write_bytes(name, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Durable when this returns: what a checkpoint builds on must not be lost behind it."""
        with open(self.path / name, "ab") as file:
            file.write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a JSONL file; a last line that a crash cut short is not there."""
        try:
            text = (self.path / name).read_bytes()
        except FileNotFoundError:
            return []
        try:
            lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        except ValueError:
            lines = [None]
        if not all(isinstance(line, dict) and type(line.get("round")) is int for line in lines):
            raise RunError(f"{self.path}: {name} is damaged")
        return lines

    def keep_rounds(self, last: int) -> None:
        """Drop the records of rounds after `last`: they were never kept, and will be run again."""
        for name in ("metrics.jsonl", "heads.jsonl"):
            kept = [line for line in self.lines(name) if line["round"] <= last]
            self.write_bytes(name, b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in kept))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time runs a run. Raises `RunError` when another does."""
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is running this run") from None
            yield

    def write_bytes(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)

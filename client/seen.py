"""Nonces that were seen: a message that is sent again is refused, also after a restart."""

from __future__ import annotations

import os
import re
from pathlib import Path

from privacy.durable import write_atomically
from privacy.errors import Refused, RunError

_LINE = re.compile(rb"([0-9a-f]{64}) ([0-9a-f]{16})\n")  # "nonce until\n", the time in milliseconds.
_COMPACT = 4096


class SeenNonces:
    """Nonces of messages that would still be believed, in a file.

    The file is not synced to the disk: it outlives a killed process, and after a power cut messages of the moments
    before would have to be replayed. Raises `RunError` for a file that is not what was written to it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._until = path, dict[str, int]()
        text = path.read_bytes() if path.exists() else b""
        whole = 0
        while line := _LINE.match(text, whole):
            self._until[line[1].decode()] = int(line[2], 16)
            whole = line.end()
        rest = text[whole:]
        # A crash cuts the last line short, or leaves zeros where it should be. Anything else is somebody's doing.
        if rest.strip(b"\0") and (len(rest) >= 82 or not re.fullmatch(rb"[0-9a-f ]*\0*", rest)):
            raise RunError(f"{path}: damaged; remove it when the client has been stopped for an hour, then start it")
        if rest:
            self._rewrite()

    def add(self, nonce: str, *, until: float, now: float) -> None:
        """Note a nonce (64 hexadecimal digits) of a message that is believed `until` then (seconds since 1970).

        Raises `Refused` for one that was seen before.
        """
        if nonce in self._until:
            raise Refused("a message came for the second time: it was replayed")
        self._until[nonce] = int(until * 1000)
        if len(self._until) > _COMPACT and min(self._until.values()) < now * 1000:
            self._until = {one: end for one, end in self._until.items() if end >= now * 1000}
            self._rewrite()
            return
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
            file.write(_line(nonce, self._until[nonce]))

    def _rewrite(self) -> None:
        write_atomically(self._path, b"".join(_line(one, end) for one, end in self._until.items()))


def _line(nonce: str, until: int) -> bytes:
    return f"{nonce} {until:016x}\n".encode()

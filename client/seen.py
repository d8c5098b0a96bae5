"""Nonces that were seen: a message that is sent again is refused, also after a restart."""

from __future__ import annotations

import os
from pathlib import Path

from privacy.durable import write_atomically
from privacy.errors import Refused

_LINE = 64 + 1 + 16 + 1  # "nonce time\n", the time in hexadecimal milliseconds.
_COMPACT = 4096


class SeenNonces:
    """Nonces of the last `keep_s` seconds, in a file. Longer than that a message is not believed anyway.

    The file is not synced to the disk: it outlives a killed process, and after a power cut messages of the minutes
    before would have to be replayed while the site starts.
    """

    def __init__(self, path: Path, *, keep_s: float) -> None:
        self._path, self._keep_s = path, keep_s
        self._seen: dict[str, float] = {}
        if path.exists():
            text = path.read_bytes()
            lines = [text[at : at + _LINE] for at in range(0, len(text) - _LINE + 1, _LINE)]
            try:
                self._seen = {line[:64].decode(): int(line[65:81], 16) / 1000 for line in lines}
            except ValueError:
                raise Refused(f"{path}: damaged; remove it when no message has come for ten minutes") from None
            if len(text) % _LINE:  # A crash cut the last one short.
                write_atomically(path, b"".join(lines))

    def add(self, nonce: str, *, now: float) -> None:
        """Note a nonce (64 hexadecimal digits). Raises `Refused` for one that was seen before."""
        if nonce in self._seen:
            raise Refused("a message came for the second time: it was replayed")
        self._seen[nonce] = now
        if len(self._seen) > _COMPACT and min(self._seen.values()) < now - self._keep_s:
            self._seen = {one: at for one, at in self._seen.items() if at >= now - self._keep_s}
            write_atomically(self._path, b"".join(_line(one, at) for one, at in self._seen.items()))
            return
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
            file.write(_line(nonce, now))


def _line(nonce: str, now: float) -> bytes:
    return f"{nonce} {int(now * 1000):016x}\n".encode()

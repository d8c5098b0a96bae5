"""The release-once journal: what a client has answered stays answered, through crashes, restarts and races.

A server that gets the same thing answered twice, for two sets of survivors, has the difference: one client's update.
So a client claims each answer before it gives it, and the claim is on disk first. A file outlives what a process
keeps in memory and what a runtime rolls back.

The file is a line "fedchorus journal 1", then one line a claim: the claim's SHA-256 and, to show damage, the first 16
digits of the SHA-256 of all the bytes before these. Digests and no names: the file tells nothing of the jobs. Who can
write the file can remove it, so it protects a site from its server and from accidents, not from itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from privacy.durable import sync_folder
from privacy.errors import Refused

HEADER = b"fedchorus journal 1\n"
_DIGEST, _CHECK = 64, 16
_LINE = _DIGEST + 1 + _CHECK + 1  # "digest check\n"
_DOMAIN = b"fedchorus journal v1\0"


class Journal:
    """Claims, each at most so often. Safe between threads and processes that use the same path.

    Guarantee: of all calls of `claim` with one kind and key, in all threads and processes, no more than `most` return.
    One that returned is on disk and counts for ever. One that was killed or failed counts or does not: its answer is
    then lost, never given twice.

    The folder must exist. Nothing is read or written before the first `claim` or `count`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _Seen(b"", hashlib.sha256())

    def claim(self, kind: str, key: str, *, most: int = 1) -> None:
        """Record, durably, one more use of `key` (a round, a root) for answers of `kind`; return when it is on disk.

        Raises `Refused`, and nothing must be answered, when it was claimed `most` times already, when the file is not
        what was written to it, or when it cannot be written.
        """
        digest = _digest(kind, key)
        with self._locked("a+") as file:
            seen = self._read(file)
            claimed = seen.count(digest)
            if claimed >= most:
                raise Refused(f"{kind}: answered {claimed} times already, and at most {most} are allowed; never again")
            file.truncate(len(seen.data))  # Drops a line that a crash cut short: its claim never returned.
            if not seen.data:
                self._write(file, HEADER)
                seen = self._read(file)
            if seen.data == HEADER:
                # Before any claim and not after the first: killed in between, the next process would not know to.
                os.fsync(file.fileno())
                sync_folder(self.path.parent)
            self._write(file, _line(digest, seen.running))
            os.fsync(file.fileno())

    def count(self, kind: str, key: str) -> int:
        """Say how often `key` was claimed for `kind`. A journal that does not exist has no claims."""
        if not self._seen.data and not self.path.exists():
            return 0
        with self._locked("r+") as file:
            return self._read(file).count(_digest(kind, key))

    @contextmanager
    def _locked(self, mode: str) -> Iterator[FileIO]:
        try:
            # Unbuffered: what a failed write left in a buffer must not be written later, without the lock.
            with FileIO(self.path, mode, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    yield file
                finally:
                    fcntl.flock(file, fcntl.LOCK_UN)  # Closing would not: a child forked meanwhile has it open too.
        except OSError as error:
            raise Refused(
                f"{self.path}: the journal of answers cannot be used ({error.strerror}), and nothing is answered "
                "without it"
            ) from None

    def _read(self, file: FileIO) -> _Seen:
        """Read the whole lines that were added since, by anyone; return what the file holds now."""
        known = len(self._seen.data)
        if os.fstat(file.fileno()).st_size < known:
            raise self._damaged("it became shorter while it was in use")
        file.seek(known)
        data = self._seen.data + file.readall()
        if len(data) < len(HEADER) and HEADER.startswith(data):  # New, or a crash cut the first line short.
            return self._seen
        if not data.startswith(HEADER):
            raise self._damaged(f"it does not begin with {HEADER.decode().strip()!r}")
        end = len(data) - (len(data) - len(HEADER)) % _LINE
        if b"\n" in data[end:]:
            raise self._damaged("its last line is not a claim")
        if end > known:
            running = self._seen.running.copy()
            last = max(len(HEADER), end - _LINE)  # Where the last claim begins: at the end, if there is none.
            running.update(data[known:last])
            # The last check covers all bytes before it, so this one comparison shows a change to any line.
            if last < end and _line(data[last : last + _DIGEST], running) != data[last:end]:
                raise self._damaged("its lines are not those that were written")
            running.update(data[last:end])
            # Replaced as a whole, never changed: a fork in another thread always finds it consistent.
            self._seen = _Seen(data[:end], running)
        return self._seen

    def _write(self, file: FileIO, content: bytes) -> None:
        if file.write(content) != len(content):
            raise Refused(f"{self.path}: no room for the journal of answers, and nothing is answered without it")

    def _damaged(self, why: str) -> Refused:
        return Refused(
            f"{self.path}: {why}, so what was answered before is not known and nothing is answered; "
            "find out what happened before you move it away, and never continue a session from before"
        )


class _Seen(NamedTuple):
    """What was read of the file, and its running SHA-256: a process that goes on reads only what is new."""

    data: bytes
    running: Any  # hashlib's objects have no public type.

    def count(self, digest: bytes) -> int:
        return self.data.count(digest)  # Nothing else in the file is 64 digits in a row.


def _digest(kind: str, key: str) -> bytes:
    label = kind.encode()
    return hashlib.sha256(_DOMAIN + len(label).to_bytes(4, "little") + label + key.encode()).hexdigest().encode()


def _line(digest: bytes, running: Any) -> bytes:
    whole = running.copy()
    whole.update(digest)
    check: str = whole.hexdigest()[:_CHECK]
    return digest + b" " + check.encode() + b"\n"

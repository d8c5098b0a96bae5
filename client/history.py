"""What a site admitted and answered, and when: the record that the policy's rates are counted from.

A ledger says what was spent, and a job without privacy has none. So the rates of `client.policy` have a file of their
own, one line of canonical JSON for each job that was admitted and each round that was answered:

    {"check":C,"job":SHA-256,"kind":"job" or "round","round":N,"time":T,"v":1}

`check` is the first 16 digits of the SHA-256 of the line before's `check` and the rest of this line: damage, and lines
that were deleted or moved, show. A crash leaves a last line without its newline: it was never acknowledged, and the
next line replaces it. Who can write the file can remove it: it holds the server to the site's rates, not the site.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from privacy.durable import sync_folder
from privacy.errors import FedchorusError
from privacy.ledger import canonical

VERSION = 1
_FIRST = "0" * 16  # What the first line's check follows.


class HistoryDamaged(FedchorusError):
    """The record of what was admitted cannot be trusted or written, so nothing is admitted."""


class History:
    """Admitted jobs and answered rounds with their times. Durable before each return.

    Processes may share the file. That a count and the line that follows it are not overtaken by another is for the
    caller, who checks one request at a time. Times must name their zone (`ValueError`). A missing file is a site's
    first start: nothing was admitted. Raises `HistoryDamaged` for a file that is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._jobs: dict[str, datetime] = {}
        self._rounds: list[datetime] = []
        self._answered: Counter[str] = Counter()
        self._check, self._end, self._lines = _FIRST, 0, 0
        self._refresh()

    def admit(self, job: str, *, now: datetime) -> None:
        """Note that the job (its SHA-256) was admitted. One that was admitted before changes nothing."""
        self._refresh()
        if job not in self._jobs:
            self._append({"kind": "job", "job": job, "round": 0}, now)

    def answer(self, job: str, round_number: int, *, now: datetime) -> None:
        """Note that the site sets out to answer a round: before the data are touched, so that a crash counts it."""
        self._append({"kind": "round", "job": job, "round": round_number}, now)

    def knows(self, job: str) -> bool:
        """Whether the job was ever admitted here."""
        self._refresh()
        return job in self._jobs

    def rounds_of(self, job: str) -> int:
        """How often the site set out to answer a round of `job`."""
        self._refresh()
        return self._answered[job]

    def jobs_since(self, moment: datetime) -> int:
        """How many jobs were admitted after `moment`; one with a time still to come (the clock went back) counts."""
        self._refresh()
        return sum(time > moment for time in self._jobs.values())

    def rounds_since(self, moment: datetime) -> int:
        """How many rounds were answered after `moment`."""
        self._refresh()
        return sum(time > moment for time in self._rounds)

    def _append(self, record: Mapping[str, Any], now: datetime) -> None:
        if now.tzinfo is None:
            raise ValueError("a time without its zone")
        time = now.astimezone(UTC).isoformat(timespec="milliseconds")
        with self._locked("a+") as file:
            self._read(file)
            new = self._end == 0
            file.truncate(self._end)  # Drops a line that a crash cut short: it was never acknowledged.
            line = _line({**record, "time": time, "v": VERSION}, self._check)
            if file.write(line) != len(line):
                raise HistoryDamaged(f"{self.path}: no room for the site's history; free some disk space")
            os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)
            self._read(file)

    def _refresh(self) -> None:
        if self._end or self.path.exists():
            with self._locked("r") as file:
                self._read(file)

    @contextmanager
    def _locked(self, mode: str) -> Iterator[FileIO]:
        try:
            # Unbuffered: what a failed write left in a buffer must not be written later, without the lock.
            with FileIO(self.path, mode, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                fcntl.flock(file, fcntl.LOCK_SH if mode == "r" else fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise HistoryDamaged(
                f"{self.path}: the site's history cannot be used ({error.strerror}), and nothing is admitted without it"
            ) from None

    def _read(self, file: FileIO) -> None:
        """Read and verify the whole lines that were added since."""
        if os.fstat(file.fileno()).st_size < self._end:
            raise self._damaged("became shorter while it was in use")
        file.seek(self._end)
        fresh = file.readall()
        for line in fresh[: fresh.rfind(b"\n") + 1].splitlines(keepends=True):
            record = self._verified(line)
            time = datetime.fromisoformat(record["time"])
            if record["kind"] == "job":
                self._jobs.setdefault(record["job"], time)
            else:
                self._rounds.append(time)
                self._answered[record["job"]] += 1
            self._check, self._end, self._lines = record["check"], self._end + len(line), self._lines + 1

    def _verified(self, line: bytes) -> dict[str, Any]:
        """The line's record, if it is to the byte what `_append` writes after the line before."""
        try:
            record: dict[str, Any] = json.loads(line)
            rest = {key: value for key, value in record.items() if key != "check"}
            if _line(rest, self._check) == line and rest["v"] == VERSION:
                return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise self._damaged(f"line {self._lines + 1} is not what was written")

    def _damaged(self, why: str) -> HistoryDamaged:
        return HistoryDamaged(
            f"{self.path}: the site's history {why}, and nothing is admitted; find out what happened, then restore the "
            "file from a backup or move it away (the policy's rates then count from zero)"
        )


def _line(record: Mapping[str, Any], before: str) -> bytes:
    check = hashlib.sha256(before.encode() + canonical(record)).hexdigest()[: len(_FIRST)]
    return canonical({**record, "check": check}) + b"\n"

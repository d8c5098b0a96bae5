"""The audit log: who called this server, what for and with what outcome; append-only, hash-chained, signed.

One entry is one line of canonical JSON (`privacy.ledger.canonical`):

    {"body":{...},"hash":H,"kind":K,"prev":P,"seq":N,"time":T,"v":1}

- `hash` = SHA-256("fedchorus audit v1\\0" + the line without `hash`), `prev` = the hash of entry N-1 (64 zeros at 0);
- kinds: `open` (a server started, or a new file continues an old one), `call`, `calls` (the counted calls of one caller
  in a minute), `head` (the coordinator's Ed25519 signature over `prev`: nobody without the key can write what came
  before afresh), `torn` (a crash cut a line short; it was removed), `gap` (calls that could not be written).

Never in it: tokens, bodies, keys, query strings. Nodes poll several times a second, so polls and heartbeats that
succeed are counted. So are, after a caller's first in a minute, refusals for too many calls and of callers without a
credential: a flood must not fill the disk. A crash loses at most that minute's counts. The chain cannot show that its
newest entries are gone: a `head` kept elsewhere does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from privacy.durable import sync_folder
from privacy.errors import LedgerError
from privacy.keys import IdentityKey, is_signed_by
from privacy.ledger import GENESIS, Head, canonical

VERSION = 1
SIGNED_EVERY = 128  # At most so many entries from one signature to the next.
COUNTED = frozenset({"/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat"})
TOO_MANY = 429
_FIELDS = {"body", "hash", "kind", "prev", "seq", "time", "v"}
_KINDS = {"open", "call", "calls", "head", "torn", "gap"}
_HASH_DOMAIN = b"fedchorus audit v1\0"
_HEAD_DOMAIN = b"fedchorus audit v1 head\0"
_COUNTED_FOR = timedelta(minutes=1)
_log = logging.getLogger(__name__)


class AuditLogCorrupt(LedgerError):
    """Entry `entry` (counted from 0 over all files) in `file` is not what was written, for the reason `why`."""

    def __init__(self, file: str, entry: int, why: str) -> None:
        super().__init__(f"audit log {file}, entry {entry}: {why}")
        self.file, self.entry, self.why = file, entry, why


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call and its outcome. `why` is for the coordinator alone: the caller sees one body for each status."""

    who: str  # "site NAME", "operator NAME", "server" or "anonymous".
    address: str
    listener: str
    method: str
    path: str
    status: int
    why: str = ""
    runs: tuple[int, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def is_refusal(self) -> bool:
        return self.status >= 400

    @property
    def is_urgent(self) -> bool:
        """Whether its entry is on disk before `record` returns."""
        return (self.is_refusal and self.status != TOO_MANY) or self.path.startswith("/v1/control/")

    def body(self) -> dict[str, Any]:
        runs = [str(run) for run in self.runs]  # 64 bits, which not every reader of JSON keeps as a number.
        return {**{name: value for name, value in vars(self).items() if value or name == "status"}, "runs": runs}


class AuditLog:
    """The writing end, safe between threads; one process holds it at a time. Close it: that signs its head.

    Opening verifies the current file. Refusals and control calls are on disk (fsync) before `record` returns, other
    entries within `sync_every_s`. A full disk does not stop a call that has already been served: `record` remembers
    it, `check` raises until writing works again, and a `gap` entry then says how many calls were lost.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: IdentityKey | None = None,
        file_bytes: int = 16 * 1024 * 1024,
        sync_every_s: float = 1.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Continue the log at `path`, or begin it. Raises `AuditLogCorrupt` for damage that no crash explains."""
        self.path, self._key, self._clock, self._file_bytes = path, key, clock, file_bytes
        self._counts: dict[tuple[str, str, str], _Counts] = {}
        self._lock = threading.Lock()
        self._failed, self._lost, self._synced = False, 0, -1
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        self._file = -1
        try:
            self._continue()
        except BaseException:
            self._release()
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(sync_every_s,), name="audit log", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def head(self) -> Head:
        """The newest entry. Kept elsewhere, it shows truncation and a restored backup: give it to `verify`."""
        with self._lock:
            return Head(self._seq - 1, self._prev)

    def record(self, call: Call) -> None:
        """Write or count one call."""
        with self._lock:
            try:
                if not self._is_counted(call):
                    self._append("call", call.body())
            except OSError as error:
                self._fail(error)
                self._lost += 1
        if call.is_urgent:
            self._sync()

    def check(self) -> None:
        """Raise `LedgerError` while calls cannot be recorded: what cannot be recorded must not be served."""
        if self._failed:
            raise LedgerError(f"{self.path}: the audit log cannot be written; free disk space or mend the disk")

    def tick(self) -> None:
        """Write what was counted for a minute, and make all durable. Runs once a second by itself."""
        now = self._clock()
        with self._lock:
            try:
                if self._failed:
                    self._append("gap", {"calls": self._lost})
                    self._failed, self._lost = False, 0
                self._write_counts(until=now - _COUNTED_FOR)
            except OSError as error:
                self._fail(error)
        self._sync()

    def close(self) -> None:
        """Write what was counted, sign the head and let go. A second time: nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        try:
            with self._lock:
                try:
                    self._write_counts(until=None)
                    self._sign()
                except OSError as error:
                    self._fail(error)
            self._sync()
        finally:
            self._release()

    def _run(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            self.tick()

    def _release(self) -> None:
        for descriptor in (self._file, self._held):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._held = -1

    def _is_counted(self, call: Call) -> bool:
        # Who has no credential could otherwise fill the disk, one refusal at a time.
        flood = call.status == TOO_MANY or (call.is_refusal and call.who == "anonymous")
        if not flood and (call.is_refusal or call.path not in COUNTED):
            return False
        key = (call.who, call.address if call.who == "anonymous" else "", "refused" if flood else "")
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = _Counts(since=self._clock())
            if flood:
                return False
        counts.paths[call.path if call.path in COUNTED else "other"] += 1
        counts.bytes_in += call.bytes_in
        counts.bytes_out += call.bytes_out
        return True

    def _write_counts(self, *, until: datetime | None) -> None:
        for key, counts in list(self._counts.items()):
            if until is None or counts.since <= until:
                who, address, outcome = key
                if counts.paths:
                    extra = {"address": address} if address else {}
                    self._append("calls", {"who": who, "outcome": outcome or "served", **extra, **counts.body()})
                del self._counts[key]

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            _log.error("%s: the audit log cannot be written (%s)", self.path, error.strerror)
        self._failed = True

    def _continue(self) -> None:
        """Verify the current file, cut a torn line off, and say that a server has started."""
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LedgerError(f"{self.path}: another server writes this audit log; end it first") from None
        older, torn = log_files(self.path), 0
        self._seq, self._prev, self._unsigned, self._size = 0, GENESIS, 0, 0
        if self.path in older:
            data = self.path.read_bytes()
            torn = len(data) - (data.rfind(b"\n") + 1)
            self._size = len(data) - torn
            if self._size:
                older.remove(self.path)
                self._follow(_parse(self.path.name, data[: self._size], after=None))
            else:
                older.pop()
        if not self._size and older:  # A crash while a new file was begun.
            self._follow(_parse(older[-1].name, older[-1].read_bytes(), after=None))
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(self._file, self._size)
        sync_folder(self.path.parent)
        if torn:
            self._append("torn", {"bytes": torn})
        self._append("open", {"signed_by": self._key.public_hex if self._key else None})
        self._sign()
        self._sync()

    def _follow(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._seq, self._prev = entries[-1]["seq"] + 1, entries[-1]["hash"]
        kinds = [entry["kind"] for entry in reversed(entries)]
        self._unsigned = kinds.index("head") if "head" in kinds else len(kinds)

    def _append(self, kind: str, body: Mapping[str, Any]) -> None:
        if self._size > self._file_bytes:
            self._rotate()
        if self._unsigned >= SIGNED_EVERY - 1:
            self._sign()
        self._write(kind, body)

    def _sign(self) -> None:
        if self._key is not None:
            self._write("head", {"sig": self._key.sign(_HEAD_DOMAIN + bytes.fromhex(self._prev)).hex()})
            self._unsigned = 0

    def _rotate(self) -> None:
        self._sign()
        os.fsync(self._file)
        older = log_files(self.path)
        last = _number(older[-2]) if len(older) > 1 else 0
        following = self.path.with_name(f"{self.path.name}.next")
        fresh = os.open(following, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # Before anything is moved.
        os.rename(self.path, self.path.with_name(f"{self.path.stem}.{last + 1:06d}{self.path.suffix}"))
        os.rename(following, self.path)
        os.close(self._file)
        self._file, self._size = fresh, 0
        sync_folder(self.path.parent)
        self._write("open", {"continues": self._prev, "signed_by": self._key.public_hex if self._key else None})

    def _write(self, kind: str, body: Mapping[str, Any]) -> None:
        """Append one whole line, or nothing and `OSError`."""
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        record = {"v": VERSION, "seq": self._seq, "time": time, "kind": kind, "body": body, "prev": self._prev}
        digest = _digest(record)
        line = canonical({**record, "hash": digest}) + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._size + written)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self._seq, self._prev, self._unsigned = self._seq + 1, digest, self._unsigned + 1

    def _sync(self) -> None:
        """Make every entry so far durable; outside the lock, so that a slow disk holds up nobody else's entry."""
        with self._lock:
            newest = self._seq - 1
            if newest <= self._synced:
                return
            file = os.dup(self._file)  # The file may be rotated away meanwhile.
        try:
            os.fsync(file)
        except OSError as error:
            with self._lock:
                self._fail(error)
        else:
            self._synced = max(self._synced, newest)
        finally:
            os.close(file)


def log_files(path: Path) -> list[Path]:
    """All files of the log at `path`, oldest first: `audit.000001.jsonl`, ..., `audit.jsonl`."""
    rotated = [file for file in path.parent.glob(f"{path.stem}.*{path.suffix}") if _number(file)]
    return sorted(rotated, key=_number) + ([path] if path.exists() else [])


def verify(paths: Sequence[Path], *, public_hex: str | None = None, head: Head | None = None) -> int:
    """Recompute the whole chain over `paths` (oldest first, as `log_files` gives them); return how many entries it has.

    With `public_hex` (the coordinator's key) every signature is checked, and none may be missing: nothing but the
    newest `SIGNED_EVERY` entries can have been written by someone without the key. With `head`, kept from earlier,
    that entry must still be there. Raises `AuditLogCorrupt`, which names the first entry that is wrong and why.
    """
    after: Head | None = Head(-1, GENESIS)
    unsigned = 0
    for path in paths:
        entries = _parse(path.name, path.read_bytes(), after=after)
        for entry in entries:
            after = Head(entry["seq"], entry["hash"])
            unsigned = 0 if entry["kind"] == "head" else unsigned + 1
            if public_hex is not None:
                _check_signature(path.name, entry, public_hex, unsigned)
            if head is not None and head.seq == after.seq and head.hash != after.hash:
                raise AuditLogCorrupt(path.name, after.seq, "another entry stood here when its head was kept")
    count = after.seq + 1 if after is not None else 0
    if head is not None and head.seq >= count:
        raise AuditLogCorrupt(paths[-1].name if paths else "?", count, f"cut off: entry {head.seq} was there before")
    return count


@dataclass
class _Counts:
    since: datetime
    paths: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0

    def body(self) -> dict[str, Any]:
        since = self.since.astimezone(UTC).isoformat(timespec="milliseconds")
        return {"since": since, "paths": dict(self.paths), "bytes_in": self.bytes_in, "bytes_out": self.bytes_out}


def _parse(name: str, data: bytes, *, after: Head | None) -> list[dict[str, Any]]:
    """Verify the lines of one file, the first of which follows `after`, or anything where that is None."""
    lines = data.split(b"\n")
    torn = lines.pop()
    entries: list[dict[str, Any]] = []
    for line in lines:
        expected = after.seq + 1 if after is not None else len(entries)
        record = _entry(name, expected, line)
        if after is not None and record["seq"] != after.seq + 1:
            why = "an entry or a whole file before it is missing, repeated or moved"
            raise AuditLogCorrupt(name, expected, f"it carries number {record['seq']}: {why}")
        if after is not None and record["prev"] != after.hash:
            raise AuditLogCorrupt(name, expected, "it does not follow the entry before it: one was replaced or moved")
        entries.append(record)
        after = Head(record["seq"], record["hash"])
    if torn:
        expected = after.seq + 1 if after is not None else 0
        raise AuditLogCorrupt(name, expected, "the last line is cut off; the server's next start removes it")
    return entries


def _entry(name: str, expected: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or canonical(record) != line:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise AuditLogCorrupt(name, expected, "not a line of canonical JSON") from None
    if set(record) != _FIELDS or record["v"] != VERSION or record["kind"] not in _KINDS:
        raise AuditLogCorrupt(name, expected, "its fields are not those of an audit entry of this version")
    if record["hash"] != _digest({key: value for key, value in record.items() if key != "hash"}):
        raise AuditLogCorrupt(name, expected, "its hash does not match its content: changed after it was written")
    if type(record["seq"]) is not int or not isinstance(record["body"], dict):
        raise AuditLogCorrupt(name, expected, "its fields are not of the right kind")
    return record


def _check_signature(name: str, entry: Mapping[str, Any], public_hex: str, unsigned: int) -> None:
    if unsigned >= SIGNED_EVERY:
        raise AuditLogCorrupt(name, entry["seq"], f"no signature on the {SIGNED_EVERY} entries up to here")
    if entry["kind"] == "head":
        try:
            signature, signed = bytes.fromhex(entry["body"]["sig"]), _HEAD_DOMAIN + bytes.fromhex(entry["prev"])
        except (KeyError, TypeError, ValueError):
            signature, signed = b"", b""
        if not is_signed_by(public_hex, signature, signed):
            raise AuditLogCorrupt(name, entry["seq"], f"its signature is not by the key {public_hex[:16]}...")


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_HASH_DOMAIN + canonical(record)).hexdigest()


def _number(file: Path) -> int:
    digits = file.name.removesuffix(file.suffix).rpartition(".")[2]
    return int(digits) if digits.isdecimal() and digits.isascii() else 0

"""The ledger: what one site released, append-only, hash-chained and signed.

One entry is one line of canonical JSON (RFC 8785's rules for the values used here: sorted keys, no spaces,
shortest round-trip floats), so that every byte of the file counts:

    {"body":{...},"hash":H,"kind":K,"prev":P,"seq":N,"sig":S,"site":NAME,"time":T,"v":1}

- `hash` = SHA-256("fedchorus ledger v1\\0" + the line without `hash` and `sig`), hexadecimal;
- `prev` = the hash of entry N-1 (64 zeros for entry 0), `sig` = Ed25519 over `hash`'s 32 bytes, domain-separated;
- kinds: `open` (the key, the data set, how many training rows, whether this is a simulation), `budget` (what the
  holder allows), `plan` (a job, the events that each of its rounds releases, how many rounds at most, its limits),
  `reserve` (written *before* data are touched: from here on the events count as spent), `commit` (what left: the
  SHA-256 of the released vector), `settle` (the job is over). `privacy.budget` has their rules.

A plain file and not a database: an auditor reads it with nothing but these lines, and no byte of it is slack
(docs/decisions/002). One writer at a time holds an exclusive lock; an entry is durable (fsync) before `append`
returns. A crash inside a write leaves a line without its newline: it was never acknowledged, and the next writer
removes it. The chain alone cannot show that its newest entries are gone: `Head`s kept elsewhere do
(`privacy.audit`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from privacy.durable import sync_folder
from privacy.errors import LedgerCorrupt, LedgerError
from privacy.keys import IdentityKey, is_signed_by

VERSION = 1
GENESIS = "0" * 64
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # Safe in a path, a table and a log.
SERVER = "_server"  # No site can have this name.
KINDS = ("open", "budget", "plan", "reserve", "commit", "settle")
_FIELDS = {"body", "hash", "kind", "prev", "seq", "sig", "site", "time", "v"}
_HASH_DOMAIN = b"fedchorus ledger v1\0"
_SIGNATURE_DOMAIN = b"fedchorus ledger v1 signature\0"


class Head(NamedTuple):
    """The newest entry of a ledger: its number and its hash. Kept by others, it shows truncation."""

    seq: int
    hash: str


@dataclass(frozen=True)
class Entry:
    seq: int
    site: str
    time: str
    kind: str
    body: Mapping[str, Any]
    prev: str
    hash: str
    sig: str

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash)


class LedgerView:
    """A verified view of a ledger file that grows: `refresh` reads and verifies only what is new."""

    def __init__(self, path: Path, site: str, public_hex: str) -> None:
        self.path, self.site, self.public_hex = path, site, public_hex
        self._entries: list[Entry] = []
        self._read_bytes = 0
        self._reading = threading.Lock()  # Between threads that share this object; processes have the file's lock.

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    @property
    def head(self) -> Head | None:
        return self._entries[-1].head if self._entries else None

    def refresh(self) -> None:
        """Read whole new lines; a last line without its newline is left for later. A missing file has no entries."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                self._read_from(file)

    def _read_from(self, file: BinaryIO) -> int:
        """Read and verify new whole lines; return where they end."""
        with self._reading:
            if file.seek(0, os.SEEK_END) < self._read_bytes:
                raise LedgerError(f"ledger of {self.site}: {self.path} became shorter while it was open")
            file.seek(self._read_bytes)
            fresh = file.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            prev = self._entries[-1].hash if self._entries else GENESIS
            self._entries.extend(parse(whole, self.site, self.public_hex, first=len(self._entries), prev=prev))
            self._read_bytes += len(whole)
            return self._read_bytes


class Ledger(LedgerView):
    """The site's own end: append entries, durable before `append` returns.

    Opening an existing ledger verifies all of it, so a site never continues a chain that was tampered with.
    Safe between threads and processes; entries that another process appended are read before one's own.
    """

    def __init__(
        self, path: Path, site: str, key: IdentityKey, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        super().__init__(path, site, key.public_hex)
        self._key, self._clock = key, clock
        self.refresh()

    def append(
        self, kind: str, body: Mapping[str, Any], *, admit: Callable[[tuple[Entry, ...]], None] | None = None
    ) -> Entry:
        """Sign and write one entry; return it when it is on disk.

        `admit` sees every entry written so far, under the lock, and refuses by raising: what it decides cannot
        be overtaken by another process.
        """
        if kind not in KINDS:
            raise LedgerError(f"unknown kind of ledger entry {kind!r}; known: {', '.join(KINDS)}")
        with self._locked() as file:
            end = self._read_from(file)
            if admit is not None:
                admit(self.entries)
            unsigned = {
                "v": VERSION,
                "seq": len(self._entries),
                "site": self.site,
                "time": self._clock().astimezone(UTC).isoformat(timespec="milliseconds"),
                "kind": kind,
                "body": json.loads(canonical(body)),
                "prev": self._entries[-1].hash if self._entries else GENESIS,
            }
            digest = _digest(unsigned)
            signature = self._key.sign(_SIGNATURE_DOMAIN + bytes.fromhex(digest)).hex()
            file.truncate(end)  # Drops a line that a crash cut short: it was never acknowledged.
            file.write(canonical({**unsigned, "hash": digest, "sig": signature}) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            if not self._entries:
                sync_folder(self.path.parent)
            self._read_from(file)
            return self._entries[-1]

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def read_ledger(path: Path, site: str, public_hex: str) -> list[Entry]:
    """Read and verify a whole ledger file against the public key that the roster pins for `site`.

    Raises `LedgerCorrupt`, which names the first entry that is not what was signed and why.
    """
    return parse(path.read_bytes(), site, public_hex)


def parse(data: bytes, site: str, public_hex: str, *, first: int = 0, prev: str = GENESIS) -> list[Entry]:
    """Verify consecutive lines of a ledger, the first of which is entry `first` and follows the hash `prev`."""
    lines = data.split(b"\n")
    torn = lines.pop()
    entries: list[Entry] = []
    for seq, line in enumerate(lines, start=first):
        entry = _verified(line, seq, site, public_hex, prev)
        entries.append(entry)
        prev = entry.hash
    if torn:
        raise LedgerCorrupt(site, first + len(lines), "the last line is cut off (truncated, or a crash while writing)")
    return entries


def _verified(line: bytes, seq: int, site: str, public_hex: str, prev: str) -> Entry:
    def corrupt(why: str) -> LedgerCorrupt:
        return LedgerCorrupt(site, seq, why)

    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise corrupt("not a line of JSON") from None
    if not isinstance(record, dict) or set(record) != _FIELDS:
        raise corrupt("its fields are not those of a ledger entry")
    if record["v"] != VERSION:
        raise corrupt(f"format version {record['v']!r}; this program reads version {VERSION}")
    try:
        exact = canonical(record) == line
    except (ValueError, TypeError, RecursionError):
        exact = False
    if not exact:
        raise corrupt("its bytes are not in canonical form: changed after it was written")
    digest = record.pop("hash")
    signature = record.pop("sig")
    if digest != _digest(record):
        raise corrupt("its hash does not match its content: changed after it was signed")
    if not isinstance(signature, str) or not is_signed_by(
        public_hex, _from_hex(signature), _SIGNATURE_DOMAIN + bytes.fromhex(digest)
    ):
        raise corrupt(f"its signature is not by {site}'s key {public_hex[:16]}...")
    if record["seq"] != seq:
        raise corrupt(f"it carries number {record['seq']}: an entry was deleted, repeated or moved")
    if record["prev"] != prev:
        raise corrupt("it does not follow the entry before it: an entry was deleted, replaced or moved")
    if record["site"] != site:
        raise corrupt(f"it belongs to the ledger of {record['site']}")
    if record["kind"] not in KINDS or not isinstance(record["body"], dict):
        raise corrupt(f"unknown kind of entry {record['kind']!r}")
    return Entry(seq, site, record["time"], record["kind"], record["body"], prev, digest, signature)


def canonical(record: Mapping[str, Any]) -> bytes:
    """The one byte string for `record`. NaN and infinity have none: `ValueError`."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical form, hexadecimal."""
    return hashlib.sha256(canonical(record)).hexdigest()


def _digest(unsigned: Mapping[str, Any]) -> str:
    return hashlib.sha256(_HASH_DOMAIN + canonical(unsigned)).hexdigest()


def _from_hex(text: str) -> bytes:
    try:
        decoded = bytes.fromhex(text)
    except ValueError:
        return b""
    return decoded if decoded.hex() == text else b""  # No capitals, no spaces: the signature is outside the hash.

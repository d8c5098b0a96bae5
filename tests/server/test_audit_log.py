"""The audit log: what it writes, what it only counts, and that nothing in it can be changed unseen."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.errors import LedgerError
from privacy.keys import IdentityKey
from privacy.ledger import Head, canonical
from server.audit_log import SIGNED_EVERY, AuditLog, AuditLogCorrupt, Call, _digest, log_files, verify


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 5, 4, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> IdentityKey:
    return IdentityKey.create(tmp_path_factory.mktemp("keys") / "identity.pem")


def call(path: str = "/v1/fleet/push-messages", status: int = 200, who: str = "site north", **more: Any) -> Call:
    return Call(who=who, address="10.0.0.7", listener="public", method="POST", path=path, status=status, **more)


def quiet(path: Path, clock: Callable[[], datetime] | None = None, **more: Any) -> AuditLog:
    """A log whose background thread sleeps through the test."""
    return AuditLog(path, sync_every_s=3600, clock=clock or (lambda: datetime.now(UTC)), **more)


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in log_files(path) for line in file.read_bytes().splitlines()]


def bodies(path: Path, kind: str) -> list[dict[str, Any]]:
    return [entry["body"] for entry in entries(path) if entry["kind"] == kind]


def test_a_call_is_one_entry_with_who_where_and_what(path: Path, clock: Clock) -> None:
    with quiet(path, clock) as log:
        log.record(call(bytes_in=5, bytes_out=7, runs=(2**63 + 1,)))
    (entry,) = [entry for entry in entries(path) if entry["kind"] == "call"]
    assert entry["time"] == "2026-05-04T12:00:00.000+00:00"
    assert entry["body"] == {
        "who": "site north",
        "address": "10.0.0.7",
        "listener": "public",
        "method": "POST",
        "path": "/v1/fleet/push-messages",
        "status": 200,
        "runs": ["9223372036854775809"],
        "bytes_in": 5,
        "bytes_out": 7,
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@given(steps=st.lists(st.tuples(st.sampled_from(["north", "south"]), st.integers(0, 25)), max_size=40))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_polls_are_counted_and_every_one_of_them(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, clock = tmp_path_factory.mktemp("log") / "audit.jsonl", Clock()
    with quiet(path, clock) as log:
        for site, seconds in steps:
            log.record(call("/v1/fleet/pull-messages", who=f"site {site}", bytes_in=3, bytes_out=4))
            clock.move(seconds)
            log.tick()
    found = bodies(path, "calls")
    for site in ("north", "south"):
        mine = [body for body in found if body["who"] == f"site {site}"]
        polls = sum(1 for name, _ in steps if name == site)
        assert sum(body["paths"]["/v1/fleet/pull-messages"] for body in mine) == polls
        assert sum(body["bytes_in"] for body in mine) == 3 * polls
        begun = [datetime.fromisoformat(body["since"]) for body in mine]
        assert all(later - earlier >= timedelta(minutes=1) for earlier, later in pairwise(begun))


def test_a_refused_poll_is_an_entry_at_once(path: Path) -> None:
    with quiet(path) as log:
        log.record(call("/v1/fleet/pull-messages", 403, why="certificate revoked"))
        assert bodies(path, "call")[0]["why"] == "certificate revoked"


def test_a_flood_is_one_entry_and_a_count(path: Path, clock: Clock) -> None:
    with quiet(path, clock) as log:
        for _ in range(1000):
            log.record(call("/v1/fleet/push-object", 429, who="anonymous"))
        clock.move(61)
        log.tick()
    assert len(bodies(path, "call")) == 1
    (counted,) = bodies(path, "calls")
    assert counted["paths"] == {"other": 999}
    assert (counted["outcome"], counted["address"]) == ("refused", "10.0.0.7")


@pytest.mark.parametrize(
    ("urgent", "entry"),
    [
        (True, call("/v1/control/list-runs")),
        (True, call(status=403)),
        (True, call("/nowhere", 404)),
        (False, call()),
        (False, call(status=429)),
    ],
)
def test_refusals_and_control_calls_are_on_disk_before_record_returns(
    urgent: bool, entry: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet(path) as log:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
        log.record(entry)
        assert synced == ([path.stat().st_size] if urgent else [])
        log.tick()
        log.tick()
        assert synced == [path.stat().st_size]  # Once, and not again when nothing is new.


def test_the_background_thread_makes_entries_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    with AuditLog(path, sync_every_s=0.01) as log:
        monkeypatch.setattr(os, "fsync", lambda file: synced.set())
        log.record(call())
        assert synced.wait(10)


def test_threads_write_one_chain(path: Path, key: IdentityKey) -> None:
    with quiet(path, key=key, file_bytes=20_000) as log:

        def write(number: int) -> None:
            for turn in range(60):
                log.record(call(status=403 if turn % 7 == 0 else 200, bytes_in=number))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(log_files(path)) > 2
    assert verify(log_files(path), public_hex=key.public_hex) == len(entries(path))
    assert len(bodies(path, "call")) == 360


def test_a_new_file_names_the_last_hash_of_the_old(path: Path) -> None:
    with quiet(path, file_bytes=2000) as log:
        for _ in range(30):
            log.record(call())
    files = log_files(path)
    assert [file.name for file in files[:2]] == ["audit.000001.jsonl", "audit.000002.jsonl"]
    assert files[-1] == path
    assert all(file.stat().st_size < 3000 for file in files)
    for old, new in pairwise(files):
        first = json.loads(new.read_bytes().splitlines()[0])
        assert first["body"]["continues"] == first["prev"] == json.loads(old.read_bytes().splitlines()[-1])["hash"]


def test_a_restart_continues_the_chain(path: Path, key: IdentityKey) -> None:
    for _ in range(3):
        with quiet(path, key=key, file_bytes=3000) as log:
            for _ in range(8):
                log.record(call())
    assert verify(log_files(path), public_hex=key.public_hex) == len(entries(path))
    assert len(bodies(path, "call")) == 24


def test_a_crash_while_a_file_is_begun_loses_nothing(path: Path, key: IdentityKey) -> None:
    with quiet(path, key=key, file_bytes=1500) as log:
        for _ in range(8):
            log.record(call())
    count = len(entries(path))
    os.rename(path, path.with_name("audit.000099.jsonl"))  # As between the two renames.
    with quiet(path, key=key):
        pass
    assert verify(log_files(path), public_hex=key.public_hex) > count
    path.write_bytes(b"")  # The name was durable, the content was not.
    with quiet(path, key=key):
        pass
    assert verify(log_files(path), public_hex=key.public_hex) > count


@given(keep=st.integers(1, 100), zeros=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_line_that_a_crash_cut_short_is_removed_and_noted(
    keep: int, zeros: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    with quiet(path) as log:
        log.record(call())
    whole = path.read_bytes()
    torn = bytes(100 * keep) if zeros else whole.splitlines()[-1][:keep]  # Some file systems leave zeros.
    path.write_bytes(whole + torn)
    with pytest.raises(AuditLogCorrupt, match="cut off"):
        verify([path])
    with quiet(path) as log:
        log.record(call())
    assert bodies(path, "torn") == [{"bytes": len(torn)}]
    assert verify([path]) == len(entries(path))


def fill(path: Path, key: IdentityKey, calls: int = 400) -> list[bytes]:
    with quiet(path, key=key) as log:
        for number in range(calls):
            log.record(call(bytes_in=number))
    return path.read_bytes().splitlines(keepends=True)


def edited(line: bytes) -> bytes:
    return line.replace(b'"status":200', b'"status":403')


def rewritten(lines: list[bytes], at: int) -> list[bytes]:
    """The whole chain from `at` on as someone without the key would write it anew."""
    made, prev = lines[:at], json.loads(lines[at])["prev"]
    for line in lines[at:]:
        record = json.loads(edited(line))
        record["prev"] = prev
        del record["hash"]
        prev = record["hash"] = _digest(record)
        made.append(canonical(record) + b"\n")
    return made


TAMPERED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "edited": lambda lines: [*lines[:9], edited(lines[9]), *lines[10:]],
    "replaced": lambda lines: [*lines[:9], rewritten(lines, 9)[9], *lines[10:]],
    "dropped": lambda lines: lines[:9] + lines[10:],
    "repeated": lambda lines: lines[:9] + lines[8:],
    "reordered": lambda lines: [*lines[:9], lines[10], lines[9], *lines[11:]],
    "first gone": lambda lines: lines[1:],
    "spaces": lambda lines: [*lines[:9], lines[9].replace(b":", b": ", 1), *lines[10:]],
    "not JSON": lambda lines: [*lines[:9], b"hello\n", *lines[10:]],
    "a list": lambda lines: [*lines[:9], b"[]\n", *lines[10:]],
    "deep": lambda lines: [*lines[:9], b"[" * 100_000 + b"\n", *lines[10:]],
    "zeros": lambda lines: [*lines[:9], bytes(40) + b"\n", *lines[10:]],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampering_is_found_where_it_was_done(how: str, path: Path, key: IdentityKey) -> None:
    lines = fill(path, key, 20)
    path.write_bytes(b"".join(TAMPERED[how](lines)))
    with pytest.raises(AuditLogCorrupt) as error:
        verify([path])
    assert error.value.entry == {"first gone": 0, "replaced": 10}.get(how, 9)
    assert "\n" not in str(error.value)
    if how != "first gone":
        with pytest.raises(AuditLogCorrupt):
            quiet(path, key=key)


@pytest.mark.parametrize("at", [0, 5, 200])
def test_nobody_without_the_key_can_write_the_past_anew(at: int, path: Path, key: IdentityKey) -> None:
    lines = fill(path, key)
    assert verify([path], public_hex=key.public_hex) == len(lines)
    path.write_bytes(b"".join(rewritten(lines, at)))
    assert verify([path]) == len(lines)  # The chain alone is whole again.
    with pytest.raises(AuditLogCorrupt, match="signature"):
        verify([path], public_hex=key.public_hex)


def test_signatures_cannot_be_left_out(path: Path, key: IdentityKey) -> None:
    lines = fill(path, key)
    kept = [line for line in lines if b'"kind":"head"' not in line]
    records = []
    prev, seq = "0" * 64, 0
    for line in kept:
        record = {**json.loads(line), "prev": prev, "seq": seq}
        del record["hash"]
        prev = record["hash"] = _digest(record)
        records.append(canonical(record) + b"\n")
        seq += 1
    path.write_bytes(b"".join(records))
    assert verify([path]) == seq
    with pytest.raises(AuditLogCorrupt, match=f"no signature on the {SIGNED_EVERY}"):
        verify([path], public_hex=key.public_hex)


def test_another_key_is_not_the_coordinators(path: Path, key: IdentityKey, tmp_path: Path) -> None:
    fill(path, key, 3)
    other = IdentityKey.create(tmp_path / "other.pem")
    with pytest.raises(AuditLogCorrupt, match="not by the key"):
        verify([path], public_hex=other.public_hex)


@pytest.mark.parametrize("calls", range(SIGNED_EVERY - 5, SIGNED_EVERY + 3))
def test_a_crash_beside_a_signature_leaves_a_log_that_verifies(calls: int, path: Path, key: IdentityKey) -> None:
    lines = fill(path, key, SIGNED_EVERY * 2)
    path.write_bytes(b"".join(lines[:calls]))
    with quiet(path, key=key) as log:
        log.record(call())
    assert verify([path], public_hex=key.public_hex) > calls


def test_a_kept_head_shows_truncation_and_a_restored_backup(path: Path, key: IdentityKey) -> None:
    with quiet(path, key=key) as log:
        log.record(call())
        backup = path.read_bytes()
        log.record(call())
        head = log.head
    whole = path.read_bytes()
    assert verify([path], head=head) == len(entries(path))
    path.write_bytes(backup)
    assert verify([path]) == head.seq  # Whole in itself.
    with pytest.raises(AuditLogCorrupt, match="cut off"):
        verify([path], head=head)
    with quiet(path, key=key) as log:
        log.record(call())
    with pytest.raises(AuditLogCorrupt, match="another entry"):
        verify([path], head=head)
    path.write_bytes(whole)
    with pytest.raises(AuditLogCorrupt, match="cut off"):
        verify([], head=Head(0, head.hash))


def test_a_file_in_the_middle_cannot_go_missing(path: Path) -> None:
    with quiet(path, file_bytes=1500) as log:
        for _ in range(20):
            log.record(call())
    files = log_files(path)
    with pytest.raises(AuditLogCorrupt, match="missing"):
        verify([files[0], *files[2:]])
    with pytest.raises(AuditLogCorrupt, match="missing"):
        verify(files[1:])


def test_a_full_disk_is_said_before_the_next_call_and_ends_with_a_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet(path) as log:
        log.record(call())
        log.check()
        real, half = os.pwrite, [True]

        def full(file: int, data: bytes, offset: int) -> int:
            if half.pop() if half else False:
                return real(file, data[:10], offset)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        log.record(call())
        log.record(call(status=403))
        assert path.read_bytes().endswith(b"}\n")  # Nothing of the half line is left.
        with pytest.raises(LedgerError, match="free disk space"):
            log.check()
        log.tick()
        with pytest.raises(LedgerError):
            log.check()
        monkeypatch.setattr(os, "pwrite", real)
        log.tick()
        log.check()
        log.record(call())
    assert bodies(path, "gap") == [{"calls": 2}]
    assert verify([path]) == len(entries(path))


def test_one_server_writes_at_a_time(path: Path) -> None:
    with quiet(path), pytest.raises(LedgerError, match="another server"):
        quiet(path)
    with quiet(path) as log:
        log.close()
    with quiet(path):
        pass

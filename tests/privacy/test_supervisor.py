"""One process is kept alive: killed it comes back, stopped it stays away, and it never outlives who keeps it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from privacy.errors import RunError
from privacy.logbook import Logbook
from privacy.supervisor import end_with_parent, keep_alive, only_one

ROOT = Path(__file__).parents[2]
# The child writes its number and what it was told to a file, then does as `life` says.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from privacy.supervisor import end_with_parent
life, folder = sys.argv[1], Path(sys.argv[2])
told = sys.stdin.buffer.readline()
end_with_parent()
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
starts = len(list(folder.glob("*.start")))
partial = folder / "start"
partial.write_bytes(str(os.getpid()).encode() + b" " + told)
partial.rename(folder / f"{starts}.start")
if life == "ends":
    sys.exit(int(sys.argv[3 + min(starts, len(sys.argv) - 4)]))
while True:
    time.sleep(0.05)
"""
PARENT = """
import sys
from pathlib import Path
from privacy.logbook import Logbook
from privacy.supervisor import keep_alive
log = Logbook("test", Path(sys.argv[1]) / "log.jsonl", stream=None)
sys.exit(keep_alive(sys.argv[2:], log=log, secret=b"a passphrase"))
"""


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def starts(folder: Path) -> list[int]:
    """The process numbers of the child's lives, so far."""
    return [int(path.read_text().split()[0]) for path in sorted(folder.glob("*.start"))]


def child(life: str, folder: Path, *codes: int) -> list[str]:
    return [sys.executable, "-c", CHILD, life, str(folder), *map(str, codes)]


@contextmanager
def kept(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor in a process of its own, and its child's first life."""
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder), *command], cwd=ROOT) as process:
        try:
            until(lambda: bool(starts(folder)))
            yield process
        finally:
            process.kill()
            for pid in starts(folder):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.supervisor.FIRST_S", 0.01)
    monkeypatch.chdir(ROOT)


def test_a_killed_child_is_started_again_and_told_its_passphrase_each_time(tmp_path: Path) -> None:
    with kept(tmp_path, *child("stays", tmp_path)) as parent:
        first = starts(tmp_path)[0]
        os.kill(first, signal.SIGKILL)
        until(lambda: len(starts(tmp_path)) == 2)
        assert lives(parent.pid)
        assert starts(tmp_path)[1] != first
        for path in tmp_path.glob("*.start"):
            assert path.read_bytes().partition(b" ")[2] == b"a passphrase\n"
        line = json.loads((tmp_path / "log.jsonl").read_text())
        assert (line["level"], line["ended"]) == ("warning", "killed by SIGKILL")
        command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (parent.pid, starts(tmp_path)[1])]
        assert not any(b"passphrase" in line.replace(PARENT.encode(), b"") for line in command_lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_a_signal_to_stop_is_passed_on_and_ends_both(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with kept(tmp_path, *child("stays", tmp_path)) as parent:
        parent.send_signal(number)
        assert parent.wait(60) == code
        assert not lives(starts(tmp_path)[0])
    assert len(starts(tmp_path)) == 1


def test_a_child_ends_when_who_keeps_it_is_killed(tmp_path: Path) -> None:
    with kept(tmp_path, *child("stays", tmp_path)) as parent:
        pid = starts(tmp_path)[0]
        parent.kill()
        until(lambda: not lives(pid))


@pytest.mark.parametrize("code", [0, 2])
def test_codes_that_mean_stopped_or_needs_a_person_are_not_answered_with_a_start(code: int, tmp_path: Path) -> None:
    log = Logbook("test", None, stream=None)
    assert keep_alive(child("ends", tmp_path, code), log=log) == code
    assert len(starts(tmp_path)) == 1


def test_any_other_code_is_answered_with_a_start_after_a_pause_that_grows(tmp_path: Path) -> None:
    log = Logbook("test", tmp_path / "log.jsonl", stream=None)
    assert keep_alive(child("ends", tmp_path, 1, 3, 1, 2), log=log) == 2
    assert len(starts(tmp_path)) == 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["ended"] for line in lines] == ["exit code 1", "exit code 3", "exit code 1"]
    pauses = [line["pause_s"] for line in lines]
    assert pauses == sorted(set(pauses))


def test_a_child_that_ends_before_it_is_told_anything_is_no_error(tmp_path: Path) -> None:
    log = Logbook("test", None, stream=None)
    assert keep_alive([sys.executable, "-c", "raise SystemExit(2)"], log=log, secret=bytes(2**20)) == 2


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    keep_alive(child("ends", tmp_path, 0), log=Logbook("test", None, stream=None))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_one_process_at_a_time_is_let_in_and_the_next_when_it_has_gone(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    said = "another process is this site's client here"
    with only_one(lock, what="this site's client"), pytest.raises(RunError, match=said):
        only_one(lock, what="this site's client", patience_s=0.0).__enter__()
    with only_one(lock, what="this site's client", patience_s=0.0):
        pass


def test_who_waits_for_a_parent_to_die_does_not_hinder_an_end_of_its_own() -> None:
    assert end_with_parent.__module__ == "privacy.supervisor"
    program = "from privacy.supervisor import end_with_parent; end_with_parent(); raise SystemExit(5)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=ROOT) as process:
        assert process.wait(60) == 5

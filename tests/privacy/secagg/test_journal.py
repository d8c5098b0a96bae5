"""What was claimed stays claimed: through crashes at any step, races between processes, and damage."""

import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refused
from privacy.secagg.journal import HEADER, Journal

CLAIMS = [("unmask", "round 1"), ("mask", "root a"), ("unmask", "round 2")]
LINE = 64 + 1 + 16 + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a journal with CLAIMS."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    for kind, key in CLAIMS:
        Journal(path).claim(kind, key)
    return path.read_bytes()


NO_ROOM = """
import resource, sys
from pathlib import Path
from privacy.errors import Refused
from privacy.secagg.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
for _ in range(2):
    try:
        Journal(Path(sys.argv[1])).claim("unmask", "round 1")
    except Refused:
        print("refused")
"""


class TestClaims:
    @pytest.mark.parametrize("fresh", [True, False])
    def test_succeed_once(self, path: Path, fresh: bool) -> None:
        journal = Journal(path)
        journal.claim("unmask", "round 1")
        for _ in range(2):
            with pytest.raises(Refused, match="unmask: answered 1 times already, and at most 1") as caught:
                (Journal(path) if fresh else journal).claim("unmask", "round 1")
            assert "round" not in str(caught.value)
        journal.claim("unmask", "round 2")
        journal.claim("mask", "round 1")

    @settings(max_examples=40, deadline=None)  # The disk's time is not ours.
    @given(
        calls=st.lists(
            st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 3), st.booleans()), max_size=12
        )
    )
    def test_are_counted_as_a_counter_would(
        self, calls: list[tuple[str, str, int, bool]], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("journal") / "journal"
        journals, model = [Journal(path), Journal(path)], Counter[tuple[str, str]]()
        for kind, key, most, which in calls:
            if model[kind, key] < most:
                journals[which].claim(kind, key, most=most)
                model[kind, key] += 1
            else:
                with pytest.raises(Refused):
                    journals[which].claim(kind, key, most=most)
            assert all(journal.count(kind, key) == model[kind, key] for journal in (*journals, Journal(path)))

    def test_do_not_mix_where_kind_and_key_read_alike_together(self, path: Path) -> None:
        for kind, key in [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("a\0", "bc"), ("a", "\0bc")]:
            Journal(path).claim(kind, key)

    def test_counting_creates_nothing(self, path: Path) -> None:
        assert Journal(path).count("unmask", "round 1") == 0
        assert not path.exists()

    def test_are_lines_of_digests_in_the_documented_form(self, written: bytes) -> None:
        expected = b"fedchorus journal 1\n"
        for kind, key in CLAIMS:
            length = len(kind).to_bytes(4, "little")
            expected += (
                hashlib.sha256(b"fedchorus journal v1\0" + length + f"{kind}{key}".encode()).hexdigest().encode()
            )
            expected += b" " + hashlib.sha256(expected.replace(b" \n", b"")).hexdigest()[:16].encode() + b"\n"
        assert written == expected

    def test_are_readable_by_the_owner_alone(self, path: Path) -> None:
        Journal(path).claim("unmask", "round 1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize("name", ["missing/journal", "."])
    def test_are_refused_where_no_file_can_be_written(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(Refused, match="cannot be used"):
            Journal(tmp_path / name).claim("unmask", "round 1")

    @pytest.mark.parametrize("room", [0, 10, 20, 21, 20 + LINE - 1])
    def test_are_refused_when_there_is_no_room_and_go_on_when_there_is(self, path: Path, room: int) -> None:
        ran = subprocess.run([sys.executable, "-c", NO_ROOM, str(path), str(room)], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "refused\nrefused\n"), ran.stderr
        Journal(path).claim("unmask", "round 1")
        assert len(path.read_bytes()) == 20 + LINE

    def test_are_on_disk_before_they_return_the_folder_first(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[tuple[str, bytes]] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            synced.append(("folder" if is_folder else "file", path.read_bytes()))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        Journal(path).claim("unmask", "round 1")
        assert synced == [("file", HEADER), ("folder", HEADER), ("file", path.read_bytes())]
        Journal(path).claim("unmask", "round 2")
        assert synced[3:] == [("file", path.read_bytes())]


class TestDamage:
    def test_a_torn_last_line_was_never_claimed(self, written: bytes, path: Path) -> None:
        ends = range(len(HEADER), len(written), LINE)
        for length in {*range(0, len(written), 9), *(end + by for end in ends for by in (-1, 0, 1)), len(written) - 1}:
            path.write_bytes(written[:length])
            whole = max(0, length - len(HEADER)) // LINE
            for number, (kind, key) in enumerate(CLAIMS):
                assert Journal(path).count(kind, key) == (number < whole)
            for number, (kind, key) in enumerate(CLAIMS):
                if number >= whole:
                    Journal(path).claim(kind, key)
            assert path.read_bytes() == written

    def test_a_torn_line_of_anything_is_cut_off(self, written: bytes, path: Path) -> None:
        path.write_bytes(written + bytes(LINE - 1))  # A file grown before its content came.
        Journal(path).claim("unmask", "round 3")
        assert path.read_bytes()[: len(written)] == written
        assert len(path.read_bytes()) == len(written) + LINE

    def test_any_changed_byte_is_refused(self, written: bytes, path: Path) -> None:
        for at in range(len(written)):
            path.write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
            for call in (Journal(path).claim, Journal(path).count):
                with pytest.raises(Refused, match=r"does not begin with|not those that were written"):
                    call("unmask", "round 3")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:20] + data[20 + LINE :],  # A line gone,
            lambda data: data[:20] + data[20 + LINE : 20 + 2 * LINE] + data[20 : 20 + LINE] + data[20 + 2 * LINE :],
            lambda data: data + data[-LINE:],  # ... two exchanged, one repeated,
            lambda data: data + b"\n",
            lambda data: data + b"ab\ncd",
            lambda data: data + bytes(LINE),
            lambda data: data.replace(b"journal 1", b"journal 2"),
            lambda data: data[1:],
            lambda data: b"\n" + data,
            lambda data: b"{}",
            lambda data: bytes(5),
        ],
    )
    def test_any_other_change_is_refused_and_left_as_it_is(self, damage: object, written: bytes, path: Path) -> None:
        assert callable(damage)
        path.write_bytes(damage(written))
        for _ in range(2):
            with pytest.raises(Refused, match="what was answered before is not known"):
                Journal(path).claim("unmask", "round 3")
        assert path.read_bytes() == damage(written)

    @pytest.mark.parametrize("left", [0, 10, 20, 20 + LINE])
    def test_a_file_that_is_rolled_back_while_in_use_is_refused(self, left: int, written: bytes, path: Path) -> None:
        path.write_bytes(written)
        journal = Journal(path)
        assert journal.count(*CLAIMS[2]) == 1
        path.write_bytes(written[:left])
        with pytest.raises(Refused, match="became shorter"):
            journal.claim(*CLAIMS[2])
        path.unlink()
        with pytest.raises(Refused, match="cannot be used"):
            journal.count(*CLAIMS[2])
        with pytest.raises(Refused, match="became shorter"):
            journal.claim(*CLAIMS[2])

    def test_lines_that_follow_another_beginning_are_refused(self, written: bytes, path: Path) -> None:
        path.write_bytes(written)
        journal = Journal(path)
        assert journal.count(*CLAIMS[0]) == 1
        path.unlink()
        for number in range(4):
            Journal(path).claim("other", str(number))
        with pytest.raises(Refused, match="not those that were written"):
            journal.claim("unmask", "round 3")


RACER = """
import sys
from pathlib import Path
from privacy.errors import Refused
from privacy.secagg.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for key in ("round 1", "round 2"):
    try:
        journal.claim("unmask", key, most=1 if key == "round 1" else 3)
        print("won", key)
    except Refused:
        pass
"""

# Forks a child for each line that `claim` and what it calls run through; each is killed at its line.
KILLED = """
import os, signal, sys
from pathlib import Path
from privacy.secagg import journal as module

folder, step = Path(sys.argv[1]), 0
while True:
    child = os.fork()
    if not child:
        left = step
        def trace(frame, event, argument):
            global left
            if frame.f_code.co_filename not in (module.__file__, module.sync_folder.__code__.co_filename):
                return None
            if event != "call":
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return trace
        sys.settrace(trace)
        journal = module.Journal(folder / f"{step}")
        journal.claim("unmask", "round 1")
        (folder / f"{step} acknowledged 1").touch()
        journal.claim("unmask", "round 2")
        (folder / f"{step} acknowledged 2").touch()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
    step += 1
"""


class TestRaces:
    def test_of_twenty_processes_one_wins(self, path: Path) -> None:
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(20)
        ]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        printed = "".join(racer.communicate(timeout=60)[0] for racer in racers)
        assert [racer.returncode for racer in racers] == [0] * 20
        assert sorted(printed.splitlines()) == ["won round 1"] + ["won round 2"] * 3
        assert (Journal(path).count("unmask", "round 1"), Journal(path).count("unmask", "round 2")) == (1, 3)

    @pytest.mark.parametrize("shared", [True, False])
    def test_of_many_threads_one_wins_each(self, path: Path, shared: bool) -> None:
        journal, won = Journal(path), list[str]()
        start = threading.Barrier(8)

        def race() -> None:
            own = journal if shared else Journal(path)
            start.wait()
            for number in range(10):
                try:
                    own.claim("unmask", str(number))
                except Refused:
                    continue
                won.append(str(number))

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [str(number) for number in range(10)]

    def test_a_process_killed_at_any_step_neither_loses_a_claim_nor_blocks_the_next(self, tmp_path: Path) -> None:
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=60)
        steps = {int(path.name.split()[0]) for path in tmp_path.iterdir()}
        assert len(steps) > 60
        outcomes = set()
        for step in steps:
            path = tmp_path / f"{step}"
            acknowledged = tuple((tmp_path / f"{step} acknowledged {number}").exists() for number in (1, 2))
            counted = tuple(Journal(path).count("unmask", f"round {number}") for number in (1, 2))
            assert all(count >= known for count, known in zip(counted, acknowledged, strict=True))
            outcomes.add((acknowledged, counted))
            for number, count in zip((1, 2), counted, strict=True):
                if count:
                    with pytest.raises(Refused):
                        Journal(path).claim("unmask", f"round {number}")
                else:
                    Journal(path).claim("unmask", f"round {number}")
            Journal(path).claim("unmask", "round 3")
        # They were killed before a claim, between a claim and its return, and after: all three are covered.
        assert {((False, False), (0, 0)), ((False, False), (1, 0)), ((True, False), (1, 0))} <= outcomes

    def test_a_child_that_lives_on_does_not_keep_the_lock(self, path: Path) -> None:
        journal = Journal(path)
        with journal._locked("a+") as file:
            other = os.dup(file.fileno())  # What a child forked here would hold.
        try:
            done = threading.Thread(target=Journal(path).claim, args=("unmask", "round 1"), daemon=True)
            done.start()
            done.join(timeout=10)
            assert not done.is_alive()
        finally:
            os.close(other)

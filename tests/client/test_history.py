"""What a site admitted is counted through crashes, and a file that is not what was written stops the client."""

import stat
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.history import History, HistoryDamaged

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ONE, TWO = "1" * 64, "2" * 64
LONG_AGO = NOW - timedelta(days=9999)


def counts(history: History) -> tuple[int, int]:
    return history.jobs_since(LONG_AGO), history.rounds_since(LONG_AGO)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def written(path: Path) -> bytes:
    """Two jobs and three rounds."""
    history = History(path)
    for number, job in enumerate((ONE, TWO)):
        history.admit(job, now=NOW + timedelta(hours=number))
    for number in (1, 2, 3):
        history.answer(ONE, number, now=NOW + timedelta(hours=number))
    return path.read_bytes()


def test_counts_what_came_after_a_moment_also_when_it_is_opened_again(path: Path) -> None:
    written(path)
    for history in (History(path), History(path)):
        assert [history.jobs_since(NOW + timedelta(hours=n)) for n in (-1, 0, 1)] == [2, 1, 0]
        assert [history.rounds_since(NOW + timedelta(hours=n)) for n in (0, 1, 2, 3)] == [3, 2, 1, 0]
        assert history.knows(ONE)
        assert not history.knows("3" * 64)


def test_a_job_is_admitted_once_and_a_round_counts_each_time(path: Path) -> None:
    history = History(path)
    for _ in range(3):
        history.admit(ONE, now=NOW)
        history.answer(ONE, 1, now=NOW)
    assert counts(history) == counts(History(path)) == (1, 3)
    assert len(path.read_bytes().splitlines()) == 4


def test_nothing_is_written_before_the_first_line_and_only_its_owner_reads_it(path: Path) -> None:
    assert counts(History(path)) == (0, 0)
    assert not path.exists()
    History(path).admit(ONE, now=NOW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_times_are_kept_in_utc_whatever_zone_they_come_in(path: Path) -> None:
    History(path).answer(ONE, 1, now=NOW.astimezone(timezone(timedelta(hours=9))))
    assert b'"time":"2026-03-01T12:00:00.000+00:00"' in path.read_bytes()
    with pytest.raises(ValueError, match="zone"):
        History(path).answer(ONE, 2, now=NOW.replace(tzinfo=None))
    assert counts(History(path)) == (0, 1)


def test_two_that_share_the_file_see_each_others_lines(path: Path) -> None:
    first, second = History(path), History(path)
    first.admit(ONE, now=NOW)
    assert second.knows(ONE)
    second.answer(ONE, 1, now=NOW)
    first.answer(ONE, 2, now=NOW)
    assert counts(first) == counts(second) == (1, 2)


def test_lines_of_many_writers_never_mix(path: Path) -> None:
    def write(job: str) -> None:
        history = History(path)
        for number in range(10):
            history.answer(job, number, now=NOW)

    threads = [threading.Thread(target=write, args=(f"{n:064x}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(History(path)) == (0, 40)


def test_a_line_that_a_crash_cut_short_never_was_and_the_next_replaces_it(path: Path) -> None:
    whole = written(path)
    begin = whole[:-1].rfind(b"\n") + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        assert counts(History(path)) == (2, 2)
    history = History(path)
    history.answer(ONE, 3, now=NOW + timedelta(hours=3))
    assert path.read_bytes() == whole


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_in_a_whole_line_is_damage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("site") / "history.jsonl"
    content = bytearray(written(path))
    content[data.draw(st.integers(0, len(content) - 2))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(HistoryDamaged, match=r"line \d is not what was written"):
        History(path)


@pytest.mark.parametrize("change", ["drop", "swap", "repeat", "blank", "number", "list", "deep"])
def test_a_line_that_was_dropped_moved_or_put_in_is_damage(change: str, path: Path) -> None:
    lines = written(path).splitlines(keepends=True)
    match change:
        case "drop":
            del lines[1]
        case "swap":
            lines[2], lines[3] = lines[3], lines[2]
        case "repeat":
            lines.insert(2, lines[2])
        case _:
            lines.insert(2, {"blank": b"\n", "number": b"1\n", "list": b"[]\n", "deep": b"[" * 99999 + b"\n"}[change])
    path.write_bytes(b"".join(lines))
    with pytest.raises(HistoryDamaged, match="is not what was written") as caught:
        History(path)
    assert len(str(caught.value).splitlines()) == 1
    assert ONE not in str(caught.value)


def test_damage_that_comes_later_stops_the_next_count_and_the_next_line(path: Path) -> None:
    whole = written(path)
    history = History(path)
    path.write_bytes(whole[:-20])
    with pytest.raises(HistoryDamaged, match="became shorter while it was in use"):
        history.answer(ONE, 4, now=NOW)
    path.unlink()
    with pytest.raises(HistoryDamaged, match="cannot be used"):
        history.rounds_since(NOW)


def test_a_folder_in_its_place_is_damage(path: Path) -> None:
    path.mkdir()
    with pytest.raises(HistoryDamaged, match="cannot be used"):
        History(path)

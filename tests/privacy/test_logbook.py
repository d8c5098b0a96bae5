"""A program's log is one JSON object a line whatever it is told, and no longer than it may be."""

from __future__ import annotations

import io
import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.logbook import Logbook


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@given(text=st.text(), more=st.text(), number=st.integers() | st.floats(allow_nan=False))
def test_whatever_is_logged_is_one_line_in_both_places(
    text: str, more: str, number: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, stream = tmp_path_factory.mktemp("log") / "log.jsonl", io.StringIO()
    Logbook("client north", path, stream=stream).warning("refused a message", why=text, job=more, rounds=number)
    (line,) = lines(path)
    assert (line["why"], line["job"], line["rounds"]) == (text, more, number)
    assert (line["level"], line["program"], line["event"]) == ("warning", "client north", "refused a message")
    assert len(stream.getvalue().splitlines()) == 1


def test_a_line_has_the_time_with_its_zone(tmp_path: Path) -> None:
    Logbook("server", tmp_path / "log.jsonl", stream=None).info("starts")
    (line,) = lines(tmp_path / "log.jsonl")
    assert datetime.fromisoformat(line["time"]).utcoffset() is not None


def test_a_person_sees_the_level_the_fields_and_short_hashes(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = Logbook("server", None, stream=stream)
    log.info("serves", federation="thorax")
    log.error("cannot run", why="a disk\nis full", job="ab" * 32)
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" server: serves (federation thorax)")
    assert second.endswith(" server: error: cannot run (why a disk is full, job abababababab)")


def test_what_json_does_not_know_is_written_as_its_text(tmp_path: Path) -> None:
    Logbook("server", tmp_path / "log.jsonl", stream=None).info("keeps", path=Path("a/b"))
    assert lines(tmp_path / "log.jsonl")[0]["path"] == "a/b"


def test_a_file_that_is_full_becomes_the_one_before_and_nothing_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.logbook.MOST_BYTES", 500)
    path = tmp_path / "log.jsonl"
    log = Logbook("server", path, stream=None)
    for number in range(40):
        log.info("counts", number=number)
        assert path.stat().st_size < 500 + 200
    assert {file.name for file in tmp_path.iterdir()} == {"log.jsonl", "log.jsonl.1"}
    kept = [line["number"] for name in ("log.jsonl.1", "log.jsonl") for line in lines(tmp_path / name)]
    assert kept == list(range(kept[0], 40))


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path, stream = tmp_path / "log.jsonl", io.StringIO()
    log = Logbook("server", path, stream=stream)

    def say() -> None:
        for number in range(50):
            log.info("x" * 100, n=number)

    threads = [threading.Thread(target=say) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path)) == len(stream.getvalue().splitlines()) == 200


def test_a_log_goes_on_where_an_earlier_process_stopped(tmp_path: Path) -> None:
    for _ in range(2):
        Logbook("server", tmp_path / "log.jsonl", stream=None).info("starts")
    assert len(lines(tmp_path / "log.jsonl")) == 2

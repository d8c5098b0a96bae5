"""Records on disk are whole or missing, and a damaged one is named in one line."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import RunError
from privacy.record_folder import RecordFolder

RECORDS = st.dictionaries(st.text(max_size=9), st.none() | st.booleans() | st.integers() | st.text(max_size=9))


@pytest.fixture
def folder(tmp_path: Path) -> RecordFolder:
    return RecordFolder(tmp_path / "run")


@given(record=RECORDS)
def test_a_record_reads_back_as_it_was_written(
    record: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = RecordFolder(tmp_path_factory.mktemp("run"))
    folder.write("state.json", record)
    assert folder.read("state.json") == record
    assert [path.name for path in folder.path.iterdir()] == ["state.json"]


def test_a_missing_record_is_named(folder: RecordFolder) -> None:
    with pytest.raises(RunError, match=r"run: state\.json is missing"):
        folder.read("state.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff", b'"text"'])
def test_a_record_that_is_no_object_is_damaged(folder: RecordFolder, content: bytes) -> None:
    folder.write_bytes("state.json", content)
    with pytest.raises(RunError, match=r"state\.json is damaged"):
        folder.read("state.json")


def test_what_json_cannot_say_is_not_written(folder: RecordFolder) -> None:
    folder.write("state.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        folder.write("state.json", {"loss": float("nan")})
    assert folder.read("state.json") == {"loss": 1.0}


def test_lines_are_appended_and_one_that_was_cut_off_is_not_there(folder: RecordFolder) -> None:
    assert folder.lines("metrics.jsonl") == []
    folder.write_text("other", "x")  # The folder is there with its first file.
    for number in (1, 2):
        folder.append("metrics.jsonl", {"round": number})
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"round": 3')
    assert [line["round"] for line in folder.lines("metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"round": "1"}', b'{"round": true}', b"not json"])
def test_a_line_that_is_no_round_is_damaged(folder: RecordFolder, line: bytes) -> None:
    folder.write_bytes("metrics.jsonl", b'{"round": 1}\n' + line + b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        folder.lines("metrics.jsonl")


def test_rounds_that_were_never_kept_are_dropped_from_both_files(folder: RecordFolder) -> None:
    folder.write_text("other", "x")
    for number in (1, 2, 3):
        folder.append("metrics.jsonl", {"round": number})
        folder.append("heads.jsonl", {"round": number, "heads": {}})
    folder.keep_rounds(2)
    assert [line["round"] for line in folder.lines("metrics.jsonl")] == [1, 2]
    assert [line["round"] for line in folder.lines("heads.jsonl")] == [1, 2]


def _tries(path: Path, answers: multiprocessing.Queue[str]) -> None:
    try:
        with RecordFolder(path).locked():
            answers.put("")
    except RunError as error:
        answers.put(str(error))


def test_one_process_at_a_time_runs_a_run(folder: RecordFolder) -> None:
    folder.write_text("other", "x")
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()

    def other() -> str:
        process = context.Process(target=_tries, args=(folder.path, answers))
        process.start()
        said = answers.get(timeout=60)
        process.join()
        process.close()
        return said

    with folder.locked():
        assert "another process is running this run" in other()
    assert other() == ""
    answers.close()
    answers.join_thread()

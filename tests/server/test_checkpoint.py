"""A checkpoint is the whole state, replaced at once or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from privacy.errors import RunError
from server.checkpoint import load_checkpoint, save_checkpoint
from strategies.protocol import ServerState

JOB = "ab" * 32
STATE = ServerState(
    np.array([1.5, -2.0, 0.25], np.float32), 7, {"momentum": np.array([0.1, 0.2]), "memory.nested": np.zeros((2, 2))}
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "state.safetensors"


def assert_equal(state: ServerState, other: ServerState) -> None:
    assert state.round_number == other.round_number
    assert state.model.dtype == other.model.dtype == np.float32
    assert state.model.tobytes() == other.model.tobytes()
    assert set(state.memory) == set(other.memory)
    for name, array in state.memory.items():
        assert array.dtype == other.memory[name].dtype
        np.testing.assert_array_equal(array, other.memory[name])


@settings(max_examples=25, deadline=None)
@given(
    model=st.lists(st.floats(width=32), max_size=10),
    number=st.integers(0, 10**12),
    memory=st.dictionaries(st.text(max_size=8), st.lists(st.floats(), max_size=5), max_size=3),
)
def test_a_state_reads_back_as_it_was(model: list[float], number: int, memory: dict[str, list[float]]) -> None:
    state = ServerState(np.array(model, np.float32), number, {name: np.array(a, float) for name, a in memory.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        save_checkpoint(state, path, job=JOB)
        assert_equal(load_checkpoint(path, job=JOB), state)


def test_an_array_that_is_a_view_is_kept_by_value(path: Path) -> None:
    wide = np.arange(20, dtype=np.float64).reshape(4, 5)
    state = ServerState(np.arange(10, dtype=np.float32)[::3], 1, {"turned": wide.T, "strided": wide[:, ::2]})
    save_checkpoint(state, path, job=JOB)
    assert_equal(load_checkpoint(path, job=JOB), state)


def test_the_next_one_replaces_it_and_leaves_nothing_else(path: Path) -> None:
    for number in (1, 2):
        save_checkpoint(ServerState(STATE.model * number, number), path, job=JOB)
    assert load_checkpoint(path, job=JOB).round_number == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_crash_while_writing_leaves_the_one_before(path: Path) -> None:
    save_checkpoint(STATE, path, job=JOB)
    path.with_suffix(".partial").write_bytes(path.read_bytes()[:30])
    assert_equal(load_checkpoint(path, job=JOB), STATE)
    after = ServerState(STATE.model, 8)
    save_checkpoint(after, path, job=JOB)
    assert_equal(load_checkpoint(path, job=JOB), after)


def test_the_old_file_stays_whole_until_the_new_one_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched because the moment between writing and renaming is otherwise a crash's alone.
    save_checkpoint(STATE, path, job=JOB)

    class Crash(Exception):
        pass

    def crash(source: Any, target: Any) -> None:
        assert_equal(load_checkpoint(Path(source), job=JOB), ServerState(STATE.model, 8))
        raise Crash

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Crash):
        save_checkpoint(ServerState(STATE.model, 8), path, job=JOB)
    assert_equal(load_checkpoint(path, job=JOB), STATE)


def test_every_truncation_is_refused(path: Path) -> None:
    save_checkpoint(STATE, path, job=JOB)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match="not a checkpoint of fedchorus"):
            load_checkpoint(path, job=JOB)


def test_another_jobs_checkpoint_is_refused(path: Path) -> None:
    save_checkpoint(STATE, path, job=JOB)
    with pytest.raises(RunError, match="a checkpoint of another job or version"):
        load_checkpoint(path, job="0" * 64)


MODEL = {"model": np.zeros(2, np.float32)}
GOOD = {"v": "1", "job": JOB, "round": "3"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text", "not a checkpoint of fedchorus"),
        (b"\xff" * 16, "not a checkpoint of fedchorus"),
        (save(MODEL), "not a checkpoint of fedchorus"),
        (save(MODEL, {"v": "1", "job": JOB}), "not a checkpoint of fedchorus"),
        (save(MODEL, {"v": "1", "round": "3"}), "not a checkpoint of fedchorus"),
        (save(MODEL, {**GOOD, "round": "three"}), "not a checkpoint of fedchorus"),
        (save(MODEL, {**GOOD, "v": "2"}), "another job or version"),
        (save({"weights": MODEL["model"]}, GOOD), "not a checkpoint of fedchorus"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused_in_one_line(path: Path, content: bytes, said: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(RunError, match=said) as caught:
        load_checkpoint(path, job=JOB)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_and_a_folder_are_refused(path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint, the run stopped before its first round ended"):
        load_checkpoint(path, job=JOB)
    path.mkdir(parents=True)
    with pytest.raises(RunError, match="not a checkpoint of fedchorus"):
        load_checkpoint(path, job=JOB)

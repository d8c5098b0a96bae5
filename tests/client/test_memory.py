"""What a site keeps between rounds outlives a round that fails, and is never mistaken for something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.memory import SiteMemory, flat, named
from privacy.errors import RunError
from strategies.protocol import Kept


def vector(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(values, np.float32)


@settings(max_examples=30)
@given(rounds=st.lists(st.integers(1, 9), max_size=8))
def test_a_round_begins_with_what_the_newest_round_before_it_ended_with(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[int]
) -> None:
    memory = SiteMemory(tmp_path_factory.mktemp("site") / "memory.bin", 2)
    kept: dict[int, float] = {}
    for step, number in enumerate(rounds):
        memory.keep(number, vector(number, step))
        kept = {n: s for n, s in kept.items() if n < number}  # A round that is run again undoes those after it.
        kept[number] = step
        kept = dict(sorted(kept.items())[-2:])
        before = [n for n in kept if n < number]
        again = memory.before(number)
        assert (again is None) == (not before)
        if again is not None:
            assert again.tolist() == [max(before), kept[max(before)]]
        newest = memory.newest()
        assert newest is not None
        assert newest.tolist() == [number, step]


def test_two_rounds_are_kept_and_no_more(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path / "memory.bin", 3)
    sizes = set()
    for number in range(1, 6):
        memory.keep(number, vector(number, 0, 0))
        sizes.add((tmp_path / "memory.bin").stat().st_size)
    assert len(sizes) == 2
    assert memory.before(4) is None
    before = memory.before(5)
    assert before is not None
    assert before[0] == 4


def test_a_site_that_was_never_asked_keeps_nothing(tmp_path: Path) -> None:
    assert SiteMemory(tmp_path / "memory.bin", 3).newest() is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:-4] + b"\0\0\0\1", lambda b: b"x" + b[1:], lambda b: b""]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: object) -> None:
    memory = SiteMemory(tmp_path / "memory.bin", 2)
    memory.keep(1, vector(1, 2))
    memory.path.write_bytes(damage(memory.path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(RunError, match="not a memory of this job"):
        memory.newest()


def test_a_memory_of_another_size_is_refused(tmp_path: Path) -> None:
    SiteMemory(tmp_path / "memory.bin", 2).keep(1, vector(1, 2))
    with pytest.raises(RunError, match="another strategy's"):
        SiteMemory(tmp_path / "memory.bin", 5).newest()


def test_names_become_one_vector_and_names_again() -> None:
    kept: dict[str, Kept] = {"control": "vector", "cluster": "scalar", "model": "vector"}
    memory = {"control": vector(1, 2), "cluster": vector(3), "model": vector(4, 5)}
    whole = flat(memory, kept, 2)
    assert whole.tolist() == [1, 2, 3, 4, 5]
    assert {name: array.tolist() for name, array in named(whole, kept, 2).items()} == {
        name: array.tolist() for name, array in memory.items()
    }
    assert flat({"cluster": vector(7)}, kept, 2).tolist() == [0, 0, 7, 0, 0]
    assert flat({}, {}, 2).size == 0

"""A job as it travels is the same job wherever it was written, and names nothing of anybody's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import JobError
from strategies.job import MOST_DOTS, MOST_TEXT, load_job, parse_job
from tests.strategies.jobs import make_job

HOME: dict[str, Any] = {"data": {"path": None, "client": None}}
# What may differ between two people who mean the same job.
PLACES: list[dict[str, Any]] = [
    {"data": {"path": "records.csv", "client": "hospital"}},
    {"data": {"path": "/srv/other.parquet", "client": "site"}},
    {"data": {"path": None, "client": None, "files": {"north": "/secret/a.csv", "south": "b.csv"}}},
    {"data": {"folder": "/home/alice/projects", "path": None, "client": None}},
    {"training": {"device": "cpu"}},
    {"training": {"device": "cuda"}},
    {"simulation": {"engine": "flower", "baselines": False}},
    {"simulation": {"faults": {"dropout": 0.25}}},
    {"data": {"path": "x.csv", "client": None}, "simulation": {"partition": {"clients": 4}}},
]


@pytest.mark.parametrize("place", PLACES)
def test_the_hash_is_the_same_whatever_the_folder_file_device_or_engine(place: dict[str, Any]) -> None:
    job, bare = make_job(**place), make_job(**HOME)
    assert job.portable == bare.portable
    assert job.portable.hash == bare.portable.hash
    for word in ("alice", "secret", "/srv", ".csv", "cuda", "flower"):
        assert word not in job.portable.toml.decode()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"seed": 1},
        {"purpose": "research"},
        {"training": {"rounds": 3}},
        {"training": {"learning_rate": 0.25}},
        {"data": {"target": "z"}},
        {"data": {"dataset": "others"}},
        {"data": {"columns": {"x": {"range": [0, 2]}}}},
        {"privacy": {"record": {"noise_multiplier": 1.0, "delta": 1e-3}}},
        {"secure_aggregation": {}},
        {"cohort": {"minimum": 2}},
    ],
)
def test_what_is_trained_on_what_or_how_changes_the_hash(change: dict[str, Any]) -> None:
    assert make_job(**change).portable.hash != make_job().portable.hash


def test_two_files_in_two_folders_are_one_job(tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"{name}.toml"
        path.write_bytes(make_job(data={"path": f"{name}.csv"}).toml.replace(b'folder = "."\n', b""))
        hashes.add(load_job(path).portable.hash)
    assert len(hashes) == 1


@given(seed=st.integers(0, 2**63 - 1), rounds=st.integers(1, 10**6), rate=st.floats(1e-9, 10))
def test_a_job_is_the_same_after_the_wire_and_portable_already(seed: int, rounds: int, rate: float) -> None:
    job = make_job(seed=seed, training={"rounds": rounds, "learning_rate": rate}).portable
    read = parse_job(job.toml.decode(), where="a message")
    assert (read, read.hash, read.toml) == (job, job.hash, job.toml)
    assert read.portable == read


TOML = make_job().portable.toml.decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#" * (MOST_TEXT + 1), f"longer than {MOST_TEXT} characters"),
        ("é" * (MOST_TEXT + 1), "longer than"),
        ("a" + ".a" * (MOST_DOTS + 1) + " = 1", "more than 64 dots"),
        ("name = ", "not valid TOML"),
        ("seed = " + "9" * 5000, "not valid TOML"),
        ("seed = " + "[" * 100_000, "not valid TOML"),
        ("", "is missing"),
        (TOML + "[simulations]\n", "unknown key simulations; did you mean simulation"),
    ],
    ids=range(8),
)
def test_a_job_that_is_too_large_or_none_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        parse_job(text, where="the offered job")
    assert str(caught.value).startswith("the offered job: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_job_of_the_largest_size_that_is_allowed_is_read() -> None:
    padded = TOML + "#" * (MOST_TEXT - len(TOML))
    assert parse_job(padded, where="a message") == make_job().portable

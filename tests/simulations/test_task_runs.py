"""Each kind of task runs from a job to a summary, with record-level privacy where it can have it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from privacy.errors import JobError
from simulations.simulate import Watcher, start_run
from strategies.job import Job, check_job

RNG_SEED, ROWS = 5, 48
RECORD = {"record": {"noise_multiplier": 0.5, "delta": 1e-3}}


def tables(folder: Path) -> Path:
    """A table and an archive of two sites, with something to learn for each kind of task."""
    rng = np.random.default_rng(RNG_SEED)
    x = rng.uniform(0, 1, ROWS)
    site = np.where(np.arange(ROWS) % 2, "north", "south")
    words = np.where(x > 0.5, "good sound fine", "bad broken late")
    table = pd.DataFrame({"x": x, "site": site, "words": words, "letters": "abababab", "amount": 3 + 4 * x})
    table["months"] = (rng.exponential(size=ROWS) / np.exp(3 * x)).round(3) + 0.001
    table["died"] = rng.integers(0, 2, ROWS)
    table["item"] = rng.integers(1, 5, ROWS)
    table.to_csv(folder / "table.csv", index=False)
    pictures = np.where((x > 0.5)[:, None, None], 220, 30).astype(np.uint8) * np.ones((1, 8, 8), np.uint8)
    np.savez(folder / "images.npz", pictures=pictures, label=(x > 0.5).astype(np.uint8), site=site)
    weeks = pd.date_range("2022-01-03", periods=24, freq="7D").strftime("%Y-%m-%d")
    sold = 10 + 5 * rng.random((2, 24))
    parts = [
        pd.DataFrame({"site": name, "week": weeks, "sold": own, "x": 0.5})
        for name, own in zip(("north", "south"), sold, strict=True)
    ]
    pd.concat(parts).to_csv(folder / "series.csv", index=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tables(tmp_path)


X = {"x": {"range": [0, 1]}}
HAZARDS = {"loss": "discrete-time", "intervals": [0.1, 0.5, 2]}
JOBS: dict[str, dict[str, Any]] = {
    "regression": {
        "data": {"target": "amount", "target_type": "number", "target_range": [3, 7], "columns": X},
        "task": {"name": "tabular-regression", "model": "linear"},
    },
    "transformer": {
        "data": {"target": "died", "columns": X},
        "task": {"model": "ft-transformer", "hidden": [8], "heads": 2},
    },
    "survival": {
        "data": {"target": "months", "target_type": "time", "event": "died", "columns": X},
        "task": {"name": "survival", "model": "linear", **HAZARDS},
    },
    "cox": {
        "data": {"target": "months", "target_type": "time", "event": "died", "columns": X},
        "task": {"name": "survival", "model": "linear", "loss": "cox"},
    },
    "images": {
        "data": {
            "path": "images.npz",
            "target": "label",
            "columns": {"pictures": {"type": "image", "shape": [8, 8]}},
        },
        "task": {"name": "image-classification", "model": "cnn", "hidden": [4]},
    },
    "texts": {
        "data": {
            "target": "died",
            "columns": {"words": {"type": "text", "buckets": 16}},
        },
        "task": {"name": "text-classification"},
    },
    "next character": {
        "data": {
            "target": "letters",
            "target_type": "next",
            "columns": {"letters": {"type": "characters", "alphabet": "ab", "window": 6}},
        },
        "task": {"name": "next-character", "model": "causal-convolution", "hidden": [8]},
    },
    "ratings": {
        "data": {
            "target": "amount",
            "target_type": "number",
            "target_range": [1, 9],
            "columns": {"item": {"type": "id", "count": 4}},
        },
        "task": {"name": "recommendation", "model": "matrix-factorisation", "hidden": [2]},
    },
    "forecast": {
        "data": {
            "path": "series.csv",
            "target": "sold",
            "target_type": "number",
            "target_log": True,
            "columns": X,
            "forecast": {"time": "week", "lags": [1, 4], "horizon": 3},
        },
        "task": {"name": "forecast", "model": "linear"},
    },
}
SCORED = {
    "regression": {"loss", "mae", "rmse", "r2"},
    "transformer": {"loss", "accuracy", "auc", "f1"},
    "survival": {"loss", "c_index"},
    "cox": {"loss", "c_index"},
    "images": {"loss", "accuracy", "auc", "f1"},
    "texts": {"loss", "accuracy", "auc", "f1"},
    "next character": {"loss", "accuracy"},
    "ratings": {"loss", "mae", "rmse", "r2"},
    "forecast": {"loss", "mae", "rmse", "r2", "wape"},
}
COUPLED = ("cox", "forecast")


def job_of(kind: str, folder: Path, **more: Any) -> Job:
    own = JOBS[kind]
    raw = {
        "name": "a-run",
        "data": {"folder": str(folder), "path": "table.csv", "client": "site", **own["data"]},
        "task": own["task"],
        "training": {"rounds": 1, "local_steps": 2, "sampling_rate": 0.5, "learning_rate": 0.1, "device": "cpu"},
        "simulation": {"noise": "seeded"},
    }
    return check_job({**raw, **more}, where="a test")


def run(job: Job, folder: Path) -> dict[str, Any]:
    summary = start_run(job, out=folder / "run", parent=folder, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    return summary


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_of_each_kind_runs_and_is_compared(kind: str, folder: Path) -> None:
    privacy = {} if kind in COUPLED else {"privacy": RECORD}
    summary = run(job_of(kind, folder, **privacy), folder)
    assert set(summary["metrics"]) == SCORED[kind]
    assert all(np.isfinite(value) for value in summary["metrics"].values())
    assert set(summary["baselines"]["pooled"]) == set(summary["baselines"]["local"]) == SCORED[kind] | {"sites"}
    assert SCORED[kind] <= set(summary["sites"]["north"])
    assert (summary["epsilon"]["record"] is None) == (kind in COUPLED)


@pytest.mark.parametrize(("kind", "said"), [("cox", "couples the records"), ("forecast", "protects no period")])
def test_what_couples_records_is_refused_with_record_level_privacy(kind: str, said: str, folder: Path) -> None:
    with pytest.raises(JobError, match=said):
        run(job_of(kind, folder, privacy=RECORD), folder)
    assert not (folder / "run").exists()


def test_what_can_be_learnt_is_learnt(folder: Path) -> None:
    training = {"rounds": 5, "local_steps": 40, "sampling_rate": 1.0, "learning_rate": 0.5, "device": "cpu"}
    simulation = {"baselines": False}
    for kind, metric, least in (
        ("regression", "r2", 0.99),
        ("images", "accuracy", 1.0),
        ("next character", "accuracy", 1.0),
    ):
        job = job_of(kind, folder, training=training, simulation=simulation)
        assert run(job, folder / kind)["metrics"][metric] >= least, kind

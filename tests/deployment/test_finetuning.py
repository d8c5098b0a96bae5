"""Real desks of sites tune a pre-trained model as a simulation does: policies, ledgers, secure sums, deliveries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from privacy.errors import JobError
from strategies.checkpoint import hashes
from strategies.job import Job
from strategies.parameters import Parameters
from tests.client.checkpoints import checkpoint
from tests.deployment.federation import NAMES, POLICY, Thorax, deployed_job

pytest.importorskip("transformers")
ALLOWED = POLICY.replace('"tabular-classification"', '"text-classification"') + "minimum_cohort = 3\n"


@pytest.fixture
def thorax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Thorax:
    monkeypatch.setenv("FEDCHORUS_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    checkpoint("bert", tmp_path / "models")
    (tmp_path / "federation").mkdir()
    thorax = Thorax(tmp_path / "federation", policy=ALLOWED)
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        words = [" ".join(rng.permutation(["the", "film", "is", "good" if at % 2 else "bad"])) for at in range(40)]
        pd.DataFrame({"x": words, "y": np.arange(40) % 2}).to_csv(thorax.folder / name / "records.csv", index=False)
    return thorax


def job(tmp_path: Path, **changes: Any) -> Job:
    return deployed_job(
        data={"path": None, "client": None, "columns": {"x": {"type": "tokens", "length": 8}}, "stratify": False},
        task={
            "name": "text-classification",
            "model": "pretrained",
            "checkpoint": "models:bert",
            **hashes(tmp_path / "models" / "bert"),
            "tuning": {"rank": 2, "scale": 2.0},
        },
        training={"rounds": 2, "local_steps": 2, "batch_size": 10, "learning_rate": 0.5},
        secure_aggregation={"colluders": 0, "reach": 4000.0},
        **changes,
    )


@pytest.mark.parametrize("private", [False, True])
def test_it_is_trained_charged_and_delivered(thorax: Thorax, tmp_path: Path, private: bool) -> None:
    record = {"privacy": {"record": {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}}} if private else {}
    folder = thorax.submit(job(tmp_path, **record))
    thorax.run(folder)
    assert folder.state == "finished"
    parameters, model = Parameters.load(folder.model)
    _, start = Parameters.load(folder.initial)
    assert 0 < parameters.trained < parameters.size
    assert not np.array_equal(model[: parameters.trained], start[: parameters.trained])
    assert np.array_equal(model[parameters.trained :], start[parameters.trained :]), "the fixed factors stay"
    for name in NAMES:
        delivered = thorax.folder / name / "state" / "jobs" / folder.job.hash / "model.safetensors"
        assert Parameters.load(delivered)[1].tolist() == model.tolist()
        ledger = thorax.folder / name / "ledgers" / "records.jsonl"
        assert ledger.exists() == private


def test_a_site_whose_copy_is_another_refuses_the_job(thorax: Thorax, tmp_path: Path) -> None:
    offered = job(tmp_path)
    path = tmp_path / "models" / "bert" / "tokenizer.json"
    folder = thorax.submit(offered)
    path.write_text(path.read_text().replace('"good"', '"GOOD"'))
    with pytest.raises(JobError, match="sites refuse the job"):
        thorax.run(folder)
    assert all("tokenizer" in thorax.sites[name].said.getvalue() for name in NAMES)

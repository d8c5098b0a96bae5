"""An evaluation at real sites' desks: of the model that each was delivered, under a policy that allows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split

from privacy.errors import JobError, Refused
from server.jobs import JobFolder
from strategies.figures import read_evaluation
from strategies.job import Job, evaluation_job
from strategies.messages import Deliver
from strategies.parameters import Parameters, vector_hash
from tests.deployment.federation import NAMES, POLICY, Thorax, deployed_job

SECURE = "secure_aggregation={colluders=0, reach=200.0}"
ALLOWED = POLICY + "minimum_cohort = 3\n[evaluation]\nallow_plain = true\nallow_site_figures = true\n"


def trained(thorax: Thorax, **changes: Any) -> JobFolder:
    data = {"path": None, "client": None, "columns": {"x": {"range": [0, 1]}}, "stratify": False}
    training = {"rounds": 3, "local_steps": 20, "learning_rate": 2.0}
    folder = thorax.submit(deployed_job(data=data, training=training, **changes))
    thorax.run(folder)
    return folder


def evaluation(of: JobFolder, *settings: str) -> Job:
    return evaluation_job(of.path, settings).portable


@pytest.mark.parametrize("settings", [[], [SECURE], [SECURE, "evaluation.sites=10"]], ids=["plain", "secure", "sites"])
def test_a_federation_s_figures_are_those_of_all_test_rows(tmp_path: Path, settings: list[str]) -> None:
    thorax = Thorax(tmp_path, policy=ALLOWED)
    model = trained(thorax)
    folder = thorax.submit(evaluation(model, *settings))
    thorax.run(folder)
    assert folder.state == "finished"
    said = read_evaluation(folder.path)
    _, weights = Parameters.load(model.model)
    tables = [pd.read_csv(thorax.folder / name / "records.csv") for name in NAMES]
    test = pd.concat([train_test_split(table, random_state=0)[1] for table in tables])
    logit = weights[0] * (2 * test["x"] - 1) + weights[1]
    assert said["figures"]["accuracy"]["value"] == pytest.approx(accuracy_score(test["y"], logit > 0), abs=1e-3)
    auc = said["figures"]["auc"]
    assert auc["low"] - 1e-3 <= roc_auc_score(test["y"], logit) <= auc["high"] + 1e-3
    assert (said["sites"], said["job"], said["of"]) == (3, folder.job.hash, model.job.hash)


def test_a_site_s_own_figures_stay_in_its_own_report(tmp_path: Path) -> None:
    thorax = Thorax(tmp_path, policy=ALLOWED)
    model = trained(thorax)
    report = json.loads((thorax.folder / "north" / "state" / "jobs" / model.job.hash / "report.json").read_text())
    assert {"loss", "accuracy", "auc", "f1", "rows"} <= report["metrics"].keys()
    folder = thorax.submit(evaluation(model, SECURE))
    thorax.run(folder)
    measured = json.loads((thorax.folder / "north" / "state" / "jobs" / folder.job.hash / "report.json").read_text())
    assert "metrics" not in measured


@pytest.mark.parametrize(
    ("settings", "clause"),
    [([], "evaluation.allow_plain"), ([SECURE, "evaluation.sites=10"], "evaluation.allow_site_figures")],
)
def test_a_policy_that_does_not_allow_it_refuses(tmp_path: Path, settings: list[str], clause: str) -> None:
    thorax = Thorax(tmp_path)
    model = trained(thorax)
    with pytest.raises(JobError, match="3 sites refuse the job"):
        thorax.run(thorax.submit(evaluation(model, *settings)))
    assert clause in thorax.sites["north"].said.getvalue()


def test_a_server_that_hands_out_another_model_afterwards_changes_nothing(tmp_path: Path) -> None:
    thorax = Thorax(tmp_path, policy=ALLOWED)
    model = trained(thorax)
    desk, other = thorax.sites["north"].desk, np.array([1e4, -3700.0], np.float32)
    rounds = model.job.training.rounds
    with pytest.raises(Refused, match="another model for a job that is over"):
        desk._keep(Deliver(model.job.hash, rounds, other, vector_hash(other)))
    # Nor does an evaluation of another model than the one that its approvers saw.
    job = evaluation(model)
    assert job.evaluation is not None
    wrong = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"model_hash": vector_hash(other)})})
    with pytest.raises(JobError, match="3 sites refuse the job"):
        thorax.run(thorax.submit(wrong))
    assert "of another model than job" in thorax.sites["north"].said.getvalue()


def test_of_a_job_that_sites_have_not_finished_is_refused(tmp_path: Path) -> None:
    thorax = Thorax(tmp_path, policy=ALLOWED)
    model = trained(thorax)
    job = evaluation(model)
    assert job.evaluation is not None
    other = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"of": "b" * 64})})
    with pytest.raises(JobError, match="3 sites refuse the job"):
        thorax.run(thorax.submit(other))
    assert "of which this site has no shared model" in thorax.sites["north"].said.getvalue()


def test_that_would_read_other_data_than_the_model_s_job_is_refused(tmp_path: Path) -> None:
    thorax = Thorax(tmp_path, policy=ALLOWED)
    job = evaluation(trained(thorax))
    other = job.model_copy(update={"data": job.data.model_copy(update={"test_fraction": 0.9})})
    with pytest.raises(JobError, match="3 sites refuse the job"):
        thorax.run(thorax.submit(other))
    assert "that reads other data, or for another task" in thorax.sites["north"].said.getvalue()


def test_own_models_are_those_that_their_sites_kept(tmp_path: Path) -> None:
    thorax = Thorax(tmp_path, policy=ALLOWED.replace('["fedavg"]', '["fedavg", "fedper"]'))
    model = trained(thorax, strategy={"name": "fedper", "keep": ["0.bias"]})
    folder = thorax.submit(evaluation(model, SECURE, "evaluation.model=own"))
    thorax.run(folder)
    hits, rows = 0, 0
    for name in NAMES:
        _, own = Parameters.load(thorax.folder / name / "state" / "jobs" / model.job.hash / "own_model.safetensors")
        table = pd.read_csv(thorax.folder / name / "records.csv")
        test = train_test_split(table, random_state=0)[1]
        hits += int(np.sum((own[0] * (2 * test["x"] - 1) + own[1] > 0) == test["y"]))
        rows += len(test)
    said = read_evaluation(folder.path)
    assert said["figures"]["accuracy"]["value"] == pytest.approx(hits / rows, abs=1e-3)

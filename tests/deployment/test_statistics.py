"""A statistics job at real sites' desks: the figures of the pooled rows, and what its trainer's process loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from client.initial import initial_parameters
from client.trainer_child import Loaded
from privacy.errors import JobError
from strategies.job import Job
from strategies.statistics import read_statistics
from tests.deployment.federation import NAMES, POLICY, Thorax, deployed_job

ONE = {"rounds": 1, "learning_rate": 1.0, "batch_size": None, "sampling_rate": 1.0}
ALLOWED = POLICY.replace('"tabular-classification"', '"statistics"')


def statistics_job(**changes: Any) -> Job:
    return deployed_job(task={"name": "statistics", "bins": 10}, training=ONE, **changes)


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        ({"data": {"path": None, "client": None, "columns": {"x": {"range": [0, 1]}}, "stratify": False}}, 1e-6),
        ({"secure_aggregation": {"colluders": 0, "reach": 64.0}}, 1e-5),
        (
            {
                "privacy": {"record": {"noise_multiplier": 4.0, "delta": 1e-2}},
                "secure_aggregation": {"colluders": 0, "reach": 256.0},
            },
            0.5,
        ),
    ],
    ids=["plain", "secure", "secure and private"],
)
def test_a_federation_measures_what_its_rows_have_in_common(
    tmp_path: Path, changes: dict[str, Any], within: float
) -> None:
    if "data" not in changes:
        changes = {**changes, "data": {"path": None, "client": None, "columns": {"x": {"range": [0, 1]}},
                                       "stratify": False}}  # fmt: skip
    thorax, job = Thorax(tmp_path, policy=ALLOWED), statistics_job(**changes)
    folder = thorax.submit(job)
    thorax.run(folder)
    assert folder.state == "finished"
    said = read_statistics(folder.path)
    tables = [pd.read_csv(thorax.folder / name / "records.csv") for name in NAMES]
    rows = pd.concat([train_test_split(table, random_state=0)[0] for table in tables])
    assert said["columns"]["x"]["mean"] == pytest.approx(rows["x"].mean(), abs=within)
    assert said["sites"] == 3
    private = bool(job.privacy.at_sites)
    # A coordinator does not know how many rows its sites have, and so not how much noise is in a mean over them.
    assert (said["rows"], said["se_of_a_share"]) == (None, None if private else 0.0)
    if not private:
        assert said["columns"]["x"]["sd"] == pytest.approx(rows["x"].std(ddof=0), abs=within)
        assert said["target"]["shares"]["1"] == pytest.approx(rows["y"].mean(), abs=within)


def test_a_site_whose_policy_does_not_allow_statistics_takes_no_part(tmp_path: Path) -> None:
    thorax = Thorax(tmp_path)
    folder = thorax.submit(statistics_job())
    with pytest.raises(JobError, match="3 sites refuse the job"):
        thorax.run(folder)
    assert "not listed" in thorax.sites["north"].said.getvalue()


def test_the_trainer_s_own_process_loads_what_the_submitted_model_is_for(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text("x,y\n0.5,1\n,0\n0.25,2\n3,\n")
    job = statistics_job()
    loaded = Loaded(job, "north", tmp_path / "records.csv")
    parameters, start = initial_parameters(job)
    assert loaded.trainer.parameters == parameters
    assert not start.any()
    assert loaded.describe()["rows"] == 3
    assert np.linalg.norm(loaded.data.train.features, axis=1).max() <= 1 + 1e-6

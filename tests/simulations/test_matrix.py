"""Every strategy with every protection: it works to the number, or is refused for the reason that the table gives."""

from __future__ import annotations

import tempfile
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.errors import JobError
from simulations.simulate import Watcher, start_run
from strategies.catalogue import STRATEGIES
from strategies.composition import PROTECTIONS, matrix, protected
from strategies.job import check_job
from strategies.parameters import Parameters, Vector

COLUMNS = {"mean radius": {"range": [5, 30]}, "mean texture": {"range": [5, 45]}, "mean area": {"range": [100, 2600]}}
RAW: dict[str, Any] = {
    "name": "matrix",
    "data": {"bundled": "breast-cancer", "target": "malignant", "allow_one_class": True, "columns": COLUMNS},
    "task": {"model": "mlp", "hidden": [3]},
    "training": {"rounds": 2, "local_steps": 2, "sampling_rate": 0.5, "learning_rate": 0.1},
    "simulation": {"noise": "seeded", "baselines": False, "partition": {"clients": 5, "alpha": 5.0}},
}
NOW = datetime(2026, 1, 1)
TABLE = matrix(STRATEGIES)
QUICK = ("none", "secure aggregation", "record-level")
WORKING = [
    pytest.param(name, kind, marks=() if kind in QUICK else pytest.mark.slow)
    for name, row in TABLE.items()
    for kind, why in row.items()
    if why is None
]


PERSONAL = ("fedbn", "fedper", "fedper-adam", "fedrep", "ditto", "pfedme", "ifca")


def run(folder: Path, strategy: str, protection: str) -> tuple[dict[str, Any], Vector]:
    raw = protected(RAW, strategy, PROTECTIONS[protection])
    if strategy == "fedbn":
        raw["task"] = {"model": "resnet", "hidden": [3]}  # It has layers to keep.
    job = check_job(raw, where="a test")
    summary = start_run(job, out=folder / "run", parent=folder, watcher=Watcher(), now=NOW)
    assert summary is not None
    _, model = Parameters.load(folder / "run" / "model.safetensors")
    return summary, model


@cache
def reference(strategy: str, protection: str) -> tuple[dict[str, Any], Vector]:
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), strategy, protection)


@pytest.mark.parametrize(("strategy", "protection"), WORKING)
def test_what_the_table_promises_works_to_the_number(tmp_path: Path, strategy: str, protection: str) -> None:
    summary, model = run(tmp_path, strategy, protection)
    assert summary["rounds"] == 2
    assert np.isfinite(model).all()
    # What is charged depends on the protection alone, never on the strategy.
    for unit, charged in reference("fedavg", protection)[0]["epsilon"].items():
        assert summary["epsilon"][unit] == (None if charged is None else pytest.approx(charged, rel=1e-6))
    assert (summary["personal"] is not None) == (
        strategy in ("fedbn", "fedper", "fedper-adam", "fedrep", "ditto", "pfedme", "ifca")
    )
    # A secure sum is the plain sum: with the same seeded noise the model is the same.
    plain = {"secure aggregation": "none", "record-level, secure": "record-level"}.get(protection)
    if plain is not None:
        np.testing.assert_allclose(model, reference(strategy, plain)[1], atol=2e-4)


@pytest.mark.parametrize(
    ("strategy", "protection", "why"),
    [(name, kind, why) for name, row in TABLE.items() for kind, why in row.items() if why is not None],
)
def test_what_the_table_refuses_is_refused_with_both_settings_and_what_would_do(
    strategy: str, protection: str, why: str
) -> None:
    with pytest.raises(JobError) as caught:
        check_job(protected(RAW, strategy, PROTECTIONS[protection]), where="a test")
    assert str(caught.value) == f"a test: the job: {why}"
    assert strategy in why
    assert "privacy." in why
    assert "take" in why


def test_the_table_refuses_little() -> None:
    assert {name for name, row in TABLE.items() if any(row.values())} == {"fednova", "q-ffl", "ifca", "fedbuff"}

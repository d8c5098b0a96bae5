"""All engines run the same clients and the same server, and come to the same model."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.audit import audit_run
from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, start_run
from strategies.job import load_job
from strategies.parameters import Parameters

PRIVATE = ['simulation.noise="seeded"', "privacy.record.epsilon=none", "privacy.record.noise_multiplier=3.0"]
UNRELIABLE = ["privacy.record=none"]
FEW_DEVICES = [
    'simulation.noise="seeded"',
    "simulation.partition.clients=20",
    "privacy.client.adaptive_clip={}",
    "privacy.client.clip_norm=0.5",
    "privacy.client.epsilon=none",
    "privacy.client.noise_multiplier=1.0",
]


def run(engine: str, scenario: str, settings: list[str], out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    job = load_job(
        scenario_path(scenario),
        [*settings, f'simulation.engine="{engine}"', "training.rounds=4", "simulation.baselines=false"],
    )
    summary = start_run(job, out=out, parent=out.parent, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    return summary, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("scenario", "settings"),
    [
        pytest.param("hospitals", PRIVATE, id="private"),
        pytest.param("hospitals-unreliable", UNRELIABLE, id="unreliable", marks=pytest.mark.slow),
        pytest.param("devices", FEW_DEVICES, id="devices", marks=pytest.mark.slow),
    ],
)
def test_flower_and_inline_give_the_same_model(scenario: str, settings: list[str], tmp_path: Path) -> None:
    summaries, models, contributors = {}, {}, {}
    for engine in ("inline", "flower"):
        summaries[engine], lines = run(engine, scenario, settings, tmp_path / engine)
        models[engine] = Parameters.load(tmp_path / engine / "model.safetensors")[1]
        contributors[engine] = [line["contributors"] for line in lines]
    np.testing.assert_allclose(models["flower"], models["inline"], rtol=1e-5, atol=1e-6)
    assert contributors["flower"] == contributors["inline"]
    assert summaries["flower"]["metrics"] == pytest.approx(summaries["inline"]["metrics"], rel=1e-4)
    assert summaries["flower"]["epsilon"] == summaries["inline"]["epsilon"]
    if scenario != "hospitals-unreliable":
        assert audit_run(tmp_path / "flower").ok
    else:
        assert any(len(answered) < 5 for answered in contributors["inline"]), "no fault was ever injected"


@pytest.mark.slow
def test_flower_reports_a_round_that_too_few_sites_answered(tmp_path: Path) -> None:
    from privacy.errors import RunError

    with pytest.raises(RunError, match=r"of 5 sites answered, the minimum is 5"):
        run(
            "flower",
            "hospitals-unreliable",
            [*UNRELIABLE, "cohort.minimum=5", "simulation.faults.dropout=0.9", "simulation.faults.malformed=0.0"],
            tmp_path / "run",
        )
    assert not (tmp_path / "run" / "summary.json").exists()

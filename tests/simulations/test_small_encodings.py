"""Adapters sent in 16 or 20 bits a number: less to upload, and a sum within its stated bound."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.audit import audit_run
from privacy.errors import RunError
from simulations.simulate import Watcher, start_run
from strategies.parameters import Parameters, Vector
from tests.client.checkpoints import job_of

pytest.importorskip("transformers")
SITES, REACH = 3, 1.0
BYTES = {16: 2.0, 20: 8 / 3, 32: 4.0}
SETTINGS = (
    "training.rounds=1",
    "privacy.record={noise_multiplier=1.0, delta=1e-3, clip_norm=1.0}",
    'strategy.weighting="equal"',
    'simulation.noise="seeded"',
    "simulation.baselines=false",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encodings")
    rows = [f"the film is {'good' if number % 2 else 'bad'},{number % 2}" for number in range(72)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    return folder


def run(folder: Path, out: Path, bits: int, reach: float = REACH) -> dict[str, Any]:
    secure = f"secure_aggregation={{bits={bits}, reach={reach}, colluders=0}}"
    job = job_of(folder / "rows.csv", "bert", *SETTINGS, secure, folder=folder)
    start_run(job, out=out, parent=folder, watcher=Watcher(), now=datetime(2026, 1, 1, tzinfo=UTC))
    (line,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {"uploaded": line["secure"]["upload_bytes"], "epsilon": line["epsilon"], **model(out)}


def model(out: Path) -> dict[str, Any]:
    parameters, after = Parameters.load(out / "model.safetensors")
    before: Vector = Parameters.load(out / "initial.safetensors")[1]
    return {"trained": parameters.trained, "moved": (after - before)[: parameters.trained].astype(np.float64)}


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return run(folder, folder / "32", 32)


@pytest.mark.parametrize("bits", [16, 20])
def test_the_mean_is_within_a_step_and_the_upload_shrinks_by_what_the_bits_say(
    folder: Path, whole: dict[str, Any], bits: int
) -> None:
    small = run(folder, folder / str(bits), bits)
    step = REACH / ((2 ** (bits - 1) - 1) // SITES)
    away = np.abs(small["moved"] - whole["moved"])
    # Each of three numbers is rounded up or down to a step next to it; of their mean that is one step at most.
    assert away.max() <= step + 1e-6
    # Rounded at random a step away as often as not: a mean error, over hundreds of numbers, far below that.
    assert step / 20 < away.mean() < step / 2
    assert abs((small["moved"] - whole["moved"]).mean()) < 4 * step / np.sqrt(SITES * small["trained"])
    saved = (BYTES[32] - BYTES[bits]) * small["trained"]
    assert whole["uploaded"] - small["uploaded"] == pytest.approx(saved, abs=32)  # Vectors end on a block of 16 bytes.
    assert small["epsilon"] == whole["epsilon"]  # What is rounded is private already.
    report = audit_run(folder / str(bits))
    assert report.ok, report.findings


def test_a_number_beyond_the_reach_is_refused_and_not_wrapped(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as told:
        run(folder, tmp_path / "run", 16, reach=1e-4)
    assert "beyond its reach" in str(told.value)

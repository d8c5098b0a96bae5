"""What a strategy keeps at a site lives through crashes, and a deployment trains what a simulation does."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.memory import SiteMemory
from simulations.simulate import Watcher, start_run
from strategies.job import check_job
from strategies.parameters import Parameters, Vector
from tests.deployment.federation import NAMES, POLICY, Thorax, deployed_job
from tests.strategies.jobs import raw_job

MEMORY: dict[str, dict[str, Any]] = {
    "scaffold": {"name": "scaffold", "weighting": "equal"},
    "feddyn": {"name": "feddyn", "weighting": "equal"},
    "ditto": {"name": "ditto"},
    "fedper": {"name": "fedper", "keep": ["0.bias"]},
    "ifca": {"name": "ifca"},
}


@pytest.fixture
def thorax(tmp_path: Path) -> Thorax:
    allowed = ", ".join(f'"{name}"' for name in MEMORY)
    return Thorax(tmp_path, policy=POLICY.replace('["fedavg"]', f"[{allowed}]"))


def simulated(thorax: Thorax, folder: Path, strategy: dict[str, Any]) -> tuple[Vector, dict[str, Vector]]:
    """The same rounds over the same rows: the model, and each site's memory."""
    files = {name: str(thorax.folder / name / "records.csv") for name in NAMES}
    raw = raw_job(data={"path": None, "client": None, "files": files}, simulation={"baselines": False})
    job = check_job({**raw, "strategy": strategy, "training": {**raw["training"], "rounds": 3}}, where="a test")
    start_run(job, out=folder, parent=folder.parent, watcher=Watcher(), now=datetime.now())
    _, model = Parameters.load(folder / "model.safetensors")
    paths = {name: next(folder.glob(f"**/{name}/memory.bin")) for name in NAMES}
    sizes = {name: (path.stat().st_size - 51 - 2 * 8) // 8 for name, path in paths.items()}
    kept = {name: SiteMemory(paths[name], sizes[name]).newest() for name in NAMES}
    return model, {name: memory for name, memory in kept.items() if memory is not None}


@pytest.mark.parametrize("name", MEMORY)
def test_a_deployment_whose_sites_crash_between_rounds_equals_a_simulation(
    thorax: Thorax, tmp_path: Path, name: str
) -> None:
    job = deployed_job(strategy=MEMORY[name], training={"rounds": 3})
    folder = thorax.submit(job)
    carried = []

    def crash(site: str, content: Any) -> Any:
        carried.append(site)
        if len(carried) in (5, 9):  # After the offers, within the rounds.
            thorax.sites["south"].crash()
        return content

    thorax.mail.on_way = crash
    thorax.run(folder)
    assert folder.state == "finished"
    expected, memories = simulated(thorax, tmp_path / "simulated", MEMORY[name])
    np.testing.assert_array_equal(Parameters.load(folder.model)[1], expected)
    for site in NAMES:
        kept = thorax.folder / site / "state" / "jobs" / job.hash
        memory = SiteMemory(kept / "memory.bin", memories[site].size).newest()
        assert memory is not None
        np.testing.assert_array_equal(memory, memories[site])
        assert (kept / "own_model.safetensors").exists() == (name in ("ditto", "fedper", "ifca"))


def test_a_round_that_is_run_again_begins_with_what_it_began_with(thorax: Thorax, tmp_path: Path) -> None:
    folder = thorax.submit(deployed_job(strategy=MEMORY["scaffold"], training={"rounds": 3}, cohort={"minimum": 3}))
    lost: list[str] = []

    def lose(site: str, content: Any) -> Any:
        if site == "west" and len(lost) < 1 and "vector" in content and len(thorax.mail.carried) > 4:
            lost.append(site)
            return None
        return content

    thorax.mail.on_back = lose
    thorax.run(folder)
    expected, _ = simulated(thorax, tmp_path / "simulated", MEMORY["scaffold"])
    np.testing.assert_array_equal(Parameters.load(folder.model)[1], expected)


def test_the_own_models_differ_from_the_shared_one_and_from_one_another(thorax: Thorax) -> None:
    job = deployed_job(strategy=MEMORY["ditto"])
    thorax.run(thorax.submit(job))
    models = []
    for name in NAMES:
        kept = thorax.folder / name / "state" / "jobs" / job.hash
        models += [Parameters.load(kept / file)[1] for file in ("own_model.safetensors", "model.safetensors")]
    own, shared = models[::2], models[1::2]
    assert all(np.array_equal(model, shared[0]) for model in shared)
    assert all(np.abs(mine - shared[0]).max() > 0 for mine in own)
    assert np.abs(own[0] - own[1]).max() > 0

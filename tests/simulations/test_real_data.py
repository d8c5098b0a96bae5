"""The job files for real data are valid, and read the published files whole; skipped where those are not at hand."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from simulations.federation import load_sites
from simulations.simulate import Watcher, start_run
from strategies.job import Job, load_job

JOBS = Path(__file__).parent.parent.parent / "examples" / "real"
# Sites, and rows of all of them: as published, less the rows without all values (adult) and the first year (walmart).
SIZES = {
    "adult": (14, 30162),
    "banking77": (5, 10003 + 3080),
    "bank_marketing": (12, 45211),
    "default_credit": (4, 30000),
    "german_credit": (10, 1000),
    "pneumoniamnist": (5, 4708 + 524),
    "walmart": (45, 45 * (143 - 52)),
}


def real(name: str, *settings: str) -> Job:
    folder = os.environ.get("FEDCHORUS_DATA")
    if not folder:
        pytest.skip("FEDCHORUS_DATA names no folder of the public data sets")
    return load_job(JOBS / f"{name}.toml", [f"data.folder={Path(folder, name).resolve()}", *settings])


@pytest.mark.parametrize("name", SIZES)
def test_a_job_file_is_valid_and_starts_at_its_own_folder(name: str) -> None:
    assert Path(load_job(JOBS / f"{name}.toml").data.folder) == (JOBS / name).resolve()


@pytest.mark.parametrize("name", SIZES)
def test_the_published_files_are_read_whole(name: str) -> None:
    sites = load_sites(real(name))
    assert (len(sites), sum(len(site.train) + len(site.test) for site in sites.values())) == SIZES[name]


def test_the_published_validation_images_are_the_test_rows() -> None:
    assert sum(len(site.test) for site in load_sites(real("pneumoniamnist")).values()) == 524


def test_private_or_not_the_x_rays_and_their_sites_are_the_same() -> None:
    plain, private = (load_job(JOBS / f"{name}.toml") for name in ("pneumoniamnist", "pneumoniamnist-private"))
    assert (plain.data, plain.task, plain.seed) == (private.data, private.task, private.seed)
    assert plain.simulation.partition == private.simulation.partition
    assert private.privacy.record is not None
    assert private.secure_aggregation is not None


def test_each_intent_is_a_class_of_the_job() -> None:
    job = real("banking77")
    sites = load_sites(job).values()
    assert sum(len(site.test) for site in sites) == 3080
    assert set().union(*(site.test.target.tolist() for site in sites)) == set(range(len(job.data.classes or ())))


def test_shops_that_forecast_together_beat_those_alone(tmp_path: Path) -> None:
    # A ridge regression on the same lags has .0361 federated and .0443 for each shop alone.
    summary = start_run(
        real("walmart"), out=tmp_path / "run", parent=tmp_path, watcher=Watcher(), now=datetime.now(UTC)
    )
    assert summary is not None
    assert summary["metrics"]["wape"] <= 0.037
    assert summary["metrics"]["wape"] < summary["baselines"]["local"]["wape"] - 0.003

"""A federation on one machine: the sites of a job, their data, their plans and their clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from client.data import (
    Records,
    SiteData,
    class_count,
    encode,
    feature_names,
    read_frame,
    require_columns,
    site_frames,
    split,
)
from client.site import Files, Site, SitePlan
from client.tasks import Task, initial_model, task_for
from client.training import Trainer
from privacy.errors import DataError, JobError
from privacy.noise import NoiseSource, OsNoise, SeededNoise
from simulations.faults import FaultySite, Handler
from simulations.partition import partition
from strategies.catalogue import strategy_for
from strategies.job import Job
from strategies.protocol import Strategy


def load_sites(job: Job) -> dict[str, SiteData]:
    """Read, check, encode and split every site's records, in the order of their names. Raises `DataError`."""
    data = job.data
    if job.simulation.partition is not None:
        whole = encode(_one_table(job), data, where=data.bundled or data.path or "")
        sites = partition(whole, job.simulation.partition, seed=job.seed)
    elif data.files is not None:
        paths = {name: Path(data.folder) / file for name, file in data.files.items()}
        sites = {name: encode(read_frame(path, data), data, where=str(path)) for name, path in paths.items()}
    else:
        assert data.path is not None
        assert data.client is not None
        path = Path(data.folder) / data.path
        frames = site_frames(read_frame(path, data), data.client, where=str(path))
        sites = {name: encode(frame, data, where=f"{path}, site {name}") for name, frame in frames.items()}
    if not sites:
        raise DataError(f"job {job.name}: the data have no site")
    # The labels of other records must not decide who is trained on: not with privacy, unless the job insists.
    stratify = data.stratify if data.stratify is not None else job.privacy.record is None
    return {name: split(sites[name], data, site=name, stratify=stratify) for name in sorted(sites)}


@dataclass(frozen=True)
class Federation:
    """Everything that training needs in one process; sites share one resident model."""

    job: Job
    data: Mapping[str, SiteData]
    task: Task
    trainer: Trainer
    strategy: Strategy

    @classmethod
    def load(cls, job: Job) -> Federation:
        """Raises `JobError` or `DataError` for whatever cannot work, before anything is written."""
        strategy, task = strategy_for(job), task_for(job)
        data = load_sites(job)
        if job.cohort.minimum > len(data):
            raise JobError(f"cohort.minimum is {job.cohort.minimum}, the job has {len(data)} sites")
        try:
            model = initial_model(
                task, features=len(feature_names(job.data)), classes=class_count(job.data), seed=job.seed
            )
        except (RuntimeError, MemoryError) as error:
            raise JobError(f"task: the model cannot be built ({' '.join(str(error).split())})") from error
        trainer = Trainer(task, model, job.training)
        trainer.try_out(next(iter(data.values())).train)
        return cls(job, data, task, trainer, strategy)

    @cached_property
    def names(self) -> list[str]:
        return list(self.data)

    @property
    def noise_kind(self) -> str:
        return OsNoise.kind if self.job.simulation.noise == "os" else SeededNoise.kind

    def plans(self, known: Mapping[str, Any] | None = None) -> dict[str, SitePlan]:
        """Each site's plan, calibrated now, or with the noise multipliers that `known` (plans.json) holds."""
        return {
            name: SitePlan.make(
                self.job,
                rows=len(data.train),
                parameters=self.trainer.parameters.size,
                rng=self.noise_kind,
                site=name,
                noise_multiplier=known[name]["noise_multiplier"] if known is not None else None,
            )
            for name, data in self.data.items()
        }

    def client(self, name: str, plan: SitePlan, files: Files | None) -> Handler:
        """The client of one site, wrapped in the faults that the job asks for."""
        site = Site(
            name,
            job=self.job,
            plan=plan,
            strategy=self.strategy,
            trainer=self.trainer,
            records=self.data[name].train,
            noise=lambda round_number: self.noise(name, round_number),
            files=files,
            simulation=True,
        )
        faults = self.job.simulation.faults
        if faults.dropout + faults.malformed == 0:
            return site
        return FaultySite(site, self.names.index(name), faults, self.job.seed)

    def noise(self, name: str, round_number: int) -> NoiseSource:
        """The noise source of one site in one round."""
        if self.job.simulation.noise == "os":
            return self._os_noise
        return SeededNoise(self.job.seed, name, round_number)

    @cached_property
    def _os_noise(self) -> NoiseSource:
        return OsNoise()


def plan_record(plan: SitePlan) -> dict[str, Any]:
    """A plan as plans.json and the summary state it."""
    sgd = plan.sgd
    return {
        "train_rows": plan.rows,
        "noise_multiplier": sgd.mechanism.noise_multiplier if sgd else None,
        "sampling_rate": sgd.sampling_rate if sgd else None,
        "steps_per_round": sgd.steps if sgd else None,
    }


def pooled(data: Mapping[str, SiteData]) -> SiteData:
    """All sites' rows in one place: what a simulation can do and a federation cannot."""

    def joined(parts: list[Records]) -> Records:
        return Records(np.concatenate([p.features for p in parts]), np.concatenate([p.target for p in parts]))

    return SiteData(joined([d.train for d in data.values()]), joined([d.test for d in data.values()]))


def _one_table(job: Job) -> pd.DataFrame:
    if job.data.path is not None:
        return read_frame(Path(job.data.folder) / job.data.path, job.data)
    from sklearn.datasets import load_breast_cancer

    bundled = load_breast_cancer(as_frame=True)
    frame: pd.DataFrame = bundled.data.assign(malignant=1 - bundled.target)
    require_columns(frame, job.data, where="the bundled data set breast-cancer")
    return frame

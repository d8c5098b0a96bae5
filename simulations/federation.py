"""A federation on one machine: the sites of a job, their data, their plans and their clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from client.data import Records, SiteData, class_count
from client.evaluation import Judge
from client.initial import starting_model
from client.local import LocalTraining
from client.memory import SiteMemory, own_model
from client.reading import records_of, site_data
from client.site import Files, Seat, Site, SitePlan
from client.tables import joined, read_frame, require_columns, site_frames
from client.tasks import Task, task_for
from client.training import Trainer
from privacy.errors import DataError, JobError
from privacy.events import GaussianEvent
from privacy.noise import NoiseSource, OsNoise, SeededNoise
from server.cohort import draw_cohort
from server.release import ReleasePlan
from simulations.devices import Devices
from simulations.evaluated import evaluated_models
from simulations.faults import FaultySite, Handler, Lie, LyingSum, liars
from simulations.partition import partition
from simulations.synthetic import SETS
from strategies.catalogue import fitted, strategy_for
from strategies.composition import check_sites
from strategies.job import Job
from strategies.parameters import Vector
from strategies.protocol import Strategy
from strategies.robust import check_robust
from strategies.secure import SecureSum
from strategies.total import Layout, layout_for


def load_sites(job: Job) -> dict[str, SiteData]:
    """Read, check, encode and split every site's records, in the order of their names; of an evaluation as what its
    model makes of them. Raises `DataError`."""
    data = job.data
    if data.bundled is None and data.path is None and data.files is None:
        raise JobError(f"job {job.name}: a simulation needs its records: give data.bundled, data.path or data.files")
    if job.simulation.partition is not None:
        whole = records_of(_one_table(job), job, where=data.bundled or data.path or "")
        sites = partition(whole, job.simulation.partition, seed=job.seed)
    elif data.files is not None:
        paths = {name: Path(data.folder) / file for name, file in data.files.items()}
        sites = {name: records_of(read_frame(path, data), job, where=str(path)) for name, path in paths.items()}
    else:
        assert data.client is not None
        where = data.bundled or str(Path(data.folder) / (data.path or ""))
        frames = site_frames(_one_table(job), data.client, where=where, drop=data.on_missing == "drop")
        sites = {name: records_of(frame, job, where=f"{where}, site {name}") for name, frame in frames.items()}
    if not sites:
        raise DataError(f"job {job.name}: the data have no site")
    if job.evaluation is not None:
        judge, models = Judge(job), evaluated_models(job)
        return {name: judge.site_data(sites[name], models(name), site=name) for name in sorted(sites)}
    return {name: site_data(sites[name], job, site=name) for name in sorted(sites)}


@dataclass(frozen=True)
class Federation:
    """Everything that training needs in one process; sites share one resident model."""

    job: Job
    data: Mapping[str, SiteData]
    task: Task
    trainer: Trainer
    strategy: Strategy
    secure: SecureSum | None = None

    @classmethod
    def load(cls, job: Job, *, begun: bool = False) -> Federation:
        """Raises `JobError` or `DataError` for whatever cannot work, before anything is written.

        Of a run that has `begun` the folder holds the model of round 1, and what that was made from is not needed.
        """
        strategy, task = strategy_for(job), task_for(job)
        data = load_sites(job)
        if job.least_answers > len(data):
            raise JobError(f"cohort.minimum is {job.least_answers}, the job has {len(data)} sites")
        if (job.cohort.separation or 1) > len(data):
            raise JobError(f"cohort.separation is {job.cohort.separation}, the job has {len(data)} sites")
        try:
            model = starting_model(job, task, calibrated=not begun)
        except (RuntimeError, MemoryError) as error:
            raise JobError(f"task: the model cannot be built ({' '.join(str(error).split())})") from error
        trainer = Trainer(task, model, job.training)
        trainer.try_out(next(iter(data.values())).train)
        strategy = fitted(strategy, trainer.parameters)
        received = strategy.broadcast(strategy.start(trainer.read(), sites=len(data)))
        strategy.own_model(received, {}, trainer.parameters)  # It looks for the arrays that the job names.
        secure = None
        if job.secure_aggregation is not None:
            parameters = trainer.parameters
            layout = layout_for(job, parameters, strategy.traits)
            most = max(len(own.train) for own in data.values())
            secure = SecureSum.make(
                job, sites=len(data), layout=layout, layers=parameters.trained_sizes, most_rows=most
            )
        check_sites(job, list(data), strategy)
        check_robust(job, sites=len(data), layout=layout_for(job, trainer.parameters, strategy.traits))
        return cls(job, data, task, trainer, strategy, secure)

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
                parameters=self.trainer.parameters.trained,
                rng=self.noise_kind,
                site=name,
                noise_multiplier=known[name]["noise_multiplier"] if known is not None else None,
                layers=self.trainer.parameters.trained_sizes,
                secure=self.secure,
            )
            for name, data in self.data.items()
        }

    def release_plan(self, known: Mapping[str, Any] | None = None) -> ReleasePlan | None:
        """What the server's noise will do, where the job asks for it; `known` is its part of plans.json."""
        if self.job.privacy.central is None:
            return None
        return ReleasePlan.make(
            self.job,
            clients=len(self.data),
            parameters=self.trainer.parameters.trained,
            rng=self.noise_kind,
            noise_multiplier=known["calibrated"] if known is not None else None,
            layers=self.trainer.parameters.trained_sizes,
        )

    def cohort(self, round_number: int) -> list[str]:
        """Whom a round asks."""
        return draw_cohort(
            self.names,
            self.job.cohort,
            seed=self.job.seed,
            round_number=round_number,
            secret=lambda number: self.noise("the cohort", number),
        )

    @cached_property
    def devices(self) -> Devices | None:
        """What each site is, where the job puts the rounds on a virtual clock."""
        return Devices.of(self.job, {name: len(own.train) for name, own in self.data.items()}, self.layout)

    @cached_property
    def layout(self) -> Layout:
        return layout_for(self.job, self.trainer.parameters, self.strategy.traits)

    def own_model(self, received: Vector, files: Files) -> Vector:
        """The model ((P,) float32) of a site that received this and keeps what is in `files`."""
        memory = SiteMemory.in_file(files.memory, self.layout.memory)
        return own_model(self.strategy, received, memory, self.trainer.parameters)

    def client(self, name: str, plan: SitePlan, files: Files | None, seat: Seat | None = None) -> Handler:
        """The client of one site, wrapped in the faults that the job asks for."""
        layout, faults = self.layout, self.job.simulation.faults
        records, lie = self.data[name].train, None
        if name in self._liars:
            lie = Lie(faults, self.names.index(name), self.job.seed, layout.parameters)
            records = lie.told(records, class_count(self.job.data))
            seat = replace(seat, plan=LyingSum.by(lie, seat.plan)) if seat is not None else None
        training = LocalTraining(
            name,
            job=self.job,
            plan=plan,
            strategy=self.strategy,
            trainer=self.trainer,
            records=records,
            layout=layout,
            noise=lambda round_number: self.noise(name, round_number),
            pace=self.devices.pace(name) if self.devices is not None else None,
        )
        site = Site(
            name,
            job=self.job,
            plan=plan,
            layout=layout,
            train=training,
            guard_noise=lambda round_number: self.noise(f"{name} as a whole", round_number),
            files=files,
            simulation=True,
            seat=seat,
        )
        if faults.dropout + faults.malformed == 0 and lie is None:
            return site
        return FaultySite(site, self.names.index(name), faults, self.job.seed, lie)

    @cached_property
    def _liars(self) -> frozenset[str]:
        return liars(self.names, self.job.simulation.faults, seed=self.job.seed)

    def noise(self, name: str, round_number: int) -> NoiseSource:
        """The noise source of one site, or of something that no site can be called, in one round."""
        if self.job.simulation.noise == "os":
            return self._os_noise
        return SeededNoise(self.job.seed, name, round_number)

    @cached_property
    def _os_noise(self) -> NoiseSource:
        return OsNoise()


def release_record(plan: ReleasePlan) -> dict[str, Any]:
    """The server's noise as plans.json and the summary state it."""
    event = plan.event
    return {
        "clients": plan.clients,
        "expected_cohort": plan.cohort,
        "noise_multiplier": event.noise_multiplier,
        "calibrated": plan.noise_multiplier,
        "clip_norm": event.clip_norm,
        "sampling_rate": event.sampling_rate if isinstance(event, GaussianEvent) else 1.0,
    }


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
    from sklearn.datasets import load_breast_cancer, load_digits

    frame: pd.DataFrame
    if job.data.bundled is not None and job.data.bundled in SETS:
        frame = joined(SETS[job.data.bundled]().table, job.data)
    elif job.data.bundled == "digits":
        digits = load_digits(as_frame=True)
        frame = digits.data.assign(digit=digits.target)
    else:
        tumours = load_breast_cancer(as_frame=True)
        frame = tumours.data.assign(malignant=1 - tumours.target)
    require_columns(frame, job.data, where=f"the bundled data set {job.data.bundled}")
    return frame

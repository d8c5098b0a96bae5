"""One site's client: what it answers to one request. The same code in every engine and in deployment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.data import Records
from client.gate import Account, Gate, Outbox
from client.training import DeviceRecords, Trainer
from privacy.accountant import noise_multiplier_for
from privacy.budget import SiteBudget, check_affordable
from privacy.dpsgd import RecordLevelSgd
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Ledger
from privacy.mechanism import GaussianSum
from privacy.noise import NoiseSource
from strategies.job import Job
from strategies.messages import Ask, Refusal, Reply
from strategies.parameters import Vector
from strategies.protocol import Strategy
from strategies.total import Layout

TRAINING_METRICS = ("loss", "examples")


@dataclass(frozen=True)
class Files:
    """Where one site keeps what it must not lose: its ledger, its identity key, its last contribution."""

    ledger: Path
    identity: Path
    outbox: Path


@dataclass(frozen=True)
class SitePlan:
    """What a job will do at a site with so many training rows, and what each round will cost it.

    `sgd` and `event` are None when the job asks for no record-level privacy.
    """

    rows: int
    sgd: RecordLevelSgd | None = None
    event: GaussianEvent | None = None

    @classmethod
    def make(
        cls, job: Job, *, rows: int, parameters: int, rng: str, site: str, noise_multiplier: float | None = None
    ) -> SitePlan:
        """Calibrate the noise for a target; refuse a plan that exceeds its budget (`BudgetExceeded`).

        `noise_multiplier` is what an earlier call for the same job found: it is checked against the budget, not
        searched for again.
        """
        record, training = job.privacy.record, job.training
        if record is None:
            return cls(rows)
        rate, steps = training.rate_for(rows), training.steps_for(rows)
        rounds = training.rounds + record.spare_rounds
        noise = record.noise_multiplier or noise_multiplier
        if noise is None:
            assert record.epsilon is not None
            noise = noise_multiplier_for(
                target_epsilon=record.epsilon, delta=record.delta, sampling_rate=rate, count=steps * rounds
            )
        sgd = RecordLevelSgd(
            mechanism=GaussianSum(clip_norm=record.clip_norm, noise_multiplier=noise), sampling_rate=rate, steps=steps
        )
        event = sgd.event(dimension=parameters, rng=rng)
        check_affordable(event, rounds=rounds, epsilon=record.epsilon, delta=record.delta, site=site)
        return cls(rows, sgd, event)


def layout_for(job: Job, parameters: int) -> Layout:
    """Record-level privacy sends no training metrics: each would be one more release of the records."""
    return Layout(parameters, () if job.privacy.record is not None else TRAINING_METRICS)


class Site:
    """A data holder's client. `noise` makes the source for one round, so a simulation can seed each round by itself."""

    def __init__(
        self,
        name: str,
        *,
        job: Job,
        plan: SitePlan,
        strategy: Strategy,
        trainer: Trainer,
        records: Records,
        noise: Callable[[int], NoiseSource],
        files: Files | None,
        simulation: bool,
    ) -> None:
        self._name = name
        self._job, self._plan, self._strategy, self._trainer, self._noise = job, plan, strategy, trainer, noise
        self._records: DeviceRecords = trainer.place(records)
        self._layout = layout_for(job, trainer.parameters.size)
        self._files, self._simulation = files, simulation
        self._gate: Gate | None = None

    @property
    def name(self) -> str:
        return self._name

    def handle(self, ask: Ask) -> Reply | Refusal:
        """Train on `ask.model` and answer. The reply's contribution is this call's own memory."""
        if self._gate is None:
            self._gate = self._open_gate()
        return self._gate.pass_through(ask, lambda: self._train(ask))

    def _train(self, ask: Ask) -> Vector:
        self._trainer.load(ask.model)
        if self._plan.sgd is not None:
            self._trainer.train_privately(self._records, self._plan.sgd, self._noise(ask.round_number))
            metrics: dict[str, float] = {}
        else:
            metrics = self._trainer.train(
                self._records, seed=training_seed(self._job.seed, self._name, ask.round_number)
            )
        contribution = np.empty(self._layout.size, dtype=np.float32)
        update = contribution[: self._layout.parameters]
        weight = self._strategy.contribution(ask.model, self._trainer.read(), rows=self._plan.rows, out=update)
        contribution[self._layout.parameters :] = [weight, *(metrics[name] for name in self._layout.metrics)]
        return contribution

    def _open_gate(self) -> Gate:
        """Open the ledger on first contact: a site that is never asked writes nothing."""
        record, account = self._job.privacy.record, None
        if record is not None:
            files, event = self._files, self._plan.event
            assert files is not None, "a private job needs a ledger"
            assert event is not None, "a private job needs an event to charge"
            budget = SiteBudget(Ledger(files.ledger, self._name, IdentityKey.load(files.identity)))
            budget.open(rows=self._plan.rows, simulation=self._simulation)
            budget.plan(
                job=self._job.hash,
                event=event,
                rounds=self._job.training.rounds + record.spare_rounds,
                epsilon=record.epsilon,
                delta=record.delta,
            )
            account = Account(budget, Outbox(files.outbox))
        return Gate(self._name, self._job.hash, self._layout, account)


def training_seed(seed: int, site: str, round_number: int) -> int:
    """The seed of one site's batches in one round: 63 bits, the same on every machine. Not for noise or keys."""
    text = json.dumps(["fedchorus batches", seed, site, round_number]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

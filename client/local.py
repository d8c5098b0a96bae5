"""A site's training: from a request to its contribution, in the process that holds the model and the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.adjustment import Adjustment
from client.memory import flat, named
from client.pace import Pace
from privacy.errors import JobError
from privacy.mechanism import clip_in_place
from privacy.noise import NoiseSource
from strategies.job import Job
from strategies.lora import resting
from strategies.messages import Ask
from strategies.parameters import Parameters, Vector
from strategies.partial import frozen_first
from strategies.protocol import Strategy
from strategies.total import TRAINING_METRICS, Layout

if TYPE_CHECKING:  # Not to be imported by a trainer of small devices, which has another Trainer.
    from client.data import Records
    from client.site import SitePlan
    from client.training import DeviceRecords, Trainer


class Trained(NamedTuple):
    """What a site's training gives: the contribution, and what the site keeps for its next round, if anything."""

    contribution: Vector
    memory: Vector | None = None


class LocalTraining:
    """What one site does between a request and its gate. `noise` makes the source of one round's training; `pace` is
    how much the site does of it, by default what the job says."""

    def __init__(
        self,
        name: str,
        *,
        job: Job,
        plan: SitePlan,
        strategy: Strategy,
        trainer: Trainer,
        records: Records,
        layout: Layout,
        noise: Callable[[int], NoiseSource],
        pace: Pace | None = None,
    ) -> None:
        self._pace = Pace.of(job, name) if pace is None else pace
        self._name, self._job, self._plan = name, job, plan
        self._strategy, self._trainer, self._layout, self._noise = strategy, trainer, layout, noise
        self._records: DeviceRecords = trainer.place(trainer.by_length(records))

    def __call__(self, ask: Ask, memory: Vector | None = None) -> Trained:
        """Train on what is asked with; the contribution ((layout.size,) float32) is this call's own memory.

        `memory` ((layout.memory,) float32) is what the site kept in the round before, None in its first. With
        record-level privacy the contribution is already private for each record; the gate bounds it as a whole.
        """
        strategy, traits, size = self._strategy, self._strategy.traits, self._trainer.parameters.size
        every = {**traits.kept, **traits.own}
        before = named(memory, every, size) if memory is not None else {}
        contribution = np.zeros(self._layout.size, dtype=np.float32)
        client = self._job.privacy.client
        clip_norm = ask.clip_norm if ask.clip_norm is not None else client.clip_norm if client is not None else None
        lent = {name: array for name, array in before.items() if name in traits.kept}
        own = _Round(self, ask.round_number, lent, clip_norm=clip_norm)
        sent = self._layout.parameters
        whole = np.zeros(size, np.float32) if self._layout.received_only else contribution[:sent]
        added = strategy.contribution(ask.model, own, whole)
        contribution[:sent] = whole[:sent]
        if set(added.scalars) != set(traits.scalars):
            raise JobError("strategy.name: its contribution has other scalars than its traits name")
        numbers = {**own.metrics, **added.scalars}
        contribution[sent:] = [
            added.weight,
            *(numbers.get(name, 0.0) for name in self._layout.metrics),
        ]
        if not traits.remembers:
            return Trained(contribution)
        # What follows stays here: from now on the records may be read freely, and nothing that leaves depends on it.
        # Hence copies: a strategy may have kept the trainer's own memory, which is trained on next.
        kept = {name: np.array(array) for name, array in own.memory.items() if name in traits.kept}
        after = _Round(self, ask.round_number, {**named_copies(before), **named_copies(own.memory)}, stays=True)
        strategy.personalise(ask.model, after)
        kept |= {name: array for name, array in after.memory.items() if name in traits.own}
        return Trained(contribution, flat(kept, every, size))


def named_copies(memory: dict[str, Vector]) -> dict[str, Vector]:
    return {name: np.array(array) for name, array in memory.items()}


class _Round:
    """`strategies.protocol.Local` for one round of one site; with `stays` for what never leaves it."""

    def __init__(
        self,
        training: LocalTraining,
        round_number: int,
        memory: dict[str, Vector],
        *,
        stays: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        self._of, self._number, self._stays, self._clip_norm = training, round_number, stays, clip_norm
        self.memory = memory
        self.metrics = dict.fromkeys(TRAINING_METRICS, 0.0)
        self._taken = self._fits = self._skipped = 0

    @cached_property
    def _source(self) -> NoiseSource:
        """One for the round: a seeded source would repeat itself in a second training."""
        return self._of._noise(self._number)

    @property
    def rows(self) -> int:
        return self._of._plan.rows

    @property
    def steps(self) -> int:
        return self._planned - self._skipped

    @property
    def share(self) -> float:
        return self._of._pace.share

    @cached_property
    def _planned(self) -> int:
        return self._of._pace.steps_of(self._of._job.training.steps_for(self.rows))

    @cached_property
    def _frozen(self) -> NDArray[np.bool_] | None:
        """What a weak site leaves as it is, and factors that rest in this round, whatever the strategy."""
        rests = resting(self._of._job, self.parameters, site=self._of._name, round_number=self._number)
        if self.share == 1:
            return rests
        first = np.arange(self.parameters.size) < frozen_first(self.parameters.trained, self.share)
        return first if rests is None else first | rests

    @property
    def rank(self) -> int | None:
        tuning = self._of._job.task.tuning
        return (tuning.ranks or {}).get(self._of._name) if tuning is not None else None

    @property
    def learning_rate(self) -> float:
        return self._of._job.training.learning_rate_in(self._number)

    @property
    def parameters(self) -> Parameters:
        return self._of._trainer.parameters

    def fit(
        self,
        start: Vector,
        *,
        pull: float = 0.0,
        towards: Vector | None = None,
        drift: Vector | None = None,
        frozen: NDArray[np.bool_] | None = None,
        steps: int | None = None,
    ) -> Vector:
        trainer, steps = self._of._trainer, self.steps if steps is None else steps
        if steps < 0:
            raise JobError(f"strategy.name: it asks for {steps} steps of training")
        self._taken, self._fits = self._taken + steps, self._fits + 1
        if towards is None and pull:
            towards = start.copy()  # It may be the trainer's own memory.
        if self._frozen is not None:
            frozen = self._frozen if frozen is None else frozen | self._frozen
        stint = self._of._pace.stint(steps / self._planned)
        adjust = Adjustment(pull=pull, towards=towards, drift=drift, frozen=frozen)
        trainer.load(start)
        if (sgd := self._of._plan.sgd) is not None and not self._stays:
            if self._taken > sgd.steps:
                raise JobError(f"strategy.name: it trains {self._taken} steps in a round that is charged {sgd.steps}")
            trainer.train_privately(
                self._of._records,
                replace(sgd, steps=steps),
                self._source,
                adjust=adjust,
                learning_rate=self.learning_rate,
            )
            stint.taken = steps  # The job has no limit of time then.
        else:
            which = 2 * (self._fits - 1) + self._stays
            seed = training_seed(self._of._job.seed, self._of._name, self._number, which)
            sums = trainer.train(
                self._of._records,
                seed=seed,
                adjust=adjust,
                steps=steps,
                learning_rate=self.learning_rate,
                enough=stint,
            )
            self.metrics = {name: self.metrics[name] + sums[name] for name in self.metrics}
        self._skipped += steps - stint.taken
        return trainer.read()

    def bound(self, update: Vector) -> None:
        if self._clip_norm is not None:
            clip_in_place(update, self._clip_norm)

    def loss(self, model: Vector) -> float:
        if self._of._job.privacy.record is not None and not self._stays:
            raise JobError("strategy.name: it reads the records besides training, which privacy.record does not cover")
        self._of._trainer.load(model)
        return self._of._trainer.loss(self._of._records)


def training_seed(seed: int, site: str, round_number: int, which: int = 0) -> int:
    """The seed of one site's batches in one round: 63 bits, the same on every machine. Not for noise or keys.

    `which` tells the trainings of one round apart.
    """
    text = json.dumps(["fedchorus batches", seed, site, round_number, *([which] if which else [])]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

"""A site's training: from a request to its contribution, in the process that holds the model and the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np

from client.data import Records
from client.site import SitePlan
from client.training import DeviceRecords, Trainer
from privacy.noise import NoiseSource
from strategies.job import Job
from strategies.messages import Ask
from strategies.parameters import Vector
from strategies.protocol import Strategy
from strategies.total import Layout


class LocalTraining:
    """What one site does between a request and its gate. `noise` makes the source of one round's training."""

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
    ) -> None:
        self._name, self._job, self._plan = name, job, plan
        self._strategy, self._trainer, self._layout, self._noise = strategy, trainer, layout, noise
        self._records: DeviceRecords = trainer.place(records)

    def __call__(self, ask: Ask) -> Vector:
        """Train on the model that is asked with; the contribution ((layout.size,) float32) is this call's own memory.

        With record-level privacy it is already private for each record; the gate bounds it as a whole.
        """
        self._trainer.load(ask.model)
        if self._plan.sgd is not None:
            self._trainer.train_privately(self._records, self._plan.sgd, self._noise(ask.round_number))
            metrics: dict[str, float] = {}
        else:
            metrics = self._trainer.train(
                self._records, seed=training_seed(self._job.seed, self._name, ask.round_number)
            )
        contribution = np.zeros(self._layout.size, dtype=np.float32)
        update = contribution[: self._layout.parameters]
        weight = self._strategy.contribution(ask.model, self._trainer.read(), rows=self._plan.rows, out=update)
        contribution[self._layout.parameters] = weight
        for position, name in enumerate(self._layout.metrics, start=self._layout.parameters + 1):
            contribution[position] = metrics.get(name, 0.0)
        return contribution


def training_seed(seed: int, site: str, round_number: int) -> int:
    """The seed of one site's batches in one round: 63 bits, the same on every machine. Not for noise or keys."""
    text = json.dumps(["fedchorus batches", seed, site, round_number]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

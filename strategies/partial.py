"""Weak clients that train a part of the model. After HeteroFL: Diao et al. 2021 (arXiv:2010.01264), section 3, and
FedRolex: Alam et al. 2022 (arXiv:2212.01548), Algorithm 1: each parameter is averaged over those who trained it. Here a
part is the last share of the parameters, and everyone keeps the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from strategies.job import Job
from strategies.parameters import Parameters, Vector
from strategies.protocol import Added, Local, ServerState, Strategy, Traits
from strategies.total import Total

LEAST = 1e-9  # Of the whole weight; less is what rounding leaves of nobody.


@dataclass(frozen=True)
class PartialAverage:
    """`inner`, whose server half sees, for each parameter, the average over the sites that trained it.

    `shares` are those that some sites train, each below 1. Beside its update a weak site adds its weight once more,
    under the name of its share: the weight behind each parameter follows from these few sums, which are masked and
    encoded like any other scalar. A parameter that nobody trained in a round stays.
    """

    inner: Strategy
    shares: tuple[float, ...]

    @property
    def traits(self) -> Traits:
        traits = self.inner.traits
        return replace(traits, scalars=(*traits.scalars, *map(_name, self.shares)))

    def start(self, model: Vector, *, sites: int) -> ServerState:
        return self.inner.start(model, sites=sites)

    def broadcast(self, state: ServerState) -> Vector:
        return self.inner.broadcast(state)

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        added = self.inner.contribution(received, local, out)
        weak = {_name(share): added.weight if share == local.share else 0.0 for share in self.shares}
        return replace(added, scalars={**added.scalars, **weak})

    def personalise(self, received: Vector, local: Local) -> None:
        self.inner.personalise(received, local)

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        return self.inner.own_model(received, memory, parameters)

    def step(self, state: ServerState, total: Total) -> ServerState:
        trained = self._trained(total)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            update = np.where(trained > LEAST * total.weight, total.update * (total.weight / trained), 0.0)
        return self.inner.step(state, Total.of(total.layout, update, total.weight))

    def _trained(self, total: Total) -> NDArray[np.float64]:
        """The weight of those who trained each parameter: (P,) float64."""
        trained = np.full(total.layout.parameters + total.layout.received_only, total.weight)
        for share in self.shares:
            trained[: frozen_first(total.layout.parameters, share)] -= total.metrics[_name(share)]
        return trained


def frozen_first(parameters: int, share: float) -> int:
    """How many of so many parameters, the first, stay as they are where the last `share` is trained."""
    return parameters - math.ceil(share * parameters - 1e-9)


def shares_of(job: Job) -> tuple[float, ...]:
    """The shares below 1 that sites of `job` train, each once."""
    devices: Iterable[float] = (device.trains for device in (job.simulation.devices or {}).values())
    return tuple(sorted({share for share in (*(job.training.weak or {}).values(), *devices) if share < 1}))


def _name(share: float) -> str:
    return f"weight_of_{share!r}"  # In all its digits: two shares are two names.

"""Adapters over a federation: what a site trains of their factors, and what the server makes of the sum.

The update of an adapted layer is B A, times a constant. With A fixed and the same everywhere, sum(B_i) A is exactly the
sum of the B_i A (Sun et al. 2024, FFA-LoRA, arXiv:2403.12313): why only B is trained unless the job says else.

| `task.tuning` of a job  | the sites                                | the server                                      |
|-------------------------|------------------------------------------|-------------------------------------------------|
| `factors = "b"`         | train B                                  | adds up B                                       |
| `ranks`                 | train the first columns of B, as so many | averages each column over those who train it    |
| `refactor_every`        | train B                                  | turns the factors, B A staying what it is       |
| `factors = "alternate"` | train B in odd rounds, A in even ones    | adds up one (Chen et al. 2025, RoLoRA,          |
|                         |                                          | arXiv:2502.01755)                               |
| `factors = "both"`      | train both                               | adds up each: sum(B_i) sum(A_i) is biased       |
| `head_rounds`           | train the head alone in the first rounds | adds up the head                                |

Turned factors are those of the singular value decomposition (Lee et al. 2025, FedSVD, arXiv:2505.12805): the columns
of B are orthogonal then and ordered by their size, so that sites with few columns train those that matter most. From
orthonormal rows of A, as here, the rows stay orthonormal and span what they did; plain SGD takes the same steps in
either coordinates, with the same clip and noise of the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.job import Job
from strategies.parameters import Parameters, Vector
from strategies.partial import LEAST
from strategies.protocol import Added, Local, ServerState, Strategy, Traits
from strategies.total import Layout, Total

FIRST, SECOND, HEAD = ".lora_A.", ".lora_B.", "head."


def resting(job: Job, parameters: Parameters, *, site: str, round_number: int) -> NDArray[np.bool_] | None:
    """Which parameters ((P,) bool) a site leaves as they are in a round, for the sake of the adapters' factors."""
    tuning = job.task.tuning
    if tuning is None:
        return None
    if round_number <= (tuning.head_rounds or 0):
        return _mask(parameters, lambda name, array: array.fill(not name.startswith(HEAD)))
    if tuning.factors == "alternate":
        # At first A has no gradient, as B is zero: B goes first.
        rests = FIRST if (round_number - (tuning.head_rounds or 0)) % 2 else SECOND
        return _mask(parameters, lambda name, array: array.fill(rests in name))
    rank = (tuning.ranks or {}).get(site)
    return None if rank is None else columns_from(parameters, rank)


def columns_from(parameters: Parameters, rank: int) -> NDArray[np.bool_]:
    """(P,) bool: the columns of every B from number `rank` on."""

    def mark(name: str, array: NDArray[np.bool_]) -> None:
        if SECOND in name:
            array[:, rank:] = True

    return _mask(parameters, mark)


def _mask(parameters: Parameters, mark: Callable[[str, NDArray[np.bool_]], None]) -> NDArray[np.bool_]:
    found = np.zeros(parameters.size, dtype=np.bool_)
    offset = 0
    for name, shape in parameters.shapes.items():
        count = int(np.prod(shape))
        mark(name, found[offset : offset + count].reshape(shape))
        offset += count
    return found


@dataclass(frozen=True)
class Adapters:
    """`inner`, whose server half knows what the parameters are factors of.

    Beside its update a site with `ranks` columns adds its weight once more, under the name of its rank: the weight
    behind each column follows from these few sums, which are masked and encoded like any other scalar.
    """

    inner: Strategy
    ranks: Mapping[str, int]
    refactor_every: int | None
    parameters: Parameters | None = None

    @property
    def traits(self) -> Traits:
        traits = self.inner.traits
        return replace(traits, scalars=(*traits.scalars, *map(_name, self._distinct)))

    @property
    def _distinct(self) -> list[int]:
        return sorted(set(self.ranks.values()))

    def fitted(self, parameters: Parameters) -> Adapters:
        """For a model of these arrays. Raises `JobError` where the job asks for what they are not."""
        if self.refactor_every is not None and not _pairs(parameters):
            raise JobError("task.tuning.refactor_every: the model has no adapters of which A travels to the sites")
        return replace(self, parameters=parameters)

    def start(self, model: Vector, *, sites: int) -> ServerState:
        state = self.inner.start(model, sites=sites)
        if self.refactor_every is not None and self._remembers(state):
            raise JobError(
                "task.tuning.refactor_every with a strategy that remembers: what it remembers is in the coordinates of "
                'the factors before; take strategy.name = "fedavg" or "fedprox", or leave it out'
            )
        return state

    def _remembers(self, state: ServerState) -> bool:
        """Whether the sites or the server keep anything from round to round, which most begin with their first."""
        assert self.parameters is not None
        traits, more = self.inner.traits, self.parameters.size - self.parameters.trained
        layout = Layout(self.parameters.trained, traits.scalars, received_only=more)
        nothing = Total.of(layout, np.zeros(self.parameters.size), 1.0)
        return bool(traits.remembers or state.memory or self.inner.step(state, nothing).memory)

    def broadcast(self, state: ServerState) -> Vector:
        return self.inner.broadcast(state)

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        added = self.inner.contribution(received, local, out)
        ranks = {_name(rank): added.weight if local.rank == rank else 0.0 for rank in self._distinct}
        return replace(added, scalars={**added.scalars, **ranks})

    def personalise(self, received: Vector, local: Local) -> None:
        self.inner.personalise(received, local)

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        return self.inner.own_model(received, memory, parameters)

    def step(self, state: ServerState, total: Total) -> ServerState:
        assert self.parameters is not None, "fitted before rounds begin"
        if self.ranks:
            trained = np.full(self.parameters.size, total.weight)
            for rank in self._distinct:
                trained[columns_from(self.parameters, rank)] -= total.metrics[_name(rank)]
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                update = np.where(trained > LEAST * total.weight, total.update * (total.weight / trained), 0.0)
            total = Total.of(total.layout, update, total.weight)
        state = self.inner.step(state, total)
        if self.refactor_every is None or state.round_number % self.refactor_every:
            return state
        return replace(state, model=refactored(state.model, self.parameters))


def refactored(model: Vector, parameters: Parameters) -> Vector:
    """`model` ((P,) float32) with each pair (B, A) turned into (U S, V^T) of their product's decomposition U S V^T.

    A model that is not finite stays as it is: the round loop refuses it.
    """
    turned = np.array(model)
    if not np.isfinite(turned).all():
        return turned
    arrays = parameters.split(turned)
    for second, first in _pairs(parameters):
        b, a = arrays[second].astype(np.float64), arrays[first].astype(np.float64)
        # Of B R^T alone, where A = R^T Q with Q's rows orthonormal: no matrix of the layer's size is made.
        q, r = np.linalg.qr(a.T)
        u, sizes, v = np.linalg.svd(b @ r.T, full_matrices=False)
        arrays[second][:], arrays[first][:] = u * sizes, v @ q.T
    return turned


def _pairs(parameters: Parameters) -> list[tuple[str, str]]:
    """The names of each B and its A, where A is received only."""
    found = [(name.replace(FIRST, SECOND), name) for name in parameters.received_only if FIRST in name]
    return [(second, first) for second, first in found if second in parameters.shapes]


def _name(rank: int) -> str:
    return f"weight_of_rank_{rank}"

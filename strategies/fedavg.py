"""Federated averaging: McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from Decentralized
Data* (arXiv:1602.05629), Algorithm 1, written on updates with a server learning rate (Reddi et al. 2021,
arXiv:2003.00295, Algorithm 1; a rate of 1 is the original)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.parameters import Parameters, Vector
from strategies.protocol import Added, Local, ServerState, Traits
from strategies.sections import Positive
from strategies.total import Total


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """x <- x + server_learning_rate * sum(n_k (x_k - x)) / sum(n_k).

    `weighting` "rows": n_k is the number of training rows, which becomes public; "equal": n_k is 1.

    Most other strategies are this one with another `train` (what a site does), `move` (what the server does with the
    average), or both.
    """

    weighting: Literal["rows", "equal"] = "rows"
    server_learning_rate: Positive = 1.0

    @property
    def traits(self) -> Traits:
        return Traits()

    def start(self, model: Vector, *, sites: int) -> ServerState:
        return ServerState(model)

    def broadcast(self, state: ServerState) -> Vector:
        return state.model

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        weight = self.weight(local)
        write_update(received, self.train(received, local), weight, out)
        return Added(weight)

    def weight(self, local: Local) -> float:
        """n_k."""
        return float(local.rows) if self.weighting == "rows" else 1.0

    def train(self, received: Vector, local: Local) -> Vector:
        """The model x_k ((P,) float32) that a site arrives at from x = `received`."""
        return local.fit(received)

    def personalise(self, received: Vector, local: Local) -> None:
        pass

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        return received

    def step(self, state: ServerState, total: Total) -> ServerState:
        with np.errstate(over="ignore", invalid="ignore"):  # The round loop refuses a model that is not finite.
            moved = self.move(state, total.update / total.weight)
        return replace(moved, round_number=state.round_number + 1)

    def move(self, state: ServerState, average: NDArray[np.float64]) -> ServerState:
        """The next model, from the cohort's average update ((P,) float64); `step` counts the round."""
        return replace(state, model=stepped(state.model, self.server_learning_rate * average))


def write_update(start: Vector, trained: Vector, weight: float, out: Vector) -> None:
    """Write weight * (trained - start) into `out`, which may be the memory of `trained`."""
    with np.errstate(over="ignore", invalid="ignore"):  # The gate refuses what is not finite.
        np.subtract(trained, start, out=out)
        np.multiply(out, np.float32(weight), out=out)


def stepped(model: Vector, step: NDArray[np.float64]) -> Vector:
    """`model` + `step`, rounded once to float32."""
    moved: Vector = (model + step).astype(np.float32)
    return moved

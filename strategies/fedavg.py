"""Federated averaging: McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from Decentralized
Data* (arXiv:1602.05629), Algorithm 1, written on updates with a server learning rate (Reddi et al. 2021,
arXiv:2003.00295, Algorithm 1; a rate of 1 is the original)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from strategies.parameters import Vector
from strategies.protocol import ServerState
from strategies.total import Total


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """x <- x + server_learning_rate * sum(n_k (x_k - x)) / sum(n_k).

    `weighting` "rows": n_k is the number of training rows, which becomes public; "equal": n_k is 1.
    """

    weighting: Literal["rows", "equal"] = "rows"
    server_learning_rate: float = 1.0

    def contribution(self, start: Vector, trained: Vector, *, rows: int, out: Vector) -> float:
        weight = float(rows) if self.weighting == "rows" else 1.0
        with np.errstate(over="ignore", invalid="ignore"):  # The gate refuses what is not finite.
            np.subtract(trained, start, out=out)
            np.multiply(out, np.float32(weight), out=out)
        return weight

    def step(self, state: ServerState, total: Total) -> ServerState:
        with np.errstate(over="ignore", invalid="ignore"):  # The round loop refuses a model that is not finite.
            average = total.update * (self.server_learning_rate / total.weight)
            model = (state.model + average).astype(np.float32)
        return replace(state, model=model, round_number=state.round_number + 1)

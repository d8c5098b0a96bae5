"""Federated averaging with server momentum: Hsu et al. 2019, *Measuring the Effects of Non-Identical Data Distribution
for Federated Visual Classification* (arXiv:1909.06335), section 4.2."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from strategies.fedavg import FedAvg, stepped
from strategies.protocol import ServerState
from strategies.sections import Share


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """v <- momentum * v + average; x <- x + server_learning_rate * v."""

    momentum: Share = 0.9

    def move(self, state: ServerState, average: NDArray[np.float64]) -> ServerState:
        velocity = self.momentum * state.memory.get("velocity", np.zeros(len(average))) + average
        model = stepped(state.model, self.server_learning_rate * velocity)
        return replace(state, model=model, memory={**state.memory, "velocity": velocity})

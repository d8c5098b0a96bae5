"""FedDyn: Acar et al. 2021, *Federated Learning Based on Dynamic Regularization* (arXiv:2111.04263), Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from strategies.fedavg import FedAvg, stepped, write_update
from strategies.parameters import Vector
from strategies.protocol import Added, Local, ServerState, Traits
from strategies.sections import Positive
from strategies.total import Total


@dataclass(frozen=True, kw_only=True)
class FedDyn(FedAvg):
    """Each site k minimises its loss - <g_k, w> + alpha/2 |w - x|^2, then g_k <- g_k - alpha (x_k - x).

    Where all sites agree on x, each is at the bottom of its own dynamic loss: the fixed point is the federation's
    optimum, however many local steps lead there. The server keeps h, the sum of all alpha (x - x_k) over the number of
    sites, and moves to the mean of the x_k less h / alpha.
    """

    alpha: Positive = 0.1

    @property
    def traits(self) -> Traits:
        return Traits(kept={"gradient": "vector"}, equal_weights=True, in_step=True)

    def start(self, model: Vector, *, sites: int) -> ServerState:
        return ServerState(model, memory={"shift": np.zeros(len(model)), "sites": np.array([float(sites)])})

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        gradient = local.memory.get("gradient", np.zeros_like(received))
        write_update(received, local.fit(received, pull=self.alpha, drift=-gradient), 1.0, out)
        local.bound(out)
        local.memory["gradient"] = gradient - np.float32(self.alpha) * out
        return Added(1.0)

    def step(self, state: ServerState, total: Total) -> ServerState:
        with np.errstate(over="ignore", invalid="ignore"):
            # In units of the model: h / alpha.
            shift = state.memory["shift"] - total.update / state.memory["sites"][0]
            model = stepped(state.model, self.server_learning_rate * (total.update / total.weight - shift))
        memory = {**state.memory, "shift": shift}
        return replace(state, model=model, memory=memory, round_number=state.round_number + 1)

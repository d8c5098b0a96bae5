"""FedNova: Wang et al. 2020, *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*
(arXiv:2007.07481), equation 12 for local SGD (a_k = 1, so |a_k| is the number of steps)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from strategies.fedavg import FedAvg, write_update
from strategies.parameters import Vector
from strategies.protocol import Added, Local, ServerState, Traits
from strategies.total import Total

STEPS = "weighted_steps"


@dataclass(frozen=True, kw_only=True)
class FedNova(FedAvg):
    """x <- x + rate * T * sum(p_k d_k / t_k), T = sum(p_k t_k): d_k of t_k steps, p_k its share of the weights.

    A site that takes more steps pulls no harder than its weight says. The sum of weighted steps is sent along; it
    follows from the numbers of rows and the job, which are public.
    """

    @property
    def traits(self) -> Traits:
        return Traits(scalars=(STEPS,))

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        weight = self.weight(local)
        write_update(received, self.train(received, local), weight / local.steps, out)
        return Added(weight, {STEPS: weight * local.steps})

    def step(self, state: ServerState, total: Total) -> ServerState:
        with np.errstate(over="ignore", invalid="ignore"):
            steps = total.metrics[STEPS] / total.weight
            moved = self.move(state, steps * (total.update / total.weight))
        return replace(moved, round_number=state.round_number + 1)

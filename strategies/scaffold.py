"""SCAFFOLD: Karimireddy et al. 2020, *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*
(arXiv:1910.06378), Algorithm 1, control variates by option II."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from strategies.fedavg import FedAvg, stepped, write_update
from strategies.parameters import Parameters, Vector
from strategies.protocol import Added, Local, ServerState, Traits
from strategies.total import Total

SITES = "sites"


@dataclass(frozen=True, kw_only=True)
class Scaffold(FedAvg):
    """Each site corrects its steps by how its gradients differ from the federation's: c - c_k.

    All sites take K steps of one size eta. Then the change of c_k that the paper's sites send besides their update
    y_k - x, c_k' - c_k = -c + (x - y_k) / (K eta), follows on average from the average update, and only the update is
    sent: it needs no more bytes, noise or masks than FedAvg's. Control variates are kept times K eta, as lengths of
    updates. With equal weights, as in the paper, c is the mean of the c_k; with weights by rows their weighted mean,
    and how many sites took part is sent along.
    """

    @property
    def traits(self) -> Traits:
        scalars = () if self.weighting == "equal" else (SITES,)
        return Traits(received=2, scalars=scalars, kept={"control": "vector"}, equal_steps=True, in_step=True)

    def start(self, model: Vector, *, sites: int) -> ServerState:
        return ServerState(model, memory={"control": np.zeros(len(model)), "sites": np.array([float(sites)])})

    def broadcast(self, state: ServerState) -> Vector:
        return np.concatenate([state.model, state.memory["control"].astype(np.float32)])

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        model, control = np.split(received, 2)
        own = local.memory.get("control", np.zeros_like(model))
        drift = (control - own) / np.float32(local.steps * local.learning_rate)
        write_update(model, local.fit(model, drift=drift), 1.0, out)
        local.bound(out)
        local.memory["control"] = own - control - out
        weight = self.weight(local)
        out *= np.float32(weight)
        return Added(weight, dict.fromkeys(self.traits.scalars, 1.0))

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        model: Vector = received[: len(received) // 2]
        return model

    def step(self, state: ServerState, total: Total) -> ServerState:
        control, sites = state.memory["control"], state.memory["sites"]
        with np.errstate(over="ignore", invalid="ignore"):
            average = total.update / total.weight
            # Who did not take part keeps its control variate.
            took_part = total.metrics[SITES] if self.traits.scalars else total.weight
            control = control - min(1.0, took_part / sites[0]) * (control + average)
            model = stepped(state.model, self.server_learning_rate * average)
        memory = {**state.memory, "control": control}
        return replace(state, model=model, memory=memory, round_number=state.round_number + 1)

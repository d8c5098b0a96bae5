"""pFedMe: Dinh et al. 2020, *Personalized Federated Learning with Moreau Envelopes* (arXiv:2006.08848), Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from strategies.fedavg import FedAvg
from strategies.parameters import Parameters, Vector
from strategies.protocol import Local, Traits
from strategies.sections import Count, Positive, Rate


@dataclass(frozen=True, kw_only=True)
class PFedMe(FedAvg):
    """Each site alternates: `inner_steps` of SGD on its loss + lam/2 |v - w|^2 for its own model v, then a step of its
    copy w of the shared model towards it, w <- w + eta lam (v - w); what is sent is w's way.

    `moved` is the paper's eta * lambda. `server_learning_rate` is its beta.
    """

    lam: Positive = 1.0
    moved: Rate = 0.5
    inner_steps: Count = 5

    @property
    def traits(self) -> Traits:
        return Traits(kept={"model": "vector"}, personal=True)

    def train(self, received: Vector, local: Local) -> Vector:
        shared, left = received.copy(), local.steps
        while left:
            steps = min(self.inner_steps, left)
            own = local.fit(shared, pull=self.lam, towards=shared, steps=steps).copy()
            shared, left = shared + np.float32(self.moved) * (own - shared), left - steps
        local.memory["model"] = own
        return shared

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        return memory.get("model", received)

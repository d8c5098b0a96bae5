"""Ditto: Li et al. 2021, *Ditto: Fair and Robust Federated Learning Through Personalization* (arXiv:2012.04221),
Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from strategies.fedavg import FedAvg
from strategies.parameters import Parameters, Vector
from strategies.protocol import Local, Traits
from strategies.sections import NotNegative


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """FedAvg for the shared model; besides, each site trains one of its own, drawn to the shared x by lam/2 |v - x|^2.

    The own model never leaves the site and steers nothing that does: it is trained without noise in any job.
    """

    lam: NotNegative = 0.1

    @property
    def traits(self) -> Traits:
        return Traits(own={"model": "vector"}, personal=True)

    def personalise(self, received: Vector, local: Local) -> None:
        start = local.memory.get("model", received)
        local.memory["model"] = local.fit(start, pull=self.lam, towards=received).copy()

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        return memory.get("model", received)

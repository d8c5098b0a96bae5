"""FedProx: Li et al. 2020, *Federated Optimization in Heterogeneous Networks* (arXiv:1812.06127), Algorithm 2."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.fedavg import FedAvg
from strategies.parameters import Vector
from strategies.protocol import Local
from strategies.sections import NotNegative


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose sites add mu/2 |w - x|^2 to their loss: none strays far from the model x that it received."""

    mu: NotNegative = 0.01

    def train(self, received: Vector, local: Local) -> Vector:
        return local.fit(received, pull=self.mu)

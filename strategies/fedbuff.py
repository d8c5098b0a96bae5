"""FedBuff: Nguyen et al. 2022, *Federated Learning with Buffered Asynchronous Aggregation* (arXiv:2106.06639),
Algorithm 1, with the polynomial discount of Xie et al. 2019 (arXiv:1903.03934), section 5.2."""

from __future__ import annotations

from dataclasses import dataclass, replace

from strategies.fedavg import FedAvg
from strategies.protocol import Traits
from strategies.sections import Count, NotNegative


@dataclass(frozen=True, kw_only=True)
class FedBuff(FedAvg):
    """x <- x + rate * sum(n_k s(t_k) d_k) / sum(n_k) over the next `buffer` contributions, whoever makes them.

    t_k is how many steps the server took since site k received its model, and s(t) = (1 + t)^-`staleness`. The server
    steps once a buffer is full; nobody waits for the slowest. Who has answered is next asked with a newer model, so no
    site counts twice in a step.
    """

    buffer: Count = 5
    staleness: NotNegative = 0.5

    @property
    def traits(self) -> Traits:
        return replace(super().traits, asynchronous=True)

    def discount(self, steps: int) -> float:
        """s(t): what an update counts that is so many `steps` of the server old."""
        return float((1.0 + steps) ** -self.staleness)

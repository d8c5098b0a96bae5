"""q-FedAvg, for q-fair federated learning: Li et al. 2020, *Fair Resource Allocation in Federated Learning*
(arXiv:1905.10497), Algorithm 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strategies.fedavg import FedAvg, write_update
from strategies.parameters import Vector
from strategies.protocol import Added, Local, Traits
from strategies.sections import NotNegative

LEAST_LOSS = 1e-10  # As in the authors' code: a power of zero would end the sum.


@dataclass(frozen=True, kw_only=True)
class QFfl(FedAvg):
    """A site whose loss F_k is large pulls harder, by F_k^q; q = 0 is FedAvg with equal weights.

    With the paper's L = 1 / eta its quotient sum(F^q L d) / sum(q F^(q-1) L^2 |d|^2 + L F^q), d = y - x, is a weighted
    mean, whose weights are the terms below over L: a site sends its update and its weight as always.
    """

    q: NotNegative = 1.0

    @property
    def traits(self) -> Traits:
        return Traits(reads_records=True, own_weights=True, equal_weights=True)

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        loss = np.float64(max(local.loss(received), LEAST_LOSS))
        write_update(received, local.fit(received), 1.0, out)
        with np.errstate(over="ignore", invalid="ignore"):
            squared, pull = np.square(out, dtype=np.float64).sum(), loss**self.q
            np.multiply(out, np.float32(pull), out=out)
            weight = np.float32(pull + self.q * loss ** (self.q - 1) * squared / local.learning_rate)
        return Added(float(weight))  # An absurd q makes it infinite; the gate refuses that.

"""The total: what a cohort adds up to, and the only thing a strategy's server half ever sees.

One contribution is one flat vector: the weighted update, then the weight, then the metric sums. Nothing about one
site travels in the clear beside it, and a sum of such vectors is again one: of a region, a worker, a cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.parameters import Parameters, Vector

if TYPE_CHECKING:
    from strategies.job import Job
    from strategies.protocol import Traits

TRAINING_METRICS = ("loss", "examples")
BELOW_CLIP = "below_clip"
"""The metric sum of an adaptive clip norm: +1/2 for each update that was within it, -1/2 for each that was not."""


@dataclass(frozen=True)
class Layout:
    """Where things stand in a contribution: `parameters` update values, one weight, then one sum per metric.

    `received` is the length of the vector that a site is asked with, where it is another than `parameters`; `memory`
    of the one that it keeps between rounds. The model's last `received_only` parameters are in no contribution.
    """

    parameters: int
    metrics: tuple[str, ...] = ()
    received: int | None = None
    memory: int = 0
    received_only: int = 0

    @property
    def size(self) -> int:
        return self.parameters + 1 + len(self.metrics)

    @property
    def asked(self) -> int:
        """The length of the vector that a site is asked with."""
        return self.parameters if self.received is None else self.received


def layout_for(job: Job, model: Parameters | int, traits: Traits) -> Layout:
    """The layout for a model, or for one of so many parameters, under a strategy that needs `traits`.

    With privacy no training metrics are sent: each would be one more release.
    """
    central = job.privacy.central
    metrics: tuple[str, ...] = () if job.privacy.record or job.privacy.client else TRAINING_METRICS
    if central is not None and central.adaptive_clip is not None:
        metrics = (BELOW_CLIP,)
    parameters, received_only = (model, 0) if isinstance(model, int) else (model.trained, model.size - model.trained)
    if received_only and (traits.sent, traits.received) != (1, 1):
        raise JobError(
            f'task.tuning with strategy.name = "{job.strategy.name}": it sends or receives more than one model, and '
            'the fixed factors of the adapters go with one; take "fedavg", "fedprox" or "fedadam", or set '
            'task.tuning.factors = "both"'
        )
    sent, received = traits.sent * parameters, traits.received * parameters + received_only
    kept = [*traits.kept.values(), *traits.own.values()]
    memory = sum(parameters + received_only if what == "vector" else 1 for what in kept)
    return Layout(sent, (*traits.scalars, *metrics), None if received == sent else received, memory, received_only)


def training_loss(metrics: Mapping[str, float]) -> float | None:
    """The mean loss of the examples that a cohort trained on; None where it was not sent, or by what liars sent is
    none."""
    examples = metrics.get("examples", 0.0)
    return metrics["loss"] / examples if "loss" in metrics and examples > 0 else None


class Total:
    """A running sum of contributions: O(model) memory whatever the cohort. Sums are kept in float64."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._sum = np.zeros(layout.size, dtype=np.float64)

    def add(self, contribution: Vector) -> None:
        """Add one contribution ((layout.size,) float32) in place; the caller may reuse its memory afterwards."""
        np.add(self._sum, contribution, out=self._sum)

    def add_sum(self, contributions: NDArray[np.float64]) -> None:
        """Add what a whole cohort added up to elsewhere ((layout.size,) float64)."""
        np.add(self._sum, contributions, out=self._sum)

    def add_total(self, other: Total) -> None:
        """Add what was summed in another total of the same kind: a region's."""
        np.add(self._sum, other._sum, out=self._sum)

    @classmethod
    def of(cls, layout: Layout, update: NDArray[np.float64], weight: float) -> Total:
        """A total of `update` ((P,) float64) and `weight`, its metric sums zero; what no site sends is left out."""
        total = cls(layout)
        total._sum[: layout.parameters] = update[: layout.parameters]
        total._sum[layout.parameters] = weight
        return total

    @property
    def update(self) -> NDArray[np.float64]:
        """(P,) float64: the sum of weighted updates; zero for what is received only."""
        sent = self._sum[: self.layout.parameters]
        return np.pad(sent, (0, self.layout.received_only)) if self.layout.received_only else sent

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return float(self._sum[self.layout.parameters])

    @property
    def metrics(self) -> dict[str, float]:
        """The metric sums by name."""
        values = self._sum[self.layout.parameters + 1 :]
        return {name: float(value) for name, value in zip(self.layout.metrics, values, strict=True)}

"""The one figure that a task's models are compared by, how it is written, and which way it is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulations import shown


@dataclass(frozen=True)
class Headline:
    """A metric by its `name`; `share` says whether it is written in percent, `larger` whether more of it is better."""

    name: str
    share: bool = True
    larger: bool = True

    def form(self, value: object) -> str:
        return shown.share(value) if self.share else shown.figure(value)

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is than `over`."""
        return value - over if self.larger else over - value

    @property
    def title(self) -> str:
        return {"c_index": "Concordance", "wape": "WAPE", "rmse": "RMSE"}.get(self.name, self.name.capitalize())


# The first that a task has is shown by name.
HEADLINES = (
    Headline("accuracy"),
    Headline("c_index"),
    Headline("wape", larger=False),
    Headline("rmse", share=False, larger=False),
)


def headline(metrics: Mapping[str, Any]) -> Headline:
    """The metric that says how a model of this task does."""
    return next((one for one in HEADLINES if metrics.get(one.name) is not None), HEADLINES[0])

"""The researcher's view: a model on every site's test rows at once. Only a simulation has it.

These figures are exact and no part of what a site sends; no differential privacy guarantee covers the test rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from client.data import SiteData
from client.training import Trainer
from simulations.federation import pooled
from simulations.headline import headline
from strategies.parameters import Vector


class Evaluation:
    """Scores models on all test rows together, and per site.

    A metric is a mean over rows; what a task's `scores` says (an area under a curve, a concordance) is computed on all
    rows at once. Of a site whose rows do not define a figure it is None, and so are all of a site without test rows.
    """

    def __init__(self, trainer: Trainer, data: Mapping[str, SiteData]) -> None:
        test = pooled(data).test
        rows = trainer.place(test)
        self._trainer, self._features, self._targets = trainer, rows.features, rows.targets
        self._names = list(data)
        ends = np.cumsum([len(site.test) for site in data.values()]).tolist()
        self._rows = {name: slice(a, b) for name, a, b in zip(self._names, [0, *ends[:-1]], ends, strict=True)}

    def __call__(self, model: Vector) -> dict[str, Any]:
        """`{metric: figure over all rows, "worst_site": NAME, "sites": {NAME: {metric: ..., "rows": n}}}`."""
        self._trainer.load(model)
        outputs = self._trainer.outputs(self._features)
        sites = {
            name: {**self._trainer.figures(outputs[rows], self._targets[rows]), "rows": rows.stop - rows.start}
            for name, rows in self._rows.items()
        }
        return {**_known(self._trainer.figures(outputs, self._targets)), "worst_site": _worst(sites), "sites": sites}

    def one_site(self, model: Vector, site: str) -> dict[str, float | None]:
        """The figures of one site's test rows alone."""
        self._trainer.load(model)
        return self._trainer.figures(
            self._trainer.outputs(self._features[self._rows[site]]), self._targets[self._rows[site]]
        )

    def each(self, model_of: Callable[[str], Vector]) -> dict[str, Any]:
        """Each site's model on its own test rows: over all rows together, and per site."""
        outputs = []
        for name in self._names:
            self._trainer.load(model_of(name))
            outputs.append(self._trainer.outputs(self._features[self._rows[name]]))
        sites = {
            name: self._trainer.figures(own, self._targets[self._rows[name]])
            for name, own in zip(self._names, outputs, strict=True)
        }
        return {**_known(self._trainer.figures(torch.cat(outputs), self._targets)), "sites": sites}


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


def _worst(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """The site of the worst headline, or else of the largest loss; of equal ones the largest."""
    metric = headline({name: 1 for site in sites.values() for name, value in site.items() if value is not None})
    known = any(site.get(metric.name) is not None for site in sites.values())

    def badness(name: str) -> tuple[float, int]:
        figure, loss = sites[name].get(metric.name), sites[name].get("loss")
        if known:
            return (-math.inf if figure is None else -metric.gain(figure, 0.0)), sites[name]["rows"]
        return (-math.inf if loss is None else loss), sites[name]["rows"]

    return max(sites, key=badness)

"""The researcher's view: a model on every site's test rows at once. Only a simulation has it.

These figures are exact and no part of what a site sends; no differential privacy guarantee covers the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from client.data import SiteData
from client.training import Trainer
from simulations.federation import pooled
from strategies.parameters import Vector


class Evaluation:
    """Scores models on all test rows together, and per site."""

    def __init__(self, trainer: Trainer, data: Mapping[str, SiteData]) -> None:
        test = pooled(data).test
        rows = trainer.place(test)
        self._trainer, self._features, self._targets = trainer, rows.features, rows.targets
        self._names = list(data)
        self._sizes = np.array([len(site.test) for site in data.values()])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    def __call__(self, model: Vector) -> dict[str, Any]:
        """`{metric: mean over all rows, "worst_site": NAME, "sites": {NAME: {metric: ..., "rows": n}}}`."""
        self._trainer.load(model)
        per_row = {
            name: values.double().cpu().numpy()
            for name, values in self._trainer.evaluate(self._features, self._targets).items()
        }
        means = {name: np.add.reduceat(values, self._starts) / self._sizes for name, values in per_row.items()}
        sites = {
            site: {**{name: float(mean[k]) for name, mean in means.items()}, "rows": int(self._sizes[k])}
            for k, site in enumerate(self._names)
        }
        worst = min(sites, key=lambda site: (sites[site].get("accuracy", 0.0), -sites[site]["rows"]))
        return {**{name: float(values.mean()) for name, values in per_row.items()}, "worst_site": worst, "sites": sites}

    def one_site(self, model: Vector, site: str) -> dict[str, float]:
        """The means of one site's test rows alone."""
        self._trainer.load(model)
        k = self._names.index(site)
        rows = slice(int(self._starts[k]), int(self._starts[k] + self._sizes[k]))
        metrics = self._trainer.evaluate(self._features[rows], self._targets[rows])
        return {name: float(values.double().mean()) for name, values in metrics.items()}

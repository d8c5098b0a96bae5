"""Tasks whose target is a number: rows, the next periods of a series, ratings.

Models answer on a public scale, on which a loss of one is a large error; metrics are in the target's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.networks import MatrixFactorisation, tabular
from client.scores import r2, rmse, wape
from privacy.errors import JobError
from strategies.job_data import Data
from strategies.job_task import TaskChoice


class TabularRegression:
    """Half the squared error, or Huber's loss (quadratic up to `task.huber_delta`, then linear), on the public scale.

    The scale maps `data.target_range` onto [-1, 1], by logarithms where `data.target_log` is set; without a range it is
    the target's own, or that of its logarithm. Targets are (n,) float32 in their own unit.
    """

    target_type = "number"
    models: tuple[str, ...] = ("linear", "mlp", "resnet", "ft-transformer")
    losses = ("squared", "huber")

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        self._choice, self._data = choice, data
        self._log = bool(data is not None and data.target_log)
        low, high = (data.target_range if data is not None else None) or (-1.0, 1.0)
        if self._log and data is not None and data.target_range is not None:
            low, high = math.log(low), math.log(high)
        self._middle, self._half = (low + high) / 2, (high - low) / 2

    def model(self, features: int, classes: int) -> nn.Module:
        return tabular(self._choice, features, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = self.scaled(targets)
        if self._choice.loss == "huber":
            delta = self._choice.huber_delta or 1.0
            return functional.huber_loss(outputs.squeeze(-1), wanted, reduction="none", delta=delta)
        return (outputs.squeeze(-1) - wanted) ** 2 / 2

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        errors = self.natural(outputs, targets) - self.wanted(targets)
        return {"loss": self.loss(outputs, targets), "mae": errors.abs()}

    def scores(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        predicted, wanted = self.natural(outputs, targets).numpy(), self.wanted(targets).numpy()
        return {"rmse": rmse(predicted, wanted), "r2": r2(predicted, wanted)}

    def wanted(self, targets: Tensor) -> Tensor:
        """The targets in their own unit, (B,)."""
        return targets

    def scaled(self, targets: Tensor) -> Tensor:
        """The targets on the public scale, (B,)."""
        return ((targets.log() if self._log else targets) - self._middle) / self._half

    def natural(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the outputs say in the target's own unit, (B,)."""
        value = outputs.squeeze(-1) * self._half + self._middle
        return value.exp() if self._log else value


class Forecasting(TabularRegression):
    """The next value of a series, relative to its level over the longest lag: targets are (n, 2), value and level.

    A shop twice the size has twice the level, and the same relative movements: one model fits shops of all sizes.
    """

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        super().__init__(choice, data)
        assert data is not None
        assert data.forecast is not None
        self._spread = data.forecast.spread * (1.0 if self._log else self._half)

    @staticmethod
    def check(choice: TaskChoice, data: Data) -> None:
        """Raises `JobError`."""
        if data.forecast is None:
            raise JobError('task.name = "forecast" needs a table [data.forecast]')

    def scores(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        predicted, wanted = self.natural(outputs, targets).numpy(), self.wanted(targets).numpy()
        return {**super().scores(outputs, targets), "wape": wape(predicted, wanted)}

    def wanted(self, targets: Tensor) -> Tensor:
        return targets[..., 0]

    def scaled(self, targets: Tensor) -> Tensor:
        value, level = targets.unbind(dim=-1)
        return (value.log() - level.log() if self._log else value - level) / self._spread

    def natural(self, outputs: Tensor, targets: Tensor) -> Tensor:
        change, level = outputs.squeeze(-1) * self._spread, targets[..., 1]
        return level * change.exp() if self._log else level + change


class Recommendation(TabularRegression):
    """Ratings by matrix factorisation: one site is one user, whose parameters are named `user.*`.

    `task.hidden` is the number of factors. What is predicted is kept within `data.target_range`. With `task.penalty`
    each rating's loss has half of so many squared lengths of its factors and biases added (Koren et al. 2009, eq. 5);
    the metric is the loss without.
    """

    column_type = "id"
    models = ("matrix-factorisation",)

    @staticmethod
    def check(choice: TaskChoice, data: Data) -> None:
        """Raises `JobError`."""
        if len(choice.hidden) != 1:
            raise JobError("task.hidden: a recommendation has one number of factors, for example [10]")
        if data.target_range is None or len(data.columns) != 1:
            raise JobError('task.name = "recommendation" needs data.target_range and one column, of type id')

    def model(self, features: int, classes: int) -> nn.Module:
        assert self._data is not None
        (items,) = self._data.columns.values()
        assert items.count is not None
        return MatrixFactorisation(items.count, self._choice.hidden[0])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs[..., :1], targets) + (self._choice.penalty or 0.0) / 2 * outputs[..., 1]

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {**super().metrics(outputs, targets), "loss": super().loss(outputs[..., :1], targets)}

    def natural(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().natural(torch.clamp(outputs[..., :1], -1, 1), targets)

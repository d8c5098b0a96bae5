"""The task of a statistics job: a model whose one step of training makes its weights the mean of phi(record).

It is linear, without bias, and starts at zero; a record's loss is minus the inner product of the weights with
phi(record). One step of gradient descent over all training rows with a learning rate of 1 makes the weights the mean of
phi, so federated averaging by rows makes them the mean over the federation. Nothing else is new: the gates, ledgers,
secure sums and noise are those of training, and a record's gradient is phi(record), whose norm is at most 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from strategies.job_data import Data
from strategies.job_task import TaskChoice


class Statistics:
    """The task of a statistics job: its model's weights become the mean of phi."""

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        """What they choose is in the features already (`phi`)."""

    def model(self, features: int, classes: int) -> nn.Module:
        return _Weights(features)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {}


class _Weights(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.statistics = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.statistics.weight)

    def forward(self, rows: Tensor) -> Tensor:
        weighed: Tensor = self.statistics(rows)
        return weighed.squeeze(-1)

"""The next character of a text: one window is one record, and one loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from client.encodings import PADDING
from client.networks import CausalConvolution, one_width
from strategies.job_data import Data
from strategies.job_task import TaskChoice


class NextCharacter:
    """Cross-entropy of each next character of a window, averaged over its positions.

    Features are (n, window) character numbers, 0 for one outside the alphabet; targets (n, window) int64, the numbers
    of what comes next.
    """

    target_type = "next"
    column_type = "characters"
    models = ("causal-convolution",)

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        self._choice = choice

    def model(self, features: int, classes: int) -> nn.Module:
        return CausalConvolution(classes, *one_width(self._choice))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=PADDING)
        return _mean(losses, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        right = (outputs.argmax(dim=-1) == targets).float()
        return {"loss": self.loss(outputs, targets), "accuracy": _mean(right, targets)}


def _mean(values: Tensor, targets: Tensor) -> Tensor:
    there = targets != PADDING
    return (values * there).sum(dim=-1) / there.sum(dim=-1).clamp(min=1)

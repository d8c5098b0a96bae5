"""The tasks of pre-trained models: each loss is of one record alone, so that a clip bounds what one record does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.encodings import PADDING
from client.pretrained import Classifier, Writer
from client.tasks import TabularClassification
from strategies.job_data import Data
from strategies.job_task import TaskChoice, Tuning


class FineTuned(TabularClassification):
    """Classes of texts (or, derived, of images) by a pre-trained model and a linear head of the task's own."""

    column_type = "tokens"
    models = ("pretrained",)

    def model(self, features: int, classes: int) -> nn.Module:
        assert self._data is not None
        return Classifier(self._choice, self._data, 1 if classes == 2 else classes)

    @property
    def gradients(self) -> str:
        """How per-example gradients are taken: of everything at once, or of each of a few arrays."""
        return gradients_of(self._choice)


class FineTunedImages(FineTuned):
    column_type = "image"


class OfTokens:
    """What tasks have in common whose outputs are of each token of a text."""

    column_type = "tokens"
    models = ("pretrained",)

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        self._choice, self._data = choice, data

    @property
    def gradients(self) -> str:
        return gradients_of(self._choice)


class TokenClassification(OfTokens):
    """A class for each word of a text: the mean cross-entropy over its words, where each counts at its first token.

    Features are (n, length) token numbers; targets (n, length) int64, `PADDING` where no word begins.
    """

    target_type = "tags"

    def model(self, features: int, classes: int) -> nn.Module:
        assert self._data is not None
        return Classifier(self._choice, self._data, classes, tokens=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=PADDING)
        return mean_of_each(losses, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        right = (outputs.argmax(dim=-1) == targets).float()
        return {"loss": self.loss(outputs, targets), "accuracy": mean_of_each(right, targets)}


class Writing(OfTokens):
    """The next token of a text (`causal-lm`), or an answer to it: the mean negative log-likelihood over its tokens.

    The mean is over one record's own tokens: over a batch's it would couple the records.
    """

    target_types: tuple[str, ...] = ("next", "text")

    def model(self, features: int, classes: int) -> nn.Module:
        assert self._data is not None
        return Writer(self._choice, self._data)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mean_of_each(outputs[..., 0], targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {"loss": self.loss(outputs, targets), "accuracy": mean_of_each(outputs[..., 1], targets)}


class NextToken(Writing):
    """The next token of texts; with target_type = "text" the tokens of an answer to each."""


class SequenceToSequence(Writing):
    """The tokens of an answer to each text, by a model that reads all of the text first."""

    target_types = ("text",)


def mean_of_each(values: Tensor, targets: Tensor) -> Tensor:
    """(n, t) values, and where each counts -> (n,): each record's mean; 0 of one that has none."""
    there = targets != PADDING
    return torch.where(there, values, 0.0).sum(dim=-1) / there.sum(dim=-1).clamp(min=1)


def gradients_of(choice: TaskChoice) -> str:
    return "book-keeping" if (choice.tuning or Tuning()).method == "full" else "leaves"

"""A task: model, loss and metrics. Users bring their own as `package.module:Name` with the same three methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.networks import ImageNet, tabular
from client.scores import f1, roc_auc
from privacy.errors import JobError
from strategies.catalogue import build, resolve
from strategies.job import Job
from strategies.job_data import Data
from strategies.job_task import TaskChoice


class Task(Protocol):
    """What a client learns. Built from the job's `[task]` table."""

    def model(self, features: int, classes: int) -> nn.Module:
        """A fresh model for rows of `features` numbers. No BatchNorm: its statistics mix records."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, ...) outputs and targets, as the data encode them -> (B,) float: each example's loss, not reduced."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Each metric as (B,) per-example values whose mean is the metric; `loss` is one of them."""
        ...


@runtime_checkable
class Scores(Protocol):
    """What a task may have besides: figures that are no mean, on all rows at once."""

    def scores(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """(B, ...) outputs and targets on the CPU -> each figure; NaN where these rows do not define it."""
        ...


class TabularClassification:
    """Two classes: one logit and the logistic loss; more: one logit each and the cross-entropy."""

    target_type = "class"
    models: tuple[str, ...] = ("logistic-regression", "mlp", "resnet", "ft-transformer")

    def __init__(self, choice: TaskChoice, data: Data | None = None) -> None:
        self._choice, self._data = choice, data

    def model(self, features: int, classes: int) -> nn.Module:
        return tabular(self._choice, features, 1 if classes == 2 else classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape[-1] == 1:
            return functional.binary_cross_entropy_with_logits(
                outputs.squeeze(-1), targets.to(outputs.dtype), reduction="none"
            )
        return functional.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        predicted = (outputs.squeeze(-1) > 0).long() if outputs.shape[-1] == 1 else outputs.argmax(dim=-1)
        return {"loss": self.loss(outputs, targets), "accuracy": (predicted == targets).float()}

    def scores(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Of two classes the area under the ROC curve and F1; of more none."""
        if outputs.shape[-1] != 1:
            return {}
        logits, positive = outputs.squeeze(-1).numpy(), targets.numpy() == 1
        return {"auc": roc_auc(logits, positive), "f1": f1(logits > 0, positive)}


class TextClassification(TabularClassification):
    """Classes of texts, which the data's `text` columns hash into bags of words."""

    column_type = "text"


class ImageClassification(TabularClassification):
    """Classes of images: a convolutional network, or a plain one on the flat pixels."""

    column_type = "image"
    models = ("cnn", "logistic-regression", "mlp")

    def model(self, features: int, classes: int) -> nn.Module:
        if self._choice.model != "cnn":
            return super().model(features, classes)
        assert self._data is not None
        (column,) = self._data.columns.values()
        side, _, colours = [*(column.shape or []), 1][:3]
        return ImageNet(side, colours, self._choice.hidden, 1 if classes == 2 else classes)


TASKS: Mapping[str, str] = {
    "tabular-classification": "client.tasks:TabularClassification",
    "text-classification": "client.tasks:TextClassification",
    "image-classification": "client.tasks:ImageClassification",
    "tabular-regression": "client.regression:TabularRegression",
    "forecast": "client.regression:Forecasting",
    "recommendation": "client.regression:Recommendation",
    "survival": "client.survival:Survival",
    "next-character": "client.next_character:NextCharacter",
    "statistics": "client.statistics_task:Statistics",
}


PRETRAINED: Mapping[str, str] = {
    "text-classification": "client.finetuning:FineTuned",
    "image-classification": "client.finetuning:FineTunedImages",
    "token-classification": "client.finetuning:TokenClassification",
    "causal-lm": "client.finetuning:NextToken",
    "seq2seq": "client.finetuning:SequenceToSequence",
}
"""Tasks of `task.model = "pretrained"`, where it is one of theirs."""


def task_for(job: Job) -> Task:
    """The job's task; of an evaluation what measures, and not the task that it evaluates. One that ships with fedchorus
    is told the public constants of the data too.

    Raises `JobError` for a task that does not go with the job's data, model, loss or privacy.
    """
    name, data = "statistics" if job.evaluation is not None else job.task.name, job.data
    known = {**TASKS, **PRETRAINED} if job.task.model == "pretrained" and job.evaluation is None else TASKS
    if name in PRETRAINED and name not in known:
        raise JobError(f'task.name = "{name}" needs task.model = "pretrained" and its checkpoint')
    kind = resolve(name, known, key="task.name")
    settings = {"data": data} if name in known else {}
    if name in known and job.evaluation is None:
        _check_choice(kind, job)
    task: Task = build(kind, ("model", "loss", "metrics"), job.task, key="task.name", **settings)
    if getattr(task, "coupled", False) and job.privacy.record is not None:
        raise JobError(
            "task: its loss couples the records of a batch, so that no clipping bounds what one record does: with "
            '[privacy.record] use a loss of one record at a time (of survival: task.loss = "discrete-time"), or '
            "protect whole sites by [privacy.client]"
        )
    return task


def _check_choice(kind: Any, job: Job) -> None:
    """Raise `JobError` unless the data and the settings of `[task]` are what a shipped task is for."""
    choice, data = job.task, job.data
    wanted = getattr(kind, "target_types", (getattr(kind, "target_type", data.target_type or "class"),))
    if (data.target_type or "class") not in wanted:
        raise JobError(f'task.name = "{choice.name}" needs data.target_type = "{wanted[0]}"')
    if choice.model not in getattr(kind, "models", (choice.model,)):
        raise JobError(f'task.model = "{choice.model}" is not for {choice.name}; use one of {", ".join(kind.models)}')
    losses = getattr(kind, "losses", ())
    if choice.loss not in (None, *losses):
        raise JobError(f'task.loss = "{choice.loss}" is not for {choice.name}; use {" or ".join(losses) or "none"}')
    column = getattr(kind, "column_type", None)
    types = {each.type for each in data.columns.values()}
    if column is not None and column not in types:
        raise JobError(f'task.name = "{choice.name}" needs a column of type "{column}" in data.columns')
    if (alone := types & {"image", "characters", "id", "tokens"}) and column not in alone:
        raise JobError(f'data.columns: a column of type "{min(alone)}" is not for task.name = "{choice.name}"')
    if data.forecast is not None and choice.name != "forecast":
        raise JobError(f'data.forecast is for task.name = "forecast", not "{choice.name}"')
    if hasattr(kind, "check"):
        kind.check(choice, data)


def initial_model(task: Task, *, features: int, classes: int, seed: int) -> nn.Module:
    """The model that round 1 starts from; the same on every machine for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model(features, classes)

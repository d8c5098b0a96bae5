"""A task: model, loss and metrics. Users bring their own as `package.module:Name` with the same three methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from strategies.catalogue import build, resolve
from strategies.job import Job, TaskChoice


class Task(Protocol):
    """What a client learns. Built from the job's `[task]` table."""

    def model(self, features: int, classes: int) -> nn.Module:
        """A fresh model for rows of `features` numbers. No BatchNorm: its statistics mix records."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, ...) outputs, (B,) int64 targets -> (B,) float: each example's loss, not reduced."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Each metric as (B,) per-example values whose mean is the metric; `loss` and `accuracy` are reported."""
        ...


class TabularClassification:
    """Two classes: one logit and the logistic loss; more: one logit each and the cross-entropy."""

    def __init__(self, choice: TaskChoice) -> None:
        self._hidden = list(choice.hidden) if choice.model == "mlp" else []

    def model(self, features: int, classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        width = features
        for hidden in self._hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        last = nn.Linear(width, 1 if classes == 2 else classes)
        if not layers:
            # Logistic regression is convex: it starts at zero, where no noise is spent on unlearning a random start.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape[-1] == 1:
            return functional.binary_cross_entropy_with_logits(
                outputs.squeeze(-1), targets.to(outputs.dtype), reduction="none"
            )
        return functional.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        predicted = (outputs.squeeze(-1) > 0).long() if outputs.shape[-1] == 1 else outputs.argmax(dim=-1)
        return {"loss": self.loss(outputs, targets), "accuracy": (predicted == targets).float()}


TASKS: Mapping[str, str] = {"tabular-classification": "client.tasks:TabularClassification"}


def task_for(job: Job) -> Task:
    kind = resolve(job.task.name, TASKS, key="task.name")
    task: Task = build(kind, ("model", "loss", "metrics"), job.task, key="task.name")
    return task


def initial_model(task: Task, *, features: int, classes: int, seed: int) -> nn.Module:
    """The model that round 1 starts from; the same on every machine for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model(features, classes)

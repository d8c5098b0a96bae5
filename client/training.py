"""Local training: a resident model in one flat float32 buffer, trained in place.

One `Trainer` serves any number of sites in a process: what a site brings is its records and its seed. Nothing is
allocated per round that grows with the number of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from client.data import Records
from client.tasks import Task
from privacy.dpsgd import RecordLevelSgd, VmapGradients, check_trainable
from privacy.errors import JobError
from privacy.noise import NoiseSource
from strategies.job import Training
from strategies.parameters import Parameters, Vector


@dataclass(frozen=True)
class DeviceRecords:
    """A site's training rows on the training device."""

    features: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


class Trainer:
    """The model of one process and what trains it. Not safe between threads: one model, one caller."""

    def __init__(self, task: Task, model: nn.Module, training: Training) -> None:
        check_trainable(model)
        self.device = _device(training.device)
        self._task, self._training = task, training
        self._model = model.to(self.device)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trainable:
            raise JobError("task.name: the model has no trainable parameters")
        self.parameters = Parameters({name: tuple(p.shape) for name, p in trainable})
        # Parameters and gradients become views into two flat buffers, so that loading, stepping and reading a model
        # are each one operation, whatever its layers.
        self._flat = torch.cat([p.detach().float().reshape(-1) for _, p in trainable])
        self._gradient = torch.zeros_like(self._flat)
        offset = 0
        for _, parameter in trainable:
            view = slice(offset, offset + parameter.numel())
            parameter.data = self._flat[view].view_as(parameter)
            parameter.grad = self._gradient[view].view_as(parameter)
            offset += parameter.numel()
        self._per_example = VmapGradients(self._model, task.loss)

    def read(self) -> Vector:
        """The parameters as (P,) float32. On the CPU it is a view: copy it before the next `load`."""
        return self._flat.cpu().numpy()

    def load(self, model: Vector) -> None:
        self._flat.copy_(torch.from_numpy(model))

    def place(self, records: Records) -> DeviceRecords:
        """Move rows to the training device; on the CPU they share the records' memory."""
        return DeviceRecords(
            torch.from_numpy(records.features).to(self.device), torch.from_numpy(records.target).to(self.device)
        )

    def train(self, records: DeviceRecords, *, seed: int) -> dict[str, float]:
        """Plain SGD in place; returns the sums over all examples seen of `loss` and of `examples`.

        Batches are cut from fresh permutations of the rows, drawn from `seed`, and so is what layers draw (dropout).
        """
        rows = len(records)
        batch = max(1, round(self._training.rate_for(rows) * rows))
        generator = torch.Generator().manual_seed(seed)
        rate, decay = self._training.learning_rate, self._training.weight_decay
        loss_sum, examples = torch.zeros((), device=self.device), 0
        order, start = torch.randperm(rows, generator=generator).to(self.device), 0
        self._seed_layers(seed)
        self._model.train()
        for _ in range(self._training.steps_for(rows)):
            if start >= rows:
                order, start = torch.randperm(rows, generator=generator).to(self.device), 0
            chosen = order[start : start + batch]
            start += batch
            losses = self._task.loss(self._model(records.features[chosen]), records.targets[chosen])
            self._gradient.zero_()
            losses.mean().backward()  # type: ignore[no-untyped-call]
            if decay:
                self._gradient.add_(self._flat, alpha=decay)
            self._flat.sub_(self._gradient, alpha=rate)
            loss_sum += losses.detach().sum()
            examples += len(chosen)
        return {"loss": float(loss_sum), "examples": float(examples)}

    def _seed_layers(self, seed: int) -> None:
        # Not torch.manual_seed: it seeds every device there may be, which takes longer than a small site's step.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def train_privately(self, records: DeviceRecords, sgd: RecordLevelSgd, source: NoiseSource) -> None:
        """DP-SGD in place. Returns nothing: a training loss would be one more release.

        What layers draw (dropout) comes from `source` too.
        """
        self._seed_layers(int(source.words(1)[0]) >> 1)
        self._model.train()
        sgd.train(
            self._flat,
            records.features,
            records.targets,
            gradients=self._per_example,
            source=source,
            learning_rate=self._training.learning_rate,
            weight_decay=self._training.weight_decay,
        )

    def try_out(self, records: Records) -> None:
        """Run the task on two records before anything is written. Raises `JobError` if it cannot work."""
        few = self.place(records.take(np.arange(len(records))[:2]))
        try:
            losses = self._task.loss(self._model(few.features), few.targets)
            metrics = self.evaluate(few.features, few.targets)
        except Exception as error:
            # Its text might show a record; where it came from shows with --verbose.
            raise JobError(f"task.name: the model or its loss failed on a record ({type(error).__name__})") from error
        for name, values in {"its loss": losses, **metrics}.items():
            if tuple(values.shape) != (len(few),):
                raise JobError(f"task.name: {name} must be one value per record, got shape {tuple(values.shape)}")

    def evaluate(self, features: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Per-example metrics of the loaded model, each (B,)."""
        self._model.eval()
        with torch.no_grad():
            return self._task.metrics(self._model(features), targets)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise JobError('training.device = "cuda": torch sees no CUDA device here; use "auto" or "cpu"')
    if name == "mps" and not torch.backends.mps.is_available():
        raise JobError('training.device = "mps": torch sees no Apple GPU here; use "auto" or "cpu"')
    return torch.device(name)

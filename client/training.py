"""Local training: a resident model in one flat float32 buffer, trained in place.

One `Trainer` serves any number of sites in a process: what a site brings is its records and its seed. Nothing is
allocated per round that grows with the number of sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data import Records
from client.tasks import Scores, Task
from privacy.dpsgd import RecordLevelSgd, VmapGradients, check_trainable
from privacy.errors import JobError
from privacy.noise import NoiseSource
from strategies.job import Training
from strategies.parameters import Parameters, Vector

PIECE = 4096  # Rows that are evaluated at once.


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What a strategy adds to each gradient g at the model w: g + `pull` (w - `towards`) + `drift`, and zero where
    `frozen`. Arrays are (P,): float32, `frozen` bool."""

    pull: float = 0.0
    towards: Vector | None = None
    drift: Vector | None = None
    frozen: NDArray[np.bool_] | None = None


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
        self.task, self._training = task, training
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
        self._arrays = [parameter for _, parameter in trainable]
        self._ends = np.cumsum(self.parameters.sizes)[:-1]
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

    def train(
        self,
        records: DeviceRecords,
        *,
        seed: int,
        adjust: Adjustment | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Plain SGD in place, until `enough`, asked after each step, says so; returns the sums over all examples seen
        of `loss` and of `examples`.

        Batches are cut from fresh permutations of the rows, drawn from `seed`, and so is what layers draw (dropout).
        """
        rows = len(records)
        batch = max(1, round(self._training.rate_for(rows) * rows))
        generator = torch.Generator().manual_seed(seed)
        rate = self._training.learning_rate if learning_rate is None else learning_rate
        change = self._adjusted(adjust)
        loss_sum, examples = torch.zeros((), device=self.device), 0
        order, start = torch.randperm(rows, generator=generator).to(self.device), 0
        self._seed_layers(seed)
        self._model.train()
        with self._resting(adjust):
            for _ in range(self._training.steps_for(rows) if steps is None else steps):
                if start >= rows:
                    order, start = torch.randperm(rows, generator=generator).to(self.device), 0
                chosen = order[start : start + batch]
                start += batch
                losses = self.task.loss(self._model(records.features[chosen]), records.targets[chosen])
                self._gradient.zero_()
                losses.mean().backward()  # type: ignore[no-untyped-call]
                change(self._gradient, self._flat)
                self._flat.sub_(self._gradient, alpha=rate)
                loss_sum += losses.detach().sum()
                examples += len(chosen)
                if enough():
                    break
        return {"loss": float(loss_sum), "examples": float(examples)}

    @contextmanager
    def _resting(self, adjust: Adjustment | None) -> Iterator[None]:
        """No gradient is worked out for arrays that are frozen as a whole: a weak site saves the way back to them."""
        frozen = adjust.frozen if adjust is not None else None
        whole = [] if frozen is None else [bool(part.all()) for part in np.split(frozen, self._ends)]
        resting = [] if all(whole) else [array for array, rests in zip(self._arrays, whole, strict=True) if rests]
        try:
            for array in resting:
                array.requires_grad_(False)
            yield
        finally:
            for array in resting:
                array.requires_grad_(True)

    def _adjusted(self, adjust: Adjustment | None) -> Callable[[Tensor, Tensor], None]:
        """What happens to each gradient: weight decay, then `adjust`, placed on the training device once."""
        decay = self._training.weight_decay
        towards, drift, frozen = (
            None if array is None else torch.from_numpy(array).to(self.device)
            for array in ((adjust.towards, adjust.drift, adjust.frozen) if adjust is not None else (None,) * 3)
        )
        pull = adjust.pull if adjust is not None else 0.0

        def change(gradient: Tensor, parameters: Tensor) -> None:
            if decay:
                gradient.add_(parameters, alpha=decay)
            if pull:
                assert towards is not None
                gradient.add_(parameters, alpha=pull).sub_(towards, alpha=pull)
            if drift is not None:
                gradient.add_(drift)
            if frozen is not None:
                gradient.masked_fill_(frozen, 0.0)

        return change

    def _seed_layers(self, seed: int) -> None:
        # Not torch.manual_seed: it seeds every device there may be, which takes longer than a small site's step.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def train_privately(
        self,
        records: DeviceRecords,
        sgd: RecordLevelSgd,
        source: NoiseSource,
        *,
        adjust: Adjustment | None = None,
        learning_rate: float | None = None,
    ) -> None:
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
            learning_rate=self._training.learning_rate if learning_rate is None else learning_rate,
            adjust=self._adjusted(adjust),
        )

    def loss(self, records: DeviceRecords) -> float:
        """The mean loss of the loaded model over `records`."""
        with torch.no_grad():
            return float(self.task.loss(self.outputs(records.features), records.targets).double().mean())

    def try_out(self, records: Records) -> None:
        """Run the task on two records before anything is written. Raises `JobError` if it cannot work."""
        few = self.place(records.take(np.arange(len(records))[:2]))
        try:
            losses = self.task.loss(self._model(few.features), few.targets)
            metrics = self.evaluate(few.features, few.targets)
        except Exception as error:
            # Its text might show a record; where it came from shows with --verbose.
            raise JobError(f"task.name: the model or its loss failed on a record ({type(error).__name__})") from error
        for name, values in {"its loss": losses, **metrics}.items():
            if tuple(values.shape) != (len(few),):
                raise JobError(f"task.name: {name} must be one value per record, got shape {tuple(values.shape)}")

    def figures(self, outputs: Tensor, targets: Tensor) -> dict[str, float | None]:
        """What the task says of rows: each metric's mean, and its scores of all of them at once; None where they do not
        define it."""
        found = {name: float(values.double().mean()) for name, values in self.task.metrics(outputs, targets).items()}
        if isinstance(self.task, Scores) and len(targets):
            found |= self.task.scores(outputs.cpu(), targets.cpu())
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def evaluate(self, features: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Per-example metrics of the loaded model, each (B,)."""
        with torch.no_grad():
            return self.task.metrics(self.outputs(features), targets)

    def outputs(self, features: Tensor) -> Tensor:
        """What the loaded model makes of each row, (B, ...)."""
        self._model.eval()
        with torch.no_grad():
            # In pieces: the inner values of an image model take many times what its images take.
            return torch.cat([self._model(piece) for piece in torch.split(features, PIECE)])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise JobError('training.device = "cuda": torch sees no CUDA device here; use "auto" or "cpu"')
    if name == "mps" and not torch.backends.mps.is_available():
        raise JobError('training.device = "mps": torch sees no Apple GPU here; use "auto" or "cpu"')
    return torch.device(name)

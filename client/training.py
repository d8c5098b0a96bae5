"""Local training: a resident model in one flat float32 buffer, trained in place.

One `Trainer` serves any number of sites in a process: what a site brings is its records and its seed. Nothing is
allocated per round that grows with the number of sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.adjustment import Adjustment
from client.data import Records
from client.encodings import PADDING
from client.out_of_memory import Load, OutOfMemory, memory_for
from client.tasks import Scores, Task
from privacy.dpsgd import PHYSICAL_BATCH, ClippedGradients, RecordLevelSgd, check_trainable
from privacy.errors import JobError
from privacy.gradients import Method, gradients_for
from privacy.mechanism import GaussianSum
from privacy.noise import NoiseSource
from strategies.job import Training
from strategies.parameters import Parameters, Vector

PIECE = 4096  # Rows that are evaluated at once.
HELD = 2**22  # Numbers of gradients of single rows that are held at once, where the job does not say.
FEW = 16  # Rows of a pre-trained model that are trained on at once, where the job does not say.


@dataclass(frozen=True)
class DeviceRecords:
    """A site's training rows on the training device."""

    features: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@runtime_checkable
class Spanned(Protocol):
    """A model that pads the rows of a batch to one length."""

    def spans(self, rows: Tensor) -> Tensor:
        """(n,) int64: the length of each row, by which alone it is padded beside others of the same."""
        ...


@dataclass(frozen=True)
class BySpan:
    """`ClippedGradients` of rows that share a batch with rows of their own length alone.

    How far a row is padded, and so the last bits of its gradient, is then its own affair: a record more or less moves
    the others to other places of a batch, and not to another length.
    """

    inner: ClippedGradients
    model: Spanned

    def clipped_sum(
        self, parameters: Tensor, features: Tensor, targets: Tensor, chosen: Tensor, mechanism: GaussianSum
    ) -> NDArray[np.int64]:
        spans, total = self.model.spans(features[chosen]), np.zeros(parameters.numel(), dtype=np.int64)
        for span in sorted(set(spans.tolist())):
            total += self.inner.clipped_sum(parameters, features, targets, chosen[spans == span], mechanism)
        return total


@runtime_checkable
class Apart(Protocol):
    """What a model has of which a part may be fixed."""

    def apart(self) -> tuple[nn.Module, nn.Module] | None:
        """What makes features of rows, once, and the model that is trained on them, its parameters under the names that
        they have here; None where everything is trained."""
        ...


class Trainer:
    """The model of one process and what trains it. Not safe between threads: one model, one caller."""

    def __init__(self, task: Task, model: nn.Module, training: Training) -> None:
        check_trainable(model)
        self.device = _device(training.device)
        self.task, self._training = task, training
        self._method: Method = getattr(task, "gradients", "vmap")
        texts = getattr(task, "column_type", None) == "tokens"
        self._load = Load(self.device.type, pretrained=self._method != "vmap", texts=texts)
        with memory_for("placing the model", self._load):
            self._place(model)

    def _place(self, model: nn.Module) -> None:
        task, training = self.task, self._training
        # A head on a fixed model is trained on that model's outputs, which are computed once.
        parts = model.apart() if isinstance(model, Apart) else None
        self._fixed: nn.Module | None = parts[0].to(self.device) if parts is not None else None
        model = parts[1] if parts is not None else model
        self._model = model.to(self.device)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise JobError("task.name: the model has no trainable parameters")
        own = dict(model.named_parameters())
        last = {name: own[name] for name in getattr(model, "received_only", ())}
        self.parameters = Parameters({name: tuple(p.shape) for name, p in {**trainable, **last}.items()}, tuple(last))
        # Parameters and gradients become views into two flat buffers, so that loading, stepping and reading a model
        # are each one operation, whatever its layers.
        self._flat = torch.cat([p.detach().float().reshape(-1) for p in (*trainable.values(), *last.values())])
        self._trained = self._flat[: self.parameters.trained]
        self._gradient = torch.zeros_like(self._trained)
        offset = 0
        for name, parameter in {**trainable, **last}.items():
            view = slice(offset, offset + parameter.numel())
            parameter.data = self._flat[view].view_as(parameter)
            if name in trainable:
                parameter.grad = self._gradient[view].view_as(parameter)
            offset += parameter.numel()
        self._arrays = list(trainable.values())
        self._ends = np.cumsum(self.parameters.trained_sizes)[:-1]
        self._at_once = training.physical_batch or PIECE
        method = self._method
        small = method == "vmap" or self._fixed is not None
        # Of a large head fewer rows: fresh memory for gradients costs more than the gradients.
        few = max(FEW, min(PHYSICAL_BATCH, HELD // max(1, self.parameters.trained)))
        rows = training.physical_batch or (few if small else FEW)
        self._clipped = gradients_for(self._model, task.loss, method=method, physical_batch=rows, names=list(trainable))
        self._private_rows = rows
        self._evaluated = self._at_once
        if isinstance(self._model, Spanned):
            self._clipped = BySpan(self._clipped, self._model)
            self._evaluated = PIECE  # Such a model cuts them by itself, those of like length together.

    def read(self) -> Vector:
        """The parameters as (P,) float32. On the CPU it is a view: copy it before the next `load`."""
        return self._flat.cpu().numpy()

    def load(self, model: Vector) -> None:
        self._flat.copy_(torch.from_numpy(model))

    def place(self, records: Records) -> DeviceRecords:
        """Move rows to the training device; on the CPU they share the records' memory."""
        with memory_for("placing the records", self._load):
            features = torch.from_numpy(records.features).to(self.device)
            if self._fixed is not None:
                features = self._fixed(features)
            return DeviceRecords(features, torch.from_numpy(records.target).to(self.device))

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
        at_once = min(batch, self._at_once)
        with memory_for("training", self._load, rows=at_once, batch=batch), self._resting(adjust):
            for _ in range(self._training.steps_for(rows) if steps is None else steps):
                if start >= rows:
                    order, start = torch.randperm(rows, generator=generator).to(self.device), 0
                chosen = order[start : start + batch]
                start += batch
                self._gradient.zero_()
                for piece in torch.split(chosen, self._at_once):
                    losses = self.task.loss(self._model(records.features[piece]), records.targets[piece])
                    (losses.sum() / len(chosen)).backward()  # type: ignore[no-untyped-call]
                    loss_sum += losses.detach().sum()
                change(self._gradient, self._trained)
                self._trained.sub_(self._gradient, alpha=rate)
                examples += len(chosen)
                if enough():
                    break
        return {"loss": float(loss_sum), "examples": float(examples)}

    @contextmanager
    def _resting(self, adjust: Adjustment | None) -> Iterator[None]:
        """No gradient is worked out for arrays that are frozen as a whole: a weak site saves the way back to them."""
        frozen = adjust.frozen if adjust is not None else None
        parts = [] if frozen is None else np.split(frozen[: self.parameters.trained], self._ends)
        whole = [bool(part.all()) for part in parts]
        resting = [] if all(whole) else [array for array, rests in zip(self._arrays, whole, strict=True) if rests]
        try:
            for array in resting:
                array.requires_grad_(False)
            yield
        finally:
            for array in resting:
                array.requires_grad_(True)

    def _adjusted(self, adjust: Adjustment | None) -> Callable[[Tensor, Tensor], None]:
        """What happens to each gradient before it is a step: `adjust`, placed on the training device once, weight
        decay, and what the optimizer makes of it."""
        decay, adam = self._training.weight_decay, None
        if self._training.optimizer == "adam":
            adam = Adam(torch.zeros_like(self._trained), torch.zeros_like(self._trained))
        towards, drift, frozen = (
            None if array is None else torch.from_numpy(array[: self.parameters.trained]).to(self.device)
            for array in ((adjust.towards, adjust.drift, adjust.frozen) if adjust is not None else (None,) * 3)
        )
        pull = adjust.pull if adjust is not None else 0.0

        def change(gradient: Tensor, parameters: Tensor) -> None:
            if decay and adam is None:
                gradient.add_(parameters, alpha=decay)
            if pull:
                assert towards is not None
                gradient.add_(parameters, alpha=pull).sub_(towards, alpha=pull)
            if drift is not None:
                gradient.add_(drift)
            if adam is not None:
                adam.direct(gradient)
                gradient.add_(parameters, alpha=decay)  # Decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101).
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
        batch = max(1, round(sgd.sampling_rate * len(records)))
        # The engines of pre-trained models fill a piece up to its full size.
        at_once = self._private_rows if self._load.pretrained else min(batch, self._private_rows)
        with memory_for("training", self._load, rows=at_once, batch=batch), self._resting(adjust):
            sgd.train(
                self._trained,
                records.features,
                records.targets,
                gradients=self._clipped,
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
            with memory_for("training", self._load):
                losses = self.task.loss(self._model(few.features), few.targets)
            metrics = self.evaluate(few.features, few.targets)
        except OutOfMemory:
            raise
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
        rows = None if isinstance(self._model, Spanned) else min(len(features), self._evaluated)
        with torch.no_grad(), memory_for("evaluating", self._load, rows=rows):
            # In pieces: the inner values of an image model take many times what its images take.
            return torch.cat([self._model(piece) for piece in torch.split(features, self._evaluated)])

    def by_length(self, records: Records) -> Records:
        """The same rows, the shortest texts first, where the task's model reads texts: rows that are next to each other
        are trained on at once under record-level privacy, and little of them is padding then."""
        if getattr(self.task, "column_type", None) != "tokens":
            return records
        return records.take(np.argsort((records.features != PADDING).sum(axis=1), kind="stable"))


@dataclass
class Adam:
    """Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1, as what it makes of a gradient: the step is that times the
    learning rate. Of a noisy gradient it is post-processing, and costs no privacy."""

    first: Tensor
    second: Tensor
    steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def direct(self, gradient: Tensor) -> None:
        """Replace `gradient` ((P,) float32) by the direction of the next step."""
        self.steps += 1
        (one, other), steps = self.betas, self.steps
        self.first.mul_(one).add_(gradient, alpha=1 - one)
        self.second.mul_(other).addcmul_(gradient, gradient, value=1 - other)
        size = (self.second / (1 - other**steps)).sqrt_().add_(self.epsilon)
        torch.div(self.first, size, out=gradient).div_(1 - one**steps)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise JobError('training.device = "cuda": torch sees no CUDA device here; use "auto" or "cpu"')
    if name == "mps" and not torch.backends.mps.is_available():
        raise JobError('training.device = "mps": torch sees no Apple GPU here; use "auto" or "cpu"')
    return torch.device(name)

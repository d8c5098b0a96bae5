"""DP-SGD at one site: Poisson batches, per-example clipping, integer noise (Abadi et al. 2016, arXiv:1607.00133).

Training and accounting come out of one object, `RecordLevelSgd`: the sampling rate, the clip norm, the noise and the
number of steps that it trains with are the ones its `event` charges, so they cannot drift apart.

What makes the clipped sum of a batch stands behind the seam `ClippedGradients`. Small models use `ClippedPieces` of
`VmapGradients` (`torch.func`, vmap over grad): on CPU the fastest of the exact engines, and on models without batch
statistics equal to a loop over single records. `privacy.gradients` chooses between it and those for large models.

torch is imported where it trains alone: a gate that charges for training in another process does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError
from privacy.events import GaussianEvent
from privacy.mechanism import GaussianSum
from privacy.noise import NoiseSource, poisson_sample

if TYPE_CHECKING:
    from torch import Tensor, nn

LossPerExample = Callable[["Tensor", "Tensor"], "Tensor"]
"""(outputs (B, ...), targets (B, ...)) -> losses (B,)."""

PHYSICAL_BATCH = 1024  # Rows whose gradients are held at once: memory is this times the number of parameters.


class ClippedGradients(Protocol):
    """Makes the clipped sum of one logical batch."""

    def clipped_sum(
        self, parameters: Tensor, features: Tensor, targets: Tensor, chosen: Tensor, mechanism: GaussianSum
    ) -> NDArray[np.int64]:
        """Sum the gradients of the rows `chosen`, each clipped, on the grid of `mechanism`: (P,) int64.

        (P,) float32, (n, ...), (n, ...), (b,) int64. Guarantee: one row more or less moves the sum by an L2 norm of at
        most `STEPS_PER_CLIP`. No row chosen: zeros, and no model is run.
        """


class PerExampleGradients(Protocol):
    def __call__(self, parameters: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        """(P,) float32, (B, ...), (B, ...) -> (B, P) float32: row i is the gradient of example i's loss alone."""


class VmapGradients:
    """`PerExampleGradients` of `model` and `loss` by vmap(grad), in the order of `trained_parameters(model, names)`."""

    def __init__(self, model: nn.Module, loss: LossPerExample, names: Sequence[str] | None = None) -> None:
        from torch.func import grad, vmap

        self._model, self._loss = model, loss
        trainable = list(trained_parameters(model, names).items())
        self._names = [name for name, _ in trainable]
        self._shapes = [parameter.shape for _, parameter in trainable]
        self._sizes = [parameter.numel() for _, parameter in trainable]
        # randomness="different": each example draws its own dropout mask, as in ordinary training.
        self._gradients = vmap(grad(self._loss_of_one), in_dims=(None, 0, 0), randomness="different")

    def __call__(self, parameters: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = self._gradients(parameters, features, targets)
        return result

    def _loss_of_one(self, parameters: Tensor, features: Tensor, target: Tensor) -> Tensor:
        from torch import split
        from torch.func import functional_call

        views = split(parameters, self._sizes)
        named = {name: view.view(shape) for name, view, shape in zip(self._names, views, self._shapes, strict=True)}
        outputs = functional_call(self._model, named, (features.unsqueeze(0),))
        return self._loss(outputs, target.unsqueeze(0)).squeeze(0)


def trained_parameters(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that a flat vector holds, in its order: those `names`, else all that require a gradient, in the
    order of `model.named_parameters()`. Raises `JobError` for a name that the model lacks."""
    every = dict(model.named_parameters())
    if names is None:
        return {name: parameter for name, parameter in every.items() if parameter.requires_grad}
    for name in names:
        if name not in every:
            raise JobError(f"the model has no parameter {name!r} to train; check the names of the trained layers")
    return {name: every[name] for name in names}


@dataclass(frozen=True)
class ClippedPieces:
    """`ClippedGradients` that holds the gradients of `physical_batch` rows at once."""

    per_example: PerExampleGradients
    physical_batch: int = PHYSICAL_BATCH

    def clipped_sum(
        self, parameters: Tensor, features: Tensor, targets: Tensor, chosen: Tensor, mechanism: GaussianSum
    ) -> NDArray[np.int64]:
        total = np.zeros(parameters.numel(), dtype=np.int64)
        # In pieces: the sum of integers does not depend on how a batch is cut, and memory stays bounded. An empty
        # batch has no piece: many models cannot run on zero rows.
        for start in range(0, len(chosen), self.physical_batch):
            piece = chosen[start : start + self.physical_batch]
            per_example = self.per_example(parameters, features[piece], targets[piece])
            total += mechanism.quantised_sum(per_example.detach().cpu().numpy())
        return total


@dataclass(frozen=True, kw_only=True)
class RecordLevelSgd:
    """`steps` steps of SGD on one site's records, private at record level.

    Guarantee: everything `train` makes of the records, the final parameters included, is covered by `event`: `steps`
    Poisson-subsampled Gaussian releases of sensitivity `clip_norm` under add/remove-one of a record. The number of
    rows is public (it scales the step, as in every DP-SGD with a stated expected batch), so the neighbour without a
    record has an empty record in its place.

    An empty batch is a release like any other: noise is added, the step is taken, the event is charged.
    """

    mechanism: GaussianSum
    sampling_rate: float
    steps: int

    def event(self, *, dimension: int, rng: str) -> GaussianEvent:
        """What one call of `train` with `dimension` parameters costs."""
        return self.mechanism.event(sampling_rate=self.sampling_rate, count=self.steps, dimension=dimension, rng=rng)

    def train(
        self,
        parameters: Tensor,
        features: Tensor,
        targets: Tensor,
        *,
        gradients: ClippedGradients,
        source: NoiseSource,
        learning_rate: float,
        adjust: Callable[[Tensor, Tensor], None] = lambda gradient, parameters: None,
    ) -> None:
        """Take the steps in place on `parameters` ((P,) float32, on the device of the data).

        Batches and noise are drawn from `source`. `adjust` changes each noisy gradient in place by what the parameters
        or earlier releases say (weight decay, a proximal term): after the noise, so it costs nothing.
        """
        import torch

        rows = len(features)
        expected_batch = self.sampling_rate * rows
        for _ in range(self.steps):
            chosen = torch.from_numpy(poisson_sample(source, rows, self.sampling_rate)).to(features.device)
            total = gradients.clipped_sum(parameters, features, targets, chosen, self.mechanism)
            noisy = self.mechanism.release(total, source)
            step = torch.from_numpy((noisy / expected_batch).astype(np.float32)).to(parameters.device)
            adjust(step, parameters)
            parameters.sub_(step, alpha=learning_rate)


def _mixes_or_keeps_records(module: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

    if isinstance(module, _BatchNorm):
        return True
    # What is left of these are InstanceNorms: they normalise each record by itself, but may keep running statistics.
    return isinstance(module, _NormBase) and module.track_running_stats


def check_trainable(model: nn.Module) -> None:
    """Refuse, by name, layers whose output for one record depends on the others or on statistics that would not travel.

    Raises `JobError`.
    """
    for name, module in model.named_modules():
        if _mixes_or_keeps_records(module):
            raise JobError(
                f"layer {name!r} is a {type(module).__name__}: it mixes the records of a batch or keeps statistics of "
                "them, which no clipping bounds; use GroupNorm or LayerNorm instead"
            )

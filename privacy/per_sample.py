"""Per-example gradients of large models without hooks: each trained tensor is a leaf of its own for every row.

One forward and one backward pass of the batch, at the speed of plain training while what trains is small: adapters,
heads, norms, biases. Works with fused and eager attention, gradient checkpointing (not the reentrant kind), autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from privacy.dpsgd import LossPerExample, trained_parameters
from privacy.errors import JobError, wants_memory
from privacy.gradients import clip_factors, pieces
from privacy.mechanism import CLIP_MARGIN, STEPS_PER_CLIP, GaussianSum
from privacy.row_layers import Pass, covered

Gradients = list[Tensor | None]
"""One tensor's gradient each, in the order of the flat vector; None stands for zeros."""

OfEach = Callable[[Tensor, Tensor, Tensor], tuple[Iterator[Gradients], Pass]]
"""(parameters (P,), features (B, ...), targets (B, ...)) -> the gradients of each of the B rows, and how."""


class PerSampleLeaves:
    """`ClippedGradients` for adapters, heads, norms and biases.

    Guarantee: each row's contribution is that of `GaussianSum.quantised_sum` for its gradient in float32, clipped in
    float64 on the device and rounded toward zero by itself: the integers of a row have an L2 norm of at most
    `STEPS_PER_CLIP`, whatever precision the model computes in. That a row's gradient does not depend on the other rows
    is up to the model and its loss; `RowGradients.check_once` refuses those where it does. What remains are the last
    bits of the model's own products, which may round otherwise beside other rows (a longer text, a later place).

    Memory: physical_batch x trained parameters x 4 bytes, beside what training takes.
    """

    def __init__(
        self, model: nn.Module, loss: LossPerExample, *, physical_batch: int, names: Sequence[str] | None = None
    ) -> None:
        self._rows, self._physical_batch = RowGradients(model, loss, names), physical_batch

    @torch.no_grad()
    def clipped_sum(
        self, parameters: Tensor, features: Tensor, targets: Tensor, chosen: Tensor, mechanism: GaussianSum
    ) -> NDArray[np.int64]:
        sizes = self._rows.sizes
        total = torch.zeros(sum(sizes), dtype=torch.int64, device=parameters.device)
        if len(chosen):
            two = torch.stack([chosen[0], chosen[-1]])
            self._rows.check_once(parameters, features[two], targets[two], mechanism.clip_norm, self._of_each)
        for piece, real in pieces(chosen, self._physical_batch):
            gradients, _ = self._rows.gradients(parameters, features[piece], targets[piece])
            squares = squared_norms(gradients, len(piece), parameters.device)
            factors = clip_factors(
                squares, real, sizes, mechanism, steps=STEPS_PER_CLIP * CLIP_MARGIN, clip_norm=mechanism.clip_norm
            )
            for part, gradient, factor in zip(torch.split(total, sizes), gradients, factors, strict=True):
                if gradient is not None:
                    # Whole numbers far below 2^53: their sum in float64 is exact.
                    part += scaled(gradient, factor).trunc_().sum(dim=0).long()
        result: NDArray[np.int64] = total.cpu().numpy()
        return result

    def _of_each(self, parameters: Tensor, features: Tensor, targets: Tensor) -> tuple[Iterator[Gradients], Pass]:
        gradients, run = self._rows.gradients(parameters, features, targets)
        return ([None if every is None else every[i] for every in gradients] for i in range(len(features))), run


def squared_norms(gradients: Sequence[Tensor | None], rows: int, device: torch.device) -> Tensor:
    """Of each tensor's gradient of each row: (tensors, B) float64."""
    norms = torch.zeros(len(gradients), rows, dtype=torch.float64, device=device)
    for norm, gradient in zip(norms, gradients, strict=True):
        if gradient is not None:
            norm += torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
    return norms.square_()


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Each row of (B, ...) times its entry of (B,) float64, and zero where that is zero: (B, size) float64."""
    rows, silent = gradient.flatten(1) * factor[:, None], factor == 0
    # Where a row is not finite, 0 x inf is not zero.
    return rows.masked_fill_(silent[:, None], 0.0) if bool(silent.any()) else rows


class RowGradients:
    """One forward and backward pass of the model for the gradients of single rows.

    The parameters are `names`, else all that require a gradient. Raises `JobError` for one in a layer that
    `privacy.row_layers` does not cover.
    """

    def __init__(self, model: nn.Module, loss: LossPerExample, names: Sequence[str] | None) -> None:
        self._model, self._loss = model, loss
        self.parameters = trained_parameters(model, names)
        if not self.parameters:
            raise JobError("the model has no parameters to train")
        self.sizes = [parameter.numel() for parameter in self.parameters.values()]
        name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        self._layers = []
        for path, module in model.named_modules():
            own = {key: name_of[id(p)] for key, p in module._parameters.items() if id(p) in name_of}
            if own:
                self._layers.append(covered(path, module, own))
        self._checked: set[str] = set()

    @torch.enable_grad()
    def gradients(
        self, parameters: Tensor, features: Tensor, targets: Tensor, *, factored: bool = False
    ) -> tuple[list[Tensor | None], Pass]:
        """The gradients at `parameters` ((P,) float32) of each row's loss: for each tensor (B, *shape) float32, or None
        where it is zero, where the tensor rests, or where it lies in the pass's `factors` instead.

        Raises `JobError` where the losses are not one a row, or the model reads a tensor that trains in another way
        than through its layer.
        """
        run = self._pass(parameters, len(features), factored)
        resting = [name for name in self.parameters if name not in run.leaves]
        with self._layers_of(run):
            losses = self._loss(self._model(features), targets)
            if losses.shape != (len(features),):
                raise JobError(
                    f"the loss must be one value a record, got shape {tuple(losses.shape)} for {len(features)} records"
                )
            originals = [parameter for name, parameter in self.parameters.items() if name not in resting]
            found: list[Tensor | None] = [None] * (2 * len(originals))
            if losses.requires_grad:
                found = _backward(losses, [*run.leaves.values(), *originals])
        bypassed = [name for name, read in zip(run.leaves, found[len(originals) :], strict=True) if read is not None]
        if bypassed:
            raise JobError(
                f"the model reads {bypassed[0]!r} in another way than through its layer, where records cannot be told "
                'apart; freeze it, or use the gradient method "vmap"'
            )
        of_leaf = dict(zip(run.leaves, found, strict=False))
        return [of_leaf.get(name) for name in self.parameters], run

    def check_once(
        self, parameters: Tensor, features: Tensor, targets: Tensor, clip_norm: float, of_each: OfEach
    ) -> None:
        """Compare what an engine makes of a few rows with plain autograd of each by itself, once for what is trained.

        That shows a loss or a layer that couples rows, and a layer that is not what it seems. Layers that draw
        (dropout) rest meanwhile. Raises `JobError`; what differs by less than 1e-4 of the clip norm passes.
        """
        trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        if trained <= self._checked:
            return
        # Beside the parameters as they are: behind a head or an adapter that starts at zero there are no gradients.
        generator = torch.Generator(parameters.device).manual_seed(0)
        beside = torch.randn(parameters.shape, generator=generator, device=parameters.device)
        beside.mul_(0.02).add_(parameters)
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            ours, run = of_each(beside, features, targets)
            for i, gradients in enumerate(ours):
                alone = self._alone(beside, features[i : i + 1], targets[i : i + 1])
                self._compare(gradients, alone, 0.1 if run.half else 1e-3, clip_norm)
        except RuntimeError as error:
            guessed = [layer for layer in self._layers if layer.guessed]
            if wants_memory(error) or not guessed:
                raise
            raise JobError(guessed[0].refusal("does not simply add or multiply its parameters")) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        self._checked |= trained

    @torch.enable_grad()
    def _alone(self, parameters: Tensor, features: Tensor, targets: Tensor) -> list[Tensor]:
        """The gradient of one row by autograd, with no layer of ours."""
        run = self._pass(parameters, 1, factored=False)
        values = {name: value.requires_grad_(name in run.leaves) for name, value in run.values.items()}
        losses = self._loss(functional_call(self._model, values, (features,)), targets)
        if not losses.requires_grad:
            return [torch.zeros_like(value) for value in values.values()]
        found = _backward(losses, [values[name] for name in run.leaves])
        of_value = dict(zip(run.leaves, found, strict=True))
        return [torch.zeros_like(v) if (g := of_value.get(name)) is None else g for name, v in values.items()]

    def _compare(self, ours: Gradients, alone: list[Tensor], tolerance: float, clip_norm: float) -> None:
        lengths = [float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) for gradient in alone]
        whole = math.hypot(*lengths)
        if not math.isfinite(whole):
            return  # Such a row contributes nothing.
        for name, gradient, expected, length in zip(self.parameters, ours, alone, lengths, strict=True):
            error = length if gradient is None else float((expected - gradient.view(expected.shape)).norm())
            if not error <= tolerance * (length + 0.1 * whole) + 1e-4 * clip_norm:
                raise JobError(
                    f"the gradient of {name!r} for a record depends on the other records of its batch, or its layer "
                    "computes something else than its kind says; use losses and layers that treat each record by "
                    'itself (no mean over the tokens of a batch), freeze it, or use the gradient method "vmap"'
                )

    def _pass(self, parameters: Tensor, rows: int, factored: bool) -> Pass:
        values, leaves = {}, {}
        views = torch.split(parameters.detach(), self.sizes)
        for (name, parameter), view in zip(self.parameters.items(), views, strict=True):
            values[name] = view.view(parameter.shape).to(parameter.dtype)
            if parameter.requires_grad:
                leaves[name] = view.view(parameter.shape).float().expand(rows, *parameter.shape).requires_grad_()
        return Pass(rows, values, leaves, factored)

    @contextmanager
    def _layers_of(self, run: Pass) -> Iterator[None]:
        """Every layer computes as `run` says, in its backward pass, too, where checkpoints compute again."""
        try:
            for layer in self._layers:
                layer.module.forward = layer.forward(run)
            yield
        finally:
            for layer in self._layers:
                vars(layer.module).pop("forward", None)


def _backward(losses: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    try:
        # Not under the autocast that may be on around training: norms and sums are float32 at least.
        with torch.autocast(losses.device.type, enabled=False):
            return list(torch.autograd.grad(losses.float().sum(), inputs, allow_unused=True))
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise JobError(
            "gradients for each record need checkpointing of the kind that is not reentrant: call "
            'gradient_checkpointing_enable({"use_reentrant": False})'
        ) from error

"""Clipped sums for full fine-tuning in one forward and one backward pass: book-keeping (arXiv:2210.00038).

The backward pass makes no gradient of a large matrix. It keeps what the gradient is made of, each layer's inputs and
the gradients of its outputs; from these come the norms of the rows (the ghost norm, arXiv:2110.05679), and then, with
the rows' factors known, the clipped sum in one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy.dpsgd import LossPerExample
from privacy.errors import JobError
from privacy.gradients import clip_factors, pieces
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.per_sample import Gradients, RowGradients, scaled, squared_norms
from privacy.row_layers import Factors, Lookup, Pass, Product, each_looked_up

_ROUNDING = 2.0**-24  # Of float32: an operation errs by no more, relative to its result.
_SUM_MARGIN = 2.0**-10
_CHUNK = 2**18


class BookKeeping:
    """`ClippedGradients` for full fine-tuning, of any tensors that `privacy.row_layers` covers.

    Guarantee: the sum is put on the grid once a batch and not row by row, so rounding is made part of the bound: with
    v the contribution of one row, in grid steps, trunc(s + v) differs from trunc(s) by less than |v_j| + 1 in each of
    the P coordinates, that is by |v| + sqrt(P) in L2. Rows are clipped to C' = C (1 - sqrt(P) / STEPS_PER_CLIP - 2^-10)
    and the integers' sensitivity is `STEPS_PER_CLIP` all the same.

    | in float32                | what holds                                                                           |
    |---------------------------|--------------------------------------------------------------------------------------|
    | the norm of a row         | is bounded from above: the worst rounding of its dot products is added, so no row   |
    |                           | passes for shorter than it is (about 0.2 % of the clip at 64 tokens)                 |
    | a piece's sum             | errs by at most physical_batch x T x 2^-24 of its terms' lengths, in practice by     |
    |                           | 1e-6 of the sum; it depends on which rows share a piece. The 2^-10 of C is kept for  |
    |                           | it: ample for what was measured, no proof for the worst order of roundings           |
    | sums of pieces            | are float64                                                                          |

    A row whose gradient is not finite, or whose squared norm exceeds float32, contributes zero and poisons no other.

    Memory: inputs and output gradients of the layers for physical_batch rows, and P x 8 bytes for the sum.
    """

    def __init__(
        self, model: nn.Module, loss: LossPerExample, *, physical_batch: int, names: Sequence[str] | None = None
    ) -> None:
        self._rows, self._physical_batch = RowGradients(model, loss, names), physical_batch
        self._shrink = 1.0 - math.sqrt(sum(self._rows.sizes)) / STEPS_PER_CLIP - _SUM_MARGIN
        self._total: Tensor | None = None  # Kept: to ask for this much memory takes longer than to fill it.
        if self._shrink < 0.5:
            raise JobError(
                f"{sum(self._rows.sizes)} parameters are too many for the grid of {STEPS_PER_CLIP} steps a clip norm; "
                "train fewer, or use adapters"
            )

    @torch.no_grad()
    def clipped_sum(
        self, parameters: Tensor, features: Tensor, targets: Tensor, chosen: Tensor, mechanism: GaussianSum
    ) -> NDArray[np.int64]:
        """The same. On the CPU the sum is the engine's own memory: read it before the next call."""
        if torch.get_float32_matmul_precision() != "highest":
            raise JobError(
                "book-keeping takes norms from float32 products, which this process computes in fewer bits; call "
                'torch.set_float32_matmul_precision("highest")'
            )
        sizes, device, clip_norm = self._rows.sizes, parameters.device, mechanism.clip_norm
        total = self._total
        if total is None or total.device != device:
            total = self._total = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        total.zero_()
        if len(chosen):
            two = torch.stack([chosen[0], chosen[-1]])
            self._rows.check_once(parameters, features[two], targets[two], clip_norm, self._of_each)
        for piece, real in pieces(chosen, self._physical_batch):
            gradients, kept, _ = self._backward(parameters, features[piece], targets[piece])
            # Not under the autocast that may be on around training: products here are float32.
            with torch.autocast(device.type, enabled=False):
                squares, grams = squared_norms(gradients, len(piece), device), _Grams()
                for norm, factors in zip(squares, kept, strict=True):
                    if factors is not None:
                        norm += factors.squared_norms(grams)
                shrunk = clip_norm * self._shrink
                shares = clip_factors(squares, real, sizes, mechanism, steps=shrunk, clip_norm=shrunk)
                for part, gradient, factors, share in zip(
                    torch.split(total, sizes), gradients, kept, shares, strict=True
                ):
                    _add(part, gradient, factors, share)
        whole = total.view(torch.int64)
        for part, numbers in zip(torch.split(total, _CHUNK), torch.split(whole, _CHUNK), strict=True):
            numbers.copy_(part * (STEPS_PER_CLIP / clip_norm))  # To an integer, that is toward zero.
        result: NDArray[np.int64] = whole.cpu().numpy()
        return result

    def _backward(
        self, parameters: Tensor, features: Tensor, targets: Tensor
    ) -> tuple[Gradients, list[_Factored | None], Pass]:
        gradients, run = self._rows.gradients(parameters, features, targets, factored=True)
        kept: list[_Factored | None] = []
        for i, (name, parameter) in enumerate(self._rows.parameters.items()):
            factors = _Factored.of(run.factors.pop(name)) if name in run.factors else None
            gradient = gradients[i]
            if factors is not None and gradient is not None:
                # Used at many positions here and at few there: the norm is of the sum.
                with torch.autocast(gradient.device.type, enabled=False):
                    gradients[i], factors = gradient + factors.each(parameter.shape), None
            kept.append(factors)
        return gradients, kept, run

    def _of_each(self, parameters: Tensor, features: Tensor, targets: Tensor) -> tuple[Iterator[Gradients], Pass]:
        gradients, kept, run = self._backward(parameters, features, targets)

        def rows() -> Iterator[Gradients]:  # One at a time: each is as large as the model.
            for share in torch.eye(len(features), dtype=torch.float64, device=parameters.device):
                parts = [parameters.new_zeros(size) for size in self._rows.sizes]
                for part, gradient, factors in zip(parts, gradients, kept, strict=True):
                    _add(part, gradient, factors, share)
                yield [*parts]

        return rows(), run


def _add(part: Tensor, gradient: Tensor | None, factors: _Factored | None, share: Tensor) -> None:
    """Add each row's gradient times its `share` ((B,) float64) to `part` ((size,))."""
    if gradient is not None:
        part += scaled(gradient, share).sum(dim=0)
    if factors is not None:
        factors.add_to(part, share)


@dataclass(frozen=True)
class _Factored:
    """The gradients of one tensor as factors: those of all products that it took part in, and of all look-ups."""

    product: Product | None
    lookup: Lookup | None

    @classmethod
    def of(cls, factors: Sequence[Factors]) -> _Factored:
        # Used several times: the positions of one use come after those of the other, and the sum is over all.
        products = [factor for factor in factors if isinstance(factor, Product)]
        lookups = [factor for factor in factors if isinstance(factor, Lookup)]
        return cls(
            Product(_joined([p.left for p in products]), _joined([p.right for p in products])) if products else None,
            Lookup(_joined([x.ids for x in lookups]), _joined([x.gradient for x in lookups])) if lookups else None,
        )

    def squared_norms(self, grams: _Grams) -> Tensor:
        """(B,) float64, from above: (B, T, T) products of the rows' positions, and no gradient.

        <l_t r_t, l_s r_s> = <l_t, l_s> <r_t, r_s>. A float32 dot product of m numbers errs by at most m 2^-24 |x| |y|:
        what that is for all pairs together, (m + n) 2^-24 (sum_t |l_t| |r_t|)^2, is added.
        """
        totals, lengths, width = [], [], 4
        if self.product is not None:
            left, right = self.product.left.float(), self.product.right.float()
            lefts, rights = grams.of(self.product.left), grams.of(self.product.right)
            totals.append(_sum_of(lefts, rights))
            lengths.append((_diagonal(lefts) * _diagonal(rights)).sqrt().sum(dim=1))
            width += left.shape[2] + right.shape[2]
        if self.lookup is not None:
            ids, gradient = self.lookup.ids, self.lookup.gradient
            dots = grams.of(gradient)
            totals.append(_sum_of(ids[:, :, None] == ids[:, None, :], dots))
            lengths.append(_diagonal(dots).sqrt().sum(dim=1))
            width += gradient.shape[2]
        if self.product is not None and self.lookup is not None:  # A table that is the last layer's matrix, too.
            places = ids[:, None, :].expand(-1, left.shape[1], -1)
            totals.append(2 * _sum_of(left.gather(2, places), torch.bmm(right, gradient.transpose(1, 2))))
        errs = width * _ROUNDING * torch.stack(lengths).sum(dim=0).square()
        return torch.stack(totals).sum(dim=0).clamp_(min=0.0).add_(errs)

    def add_to(self, part: Tensor, share: Tensor) -> None:
        """Add the sum over rows, each times its share, to (size,). A row whose share is 0 adds nothing."""
        silent, share = (share == 0)[:, None, None], share.float()[:, None, None]
        if self.product is not None:
            left, right = self.product.left.float(), self.product.right.float()
            if bool(silent.any()):
                left, right = left.masked_fill(silent, 0.0), right.masked_fill(silent, 0.0)
            left, right = (left * share, right) if left.shape[2] < right.shape[2] else (left, right * share)
            part.view(left.shape[2], -1).add_(left.flatten(0, 1).t() @ right.flatten(0, 1))
        if self.lookup is not None:
            gradient = self.lookup.gradient.masked_fill(silent, 0.0).mul_(share).flatten(0, 1)
            part.view(-1, gradient.shape[1]).index_add_(0, self.lookup.ids.flatten(), gradient.to(part.dtype))

    def each(self, shape: torch.Size) -> Tensor:
        total: Tensor | float = 0.0
        if self.product is not None:
            total = torch.bmm(self.product.left.float().transpose(1, 2), self.product.right.float())
        if self.lookup is not None:
            total = total + each_looked_up(self.lookup, shape[0])
        assert isinstance(total, Tensor)
        return total.view(len(total), *shape)


class _Grams:
    """The inner products of a tensor's positions, (B, T, n) -> (B, T, T), once for all layers that share an input.

    Its keys are addresses: the tensors must outlive it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in self._known:
            numbers = tensor.float()
            self._known[key] = torch.bmm(numbers, numbers.transpose(1, 2))
        return self._known[key]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def _sum_of(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=(1, 2), dtype=torch.float64)


def _diagonal(squares: Tensor) -> Tensor:
    return squares.diagonal(dim1=1, dim2=2).double()

"""The engines of DP-SGD: how the clipped gradients of a batch are made, by the kind of fine-tuning.

| method         | for                                      | memory for gradients                       |
|----------------|------------------------------------------|--------------------------------------------|
| "vmap"         | small models, any layer                  | rows x parameters                          |
| "leaves"       | adapters, heads, norms, biases           | rows x trained parameters                  |
| "book-keeping" | everything, in one backward pass         | inputs and output gradients of each layer  |

torch is imported where an engine is made: who audits or charges does without it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from privacy.dpsgd import ClippedGradients, ClippedPieces, LossPerExample, VmapGradients
from privacy.errors import JobError
from privacy.mechanism import GaussianSum

if TYPE_CHECKING:
    from torch import Tensor, nn

Method = Literal["vmap", "leaves", "book-keeping"]


def gradients_for(
    model: nn.Module, loss: LossPerExample, *, method: Method, physical_batch: int, names: Sequence[str] | None = None
) -> ClippedGradients:
    """Make the engine `method` for the parameters `names` of `model`, else for all that require a gradient.

    The flat vector holds them in the order of `names`, else of `model.named_parameters()`; the engine works at the
    values in that vector, whatever the model's own are. With "leaves" and "book-keeping" the model sees batches of
    exactly `physical_batch` rows, and a parameter that requires no gradient when a sum is made contributes zeros.
    Raises `JobError` for a layer that the engine does not cover, here or at the first rows.
    """
    if physical_batch < 1:
        raise JobError(f"physical_batch must be at least 1, got {physical_batch}")
    if method == "vmap":
        return ClippedPieces(VmapGradients(model, loss, names), physical_batch)
    if method == "leaves":
        from privacy.per_sample import PerSampleLeaves

        return PerSampleLeaves(model, loss, physical_batch=physical_batch, names=names)
    if method == "book-keeping":
        from privacy.book_keeping import BookKeeping

        return BookKeeping(model, loss, physical_batch=physical_batch, names=names)
    raise JobError(f'the gradient method must be "vmap", "leaves" or "book-keeping", got {method!r}')


def pieces(chosen: Tensor, rows: int) -> Iterator[tuple[Tensor, int]]:
    """Cut `chosen` ((b,) int64) in pieces of exactly `rows`, each with the number of its entries that are real.

    The last one is filled up with its first entry: compiled code and CUDA graphs see one shape.
    """
    for start in range(0, len(chosen), rows):
        piece = chosen[start : start + rows]
        yield piece[[*range(len(piece)), *[0] * (rows - len(piece))]], len(piece)


def clip_factors(
    squares: Tensor, real: int, sizes: Sequence[int], mechanism: GaussianSum, *, steps: float, clip_norm: float
) -> Tensor:
    """What each row's gradient of each tensor is multiplied with to be clipped to `steps` on the grid.

    `squares` ((tensors, B) float64) are the squared norms, `sizes` the tensors' coordinates; returns (tensors, B)
    float64. A gradient within `clip_norm` is scaled by steps / clip_norm, a longer one to `steps`. Zero for rows from
    `real` on and for rows that are not finite in any coordinate. With `mechanism.layers` each block by itself, as in
    `GaussianSum.quantised_sum`. Raises `JobError` where a block cuts a tensor in two.
    """
    blocks = block_of_each(sizes, mechanism.layers)
    share = math.sqrt(len(mechanism.layers) or 1)
    norms = squares.new_zeros(len(mechanism.layers) or 1, squares.shape[1])
    norms.index_add_(0, squares.new_tensor(blocks).long(), squares).sqrt_()
    factors = (steps / share) / norms.clamp(min=clip_norm / share)
    silent = ~squares.sum(dim=0).isfinite()
    silent[real:] = True
    return factors.masked_fill(silent, 0.0)[blocks]


def block_of_each(sizes: Sequence[int], layers: Sequence[int]) -> list[int]:
    """The number of the block of `layers` that holds each of the tensors. Raises `JobError` where none does."""
    if not layers:
        return [0] * len(sizes)
    tensor_ends, block_ends = list(accumulate(sizes)), list(accumulate(layers))
    if tensor_ends[-1] != block_ends[-1] or not set(block_ends) <= set(tensor_ends):
        raise JobError(
            f"clipping by layer: blocks of {list(layers)} coordinates do not hold whole tensors of {list(sizes)}; "
            "give one size a tensor"
        )
    return [bisect_left(block_ends, end) for end in tensor_ends]

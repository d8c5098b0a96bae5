"""The Gaussian mechanism on an integer grid: clip in float, add exact integer noise, only then back to float.

Float Gaussian noise leaks through its low bits: of the values that a float32 mechanism releases, a quarter prove
which of two neighbouring inputs they came from (Mironov 2012; Haney et al. 2022, arXiv:2207.10635). Here every value
that is ever released is a whole number of grid steps, whatever the data were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UnsupportedEvent
from privacy.events import LEAST_NOISE, MOST_NOISE, UNIT_RECORD, GaussianEvent
from privacy.noise import NoiseSource, discrete_gaussian, discretisation_tv

STEPS_PER_CLIP = 2**20  # Grid steps in one clip norm: rounding costs a millionth of the clip norm a coordinate.
# Outside, a scaled row or a released value could leave float64's range; and no model's clip norm is near either.
LEAST_CLIP_NORM, MOST_CLIP_NORM = 2.0**-100, 2.0**100
# Shrinks the clip by 6e-8, more than float64 can err in a norm of 2^29 coordinates: the bound holds in integers.
CLIP_MARGIN = 1.0 - 2.0**-24


@dataclass(frozen=True, kw_only=True)
class GaussianSum:
    """Release sums of vectors, each clipped to `clip_norm`, with noise of `noise_multiplier * clip_norm`.

    Guarantee: `release(quantised_sum(vectors), source)` is a Gaussian mechanism of L2 sensitivity `clip_norm` under
    add/remove-one vector and noise standard deviation `noise_multiplier * clip_norm`, up to the total variation
    that `event` states.

    | a vector that is       | contributes                                                         |
    |------------------------|---------------------------------------------------------------------|
    | zero                   | zero                                                                |
    | longer than clip_norm  | the vector scaled down to clip_norm, rounded toward zero            |
    | NaN or infinite in any coordinate | zero: a bounded contribution, and no error that would reveal it |
    | no vector at all       | zero: noise is still added and charged                              |

    Per-layer clipping: with `layers`, the sizes of consecutive blocks of coordinates, each block is clipped by itself
    to clip_norm / sqrt(number of blocks). The blocks' squares add up, so the sensitivity is `clip_norm` all the same;
    no block can crowd out another, and all carry the same noise (McMahan et al. 2018, arXiv:1710.06963, sec. 3).

    Raises `UnsupportedEvent` for a clip norm outside [2^-100, 2^100] or a noise multiplier outside [1/16, 2^20]: its
    integer noise is 2^16 to 2^40 grid steps wide, enough to be charged as a Gaussian and within the sampler's reach.
    """

    clip_norm: float
    noise_multiplier: float
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not LEAST_CLIP_NORM <= self.clip_norm <= MOST_CLIP_NORM:
            raise UnsupportedEvent(f"clip_norm must lie in [2^-100, 2^100], got {self.clip_norm!r}")
        if not LEAST_NOISE <= self.noise_multiplier <= MOST_NOISE:
            raise UnsupportedEvent(f"noise_multiplier must lie in [1/16, 2^20], got {self.noise_multiplier!r}")
        if not all(size > 0 for size in self.layers):
            raise UnsupportedEvent(f"layers must be sizes > 0, got {self.layers!r}")

    @property
    def scale(self) -> float:
        """The standard deviation of the integer noise, in grid steps.

        Its variance is 1/12 above that of the continuous Gaussian that is charged: rounded to integers, that one
        gains just this much (`privacy.noise.discretisation_tv`).
        """
        return math.sqrt((self.noise_multiplier * STEPS_PER_CLIP) ** 2 + 1 / 12)

    def quantised_sum(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Clip each row of `vectors` ((n, d), float), put it on the grid and sum: (d,) int64.

        The L2 norm of each row's integers is at most `STEPS_PER_CLIP`: rounding goes toward zero. Raises
        `UnsupportedEvent` when `layers` do not add up to d.
        """
        if self.layers and sum(self.layers) != vectors.shape[1]:
            raise UnsupportedEvent(
                f"layers add up to {sum(self.layers)} coordinates, the vectors have {vectors.shape[1]}"
            )
        with np.errstate(invalid="ignore", over="ignore"):
            rows = vectors.astype(np.float64)
            # Finite float32 squares cannot overflow float64; a longer float64 row counts as not finite.
            norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        finite = np.isfinite(norms)
        rows[~finite] = 0.0
        blocks = np.split(rows, np.cumsum(self.layers)[:-1], axis=1) if self.layers else [rows]
        share = math.sqrt(len(blocks))
        for block in blocks:  # Views: one block is the row itself.
            own = norms if len(blocks) == 1 else np.sqrt(np.einsum("ij,ij->i", block, block))
            steps = STEPS_PER_CLIP * CLIP_MARGIN / share
            block *= (steps / np.maximum(np.where(finite, own, 0.0), self.clip_norm / share))[:, None]
        total: NDArray[np.int64] = np.trunc(rows, out=rows).sum(axis=0).astype(np.int64)
        return total

    def release(self, quantised: NDArray[np.int64], source: NoiseSource) -> NDArray[np.float64]:
        """Add the noise and leave the grid: (d,) float64 in the unit of the vectors."""
        noisy = quantised + discrete_gaussian(source, self.scale, quantised.size)
        return noisy.astype(np.float64) * (self.clip_norm / STEPS_PER_CLIP)

    def event(
        self, *, sampling_rate: float, count: int, dimension: int, rng: str, unit: str = UNIT_RECORD
    ) -> GaussianEvent:
        """What `count` releases of `dimension` coordinates cost when each vector is in each with `sampling_rate`."""
        return GaussianEvent(
            unit=unit,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            sampling_rate=sampling_rate,
            count=count,
            rng=rng,
            discretisation_tv=discretisation_tv(self.scale, dimension, count),
        )


def clip_in_place(update: NDArray[np.float32], clip_norm: float) -> bool:
    """Scale `update` ((d,) float32) down to an L2 norm of at most `clip_norm`; say whether it was within before.

    One with a NaN or an infinity becomes zero and was not within: no error, which would reveal its client.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        norm = float(np.sqrt(np.einsum("i,i->", update, update, dtype=np.float64)))
    if not math.isfinite(norm):
        update[:] = 0.0
        return False
    if norm > clip_norm:
        # In float64: next to the largest float32 the factor itself would be subnormal, and short of digits.
        np.multiply(update, clip_norm / norm * CLIP_MARGIN, out=update, dtype=np.float64, casting="same_kind")
    return norm <= clip_norm

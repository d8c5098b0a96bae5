"""Adaptive clipping: the clip norm follows a quantile of the update norms, learnt from one noisy bit of each client.

Andrew, Thakkar, McMahan, Ramaswamy 2021 (arXiv:1905.03871): Algorithm 1 and Theorem 1. A client's bit says whether its
update was within the clip norm; the sum of the bits is released with noise, and the clip norm moves geometrically until
the fraction within it is the quantile asked for. Part of the noise that protected the updates alone now protects the
bits: for the same guarantee the updates get slightly more of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.events import LEAST_NOISE, MOST_NOISE, is_number, require
from privacy.mechanism import LEAST_CLIP_NORM, MOST_CLIP_NORM, GaussianSum

_HALF = 0.5
_MOST_CHANGE = 140.0  # More than log(2^100 / 2^-100): it bounds the exponent before exp could overflow.


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Choose each round's clip norm, from `initial`, towards the `quantile` of the update norms.

    `bit_noise` is sigma_b, the standard deviation of the noise on the sum of the b_i - 1/2; the paper takes a twentieth
    of the expected cohort. `learning_rate` is eta_C, the step in the logarithm of the clip norm.

    Guarantee: a round that releases, of one sample of clients, `GaussianSum(clip, update_noise_multiplier(z))` of their
    updates and `bits.release` of their `centred_bits` is ONE Gaussian mechanism of noise multiplier z under
    add/remove-one client: charge one event of z, whose `discretisation_tv` is the sum of both. The next clip norm is
    post-processing of the released bits; all clip norms may be published. For scaled to unit noise the two have
    sensitivities 1 / z_delta and (1/2) / sigma_b, together sqrt(z_delta^-2 + (2 sigma_b)^-2) = 1 / z.

    | an update that is             | its bit                                                                     |
    |-------------------------------|-----------------------------------------------------------------------------|
    | as long as the clip norm      | within: +1/2                                                                |
    | NaN or infinite anywhere      | not within: -1/2                                                            |
    | missing (no such client)      | no bit; the denominator is the public expected cohort, so none would show   |

    An update that is not finite counts as not within, for its norm is no number to compare. That is safe: any of the
    two bits is covered by the sensitivity, and a client that asks in this way for a larger clip norm could as well have
    sent a long update.

    Raises `UnsupportedEvent`, naming the parameter, for a value out of range.
    """

    initial: float
    bit_noise: float
    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        _check_clip("initial", self.initial)
        least, most = LEAST_NOISE * _HALF, MOST_NOISE * _HALF
        fits = is_number(self.bit_noise) and least <= self.bit_noise <= most
        require(fits, "bit_noise", "in [1/32, 2^19]", self.bit_noise)
        require(is_number(self.quantile) and 0 < self.quantile < 1, "quantile", "between 0 and 1", self.quantile)
        rate = self.learning_rate
        require(is_number(rate) and rate > 0, "learning_rate", "a finite number > 0", rate)

    @property
    def bits(self) -> GaussianSum:
        """The mechanism of the bits, on their own exact grid: `release` of `quantised_sum` of `centred_bits` is (1,).

        A bit is ±1/2 and not 0 or 1: of sensitivity 1/2 and not 1, it needs half the noise.
        """
        return GaussianSum(clip_norm=_HALF, noise_multiplier=self.bit_noise / _HALF)

    def update_noise_multiplier(self, noise_multiplier: float) -> float:
        """The z_delta that the updates need for both releases together to cost as `noise_multiplier` (Theorem 1).

        Raises `UnsupportedEvent` where the bits alone would cost as much: unless 2 `bit_noise` > `noise_multiplier`.
        """
        require(is_number(noise_multiplier) and noise_multiplier > 0, "noise_multiplier", "> 0", noise_multiplier)
        share = noise_multiplier * _HALF / self.bit_noise
        require(share < 1, "bit_noise", f"more than half the noise multiplier {noise_multiplier:g}", self.bit_noise)
        return noise_multiplier / math.sqrt((1 - share) * (1 + share))

    def combined(self, update_noise_multiplier: float) -> float:
        """The noise multiplier as which the updates' and the bits' releases together are charged."""
        z = update_noise_multiplier
        require(is_number(z) and z > 0, "update_noise_multiplier", "> 0", z)
        return z / math.hypot(1.0, z * _HALF / self.bit_noise)

    def centred_bits(self, norms: NDArray[np.floating], clip: float) -> NDArray[np.float32]:
        """Whether each of `norms` ((n,), L2, before clipping) is at most `clip`: `(n, 1) float32` of +1/2 or -1/2."""
        _check_clip("clip", clip)
        # A comparison with NaN is false. No error is raised for one: it would reveal the client that sent it.
        with np.errstate(invalid="ignore"):  # Converting a signalling NaN warns.
            within = norms.astype(np.float64) <= clip
        return np.where(within, np.float32(_HALF), np.float32(-_HALF))[:, None]

    def step(self, clip: float, noisy_sum: float, *, cohort: float) -> float:
        """Move `clip` by the released sum of centred bits: C exp(-eta_C (b - quantile)), b = sum / cohort + 1/2.

        `cohort` is the public expected number of clients, sampling rate times population, and never how many answered:
        that number is private. b is used as it comes, even below 0 or above 1: cutting it off would bias the clip norm.
        The result is kept within the clip norms that `GaussianSum` takes.
        """
        _check_clip("clip", clip)
        require(is_number(noisy_sum), "noisy_sum", "a finite number", noisy_sum)
        require(is_number(cohort) and cohort > 0, "cohort", "the expected number of clients, > 0", cohort)
        change = -self.learning_rate * (float(noisy_sum) / float(cohort) + _HALF - self.quantile)
        moved = clip * math.exp(max(-_MOST_CHANGE, min(_MOST_CHANGE, change)))
        return max(LEAST_CLIP_NORM, min(MOST_CLIP_NORM, moved))


def _check_clip(name: str, clip: float) -> None:
    fits = is_number(clip) and LEAST_CLIP_NORM <= clip <= MOST_CLIP_NORM
    require(fits, name, "in [2^-100, 2^100]", clip)

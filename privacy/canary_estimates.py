"""One-shot estimates of epsilon from canary clients' cosines. They are no bounds, upper or lower.

A canary client sends a random direction, as long as the clip allows. The cosine between it and what was released is
Gaussian around 0, with variance 1 / dimension, for a direction that was not in, and about some mean for one that was;
how far apart the two are is what an adversary who looks at this cosine learns. Andrew et al. 2023 (arXiv:2302.03098)
show that the epsilon between the two converges to the mechanism's for the Gaussian mechanism, as the dimension grows;
an adversary who looks at something else may learn more.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, log_ndtr, stdtrit

from privacy.errors import DataError, UnsupportedEvent
from privacy.events import is_number, is_whole

LEAST_DIMENSION = 1000  # Below, the cosine of a random direction is not Gaussian enough.
_STEPS = 9  # Values of a standard deviation that are tried between the ends of its interval.
_Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class EpsilonEstimate:
    """An estimate of epsilon at `delta`, with an interval for what it converges to. No claim can be refuted by it.

    `low` <= the epsilon between the two cosine distributions <= `high` with probability `confidence` at least, if both
    are Gaussian. That epsilon may be far below the mechanism's, and even `low` may be above it by chance or where they
    are not Gaussian.
    """

    epsilon: float
    low: float
    high: float
    delta: float
    confidence: float


@dataclass(frozen=True)
class _Sample:
    """Mean and standard deviation of Gaussian values, and an interval for each; both ends equal where it is known."""

    mean: float
    std: float
    means: _Interval
    stds: _Interval


def final_model_estimate(
    cosines: ArrayLike, *, dimension: int, delta: float, confidence: float = 0.95
) -> EpsilonEstimate:
    """Estimate epsilon by the `cosines` ((n,), of canaries that were in) with the whole change of the model.

    The cosines of canaries that were not in are known without any: N(0, 1 / dimension). It is what an adversary learns
    who sees the final model alone. Raises `DataError` for fewer than two cosines, ones outside [-1, 1] or all equal,
    or fewer than 1000 dimensions; `UnsupportedEvent` for delta or confidence outside (0, 1).
    """
    check(delta=delta, confidence=confidence)
    if not (is_whole(dimension) and dimension >= LEAST_DIMENSION):
        raise DataError(f"cosines of canaries are Gaussian from {LEAST_DIMENSION} dimensions on, got {dimension!r}")
    std = dimension**-0.5
    absent = _Sample(0.0, std, (0.0, 0.0), (std, std))
    return _estimate(absent, _sample(cosines, "cosines", (1 - confidence) / 2), delta, confidence)


def all_iterates_estimate(
    inside: ArrayLike, outside: ArrayLike, *, delta: float, confidence: float = 0.95
) -> EpsilonEstimate:
    """Estimate epsilon by each canary's largest cosine with any round's update, `inside` ((n,)) against `outside`.

    `outside` ((k,)) are canaries drawn alike that never took part: the largest of many is not around 0, so both sides
    are measured. It is what an adversary learns who sees every round. Raises as `final_model_estimate`.
    """
    check(delta=delta, confidence=confidence)
    each = (1 - confidence) / 4
    return _estimate(
        _sample(outside, "cosines outside", each), _sample(inside, "cosines inside", each), delta, confidence
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at `delta` of a Gaussian mechanism of sensitivity `mu` >= 0 standard deviations, exactly.

    As `privacy.accountant` computes for events, for any mu: an audit also meets noise that no event may have. Source:
    Balle and Wang 2018 (arXiv:1805.06530). Raises `UnsupportedEvent` for a delta outside (0, 1).
    """
    return epsilon_between(shift=mu, spread=1.0, delta=delta)


def epsilon_between(*, shift: float, spread: float, delta: float) -> float:
    """The least epsilon >= 0 at which N(0, 1) and N(shift, spread^2) are (epsilon, delta)-close, in both directions.

    Relative error below 1e-9, for delta down to 1e-300: all probabilities are logarithms. Raises `UnsupportedEvent` for
    a delta outside (0, 1), a shift that is not finite or a spread that is not a finite number > 0.
    """
    check(delta=delta)
    if not (is_number(shift) and is_number(spread) and spread > 0):
        raise UnsupportedEvent(f"two Gaussians need a finite shift and spread > 0, got {shift!r} and {spread!r}")
    far, log_delta = abs(shift), math.log(delta)

    def excess(epsilon: float) -> float:
        # Seen from the other Gaussian, the first is at -shift / spread with spread 1 / spread.
        there, back = _log_delta(epsilon, far, spread), _log_delta(epsilon, far / spread, 1 / spread)
        return max(there, back, -1e4) - log_delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-13, rtol=1e-12))


def check(
    *, delta: float = 0.5, epsilon: float = 0.0, confidence: float = 0.5, least_delta: float = math.ulp(0.0)
) -> None:
    """Raise `UnsupportedEvent` for a delta or confidence outside (0, 1), or an epsilon that is not finite and >= 0."""
    if not (is_number(delta) and least_delta <= delta < 1):
        raise UnsupportedEvent(f"delta must lie between 0 and 1, got {delta!r}")
    if not (is_number(epsilon) and epsilon >= 0):
        raise UnsupportedEvent(f"epsilon must be a finite number >= 0, got {epsilon!r}")
    if not (is_number(confidence) and 0 < confidence < 1):
        raise UnsupportedEvent(f"confidence must lie between 0 and 1, such as 0.95, got {confidence!r}")


def real_scores(values: ArrayLike, name: str, *, least: int = 1) -> NDArray[np.float64]:
    """Return `values` as (n,) float64. Raises `DataError` unless they are at least `least` finite numbers in a row."""
    given = np.asarray(values)
    if given.ndim != 1 or given.size < least or given.dtype.kind not in "fiu":
        raise DataError(f"{name} must be a row of at least {least} numbers, got {given.dtype} of shape {given.shape}")
    row = given.astype(np.float64)
    if not np.isfinite(row).all():
        raise DataError(f"{name} must be finite, {int((~np.isfinite(row)).sum())} of {row.size} are not")
    return row


def _sample(cosines: ArrayLike, name: str, significance: float) -> _Sample:
    """Mean and deviation of `cosines`, with Student's and the chi-square interval, each at 1 - `significance`."""
    row = real_scores(cosines, name, least=2)
    mean, std, freedom = float(row.mean()), float(row.std(ddof=1)), row.size - 1
    if np.abs(row).max() > 1 or std == 0:
        raise DataError(f"{name} must lie in [-1, 1] and differ, as those of independent canaries do")
    reach = float(stdtrit(freedom, 1 - significance / 2)) * std / math.sqrt(row.size)
    shortest, longest = (
        std * math.sqrt(freedom / float(chdtri(freedom, tail))) for tail in (significance / 2, 1 - significance / 2)
    )
    return _Sample(mean, std, (mean - reach, mean + reach), (shortest, longest))


def _estimate(absent: _Sample, present: _Sample, delta: float, confidence: float) -> EpsilonEstimate:
    def between(apart: float, first: float, second: float) -> float:
        return epsilon_between(shift=apart / first, spread=second / first, delta=delta)

    # Epsilon grows with the distance of the means: the set that tells two Gaussians apart lies on the far side of one's
    # mean, and moving it there moves it in. With a deviation epsilon may rise or fall: several are tried.
    below, above = present.means[0] - absent.means[1], present.means[1] - absent.means[0]
    nearest = 0.0 if below <= 0 <= above else min(abs(below), abs(above))
    farthest = max(abs(below), abs(above))
    pairs = [
        (first, second)
        for first in _within(absent.stds)
        for second in (*_within(present.stds), min(max(first, present.stds[0]), present.stds[1]))
    ]
    found = between(abs(present.mean - absent.mean), absent.std, present.std)
    return EpsilonEstimate(
        epsilon=found,
        low=min(found, *itertools.starmap(lambda first, second: between(nearest, first, second), pairs)),
        high=max(found, *itertools.starmap(lambda first, second: between(farthest, first, second), pairs)),
        delta=delta,
        confidence=confidence,
    )


def _within(interval: _Interval) -> list[float]:
    low, high = interval
    return [low] if low == high else [float(std) for std in np.geomspace(low, high, _STEPS)]


def _log_delta(epsilon: float, shift: float, spread: float) -> float:
    """log(P(A) - e^epsilon Q(A)), P = N(shift, spread^2), Q = N(0, 1), A where P's density is e^epsilon times Q's.

    A is where a x^2 + b x + c > 0: outside two roots if a >= 0, between them if a < 0. For equal spreads one is at
    infinity, and nearby ones go there smoothly. -inf where it is not positive.
    """
    inverse = spread**-2
    a, b, c = (1 - inverse) / 2, shift * inverse, -(shift**2) * inverse / 2 - math.log(spread) - epsilon
    discriminant = b * b - 4 * a * c
    if discriminant <= 0:
        return -math.inf
    q = -(b + math.sqrt(discriminant)) / 2  # b >= 0: nothing cancels.
    one, other = c / q, q / a if a else -math.inf
    low, high = min(one, other), max(one, other)
    ours = _log_mass((low - shift) / spread, (high - shift) / spread, outside=a >= 0)
    theirs = _log_mass(low, high, outside=a >= 0)
    gap = epsilon + theirs - ours
    return ours + math.log(-math.expm1(gap)) if gap < 0 else -math.inf


def _log_mass(low: float, high: float, *, outside: bool) -> float:
    """The logarithm of a standard Gaussian's probability between `low` and `high`, or outside them."""
    if outside:
        return float(np.logaddexp(log_ndtr(low), log_ndtr(-high)))
    if low > 0:  # The lower tail is the one that keeps its digits.
        low, high = -high, -low
    upper, lower = float(log_ndtr(high)), float(log_ndtr(low))
    return upper + math.log(-math.expm1(lower - upper)) if lower < upper else -math.inf

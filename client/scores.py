"""Figures that are no mean over rows: computed on all rows at once, NaN where the rows do not define them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PAIRS_AT_ONCE = 2**22


def roc_auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """The chance that a positive row scores above a negative one, ties counted half; needs rows of both."""
    chosen = np.asarray(positive, dtype=bool)
    above, below = int(chosen.sum()), int((~chosen).sum())
    if not above or not below:
        return math.nan
    _, place, equal = np.unique(np.asarray(scores, dtype=float), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(equal) - (equal - 1) / 2)[place]  # Of equal scores the mean of their ranks.
    return float((ranks[chosen].sum() - above * (above + 1) / 2) / (above * below))


def f1(predicted: ArrayLike, positive: ArrayLike) -> float:
    """The harmonic mean of precision and recall; needs a row that is positive or predicted to be."""
    said, was = np.asarray(predicted, dtype=bool), np.asarray(positive, dtype=bool)
    either = int(said.sum() + was.sum())
    return 2 * int((said & was).sum()) / either if either else math.nan


def rmse(predicted: ArrayLike, target: ArrayLike) -> float:
    """The root of the mean squared error, in the target's unit."""
    error = _error(predicted, target)
    return math.sqrt(float(np.mean(error**2))) if error.size else math.nan


def r2(predicted: ArrayLike, target: ArrayLike) -> float:
    """One less squared error over that of the rows' own mean; needs targets that differ."""
    wanted = np.asarray(target, dtype=float)
    spread = float(np.sum((wanted - wanted.mean()) ** 2)) if wanted.size else 0.0
    return 1 - float(np.sum(_error(predicted, target) ** 2)) / spread if spread else math.nan


def wape(predicted: ArrayLike, target: ArrayLike) -> float:
    """Absolute errors over absolute targets, both summed; needs a target that is not zero."""
    whole = float(np.abs(np.asarray(target, dtype=float)).sum())
    return float(np.abs(_error(predicted, target)).sum()) / whole if whole else math.nan


def c_index(risk: ArrayLike, time: ArrayLike, event: ArrayLike) -> float:
    """Harrell's concordance: of the pairs of which it is known who had the event first, the share with the higher risk.

    A pair counts when the earlier time is an event; of equal times, when one is an event and the other is censored.
    Equal risks count half (Harrell et al. 1996).
    """
    risks, times = np.asarray(risk, dtype=float), np.asarray(time, dtype=float)
    happened = np.asarray(event, dtype=bool)
    right, pairs = 0.0, 0
    firsts = np.flatnonzero(happened)
    step = max(1, _PAIRS_AT_ONCE // max(1, len(risks)))
    for start in range(0, len(firsts), step):
        first = firsts[start : start + step, None]
        later = (times > times[first]) | ((times == times[first]) & ~happened)
        right += int((later & (risks < risks[first])).sum()) + 0.5 * int((later & (risks == risks[first])).sum())
        pairs += int(later.sum())
    return right / pairs if pairs else math.nan


def _error(predicted: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    error: NDArray[np.float64] = np.asarray(predicted, dtype=float) - np.asarray(target, dtype=float)
    return error

"""Empirical lower bounds: what canaries that were found again prove about the epsilon of the mechanism that hid them.

| function                | what is observed                             | what it takes for granted                  |
|-------------------------|----------------------------------------------|--------------------------------------------|
| `one_run_lower_bound`   | guesses which of m canaries one run included | nothing about the mechanism                |
| `f_dp_lower_bound`      | the same guesses                             | that its trade-off curve is of a `Family`  |
| `two_sided_lower_bound` | both error rates over independent canaries   | that its trade-off curve is of a `Family`  |

A trade-off curve f maps a false positive rate to the least false negative rate that any test of "was this canary in?"
can have beside it. A lower bound above the claim proves the claim wrong, or the implementation; one below it proves
nothing, for a poor attack finds nothing. Each bound holds for one unit under the adjacency that its canaries realise:
add/remove-one where a canary is in or absent, zero-out where it is in or zero. `privacy.canary_estimates` has figures
that are no bounds.

Sources: Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846); Mahloujifar, Melis, Chaudhuri 2024
(arXiv:2410.22235); Nasr et al. 2023 (arXiv:2302.07956); Dong, Roth, Su 2019 (arXiv:1905.02383).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincc, betainccinv, expit, ndtri

from privacy.canary_estimates import check, gaussian_epsilon, real_scores
from privacy.errors import DataError, UnsupportedEvent

TradeOff = Callable[[float], float]
MOST = 2.0**20  # A parameter beyond which no family is searched: its curve then does not fall to 0, as it must.
_PRECISION = 1e-8  # Of a parameter, relative: a bound errs downward by it.
_STALLED = 1e-10  # Relative growth in a step that dies out: what goes on growing grows far faster, with 10^6 guesses.
_MANY = 10  # Scores that are in order by chance with probability below 1e-6.
_STANDARD = NormalDist()


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """`epsilon`, at `delta`, is above the true one with probability at most 1 - `confidence`, under `method`'s terms.

    `claimed` is the epsilon that was promised at the same delta, for the same unit and adjacency.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float
    claimed: float

    @property
    def contradicts(self) -> bool:
        """Whether the claim is refuted at this confidence. False proves nothing: a better attack might."""
        return self.epsilon > self.claimed

    def __str__(self) -> str:
        verdict = "contradicts the claim" if self.contradicts else "does not contradict the claim"
        return (
            f"{self.method}: epsilon >= {self.epsilon:.4g} at delta {self.delta:g} with confidence {self.confidence:g} "
            f"{verdict} of {self.claimed:.4g}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "contradicts": self.contradicts}


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """How one run was guessed: of `canaries`, each in with probability 1/2 by itself, `made` guesses, `right` of them.

    `made` is fixed before any score is seen; the rest are abstentions. Raises `DataError` unless
    0 <= right <= made <= canaries and 1 <= made.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        whole = _is_count(self.canaries) and _is_count(self.made) and _is_count(self.right)
        if not (whole and self.right <= self.made <= self.canaries and self.made >= 1):
            raise DataError(
                "an audit needs whole numbers with 0 <= right <= guesses <= canaries and at least one guess, "
                f"got right {self.right!r}, guesses {self.made!r}, canaries {self.canaries!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How one test erred: `false_positives` of `negatives` canaries out, `false_negatives` of `positives` in.

    Raises `DataError` unless 0 <= errors <= their count and both counts are at least 1.
    """

    false_positives: int
    negatives: int
    false_negatives: int
    positives: int

    def __post_init__(self) -> None:
        for errors, count in ((self.false_positives, self.negatives), (self.false_negatives, self.positives)):
            if not (_is_count(errors) and _is_count(count) and errors <= count and count >= 1):
                raise DataError(
                    f"an audit needs whole numbers with 0 <= errors <= canaries and at least one canary on each side, "
                    f"got {errors!r} errors of {count!r}"
                )

    def upper(self, significance: float) -> tuple[float, float]:
        """Bound both rates from above: each is below its bound but for probability `significance` (Clopper-Pearson)."""
        return (
            float(_clopper_pearson(self.false_positives, self.negatives, significance)),
            float(_clopper_pearson(self.false_negatives, self.positives, significance)),
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """Mechanisms in order of what they leak: a larger parameter >= 0 has a lower trade-off curve.

    `curve(parameter)` is the trade-off curve: of a float in [0, 1], convex, not increasing, its own inverse (the same
    for adding and for removing), 1 - x at parameter 0. `epsilon(parameter, delta)` does not fall with the parameter.
    """

    name: str
    curve: Callable[[float], TradeOff]
    epsilon: Callable[[float, float], float]


def gaussian_curve(mu: float) -> TradeOff:
    """The trade-off curve of a Gaussian mechanism of sensitivity `mu` standard deviations: Phi(Phi^-1(1 - x) - mu)."""

    def curve(rate: float) -> float:
        if not 0 < rate < 1:
            return float(rate <= 0)
        # erfc keeps its digits in the far tail, where NormalDist.cdf has none left.
        return 0.5 * math.erfc((mu + _STANDARD.inv_cdf(rate)) * math.sqrt(0.5))

    return curve


GAUSSIAN = Family(name="gaussian", curve=gaussian_curve, epsilon=gaussian_epsilon)


def approximate_dp(delta: float) -> Family:
    """Every mechanism there is, by its least epsilon at `delta`: bounds by it hold at this delta alone.

    The curve of (epsilon, delta)-DP is max(0, 1 - delta - e^epsilon x, e^-epsilon (1 - delta - x)).
    """
    check(delta=delta)

    def curve(epsilon: float) -> TradeOff:
        steep, flat = math.exp(min(epsilon, 700.0)), math.exp(-epsilon)
        return lambda rate: max(0.0, 1 - delta - steep * rate, flat * (1 - delta - rate))

    def epsilon_at(epsilon: float, other: float) -> float:
        if other != delta:
            raise UnsupportedEvent(f"a bound at delta {delta:g} says nothing at delta {other:g}: ask for the same one")
        return epsilon

    return Family(name="any mechanism", curve=curve, epsilon=epsilon_at)


def guess(scores: ArrayLike, included: ArrayLike, *, as_in: int, as_out: int) -> Guesses:
    """Guess that the `as_in` highest `scores` were in and the `as_out` lowest were not, and count what was right.

    `scores` are (m,) float, higher where a canary looks included; `included` is (m,) bool. Among equal scores the
    wrong guess is taken first: no order of the canaries can leak into the count. Raises `DataError` for shapes that
    differ, scores that are not finite, and more guesses than canaries or none.
    """
    values, inside = real_scores(scores, "scores"), np.asarray(included)
    if inside.dtype != np.bool_ or inside.shape != values.shape:
        raise DataError(f"included must be {values.size} times true or false, got {inside.dtype} of {inside.shape}")
    if not (_is_count(as_in) and _is_count(as_out) and 1 <= as_in + as_out <= values.size):
        raise DataError(f"between 1 and {values.size} guesses can be made, got {as_in!r} as in and {as_out!r} as out")
    highest, lowest = np.lexsort((inside, -values))[:as_in], np.lexsort((~inside, values))[:as_out]
    right = int(inside[highest].sum()) + int((~inside[lowest]).sum())
    return Guesses(canaries=values.size, made=as_in + as_out, right=right)


def rates_at(inside: ArrayLike, outside: ArrayLike, thresholds: Sequence[float]) -> tuple[Rates, ...]:
    """Count the errors of "in where score >= threshold" at each of `thresholds`, which were fixed before the scores.

    `inside` (n,) and `outside` (k,) are scores of canaries that were in and that were not. Raises `DataError` for
    empty or not finite ones.
    """
    ins, outs = real_scores(inside, "scores inside"), real_scores(outside, "scores outside")
    at = real_scores(thresholds, "thresholds")
    false_negatives, false_positives = _errors(ins, outs, at)
    return tuple(
        Rates(false_positives=int(fp), negatives=outs.size, false_negatives=int(fn), positives=ins.size)
        for fp, fn in zip(false_positives, false_negatives, strict=True)
    )


def rates_on_second_half(inside: ArrayLike, outside: ArrayLike, *, confidence: float) -> Rates:
    """Choose the threshold on every other score, the first included; count its errors on the rest.

    The half that chose is not counted, so the rates of the other are those of a threshold fixed in advance. The scores
    come as the canaries do, in an order that owes nothing to them. Raises `DataError` for fewer than two scores a side,
    ones that are not finite, and more than ten in strict order: sorted halves are not independent.
    """
    check(confidence=confidence)
    ins, outs = real_scores(inside, "scores inside", least=2), real_scores(outside, "scores outside", least=2)
    for values in (ins, outs):
        steps = np.sign(np.diff(values))
        if values.size > _MANY and steps[0] != 0 and np.all(steps == steps[0]):
            raise DataError("the scores are sorted: give them in the order of the canaries, or the halves are no proof")
    candidates = np.unique(np.concatenate([ins[::2], outs[::2]]))
    false_negatives, false_positives = _errors(ins[::2], outs[::2], candidates)
    each = (1 - confidence) / 2
    apart = -ndtri(_clopper_pearson(false_positives, outs[::2].size, each))
    apart -= ndtri(_clopper_pearson(false_negatives, ins[::2].size, each))
    return rates_at(ins[1::2], outs[1::2], [float(candidates[np.argmax(apart)])])[0]


def one_run_p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """Bound how likely as many right guesses are when the mechanism is (epsilon, delta)-DP.

    Guarantee: with the included canaries drawn by fair coins and guesses from the output alone,
    P[at least `right` of `made`] <= the result, in [0, 1]. It does not fall with epsilon. delta may be 0. For m of 10^6
    and delta of 10^-12 it keeps ten digits: mistakes are counted, whose chance 1 / (1 + e^epsilon) has no 1 in front.
    """
    check(delta=delta, epsilon=epsilon, least_delta=0.0)
    made, right = guesses.made, guesses.right
    mistakes, chance = made - right, float(expit(-epsilon))

    def at_most(count: int) -> float:
        return float(betaincc(count + 1, made - count, chance)) if count < made else 1.0

    tail = at_most(mistakes)
    if delta == 0:
        return min(1.0, tail)

    def average(i: int) -> float:
        return (at_most(mistakes + i) - tail) / i

    # The theorem asks for the largest average of the next i probabilities. A binomial's rise to its mode, then fall:
    # so the averages rise while the next probability exceeds them, and fall from there on.
    low, high = 1, right
    while low < high:
        middle = (low + high) // 2
        if at_most(mistakes + middle + 1) - at_most(mistakes + middle) > average(middle):
            low = middle + 1
        else:
            high = middle
    return min(1.0, tail + 2 * guesses.canaries * delta * average(low))


def one_run_lower_bound(*looks: Guesses, delta: float, claimed: float, confidence: float = 0.95) -> LowerBound:
    """Bound epsilon from below by guesses at one run (Steinke, Nasr, Jagielski 2023), whatever the mechanism is.

    Guarantee: for canaries that fair coins included, independently, and guesses from the run's output alone, the bound
    exceeds the least epsilon at which the mechanism is (epsilon, delta)-DP with probability at most 1 - confidence.
    Several `looks`, ways to guess that were fixed in advance, share 1 - confidence equally. No bound from m canaries
    passes log(m / -log(1 - confidence)), 5.8 for 1000 at 95 %. Takes milliseconds, for any m.
    """
    significance = _share(looks, delta, claimed, confidence)
    epsilon = _greatest(
        lambda eps: any(one_run_p_value(look, epsilon=eps, delta=delta) <= significance for look in looks)
    )
    return LowerBound(method="one run", epsilon=epsilon, delta=delta, confidence=confidence, claimed=claimed)


def f_dp_lower_bound(
    *looks: Guesses, delta: float, claimed: float, confidence: float = 0.95, family: Family = GAUSSIAN
) -> LowerBound:
    """Bound epsilon from below by guesses at one run, for a mechanism of `family` (Mahloujifar et al. 2024).

    Guarantee: under the terms of `one_run_lower_bound`, and if the mechanism's trade-off curve is nowhere below that of
    a member of `family`, the bound exceeds the member's epsilon at delta with probability at most 1 - confidence. Of a
    mechanism outside the family it says nothing; a claim that is a curve of its own is put to `refuted`. It gains
    little from more guesses that are no surer: few and sure ones find most. Tens of milliseconds for 10^5 guesses.
    """
    significance = _share(looks, delta, claimed, confidence)
    parameter = _greatest(lambda p: any(_found_too_much(family.curve(p), look, significance) for look in looks))
    epsilon = family.epsilon(parameter, delta) if parameter else 0.0
    method = f"one run, {family.name}"
    return LowerBound(method=method, epsilon=epsilon, delta=delta, confidence=confidence, claimed=claimed)


def two_sided_lower_bound(
    *looks: Rates, delta: float, claimed: float, confidence: float = 0.95, family: Family = GAUSSIAN
) -> LowerBound:
    """Bound epsilon from below by both error rates of a test, for a mechanism of `family` (Nasr et al. 2023).

    Guarantee: if the canaries' scores are independent, alike on each side, and every canary's trade-off curve is
    nowhere below that of a member of `family`, the bound exceeds the member's epsilon at delta with probability at most
    1 - confidence: both Clopper-Pearson bounds of all `looks` hold together. Looks are thresholds fixed in advance
    (`rates_at`), or the one that another half chose (`rates_on_second_half`). For the Gaussian family this is the
    epsilon of mu = Phi^-1(1 - FPR) - Phi^-1(FNR) at the bounds of the rates.
    """
    significance = _share(looks, delta, claimed, confidence) / 2
    rates = [look.upper(significance) for look in looks]
    parameter = _greatest(lambda p: any(family.curve(p)(fpr) > fnr for fpr, fnr in rates))
    epsilon = family.epsilon(parameter, delta) if parameter else 0.0
    method = f"two-sided, {family.name}"
    return LowerBound(method=method, epsilon=epsilon, delta=delta, confidence=confidence, claimed=claimed)


def refuted(curve: TradeOff, *looks: Guesses, confidence: float = 0.95) -> bool:
    """Say whether guesses at one run refute that the mechanism's trade-off curve is nowhere below `curve`.

    Guarantee: for a mechanism of which that is true, and under the terms of `one_run_lower_bound`, the answer is True
    with probability at most 1 - confidence. `curve` is as a `Family`'s; no epsilon and no family are needed.
    """
    significance = _share(looks, 0.5, 0.0, confidence)
    return any(_found_too_much(curve, look, significance) for look in looks)


def _found_too_much(curve: TradeOff, look: Guesses, significance: float) -> bool:
    """Mahloujifar et al. 2024: suppose that `right` guesses are likelier than `significance`, and go down.

    `hit` and `missed` bound from below the chances, per canary, of a right and a wrong guess where `i` were right or
    more; both only grow. Together above those of all guesses, they refute the curve. To stop early errs downward.
    """
    made, right = look.made, look.right
    limit = made / look.canaries
    hit, missed = significance * right / look.canaries, significance * (made - right) / look.canaries
    for i in range(right - 1, -1, -1):
        grown = curve(1 - hit)
        step = i / (made - i) * (grown - missed)
        if grown - missed + step <= _STALLED * hit:
            return False
        hit, missed = hit + step, grown
        if hit + missed > limit:
            return True
    return False


def _greatest(is_refuted: Callable[[float], bool]) -> float:
    """The largest parameter that is refuted, erring downward; 0 where none is."""
    low, high = 0.0, 1.0
    while is_refuted(high):
        low, high = high, 2 * high
        if high > MOST:
            raise UnsupportedEvent("the family's curves do not fall as its parameter grows: no bound can be found")
    while high - low > _PRECISION * high and high > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def _share(looks: Sequence[object], delta: float, claimed: float, confidence: float) -> float:
    """What each of `looks` may fail with, so that all hold together with `confidence`."""
    check(delta=delta, epsilon=claimed, confidence=confidence, least_delta=0.0)
    if not looks:
        raise DataError("an audit needs at least one set of guesses or rates, got none")
    return (1 - confidence) / len(looks)


def _errors(
    ins: NDArray[np.float64], outs: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """False negatives and false positives of "in where score >= threshold", at each threshold."""
    below, outs_below = (np.searchsorted(np.sort(side), thresholds, side="left") for side in (ins, outs))
    return below, outs.size - outs_below


def _clopper_pearson(errors: ArrayLike, count: int, significance: float) -> NDArray[np.float64]:
    """Above the true rate but for probability `significance`; 1 where all were errors."""
    wrong = np.asarray(errors, np.float64)
    upper = betainccinv(wrong + 1, np.maximum(count - wrong, 0.5), significance)
    return np.where(wrong < count, upper, 1.0)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

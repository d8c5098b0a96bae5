"""Accountants: from events to epsilon, by methods that bound and never guess.

| method  | what it is                                                | when it speaks               |
|---------|-----------------------------------------------------------|------------------------------|
| `pld`   | privacy loss distributions, pessimistic grid of <= 1e-4   | the figure reported; below   |
|         |                                                           | delta 1e-9 exact or `rdp`    |
| `rdp`   | Rényi DP, integer and fractional orders: the cross-check  | always                       |
| `exact` | the analytic Gaussian curve                               | when nothing was sampled     |

PLD: Doroshenko et al. 2022 (arXiv:2207.04380), connect-the-dots, as in dp-accounting. RDP of the sampled
Gaussian: Mironov, Talwar, Zhang 2019 (arXiv:1908.10530). Exact: Balle and Wang 2018 (arXiv:1805.06530), Thm. 8.
The central-limit (GDP) approximation is not here: it falls below proven lower bounds.

All epsilons are for add/remove-one of a record.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr

from privacy.errors import UnsupportedEvent
from privacy.events import LEAST_NOISE, GaussianEvent

# Discretisation intervals of the privacy loss; the result is an upper bound whatever they are. The first serves unless
# it is so coarse, for very many releases of very little each, that the Rényi bound is below the result.
GRIDS = (1e-4, 2.5e-5, 6.25e-6)
COARSE = (1e-3,)  # For searching alone.
LEAST_PLD_DELTA = 0.95e-9  # Below 1e-9 by more than discretisation takes from a delta of 1e-9.
INTEGER_ORDERS = (*range(2, 65), 128, 256, 512)
# dp-accounting logs each fractional order it leaves out; fewer orders only loosen an upper bound.
logging.getLogger("absl").setLevel(logging.ERROR)

Phase = tuple[float, float]  # (noise_multiplier, sampling_rate): what one release costs.
Plan = tuple[tuple[Phase, int], ...]  # Phases with how often each was released, sorted.


@dataclass(frozen=True)
class Epsilon:
    """One set of events at one delta, by every method that can speak; `exact` is None when sampling was used."""

    delta: float
    pld: float
    rdp: float
    exact: float | None

    def as_dict(self) -> dict[str, float | None]:
        return {"delta": self.delta, "pld": self.pld, "rdp": self.rdp, "exact": self.exact}


def epsilon(events: Iterable[GaussianEvent], delta: float) -> Epsilon:
    """Compose `events` and bound epsilon at `delta` by each method.

    Guarantee: everything the events describe, taken together and chosen in advance, is (epsilon, delta)-DP for
    the events' unit under add/remove-one, for each of the figures. No events cost 0. The discretisation of the
    noise is paid out of delta, not neglected: an (eps, d)-DP Gaussian whose law is moved by `tv` in total
    variation is (eps, d + (1 + e^eps) tv)-DP.

    Raises `UnsupportedEvent` for a delta outside (0, 1) or one too small to pay for the discretisation.
    """
    _check_delta(delta)
    released = list(events)
    if not released:
        return Epsilon(delta, 0.0, 0.0, 0.0)
    plan, tv = _plan(released), _tv(released)
    return Epsilon(
        delta,
        pld=_after_discretisation(_pld_epsilon, plan, delta, tv),
        rdp=_after_discretisation(_rdp_epsilon, plan, delta, tv),
        exact=_after_discretisation(_exact_epsilon, plan, delta, tv) if _unsampled(plan) else None,
    )


def epsilon_pld(events: Sequence[GaussianEvent], delta: float) -> float:
    """The reported figure alone: `epsilon(events, delta).pld`, without the cost of the others."""
    _check_delta(delta)
    return _after_discretisation(_pld_epsilon, _plan(events), delta, _tv(events)) if events else 0.0


@lru_cache(maxsize=256)
def noise_multiplier_for(*, target_epsilon: float, delta: float, sampling_rate: float, count: int) -> float:
    """The least noise multiplier, to 0.1 %, whose `count` releases at `sampling_rate` cost at most `target_epsilon`.

    The result is on the safe side: its PLD epsilon is at most `target_epsilon`. Raises `UnsupportedEvent` when
    even a noise multiplier of 2^14 is too little.
    """
    _check_delta(delta)
    # Refuses a rate or a count that no event can have.
    GaussianEvent(noise_multiplier=1.0, clip_norm=1.0, sampling_rate=sampling_rate, count=count, rng="os")
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise UnsupportedEvent(f"epsilon must be a finite number > 0, got {target_epsilon!r}")

    def pld(noise: float, grids: tuple[float, ...] = GRIDS) -> float:
        return _pld_epsilon((((noise, sampling_rate), count),), delta, grids)

    def rdp(noise: float) -> float:
        return _rdp_epsilon((((noise, sampling_rate), count),), delta, INTEGER_ORDERS)

    # The Rényi bound at integer orders costs a millisecond per trial and brackets the answer from above; a coarse grid
    # comes close to it in a tenth of a second per trial; the grid that counts then needs two or three.
    high = _bracket(rdp, target_epsilon)
    if pld(high) > target_epsilon:
        raise UnsupportedEvent(f"no noise multiplier up to {high:g} reaches epsilon {target_epsilon:g} here")
    near = _least(lambda noise: pld(noise, COARSE), target_epsilon, start=high, safe=high)
    return _least(pld, target_epsilon, start=near, safe=high)


def _least(cost_of: Callable[[float], float], target: float, *, start: float, safe: float) -> float:
    """The least noise, to 0.1 %, that costs at most `target`, by secant steps along log cost / log noise.

    `safe` is known to be enough. The result is `safe` or was tried.
    """
    low, slope, noise = 0.0, -1.5, start
    last: tuple[float, float] | None = None
    for _ in range(30):
        cost = max(cost_of(noise), 1e-12)
        if last is not None and noise != last[0]:
            slope = min(-0.5, math.log(cost / last[1]) / math.log(noise / last[0]))
        last = (noise, cost)
        if cost <= target:
            safe = noise
            if (target / cost) ** (-1 / slope) < 1.001:
                break
        else:
            low = noise
        if safe <= low * 1.001 or safe <= LEAST_NOISE:
            break
        step = max(noise / 2, noise * (target / cost) ** (1 / slope) * 1.0003)
        noise = max(LEAST_NOISE, step if low < step < safe else math.sqrt(max(low, safe / 2) * safe))
    return safe


def largest_count(
    event: GaussianEvent, *, target_epsilon: float, delta: float, at_most: int, before: Sequence[GaussianEvent] = ()
) -> int:
    """How many repetitions of `event` (0 to `at_most`) fit into `target_epsilon` after `before`, by PLD."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if epsilon_pld([*before, *[event] * middle], delta) <= target_epsilon:
            low = middle
        else:
            high = middle - 1
    return low


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UnsupportedEvent(f"delta must lie between 0 and 1, got {delta!r}")


def _plan(events: Iterable[GaussianEvent]) -> Plan:
    phases: Counter[Phase] = Counter()
    for event in events:
        phases[(float(event.noise_multiplier), float(event.sampling_rate))] += event.count
    return tuple(sorted(phases.items()))


def _tv(events: Iterable[GaussianEvent]) -> float:
    return math.fsum(event.discretisation_tv for event in events)


def _unsampled(plan: Plan) -> bool:
    return all(rate == 1.0 for (_, rate), _ in plan)


def _after_discretisation(method: Callable[[Plan, float], float], plan: Plan, delta: float, tv: float) -> float:
    if tv == 0:
        return float(method(plan, delta))
    # Any valid epsilon at delta / 2 bounds the answer from above, so e^eps can be bounded before it is known.
    ceiling = _rdp_epsilon(plan, delta / 2)
    paid = (1 + math.exp(min(ceiling, 700.0))) * tv
    if paid > delta / 2:
        raise UnsupportedEvent(f"so little noise that epsilon is beyond {ceiling:.0f}: delta {delta:g} bounds nothing")
    return float(min(method(plan, delta - paid), ceiling))


@lru_cache(maxsize=256)
def _pld(phase: Phase, grid: float) -> Any:
    # Imported late: the library takes a second to load, and a ledger can be verified without it.
    from dp_accounting.pld import privacy_loss_distribution

    noise, rate = phase
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=grid
    )


@lru_cache(maxsize=4096)
def _pld_epsilon(plan: Plan, delta: float, grids: tuple[float, ...] = GRIDS) -> float:
    # Far below this delta the rounding errors of the transforms weigh more than the tail that they are to resolve.
    exact = _exact_epsilon(plan, delta) if _unsampled(plan) else 0.0
    if delta < LEAST_PLD_DELTA:
        return exact or _rdp_epsilon(plan, delta)
    bound, result = _rdp_epsilon(plan, delta, INTEGER_ORDERS), math.inf
    for grid in grids:
        composed: Any = None
        for phase, count in plan:
            part = _pld(phase, grid).self_compose(count) if count > 1 else _pld(phase, grid)
            composed = part if composed is None else composed.compose(part)
        result = float(composed.get_epsilon_for_delta(delta))
        if result <= bound or math.isinf(result):  # Infinite where delta is below what float64 resolves.
            break
    return max(result, exact)


@lru_cache(maxsize=4096)
def _rdp_of(phase: Phase, orders: tuple[float, ...]) -> tuple[Any, Any]:
    import dp_accounting
    from dp_accounting.rdp import rdp_privacy_accountant

    noise, rate = phase
    accountant = rdp_privacy_accountant.RdpAccountant(orders=orders)
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(gaussian if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, gaussian))
    return np.asarray(accountant._orders), np.asarray(accountant._rdp)


@lru_cache(maxsize=4096)
def _rdp_epsilon(plan: Plan, delta: float, orders: tuple[float, ...] | None = None) -> float:
    """None: the library's own grid of integer and fractional orders, finer and slower, and ours, which has order 64."""
    from dp_accounting.rdp import rdp_privacy_accountant

    if orders is None:
        ours = _rdp_epsilon(plan, delta, INTEGER_ORDERS)
        return min(ours, _rdp_epsilon(plan, delta, tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)))
    grid = _rdp_of(plan[0][0], orders)[0]
    total = sum(count * _rdp_of(phase, orders)[1] for phase, count in plan)
    return float(rdp_privacy_accountant.compute_epsilon(grid, total, delta)[0])


def _exact_epsilon(plan: Plan, delta: float) -> float:
    """Gaussians compose to one Gaussian with mu^2 the sum of 1/z^2; solve its delta(epsilon) curve for epsilon."""
    mu = math.sqrt(sum(count / noise**2 for (noise, _), count in plan))

    def excess(eps: float) -> float:
        # delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu), both terms in logarithms.
        first = log_ndtr(mu / 2 - eps / mu)
        second = eps + log_ndtr(-mu / 2 - eps / mu)
        return float(np.exp(first) * -np.expm1(min(second - first, 0.0)) - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-12))


def _bracket(cost: Callable[[float], float], target: float) -> float:
    """The least noise multiplier, to 1 %, that costs at most `target` where `cost` falls with the noise."""
    high = 1.0
    while cost(high) > target and high < 2**14:
        high *= 2
    low = LEAST_NOISE
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if cost(middle) <= target:
            high = middle
        else:
            low = middle
    return high

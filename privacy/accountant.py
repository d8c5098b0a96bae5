"""Accountants: from events to epsilon, by methods that bound and never guess.

| method   | what it is                                                     | when it speaks                        |
|----------|----------------------------------------------------------------|---------------------------------------|
| `pld`    | privacy loss distributions (`privacy.pld`): the figure reported | always; where nothing was sampled it  |
|          |                                                                | is `exact`, where it gives up and     |
|          |                                                                | where noise was distributed `rdp`     |
| `rdp`    | Rényi DP, integer and fractional orders: the cross-check       | always; whole orders alone where      |
|          |                                                                | noise was distributed                 |
| `exact`  | the analytic Gaussian curve                                    | when nothing was sampled and no noise |
|          |                                                                | distributed                           |
| `bounds` | a proven interval that holds the true epsilon (`privacy.prv`)  | unless it would be absurdly wide, or  |
|          |                                                                | noise was distributed                 |

`pld`, `rdp` and `bounds` come from three implementations that share no code; the second is dp-accounting's. Sources:
Mironov, Talwar, Zhang 2019 (arXiv:1908.10530), the RDP of the sampled Gaussian; Balle and Wang 2018 (arXiv:1805.06530),
Thm. 8, the exact curve; Zhu, Dong, Wang 2022 (arXiv:2106.08567), samples of fixed size. The central-limit (GDP)
approximation is not here: it falls below proven lower bounds.

An epsilon is for one unit under the adjacency that its events name. Replace-one doubles what a unit can move, so the
noise counts for half. Secure sums under distributed noise (`privacy.distributed`) are priced under zero-out, and so is
every list with one in it: no Gaussian sum can tell a client that contributes zero to it from one that is absent, so
what bounds removing it bounds zeroing it, and so does what bounds replacing it by anything.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr

from privacy.correlated import Banded, BufferedToeplitz, Participation, rounded_sensitivity
from privacy.distributed import ORDERS, DistributedNoise, discrete_gaussian_rdp
from privacy.errors import UnsupportedEvent
from privacy.events import LEAST_NOISE, REPLACE_ONE, CorrelatedEvent, DistributedEvent, Event, GaussianEvent
from privacy.pld import GRID, Phase, Plan, pld_epsilon
from privacy.prv import Bounds, epsilon_bounds

LEAST_DELTA = 1e-300
COARSE = 1e-3  # A grid for searching alone; the result is an upper bound on any.
WHOLE_ORDERS = (*range(2, 65), 128, 256, 512)
AnyPhase = Phase | DistributedNoise
AnyPlan = tuple[tuple[AnyPhase, int], ...]  # As `Plan`, with secure sums under distributed noise after the Gaussians.
# dp-accounting logs each fractional order it leaves out; fewer orders only loosen an upper bound.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Epsilon:
    """One set of events at one delta, by every method that can speak; `exact` is None where that curve says nothing."""

    delta: float
    pld: float
    rdp: float
    exact: float | None

    def as_dict(self) -> dict[str, float | None]:
        return {"delta": self.delta, "pld": self.pld, "rdp": self.rdp, "exact": self.exact}


def epsilon(events: Iterable[Event], delta: float) -> Epsilon:
    """Compose `events` and bound epsilon at `delta` by each method.

    Guarantee: everything the events describe, taken together and chosen in advance, is (epsilon, delta)-DP for
    the events' unit, for each of the figures. No events cost 0. The discretisation of the
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


def epsilon_pld(events: Sequence[Event], delta: float) -> float:
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

    def pld(noise: float, grid: float = GRID) -> float:
        return _pld_epsilon((((noise, sampling_rate), count),), delta, grid)

    def coarsely(noise: float) -> float:
        return pld(noise, COARSE)

    high = 1.0
    while coarsely(high) > target_epsilon:
        high *= 4
        if high > 2**14:
            raise UnsupportedEvent(f"no noise multiplier up to {high / 4:g} reaches epsilon {target_epsilon:g} here")
    near = _least(coarsely, target_epsilon, start=high, safe=high)
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


def bounds(events: Iterable[Event], delta: float) -> Bounds | None:
    """Bracket the true epsilon of `events` at `delta`: lower <= epsilon <= upper, proven; None where nothing is known.

    Nothing is known so far where noise was distributed: no lower bound is proven for it here. Where nothing was sampled
    the exact curve is all three. The discretisation of the noise, as in `epsilon`, is taken off delta for the upper end
    alone.
    """
    _check_delta(delta)
    released = list(events)
    if not released:
        return Bounds(0.0, 0.0, 0.0)
    plan, tv = _plan(released), _tv(released)
    if not _gaussian(plan):
        return None
    paid = delta - _price(plan, delta, tv)
    if _unsampled(plan):
        lower, upper = _exact_epsilon(plan, delta), _exact_epsilon(plan, paid)
        return Bounds(lower, lower, upper)
    try:
        within = _bounds(plan, paid)
        return Bounds(_bounds(plan, delta).lower, within.estimate, within.upper)
    except UnsupportedEvent:
        return None


def rdp_at(events: Iterable[Event], order: int) -> float:
    """Rényi DP of a whole `order` >= 2 of all `events` together: what a privacy filter adds up.

    Guarantee: it may be added up even where later events were chosen after earlier releases were seen, and stopped
    before a bound fixed in advance is exceeded (Feldman and Zrnic 2021, arXiv:2008.11193, Thm. 4.3).
    """
    return math.fsum(count * float(_whole_order_rdp(phase, (order,))[0]) for phase, count in _plan(events))


def rdp_to_epsilon(order: float, rdp: float, delta: float) -> float:
    """The epsilon at `delta` of whatever has Rényi DP `rdp` at `order` (Canonne, Kamath, Steinke 2020, Prop. 12)."""
    _check_delta(delta)
    if not (order > 1 and rdp >= 0):
        raise UnsupportedEvent(f"order must be > 1 and rdp >= 0, got {order!r} and {rdp!r}")
    return max(0.0, rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def _check_delta(delta: float) -> None:
    if not LEAST_DELTA <= delta < 1:
        raise UnsupportedEvent(f"delta must lie between 0 and 1, and not below 1e-300, got {delta!r}")


def _plan(events: Iterable[Event]) -> AnyPlan:
    phases: Counter[AnyPhase] = Counter()
    votes = False
    for event in events:
        phases[_phase(event)] += event.count
        votes |= isinstance(event, GaussianEvent) and event.quantile_noise is not None
    if votes and not _gaussian(tuple(phases.items())):
        # A client whose update is zero still votes that it was below the clip: more than one that is not there moves.
        raise UnsupportedEvent("an adaptive clip beside noise in shares: no adjacency here covers both")
    return tuple(sorted(phases.items(), key=_place))


def _place(charged: tuple[AnyPhase, int]) -> tuple[int, tuple[Any, ...]]:
    phase, _ = charged
    return (1, astuple(phase)) if isinstance(phase, DistributedNoise) else (0, phase)


@lru_cache(maxsize=4096)
def _phase(event: Event) -> AnyPhase:
    """What one release costs: a Gaussian as its equivalent under add/remove-one."""
    if isinstance(event, DistributedEvent):
        return event.noise()
    if isinstance(event, CorrelatedEvent):
        plan = Participation(rounds=event.rounds, participations=event.participations, separation=event.separation)
        strategy = Banded(event.coefficients) if event.coefficients else BufferedToeplitz(event.weights, event.decays)
        return event.noise_multiplier / rounded_sensitivity(strategy, plan, dimension=event.dimension), 1.0
    # A sample of fixed size under replace-one is dominated by the Poisson pair of the same rate at twice the shift, and
    # attains it (Zhu, Dong, Wang 2022, and the pair where all others are at -clip and one moves from there to +clip).
    noise = event.noise_multiplier / 2 if event.adjacency == REPLACE_ONE else event.noise_multiplier
    return float(noise), float(event.sampling_rate)


def _tv(events: Iterable[Event]) -> float:
    return math.fsum(event.discretisation_tv for event in events)


def _gaussian(plan: AnyPlan) -> TypeGuard[Plan]:
    return not any(isinstance(phase, DistributedNoise) for phase, _ in plan)


def _unsampled(plan: AnyPlan) -> TypeGuard[Plan]:
    return _gaussian(plan) and all(rate == 1.0 for (_, rate), _ in plan)


def _after_discretisation(method: Callable[[Any, float], float], plan: AnyPlan, delta: float, tv: float) -> float:
    if tv == 0:
        return float(method(plan, delta))
    return float(min(method(plan, delta - _price(plan, delta, tv)), _ceiling(plan, delta / 2)))


def _price(plan: AnyPlan, delta: float, tv: float) -> float:
    """What the discretisation of the noise takes off delta."""
    # Any valid epsilon at delta / 2 bounds the answer from above, so e^eps can be bounded before it is known.
    ceiling = _ceiling(plan, delta / 2) if tv else 0.0
    paid = (1 + math.exp(min(ceiling, 700.0))) * tv
    if paid > delta / 2:
        raise UnsupportedEvent(f"so little noise that epsilon is beyond {ceiling:.0f}: delta {delta:g} bounds nothing")
    return paid


@lru_cache(maxsize=4096)
def _pld_epsilon(plan: AnyPlan, delta: float, grid: float = GRID) -> float:
    if not _gaussian(plan):  # No privacy loss distribution is known here for a sum of such shares.
        return _rdp_epsilon(plan, delta)
    if _unsampled(plan):
        return _exact_epsilon(plan, delta)
    # Both are upper bounds; very many tiny releases force the grid to be so coarse that Rényi's is the lower.
    return min(pld_epsilon(plan, delta, grid=grid), _ceiling(plan, delta))


@lru_cache(maxsize=256)
def _bounds(plan: Plan, delta: float) -> Bounds:
    return epsilon_bounds(plan, delta)


@lru_cache(maxsize=4096)
def _whole_order_rdp(phase: AnyPhase, orders: tuple[int, ...]) -> NDArray[np.float64]:
    if isinstance(phase, DistributedNoise):
        return phase.rdp(orders)
    noise, rate = phase
    return discrete_gaussian_rdp(orders, noise_multiplier=noise, sampling_rate=rate)


def _whole_order_sum(plan: AnyPlan, orders: tuple[int, ...]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum([count * _whole_order_rdp(phase, orders) for phase, count in plan], axis=0)
    return total


def _ceiling(plan: AnyPlan, delta: float) -> float:
    """A rough bound in no time: Rényi DP at whole orders alone."""
    total = _whole_order_sum(plan, WHOLE_ORDERS)
    return min(rdp_to_epsilon(order, float(rdp), delta) for order, rdp in zip(WHOLE_ORDERS, total, strict=True))


@lru_cache(maxsize=4096)
def _fractional_rdp(phase: Phase) -> tuple[Any, Any]:
    # Imported late: the library takes a second to load, and a ledger can be verified without it.
    import dp_accounting
    from dp_accounting.rdp import rdp_privacy_accountant

    noise, rate = phase
    accountant = rdp_privacy_accountant.RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(gaussian if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, gaussian))
    return np.asarray(accountant._orders), np.asarray(accountant._rdp)


@lru_cache(maxsize=4096)
def _rdp_epsilon(plan: AnyPlan, delta: float) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant

    if not _gaussian(plan):  # The theorems on shares of noise hold at whole orders.
        return float(rdp_privacy_accountant.compute_epsilon(ORDERS, _whole_order_sum(plan, ORDERS), delta)[0])
    orders = _fractional_rdp(plan[0][0])[0]
    total = sum(count * _fractional_rdp(phase)[1] for phase, count in plan)
    # The library's grid ends at order 63 before it leaps to 128; ours has what is between.
    return min(_ceiling(plan, delta), float(rdp_privacy_accountant.compute_epsilon(orders, total, delta)[0]))


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

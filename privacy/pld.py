"""Privacy loss distributions on a grid, composed by one Fourier transform under an exponential tilt.

A release is put on the grid by connecting the dots (Doroshenko et al. 2022, arXiv:2207.04380): the mass between two
grid points is split onto both so that its probabilities under both neighbours are kept. The curve delta(e^epsilon)
then touches the true one at every grid point and lies above it between: the result is an upper bound whatever the
grid. Releases compose as losses add, so distributions convolve (Koskela et al. 2020, arXiv:1906.03049).

A plain transform leaves an error of 1e-16 of the *largest* mass everywhere, which drowns a delta of 1e-12. Here the
losses are first tilted by e^(t loss), with the t of the Chernoff bound, so that the mass which decides about delta is
the largest there is: every delta down to 1e-300 keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

Phase = tuple[float, float]
"""(noise_multiplier, sampling_rate): what one release costs under add/remove-one. 1.0 is no sampling."""
Plan = tuple[tuple[Phase, int], ...]
"""Phases with how often each was released, sorted."""
Vector = NDArray[np.float64]

GRID = 1e-4
DOTS = 20  # Grid points in the standard deviation of one release's loss: fewer would be dear where very many compose.
MOST_POINTS = 2**19  # In one release's distribution; beyond it the grid grows coarser, and the bound looser.
MOST_LOSS = 600.0  # Of one release: e^loss is a float still.
MOST_BINS = 2**23  # In the window of the composition.
LOG_TAIL = -50.0  # What is cut off one release has this log probability under either neighbour; it counts as lost.
WINDOW_TAIL = 1e-8  # Outside the window on either side, as a share of the mass that decides about delta.


@dataclass(frozen=True, eq=False)
class _Losses:
    """One direction of one release: masses at losses (first + k) * grid, and the mass at an infinite loss."""

    first: int
    masses: Vector
    lost: float

    def at(self, grid: float) -> Vector:
        return np.arange(self.first, self.first + len(self.masses), dtype=np.float64) * grid


def pld_epsilon(plan: Plan, delta: float, *, grid: float = GRID) -> float:
    """Bound epsilon at `delta` from above for the composition of `plan`, under add/remove-one.

    Infinite where so many releases compose that no window of 2^23 grid points holds their loss, and where one release's
    loss is beyond what e^loss can follow. The grid is `grid` or finer, as the narrowest release needs, and coarser only
    where one release alone would take 2^19 points, or nothing else helps.
    """
    step = min([grid, *(rate / (DOTS * noise) for (noise, rate), _ in plan)])
    # Cut off one release at -50, or further out for a tiny delta, in few steps so that distributions are shared.
    log_tail = LOG_TAIL * 2.0 ** max(0, math.ceil(math.log2((25 - math.log(delta)) / -LOG_TAIL)))
    widest = max(_widest_loss(noise, rate, log_tail) for (noise, rate), _ in plan)
    deepest = min(_loss_at(-noise * math.sqrt(-2 * log_tail), noise, rate) for (noise, rate), _ in plan)
    if widest > MOST_LOSS or deepest < -MOST_LOSS:
        return math.inf
    step = max(step, widest / MOST_POINTS)
    step = grid * 2.0 ** -math.ceil(math.log2(grid / step) - 1e-9)  # A power of two apart: distributions are shared.
    epsilon = math.inf
    for coarser in (1, 16, 256):
        parts = [(_discretised(phase, step * coarser, log_tail), count) for phase, count in plan]
        epsilon = max(_epsilon([(both[way], n) for both, n in parts], delta, step * coarser) for way in (0, 1))
        if math.isfinite(epsilon):
            break
    return epsilon


def _widest_loss(noise: float, rate: float, log_tail: float) -> float:
    reach = noise * math.sqrt(-2 * log_tail)
    return float(np.logaddexp(math.log1p(-rate) if rate < 1 else -math.inf, math.log(rate) + (reach + 0.5) / noise**2))


@lru_cache(maxsize=48)
def _discretised(phase: Phase, grid: float, log_tail: float) -> tuple[_Losses, _Losses]:
    """P against Q and Q against P, where P = (1 - rate) N(0, noise^2) + rate N(1, noise^2) and Q = N(0, noise^2).

    The loss log P/Q at x is log(1 - rate + rate e^((2x - 1) / (2 noise^2))), which grows with x.
    """
    noise, rate = phase
    reach = noise * math.sqrt(-2 * log_tail)
    highest = _widest_loss(noise, rate, log_tail)  # At x = 1 + reach.
    lowest = math.log1p(-rate) if rate < 1 else -math.inf
    if lowest < (at_reach := _loss_at(-reach, noise, rate)):
        lowest = max(lowest, at_reach)
    first, last = math.floor(lowest / grid), math.ceil(highest / grid)
    losses = np.arange(first, last + 1, dtype=np.float64) * grid
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.expm1(losses) / rate + 1
        x = np.where(inner > 0, noise**2 * np.log(np.maximum(inner, 0)) + 0.5, -np.inf)
    of_q, error_q = _between(x / noise)
    of_shifted, error_shifted = _between((x - 1) / noise)
    of_p = (1 - rate) * of_q + rate * of_shifted
    # Two masses at the ends of each interval with the interval's probabilities under P and under Q. Each direction is
    # worked out in its own masses, for the other's may underflow; what rounding may have cost goes to the dearer end.
    low, high = np.exp(losses[:-1]), np.exp(losses[1:])
    error_p = (1 - rate) * error_q + rate * error_shifted
    share = -math.expm1(-grid)
    dear_p = np.clip((of_p - low * of_q + error_p + low * error_q) / share, 0, of_p)
    dear_q = np.clip((of_q - of_p / high + error_q + error_p / high) / share, 0, of_q)
    under_p = np.append(of_p - dear_p, 0) + np.insert(dear_p, 0, 0)
    under_q = np.append(dear_q, 0) + np.insert(of_q - dear_q, 0, 0)
    q_below, q_above = float(ndtr(x[0] / noise)), float(ndtr(-x[-1] / noise))
    p_below = (1 - rate) * q_below + rate * float(ndtr((x[0] - 1) / noise))
    p_above = (1 - rate) * q_above + rate * float(ndtr((1 - x[-1]) / noise))
    # A loss below the grid is raised to its first point; one above it counts as infinite.
    under_p[0] += p_below
    under_q[-1] += q_above
    return _Losses(first, under_p, p_above), _Losses(-last, under_q[::-1].copy(), q_below)


def _loss_at(x: float, noise: float, rate: float) -> float:
    shifted = math.log(rate) + (2 * x - 1) / (2 * noise**2)
    return float(np.logaddexp(math.log1p(-rate), shifted)) if rate < 1 else shifted


def _between(edges: Vector) -> tuple[Vector, Vector]:
    """N(0, 1)'s mass between neighbouring edges, in the tail that keeps its digits, and by how much it may err."""
    left, right = edges[:-1], edges[1:]
    near, far = np.where(left > 0, ndtr(-left), ndtr(right)), np.where(left > 0, ndtr(-right), ndtr(left))
    # ndtr is good to a few units in the last place, and so are the edges, which move the tail by edge^2 as many.
    inner = np.where(left > 0, left, right)  # The edge of the larger tail, finite or its tail is 0 or 1.
    moved = 1 + np.square(np.where(np.isfinite(inner), inner, 0.0))
    return near - far, 4 * np.finfo(float).eps * near * moved


def _epsilon(parts: Sequence[tuple[_Losses, int]], delta: float, grid: float) -> float:
    lost = -math.expm1(math.fsum(count * math.log1p(-losses.lost) for losses, count in parts))
    if delta <= lost:
        return math.inf
    best = _best_tilt(_coarsened(parts, [losses.masses for losses, _ in parts], grid), math.log(delta), side=1)
    # Rare large losses (tiny rates) can make the best tilt's window too wide: any tilt is valid, and less is narrower.
    for tilt in (best, best / 4, best / 32, 0.0):
        epsilon = _tilted_epsilon(parts, math.log(delta - lost), grid, tilt)
        if math.isfinite(epsilon):
            return epsilon
    return math.inf


def _tilted_epsilon(parts: Sequence[tuple[_Losses, int]], log_delta: float, grid: float, tilt: float) -> float:
    logs, tilted = [], []
    for losses, _ in parts:
        weights = _log(losses.masses) + tilt * losses.at(grid)
        logs.append(_log_sum(weights))
        tilted.append(np.exp(weights - logs[-1]))
    # Everything is kept relative to the scale at the tilted mean, which is near that of delta.
    middle = math.fsum(c * float(t @ part.at(grid)) for (part, c), t in zip(parts, tilted, strict=True))
    log_left = log_delta + tilt * middle - math.fsum(c * log for (_, c), log in zip(parts, logs, strict=True))
    log_tail = min(log_left, 0.0) + math.log(WINDOW_TAIL)
    low, high = _window(parts, tilted, grid, log_tail)
    if log_left > 600 or high - low > MOST_BINS:
        return math.inf
    masses = _convolved(parts, tilted, low, high)
    points = np.arange(low, low + len(masses), dtype=np.float64) * grid
    # What wrapped round the window's upper end counts as lost; what wrapped round the lower one came to lie above.
    left = math.exp(log_left) - 2 * math.exp(log_tail + min(tilt * (middle - points[-1]), 0.0))
    first = int(np.searchsorted(points, middle - 600 / tilt)) if tilt else 0  # Below, delta is long exceeded.
    heavy = np.maximum(masses[first:], 0.0) * np.exp(tilt * (middle - points[first:]))
    return _solve(heavy, points[first:], left, grid)


def _solve(masses: Vector, losses: Vector, left: float, grid: float) -> float:
    """The epsilon with sum over losses above it of mass (1 - e^(epsilon - loss)) = `left`."""
    above = np.cumsum(masses[::-1])[::-1]
    discounted = _discounted(masses, grid)
    curve = np.append(above[1:] - math.exp(-grid) * discounted[1:], 0.0)
    enough = np.flatnonzero(curve <= left)
    if len(enough) == 0:
        return math.inf
    k = int(enough[0])
    # Between two points delta is linear in e^epsilon.
    excess = (above[k] - left) / discounted[k] if discounted[k] > 0 else 0.0
    return max(0.0, float(losses[k] + (math.log(min(excess, 1.0)) if k and excess > math.exp(-grid) else -grid)))


def _window(
    parts: Sequence[tuple[_Losses, int]], tilted: Sequence[Vector], grid: float, log_tail: float
) -> tuple[int, int]:
    """Grid points outside which less than e^log_tail of the tilted sum lies, on either side (by Chernoff's bound)."""
    coarse = _coarsened(parts, tilted, grid)
    ends = []
    for side in (-1, 1):
        tilt = _best_tilt(coarse, log_tail, side=side)
        total = math.fsum(
            count * _log_sum(_log(masses) + side * tilt * losses.at(grid))
            for (losses, count), masses in zip(parts, tilted, strict=True)
        )
        ends.append(side * (total - log_tail) / tilt)
    return math.floor(ends[0] / grid), math.ceil(ends[1] / grid)


def _discounted(masses: Vector, grid: float) -> Vector:
    """At each k the sum over j >= k of mass_j e^((k - j) grid), in blocks in which nothing overflows.

    scipy's lfilter does this recurrence too; importing it takes longer than most plans.
    """
    result, carried = np.empty_like(masses), 0.0
    size = max(1, int(500 / grid))
    for end in range(len(masses), 0, -size):
        start = max(0, end - size)
        decay = np.exp(-grid * np.arange(end - start))
        own = np.cumsum((masses[start:end] * decay)[::-1])[::-1] / decay
        result[start:end] = own + carried * decay[::-1] * math.exp(-grid)
        carried = float(result[start])
    return result


def _coarsened(
    parts: Sequence[tuple[_Losses, int]], masses: Sequence[Vector], grid: float
) -> list[tuple[Vector, Vector, int]]:
    """(log mass, mean loss, count) in bins that widen with their distance from the mean: to look for a tilt with."""
    bins = []
    for (losses, count), mass in zip(parts, masses, strict=True):
        points = losses.at(grid)
        centre = int(np.searchsorted(points, mass @ points / mass.sum()))
        steps = np.arange(2200)
        steps = np.unique(np.where(steps < 100, steps, 100 * 1.01 ** (steps - 100)).clip(max=2 * len(mass)).astype(int))
        edges = np.unique(np.concatenate([centre - steps, centre + steps]).clip(0, len(mass) - 1))
        weight, moment = np.add.reduceat(mass, edges), np.add.reduceat(mass * points, edges)
        kept = weight > 0
        bins.append((np.log(weight[kept]), moment[kept] / weight[kept], count))
    return bins


def _best_tilt(bins: Sequence[tuple[Vector, Vector, int]], log_tail: float, *, side: int) -> float:
    """The t > 0 with the least (log E e^(side t loss) - log_tail) / t, which is Chernoff's bound.

    On delta's own scale the tilted mean is then the bound itself, just above the epsilon that is sought.
    """

    def bound(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        total = math.fsum(count * _log_sum(masses + side * tilt * points) for masses, points, count in bins)
        return (total - log_tail) / tilt

    # The bound falls and then rises with t: E e^(t loss) is convex in t, and so are its perspectives.
    best = min(range(-16, 32), key=bound)
    found = minimize_scalar(bound, bounds=(best - 1, best + 1), method="bounded", options={"xatol": 1e-2})
    return math.exp(float(found.x))


def _convolved(parts: Sequence[tuple[_Losses, int]], tilted: Sequence[Vector], low: int, high: int) -> Vector:
    """Masses of the sum at grid points from `low` on; whatever lies outside the window is wrapped into it."""
    size = next_fast_len(high - low + 1, real=True)
    product: NDArray[np.complex128] | None = None
    for (_, count), masses in zip(parts, tilted, strict=True):
        folded = np.append(masses, np.zeros(-len(masses) % size)).reshape(-1, size).sum(axis=0)
        power = _power(rfft(folded), count)
        product = power if product is None else product * power
    assert product is not None
    wrapped = irfft(product, size)
    offset = sum(count * losses.first for losses, count in parts)
    return np.roll(wrapped, -((low - offset) % size))


def _power(base: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    result = None
    while exponent:
        if exponent & 1:
            result = base if result is None else result * base
        exponent >>= 1
        if exponent:
            base = base * base
    assert result is not None
    return result


def _log_sum(exponents: Vector) -> float:
    """log of the sum of e^exponents; scipy's logsumexp checks so much that it takes five times as long."""
    highest = float(exponents.max())
    return highest + math.log(float(np.exp(exponents - highest).sum()))


def _log(masses: Vector) -> Vector:
    with np.errstate(divide="ignore"):
        return np.log(masses)

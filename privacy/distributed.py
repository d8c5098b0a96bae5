"""Distributed noise: what a secure sum costs when every client adds a share of the noise, in integers.

Each client clips its vector to `clip_norm`, pads it to `dimension` (a power of two), rotates it by public random signs
and a Hadamard matrix, divides it by `granularity`, rounds every coordinate at random up or down (again, until its norm
is at most `rounded_norm`) and adds its share, integers of standard deviation `local_scale / granularity`. Secure
aggregation shows the sum modulo 2^bits and nothing else.

Shares are discrete Gaussian (Kairouz, Liu, Steinke 2021, arXiv:2102.06387) or Skellam (Agarwal, Kairouz, Liu 2021,
arXiv:2110.04995). Sums of Skellam noise are Skellam; sums of discrete Gaussians nearly discrete Gaussian, which `tau`
accounts for. The samplers' own 2^-128 a coordinate is to be added to delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp

from privacy.errors import UnsupportedEvent
from privacy.events import MOST_RELEASES, is_number, is_whole, require
from privacy.mechanism import LEAST_CLIP_NORM, MOST_CLIP_NORM
from privacy.noise import MAX_SCALE, MIN_SCALE

Mechanism = Literal["discrete_gaussian", "skellam"]
Vector = NDArray[np.float64]

ORDERS = (*range(2, 129), 256)
MOST_ORDER = 2**16
MOST_CLIENTS, MOST_COORDINATES = 2**20, 2**40
BETA = math.exp(-0.5)  # Both papers' choice: a rounding is drawn again with probability at most 0.61.
DEVIATIONS = 4.0  # A coordinate of the sum leaves the modulus only beyond so many standard deviations.
_GRID_BITS = 40  # The clip norm may be so many powers of two above or below the granularity.
# The theorem on sums of discrete Gaussians needs 1/2; no sampler draws below the other.
_LEAST_SHARE = {"discrete_gaussian": 0.5, "skellam": MIN_SCALE}


@dataclass(frozen=True, kw_only=True)
class DistributedNoise:
    """Describe one round of a secure sum under distributed noise, and say what it costs.

    `clients` is how many shares of the noise surely are in the sum and unknown to the adversary: the fewest *honest
    survivors* (colluders know their own; a round with fewer survivors must be aborted). `clip_norm`, `granularity` and
    `local_scale`, the standard deviation of one share, are in the unit of the vectors. `beta` in (0, 1) trades the norm
    that rounding may reach against how often it is drawn again.

    Guarantee: the revealed sum is (a, `rdp([a])`)-RDP for every whole a >= 2 when one client's vector becomes zero and
    its share of the noise stays (zero-out adjacency: who takes part is public). Add/remove-one is not claimed, for it
    would change the noise as well. The modulus and shares beyond `clients` are post-processing.

    | setting                          | effect                                                                  |
    |----------------------------------|-------------------------------------------------------------------------|
    | one client                       | `tau` is 0: its share alone is a discrete Gaussian                      |
    | local_scale < granularity / 2    | refused for discrete Gaussians: no theorem bounds the law of their sum  |
    | a coarse grid (granularity near clip_norm) | valid and dear: rounding alone may add sqrt(dimension) steps  |
    | fewer survivors than planned     | `dataclasses.replace(noise, clients=fewer)` is what was spent           |

    Raises `UnsupportedEvent`, naming the parameter, for a mechanism not known here and for values out of range.
    """

    mechanism: Mechanism
    clients: int
    dimension: int
    clip_norm: float
    granularity: float
    local_scale: float
    beta: float = BETA

    def __post_init__(self) -> None:
        clip, grid = self.clip_norm, self.granularity
        require(self.mechanism in get_args(Mechanism), "mechanism", "discrete_gaussian or skellam", self.mechanism)
        _check_whole("clients", self.clients, MOST_CLIENTS)
        _check_whole("dimension", self.dimension, MOST_COORDINATES)
        require(is_number(clip) and LEAST_CLIP_NORM <= clip <= MOST_CLIP_NORM, "clip_norm", "in [2^-100, 2^100]", clip)
        fits = is_number(grid) and grid > 0 and 2.0**-_GRID_BITS <= grid / clip <= 2.0**_GRID_BITS
        require(fits, "granularity", "within a factor 2^40 of clip_norm", grid)
        least = _LEAST_SHARE[self.mechanism]
        enough = is_number(self.local_scale) and least <= self.local_scale / grid <= MAX_SCALE
        require(enough, "local_scale", f"in [{least}, 2^40] times the granularity {grid:g}", self.local_scale)
        require(is_number(self.beta) and 0 < self.beta < 1, "beta", "between 0 and 1", self.beta)

    @property
    def rounded_norm(self) -> float:
        """The L2 sensitivity after rounding, in the unit of `clip_norm` (arXiv:2102.06387, sec. 4)."""
        return self.granularity * _rounded(self.clip_norm / self.granularity, self.dimension, self.beta)

    @property
    def rounded_l1(self) -> float:
        """The L1 sensitivity after rounding, in the unit of `clip_norm`: an integer is at most its own square."""
        return min(math.sqrt(self.dimension) * self.rounded_norm, self.rounded_norm**2 / self.granularity)

    @property
    def tau(self) -> float:
        """What sets the sum of the shares apart from one discrete Gaussian, for each coordinate; 0 for Skellam.

        Twice a bound on |log(P[sum = x] / P[N_Z(0, clients s^2) = x])| over all x (arXiv:2102.06387, sec. 3).
        """
        if self.mechanism == "skellam":
            return 0.0
        k = np.arange(1, self.clients)
        return float(10 * np.exp(-2 * math.pi**2 * (self.local_scale / self.granularity) ** 2 * k / (k + 1)).sum())

    @property
    def noise_multiplier(self) -> float:
        """The standard deviation of the sum of `clients` shares over `rounded_norm`."""
        return math.sqrt(self.clients) * self.local_scale / self.rounded_norm

    def rdp(self, orders: Sequence[int]) -> Vector:
        """Bound the Rényi divergence of one round without sampling at each whole order >= 2: `(len(orders),) float64`.

        arXiv:2102.06387, Prop. 14, and the bound of arXiv:2110.04995 in many dimensions.
        """
        a = _checked(orders)
        # In grid steps: no power of a small or large unit is ever taken.
        l2, l1 = self.rounded_norm / self.granularity, self.rounded_l1 / self.granularity
        variance = self.clients * (self.local_scale / self.granularity) ** 2
        gaussian = a * l2**2 / (2 * variance)
        if self.mechanism == "skellam":
            near, far = ((2 * a - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance)
            return gaussian + np.minimum(near, far)
        tau, d, std = self.tau, self.dimension, math.sqrt(variance)
        by_norm = a / 2 * (l2 / std + math.sqrt(d) * tau) ** 2
        bounds = [gaussian + tau * d, gaussian + a / 2 * (2 * l1 / std * tau + tau**2 * d), by_norm]
        least: Vector = np.minimum.reduce(bounds)
        return least

    def epsilon(self, delta: float, *, sampling_rate: float = 1.0, count: int = 1) -> float:
        """Bound epsilon at `delta` of `count` rounds, chosen in advance; each client is in each with `sampling_rate`.

        Sampling is charged by the amplification of any mechanism's Rényi divergence at whole orders (Zhu and Wang 2019,
        Thm. 5), which assumes that nobody who sees a sum knows who was sampled and that the shares in it do not depend
        on it. Where the server or the peers see who takes part, the rate is 1.0. `sharper_epsilon` may say less.
        """
        _check_plan(delta, sampling_rate, count)
        return _epsilon(count * _sampled(self.rdp, ORDERS, sampling_rate, factor=3.0), delta)

    def sharper_epsilon(self, delta: float, *, sampling_rate: float = 1.0, count: int = 1) -> float:
        """Bound epsilon as `epsilon` does, by `discrete_gaussian_rdp`: only for shares so wide that tau is negligible.

        The sum of shares is not quite discrete Gaussian, and that is paid for: all `count` releases together have
        densities within factors e^-h and e^h, h = count * dimension * tau / 2, of those with one discrete Gaussian in
        place of the sum, sampled or not, as mixing and multiplying keep pointwise ratios. If those are (eps, delta)-DP,
        these are (eps + 2 h, e^h delta)-DP. Raises `UnsupportedEvent` for Skellam, and where h > 1/2.
        """
        _check_plan(delta, sampling_rate, count)
        require(self.mechanism == "discrete_gaussian", "mechanism", "discrete_gaussian", self.mechanism)
        paid = count * self.dimension * self.tau / 2
        require(paid <= 0.5, "local_scale", "so wide that tau * dimension * count <= 1", self.local_scale)
        return 2 * paid + discrete_gaussian_epsilon(
            delta * math.exp(-paid),
            noise_multiplier=self.noise_multiplier,
            sampling_rate=sampling_rate,
            count=count,
        )

    def modulus_needed(self, *, cohort: int, deviations: float = DEVIATIONS) -> float:
        """The modulus in which a sum of `cohort` vectors and shares wraps only beyond `deviations` of its spread.

        The scale rule of arXiv:2102.06387, sec. 5: rotated, even a sum of equal vectors spreads over all coordinates.
        Wrapping costs accuracy, never privacy. `cohort` is the most clients that may answer, at least `clients`.
        """
        require(is_whole(cohort) and cohort >= self.clients, "cohort", f"a whole number >= {self.clients}", cohort)
        require(is_number(deviations) and deviations > 0, "deviations", "a finite number > 0", deviations)
        clip, share = self.clip_norm / self.granularity, self.local_scale / self.granularity
        return _modulus(clip, share, self.dimension, cohort, deviations)


def bits_needed(noise: DistributedNoise, *, cohort: int, deviations: float = DEVIATIONS) -> int:
    """Count the bits a coordinate needs in the secure sum of at most `cohort` clients (`modulus_needed`)."""
    return math.ceil(math.log2(noise.modulus_needed(cohort=cohort, deviations=deviations)))


def noise_for_bits(
    bits: int,
    *,
    mechanism: Mechanism,
    clients: int,
    cohort: int,
    dimension: int,
    clip_norm: float,
    noise_multiplier: float,
    beta: float = BETA,
    deviations: float = DEVIATIONS,
) -> DistributedNoise:
    """Choose the finest grid that `bits` a coordinate allow, and shares that reach `noise_multiplier` on it.

    A coarser grid needs less modulus but more noise, for its rounding adds to the norm: the fixed point is found to a
    relative 1e-9, on the side where `bits_needed` is at most `bits`. `noise_multiplier` sets `clients` shares against
    the norm after rounding: the bits change the cost by `tau` and Skellam's own terms alone, and the noise by
    `rounded_norm / clip_norm`.

    Raises `UnsupportedEvent` where `bits` are too few for any grid, and as `DistributedNoise` does.
    """
    _check_whole("bits", bits, 64)
    _check_noise(noise_multiplier)
    # The coarsest shares that both mechanisms allow, to check everything else that is given.
    plain = DistributedNoise(
        mechanism=mechanism,
        clients=clients,
        dimension=dimension,
        clip_norm=clip_norm,
        granularity=clip_norm,
        local_scale=clip_norm,
        beta=beta,
    )
    plain.modulus_needed(cohort=cohort, deviations=deviations)

    def share(clip: float) -> float:
        return noise_multiplier * _rounded(clip, dimension, beta) / math.sqrt(clients)

    def spare(exponent: float) -> float:  # Falls with the steps in a clip norm, 2^exponent.
        return bits - math.log2(_modulus(2.0**exponent, share(2.0**exponent), dimension, cohort, deviations))

    if spare(-_GRID_BITS) <= 0:
        raise UnsupportedEvent(f"bits must be more for these clients, dimension and noise_multiplier, got {bits}")
    exponent = _GRID_BITS if spare(_GRID_BITS) >= 0 else brentq(spare, -_GRID_BITS, _GRID_BITS, xtol=1e-10) - 1e-9
    steps = 2.0**exponent
    return replace(plain, granularity=clip_norm / steps, local_scale=clip_norm / steps * share(steps))


def discrete_gaussian_rdp(orders: Sequence[int], *, noise_multiplier: float, sampling_rate: float = 1.0) -> Vector:
    """Bound the Rényi divergence of a sum under ONE discrete Gaussian at whole orders >= 2: `(len(orders),) float64`.

    Guarantee: for an integer-valued query of L2 sensitivity `scale / noise_multiplier` under add/remove-one, whose
    units enter independently with probability `sampling_rate`, and noise N_Z(0, scale^2) on each coordinate, any scale.
    It is exact where that sensitivity is attained: the divergence of the continuous Gaussian (Mironov, Talwar, Zhang
    2019, arXiv:1908.10530, sec. 3.3) at whole orders. For Q = N_Z(0, scale^2) and P, its shift by an integer v,

        E_Q[(P/Q)^k] = exp(k (k - 1) |v|^2 / (2 scale^2)) sum_x Q(x - k v),

    and the last sum is 1, for k v lies on the lattice. The other direction costs less, as x -> v - x swaps P and Q
    (their Thm. 5). A *sum* of discrete Gaussians, which is what distributed noise is, is not bounded by this:
    `DistributedNoise.sharper_epsilon` pays for the difference. Raises `UnsupportedEvent` for values out of range.
    """
    _check_noise(noise_multiplier)
    _check_plan(0.5, sampling_rate, 1)
    return _sampled(lambda a: _checked(a) / (2 * noise_multiplier**2), orders, sampling_rate, factor=1.0)


def discrete_gaussian_epsilon(
    delta: float, *, noise_multiplier: float, sampling_rate: float = 1.0, count: int = 1
) -> float:
    """Bound epsilon at `delta` of `count` releases, each as `discrete_gaussian_rdp` says, chosen in advance."""
    _check_plan(delta, sampling_rate, count)
    rdp = discrete_gaussian_rdp(ORDERS, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
    return _epsilon(count * rdp, delta)


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Bound epsilon at `delta` of any `rho`-zCDP mechanism (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Prop. 12).

    That is the least over real orders a > 1 of rho a + log(1 / (a delta)) / (a - 1) + log(1 - 1/a), clamped at 0; its
    derivative vanishes once, where (a - 1)^2 rho = log(1 / (a delta)).
    """
    require(is_number(rho) and rho > 0, "rho", "a finite number > 0", rho)
    _check_plan(delta, 1.0, 1)
    spread = -math.log(delta)

    def slope(log_x: float) -> float:  # In x = a - 1, for an a that rounds to 1 would look free.
        x = math.exp(log_x)
        return x * math.sqrt(rho) - math.sqrt(max(spread - math.log1p(x), 0.0))

    x = math.exp(brentq(slope, -400.0, (math.log(spread) - math.log(rho)) / 2 + 1))
    return max(0.0, rho * (1 + x) + (spread - math.log1p(x)) / x + math.log(x) - math.log1p(x))


def _rounded(clip: float, dimension: int, beta: float) -> float:
    """The norm that rounding may reach, in grid steps, from a norm of `clip` of them."""
    root = math.sqrt(dimension)
    typical = clip**2 + dimension / 4 + math.sqrt(-2 * math.log(beta)) * (clip + root / 2)
    return math.sqrt(min(typical, (clip + root) ** 2))


def _modulus(clip: float, share: float, dimension: int, cohort: int, deviations: float) -> float:
    signal = (clip * cohort) ** 2 / dimension
    return 2 * deviations * math.sqrt(signal + (1 / 4 + share**2) * cohort)


def _sampled(rdp: Callable[[Sequence[int]], Vector], orders: Sequence[int], rate: float, *, factor: float) -> Vector:
    """Amplify by Poisson sampling, from `rdp` at all whole orders up to the largest of `orders`.

    E_Q[((1 - q) + q P/Q)^a] is binomial in the moments E_Q[(P/Q)^k] = exp((k - 1) rdp(k)), so `factor` 1 is exact
    where the moments are; they bound any mechanism's with 3 for those of k >= 3 (Zhu and Wang 2019, Thm. 5).
    """
    unsampled = rdp(orders)
    if rate == 1:
        return unsampled
    k = np.arange(2, max(orders) + 1)
    moments = (k - 1) * rdp(k.tolist()) + np.where(k > 2, math.log(factor), 0.0)
    # The terms of k < 2 are 1 less the others' weights: log(1 + ...) keeps the digits of what is next to nothing.
    with np.errstate(divide="ignore"):
        excess = moments + np.log(-np.expm1(-moments))
    amplified = [
        np.logaddexp(0.0, logsumexp(_log_binomial(a, k[: a - 1], rate) + excess[: a - 1])) / (a - 1) for a in orders
    ]
    return np.minimum(unsampled, amplified)  # Mixing in the unchanged Q never increases a Rényi divergence.


def _log_binomial(n: int, k: NDArray[np.int64], rate: float) -> Vector:
    choices = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    result: Vector = choices + k * math.log(rate) + (n - k) * math.log1p(-rate)
    return result


def _epsilon(rdp: Vector, delta: float) -> float:
    # Imported late: the library takes a second to load.
    from dp_accounting.rdp import rdp_privacy_accountant

    return float(rdp_privacy_accountant.compute_epsilon(ORDERS, rdp, delta)[0])


def _checked(orders: Sequence[int]) -> Vector:
    whole = len(orders) > 0 and all(is_whole(order) and 2 <= order <= MOST_ORDER for order in orders)
    require(whole, "orders", "whole numbers in [2, 2^16]", orders)
    return np.array(orders, np.float64)


def _check_plan(delta: float, sampling_rate: float, count: int) -> None:
    require(is_number(delta) and 0 < delta < 1, "delta", "between 0 and 1", delta)
    require(is_number(sampling_rate) and 0 < sampling_rate <= 1, "sampling_rate", "in (0, 1]", sampling_rate)
    _check_whole("count", count, MOST_RELEASES)


def _check_whole(name: str, value: int, most: int) -> None:
    require(is_whole(value) and value <= most, name, f"a whole number in [1, 2^{most.bit_length() - 1}]", value)


def _check_noise(noise_multiplier: float) -> None:
    fits = is_number(noise_multiplier) and 2.0**-_GRID_BITS <= noise_multiplier <= 2.0**_GRID_BITS
    require(fits, "noise_multiplier", "in [2^-40, 2^40]", noise_multiplier)

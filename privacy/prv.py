"""Two-sided bounds on epsilon from privacy losses rounded to a mesh and added by one Fourier transform.

The loss of one release is the random variable log P(o) / Q(o), o drawn from P, for the worst pair of neighbours. The
losses of releases add up, and delta(epsilon) = E[max(0, 1 - e^(epsilon - Y))] for their sum Y. Gopi, Lee and
Wutschitz 2021 (arXiv:2106.02848) round each loss to a mesh and shift it by a constant that restores its mean. The
rounding errors are then independent, bounded and centred; those of k releases mostly cancel, and the mesh need only
be as fine as error / sqrt(k). A grid that always errs upward has no such gain, and encloses the truth from one side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import solve_banded
from scipy.special import ndtr, ndtri

from privacy.errors import UnsupportedEvent
from privacy.events import GaussianEvent

Phase = tuple[float, float]  # (noise_multiplier, sampling_rate): what one release costs; rate 1.0 is no sampling.
Plan = tuple[tuple[Phase, int], ...]  # Phases with how often each was released, sorted.
Vector = NDArray[np.float64]

MOST_BINS = 2**22  # In a window: some seconds and half a gigabyte.
LEAST_BINS = 2**15  # So cheap that fewer would gain nothing: such plans get tighter bounds than they ask for.
FAILURE_SHARE = 2.0**-12  # The share of delta that each of the four failures in the proof may take.
MOST_LOST = 0.1  # The share of delta that all failures and the rounding of the transforms may take.
# By how much a coefficient of a transform may err, as shares of the vector's 2-norm and of the sum of its sizes: twice
# what was measured with scipy 1.17 against 80-bit arithmetic, at lengths 2^10 to 2^22.
NORM_ERROR, SUM_ERROR = 6e-16, 6e-16
FLOAT_ERROR = 2.5e-16  # Of one operation, rounded up.
MANY = 64  # Releases; see `_Spectrum.multiply`.
MESH_MARGIN = 1.001  # Widens the bounds for the rounding of masses and means: step 6 of the proof.

_FAR = 13.0  # A standard Gaussian is farther out with probability 1e-38.
_STEEP = 500.0  # Where e^loss has outgrown everything it is added to, and e^loss / rate is a float still.
_NOTHING = -80.0  # Spectra of size e^-80 are left out.


@dataclass(frozen=True)
class Bounds:
    """`lower` <= the true epsilon <= `upper`; `estimate` lies between, most likely closer than either, unproven."""

    lower: float
    estimate: float
    upper: float


def epsilon_bounds(plan: Plan, delta: float, *, error: float = 0.01) -> Bounds:
    """Enclose the epsilon at `delta` of all releases of `plan` together, under add/remove-one.

    Guarantee: lower <= epsilon(delta) <= upper for the least epsilon >= 0 at which the adaptive composition of the
    Poisson-subsampled Gaussians, chosen in advance, is (epsilon, delta)-DP: the larger one of its two directions. Both
    bounds are within `error` of the estimate, plus what 0.1 % of delta and the rounding of the transforms (together at
    most a tenth of delta, as a rule far less) are worth in epsilon. Where a fine mesh is cheap they are closer.

    Proof, for either direction; s is a noise multiplier, T the number of releases, eta = delta / 4096.

    1. A release with the record against one without is dominated by (1 - q) N(0, s^2) + q N(1, s^2) against N(0, s^2),
       and the other direction by the reverse; dominating pairs compose adaptively (Zhu, Dong, Wang 2022,
       arXiv:2106.08567), and a record that is clipped in every release attains them. If Y <= Y' + t but
       for probability p, then delta_Y(eps) <= delta_Y'(eps - t) + p, as max(0, 1 - e^(eps - Y)) rises with Y and lies
       in [0, 1].
    2. Losses are clamped to those of outcomes within z standard deviations, which alters any of T with probability
       <= eta, and the sum's mean by at most eta / (z min s), as a loss changes by at most 1 / s per deviation.
    3. Each clamped loss is rounded to the mesh h and shifted to the mean of the unclamped. The T errors, but for the
       mean in 2, are independent, centred and each in an interval of length h: by Hoeffding, their sum exceeds
       t = h sqrt(T log(1 / eta) / 2) with probability <= eta. This is the heart of the paper's Thm. 5.5, one tail at
       a time; it asks for one h, not for one mechanism.
    4. A transform adds modulo its window. Chernoff's bound, evaluated on the very masses that are transformed, says how
       likely the sum leaves at the top or at the bottom; about eta each.
    5. Rounding in the transforms moves delta by at most the 2-norm of the spectrum's error (Cauchy-Schwarz, Parseval:
       delta weighs each mass by 0 to 1). It is computed from the spectra; what one transform errs by (`NORM_ERROR`) is
       measured, not proven.
    6. Masses and means err by some 1e-15 of a loss, in total by less than 1e-13 T E|Y|; and 2^22 bins that span a
       standard deviation of the sum mean t > 1e-7 T E|Y|. A thousandth of t is added for it.

    With p the sum of all probabilities in 2 to 5 and t including 2 and 6: upper = eps'(delta - p) + t and
    lower = eps'(delta + p) - t, eps' being epsilon on the mesh.

    Edge cases: no releases cost 0, 0, 0; `lower` is at least 0; releases without sampling are first replaced by the one
    Gaussian that they amount to. Raises `UnsupportedEvent` for a delta outside (0, 1), an error that is no finite
    number > 0, a release that no `GaussianEvent` describes, more than 2^22 bins, and a delta that is not ten times the
    rounding of the transforms: 1e-13 to 2e-11 in plans of one to a million releases.
    """
    with_record, without = bounds_by_direction(plan, delta, error=error)
    return Bounds(
        max(with_record.lower, without.lower),
        max(with_record.estimate, without.estimate),
        max(with_record.upper, without.upper),
    )


def bounds_by_direction(plan: Plan, delta: float, *, error: float = 0.01) -> tuple[Bounds, Bounds]:
    """Enclose epsilon of outputs with a record against outputs without it, and of the reverse.

    Guarantee, edge cases and errors as in `epsilon_bounds`, for each. Composition can make either the larger one.
    """
    if not 0 < delta < 1:
        raise UnsupportedEvent(f"delta must lie between 0 and 1, got {delta!r}")
    if not (error > 0 and math.isfinite(error)):
        raise UnsupportedEvent(f"error must be a finite number > 0, got {error!r}")
    releases = list(_releases(plan))
    if not releases:
        return Bounds(0.0, 0.0, 0.0), Bounds(0.0, 0.0, 0.0)
    failure, total = delta * FAILURE_SHARE, sum(release.count for release in releases)
    reach = -float(ndtri(failure / (2 * total)))
    deviation = math.sqrt(total * math.log(1 / failure) / 2)
    coarsest = error / (MESH_MARGIN * deviation)
    # The two directions of Gaussians alone are the same.
    directions = (1, -1) if any(release.rate < 1 for release in releases) else (1,)
    windows = [_Window.of(releases, direction, reach, failure, total * coarsest**2) for direction in directions]
    span = max(window.top - window.bottom for window in windows)
    mesh = min(coarsest, span / LEAST_BINS)
    ends = [release.ends(1, reach) for release in releases]
    bins = max(span, *(high - low for low, high in ends)) / mesh
    if bins > MOST_BINS:
        raise UnsupportedEvent(f"error must be larger for this plan: {error:g} takes {bins:.2g} bins, at most 2^22 fit")
    slack = MESH_MARGIN * mesh * deviation + failure / (reach * min(release.noise for release in releases))
    spectra = [_Spectrum(window, mesh) for window in windows]
    for release, spectrum in itertools.product(releases, spectra):
        spectrum.multiply(release, *release.masses(spectrum.window.direction, reach, mesh))
    found = [spectrum.solve(delta, failure, slack) for spectrum in spectra]
    return found[0], found[-1]


def _releases(plan: Plan) -> Iterable[_Release]:
    precision = 0.0
    for (noise, rate), count in plan:
        # Refuses what no event can be.
        GaussianEvent(noise_multiplier=noise, clip_norm=1.0, sampling_rate=rate, count=count, rng="os")
        if rate < 1:
            yield _Release(noise, rate, count)
        else:
            precision += count / noise**2
    if precision:
        yield _Release(1 / math.sqrt(precision), 1.0, 1)


@dataclass(frozen=True)
class _Release:
    """`count` releases with the pair P = (1 - rate) N(0, noise^2) + rate N(1, noise^2), Q = N(0, noise^2)."""

    noise: float
    rate: float
    count: int

    def loss(self, outcomes: Vector) -> Vector:
        """log P(x) / Q(x), to full relative precision also where it is about the rate."""
        exponent = (outcomes - 0.5) / self.noise**2
        if self.rate == 1:
            return exponent
        losses = np.log1p(self.rate * np.expm1(np.minimum(exponent, _STEEP)))
        return np.where(exponent < _STEEP, losses, exponent + math.log(self.rate))

    def outcome(self, losses: Vector) -> Vector:
        """The inverse of `loss`; -inf for losses that no outcome has."""
        exponent = losses
        if self.rate < 1:
            with np.errstate(divide="ignore", over="ignore"):
                exponent = np.log1p(np.maximum(np.expm1(np.minimum(losses, _STEEP)) / self.rate, -1.0))
            exponent = np.where(losses < _STEEP, exponent, losses - math.log(self.rate))
        return exponent * self.noise**2 + 0.5

    def ends(self, direction: int, reach: float) -> tuple[float, float]:
        """The losses at the outcomes, within `reach` standard deviations, to which all others are clamped."""
        low, high = (1, 1) if self.rate == 1 else (0, max(direction, 0))
        outcomes = np.array([low - self.noise * reach, high + self.noise * reach])
        least, most = sorted(self._sign(direction) * float(loss) for loss in self.loss(outcomes))
        return least, most

    def quadrature(self, direction: int) -> tuple[Vector, Vector]:
        """Losses and weights for expectations of functions of one loss.

        The trapezoidal rule converges exponentially, as losses are analytic within pi * noise standard deviations of
        the real axis; the step leaves 1e-16.
        """
        step = min(0.25, 0.4 * self.noise) if self.rate < 1 else 0.25
        deviations = step * np.arange(-math.ceil(_FAR / step), math.ceil(_FAR / step) + 1, dtype=np.float64)
        weights = np.exp(-(deviations**2) / 2)
        weights /= weights.sum()
        if self.rate == 1:
            return self.loss(1 + self.noise * deviations), weights
        absent = self.loss(self.noise * deviations)
        if direction < 0:
            return -absent, weights
        present = self.loss(1 + self.noise * deviations)
        return np.concatenate([absent, present]), np.concatenate([(1 - self.rate) * weights, self.rate * weights])

    def masses(self, direction: int, reach: float, mesh: float) -> tuple[int, Vector]:
        """The first mesh index of the clamped loss rounded to the mesh, and the masses from there on."""
        first, last = (round(end / mesh) for end in self.ends(direction, reach))
        sign = self._sign(direction)
        inner = self.outcome(sign * mesh * (np.arange(first, last, dtype=np.float64) + 0.5))
        edges = np.concatenate([[-np.inf], inner[::sign], [np.inf]])
        masses = np.zeros(len(edges) - 1)
        if self.rate < 1:
            masses += (1 - self.rate if sign > 0 else 1.0) * _gaussian_masses(edges / self.noise)
        if sign > 0:
            masses += self.rate * _gaussian_masses((edges - 1) / self.noise)
        return first, masses[::sign]

    def _sign(self, direction: int) -> int:
        # The two directions of one Gaussian have the same law; the one of P serves for both.
        return 1 if self.rate == 1 else direction


@dataclass(frozen=True)
class _Window:
    """Where the sum of all losses lies in one direction: 1 is log P / Q under P, and -1 is log Q / P under Q.

    It leaves [bottom, top] with probability about `failure` at either end, by Chernoff's bound at `tilts`: estimated
    here, since the masses are not known before the mesh, and evaluated on the masses later.
    """

    direction: int
    means: dict[_Release, float]
    mean: float
    bottom: float
    top: float
    tilts: tuple[float, float]

    @classmethod
    def of(cls, releases: list[_Release], direction: int, reach: float, failure: float, rounding: float) -> _Window:
        means, centred = {}, []
        for release in releases:
            losses, weights = release.quadrature(direction)
            means[release] = float((losses * weights).sum())
            least, most = release.ends(direction, reach)
            centred.append((release.count, np.clip(losses, least, most) - means[release], weights))
        variance = math.fsum(count * float((losses**2 * weights).sum()) for count, losses, weights in centred)
        # `rounding` is the sum of all squared intervals of rounding errors, whose variance is about a twelfth of it. It
        # also keeps losses that hardly exist from asking for a mesh that hardly exists.
        tilts = np.geomspace(2.0**-8, 2.0**5, 53) / math.sqrt(variance + rounding / 12)
        ends = []
        for sign in (-1, 1):
            cumulants = sum(count * _cumulants(sign * tilts, losses, weights) for count, losses, weights in centred)
            reaches = (cumulants + tilts**2 * rounding / 8 - math.log(failure)) / tilts
            best = int(np.argmin(reaches))
            ends.append((sign * float(reaches[best]), sign * float(tilts[best])))
        (bottom, down), (top, up) = ends
        mean = math.fsum(release.count * means[release] for release in releases)
        return cls(direction, means, mean, mean + bottom, mean + top, (down, up))


class _Spectrum:
    """The spectrum of the sum of all rounded losses in one direction, and what bounds each of its errors.

    The sum is mesh * (a whole number) + `shift`, the number modulo `size`.
    """

    def __init__(self, window: _Window, mesh: float) -> None:
        self.window, self.mesh = window, mesh
        self.size = int(next_fast_len(math.ceil((window.top - window.bottom) / mesh) + 2, real=True))
        self.shift, self.cumulants = 0.0, np.zeros(2)
        # Logarithm of the size, angle, and relative error of the lowest frequencies; of the others the size is 0.
        self.logarithm, self.angle, self.gain = np.zeros((3, self.size // 2 + 1))

    def multiply(self, release: _Release, first: int, masses: Vector) -> None:
        """Add `release.count` losses that have `masses` at mesh * (first + 0, 1, ...), moved to their mean."""
        mean = self.window.means[release]
        steps = first - round(mean / self.mesh) + np.arange(len(masses))
        drift = float((masses * steps).sum())
        self.shift += release.count * (mean - self.mesh * drift)
        tilts = np.array(self.window.tilts)
        losses = self.mesh * (steps.astype(np.float64) - drift)
        self.cumulants += release.count * _cumulants(tilts, losses, masses)

        # What counts is the transform less 1: small, at the low frequencies that survive many releases. Summing by
        # parts, sum p_j (z^j - 1) = (z - 1) sum_m z^m (P[J > m] for m >= 0, else -P[J <= m]), then loses no digits.
        # At the high ones, which few releases do not quench, the plain transform errs less.
        frequencies = np.arange(len(self.gain))
        factor: NDArray[np.complex128] | float = 1.0
        values, moved = np.where(steps == 0, 0.0, masses), 1.0 - float(masses[steps == 0].sum())
        if release.count >= MANY:
            zero = int(np.searchsorted(steps, 0))
            tails = np.cumsum(masses[::-1])[::-1]
            values = np.concatenate([-np.cumsum(masses[:zero]), tails[zero + 1 :], [0.0]])
            factor, moved = np.expm1(-2j * math.pi / self.size * frequencies), 0.0
        less = factor * (_transform(values, int(steps[0]), self.size, len(frequencies)) - moved)
        norm = math.sqrt((values**2).sum() * math.ceil(len(values) / self.size))
        noise = np.abs(factor) * (NORM_ERROR * norm + SUM_ERROR * np.abs(values).sum())
        size = np.hypot(1 + less.real, less.imag)
        noise = noise + FLOAT_ERROR * np.minimum(np.abs(less), 1.0)

        logarithm = np.log(np.maximum(size, noise))
        near = size > 0.7
        logarithm[near] = np.log1p(less.real[near] * (2 + less.real[near]) + less.imag[near] ** 2) / 2
        angle = np.arctan2(less.imag, 1 + less.real)
        self.logarithm += release.count * logarithm
        self.angle += release.count * angle
        self.gain += release.count * (noise * np.exp(-logarithm) + FLOAT_ERROR * (np.abs(angle) - logarithm))
        kept = int(np.flatnonzero(self.logarithm + self.gain > _NOTHING)[-1]) + 1
        self.logarithm, self.angle, self.gain = self.logarithm[:kept], self.angle[:kept], self.gain[:kept]

    def solve(self, delta: float, failure: float, slack: float) -> Bounds:
        """Bound and estimate epsilon in this direction; the proof is in `epsilon_bounds`."""
        sizes = np.exp(self.logarithm)
        errors = np.exp(np.minimum(self.logarithm + self.gain, 0.0)) * self.gain + NORM_ERROR * sizes
        rounding = math.sqrt(2 * (errors**2).sum())  # A real transform shows half of the spectrum.
        masses = irfft(sizes * np.exp(1j * self.angle), self.size)
        lowest = math.ceil((self.window.bottom - self.shift) / self.mesh)
        masses = np.roll(masses, -(lowest % self.size))
        bottom = self.shift + self.mesh * lowest
        ends = np.array([bottom - self.mesh, bottom + self.mesh * self.size]) - self.window.mean
        left = float(np.exp(self.cumulants - np.array(self.window.tilts) * ends).sum())
        lost = 2 * failure + left + rounding
        if lost > MOST_LOST * delta:
            raise UnsupportedEvent(f"delta must be at least {lost / MOST_LOST:.2g} for this plan, got {delta:g}")

        first = max(0, math.ceil((-slack - bottom) / self.mesh))
        curve = _Curve(bottom + self.mesh * first, self.mesh, masses[first:])
        return Bounds(
            curve.epsilon(delta + lost, slack) - slack,
            curve.epsilon(delta, 0.0),
            curve.epsilon(delta - lost, -slack) + slack,
        )


class _Curve:
    """delta(epsilon) = sum_j masses_j max(0, 1 - e^(epsilon - bottom - mesh j)), inverted exactly."""

    def __init__(self, bottom: float, mesh: float, masses: Vector) -> None:
        self.bottom, self.mesh = bottom, mesh
        self.above = np.cumsum(masses[::-1])[::-1]  # At or above each bin.
        # delta at each bin, from the top: delta_j = delta_{j+1} / e^mesh + (1 - 1 / e^mesh) above_{j+1}. Both terms
        # are positive, and no e^epsilon overflows.
        bands = np.ones((2, len(masses)))
        bands[0] = -math.exp(-mesh)
        self.deltas = solve_banded((0, 1), bands, -math.expm1(-mesh) * np.append(self.above[1:], 0.0))

    def epsilon(self, delta: float, least: float) -> float:
        """The epsilon at `delta`, at least `least`."""
        at = int(np.argmax(self.deltas <= delta))
        if self.above[at] <= delta:
            return least
        ratio = (self.above[at] - delta) / (self.above[at] - self.deltas[at])
        return max(least, self.bottom + self.mesh * at + math.log(ratio))


def _transform(values: Vector, first: int, size: int, count: int) -> NDArray[np.complex128]:
    """The lowest `count` coefficients of the transform of `values` at places first + 0, 1, ... modulo `size`."""
    if count * len(values) > 8 * size:
        places = (first + np.arange(len(values))) % size
        return np.asarray(rfft(np.bincount(places, weights=values, minlength=size))[:count])
    # Few suffice once many releases have quenched the rest: sums within blocks, then over blocks, cost less.
    width = math.isqrt(len(values)) + 1
    blocks = np.zeros((width, width))
    blocks.flat[: len(values)] = values
    turn = -2j * math.pi / size * np.arange(count)
    within = np.exp(np.outer(np.arange(width), turn))
    across = np.exp(np.outer(first + width * np.arange(width), turn))
    return np.asarray(((blocks @ within) * across).sum(axis=0))


def _gaussian_masses(edges: Vector) -> Vector:
    """The standard Gaussian's masses between ascending edges, the first -inf and the last inf; tails keep precision."""
    tails = ndtr(-np.abs(edges))
    masses = np.diff(np.where(edges < 0, tails, -tails))
    masses[np.searchsorted(edges, 0.0) - 1] += 1.0
    return masses


def _cumulants(tilts: Vector, losses: Vector, weights: Vector) -> Vector:
    """log E[e^(tilt loss)] for each tilt. Products are summed, here and above, not dotted: BLAS would start threads."""
    result = np.empty_like(tilts)
    for index, tilt in enumerate(tilts):
        exponents = tilt * losses
        most = exponents.max()
        result[index] = most + math.log((weights * np.exp(exponents - most)).sum())
    return result

"""Exact discrete Gaussian and Skellam noise, and Poisson sampling, from uniform 64-bit words.

Floating-point Gaussians leak through their low-order bits (Mironov 2012; Haney et al. 2022). Here noise is an integer,
to be added to an integer, and no float decides a draw: words are compared with cumulative probabilities known to 256
bits. Running times depend on the values drawn; do not let an adversary measure them.
"""

import hashlib
import json
import math
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NoReturn, Protocol

import mpmath
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

MIN_SCALE, MAX_SCALE = 0.1, 2.0**40
MIN_CHARGED_SCALE = 16.0
MAX_TABLE_SCALE = 1024
FINE_SCALE, STRIDE = 512, 128
MAX_SKELLAM_SCALE, MAX_SKELLAM_TABLE_SCALE = 2.0**16, 4096

WORDS_PER_KEY = 2**24  # That is 2^23 blocks: an AES-CTR keystream is then within 2^46 / 2^129 = 2^-83 of uniform.
CHUNK = 2**18  # Coordinates drawn at once, to bound the memory. Part of every seeded stream: it must not change.
# Words inverted at once. From 2^15 on the allocator hands memory back to the kernel after every block, and the page
# faults halve the speed of draws of 2^16 to 2^18 coordinates and of a process's first draws.
BLOCK = 2**14

TAIL_SCALES = 13.4  # 2 Q(13.4) < 2^-133, so six tables (what scale 2^40 takes) together cut less than 2^-128.
WORD_BITS, CUMULATIVE_BITS = 64, 256
REFINING_WORDS = CUMULATIVE_BITS // WORD_BITS - 1
WORKING_BITS = 384  # The recurrences for the weights lose fewer than 28 of them.
SKELLAM_TAIL_BITS = 137  # 256 tables (what scale 2^16 takes) together cut at most 2^-129.
SKELLAM_START_BITS = CUMULATIVE_BITS + 64


class NoiseSource(Protocol):
    """Supplies independent uniform 64-bit words; `kind` is stamped into every ledger entry."""

    kind: str

    def words(self, count: int) -> NDArray[np.uint64]: ...


class OsNoise:
    """Draws words from AES-256-CTR under keys from the operating system: the only source fit for a release.

    Every thread has its own stream. One stream behind a lock was rejected: a fork while another thread holds the lock
    leaves a child that waits for ever. A forked child re-keys before its first word: parent and child share no noise.
    """

    kind = "os"

    def __init__(self) -> None:
        self._thread = threading.local()

    def words(self, count: int) -> NDArray[np.uint64]:
        own, process = self._thread, os.getpid()
        if getattr(own, "process", None) != process or own.served >= WORDS_PER_KEY:
            entropy = os.urandom(48)
            own.keystream, own.process, own.served = Keystream(entropy[:32], entropy[32:]), process, 0
        own.served += count
        drawn: NDArray[np.uint64] = own.keystream.words(count)
        return drawn

    def __repr__(self) -> str:
        return "OsNoise()"

    def __reduce__(self) -> NoReturn:
        raise TypeError("OsNoise cannot be copied or pickled: copies would draw the same noise; make a new OsNoise()")


class SeededNoise:
    """Draws the same words for the same arguments on every platform.

    SIMULATION ONLY: whoever knows the seed can subtract the noise. `SeededNoise(42, "site-a", 3)` and
    `SeededNoise(42, "site-a", "3")` are unrelated streams. Not for use by two threads at once.
    """

    kind = "seeded-simulation"

    def __init__(self, seed: int, *path: int | str) -> None:
        # JSON tells 1 from "1" and ("ab", "c") from ("a", "bc"): different arguments never share a key.
        arguments = json.dumps([seed, *path], ensure_ascii=False, separators=(",", ":"))
        key = hashlib.sha256(b"fedchorus/seeded-noise/v1\0" + arguments.encode()).digest()
        self._keystream = Keystream(key, counter=bytes(16))

    def words(self, count: int) -> NDArray[np.uint64]:
        return self._keystream.words(count)


class Keystream:
    """Reads an AES-256-CTR keystream (NIST SP 800-38A, sec. 6.5) as little-endian words."""

    def __init__(self, key: bytes, counter: bytes) -> None:
        self._encryptor = Cipher(AES(key), CTR(counter)).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


def discrete_gaussian(source: NoiseSource, scale: float, size: int) -> NDArray[np.int64]:
    """Draw `(size,) int64` independently from N_Z(0, scale^2), P[x] ∝ exp(-x^2 / (2 scale^2)).

    *Guarantee.* On ideal words each coordinate's law is within 2^-128 of N_Z(0, scale^2) in total variation.

    Up to scale 1024 a draw inverts a table of cumulative probabilities. Above, it is x1 + k x2 with x1 ~ N_Z(0, s1^2),
    x2 ~ N_Z(0, s2^2), s1 = 512, k = 128 and s2^2 = (scale^2 - s1^2) / k^2, kept as a fraction, so that nothing is
    rounded (after Micciancio & Walter 2017). Completing the square with tau = s1 s2 / scale, c_x = k x tau^2 / s1^2:

        P[x] ∝ sum_y exp(-(x - k y)^2 / (2 s1^2) - y^2 / (2 s2^2))
             = exp(-x^2 / (2 scale^2)) sum_y exp(-(y - c_x)^2 / (2 tau^2)).

    By Poisson summation the last sum is tau sqrt(2 pi) times a factor within 1 ± theta, theta = 2 sum_{n>=1}
    exp(-2 pi^2 n^2 tau^2), so normalised P[x] is within a factor (1 + theta) / (1 - theta) of N_Z's. Here
    tau^2 = 16 (1 - (512 / scale)^2) >= 12, and theta < 2^-340.

    Raises ValueError for a negative size or a scale outside [0.1, 2^40].
    """
    return _draw(_gaussian, source, scale, size, MAX_SCALE)


def skellam(source: NoiseSource, scale: float, size: int) -> NDArray[np.int64]:
    """Draw `(size,) int64` independently from the difference of two Poissons of mean scale^2 / 2: variance scale^2.

    P[x] = exp(-scale^2) I_|x|(scale^2), I the modified Bessel function. Sums of independent draws are Skellam again,
    with the variances added, which discrete Gaussians are only almost (Agarwal, Kairouz & Liu 2021, arXiv:2110.04995).

    *Guarantee.* On ideal words each coordinate's law is within 2^-128 of the Skellam law in total variation.

    Up to scale 4096 a draw inverts a table of cumulative probabilities. Above, it is the sum of n = ceil(scale^2 /
    4096^2) draws of variance scale^2 / n, kept as a fraction: n tables' time, 256 at scale 2^16.

    Raises ValueError for a negative size or a scale outside [0.1, 2^16].
    """
    return _draw(_skellam, source, scale, size, MAX_SKELLAM_SCALE)


def poisson_sample(source: NoiseSource, count: int, rate: float) -> NDArray[np.int64]:
    """Pick each of range(count) independently; return the picked indices, sorted, `int64`.

    *Guarantee.* On ideal words the inclusion probability is floor(rate 2^64) / 2^64: never above the `rate` accounted
    for. Rate 1 picks everyone, a rate below 2^-64 no one. Raises ValueError for a negative count or rate not in (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the sampling rate must lie in (0, 1], got {rate}")
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    threshold = int(math.ldexp(rate, WORD_BITS))
    picked = [c.start + np.flatnonzero(source.words(c.stop - c.start) < threshold) for c in _chunks(count, CHUNK)]
    return np.concatenate([np.empty(0, np.int64), *picked])


def discretisation_tv(scale: float, coordinates: int, draws: int) -> float:
    """Bound the total variation of `draws` vectors of `coordinates` discrete Gaussians from rounded continuous ones.

    *Guarantee.* Let tv be the value returned and all queries integer-valued. If releases with continuous noise
    N(0, scale^2 - 1/12) are together (eps, delta)-DP, then the same releases with noise drawn by `discrete_gaussian`
    are (eps, delta + (1 + e^eps) tv)-DP: rounding is post-processing, and each of the two neighbouring data sets costs
    one tv. Queries may depend on earlier releases: all noise is compared at once, as one vector of coordinates * draws.

    Proof, with s = scale. The -1/12 offsets the variance of rounding. Let phi be the density of N(0, s^2) and q that of
    N(0, s^2 - 1/12) + U[-1/2, 1/2], which at integers is the rounded law. Their characteristic functions' ratio is
    g(t) = exp(t^2 / 24) sin(t/2) / (t/2) = 1 - t^4 / 2880 - ..., thus q = phi (1 - He_4(x/s) / (2880 s^4) + ...). As
    Hermite polynomials are orthogonal under phi and |g_2n| <= 12^-n / n!,

        integral (q - phi)^2 / phi = sum_{n>=2} (2n)! g_2n^2 / s^4n <= 24 / (2880 s^4)^2 + sum_{n>=3} (36 s^4)^-n.

    Summing over integers instead adds less than exp(-4900) for s >= 16 (Poisson summation), so one coordinate's
    chi-square is below 1 / (345000 s^8), float rounding included (2880^2 / 24 is 345600). Over n coordinates
    the factors 1 + chi^2 multiply, and TV <= chi / 2. The sampler's own 2^-128 per coordinate is added.

    Raises ValueError for a scale outside [16, 2^40] or negative counts.
    """
    if not MIN_CHARGED_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"the bound holds for scales in [{MIN_CHARGED_SCALE}, 2^40], got {scale}; choose another grid")
    if coordinates < 0 or draws < 0:
        raise ValueError(f"coordinates and draws must be 0 or more, got {coordinates} and {draws}")
    n = coordinates * draws
    chi_square = math.expm1(min(2.0, n / (345_000 * scale**8)))  # From an exponent of log 5 on, the bound exceeds 1.
    return min(1.0, math.sqrt(chi_square) / 2 + n * 2.0**-128)


def _chunks(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _draw(
    law: Callable[[NoiseSource, Fraction, NDArray[np.int64]], None],
    source: NoiseSource,
    scale: float,
    size: int,
    max_scale: float,
) -> NDArray[np.int64]:
    if not MIN_SCALE <= scale <= max_scale:
        bounds = f"[{MIN_SCALE}, 2^{math.log2(max_scale):.0f}]"
        raise ValueError(f"the noise scale must lie in {bounds}, got {scale}; choose another grid")
    if size < 0:
        raise ValueError(f"size must be 0 or more, got {size}")
    noise = np.empty(size, np.int64)
    for chunk in _chunks(size, CHUNK):
        law(source, Fraction(scale) ** 2, noise[chunk])
    return noise


def _gaussian(source: NoiseSource, variance: Fraction, out: NDArray[np.int64]) -> None:
    large = variance > MAX_TABLE_SCALE**2
    _table(_gaussian_weights, Fraction(FINE_SCALE**2) if large else variance).draw(source, out)
    if large:
        coarse = np.empty_like(out)
        _gaussian(source, (variance - FINE_SCALE**2) / STRIDE**2, coarse)
        out += STRIDE * coarse


def _skellam(source: NoiseSource, variance: Fraction, out: NDArray[np.int64]) -> None:
    parts = math.ceil(variance / MAX_SKELLAM_TABLE_SCALE**2)
    table = _table(_skellam_weights, variance / parts)
    table.draw(source, out)
    for _ in range(parts - 1):
        part = np.empty_like(out)
        table.draw(source, part)
        out += part


@dataclass(frozen=True, eq=False)
class _Table:
    """Holds P[X <= x] for x = -reach, ..., reach - 1, as 256-bit fractions and as their top words."""

    reach: int
    cumulative: list[int]
    tops: NDArray[np.uint64]
    guide: NDArray[np.int32]  # By a word's leading bits: how many tops are below it, or -1 if one shares them.
    guide_shift: np.uint64

    def draw(self, source: NoiseSource, out: NDArray[np.int64]) -> None:
        for block in _chunks(len(out), BLOCK):
            words = source.words(block.stop - block.start)
            # Viewed as signed because numpy would copy any other index; no shifted word is negative.
            below: NDArray[np.int32] = self.guide[(words >> self.guide_shift).view(np.int64)]
            # Searching for every word takes four times as long; at scale 512 the guide leaves 1 in 20.
            searched = np.flatnonzero(below < 0)
            found = np.searchsorted(self.tops, words[searched])
            below[searched] = found
            # A word equal to a top could lie on either side of it. The last top is 2^64 - 1: `found` is never past it.
            undecided = searched[self.tops[found] == words[searched]]
            refinements = source.words(REFINING_WORDS * len(undecided)).reshape(-1, REFINING_WORDS)
            for position, refinement in zip(undecided, refinements, strict=True):
                fraction = int(words[position])
                for word in refinement:
                    fraction = fraction << WORD_BITS | int(word)
                below[position] = bisect_right(self.cumulative, fraction)
            np.subtract(below, self.reach, out=out[block])


@lru_cache(maxsize=16)  # Under 12 MB each.
def _table(weights_of: Callable[[Fraction], list[int]], variance: Fraction) -> _Table:
    weights = weights_of(variance)
    sums = list(accumulate(weights[:0:-1] + weights))
    cumulative = [(partial << CUMULATIVE_BITS) // sums[-1] for partial in sums[:-1]]
    tops = np.array([entry >> (CUMULATIVE_BITS - WORD_BITS) for entry in cumulative], np.uint64)
    # Four to eight leading values a top: with more, the largest table's guide would outgrow the cache.
    guide_bits = max(16, len(tops).bit_length() + 2)
    guide_shift = np.uint64(WORD_BITS - guide_bits)
    sharing = np.bincount((tops >> guide_shift).astype(np.int64), minlength=2**guide_bits)
    guide = np.where(sharing, -1, np.cumsum(sharing)).astype(np.int32)
    return _Table(len(weights) - 1, cumulative, tops, guide, guide_shift)


def _gaussian_weights(variance: Fraction) -> list[int]:
    """Return P[x] / P[0] of N_Z(0, variance) for x = 0, ..., reach, in steps of 2^-384."""
    context = mpmath.MPContext()  # Not mpmath.mp: all threads share its precision.
    context.prec = WORKING_BITS + WORD_BITS
    rate = context.mpf(variance.denominator) / (2 * variance.numerator)
    ratio, ratio_step = (int(context.ldexp(context.exp(-n * rate), WORKING_BITS)) for n in (1, 2))

    weights = [1 << WORKING_BITS]
    # exp(-rate (x + 1)^2) = exp(-rate x^2) ratio_x with ratio_x = exp(-rate (2 x + 1)): 2 log2(13.4 * 1024) bits lost.
    for _ in range(math.ceil(TAIL_SCALES * math.sqrt(variance))):
        weights.append(weights[-1] * ratio >> WORKING_BITS)
        ratio = ratio * ratio_step >> WORKING_BITS
    return weights


def _skellam_weights(variance: Fraction) -> list[int]:
    """Return P[x] of the Skellam law for x = 0, ..., reach, up to one factor.

    Miller's backward recurrence, I_{x-1}(v) = I_{x+1}(v) + (2 x / v) I_x(v) from (0, 1) at (N + 1, N), gives I_x up to
    a factor and to -+ I_{N+1} K_x / K_{N+1}, which is at most I_{N+1} as K_x grows with x. N is chosen so that
    I_{N+1} / I_0 <= 2^-320 / P[0], and P[0] > 2^-15, as the mode of a law that has 8/9 of its mass within 3 scales.

    All terms are positive, so relative errors do not grow, only add up, one a step. The second value is 2 N / v > 2^-7
    times the first and none is smaller, so each error is below 2^-377: fewer than 24 bits are lost in N < 2^17 steps.
    """
    reach, start = (_skellam_reach(variance, bits) for bits in (SKELLAM_TAIL_BITS, SKELLAM_START_BITS))
    above, weights = 0, [1 << WORKING_BITS]
    for x in range(start, 0, -1):
        here = weights[-1]
        weights.append(above + here * (2 * x * variance.denominator) // variance.numerator)
        above = here
    return weights[::-1][: reach + 1]


def _skellam_reach(variance: Fraction, bits: int) -> int:
    """Return an x with P[|X| > x] <= 2^-bits, by Bernstein's inequality.

    With v the variance and 0 <= t < 3, log E[exp(t X)] = v (cosh t - 1) <= v (t^2 / 2) / (1 - t / 3), termwise, so that
    P[|X| >= x] <= 2 exp(-x^2 / (2 (v + x / 3))); x solves for 2^-bits. A Gaussian's tail would be too light: at scale 1
    the law keeps 2^-127 beyond 27 scales. The ceiling is a margin that no float rounding here uses up.
    """
    nats = (bits + 1) * math.log(2)
    return math.ceil(nats / 3 + math.sqrt(nats**2 / 9 + 2 * nats * variance))

"""Noise has exactly the law it claims, not one near it; its sources share no word with a fork, a copy or a sibling."""

import copy
import hashlib
import math
import os
import pickle
import threading
from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from privacy.noise import (
    CHUNK,
    WORDS_PER_KEY,
    Keystream,
    NoiseSource,
    OsNoise,
    SeededNoise,
    discrete_gaussian,
    discretisation_tv,
    poisson_sample,
    skellam,
)

ACCEPT = 1e-3  # A p-value above it accepts; the streams are seeded, so a verdict never changes.
REJECT = 1e-9


class ScriptedNoise:
    """Hands out the given words in order; fails when asked for more."""

    kind = "scripted"

    def __init__(self, *script: int) -> None:
        self.script = list(script)

    def words(self, count: int) -> NDArray[np.uint64]:
        assert count <= len(self.script)
        drawn, self.script = self.script[:count], self.script[count:]
        return np.array(drawn, np.uint64)


# The laws, worked out apart from the module: mpmath at 400 bits.


@lru_cache(maxsize=64)
def pmf(scale: float, reach: int) -> list[mpmath.mpf]:
    """P[X = x] of N_Z(0, scale^2) for x = 0, ..., reach."""
    with mpmath.workprec(400):
        weights = [mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(scale) ** 2)) for x in range(reach + 1)]
        total = 2 * mpmath.fsum(weights) - 1
        return [weight / total for weight in weights]


@lru_cache(maxsize=64)
def cumulative(scale: float) -> dict[int, int]:
    """floor(2^256 P[X <= x]) of N_Z(0, scale^2) cut at 13.4 scales, for every x kept."""
    reach = math.ceil(13.4 * scale)
    half = pmf(scale, reach)
    partial, entries = mpmath.mpf(0), {-reach - 1: 0}
    with mpmath.workprec(400):
        for x in range(-reach, reach):
            partial += half[abs(x)]
            entries[x] = int(mpmath.floor(mpmath.ldexp(partial, 256)))
    return entries | {reach: 2**256}


def floats(scale: float, reach: int) -> NDArray[np.float64]:
    """The pmf at -reach, ..., reach."""
    half = np.array([float(p) for p in pmf(scale, reach)])
    return np.concatenate([half[:0:-1], half])


@lru_cache(maxsize=64)
def skellam_pmf(scale: float, reach: int) -> list[int]:
    """2^400 P[X = x] of the difference of two Poissons of mean scale^2 / 2, x = 0, ..., reach, by summing over both."""
    with mpmath.workprec(500):
        mean = mpmath.mpf(scale) ** 2 / 2
        poisson = [mpmath.exp(-mean)]
        while len(poisson) < mean or poisson[-1] > mpmath.mpf(2) ** -400:
            poisson.append(poisson[-1] * mean / len(poisson))
        p = [int(mpmath.ldexp(mass, 450)) for mass in poisson]
    return [sum(map(int.__mul__, p, p[x:])) >> 500 for x in range(reach + 1)]


@lru_cache(maxsize=64)
def skellam_cumulative(scale: float) -> dict[int, int]:
    """floor(2^256 P[X <= x]) of the Skellam law, cut where Bernstein's inequality gives 2^-137, for every x kept."""
    nats = 138 * math.log(2)
    reach = math.ceil(nats / 3 + math.sqrt((nats / 3) ** 2 + 2 * nats * scale**2))
    half = skellam_pmf(scale, reach)
    total, partial, entries = 2 * sum(half) - half[0], 0, {-reach - 1: 0}
    for x in range(-reach, reach):
        partial += half[abs(x)]
        entries[x] = (partial << 256) // total
    return entries | {reach: 2**256}


def skellam_floats(scale: float, reach: int) -> NDArray[np.float64]:
    """The pmf at -reach, ..., reach."""
    half = np.array([math.ldexp(p, -400) for p in skellam_pmf(scale, reach)])
    return np.concatenate([half[:0:-1], half])


def scipy_skellam_floats(scale: float, reach: int) -> NDArray[np.float64]:
    pmf: NDArray[np.float64] = stats.skellam.pmf(np.arange(-reach, reach + 1), scale**2 / 2, scale**2 / 2)
    return pmf


def chi_square_p(sample: NDArray[np.int64], law: NDArray[np.float64]) -> float:
    """p-value of the sample under the law of -reach, ..., reach; values expected below ten times go to the two ends."""
    reach = law.size // 2
    expected = law * sample.size
    counts = np.bincount(np.clip(sample, -reach, reach) + reach, minlength=2 * reach + 1)
    kept = np.flatnonzero(expected >= 10)
    edges = [0, *range(kept[0] + 1, kept[-1] + 1)]
    observed, pooled = np.add.reduceat(counts, edges), np.add.reduceat(expected, edges)
    return float(stats.chisquare(observed, pooled * observed.sum() / pooled.sum()).pvalue)


class TestDiscreteGaussian:
    @settings(max_examples=50)
    @given(scale=st.floats(0.1, 6), words=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
    def test_every_word_is_inverted_through_the_exact_cumulative_probabilities(
        self, scale: float, words: list[int]
    ) -> None:
        law, refinement = cumulative(scale), [2**63, 5, 7]
        source = ScriptedNoise(*words, *refinement * len(words))
        for word, x in zip(words, discrete_gaussian(source, scale, len(words)).tolist(), strict=True):
            fraction = sum(part << shift for part, shift in zip([word, *refinement], (192, 128, 64, 0), strict=True))
            assert law[x - 1] <= fraction < law[x]

    @pytest.mark.parametrize("scale", [0.5, 3, 40.25])
    @pytest.mark.parametrize("x", [-3, -1, 0, 2])
    def test_a_word_on_a_boundary_is_decided_by_192_further_bits(self, scale: float, x: int) -> None:
        boundary = cumulative(scale)[x]
        for fraction, drawn in [(boundary - 1, x), (boundary, x + 1)]:
            words = [fraction >> shift & 2**64 - 1 for shift in (192, 128, 64, 0)]
            source = ScriptedNoise(words[0], 2**63, *words[1:])
            middle = int(discrete_gaussian(ScriptedNoise(2**63), scale, 1)[0])
            assert discrete_gaussian(source, scale, 2).tolist() == [drawn, middle]
            assert source.script == []

    @pytest.mark.parametrize("scale", [0.5, 3, 200])
    def test_the_extreme_words_reach_the_ends_of_a_support_that_misses_less_than_two_to_the_minus_133(
        self, scale: float
    ) -> None:
        lowest, highest = discrete_gaussian(ScriptedNoise(0, 2**64 - 1, *[0] * 3, *[2**64 - 1] * 3), scale, 2).tolist()
        assert lowest == -highest
        inside = pmf(scale, math.ceil(20 * scale) + 4)[: highest + 1]
        with mpmath.workprec(400):
            assert 1 - (2 * mpmath.fsum(inside) - inside[0]) < mpmath.mpf(2) ** -133

    @pytest.mark.parametrize("scale", [3.0, 40.0])
    def test_the_right_scale_is_accepted_and_one_3_percent_off_is_rejected_either_way(self, scale: float) -> None:
        sample = discrete_gaussian(SeededNoise(1, "chi-square"), scale, 200_000)
        assert chi_square_p(sample, floats(scale, math.ceil(8 * scale))) > ACCEPT
        assert chi_square_p(sample, floats(0.97 * scale, math.ceil(8 * scale))) < REJECT
        assert chi_square_p(sample, floats(1.03 * scale, math.ceil(8 * scale))) < REJECT

    @pytest.mark.parametrize("scale", [5000.0, 2.0**20, 2.0**30, 2.0**40])
    def test_large_scales_are_normal_and_one_3_percent_off_is_rejected_either_way(self, scale: float) -> None:
        sample = discrete_gaussian(SeededNoise(2, "kolmogorov"), scale, 400_000)
        p_value = {
            ratio: stats.kstest(sample / (ratio * scale), "norm", method="asymp").pvalue for ratio in (0.97, 1.0, 1.03)
        }
        assert p_value[1.0] > ACCEPT
        assert max(p_value[0.97], p_value[1.03]) < REJECT

    @pytest.mark.parametrize("scale", [0.5, 3.0, 512.0, 1024.0, 1024.5, 5000.0, 2.0**20, 2.0**30])
    def test_the_variance_is_right_within_sampling_error(self, scale: float) -> None:
        sample = discrete_gaussian(SeededNoise(3, "variance"), scale, 400_000) / scale
        x = np.arange(-20, 21)
        expected = 1.0 if scale >= 3 else float(floats(scale, 20) @ (x / scale) ** 2)
        deviation = math.sqrt(float(np.var(sample**2)) / sample.size)
        assert abs(float(np.mean(sample**2)) - expected) < 4 * deviation
        assert abs(float(np.mean(sample))) < 4 / math.sqrt(sample.size)

    @pytest.mark.parametrize("scale", [1500.0, 2.0**20])
    def test_a_large_scale_favours_no_residue(self, scale: float) -> None:
        # A fine part too narrow for its stride would leave the normal shape right and the low-order bits wrong.
        sample = discrete_gaussian(SeededNoise(4, "residue"), scale, 400_000)
        assert stats.chisquare(np.bincount(sample % 256, minlength=256)).pvalue > ACCEPT

    @pytest.mark.parametrize("k", range(0, 25, 4))
    def test_a_large_draw_is_a_fine_one_and_128_times_a_coarse_one_whose_variances_add_up(self, k: int) -> None:
        # 16 + coarse^2 = (8 * 2^k + 2^-k / 2)^2: a family in which both scales are floats.
        coarse = 8 * 2.0**k - 2.0**-k / 2
        scale = 128 * (8 * 2.0**k + 2.0**-k / 2)
        assert Fraction(scale) ** 2 == 512**2 + 128**2 * Fraction(coarse) ** 2
        parts = SeededNoise(5, k)
        expected = discrete_gaussian(parts, 512, 100) + 128 * discrete_gaussian(parts, coarse, 100)
        np.testing.assert_array_equal(discrete_gaussian(SeededNoise(5, k), scale, 100), expected)

    @pytest.mark.parametrize(("s1", "k", "s2"), [(6, 2, 3), (6, 4, 3), (2, 2, 2), (1, 2, 0.7)])
    def test_a_strided_sum_has_the_stated_law_in_miniature(self, s1: int, k: int, s2: float) -> None:
        scale = math.sqrt(s1**2 + (k * s2) ** 2)
        with mpmath.workprec(400):
            variance = mpmath.mpf(s1) ** 2 + (k * mpmath.mpf(s2)) ** 2
            tau_square = (s1 * mpmath.mpf(s2)) ** 2 / variance
            theta = 2 * mpmath.nsum(lambda n: mpmath.exp(-2 * mpmath.pi**2 * n**2 * tau_square), [1, mpmath.inf])
            fine, coarse = pmf(s1, 40 * s1), pmf(s2, math.ceil(40 * s2))
            weights = [mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * variance)) for x in range(math.ceil(30 * scale))]
            total = 2 * mpmath.fsum(weights) - 1
            ratios = []
            for x in range(math.ceil(3 * scale)):
                terms = [(abs(x - k * y), abs(y)) for y in range(1 - len(coarse), len(coarse))]
                law = mpmath.fsum(fine[i] * coarse[j] for i, j in terms if i < len(fine))
                ratios.append(law * total / weights[x])
            assert max(ratios) <= (1 + theta) / (1 - theta)
            assert min(ratios) >= (1 - theta) / (1 + theta)
            assert max(ratios) / min(ratios) > 1 + theta / 2  # The bound is not idle: the law does deviate this much.

    def test_chunks_continue_one_stream_at_table_scales(self) -> None:
        whole = discrete_gaussian(SeededNoise(5), 3.0, CHUNK + 10)
        source = SeededNoise(5)
        parts = [discrete_gaussian(source, 3.0, size) for size in (CHUNK, 10)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))

    @pytest.mark.parametrize("scale", [0.5, 2.0**20])
    @pytest.mark.parametrize("size", [0, 1, 7])
    def test_returns_int64_of_the_size_asked_for(self, scale: float, size: int) -> None:
        noise = discrete_gaussian(SeededNoise(6), scale, size)
        assert noise.dtype == np.int64
        assert noise.shape == (size,)

    def test_a_seeded_draw_never_changes(self) -> None:
        # Pinned from the first release: a change here changes every simulated result.
        assert discrete_gaussian(SeededNoise(42, "golden"), 300.0, 4).tolist() == [-321, -159, 291, 87]
        strided = discrete_gaussian(SeededNoise(42, "golden"), 2.0**20, 4)
        assert strided.tolist() == [815836, 1993585, 1128688, 1044500]


class TestSkellam:
    @settings(max_examples=50)
    @given(scale=st.floats(0.1, 6), words=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
    def test_every_word_is_inverted_through_the_exact_cumulative_probabilities(
        self, scale: float, words: list[int]
    ) -> None:
        law, refinement = skellam_cumulative(scale), [2**63, 5, 7]
        source = ScriptedNoise(*words, *refinement * len(words))
        for word, x in zip(words, skellam(source, scale, len(words)).tolist(), strict=True):
            fraction = sum(part << shift for part, shift in zip([word, *refinement], (192, 128, 64, 0), strict=True))
            assert law[x - 1] <= fraction < law[x]

    @pytest.mark.parametrize("scale", [0.5, 3, 40.25])
    @pytest.mark.parametrize("x", [-3, -1, 0, 2])
    def test_a_word_on_a_boundary_is_decided_by_192_further_bits(self, scale: float, x: int) -> None:
        boundary = skellam_cumulative(scale)[x]
        for fraction, drawn in [(boundary - 1, x), (boundary, x + 1)]:
            words = [fraction >> shift & 2**64 - 1 for shift in (192, 128, 64, 0)]
            source = ScriptedNoise(words[0], 2**63, *words[1:])
            assert skellam(source, scale, 2).tolist() == [drawn, 0]
            assert source.script == []

    @pytest.mark.parametrize("scale", [0.1, 1, 3, 200, 4096])
    def test_the_extreme_words_reach_the_ends_of_a_support_that_misses_less_than_two_to_the_minus_136(
        self, scale: float
    ) -> None:
        ends = skellam(ScriptedNoise(0, 2**64 - 1, *[0] * 3, *[2**64 - 1] * 3), scale, 2)
        assert ends[0] < 0 < ends[1]
        mean, reach = scale**2 / 2, int(np.abs(ends).min())  # Below 2^-256 nothing is drawn from the lower end.
        k = np.arange(max(0, math.floor(mean - reach)), math.ceil(mean + reach) + 50)
        log_p = [
            float(special.logsumexp(stats.poisson.logpmf(k, mean) + stats.poisson.logpmf(k + x, mean)))
            for x in (reach + 1, reach + 2)
        ]
        # The ratios of successive probabilities fall, so the tail is below a geometric series.
        tail_bits = (math.log(2) + log_p[0] - math.log(-math.expm1(log_p[1] - log_p[0]))) / math.log(2)
        assert tail_bits < -136

    @pytest.mark.parametrize("law", [skellam_floats, scipy_skellam_floats])
    @pytest.mark.parametrize("scale", [3.0, 30.0])
    def test_the_right_scale_is_accepted_and_one_2_percent_off_is_rejected_either_way(
        self, law: Callable[[float, int], NDArray[np.float64]], scale: float
    ) -> None:
        sample, reach = skellam(SeededNoise(1, "chi-square"), scale, 400_000), math.ceil(8 * scale)
        assert chi_square_p(sample, law(scale, reach)) > ACCEPT
        assert chi_square_p(sample, law(0.98 * scale, reach)) < REJECT
        assert chi_square_p(sample, law(1.02 * scale, reach)) < REJECT

    def test_is_told_from_a_discrete_gaussian_of_equal_variance_either_way(self) -> None:
        ours, gaussian = (draw(SeededNoise(1, "shape"), 2.0, 200_000) for draw in (skellam, discrete_gaussian))
        assert chi_square_p(ours, skellam_floats(2.0, 16)) > ACCEPT
        assert chi_square_p(ours, floats(2.0, 16)) < REJECT
        assert chi_square_p(gaussian, skellam_floats(2.0, 16)) < REJECT

    @pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0, 300.0, 4096.0, 5000.0, 12_288.0])
    def test_the_variance_and_the_excess_kurtosis_of_one_over_it_are_right_within_sampling_error(
        self, scale: float
    ) -> None:
        sample = skellam(SeededNoise(3, "moments"), scale, 200_000).astype(np.float64)
        for power, expected in [(1, 0.0), (2, scale**2), (4, 3 * scale**4 + scale**2)]:
            deviation = float(np.std(sample**power)) / math.sqrt(sample.size)
            assert abs(float(np.mean(sample**power)) - expected) < 4 * deviation
            if power == 2 and scale >= 1:
                assert min(abs(deviation + (ratio**2 - 1) * expected) for ratio in (0.98, 1.02)) > 6 * deviation

    @pytest.mark.parametrize(
        ("draw", "scale"),
        [
            *((discrete_gaussian, scale) for scale in (1.0, 300.0, 1024.0)),
            *((skellam, scale) for scale in (1.0, 300.0, 3000.0, 4096.0)),
        ],
    )
    def test_a_larger_word_never_gives_a_smaller_draw_from_a_table_of_any_size(
        self, draw: Callable[[NoiseSource, float, int], NDArray[np.int64]], scale: float
    ) -> None:
        order = np.argsort(SeededNoise(9).words(100_000))
        assert np.all(np.diff(draw(SeededNoise(9), scale, 100_000)[order]) >= 0)

    @pytest.mark.parametrize(("scale", "part", "parts"), [(8192, 4096, 4), (8001, 4000.5, 4), (12_288, 4096, 9)])
    def test_a_large_draw_is_the_sum_of_equal_ones_whose_variances_add_up(
        self, scale: float, part: float, parts: int
    ) -> None:
        source = SeededNoise(5)
        expected = sum(skellam(source, part, 100) for _ in range(parts))
        np.testing.assert_array_equal(skellam(SeededNoise(5), scale, 100), expected)

    def test_chunks_continue_one_stream_at_table_scales(self) -> None:
        whole = skellam(SeededNoise(5), 3.0, CHUNK + 10)
        source = SeededNoise(5)
        np.testing.assert_array_equal(whole, np.concatenate([skellam(source, 3.0, size) for size in (CHUNK, 10)]))

    @pytest.mark.parametrize("scale", [0.5, 2.0**16])
    @pytest.mark.parametrize("size", [0, 1, 7])
    def test_returns_int64_of_the_size_asked_for(self, scale: float, size: int) -> None:
        noise = skellam(SeededNoise(6), scale, size)
        assert noise.dtype == np.int64
        assert noise.shape == (size,)

    @pytest.mark.parametrize("scale", [0.5, 3.0, 40.25])
    def test_a_seeded_draw_is_what_bisection_in_the_exact_law_gives(self, scale: float) -> None:
        law = skellam_cumulative(scale)
        values, tops = list(law), [entry >> 192 for entry in law.values()]
        words = SeededNoise(42, "golden").words(2000).tolist()
        expected = [values[bisect_right(tops, word)] for word in words]  # No word is a top, or a draw more is needed.
        assert skellam(SeededNoise(42, "golden"), scale, 2000).tolist() == expected

    def test_a_seeded_draw_never_changes(self) -> None:
        # Pinned when written: a change here changes every simulated result.
        assert skellam(SeededNoise(42, "golden"), 3.0, 6).tolist() == [-3, -2, 3, 1, 3, 4]
        assert skellam(SeededNoise(42, "golden"), 300.0, 4).tolist() == [-321, -159, 291, 87]
        assert skellam(SeededNoise(42, "golden"), 5000.0, 4).tolist() == [-404, 3161, 7723, 793]


class TestPoissonSample:
    @given(count=st.integers(0, 50), rate=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 2**64))
    def test_picks_sorted_distinct_indices_in_range(self, count: int, rate: float, seed: int) -> None:
        picked = poisson_sample(SeededNoise(seed), count, rate)
        assert picked.dtype == np.int64
        assert np.all(np.diff(picked) > 0)
        assert np.all((picked >= 0) & (picked < count))

    @given(rate=st.floats(2**-64, 1))
    def test_picks_exactly_the_words_below_the_rate_rounded_down(self, rate: float) -> None:
        threshold = math.floor(Fraction(rate) * 2**64)
        source = ScriptedNoise(threshold - 1, min(threshold, 2**64 - 1))
        assert poisson_sample(source, 2, rate).tolist() == ([0, 1] if rate == 1 else [0])

    def test_rate_one_picks_everyone_and_a_vanishing_rate_no_one(self) -> None:
        assert poisson_sample(ScriptedNoise(0, 2**63, 2**64 - 1), 3, 1.0).tolist() == [0, 1, 2]
        assert poisson_sample(ScriptedNoise(0, 2**63, 2**64 - 1), 3, 5e-324).tolist() == []

    def test_counts_are_binomial_and_a_rate_3_percent_off_is_rejected_either_way(self) -> None:
        count, rate = 3 * CHUNK + 5, 0.1
        picked = poisson_sample(SeededNoise(7), count, rate)
        p_value = {ratio: stats.binomtest(picked.size, count, ratio * rate).pvalue for ratio in (0.97, 1.0, 1.03)}
        assert p_value[1.0] > ACCEPT
        assert max(p_value[0.97], p_value[1.03]) < REJECT
        # Nor is any part of the range favoured, across chunks.
        assert stats.kstest(picked / count, "uniform", method="asymp").pvalue > ACCEPT


@lru_cache
def exact_tv_and_chi_square(scale: int) -> tuple[float, float]:
    """TV and chi-square of round(N(0, scale^2 - 1/12)) from N_Z(0, scale^2)."""
    with mpmath.workprec(200):
        sigma = mpmath.sqrt(mpmath.mpf(scale) ** 2 - mpmath.mpf(1) / 12)
        discrete = pmf(scale, 14 * scale)
        edge = [mpmath.ncdf(-(x - mpmath.mpf(1) / 2) / sigma) for x in range(len(discrete) + 1)]
        gaps = [(edge[x] - edge[x + 1] - p, 1 if x == 0 else 2, p) for x, p in enumerate(discrete)]
        tv = mpmath.fsum(times * abs(gap) for gap, times, _ in gaps) / 2
        return float(tv), float(mpmath.fsum(times * gap**2 / p for gap, times, p in gaps))


class TestDiscretisationTv:
    @pytest.mark.parametrize("scale", [4, 8, 16])
    def test_doubling_the_scale_divides_the_distance_by_sixteen(self, scale: int) -> None:
        (tv, chi_square), (halved, _) = exact_tv_and_chi_square(scale), exact_tv_and_chi_square(2 * scale)
        assert tv / halved == pytest.approx(16, rel=0.01)
        assert tv == pytest.approx(2.8006 / 5760 / scale**4, rel=0.01)  # E|He_4| / (2 * 2880 s^4)
        assert chi_square == pytest.approx(1 / (345_600 * scale**8), rel=1e-4)

    @pytest.mark.parametrize("scale", [16, 32])
    def test_bounds_the_exact_distance_of_one_coordinate_within_a_factor_of_two(self, scale: int) -> None:
        tv, chi_square = exact_tv_and_chi_square(scale)
        assert tv < discretisation_tv(scale, 1, 1) < 2 * tv
        assert math.sqrt(chi_square) / 2 < discretisation_tv(scale, 1, 1)

    @pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 2.0])
    def test_the_discrete_mechanism_is_private_as_stated_though_not_as_private_as_the_continuous_one(
        self, epsilon: float
    ) -> None:
        scale, shift, reach = 16, 16, 400
        law = floats(scale, reach)
        discrete = float(np.maximum(law[shift:] - math.exp(epsilon) * law[:-shift], 0).sum())
        ratio = shift / math.sqrt(scale**2 - 1 / 12)
        near, far = (float(stats.norm.cdf(half - epsilon / ratio)) for half in (ratio / 2, -ratio / 2))
        continuous = near - math.exp(epsilon) * far
        assert discrete <= continuous + (1 + math.exp(epsilon)) * discretisation_tv(scale, 1, 1)

    @given(scale=st.floats(16, 2**40), coordinates=st.integers(0, 2**40), draws=st.integers(0, 2**20))
    def test_is_a_distance_that_grows_with_every_release_and_no_faster_than_their_number(
        self, scale: float, coordinates: int, draws: int
    ) -> None:
        tv = discretisation_tv(scale, coordinates, draws)
        assert coordinates * draws * 2.0**-128 <= tv <= 1
        assert tv <= discretisation_tv(scale, coordinates, draws + 1)
        assert tv <= coordinates * draws * discretisation_tv(scale, 1, 1) * (1 + 1e-12)
        assert tv == discretisation_tv(scale, draws, coordinates)

    def test_is_negligible_where_it_is_used_and_vacuous_where_it_must_be(self) -> None:
        assert discretisation_tv(2.0**16, 10**7, 10**3) < 1e-17
        assert discretisation_tv(16, 10**16, 10**4) == 1


class NoiseSourceContract:
    """What every source of words does."""

    kind: str

    def make(self) -> NoiseSource:
        raise NotImplementedError

    def test_states_its_kind(self) -> None:
        assert self.make().kind == self.kind

    @pytest.mark.parametrize("count", [0, 1, 1000])
    def test_returns_as_many_words_as_asked_for(self, count: int) -> None:
        words = self.make().words(count)
        assert words.dtype == np.uint64
        assert words.shape == (count,)

    def test_never_repeats_a_word(self) -> None:
        source = self.make()
        assert np.unique(np.concatenate([source.words(5000) for _ in range(4)])).size == 20_000

    def test_sets_every_bit_half_the_time(self) -> None:
        words = self.make().words(20_000)
        share = [float(np.mean(words >> np.uint64(bit) & np.uint64(1))) for bit in range(64)]
        assert max(abs(s - 0.5) for s in share) < 8 / math.sqrt(4 * 20_000)  # 8 deviations: never for a sound source.


class TestSeededNoise(NoiseSourceContract):
    kind = "seeded-simulation"

    def make(self) -> NoiseSource:
        return SeededNoise(42, "site-a", 3)

    def test_repeats_itself_however_the_words_are_asked_for(self) -> None:
        first, second = self.make(), self.make()
        whole = first.words(100)
        np.testing.assert_array_equal(whole, np.concatenate([second.words(n) for n in (1, 0, 33, 66)]))

    def test_equals_aes_in_counter_mode_computed_block_by_block(self) -> None:
        key = hashlib.sha256(b'fedchorus/seeded-noise/v1\0[42,"site-a",3]').digest()
        encryptor = Cipher(AES(key), ECB()).encryptor()
        blocks = b"".join(encryptor.update(block.to_bytes(16, "big")) for block in range(5))
        expected = [int.from_bytes(blocks[i : i + 8], "little") for i in range(0, 80, 8)]
        assert self.make().words(10).tolist() == expected

    def test_different_arguments_give_unrelated_streams(self) -> None:
        sources = [
            SeededNoise(1),
            SeededNoise(2),
            SeededNoise(-1),
            SeededNoise(1, 2),
            SeededNoise(12),
            SeededNoise(1, "2"),
            SeededNoise(1, "ab", "c"),
            SeededNoise(1, "a", "bc"),
            SeededNoise(1, 'a","bc'),
            SeededNoise(1, "abc"),
            SeededNoise(1, "c", "ab"),
        ]
        assert len({int(word) for source in sources for word in source.words(4)}) == 4 * len(sources)


def test_the_keystream_is_the_published_aes_256_counter_mode() -> None:
    # NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt).
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plaintext = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    ciphertext = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = Keystream(key, counter=bytes(range(0xF0, 0x100))).words(8)
    assert bytes(a ^ b for a, b in zip(plaintext, stream.astype("<u8").tobytes(), strict=True)) == ciphertext


def words_in_a_fork(source: NoiseSource, count: int) -> list[int]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, source.words(count).astype("<u8").tobytes())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        words = np.frombuffer(pipe.read(), "<u8").tolist()
    os.waitpid(child, 0)
    return [int(word) for word in words]


class TestOsNoise(NoiseSourceContract):
    kind = "os"

    def make(self) -> NoiseSource:
        return OsNoise()

    def test_a_forked_child_draws_words_of_its_own(self) -> None:
        source, control = OsNoise(), SeededNoise(8)
        source.words(1), control.words(1)
        assert words_in_a_fork(control, 4) == control.words(4).tolist()  # This is what sharing a key looks like.
        children = [words_in_a_fork(source, 4) for _ in range(2)]
        words = [*children[0], *children[1], *source.words(4).tolist()]
        assert len(set(words)) == 12

    def test_two_sources_draw_different_words(self) -> None:
        assert not set(OsNoise().words(100).tolist()) & set(OsNoise().words(100).tolist())

    def test_threads_sharing_a_source_draw_different_words(self) -> None:
        source, drawn = OsNoise(), list[int]()
        threads = [threading.Thread(target=lambda: drawn.extend(source.words(1000).tolist())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(drawn)) == 8000

    def test_takes_a_fresh_key_after_its_allowance_of_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Patched because a key is invisible by design: entropy requests are the only trace of re-keying.
        requests: list[int] = []
        entropy = os.urandom

        def counted(size: int) -> bytes:
            requests.append(size)
            return entropy(size)

        monkeypatch.setattr(os, "urandom", counted)
        source = OsNoise()
        for _ in range(WORDS_PER_KEY // 2**20):
            source.words(2**20)
        assert requests == [48]
        source.words(1)
        assert requests == [48, 48]

    @pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_cannot_be_duplicated(self, duplicate: Callable[[OsNoise], object]) -> None:
        source = OsNoise()
        source.words(1)
        with pytest.raises(TypeError, match=r"make a new OsNoise\(\)"):
            duplicate(source)

    def test_shows_nothing_of_its_state(self) -> None:
        source = OsNoise()
        source.words(1)
        assert repr(source) == "OsNoise()"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda noise: discrete_gaussian(noise, 0.0, 1), "scale"),
        (lambda noise: discrete_gaussian(noise, -3.0, 1), "scale"),
        (lambda noise: discrete_gaussian(noise, 0.09, 1), "scale"),
        (lambda noise: discrete_gaussian(noise, 2.0**41, 1), "scale"),
        (lambda noise: discrete_gaussian(noise, math.inf, 1), "scale"),
        (lambda noise: discrete_gaussian(noise, math.nan, 1), "scale"),
        (lambda noise: discrete_gaussian(noise, 3.0, -1), "size"),
        (lambda noise: skellam(noise, 0.0, 1), "scale"),
        (lambda noise: skellam(noise, -3.0, 1), "scale"),
        (lambda noise: skellam(noise, 0.09, 1), "scale"),
        (lambda noise: skellam(noise, 2.0**16 + 1, 1), r"scale must lie in \[0\.1, 2\^16\], got 65537"),
        (lambda noise: skellam(noise, math.inf, 1), "scale"),
        (lambda noise: skellam(noise, math.nan, 1), "scale"),
        (lambda noise: skellam(noise, 3.0, -1), "size"),
        (lambda noise: poisson_sample(noise, 1, 0.0), "rate"),
        (lambda noise: poisson_sample(noise, 1, -0.1), "rate"),
        (lambda noise: poisson_sample(noise, 1, 1.001), "rate"),
        (lambda noise: poisson_sample(noise, 1, math.nan), "rate"),
        (lambda noise: poisson_sample(noise, -1, 0.5), "count"),
        (lambda noise: discretisation_tv(15.9, 1, 1), "scales"),
        (lambda noise: discretisation_tv(2.0**41, 1, 1), "scales"),
        (lambda noise: discretisation_tv(math.nan, 1, 1), "scales"),
        (lambda noise: discretisation_tv(16.0, -1, 1), "coordinates"),
        (lambda noise: discretisation_tv(16.0, 1, -1), "draws"),
    ],
)
def test_refuses_what_it_cannot_do_exactly_before_drawing_a_word(
    call: Callable[[NoiseSource], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(ScriptedNoise())

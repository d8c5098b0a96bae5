"""Distributed noise costs what its papers say, and never less than the divergence of the laws that are really drawn."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ive, logsumexp

from privacy.distributed import (
    BETA,
    ORDERS,
    DistributedNoise,
    Mechanism,
    bits_needed,
    discrete_gaussian_epsilon,
    discrete_gaussian_rdp,
    noise_for_bits,
    zcdp_epsilon,
)
from privacy.errors import UnsupportedEvent

Law = NDArray[np.float64]
DELTA = 1e-5
# One unit of a grid of 1, without slack for the rounding: in one dimension the norm after rounding is then `shift`.
NO_SLACK = 1 - 2.0**-53
MECHANISMS: tuple[Mechanism, ...] = ("discrete_gaussian", "skellam")


def noise(mechanism: Mechanism = "discrete_gaussian", **settings: Any) -> DistributedNoise:
    some: dict[str, Any] = {
        "clients": 100,
        "dimension": 2**16,
        "clip_norm": 1.0,
        "granularity": 1.5e-4,
        "local_scale": 0.1158,
    }
    return DistributedNoise(mechanism=mechanism, **{**some, **settings})


def one_coordinate(mechanism: Mechanism, clients: int, scale: float, shift: int) -> DistributedNoise:
    clip_norm = math.sqrt(shift**2 - 1 / 4)
    settings = {"clients": clients, "dimension": 1, "granularity": 1.0, "local_scale": scale, "beta": NO_SLACK}
    return noise(mechanism, clip_norm=clip_norm, **settings)


REACH = 64


@lru_cache(maxsize=64)
def law(mechanism: Mechanism, clients: int, scale: float) -> Law:
    """The logarithms of the probabilities of the sum of shares at -REACH, ..., REACH, by definition."""
    x = np.arange(-REACH, REACH + 1)
    if mechanism == "skellam":  # exp(-mu) I_|x|(mu): a sum of Skellam shares is Skellam.
        return np.log(np.array([ive(abs(k), clients * scale**2) for k in x], np.float64))
    share = -(x**2) / (2 * scale**2)
    share -= logsumexp(share)
    total = share
    for _ in range(clients - 1):
        total = np.array([logsumexp(shifted(total, k) + share) for k in range(-REACH, REACH + 1)])
    return total


def shifted(q: Law, shift: int) -> Law:
    beyond = np.full(abs(shift), -math.inf)
    return np.concatenate([beyond, q[:-shift]] if shift > 0 else [q[-shift:], beyond])


def divergence(p: Law, q: Law, order: int) -> float:
    return float(logsumexp(order * p - (order - 1) * q)) / (order - 1)


class TestOneRound:
    # n, d, clip, granularity, local scale, rate, rounds, then epsilon at 1e-5 with discrete Gaussian and with Skellam
    # shares, tau and the norm after rounding: as google-research's federated/distributed_dp gave them, which amplifies
    # by Zhu and Wang 2019 and converts by Canonne, Kamath, Steinke 2020; the second from the same formulas.
    @pytest.mark.parametrize(
        ("n", "d", "clip", "granularity", "scale", "rate", "rounds", "gaussian", "skellam", "tau", "norm"),
        [
            (100, 65536, 1.0, 1.5e-4, 0.1158, 1.0, 1, 4.0003, 4.0003, 0.0, 1.0002607260109735),
            (1000, 65536, 0.5, 0.01, 0.02, 0.05, 100, 35.6664, 35.7274, 7.157179647609515e-17, 1.3806520198804622),
            (20, 4096, 1.0, 0.5, 0.3, 1.0, 1, 2673.2949, 203.7204, 0.6930018089809026, 16.294170736800325),
            (20, 4096, 1.0, 0.2, 0.2, 1.0, 1, 64.6923, 70.5354, 5.4456e-4, 6.590902821313633),
        ],
    )
    def test_reproduces_the_reference(
        self, n: int, d: int, clip: float, granularity: float, scale: float, rate: float, rounds: int,
        gaussian: float, skellam: float, tau: float, norm: float,
    ) -> None:  # fmt: skip
        ours = noise(clients=n, dimension=d, clip_norm=clip, granularity=granularity, local_scale=scale)
        assert ours.rounded_norm == pytest.approx(norm, rel=1e-13)
        assert ours.tau == pytest.approx(tau, rel=1e-5, abs=1e-300)
        assert ours.epsilon(DELTA, sampling_rate=rate, count=rounds) == pytest.approx(gaussian, abs=6e-5)
        as_skellam = replace(ours, mechanism="skellam")
        assert as_skellam.tau == 0
        assert as_skellam.epsilon(DELTA, sampling_rate=rate, count=rounds) == pytest.approx(skellam, abs=6e-5)

    @settings(max_examples=60)
    @given(
        mechanism=st.sampled_from(MECHANISMS),
        clients=st.integers(1, 3),
        scale=st.sampled_from([0.5, 0.55, 0.6, 0.7, 1.0, 2.0]),
        shift=st.integers(1, 4),
        order=st.integers(2, 6),
    )
    def test_never_says_less_than_the_divergence_of_the_laws_that_are_drawn(
        self, mechanism: Mechanism, clients: int, scale: float, shift: int, order: int
    ) -> None:
        ours = one_coordinate(mechanism, clients, scale, shift)
        assert ours.rounded_norm == pytest.approx(shift, rel=1e-7)
        drawn = law(mechanism, clients, scale)
        assert divergence(shifted(drawn, shift), drawn, order) <= ours.rdp([order])[0] * (1 + 1e-7)

    @pytest.mark.parametrize("order", [2, 5])
    def test_one_discrete_gaussian_share_costs_its_divergence_exactly(self, order: int) -> None:
        drawn = law("discrete_gaussian", 1, 2.0)
        exact = one_coordinate("discrete_gaussian", 1, 2.0, 3).rdp([order])[0]
        assert exact == pytest.approx(divergence(shifted(drawn, 3), drawn, order), rel=1e-7)
        assert exact == pytest.approx(order * 9 / 8, rel=1e-7)  # a v^2 / (2 s^2)

    def test_skellam_costs_little_more_than_its_divergence_where_the_noise_is_wide(self) -> None:
        drawn, ours = law("skellam", 3, 3.0), one_coordinate("skellam", 3, 3.0, 2)
        assert divergence(shifted(drawn, 2), drawn, 3) == pytest.approx(ours.rdp([3])[0], rel=0.06)

    @pytest.mark.parametrize(("clients", "scale"), [(2, 0.5), (3, 0.5), (3, 0.6), (5, 0.7)])
    def test_tau_is_twice_a_bound_on_how_far_a_sum_is_from_one_discrete_gaussian(
        self, clients: int, scale: float
    ) -> None:
        one, total = law("discrete_gaussian", 1, math.sqrt(clients) * scale), law("discrete_gaussian", clients, scale)
        middle = slice(REACH - 16, REACH + 17)  # The pattern repeats; further out the end of the shares shows.
        apart = np.abs(total[middle] - one[middle]).max()
        assert apart <= one_coordinate("discrete_gaussian", clients, scale, 1).tau / 2
        assert apart >= one_coordinate("discrete_gaussian", clients, scale, 1).tau / 50

    @pytest.mark.parametrize(
        ("clients", "scale", "dimension", "clip_norm", "least"),
        [(2, 0.6, 1, 2.0, "by coordinates"), (100, 1.0, 1, 1.0, "by L2 norm"), (100, 1.0, 64, 1.0, "by L1 norm")],
    )
    @pytest.mark.parametrize("order", [2, 4])
    def test_takes_the_least_of_the_three_bounds_on_a_sum(
        self, clients: int, scale: float, dimension: int, clip_norm: float, least: str, order: int
    ) -> None:
        settings: dict[str, Any] = {
            "clients": clients,
            "dimension": dimension,
            "clip_norm": clip_norm,
            "local_scale": scale,
        }
        ours = noise(granularity=1.0, beta=NO_SLACK, **settings)
        # On a grid of 1 without slack, rounding adds at most a quarter of the dimension to the square of the norm.
        l2 = math.sqrt(clip_norm**2 + dimension / 4)
        l1 = min(l2**2, math.sqrt(dimension) * l2)
        assert ours.rounded_l1 == pytest.approx(l1, rel=1e-7)
        tau = sum(10 * math.exp(-2 * math.pi**2 * scale**2 * k / (k + 1)) for k in range(1, clients))
        std = math.sqrt(clients) * scale
        by_hand = {
            "by coordinates": order / 2 * (l2 / std) ** 2 + tau * dimension,
            "by L1 norm": order / 2 * ((l2 / std) ** 2 + 2 * l1 / std * tau + tau**2 * dimension),
            "by L2 norm": order / 2 * (l2 / std + math.sqrt(dimension) * tau) ** 2,
        }
        assert ours.rdp([order])[0] == pytest.approx(min(by_hand.values()), rel=1e-7)
        assert by_hand[least] == pytest.approx(min(by_hand.values()), rel=1e-12)

    def test_the_norms_after_rounding_are_those_worked_out_by_hand(self) -> None:
        ours = noise(dimension=16, clip_norm=50.0, granularity=0.5, local_scale=1.0)
        # In steps of 1/2: 100^2 + 16 / 4 + (100 + 4 / 2), for beta = exp(-1/2); at most 4 times as much in L1.
        assert ours.rounded_norm == pytest.approx(math.sqrt(10_106) / 2, rel=1e-14)
        assert ours.rounded_l1 == pytest.approx(2 * math.sqrt(10_106), rel=1e-14)
        # With beta = 10^-15 no rounding at all is refused: each coordinate moves by a step, (100 + 4)^2.
        assert replace(ours, beta=1e-15).rounded_norm == pytest.approx(52.0, rel=1e-14)

    @pytest.mark.parametrize(("clients", "least"), [(1, 3 * 4 / 0.5), (100, (11 * 16 + 24) / (4 * 25**2))])
    def test_takes_the_lesser_of_the_two_terms_that_skellam_adds(self, clients: int, least: float) -> None:
        # Order 6, shift 4, variance a quarter or 25.
        ours = one_coordinate("skellam", clients, 0.5, 4).rdp([6])[0]
        assert ours == pytest.approx(6 * 16 / (2 * clients / 4) + least, rel=1e-7)

    @given(
        mechanism=st.sampled_from(MECHANISMS),
        exponent=st.integers(-30, 30),
        granularity=st.floats(1e-4, 0.2),
        scale=st.floats(0.5, 100),
    )
    def test_the_unit_of_the_vectors_makes_no_difference(
        self, mechanism: Mechanism, exponent: int, granularity: float, scale: float
    ) -> None:
        ours = noise(mechanism, granularity=granularity, local_scale=scale)
        unit = 2.0**exponent
        other = noise(mechanism, clip_norm=unit, granularity=granularity * unit, local_scale=scale * unit)
        assert other.rounded_norm == unit * ours.rounded_norm
        assert other.rounded_l1 == unit * ours.rounded_l1
        assert other.rdp(ORDERS).tolist() == ours.rdp(ORDERS).tolist()

    @pytest.mark.parametrize("mechanism", MECHANISMS)
    @pytest.mark.parametrize(
        ("survivors", "expected"), [(100, 4.0), (95, 4.118), (90, 4.249), (80, 4.560), (70, 4.917), (50, 5.983)]
    )
    def test_fewer_survivors_than_the_shares_were_sized_for_cost_more(
        self, mechanism: Mechanism, survivors: int, expected: float
    ) -> None:
        # Shares sized for all 100 at epsilon 4; the figures are those of the Gaussian sum, from its Rényi divergence.
        planned = noise_for_bits(20, **FOUR, mechanism=mechanism)
        assert replace(planned, clients=survivors).epsilon(DELTA) == pytest.approx(expected, abs=6e-4)

    @pytest.mark.parametrize("mechanism", MECHANISMS)
    def test_more_rounds_less_noise_a_smaller_delta_and_a_higher_rate_cost_more(self, mechanism: Mechanism) -> None:
        ours = noise(mechanism, granularity=0.01)
        epsilon = ours.epsilon(DELTA, sampling_rate=0.3, count=5)
        assert ours.epsilon(DELTA, sampling_rate=0.3, count=6) > epsilon
        assert ours.epsilon(DELTA / 2, sampling_rate=0.3, count=5) > epsilon
        assert ours.epsilon(DELTA, sampling_rate=0.4, count=5) > epsilon
        assert ours.epsilon(DELTA, count=5) > epsilon
        assert replace(ours, local_scale=0.1).epsilon(DELTA, sampling_rate=0.3, count=5) > epsilon
        assert replace(ours, beta=0.1).epsilon(DELTA, sampling_rate=0.3, count=5) > epsilon
        assert replace(ours, granularity=0.02).epsilon(DELTA, sampling_rate=0.3, count=5) > epsilon

    @pytest.mark.parametrize("rate", [0.9, 0.999999, 1 - 2.0**-53])
    def test_a_rate_near_1_never_costs_more_than_no_sampling_at_all(self, rate: float) -> None:
        ours = noise()
        assert ours.epsilon(DELTA, sampling_rate=rate) <= ours.epsilon(DELTA)


class TestOneDiscreteGaussian:
    @pytest.mark.parametrize(("z", "expected"), [(1.0, 7.973), (1.5, 3.951)])
    def test_sampled_as_mironov_has_it_costs_less_than_the_general_amplification(
        self, z: float, expected: float
    ) -> None:
        # Rate 0.1, 100 releases: the figures of an independent computation (its PLD for a continuous Gaussian of z = 1
        # is 7.047). Of the general amplification: 9.823 and 5.305.
        plan = {"sampling_rate": 0.1, "count": 100}
        assert discrete_gaussian_epsilon(DELTA, noise_multiplier=z, **plan) == pytest.approx(expected, abs=6e-4)  # type: ignore[arg-type]
        share = noise_for_bits(24, **{**FOUR, "noise_multiplier": z}, mechanism="discrete_gaussian")
        assert share.sharper_epsilon(DELTA, sampling_rate=0.1, count=100) == pytest.approx(expected, abs=6e-4)
        assert share.epsilon(DELTA, sampling_rate=0.1, count=100) == pytest.approx(
            {1.0: 9.823, 1.5: 5.305}[z], abs=6e-4
        )

    @settings(max_examples=60)
    @given(
        scale=st.sampled_from([0.4, 0.7, 1.0, 3.0]),
        shift=st.integers(1, 4),
        order=st.integers(2, 7),
        rate=st.floats(1e-6, 0.999),
    )
    def test_is_the_divergence_of_the_laws_that_are_drawn_and_of_their_exchange_no_less(
        self, scale: float, shift: int, order: int, rate: float
    ) -> None:
        absent = law("discrete_gaussian", 1, scale)
        mixed = np.logaddexp(absent + np.log1p(-rate), shifted(absent, shift) + math.log(rate))
        ours = discrete_gaussian_rdp([order], noise_multiplier=scale / shift, sampling_rate=rate)[0]
        assert divergence(mixed, absent, order) == pytest.approx(ours, rel=1e-6, abs=1e-13)
        assert divergence(absent, mixed, order) <= ours * (1 + 1e-6) + 1e-13

    @pytest.mark.parametrize("rate", [1e-4, 1e-9, 1e-100, 1e-300])
    def test_keeps_its_digits_where_next_to_nothing_is_sampled(self, rate: float) -> None:
        # To the first order in rate^2: E[..] = 1 + C(a, 2) q^2 (e^(1/z^2) - 1).
        rdp = discrete_gaussian_rdp([2, 3], noise_multiplier=1.0, sampling_rate=rate)
        first = [rate**2 * math.expm1(1.0), 3 * rate**2 * math.expm1(1.0) / 2]
        assert rdp.tolist() == pytest.approx(first, rel=max(20 * rate, 1e-11), abs=0)

    @given(z=st.floats(0.3, 30), rate=st.floats(1e-4, 1.0), order=st.integers(2, 40))
    def test_sampling_never_adds_to_the_cost(self, z: float, rate: float, order: int) -> None:
        sampled, plain = (discrete_gaussian_rdp([order], noise_multiplier=z, sampling_rate=r)[0] for r in (rate, 1.0))
        assert 0 <= sampled <= plain
        assert plain == pytest.approx(order / (2 * z**2), rel=1e-12)

    def test_a_sum_of_shares_pays_for_not_being_one_discrete_gaussian(self) -> None:
        ours = noise(clients=5, dimension=64, granularity=1.0, clip_norm=4.0, local_scale=1.1)
        paid = 3 * 64 * ours.tau / 2
        assert 1e-3 < paid < 0.5
        plain = discrete_gaussian_epsilon(
            DELTA * math.exp(-paid), noise_multiplier=ours.noise_multiplier, sampling_rate=0.2, count=3
        )
        assert ours.sharper_epsilon(DELTA, sampling_rate=0.2, count=3) == pytest.approx(plain + 2 * paid, rel=1e-12)
        assert ours.noise_multiplier == pytest.approx(math.sqrt(5) * 1.1 / ours.rounded_norm)

    def test_shares_too_narrow_for_that_and_skellam_shares_are_refused(self) -> None:
        with pytest.raises(UnsupportedEvent, match=r"local_scale must be so wide"):
            noise(clients=5, dimension=4096, granularity=1.0, local_scale=0.6).sharper_epsilon(DELTA)
        with pytest.raises(UnsupportedEvent, match=r"mechanism must be discrete_gaussian"):
            noise("skellam").sharper_epsilon(DELTA)


FOUR: dict[str, Any] = {  # Epsilon 4 at 1e-5, one round, 100 clients.
    "clients": 100,
    "cohort": 100,
    "dimension": 2**16,
    "clip_norm": 1.0,
    "noise_multiplier": 1.15776925711566,
}


class TestBits:
    # Bits, granularity, integer scale of a share, norm after rounding over the clip norm: measured with a separate
    # implementation at epsilon 4 and delta 1e-5, n = 100, d = 2^16.
    @pytest.mark.parametrize(
        ("bits", "granularity", "scale", "inflation"),
        [
            (11, 5.9e-3, 24.7, 1.256),
            (12, 2.5e-3, 48.8, 1.051),
            (14, 6.0e-4, 194, 1.003),
            (16, 1.5e-4, 776, 1.0003),
            (18, 3.7e-5, 3105, 1.0),
            (20, 9.3e-6, 12419, 1.0),
        ],
    )
    def test_the_grid_for_a_number_of_bits_is_the_measured_one(
        self, bits: int, granularity: float, scale: float, inflation: float
    ) -> None:
        ours = noise_for_bits(bits, **FOUR, mechanism="discrete_gaussian")
        assert ours.granularity == pytest.approx(granularity, rel=0.01)
        assert ours.local_scale / ours.granularity == pytest.approx(scale, rel=2e-3)
        assert ours.rounded_norm == pytest.approx(inflation, abs=6e-4)
        assert ours.epsilon(DELTA) == pytest.approx(4.0, abs=1e-6)
        assert ours.modulus_needed(cohort=100) == pytest.approx(2**bits, rel=1e-8)
        assert bits_needed(ours, cohort=100) == bits

    @pytest.mark.parametrize(("bits", "log_d", "inflation"), [(16, 20, 1.003), (16, 24, 1.045), (18, 24, 1.003)])
    @pytest.mark.parametrize("n", [10, 100])
    def test_rounding_inflates_the_norm_of_long_vectors_as_measured(
        self, bits: int, log_d: int, inflation: float, n: int
    ) -> None:
        settings = {**FOUR, "dimension": 2**log_d, "clients": n, "cohort": n}
        assert noise_for_bits(bits, **settings, mechanism="skellam").rounded_norm == pytest.approx(inflation, abs=6e-4)

    @settings(max_examples=60)
    @given(
        bits=st.integers(8, 40),
        clients=st.integers(1, 1000),
        more=st.integers(0, 100),
        log_d=st.integers(0, 24),
        exponent=st.integers(-20, 20),
        z=st.floats(0.3, 30),
    )
    def test_the_grid_found_fits_into_its_bits_and_a_finer_one_does_not(
        self, bits: int, clients: int, more: int, log_d: int, exponent: int, z: float
    ) -> None:
        clip_norm, cohort = 2.0**exponent, clients + more
        plan: dict[str, Any] = {"mechanism": "skellam", "clients": clients, "cohort": cohort, "dimension": 2**log_d}
        # What rounding alone needs on the coarsest grid: there every vector is a rounding of zero.
        share = z * math.sqrt(min(2**log_d / 4 + 2 ** (log_d / 2) / 2, 2**log_d) / clients)
        assume(share > 0.1 and 2**bits > 8.1 * math.sqrt(cohort * (1 / 4 + share**2)))
        ours = noise_for_bits(bits, **plan, clip_norm=clip_norm, noise_multiplier=z)
        assert ours.noise_multiplier == pytest.approx(z, rel=1e-12)
        assert bits_needed(ours, cohort=cohort) <= bits
        finest = ours.granularity <= clip_norm * 2.0**-40 * 1.01
        assert finest or ours.modulus_needed(cohort=cohort) == pytest.approx(2.0**bits, rel=1e-8)

    def test_the_modulus_is_that_of_the_rule_worked_out_by_hand(self) -> None:
        # 4 clients, 16 coordinates, a grid of 1/2: spread^2 = (2 * 4)^2 / 16 + (1/16 + 9/16) 4 = 6.5, 2 * 4 / (1/2).
        ours = noise(clients=3, dimension=16, clip_norm=2.0, granularity=0.5, local_scale=0.75)
        assert ours.modulus_needed(cohort=4) == pytest.approx(16 * math.sqrt(6.5), rel=1e-15)
        assert bits_needed(ours, cohort=4) == 6  # 40.8
        assert ours.modulus_needed(cohort=4, deviations=8) == pytest.approx(32 * math.sqrt(6.5), rel=1e-15)

    def test_more_bits_than_any_grid_needs_give_the_finest(self) -> None:
        settings: dict[str, Any] = {"clients": 1, "cohort": 1, "dimension": 2**24, "clip_norm": 2.0}
        ours = noise_for_bits(60, **settings, mechanism="skellam", noise_multiplier=0.5)
        assert ours.granularity == 2.0**-39
        assert bits_needed(ours, cohort=1) == 43  # A little above 8 times half of 2^40.

    def test_too_few_bits_for_any_grid_are_refused(self) -> None:
        # Epsilon 1 instead of 4, 2^16 coordinates: what rounding adds to the norm outgrows 12 bits on every grid.
        with pytest.raises(UnsupportedEvent, match=r"bits must be more .*, got 12"):
            noise_for_bits(12, **{**FOUR, "noise_multiplier": 4.2}, mechanism="discrete_gaussian")


class TestConcentrated:
    @pytest.mark.parametrize(
        ("rho", "delta", "expected"), [(0.5, 1e-5, 4.7284), (1.0, 1e-5, 7.0772), (0.81, 1e-10, 8.9222)]
    )
    def test_reproduces_published_conversions(self, rho: float, delta: float, expected: float) -> None:
        # The third: Gboard es-ES, reported as 8.9 for rho 0.81. Bun and Steinke 2016 would give 5.2985 for the first.
        assert zcdp_epsilon(rho, delta) == pytest.approx(expected, abs=6e-5)
        assert zcdp_epsilon(rho, delta) < rho + 2 * math.sqrt(rho * -math.log(delta))

    @given(log_rho=st.floats(-30, 30), log_delta=st.floats(-600, -1e-9), log_x=st.floats(-20, 20))
    def test_no_order_gives_less(self, log_rho: float, log_delta: float, log_x: float) -> None:
        rho, delta, x = math.exp(log_rho), math.exp(log_delta), math.exp(log_x)
        at_order = rho * (1 + x) + (-math.log(delta) - math.log1p(x)) / x + math.log(x / (1 + x))
        assert 0 <= zcdp_epsilon(rho, delta) <= max(0.0, at_order) * (1 + 1e-9) + 1e-12

    @pytest.mark.parametrize("rho", [5e-324, 1e-200, 1e-3, 1e30, 1e300])
    @pytest.mark.parametrize("delta", [5e-324, 1e-5, 1 - 2.0**-53])
    def test_the_extremes_give_a_bound(self, rho: float, delta: float) -> None:
        most = rho + 2 * math.sqrt(745 * rho) + 1e-9  # Bun and Steinke 2016, at the least delta.
        assert max(0.0, rho - 1) * (1 - 1e-9) <= zcdp_epsilon(rho, delta) < most * (1 + 1e-9)

    @pytest.mark.parametrize("rho", [0.01, 0.5, 3.0])
    def test_whole_orders_come_close_to_it(self, rho: float) -> None:
        # rho of one discrete Gaussian is 1 / (2 z^2), with no order left out.
        at_whole = discrete_gaussian_epsilon(DELTA, noise_multiplier=(2 * rho) ** -0.5)
        assert zcdp_epsilon(rho, DELTA) <= at_whole <= zcdp_epsilon(rho, DELTA) * 1.05


BAD_WHOLE = [0, -1, 1.0, True, "3", None]
BAD_NUMBERS = [0.0, -1.0, math.nan, math.inf, 5e-324, 1.7e308, "1", True, None]
BAD_RATES = [0.0, -0.1, 1.1, math.nan, math.inf, "1", True, None]
BAD_SHARES = [0.0, 1.0, -0.1, 1.1, math.nan, "1", None]


def for_bits(bits: Any = 16, **changed: Any) -> DistributedNoise:
    return noise_for_bits(bits, **{"mechanism": "skellam", **FOUR, **changed})


@pytest.mark.parametrize(
    ("name", "value", "call"),
    [
        *(("mechanism", value, noise) for value in ("gaussian", "", None)),
        *(("clients", value, lambda v: noise(clients=v)) for value in (*BAD_WHOLE, 2**20 + 1)),
        *(("dimension", value, lambda v: noise(dimension=v)) for value in (*BAD_WHOLE, 2**40 + 1)),
        *(("clip_norm", value, lambda v: noise(clip_norm=v)) for value in BAD_NUMBERS),
        *(("granularity", value, lambda v: noise(granularity=v)) for value in BAD_NUMBERS),
        *(("local_scale", value, lambda v: noise(local_scale=v)) for value in (*BAD_NUMBERS, 0.49 * 1.5e-4)),
        *(("local_scale", value, lambda v: noise("skellam", local_scale=v)) for value in (0.0, 0.09 * 1.5e-4)),
        *(("beta", value, lambda v: noise(beta=v)) for value in BAD_SHARES),
        *(("orders", value, lambda v: noise().rdp(v)) for value in ([], [1], [2.0], [2, 2**16 + 1], [True])),
        *(("orders", value, lambda v: discrete_gaussian_rdp(v, noise_multiplier=1.0)) for value in ([], [1.5], [0])),
        *(("delta", value, lambda v: noise().epsilon(v)) for value in BAD_SHARES),
        *(("delta", value, lambda v: noise().sharper_epsilon(v)) for value in BAD_SHARES),
        *(("delta", value, lambda v: zcdp_epsilon(1.0, v)) for value in BAD_SHARES),
        *(("delta", value, lambda v: discrete_gaussian_epsilon(v, noise_multiplier=1.0)) for value in BAD_SHARES),
        *(("sampling_rate", value, lambda v: noise().epsilon(DELTA, sampling_rate=v)) for value in BAD_RATES),
        *(("sampling_rate", value, lambda v: noise().sharper_epsilon(DELTA, sampling_rate=v)) for value in BAD_RATES),
        *(
            ("sampling_rate", value, lambda v: discrete_gaussian_rdp([2], noise_multiplier=1.0, sampling_rate=v))
            for value in BAD_RATES
        ),
        *(("count", value, lambda v: noise().epsilon(DELTA, count=v)) for value in (*BAD_WHOLE, 2**40 + 1)),
        *(("rho", value, lambda v: zcdp_epsilon(v, DELTA)) for value in (0.0, -1.0, math.nan, math.inf, None)),
        *(
            ("noise_multiplier", value, lambda v: discrete_gaussian_epsilon(DELTA, noise_multiplier=v))
            for value in BAD_NUMBERS
        ),
        *(("noise_multiplier", value, lambda v: for_bits(noise_multiplier=v)) for value in BAD_NUMBERS),
        *(("bits", value, for_bits) for value in (*BAD_WHOLE, 65, 1, 4)),
        *(("cohort", value, lambda v: for_bits(cohort=v)) for value in (*BAD_WHOLE, 99)),
        *(("cohort", value, lambda v: bits_needed(noise(), cohort=v)) for value in (*BAD_WHOLE, 99)),
        *(("clip_norm", value, lambda v: for_bits(clip_norm=v)) for value in BAD_NUMBERS),
        *(("beta", value, lambda v: for_bits(beta=v)) for value in BAD_SHARES),
        *(("dimension", value, lambda v: for_bits(dimension=v)) for value in BAD_WHOLE),
        *(("clients", value, lambda v: for_bits(clients=v)) for value in BAD_WHOLE),
        *(
            ("deviations", value, lambda v: bits_needed(noise(), cohort=100, deviations=v))
            for value in (0.0, -1.0, math.nan, math.inf, None)
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any, call: Callable[[Any], object]) -> None:
    with pytest.raises(UnsupportedEvent, match=rf"\b{name} must be ") as refusal:
        call(value)
    assert str(refusal.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("clip", "granularity"), [(2.0**-100, 2.0**-140), (2.0**-100, 2.0**-60), (2.0**100, 2.0**60)])
@pytest.mark.parametrize("steps", [0.5, 2.0**40])
def test_the_extremes_that_are_accepted_give_a_finite_divergence(
    mechanism: Mechanism, clip: float, granularity: float, steps: float
) -> None:
    ours = noise(
        mechanism,
        clients=2**20,
        dimension=2**40,
        clip_norm=clip,
        granularity=granularity,
        local_scale=steps * granularity,
        beta=BETA,
    )
    assert np.all(np.isfinite(ours.rdp([2, 2**16])))
    assert ours.epsilon(DELTA, sampling_rate=0.5, count=2**40) > 0

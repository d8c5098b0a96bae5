"""Lower bounds on epsilon: as published, monotone, above the truth no more often than they say, and never silent."""

import itertools
import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom, norm

from privacy.accountant import epsilon as accounted
from privacy.canary_estimates import (
    EpsilonEstimate,
    all_iterates_estimate,
    epsilon_between,
    final_model_estimate,
    gaussian_epsilon,
)
from privacy.errors import DataError, FedchorusError, UnsupportedEvent
from privacy.events import GaussianEvent
from privacy.lower_bounds import (
    Family,
    Guesses,
    LowerBound,
    Rates,
    TradeOff,
    approximate_dp,
    f_dp_lower_bound,
    gaussian_curve,
    guess,
    one_run_lower_bound,
    one_run_p_value,
    rates_at,
    rates_on_second_half,
    refuted,
    two_sided_lower_bound,
)

# Canaries, guesses, right ones, delta; the bounds at 95 % by jax_privacy's auditing module, without and with f-DP.
GOLDEN = [
    (1000, 100, 90, 1e-5, 1.6261, 2.4564),
    (1000, 100, 100, 1e-5, 3.4654, 5.5490),
    (1000, 1000, 1000, 1e-5, 5.7823, 12.3346),
    (5000, 500, 400, 1e-5, 1.1952, 1.6832),
    (1000, 200, 160, 1e-5, 1.0850, 1.7292),
    (100, 20, 20, 1e-5, 1.8196, 3.2394),
]
# The most that m canaries can show at delta 1e-5: all guessed, all right.
CEILING = {10: 1.052, 50: 2.783, 100: 3.49, 300: 4.594, 1000: 5.782, 3000: 6.828, 10000: 7.834}
counts = st.integers(1, 400)
deltas = st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.02])


@st.composite
def guesses(draw: st.DrawFn) -> Guesses:
    canaries = draw(counts)
    made = draw(st.integers(1, canaries))
    return Guesses(canaries=canaries, made=made, right=draw(st.integers(0, made)))


def seen(canaries: int, made: int, right: int) -> Guesses:
    return Guesses(canaries=canaries, made=made, right=right)


def one_run(*looks: Guesses, delta: float = 1e-5, confidence: float = 0.95) -> float:
    return one_run_lower_bound(*looks, delta=delta, claimed=1.0, confidence=confidence).epsilon


def f_dp(*looks: Guesses, delta: float = 1e-5, confidence: float = 0.95) -> float:
    return f_dp_lower_bound(*looks, delta=delta, claimed=1.0, confidence=confidence).epsilon


def two_sided(*looks: Rates, delta: float = 1e-5, confidence: float = 0.95, **family: Family) -> float:
    return two_sided_lower_bound(*looks, delta=delta, claimed=1.0, confidence=confidence, **family).epsilon


def errors(false_positives: int, negatives: int, false_negatives: int, positives: int) -> Rates:
    return Rates(
        false_positives=false_positives, negatives=negatives, false_negatives=false_negatives, positives=positives
    )


def theorem_5_2(look: Guesses, epsilon: float, delta: float) -> float:
    """The p-value of Steinke et al., term by term in 40 digits."""
    with mpmath.workdps(40):
        q = 1 / (1 + mpmath.exp(-epsilon))
        mass = [mpmath.binomial(look.made, j) * q**j * (1 - q) ** (look.made - j) for j in range(look.made + 1)]
        tails = [mpmath.fsum(mass[j:]) for j in range(look.made + 1)]
        v = look.right
        worst = max(((tails[v - i] - tails[v]) / i for i in range(1, v + 1)), default=0)
        return float(min(1, tails[v] + 2 * look.canaries * delta * worst))


class TestGolden:
    @pytest.mark.parametrize(("canaries", "made", "right", "delta", "plain", "gaussian"), GOLDEN)
    def test_both_one_run_bounds_are_the_published_ones_to_four_digits(
        self, canaries: int, made: int, right: int, delta: float, plain: float, gaussian: float
    ) -> None:
        look = seen(canaries, made, right)
        assert one_run(look, delta=delta) == pytest.approx(plain, abs=6e-5)
        assert f_dp(look, delta=delta) == pytest.approx(gaussian, abs=6e-5)

    def test_the_p_value_is_the_published_one(self) -> None:
        assert one_run_p_value(seen(1000, 100, 90), epsilon=1.0, delta=1e-5) == pytest.approx(8.412886e-4, rel=1e-6)

    @pytest.mark.parametrize("canaries", CEILING)
    def test_a_perfect_attack_finds_what_the_number_of_canaries_allows_and_no_more(self, canaries: int) -> None:
        bound = one_run(seen(canaries, canaries, canaries))
        assert bound == pytest.approx(CEILING[canaries], abs=6e-4)
        assert bound < math.log(canaries / -math.log(0.05))

    @given(look=guesses().filter(lambda look: look.made <= 40), epsilon=st.floats(0, 6), delta=deltas)
    @settings(max_examples=60, deadline=None)
    def test_the_p_value_is_the_theorem_s(self, look: Guesses, epsilon: float, delta: float) -> None:
        ours = one_run_p_value(look, epsilon=epsilon, delta=delta)
        assert ours == pytest.approx(theorem_5_2(look, epsilon, delta), rel=1e-9)

    @pytest.mark.parametrize(("mistakes", "epsilon"), [(0, 12.0), (3, 12.0), (400_000, 0.4), (10, 11.0)])
    def test_a_million_canaries_keep_their_digits(self, mistakes: int, epsilon: float) -> None:
        m = 1_000_000
        ours = one_run_p_value(seen(m, m, m - mistakes), epsilon=epsilon, delta=0.0)
        with mpmath.workdps(40):
            p = 1 / (1 + mpmath.exp(epsilon))
            if mistakes > 1000:  # Here the tail needs its leading terms alone: each is below 0.99 of the one before.
                first = mpmath.binomial(m, mistakes) * p**mistakes * (1 - p) ** (m - mistakes)
                ratios = ((mistakes - j) / (m - mistakes + j + 1) * (1 - p) / p for j in range(4000))
                exact = first * (1 + mpmath.fsum(itertools.accumulate(ratios, lambda a, b: a * b)))
            else:
                exact = mpmath.fsum(mpmath.binomial(m, j) * p**j * (1 - p) ** (m - j) for j in range(mistakes + 1))
        assert ours == pytest.approx(float(exact), rel=1e-9)

    @pytest.mark.parametrize(("fp", "fn", "n"), [(0, 0, 100), (3, 40, 500), (100, 100, 1000)])
    def test_the_two_sided_bound_is_mu_at_the_clopper_pearson_ends(self, fp: int, fn: int, n: int) -> None:
        def end(wrong: int) -> float:  # Where so few errors have probability 0.025: its definition.
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if binom.cdf(wrong, n, middle) > 0.025 else (low, middle)
            return low

        mu = -float(ndtri(end(fp))) - float(ndtri(end(fn)))
        assert two_sided(errors(fp, n, fn, n)) == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-6)

    @pytest.mark.parametrize(("fp", "fn"), [(2, 700), (700, 2), (5, 5)])
    def test_for_any_mechanism_the_two_sided_bound_is_the_logarithm_of_a_ratio_of_rates(self, fp: int, fn: int) -> None:
        delta, rates = 1e-4, errors(fp, 1000, fn, 1000)
        fpr, fnr = rates.upper(0.025)  # Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776), Thm. 2.1.
        wanted = max(math.log((1 - delta - fnr) / fpr), math.log((1 - delta - fpr) / fnr))
        assert two_sided(rates, delta=delta, family=approximate_dp(delta)) == pytest.approx(wanted, rel=1e-7)


class TestMonotone:
    @given(look=guesses(), low=st.floats(0, 20), high=st.floats(0, 20), delta=st.floats(0, 0.5))
    @settings(deadline=None)
    def test_the_p_value_never_falls_with_epsilon(self, look: Guesses, low: float, high: float, delta: float) -> None:
        low, high = sorted((low, high))
        p = [one_run_p_value(look, epsilon=epsilon, delta=delta) for epsilon in (low, high)]
        assert 0 <= p[0] <= p[1] * (1 + 1e-9) <= 1 + 1e-9

    @pytest.mark.parametrize("bound", [one_run, f_dp])
    @given(look=guesses(), delta=st.sampled_from([1e-12, 1e-5, 1e-3]))
    @settings(max_examples=40, deadline=None)
    def test_one_more_right_guess_or_less_confidence_never_lowers_a_bound(
        self, bound: Callable[..., float], look: Guesses, delta: float
    ) -> None:
        assume(look.right < look.made)
        found = bound(look, delta=delta)
        assert 0 <= found <= bound(seen(look.canaries, look.made, look.right + 1), delta=delta) * (1 + 1e-7)
        assert found <= bound(look, delta=delta, confidence=0.9) * (1 + 1e-7)

    @given(look=guesses())
    @settings(max_examples=40, deadline=None)
    def test_canaries_that_were_not_guessed_never_raise_the_one_run_bound_nor_does_a_larger_delta(
        self, look: Guesses
    ) -> None:
        found = one_run(look, delta=1e-4)
        assert one_run(seen(look.canaries + 50, look.made, look.right), delta=1e-4) <= found * (1 + 1e-7)
        assert one_run(look, delta=1e-3) <= found * (1 + 1e-7)

    @given(fp=st.integers(0, 99), fn=st.integers(0, 99), delta=st.sampled_from([1e-12, 1e-5, 1e-2]))
    @settings(max_examples=40, deadline=None)
    def test_one_more_error_on_either_side_never_raises_the_two_sided_bound(
        self, fp: int, fn: int, delta: float
    ) -> None:
        found = two_sided(errors(fp, 100, fn, 100), delta=delta)
        assert two_sided(errors(fp + 1, 100, fn, 100), delta=delta) <= found * (1 + 1e-7)
        assert two_sided(errors(fp, 100, fn + 1, 100), delta=delta) <= found * (1 + 1e-7)

    @pytest.mark.parametrize("bound", [one_run, f_dp])
    def test_more_looks_cost_confidence_and_the_best_of_them_counts(self, bound: Callable[..., float]) -> None:
        good, bad = seen(1000, 100, 90), seen(1000, 500, 260)
        assert bound(bad, good) == bound(good, bad) == bound(good, confidence=0.975)
        assert bound(bad) < bound(bad, good) < bound(good)
        rates = [errors(1, 200, 90, 200), errors(100, 200, 100, 200)]
        assert two_sided(*rates) == two_sided(rates[0], confidence=0.975) < two_sided(rates[0])

    @pytest.mark.parametrize("bound", [one_run, f_dp])
    def test_guesses_no_better_than_a_coin_show_nothing(self, bound: Callable[..., float]) -> None:
        assert bound(seen(1000, 1000, 500)) == bound(seen(10, 10, 0)) == 0.0
        assert two_sided(errors(50, 100, 50, 100)) == two_sided(errors(100, 100, 100, 100)) == 0.0


class TestHonest:
    """How often a bound is above the truth: exactly where that can be counted, else in seeded simulations."""

    @pytest.mark.parametrize("truth", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize(("m", "confidence"), [(40, 0.9), (200, 0.8)])
    def test_of_randomised_response_the_one_run_bound_fails_as_often_as_it_may_and_hardly_less(
        self, truth: float, m: int, confidence: float
    ) -> None:
        # Each canary's bit is told with probability 1 / (1 + e^-truth): this is truth-DP, and no more can be guessed.
        above = [one_run(seen(m, m, v), delta=0.0, confidence=confidence) > truth for v in range(m + 1)]
        fails = float(binom.pmf(np.flatnonzero(above), m, 1 / (1 + math.exp(-truth))).sum())
        assert (1 - confidence) / 4 < fails <= 1 - confidence

    @pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
    def test_of_gaussian_noise_the_f_dp_bound_fails_no_oftener_than_it_may(self, mu: float) -> None:
        m, confidence = 1000, 0.9
        truth, each = gaussian_epsilon(mu, 1e-5), float(ndtr(mu / 2))  # All are guessed, at the midpoint.
        low, high = 0, m
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if f_dp(seen(m, m, middle), confidence=confidence) > truth else (middle + 1, high)
        assert 0 < float(binom.sf(low - 1, m, each)) <= 1 - confidence

    @pytest.mark.parametrize(("mu", "threshold"), [(0.5, 0.25), (1.0, 0.5), (1.0, 1.5), (2.0, 1.0)])
    def test_of_gaussian_noise_the_two_sided_bound_fails_no_oftener_than_it_may(
        self, mu: float, threshold: float
    ) -> None:
        n, confidence = 150, 0.8
        negative = binom.pmf(np.arange(n + 1), n, ndtr(-threshold))
        positive = binom.pmf(np.arange(n + 1), n, ndtr(threshold - mu))
        ends = [errors(wrong, n, wrong, n).upper((1 - confidence) / 2)[0] for wrong in range(n + 1)]
        # The bound on mu itself, once more: above the truth where the true curve is above the ends of both intervals.
        above = np.array([[gaussian_curve(mu)(fpr) > fnr for fnr in ends] for fpr in ends])
        assert 0.01 < float((np.outer(negative, positive) * above).sum()) <= 1 - confidence
        for fp, fn in [(0, 0), (1, 50), (20, 29), (40, 22), (58, 60)]:
            found = two_sided(errors(fp, n, fn, n), confidence=confidence)
            assert (found > gaussian_epsilon(mu, 1e-5)) == above[fp, fn]

    @pytest.mark.parametrize("mu", [0.7, 2.0])
    def test_simulated_gaussian_canaries_are_never_overrated_and_not_much_underrated(self, mu: float) -> None:
        truth, trials, m = gaussian_epsilon(mu, 1e-5), 150, 1000
        rng = np.random.default_rng(20261123)
        plain: list[float] = []
        shaped: list[float] = []
        halves: list[float] = []
        for _ in range(trials):
            included = rng.random(m) < 0.5
            scores = mu * included + rng.standard_normal(m)
            looks = [guess(scores, included, as_in=k, as_out=k) for k in (25, 100)]
            plain.append(cached(one_run, *looks))
            shaped.append(cached(f_dp, *looks))
            halves.append(cached(two_sided, rates_on_second_half(scores[included], scores[~included], confidence=0.9)))
        for bounds in (plain, shaped, halves):
            assert np.mean(np.array(bounds) > truth) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / trials)
        assert np.median(plain) > 0.08 * truth
        assert np.median(shaped) > 0.25 * truth
        assert np.median(halves) > 0.4 * truth

    def test_half_the_noise_that_was_claimed_is_found_out(self) -> None:
        claim = gaussian_epsilon(1.0, 1e-5)
        rng = np.random.default_rng(3)
        inside, outside = 1.0 + rng.standard_normal((2, 1000)) * [[0.5], [0.5]] - [[0.0], [1.0]]
        rates = rates_on_second_half(inside, outside, confidence=0.95)
        bound = two_sided_lower_bound(rates, delta=1e-5, claimed=claim)
        assert bound.contradicts
        honest = two_sided_lower_bound(rates, delta=1e-5, claimed=gaussian_epsilon(2.0, 1e-5))
        assert not honest.contradicts

    def test_a_hundred_thousand_guesses_cost_few_steps(self) -> None:
        calls = itertools.count()

        def counted(mu: float) -> TradeOff:
            curve = gaussian_curve(mu)
            return lambda rate: (next(calls), curve(rate))[1]

        family = Family(name="counted", curve=counted, epsilon=gaussian_epsilon)
        for made, right in [(100_000, 50_500), (100_000, 99_000), (100_000, 100_000)]:
            look = seen(100_000, made, right)
            bound = f_dp_lower_bound(look, delta=1e-12, claimed=1.0, family=family)
            assert bound.epsilon > 0
        assert next(calls) < 100_000


@cache
def cached(bound: Callable[..., float], *looks: Any) -> float:
    return bound(*looks, confidence=0.9)


def algorithm_3(mu: float, look: Guesses, significance: float) -> bool:
    """Mahloujifar et al.'s recursion to its end, by scipy's normal distribution."""
    right, wrong = (significance * count / look.canaries for count in (look.right, look.made - look.right))
    for i in range(look.right - 1, -1, -1):
        grown = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        right, wrong = right + i / (look.made - i) * (grown - wrong), grown
    return right + wrong > look.made / look.canaries


class TestCurves:
    @given(look=guesses().filter(lambda look: look.made <= 60), mu=st.floats(0.01, 6), confidence=st.floats(0.3, 0.99))
    @settings(deadline=None)
    def test_a_curve_is_refuted_where_the_recursion_as_published_refutes_it(
        self, look: Guesses, mu: float, confidence: float
    ) -> None:
        assert refuted(gaussian_curve(mu), look, confidence=confidence) == algorithm_3(mu, look, 1 - confidence)

    def test_a_curve_is_refuted_just_where_the_bound_says(self) -> None:
        good, bad = seen(1000, 100, 90), seen(1000, 100, 50)
        at = next(mu for mu in np.linspace(0.3, 2, 171).tolist() if gaussian_epsilon(mu, 1e-5) > f_dp(good))
        leaky, tight = gaussian_curve(at + 0.001), gaussian_curve(at - 0.011)
        assert refuted(tight, good)
        assert not refuted(leaky, good)
        assert refuted(tight, bad, good, confidence=0.9)
        assert not refuted(tight, bad, good)

    def test_a_claim_that_is_no_family_can_be_put_to_the_test(self) -> None:
        def claimed(rate: float) -> float:  # e^0.5-DP, as a curve.
            return max(0.0, 1 - math.exp(0.5) * rate, math.exp(-0.5) * (1 - rate))

        assert refuted(claimed, seen(1000, 100, 90))
        assert not refuted(claimed, seen(1000, 100, 60))

    @given(mu=st.floats(0, 30), rate=st.floats(1e-12, 1 - 1e-12))
    def test_the_gaussian_curve_is_its_own_inverse_and_below_that_of_less(self, mu: float, rate: float) -> None:
        curve = gaussian_curve(mu)
        assert curve(rate) == pytest.approx(float(ndtr(ndtri(1 - rate) - mu)), rel=1e-3, abs=1e-300)
        assert curve(rate) <= gaussian_curve(mu / 2)(rate) * (1 + 1e-12)
        assume(curve(rate) > 1e-300)
        assert curve(curve(rate)) == pytest.approx(rate, rel=1e-3)
        assert (curve(0.0), curve(1.0)) == (1.0, 0.0)

    def test_a_family_that_never_ends_is_refused(self) -> None:
        endless = Family(name="endless", curve=lambda _: lambda rate: 1 - rate, epsilon=gaussian_epsilon)
        with pytest.raises(UnsupportedEvent, match="do not fall"):
            f_dp_lower_bound(seen(1000, 1000, 1000), delta=1e-5, claimed=1.0, family=endless)

    def test_a_bound_for_any_mechanism_is_of_its_own_delta_alone(self) -> None:
        with pytest.raises(UnsupportedEvent, match="says nothing at delta 1e-06"):
            two_sided(errors(1, 100, 50, 100), delta=1e-6, family=approximate_dp(1e-5))


class TestCounting:
    @given(
        scores=st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=30),
        data=st.data(),
    )
    def test_no_order_of_the_canaries_and_no_tie_leaks_into_the_count(self, scores: list[float], data: Any) -> None:
        m = len(scores)
        included = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
        as_in = data.draw(st.integers(0, m))
        as_out = data.draw(st.integers(0 if as_in else 1, max(m - as_in, 0 if as_in else 1)))
        found = guess(scores, included, as_in=as_in, as_out=as_out)
        order = data.draw(st.permutations(range(m)))
        assert found == guess([scores[i] for i in order], [included[i] for i in order], as_in=as_in, as_out=as_out)
        # No way to break the ties does worse: here the one that goes by the order.
        by_score = sorted(order, key=lambda i: -scores[i])
        plain = sum(included[i] for i in by_score[:as_in]) + sum(not included[i] for i in by_score[m - as_out :])
        assert found.right <= plain
        assert (found.canaries, found.made) == (m, as_in + as_out)

    def test_the_highest_are_guessed_in_and_the_lowest_out(self) -> None:
        scores, included = [5.0, 4.0, 3.0, 2.0, 1.0], [True, True, False, True, False]
        assert guess(scores, included, as_in=2, as_out=1) == seen(5, 3, 3)
        assert guess(scores, included, as_in=3, as_out=2) == seen(5, 5, 3)
        assert guess([1.0] * 4, [True, True, False, False], as_in=2, as_out=2) == seen(4, 4, 0)

    def test_a_score_at_the_threshold_is_called_in(self) -> None:
        assert rates_at([1.0, 2.0, 3.0], [0.0, 2.0], [2.0, 2.5]) == (errors(1, 2, 1, 3), errors(0, 2, 2, 3))

    def test_the_half_that_is_counted_has_no_say_in_the_threshold(self) -> None:
        inside, outside = np.array([9.0, 0.0, 8.0, 0.0]), np.array([1.0, 9.0, 2.0, 9.0])
        # The first half asks for a threshold above 2 and at most 8; all of the second half is then on the wrong side.
        assert rates_on_second_half(inside, outside, confidence=0.95) == errors(2, 2, 2, 2)
        assert rates_on_second_half(inside[::-1], outside[::-1], confidence=0.95).false_negatives == 0

    def test_sorted_scores_are_refused_and_equal_ones_are_not(self) -> None:
        with pytest.raises(DataError, match="sorted"):
            rates_on_second_half(np.arange(11.0), np.zeros(11), confidence=0.95)
        with pytest.raises(DataError, match="sorted"):
            rates_on_second_half(np.zeros(11), -np.arange(11.0), confidence=0.95)
        same = rates_on_second_half(np.ones(20), np.zeros(20), confidence=0.95)  # As without any noise.
        assert same == errors(0, 10, 0, 10)


class TestResult:
    def test_a_bound_above_the_claim_contradicts_it_and_says_so_in_a_line(self) -> None:
        bound = one_run_lower_bound(seen(1000, 100, 90), delta=1e-5, claimed=1.0)
        assert bound.contradicts
        assert str(bound) == (
            "one run: epsilon >= 1.626 at delta 1e-05 with confidence 0.95 contradicts the claim of 1"
        )
        assert json.loads(json.dumps(bound.as_dict())) == {
            "method": "one run",
            "epsilon": bound.epsilon,
            "delta": 1e-5,
            "confidence": 0.95,
            "claimed": 1.0,
            "contradicts": True,
        }

    def test_a_bound_that_only_reaches_the_claim_does_not(self) -> None:
        bound = LowerBound(method="x", epsilon=2.0, delta=1e-5, confidence=0.9, claimed=2.0)
        assert not bound.contradicts
        assert "does not contradict the claim of 2" in str(bound)

    def test_a_bound_names_its_method_and_its_family(self) -> None:
        assert f_dp_lower_bound(seen(10, 5, 5), delta=1e-5, claimed=1.0).method == "one run, gaussian"
        found = two_sided_lower_bound(errors(0, 9, 0, 9), delta=1e-5, claimed=1.0, family=approximate_dp(1e-5))
        assert (found.method, found.confidence, found.claimed) == ("two-sided, any mechanism", 0.95, 1.0)


def by_quadrature(shift: float, spread: float, epsilon: float) -> float:
    """The hockey-stick divergence of N(0, 1) and N(shift, spread^2), the larger direction, by integration."""
    x = np.linspace(-25.0, 25.0, 1_000_001)
    first, second = norm.pdf(x), norm.pdf(x, shift, spread)
    excesses = (np.maximum(p - math.exp(epsilon) * q, 0.0) for p, q in [(first, second), (second, first)])
    return max(float(excess.sum() * (x[1] - x[0])) for excess in excesses)


class TestEstimates:
    @pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
    @pytest.mark.parametrize("noise", [0.1, 1.0, 30.0])
    def test_of_equal_spreads_epsilon_is_the_accountant_s_exact_one(self, noise: float, delta: float) -> None:
        event = GaussianEvent(noise_multiplier=noise, clip_norm=1.0, sampling_rate=1.0, count=1, rng="os")
        assert gaussian_epsilon(1 / noise, delta) == pytest.approx(accounted([event], delta).exact, rel=1e-8)

    @pytest.mark.parametrize(
        ("shift", "spread"), [(1.0, 1.0), (1.0, 1.5), (0.0, 2.0), (2.0, 0.5), (0.5, 0.9), (12.0, 0.5)]
    )
    @pytest.mark.parametrize("delta", [1e-2, 1e-5])
    def test_of_unequal_spreads_epsilon_is_where_the_divergence_is_delta(
        self, shift: float, spread: float, delta: float
    ) -> None:
        epsilon = epsilon_between(shift=shift, spread=spread, delta=delta)
        assert by_quadrature(shift, spread, epsilon) == pytest.approx(delta, rel=1e-4)

    @given(shift=st.floats(-8, 8), spread=st.floats(0.2, 5), delta=st.sampled_from([1e-12, 1e-5, 1e-2]))
    @settings(deadline=None)
    def test_epsilon_between_is_the_same_from_both_ends_and_grows_with_the_distance(
        self, shift: float, spread: float, delta: float
    ) -> None:
        found = epsilon_between(shift=shift, spread=spread, delta=delta)
        turned = epsilon_between(shift=-shift / spread, spread=1 / spread, delta=delta)
        assert found == pytest.approx(turned, rel=1e-7, abs=1e-9)
        assert found <= epsilon_between(shift=shift * 1.1, spread=spread, delta=delta) * (1 + 1e-9)

    @pytest.mark.parametrize("off", [1e-15, -1e-13, 1e-9])
    def test_nearly_equal_spreads_are_no_special_case(self, off: float) -> None:
        found = epsilon_between(shift=1.0, spread=1 + off, delta=1e-5)
        assert found == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-6)
        assert gaussian_epsilon(0.0, 1e-5) == 0.0
        assert gaussian_epsilon(60.0, 1e-12) > 60**2 / 2

    def test_a_gaussian_mechanism_s_epsilon_is_estimated_from_one_release(self) -> None:
        # 200 canaries on one noisy sum of 40,000 dimensions. Each moves it by mu noise deviations; 200 others do not.
        dimension, n, mu = 40_000, 200, 1.0
        rng = np.random.default_rng(11)
        directions = rng.standard_normal((2 * n, dimension), dtype=np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        released = mu * directions[:n].sum(axis=0) + rng.standard_normal(dimension, dtype=np.float32)
        cosines = directions @ (released / np.linalg.norm(released))
        final = final_model_estimate(cosines[:n], dimension=dimension, delta=1e-5)
        both = all_iterates_estimate(cosines[:n], cosines[n:], delta=1e-5)
        truth = gaussian_epsilon(mu, 1e-5)
        for found in (final, both):
            assert found.low <= truth <= found.high
            assert found.low < found.epsilon < found.high
            assert found.epsilon == pytest.approx(truth, rel=0.5)
        assert final.high - final.low < both.high - both.low

    def test_the_interval_holds_what_the_estimate_converges_to_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(5)
        dimension, shift, spread, confidence = 10_000, 1.2, 1.1, 0.8
        truth = epsilon_between(shift=shift, spread=spread, delta=1e-5)

        def held(found: EpsilonEstimate) -> bool:
            return found.low <= truth <= found.high

        def draw(n: int, mean: float, std: float) -> NDArray[np.float64]:
            return (mean + std * rng.standard_normal(n)) / math.sqrt(dimension)

        finals = [
            final_model_estimate(draw(40, shift, spread), dimension=dimension, delta=1e-5, confidence=confidence)
            for _ in range(60)
        ]
        rounds = [
            all_iterates_estimate(
                3 / 100 + draw(40, shift, spread), 3 / 100 + draw(30, 0, 1), delta=1e-5, confidence=confidence
            )
            for _ in range(6)
        ]
        assert np.mean([held(found) for found in finals]) >= confidence
        assert sum(held(found) for found in rounds) >= 5

    def test_more_canaries_narrow_the_interval(self) -> None:
        rng = np.random.default_rng(6)
        cosines = (1 + rng.standard_normal(4000)) / 100
        few, many = (final_model_estimate(cosines[:n], dimension=10_000, delta=1e-5) for n in (40, 4000))
        assert many.high - many.low < (few.high - few.low) / 5

    def test_canaries_that_left_no_trace_are_not_told_from_none(self) -> None:
        draws = np.random.default_rng(7).standard_normal((40, 300)) / 100
        found = [final_model_estimate(cosines, dimension=10_000, delta=1e-5) for cosines in draws]
        assert np.mean([estimate.low == 0.0 for estimate in found]) >= 0.9
        assert np.median([estimate.epsilon for estimate in found]) < 1.5


ONE, BOTH = seen(10, 5, 5), errors(1, 10, 1, 10)
BAD: dict[str, Callable[[], object]] = {
    "right above guesses": lambda: seen(10, 5, 6),
    "guesses above canaries": lambda: seen(10, 11, 5),
    "no guess": lambda: seen(10, 0, 0),
    "negative": lambda: seen(10, 5, -1),
    "half a guess": lambda: seen(10, 5, 2.5),  # type: ignore[arg-type]
    "truth for a count": lambda: seen(10, 5, True),
    "errors above canaries": lambda: errors(11, 10, 0, 10),
    "no canaries": lambda: errors(0, 0, 0, 10),
    "no looks": lambda: one_run(),
    "no rates": lambda: two_sided(),
    "no guesses for a curve": lambda: refuted(gaussian_curve(1.0)),
    "delta of 1": lambda: one_run(ONE, delta=1.0),
    "delta below 0": lambda: f_dp(ONE, delta=-1e-9),
    "delta that is no number": lambda: two_sided(BOTH, delta=math.nan),
    "delta 0 of a gaussian": lambda: f_dp(ONE, delta=0.0),
    "confidence of 1": lambda: one_run(ONE, confidence=1.0),
    "confidence in percent": lambda: f_dp(ONE, confidence=95),
    "confidence of 0": lambda: rates_on_second_half([1.0, 2.0], [1.0, 2.0], confidence=0.0),
    "claim below 0": lambda: one_run_lower_bound(ONE, delta=1e-5, claimed=-1.0),
    "claim without end": lambda: two_sided_lower_bound(BOTH, delta=1e-5, claimed=math.inf),
    "epsilon that is no number": lambda: one_run_p_value(ONE, epsilon=math.nan, delta=0.0),
    "family at delta 1": lambda: approximate_dp(1.0),
    "scores and inclusion differ": lambda: guess([1.0, 2.0], [True], as_in=1, as_out=0),
    "inclusion as numbers": lambda: guess([1.0, 2.0], [1, 0], as_in=1, as_out=0),
    "more guesses than scores": lambda: guess([1.0, 2.0], [True, False], as_in=2, as_out=1),
    "none asked for": lambda: guess([1.0, 2.0], [True, False], as_in=0, as_out=0),
    "fewer than none": lambda: guess([1.0, 2.0], [True, False], as_in=-1, as_out=2),
    "a score that is not finite": lambda: guess([1.0, math.nan], [True, False], as_in=1, as_out=0),
    "words for scores": lambda: rates_at(["a"], [1.0], [0.5]),
    "no scores": lambda: rates_at([], [1.0], [0.5]),
    "a table of scores": lambda: rates_at([[1.0]], [1.0], [0.5]),
    "a threshold at infinity": lambda: rates_at([1.0], [1.0], [math.inf]),
    "one score to halve": lambda: rates_on_second_half([1.0], [1.0, 2.0], confidence=0.9),
    "one cosine": lambda: final_model_estimate([0.1], dimension=5000, delta=1e-5),
    "equal cosines": lambda: final_model_estimate([0.1, 0.1], dimension=5000, delta=1e-5),
    "a cosine above 1": lambda: all_iterates_estimate([0.1, 1.1], [0.1, 0.2], delta=1e-5),
    "few dimensions": lambda: final_model_estimate([0.1, 0.2], dimension=999, delta=1e-5),
    "delta 0 of an estimate": lambda: final_model_estimate([0.1, 0.2], dimension=5000, delta=0.0),
    "no spread": lambda: epsilon_between(shift=1.0, spread=0.0, delta=1e-5),
    "a shift without end": lambda: gaussian_epsilon(math.inf, 1e-5),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str) -> None:
    with pytest.raises(FedchorusError) as refused:
        BAD[case]()
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, DataError | UnsupportedEvent)

"""The bracket holds the truth: exact curves, quadrature, other accountants; it is as narrow as asked, and refuses."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtr

import privacy.prv
from privacy.errors import UnsupportedEvent
from privacy.prv import Bounds, Phase, Plan, bounds_by_direction, epsilon_bounds


def plan_of(*phases: tuple[float, float, int]) -> Plan:
    return tuple(sorted(((noise, rate), count) for noise, rate, count in phases))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv:1805.06530), Thm. 8."""
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu))


def loss(phase: Phase, outcome: float) -> float:
    noise, rate = phase
    return math.log1p(rate * math.expm1((outcome - 0.5) / noise**2))


def one_delta(phase: Phase, direction: int, epsilon: float) -> float:
    """The hockey stick of one release in closed form: losses rise with the outcome, so its sets are half-lines."""
    noise, rate = phase
    inner = 1 + math.expm1(direction * epsilon) / rate
    if inner <= 0:  # No loss is that low (1), or that high (-1).
        return -math.expm1(epsilon) if direction > 0 else 0.0
    outcome = noise**2 * math.log(inner) + 0.5
    ends = np.array([-outcome, 1 - outcome] if direction > 0 else [outcome, outcome - 1]) / noise
    absent, present = (float(tail) for tail in ndtr(ends))
    mixed = (1 - rate) * absent + rate * present
    return mixed - math.exp(epsilon) * absent if direction > 0 else absent - math.exp(epsilon) * mixed


def density(phase: Phase, direction: int, outcome: float) -> float:
    noise, rate = phase
    absent, present = (
        math.exp(-(((outcome - at) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi)) for at in (0, 1)
    )
    return (1 - rate) * absent + rate * present if direction > 0 else absent


def quadrature_delta(phases: list[Phase], direction: int, epsilon: float) -> float:
    """The hockey stick of one release by direct integration, or of two: E over the first's loss of the second's."""
    first, *rest = phases

    def integrand(outcome: float) -> float:
        remaining = epsilon - direction * loss(first, outcome)
        worth = one_delta(rest[0], direction, remaining) if rest else max(0.0, -math.expm1(remaining))
        return density(first, direction, outcome) * worth

    noise, _ = first
    points = np.linspace(-12 * noise, 1 + 12 * noise, 40)
    return math.fsum(
        quad(integrand, low, high, epsabs=1e-15, epsrel=1e-9, limit=200)[0] for low, high in pairwise(points)
    )


plans = st.lists(
    st.tuples(st.floats(0.6, 4), st.sampled_from([0.01, 0.05, 0.3, 0.8, 1.0]), st.integers(1, 40)),
    min_size=1,
    max_size=3,
).map(lambda phases: plan_of(*phases))
deltas = st.sampled_from([1e-8, 1e-5, 1e-2])
light = settings(max_examples=10, deadline=None)


class TestProperties:
    @light
    @given(
        mus=st.lists(st.floats(0.02, 3), min_size=1, max_size=3), delta=st.floats(1e-9, 0.3), error=st.floats(1e-3, 0.3)
    )
    def test_the_exact_curve_of_unsampled_releases_lies_inside(
        self, mus: list[float], delta: float, error: float
    ) -> None:
        bounds = epsilon_bounds(plan_of(*((1 / mu, 1.0, 2) for mu in mus)), delta, error=error)
        mu = math.sqrt(2 * sum(mu**2 for mu in mus))
        assert gaussian_delta(mu, bounds.upper) <= delta
        assert bounds.lower == 0 or gaussian_delta(mu, bounds.lower) >= delta
        assert bounds.lower <= bounds.estimate <= bounds.upper

    @settings(max_examples=6, deadline=None)
    @given(plan=plans, delta=deltas)
    def test_overlaps_with_dp_accountings_optimistic_and_pessimistic_values(self, plan: Plan, delta: float) -> None:
        from dp_accounting.pld import privacy_loss_distribution as pld

        def value(*, pessimistic: bool) -> float:
            composed = pld.identity(2e-3, pessimistic_estimate=pessimistic)
            for (noise, rate), count in plan:
                part = pld.from_gaussian_mechanism(
                    noise,
                    pessimistic_estimate=pessimistic,
                    value_discretization_interval=2e-3,
                    sampling_prob=rate,
                    use_connect_dots=False,
                )
                composed = composed.compose(part.self_compose(count))
            return float(composed.get_epsilon_for_delta(delta))

        bounds = epsilon_bounds(plan, delta)
        assert bounds.lower <= value(pessimistic=True)
        assert bounds.upper >= value(pessimistic=False)

    @light
    @given(plan=plans, delta=deltas)
    def test_is_narrow_and_a_smaller_error_makes_it_narrower_around_the_same(self, plan: Plan, delta: float) -> None:
        wide, fine = epsilon_bounds(plan, delta, error=0.05), epsilon_bounds(plan, delta, error=0.005)
        for bounds, error in ((wide, 0.05), (fine, 0.005)):
            # A thousandth of delta moves epsilon by at most a hundredth of what doubling delta does.
            worth = bounds.estimate - epsilon_bounds(plan, 2 * delta, error=error).estimate + 1e-4
            assert bounds.upper - bounds.estimate <= error + worth / 100
            assert bounds.estimate - bounds.lower <= error + worth / 100
        assert max(wide.lower, fine.lower) <= min(wide.upper, fine.upper)
        assert wide.estimate == pytest.approx(fine.estimate, abs=2e-3)

    @light
    @given(
        noise=st.floats(0.6, 3),
        rate=st.floats(0.01, 0.9),
        count=st.integers(1, 60),
        delta=deltas,
        worse=st.sampled_from(["noise", "rate", "count", "delta"]),
    )
    def test_rises_with_count_and_rate_and_falls_with_noise_and_delta(
        self, noise: float, rate: float, count: int, delta: float, worse: str
    ) -> None:
        better = epsilon_bounds(plan_of((noise, rate, count)), delta)
        noise, rate = noise / (1.1 if worse == "noise" else 1), rate * (1.1 if worse == "rate" else 1)
        count, delta = count + (worse == "count"), delta / (1.5 if worse == "delta" else 1)
        dearer = epsilon_bounds(plan_of((noise, rate, count)), delta)
        assert dearer.upper >= better.upper - 0.01
        assert dearer.estimate >= better.estimate - 1e-4

    @light
    @given(plan=plans, delta=deltas)
    def test_a_phase_may_be_told_in_parts_and_in_any_order(self, plan: Plan, delta: float) -> None:
        parts = [(phase, 1) for phase, _ in plan] + [(phase, count - 1) for phase, count in plan if count > 1]
        whole, told = epsilon_bounds(plan, delta), epsilon_bounds(tuple(reversed(parts)), delta)
        for name in ("lower", "estimate", "upper"):
            assert getattr(told, name) == pytest.approx(getattr(whole, name), abs=1e-5)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(
    ("phases", "delta"),
    [
        ([(1.0, 0.1)], 1e-4),
        ([(0.5, 0.02)], 1e-3),
        ([(2.0, 0.7)], 1e-5),
        ([(0.3, 0.9)], 1e-6),
        ([(0.8, 0.2), (1.5, 0.5)], 1e-5),
        ([(0.7, 0.5), (0.7, 0.5)], 1e-4),
    ],
)
def test_agrees_with_direct_integration_of_the_hockey_stick(phases: list[Phase], delta: float, direction: int) -> None:
    bounds = bounds_by_direction(plan_of(*((*phase, 1) for phase in phases)), delta)[0 if direction > 0 else 1]
    exact = brentq(lambda epsilon: quadrature_delta(phases, direction, epsilon) - delta, 1e-6, 30, xtol=1e-7)
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.estimate == pytest.approx(exact, abs=1e-3)
    if len(phases) == 1:
        assert quadrature_delta(phases, direction, exact) == pytest.approx(
            one_delta(phases[0], direction, exact), rel=1e-6
        )


def test_reports_the_larger_direction() -> None:
    plan = plan_of((0.8, 0.2, 3))
    first, second = bounds_by_direction(plan, 1e-5)
    assert first.lower > second.upper
    assert epsilon_bounds(plan, 1e-5) == first


@pytest.mark.parametrize("bins", [4, 8, 16, 64])
@pytest.mark.parametrize("plan", [plan_of((1.0, 1.0, 1)), plan_of((1.0, 0.5, 1)), plan_of((0.5, 0.5, 1))])
def test_holds_the_truth_on_meshes_so_coarse_that_rounding_shows(
    plan: Plan, bins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = epsilon_bounds(plan, 1e-3, error=1e-3)
    monkeypatch.setattr(privacy.prv, "LEAST_BINS", bins)
    coarse = epsilon_bounds(plan, 1e-3, error=1e3)
    assert coarse.lower <= fine.lower
    assert fine.upper <= coarse.upper


# Phases (noise multiplier, rate, count), delta; lower, estimate and upper of Microsoft's prv_accountant 0.2.0 at error
# 0.01; the PLD value of dp-accounting 0.6.0 at grid 1e-4, an upper bound. Settings: Abadi et al. 2016, sec. 3.2;
# TensorFlow Privacy's MNIST tutorial; Opacus' unit tests; jax_privacy's documentation; McMahan et al. 2018; corners.
Golden = tuple[list[tuple[float, float, int]], float, tuple[float, float, float], float]
GOLDEN: dict[str, Golden] = {
    "abadi16": ([(4.0, 0.01, 10_000)], 1e-5, (0.9368, 0.9469, 0.9569), 0.9470),
    "tf-privacy-15": ([(1.3, 256 / 60_000, 3515)], 1e-5, (0.8544, 0.8644, 0.8745), 0.8645),
    "tf-privacy-60": ([(1.1, 256 / 60_000, 14_062)], 1e-5, (2.3715, 2.3816, 2.3917), 2.3817),
    "tf-privacy-45": ([(0.7, 256 / 60_000, 10_546)], 1e-5, (5.6291, 5.6394, 5.6498), 5.6394),
    "opacus-unit-test": ([(1.5, 0.04, 2250)], 1e-5, (6.7584, 6.7688, 6.7791), 6.7688),
    "jax-privacy": ([(3.0, 0.1, 512)], 1e-6, (3.7595, 3.7697, 3.7799), 3.7697),
    "plain": ([(1.0, 0.01, 1000)], 1e-5, (1.8181, 1.8282, 1.8384), 1.8282),
    "half-noise": ([(0.5, 0.01, 1000)], 1e-5, (13.351, 13.362, 13.373), 13.3608),
    "little-noise": ([(0.3, 0.001, 1000)], 1e-6, (21.6666, 21.6781, 21.6896), 21.6780),
    "small-rate": ([(0.6, 1e-5, 100_000)], 1e-8, (0.2530, 0.2631, 0.2731), 0.2638),
    "tiny-rate": ([(1.0, 1e-6, 1_000_000)], 1e-9, (-0.0046, 0.0054, 0.0154), 0.0425),
    "two-percent": ([(0.8, 0.02, 500)], 1e-6, (5.4300, 5.4403, 5.4506), 5.4403),
    "five-percent": ([(2.0, 0.05, 200)], 1e-5, (1.5505, 1.5606, 1.5707), 1.5606),
    "ten-percent": ([(1.0, 0.1, 100)], 1e-5, (7.0368, 7.0473, 7.0577), 7.0466),
    "half-the-sites": ([(5.0, 0.5, 100)], 1e-5, (4.4776, 4.4878, 4.4981), 4.4878),
    "most-of-the-sites": ([(20.0, 0.9, 100)], 1e-5, (1.7640, 1.7741, 1.7842), 1.7741),
    "one-gaussian": ([(1.0, 1.0, 1)], 1e-5, (4.3669, 4.3772, 4.3874), 4.3772),
    "one-loud-gaussian": ([(0.5, 1.0, 1)], 1e-5, (9.9868, 9.9973, 10.0077), 9.9973),
    "many-gaussians": ([(50.0, 1.0, 2500)], 1e-10, (6.5378, 6.5480, 6.5581), 6.5479),
    "faint-gaussians": ([(100.0, 1.0, 100)], 1e-6, (0.3868, 0.3969, 0.4069), 0.3969),
    "two-phases": ([(1.0, 0.01, 500), (2.0, 0.01, 500)], 1e-5, (1.3885, 1.3986, 1.4088), 1.3987),
    "three-phases": ([(0.8, 0.01, 200), (1.2, 0.02, 300), (2.0, 0.05, 100)], 1e-5, (2.4278, 2.4380, 2.4482), 2.4380),
    "two-runs": ([(1.0, 0.01, 1000), (1.1, 256 / 60_000, 3515)], 1e-5, (2.1634, 2.1736, 2.1837), 2.1736),
    "five-runs": ([(1.0, 0.01, 5000)], 1e-5, (4.1916, 4.2018, 4.2121), 4.2019),
    "sampled-and-not": ([(1.0, 0.01, 1000), (20.0, 1.0, 5)], 1e-5, (1.8701, 1.8802, 1.8904), 1.8803),
    "dp-fedavg": ([(1.0, 0.005, 2000)], 1e-8, (1.7787, 1.7888, 1.7988), 1.7888),
    "hundred-thousand": ([(2.0, 0.001, 100_000)], 1e-6, (0.6866, 0.6967, 0.7067), 0.6988),
    "a-million": ([(4.0, 0.001, 1_000_000)], 1e-6, (1.0694, 1.0794, 1.0895), 1.0944),
    "tiny-delta": ([(1.0, 0.01, 1000)], 1e-12, (3.9042, 3.9143, 3.9244), 3.9158),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_agrees_with_published_and_independent_figures(case: str) -> None:
    phases, delta, (lower, estimate, upper), pld = GOLDEN[case]
    bounds = epsilon_bounds(plan_of(*phases), delta)
    assert bounds.estimate == pytest.approx(estimate, abs=0.003)
    assert bounds.lower <= pld + 5e-5  # It was rounded to four digits.
    assert bounds.lower <= upper
    assert bounds.upper >= lower
    assert bounds.upper - bounds.lower <= upper - lower + 0.007  # At delta 1e-12, rounding takes its share.


@pytest.mark.parametrize(("noise", "rate", "count"), [(1.0, 0.02, 300), (0.8, 0.1, 20)])
def test_agrees_with_opacus(noise: float, rate: float, count: int) -> None:
    from opacus.accountants import PRVAccountant

    opacus = PRVAccountant()
    opacus.history = [(noise, rate, count)]
    theirs = opacus.get_epsilon(1e-5, eps_error=0.01)  # An upper bound.
    bounds = epsilon_bounds(plan_of((noise, rate, count)), 1e-5)
    assert bounds.lower <= theirs
    assert bounds.estimate == pytest.approx(theirs - 0.01, abs=0.001)


def test_two_runs_together_cost_less_than_their_sum() -> None:
    one, other = plan_of((1.0, 0.01, 300)), plan_of((1.3, 0.02, 200))
    assert epsilon_bounds(one + other, 1e-5).upper < sum(epsilon_bounds(run, 1e-5).lower for run in (one, other))


def test_the_mesh_grows_finer_with_the_root_of_the_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gain over grids that err one way, whose error grows with the count, is what pays for the two sides."""
    meshes = []
    multiply = privacy.prv._Spectrum.multiply

    def spy(
        self: privacy.prv._Spectrum, release: privacy.prv._Release, first: int, masses: NDArray[np.float64]
    ) -> None:
        meshes.append(self.mesh)
        multiply(self, release, first, masses)

    monkeypatch.setattr(privacy.prv._Spectrum, "multiply", spy)
    for count in (1000, 4000):
        epsilon_bounds(plan_of((2.0, 0.05, count)), 1e-5)
    assert meshes[0] / meshes[-1] == pytest.approx(2, abs=1e-6)
    # Hoeffding: 1000 errors in intervals of the mesh's length exceed 0.01 with probability delta / 4096.
    assert math.exp(-2 * 0.01**2 / (1000 * meshes[0] ** 2)) == pytest.approx(1e-5 / 4096, rel=0.1)


class TestEdges:
    def test_nothing_costs_nothing(self) -> None:
        assert epsilon_bounds((), 1e-5) == Bounds(0.0, 0.0, 0.0)

    @pytest.mark.parametrize("delta", [1e-9, 0.5, 1 - 1e-9])
    @pytest.mark.parametrize("rate", [2.0**-64, 1e-15, 1e-12])
    def test_a_rate_that_samples_nobody_costs_nothing(self, rate: float, delta: float) -> None:
        bounds = epsilon_bounds(plan_of((1.0, rate, 10)), delta)
        assert bounds.lower == bounds.estimate == 0
        assert 0 <= bounds.upper <= 0.01

    def test_almost_no_sampling_costs_what_none_does(self) -> None:
        almost, none = (epsilon_bounds(plan_of((1.0, rate, 4)), 1e-5) for rate in (1 - 1e-15, 1.0))
        assert almost.estimate == pytest.approx(none.estimate, abs=1e-4)

    def test_losses_far_beyond_what_a_float_can_exponentiate(self) -> None:
        mu = math.sqrt(10) / 0.0625  # Its losses reach 1500, with and without nearly everyone sampled.
        exact = brentq(lambda eps: ndtr(mu / 2 - eps / mu) - 1e-5, 0, 3000)  # e^eps Phi(...) lowers it by < 0.3 mu.
        assert epsilon_bounds(plan_of((0.0625, 1.0, 10)), 1e-5).estimate == pytest.approx(exact, abs=0.3 * mu)
        bounds = epsilon_bounds(plan_of((0.0625, 0.5, 10)), 1e-5)
        assert 1300 < bounds.lower <= bounds.upper < 1400


class TestFloatingPoint:
    @pytest.mark.skipif(bool(np.finfo(np.longdouble).eps > 1e-18), reason="needs 80-bit arithmetic")
    @pytest.mark.parametrize("length", [2**12, 3 * 5**2 * 2**8, 2**18])
    @pytest.mark.parametrize("width", [3, 300])
    def test_transforms_err_by_at_most_half_of_what_is_charged(self, length: int, width: int) -> None:
        masses = np.zeros(length)
        masses[:width] = np.random.default_rng(0).random(width) / width
        exact = rfft(masses.astype(np.longdouble))
        norm = float(np.linalg.norm(masses))
        charged = privacy.prv.NORM_ERROR * norm + privacy.prv.SUM_ERROR * masses.sum()
        for count in (5, len(exact)):
            errors = np.abs(privacy.prv._transform(masses, 0, length, count) - exact[:count]).astype(float)
            assert errors.max() < charged / 2
        rounded = exact.astype(np.complex128)
        back = irfft(rounded, length) - irfft(rounded.astype(np.clongdouble), length)
        assert np.linalg.norm(back.astype(float)) < privacy.prv.NORM_ERROR / 2 * norm

    @pytest.mark.parametrize("first", [-700, 0, 37, 9000])
    def test_sums_in_blocks_are_the_transform(self, first: int) -> None:
        values = np.random.default_rng(1).random(2000)
        whole = privacy.prv._transform(values, first, 3000, 1501)
        few = privacy.prv._transform(values, first, 3000, 5)
        assert np.allclose(few, whole[:5], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("count", [63, 64, 65, 1000])
    def test_both_ways_to_a_spectrum_agree(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, found = plan_of((0.9, 0.02, count)), []
        for many in (1, 10**9):
            monkeypatch.setattr(privacy.prv, "MANY", many)
            found.append(epsilon_bounds(plan, 1e-7).estimate)
        assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize(
    ("plan", "delta", "error", "message"),
    [
        (plan_of((1.0, 0.5, 1)), 0.0, 0.01, "delta must lie between 0 and 1, got 0.0"),
        (plan_of((1.0, 0.5, 1)), 1.0, 0.01, "delta must lie between 0 and 1, got 1.0"),
        (plan_of((1.0, 0.5, 1)), math.nan, 0.01, "delta must lie between 0 and 1, got nan"),
        (plan_of((1.0, 0.5, 1)), 1e-5, 0.0, "error must be a finite number > 0, got 0.0"),
        (plan_of((1.0, 0.5, 1)), 1e-5, math.inf, "error must be a finite number > 0, got inf"),
        (plan_of((1.0, 0.5, 1)), 1e-5, math.nan, "error must be a finite number > 0, got nan"),
        (plan_of((0.0, 0.5, 1)), 1e-5, 0.01, "noise_multiplier must be in"),
        (plan_of((0.05, 1.0, 1)), 1e-5, 0.01, "noise_multiplier must be in"),
        (plan_of((1.0, 0.0, 1)), 1e-5, 0.01, r"rate must be in \[2\^-64, 1\]"),
        (plan_of((1.0, 1.5, 1)), 1e-5, 0.01, r"rate must be in \[2\^-64, 1\]"),
        (plan_of((1.0, 0.5, 0)), 1e-5, 0.01, "count must be a whole number"),
        (plan_of((1.0, 0.5, 1)), 1e-16, 0.01, "delta must be at least .* got 1e-16"),
        (plan_of((1.0, 0.01, 1000)), 1e-15, 0.01, "delta must be at least .* got 1e-15"),
        (plan_of((1.0, 1.0, 1)), 1e-14, 0.01, "delta must be at least .* got 1e-14"),
        (plan_of((0.0625, 0.001, 1000)), 1e-5, 0.01, "error must be larger .* 0.01 takes 1.6e.07 bins, at most 2.22"),
        (plan_of((300.0, 0.5, 2**40)), 1e-5, 0.01, "error must be larger"),
        (plan_of((1.0, 0.1, 100)), 1e-5, 1e-9, "error must be larger"),
    ],
)
def test_refuses_what_it_cannot_bound(plan: Plan, delta: float, error: float, message: str) -> None:
    with pytest.raises(UnsupportedEvent, match=message):
        epsilon_bounds(plan, delta, error=error)

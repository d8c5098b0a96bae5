"""Privacy loss distributions bound from above, and closely: against another library, closed forms and proven bounds."""

import math

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accountant import epsilon, epsilon_pld
from privacy.errors import UnsupportedEvent
from privacy.events import GaussianEvent
from privacy.pld import Plan, pld_epsilon
from privacy.prv import epsilon_bounds


def event_of(plan: Plan) -> GaussianEvent:
    (((noise, rate), count),) = plan
    return GaussianEvent(noise_multiplier=noise, clip_norm=1.0, sampling_rate=rate, count=count, rng="os")


def exact(mu: float, delta: float) -> float:
    return float(epsilon([event_of((((1 / mu, 1.0), 1),))], delta).exact or 0.0)


plans = st.lists(
    st.tuples(st.tuples(st.floats(0.6, 8.0), st.floats(1e-3, 1.0) | st.just(1.0)), st.sampled_from([1, 2, 17, 120])),
    min_size=1,
    max_size=2,
    unique_by=lambda phase: phase[0],
).map(lambda phases: tuple(sorted(phases)))


@settings(max_examples=15, deadline=None)
@given(plan=plans, delta=st.sampled_from([1e-3, 1e-5, 1e-7]))
def test_lies_in_the_interval_that_another_method_proves(plan: Plan, delta: float) -> None:
    try:
        proven = epsilon_bounds(plan, delta)
    except UnsupportedEvent:
        return
    assert proven.lower <= pld_epsilon(plan, delta) + 1e-9
    assert pld_epsilon(plan, delta) <= proven.upper + 1e-3


@settings(max_examples=5, deadline=None)
@given(plan=plans)
def test_agrees_with_the_same_method_in_dp_accounting(plan: Plan) -> None:
    from dp_accounting.pld import privacy_loss_distribution

    composed = privacy_loss_distribution.identity(value_discretization_interval=1e-4)
    for (noise, rate), count in plan:
        one = privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=rate)
        composed = composed.compose(one.self_compose(count) if count > 1 else one)
    theirs = composed.get_epsilon_for_delta(1e-5)
    assert pld_epsilon(plan, 1e-5) == pytest.approx(theirs, abs=2e-3, rel=1e-3)


def two_releases(eps: float, noise: float, rate: float, *, remove: bool) -> mpmath.mpf:
    """delta(eps) of two sampled releases by quadrature over both outcomes, apart from the module."""
    with mpmath.workdps(30):
        scale, q = mpmath.mpf(noise), mpmath.mpf(rate)

        def density(x: mpmath.mpf, mean: int) -> mpmath.mpf:
            return mpmath.npdf(x, mean, scale)

        def ratio(x: mpmath.mpf) -> mpmath.mpf:
            return 1 - q + q * mpmath.exp((2 * x - 1) / (2 * scale**2))

        def inner(x: mpmath.mpf) -> mpmath.mpf:
            # The second outcome above (or below) the point where the sum of both losses is eps; closed form in it.
            sign = 1 if remove else -1
            bound = mpmath.exp(sign * eps) / ratio(x)
            level = (bound - 1 + q) / q
            cut = scale**2 * mpmath.log(level) + mpmath.mpf(1) / 2 if level > 0 else -mpmath.inf
            q_above = mpmath.ncdf(-cut / scale)
            p_above = (1 - q) * q_above + q * mpmath.ncdf((1 - cut) / scale)
            if remove:
                return density(x, 0) * (ratio(x) * p_above - mpmath.exp(eps) * q_above)
            return density(x, 0) * ((1 - q_above) - mpmath.exp(eps) * ratio(x) * (1 - p_above))

        return mpmath.quad(inner, mpmath.linspace(-9 * noise, 1 + 9 * noise, 13))


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.7, 0.4)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_two_releases_cost_what_quadrature_says(noise: float, rate: float, delta: float) -> None:
    epsilon = pld_epsilon((((noise, rate), 2),), delta)
    worst = max(two_releases(epsilon, noise, rate, remove=remove) for remove in (True, False))
    before = max(two_releases(epsilon - 0.002, noise, rate, remove=remove) for remove in (True, False))
    assert worst <= delta * (1 + 1e-9) < before


@pytest.mark.parametrize("delta", [1e-12, 1e-50, 1e-250])
def test_the_tiniest_deltas_of_compositions_stay_between_the_single_release_and_the_renyi_bound(delta: float) -> None:
    from privacy.distributed import discrete_gaussian_epsilon

    one, many = pld_epsilon((((2.0, 0.1), 1),), delta), pld_epsilon((((2.0, 0.1), 30),), delta)
    assert one < many < discrete_gaussian_epsilon(delta, noise_multiplier=2.0, sampling_rate=0.1, count=30)
    assert many > 0.5 * discrete_gaussian_epsilon(delta, noise_multiplier=2.0, sampling_rate=0.1, count=30)


@pytest.mark.parametrize(
    ("plan", "delta", "known"),
    [
        # Microsoft's prv_accountant 0.2.0, estimates: where a fixed grid of 1e-4 overstates.
        ((((0.6, 1e-5), 100_000),), 1e-8, 0.2631),
        ((((4.0, 1e-3), 1_000_000),), 1e-6, 1.0794),
        ((((1.0, 0.01), 1000),), 1e-12, 3.9143),
        ((((1.0, 0.01), 1000), ((1.1, 256 / 60_000), 3515)), 1e-5, 2.1736),  # Two runs; 1.8282 + 1.1337 alone.
        ((((1.0, 0.01), 1000), ((20.0, 1.0), 5)), 1e-5, 1.8803),
    ],
)
def test_known_estimates_are_met(plan: Plan, delta: float, known: float) -> None:
    assert pld_epsilon(plan, delta) == pytest.approx(known, abs=1e-3)


def test_a_coarser_grid_never_says_less() -> None:
    plan = (((1.5, 0.05), 200),)
    fine, coarse = pld_epsilon(plan, 1e-6), pld_epsilon(plan, 1e-6, grid=1e-2)
    assert fine <= coarse < fine + 0.2


def test_where_no_window_holds_the_fine_grid_a_coarse_one_still_bounds() -> None:
    plan = (((2.0**20, 0.9), 2**40),)
    # The central limit is right here: mu = 0.9, exactly a Gaussian for noise so large.
    assert epsilon_pld([event_of(plan)], 1e-5) >= exact(0.9, 1e-5)
    assert epsilon_pld([event_of(plan)], 1e-5) < pld_epsilon(plan, 1e-5) < math.inf

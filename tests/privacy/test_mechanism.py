"""The clip holds in exact integers for every input, and what is released says nothing through its bits."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy import stats

from privacy.accountant import epsilon_pld, noise_multiplier_for
from privacy.errors import UnsupportedEvent
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum, clip_in_place
from privacy.noise import SeededNoise, discrete_gaussian, discretisation_tv

ACCEPT, REJECT = 1e-3, 1e-9

Rows = NDArray[np.float32]
clip_norms = st.floats(2.0**-100, 2.0**100)
shapes = st.tuples(st.integers(0, 5), st.integers(1, 12))


def from_bits(bits: NDArray[np.uint32]) -> Rows:
    return bits.view(np.float32)


# Any pattern of bits at all: subnormal, infinite and NaN of both kinds; and finite values of every magnitude.
any_rows = shapes.flatmap(lambda shape: npst.arrays(np.uint32, shape).map(from_bits))
finite_rows = shapes.flatmap(
    lambda shape: npst.arrays(
        np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False), fill=st.nothing()
    )
)


def mechanism(clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> GaussianSum:
    return GaussianSum(clip_norm=clip_norm, noise_multiplier=noise_multiplier)


def squared_norm(total: NDArray[np.int64]) -> int:
    return sum(int(value) ** 2 for value in total)


class TestClip:
    @settings(max_examples=120)
    @given(rows=any_rows | finite_rows, clip_norm=clip_norms)
    def test_no_row_whatsoever_exceeds_the_clip_norm_in_integers(self, rows: Rows, clip_norm: float) -> None:
        for row in rows:
            assert squared_norm(mechanism(clip_norm).quantised_sum(row[None])) <= STEPS_PER_CLIP**2

    @pytest.mark.parametrize("value", [1e-45, 1e-30, 1e-4, 0.3, 1.0, 7.7, 1e19, 3.4e38])
    @pytest.mark.parametrize("dimension", [1, 3, 1000, 1_000_003])
    def test_nor_does_a_long_row_whose_norm_is_rounded_in_a_million_places(self, value: float, dimension: int) -> None:
        row = np.full((1, dimension), value, np.float32)
        clip_norm = min(2.0**100, max(2.0**-100, float(np.linalg.norm(row.astype(np.float64)))))
        total = mechanism(clip_norm).quantised_sum(row)
        assert len(np.unique(total)) == 1
        assert dimension * int(total[0]) ** 2 <= STEPS_PER_CLIP**2

    @settings(max_examples=60)
    @given(rows=finite_rows, clip_norm=st.floats(2.0**-40, 2.0**40))
    def test_a_row_within_the_clip_is_kept_to_one_grid_step_and_one_beyond_it_keeps_its_direction(
        self, rows: Rows, clip_norm: float
    ) -> None:
        for row in rows:
            total = mechanism(clip_norm).quantised_sum(row[None])
            norm = math.sqrt(sum(Fraction(float(x)) ** 2 for x in row))
            for x, step in zip(row.tolist(), total.tolist(), strict=True):
                exact = Fraction(x) * STEPS_PER_CLIP / Fraction(max(clip_norm, norm))
                assert abs(step) <= abs(exact)  # Toward zero.
                assert abs(exact) * (1 - Fraction(2, 2**24)) - 1 <= abs(step)
                assert step * x >= 0

    @given(rows=any_rows | finite_rows, clip_norm=clip_norms)
    def test_the_sum_is_the_sum_of_its_rows_however_they_are_grouped(self, rows: Rows, clip_norm: float) -> None:
        quantised_sum = mechanism(clip_norm).quantised_sum
        total = quantised_sum(rows)
        assert total.dtype == np.int64
        assert total.shape == rows.shape[1:]
        one_by_one = sum((quantised_sum(row[None]) for row in rows), np.zeros(rows.shape[1], np.int64))
        np.testing.assert_array_equal(total, one_by_one)
        np.testing.assert_array_equal(total, quantised_sum(rows[:2]) + quantised_sum(rows[2:]))
        np.testing.assert_array_equal(total, quantised_sum(rows[::-1]))

    @given(rows=any_rows, row=any_rows, clip_norm=clip_norms)
    def test_adding_or_removing_one_row_moves_the_sum_by_at_most_the_clip_norm(
        self, rows: Rows, row: Rows, clip_norm: float
    ) -> None:
        width = min(rows.shape[1], row.shape[1])
        without, more = rows[:, :width], row[:1, :width]
        quantised_sum = mechanism(clip_norm).quantised_sum
        assert squared_norm(quantised_sum(np.concatenate([without, more])) - quantised_sum(without)) <= (
            STEPS_PER_CLIP**2
        )

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_one_value_that_is_not_finite_silences_its_row_and_no_other(self, poison: float, place: int) -> None:
        # A clip by min(1, clip / norm) lets the rest of such a row through at any size: min(1, nan) is 1.
        rows = np.array([[0.5, 0.25, -0.125], [1e30, 1e30, 1e30], [0.0, 0.5, 0.0]], np.float32)
        rows[1, place] = poison
        total = mechanism().quantised_sum(rows)
        np.testing.assert_array_equal(total, mechanism().quantised_sum(rows[[0, 2]]))
        np.testing.assert_array_equal(mechanism().quantised_sum(rows[1:2]), np.zeros(3, np.int64))

    def test_a_signalling_nan_raises_no_alarm_that_would_show(self) -> None:
        rows = from_bits(np.array([[0x7FA00000, 0x3F800000]], np.uint32))
        assert mechanism().quantised_sum(rows).tolist() == [0, 0]  # Warnings are errors here.

    @pytest.mark.parametrize("rows", [np.zeros((1, 3)), np.zeros((4, 3)), np.zeros((0, 3)), np.zeros((2, 0))])
    def test_zero_rows_and_no_rows_contribute_zero(self, rows: NDArray[Any]) -> None:
        # A client without data must not crash the round: that it has none would show.
        total = mechanism().quantised_sum(rows.astype(np.float32))
        assert total.tolist() == [0] * rows.shape[1]
        assert total.dtype == np.int64

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_clip_is_shrunk_by_more_than_float64_errs_in_a_norm(self, sign: int) -> None:
        # By 2^-24, then rounded toward zero: 1 becomes 2^20 - 2^-4 and one step less than 2^20.
        row = np.array([[sign]], np.float32)
        assert mechanism().quantised_sum(row).tolist() == [sign * (2**20 - 1)]
        assert mechanism(0.5).quantised_sum(row).tolist() == [sign * (2**20 - 1)]
        assert mechanism(2.0).quantised_sum(row).tolist() == [sign * (2**19 - 1)]

    @pytest.mark.parametrize("clip_norm", [2.0**-100, 1.0, 2.0**100])
    def test_float64_rows_are_bounded_as_well(self, clip_norm: float) -> None:
        for value in (5e-324, 1e-200, 1e-160, 1.0, 1e150, 1e160, 1.7e308):
            row: NDArray[Any] = np.full((1, 3), value)
            assert squared_norm(mechanism(clip_norm).quantised_sum(row)) <= STEPS_PER_CLIP**2

    @given(rows=any_rows)
    def test_leaves_the_rows_as_they_are(self, rows: Rows) -> None:
        before = rows.tobytes()
        mechanism().quantised_sum(rows)
        assert rows.tobytes() == before


class TestRelease:
    @settings(max_examples=50)
    @given(
        total=npst.arrays(np.int64, 5, elements=st.integers(-(2**40), 2**40)),
        exponent=st.integers(-20, 20),
        seed=st.integers(0, 2**32),
    )
    def test_every_value_is_a_whole_number_of_grid_steps(
        self, total: NDArray[np.int64], exponent: int, seed: int
    ) -> None:
        clip_norm = 2.0**exponent
        released = mechanism(clip_norm).release(total, SeededNoise(seed))
        assert released.dtype == np.float64
        steps = released / (clip_norm / STEPS_PER_CLIP)  # Exact: a division by a power of two.
        assert np.all(steps == np.round(steps))

    def test_no_value_proves_which_of_two_neighbours_it_came_from(self) -> None:
        # A float32 near zero that is not a multiple of 2^-24 cannot be 1 + noise: at magnitude 1 there is no finer
        # value to round to. Such a value proves that the record was absent (Mironov 2012).
        def proofs(released: NDArray[Any]) -> float:
            fine = released.astype(np.float64) * 2.0**24
            return float(np.mean((np.abs(released) < 0.5) & (fine != np.round(fine))))

        size, absent, present = 100_000, np.zeros(100_000, np.int64), np.full(100_000, STEPS_PER_CLIP)
        naive = np.random.default_rng(1).standard_normal(size).astype(np.float32)
        assert proofs(naive) > 0.2  # This is what the leak looks like.
        assert proofs(np.float32(1) + naive) == 0
        for total in (absent, present):
            assert proofs(mechanism().release(total, SeededNoise(1))) == 0

    @pytest.mark.parametrize(("clip_norm", "noise"), [(1.0, 1.0), (0.25, 4.0), (10.0, 0.0625)])
    def test_the_noise_has_the_stated_scale_and_one_3_percent_off_is_rejected_either_way(
        self, clip_norm: float, noise: float
    ) -> None:
        released = mechanism(clip_norm, noise).release(np.zeros(400_000, np.int64), SeededNoise(2, "scale"))
        p_value = {
            ratio: stats.kstest(released / (ratio * noise * clip_norm), "norm", method="asymp").pvalue
            for ratio in (0.97, 1.0, 1.03)
        }
        assert p_value[1.0] > ACCEPT
        assert max(p_value[0.97], p_value[1.03]) < REJECT

    @given(total=npst.arrays(np.int64, 4, elements=st.integers(-(2**40), 2**40)), seed=st.integers(0, 2**32))
    def test_is_the_sum_and_integer_noise_and_nothing_else(self, total: NDArray[np.int64], seed: int) -> None:
        drawn = discrete_gaussian(SeededNoise(seed), math.sqrt((2 * STEPS_PER_CLIP) ** 2 + 1 / 12), 4)
        released = mechanism(0.5, 2.0).release(total, SeededNoise(seed))
        assert released.tolist() == [float(step) * 0.5 / STEPS_PER_CLIP for step in (total + drawn).tolist()]

    def test_an_empty_sum_is_noised_like_any_other(self) -> None:
        none = mechanism().quantised_sum(np.zeros((0, 1000), np.float32))
        assert np.count_nonzero(mechanism().release(none, SeededNoise(3))) == 1000

    def test_two_releases_share_no_noise(self) -> None:
        source, none = SeededNoise(4), np.zeros(1000, np.int64)
        first, second = mechanism().release(none, source), mechanism().release(none, source)
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
        assert not np.any(first == second)


class TestEvent:
    def test_charges_what_the_mechanism_does(self) -> None:
        event = mechanism(0.5, 2.0).event(sampling_rate=0.01, count=7, dimension=100, rng="os")
        assert (event.clip_norm, event.noise_multiplier) == (0.5, 2.0)
        assert (event.sampling_rate, event.count, event.rng) == (0.01, 7, "os")
        assert event.discretisation_tv == discretisation_tv(mechanism(0.5, 2.0).scale, 100, 7) > 0

    @pytest.mark.parametrize("noise", [0.0625, 0.5, 1.0, 3.7])
    def test_the_integer_noise_is_wider_than_the_charged_one_by_the_variance_of_rounding(self, noise: float) -> None:
        excess = Fraction(mechanism(1.0, noise).scale) ** 2 - (Fraction(noise) * STEPS_PER_CLIP) ** 2
        assert float(excess) == pytest.approx(1 / 12, abs=0.01)

    def test_the_price_of_the_grid_is_far_below_what_epsilon_is_reported_to(self) -> None:
        real = mechanism(1.0, 5.0).event(sampling_rate=0.1, count=500, dimension=10**7, rng="os")
        ideal = mechanism(1.0, 5.0).event(sampling_rate=0.1, count=500, dimension=0, rng="os")
        assert real.discretisation_tv > ideal.discretisation_tv == 0
        assert epsilon_pld([real], 1e-5) == pytest.approx(epsilon_pld([ideal], 1e-5), abs=1e-6)

    @pytest.mark.parametrize(("target", "rate", "count"), [(0.5, 0.05, 200), (0.5, 1.0, 30)])
    def test_noise_calibrated_for_a_target_keeps_it_when_the_grid_is_paid_for(
        self, target: float, rate: float, count: int
    ) -> None:
        noise = noise_multiplier_for(target_epsilon=target, delta=1e-5, sampling_rate=rate, count=count)
        event = mechanism(1.0, noise).event(sampling_rate=rate, count=count, dimension=10**6, rng="os")
        assert epsilon_pld([event], 1e-5) <= target


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1e-310, 2.0**-101, 2.0**101])
def test_a_clip_norm_that_cannot_be_kept_on_the_grid_is_refused(value: float) -> None:
    with pytest.raises(UnsupportedEvent, match="clip_norm"):
        GaussianSum(clip_norm=value, noise_multiplier=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, 0.0624, math.nan, math.inf, -math.inf, 2.0**20 + 1])
def test_a_noise_multiplier_that_protects_nobody_or_cannot_be_drawn_is_refused(value: float) -> None:
    with pytest.raises(UnsupportedEvent, match="noise_multiplier"):
        GaussianSum(clip_norm=1.0, noise_multiplier=value)


@pytest.mark.parametrize("clip_norm", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("noise", [0.0625, 2.0**20])
def test_the_extremes_that_are_accepted_work(clip_norm: float, noise: float) -> None:
    ours = mechanism(clip_norm, noise)
    total = ours.quantised_sum(np.array([[0.0, 1.0], [3e38, -3e38]], np.float32))
    released = ours.release(total, SeededNoise(5))
    assert np.all(np.isfinite(released))
    assert 0 < np.abs(released).max() <= 20 * clip_norm * (noise + 1)
    assert ours.event(sampling_rate=1.0, count=1, dimension=2, rng="os").noise_multiplier == noise


def test_every_refusal_comes_before_a_word_is_drawn() -> None:
    calls: list[Callable[[], object]] = [
        lambda: mechanism().event(sampling_rate=0.0, count=1, dimension=1, rng="os"),
        lambda: mechanism().event(sampling_rate=0.1, count=0, dimension=1, rng="os"),
        lambda: mechanism().event(sampling_rate=0.1, count=1, dimension=1, rng="numpy"),
    ]
    for call in calls:
        with pytest.raises(UnsupportedEvent):
            call()


class TestPerLayer:
    LAYERS = (3, 1, 6)

    @given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0, 1e30, math.inf, math.nan]))
    def test_each_layer_keeps_its_share_and_all_together_the_clip_norm(self, seed: int, scale: float) -> None:
        mechanism = GaussianSum(clip_norm=0.7, noise_multiplier=1.0, layers=self.LAYERS)
        row = np.random.default_rng(seed).normal(size=10)
        row[4:] *= 1e-3
        with np.errstate(invalid="ignore", over="ignore"):
            row[0] *= scale
        steps = mechanism.quantised_sum(row[None].astype(np.float32)).astype(float)
        parts = [float(np.linalg.norm(part)) for part in np.split(steps, [3, 4])]
        assert all(part <= STEPS_PER_CLIP / math.sqrt(3) for part in parts)
        assert float(np.linalg.norm(steps)) <= STEPS_PER_CLIP
        if math.isfinite(scale):
            # What is small passes as it is, however large its neighbours are.
            expected = row[4:].astype(np.float32).astype(float) * STEPS_PER_CLIP / 0.7
            np.testing.assert_allclose(steps[4:], expected, atol=1.0, rtol=1e-6)

    def test_one_layer_is_the_whole(self) -> None:
        rows = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
        flat = GaussianSum(clip_norm=0.7, noise_multiplier=1.0)
        one = GaussianSum(clip_norm=0.7, noise_multiplier=1.0, layers=(8,))
        np.testing.assert_array_equal(flat.quantised_sum(rows), one.quantised_sum(rows))

    @pytest.mark.parametrize("layers", [(3, 4), (8, 1), (8, 0), (-1, 9)])
    def test_layers_that_are_not_those_of_the_vector_are_refused(self, layers: tuple[int, ...]) -> None:
        with pytest.raises(UnsupportedEvent, match="layers"):
            GaussianSum(clip_norm=1.0, noise_multiplier=1.0, layers=layers).quantised_sum(np.zeros((1, 8), np.float32))


class TestClipInPlace:
    @given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-30, 0.1, 1.0, 50.0, 1e18, math.inf, math.nan]))
    def test_the_norm_is_never_longer_and_what_is_within_stays_as_it_is(self, seed: int, scale: float) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            update = (np.random.default_rng(seed).normal(size=9) * scale).astype(np.float32)
        before = update.copy()
        within = clip_in_place(update, 2.5)
        norm = float(np.linalg.norm(before.astype(float)))
        assert within is (norm <= 2.5)
        assert float(np.linalg.norm(update.astype(float))) <= 2.5
        if not math.isfinite(norm):
            assert not update.any()
        elif within:
            np.testing.assert_array_equal(update, before)
        else:
            np.testing.assert_allclose(update * norm, before * 2.5, rtol=1e-5)

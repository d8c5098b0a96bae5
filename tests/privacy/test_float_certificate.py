"""A value released by a float mechanism can prove the input it came from; one released by `GaussianSum` never does.

A certificate against input b is a value that b plus noise cannot give, whatever the noise: whoever sees it knows, with
no error at all, that the input was another (Mironov 2012; Haney et al. 2022, arXiv:2207.10635).
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import SeededNoise

SIZE = 100_000


def float_release(value: float, seed: int) -> NDArray[np.float32]:
    """What a mechanism that trusts its floats does: value + N(0, 1), all in float32."""
    noise = np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)
    return np.float32(value) + noise


def float_certificates(released: NDArray[np.float32], value: float) -> NDArray[np.bool_]:
    """Which values no float32 noise gives from `value`, by trying the noise that is nearest to it and both beside it.

    Adding to a fixed value is monotone after rounding, so that if any noise reaches a value, one of these three does.
    """
    nearest = (released.astype(np.float64) - np.float32(value)).astype(np.float32)
    beside = [np.nextafter(nearest, np.float32(side)) for side in (-np.inf, np.inf)]
    certified: NDArray[np.bool_] = ~np.any([np.float32(value) + n == released for n in (nearest, *beside)], axis=0)
    return certified


def grid_certificates(released: NDArray[np.float64], total: NDArray[np.int64], ours: GaussianSum) -> NDArray[np.bool_]:
    """Which values no integer noise within the sampler's reach gives from the quantised sum `total`."""
    step = ours.clip_norm / STEPS_PER_CLIP
    noise = np.rint(released / step).astype(np.int64) - total
    reached = (total + noise).astype(np.float64) * step == released
    certified: NDArray[np.bool_] = ~(reached & (np.abs(noise) <= 13.4 * ours.scale))
    return certified


class TestFloatNoise:
    @pytest.mark.parametrize("value", [0.3, 0.75, 1.0, 3.0])
    def test_proves_in_a_quarter_of_its_values_or_more_that_a_record_was_absent(self, value: float) -> None:
        assert np.mean(float_certificates(float_release(0.0, seed=1), value)) > 0.25

    def test_proves_it_by_each_value_near_zero_that_is_no_multiple_of_the_precision_at_the_record(self) -> None:
        # The part of the certificates that is checked by hand: 1 + noise below 1/2 is a multiple of 2^-24.
        released = float_release(0.0, seed=1)
        fine = released.astype(np.float64) * 2.0**24
        near_zero = (np.abs(released) < 0.5) & (fine != np.rint(fine))
        assert np.mean(near_zero) == pytest.approx(0.258, abs=0.005)
        assert np.all(float_certificates(released, 1.0)[near_zero])

    @pytest.mark.parametrize("value", [0.0, 1.0, 3.0, 0.75])
    def test_never_accuses_the_input_that_was_there(self, value: float) -> None:
        assert not np.any(float_certificates(float_release(value, seed=2), value))


vectors = npst.arrays(np.float32, (3, 4), elements=st.floats(-(2**20), 2**20, width=32))
clip_norms = st.floats(2.0**-100, 2.0**100)


class TestGaussianSum:
    @settings(max_examples=100)
    @given(rows=vectors, clip_norm=clip_norms, noise=st.floats(0.25, 16), seed=st.integers(0, 2**32))
    def test_no_release_tells_a_data_set_from_one_with_a_record_less(
        self, rows: NDArray[np.float32], clip_norm: float, noise: float, seed: int
    ) -> None:
        ours = GaussianSum(clip_norm=clip_norm, noise_multiplier=noise)
        present, absent = ours.quantised_sum(rows), ours.quantised_sum(rows[1:])
        for total, other in [(present, absent), (absent, present)]:
            released = ours.release(total, SeededNoise(seed))
            assert not np.any(grid_certificates(released, total, ours))
            assert not np.any(grid_certificates(released, other, ours))

    @pytest.mark.parametrize("clip_norm", [1.0, 0.3])
    def test_no_release_of_one_coordinate_does_in_a_hundred_thousand(self, clip_norm: float) -> None:
        ours = GaussianSum(clip_norm=clip_norm, noise_multiplier=1.0)
        absent, present = np.zeros(SIZE, np.int64), np.full(SIZE, STEPS_PER_CLIP)
        assert not np.any(grid_certificates(ours.release(absent, SeededNoise(3)), present, ours))
        assert not np.any(grid_certificates(ours.release(present, SeededNoise(3)), absent, ours))

    def test_what_gives_float_noise_away_finds_nothing_here(self) -> None:
        released = GaussianSum(clip_norm=1.0, noise_multiplier=1.0).release(np.zeros(SIZE, np.int64), SeededNoise(4))
        single = released.astype(np.float32)
        assert np.all(single == released)  # Multiples of 2^-20 below 2^4: float32's 24 bits hold them.
        assert not np.any(float_certificates(single, 1.0))

    def test_noise_added_off_the_grid_would_give_itself_away(self) -> None:
        # The control: exact noise on a sum that was never put on the grid.
        ours, total = GaussianSum(clip_norm=1.0, noise_multiplier=1.0), np.zeros(SIZE, np.int64)
        noise = ours.release(total, SeededNoise(5))
        assert np.all(grid_certificates(0.3 + noise, total, ours))

    def test_float_noise_would_give_itself_away(self) -> None:
        ours, total = GaussianSum(clip_norm=1.0, noise_multiplier=1.0), np.zeros(SIZE, np.int64)
        assert np.mean(grid_certificates(float_release(0.0, seed=6).astype(np.float64), total, ours)) > 0.9

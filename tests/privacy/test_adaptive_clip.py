"""The clip norm finds its quantile, and its bits cost exactly what Theorem 1 of arXiv:1905.03871 says."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from privacy.accountant import epsilon_pld
from privacy.adaptive_clip import AdaptiveClip
from privacy.errors import UnsupportedEvent
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import SeededNoise

# z, sigma_b and the z_delta of Theorem 1, to the digits of a separate computation with sigma_b on the sum of b_i - 1/2.
THEOREM_1 = [(1, 5, 1.005038), (1, 1, 1.154701), (0.5, 5, 0.500626), (0.8, 0.6, 1.073313), (2, 1.25, 3.333333)]
any_norms = npst.arrays(np.float32, st.integers(0, 8), elements=st.floats(width=32))


def adaptive(bit_noise: float = 5.0, **settings: float) -> AdaptiveClip:
    return AdaptiveClip(**{"initial": 1.0, "bit_noise": bit_noise, **settings})


def released_step(clip: AdaptiveClip, current: float, norms: NDArray[Any], cohort: float, source: SeededNoise) -> float:
    total = clip.bits.quantised_sum(clip.centred_bits(norms, current))
    return clip.step(current, clip.bits.release(total, source)[0], cohort=cohort)


class TestCost:
    @pytest.mark.parametrize(("z", "bit_noise", "z_delta"), THEOREM_1)
    def test_the_updates_get_the_noise_of_theorem_1(self, z: float, bit_noise: float, z_delta: float) -> None:
        assert adaptive(bit_noise).update_noise_multiplier(z) == pytest.approx(z_delta, abs=5e-7)
        assert adaptive(bit_noise).combined(z_delta) == pytest.approx(z, rel=1e-6)

    @given(z=st.floats(1e-3, 1e3), ratio=st.floats(0.5001, 1e4))
    def test_combining_undoes_the_split_and_the_updates_never_get_less_noise(self, z: float, ratio: float) -> None:
        clip = adaptive(min(max(z * ratio, 0.04), 2.0**19))
        z_delta = clip.update_noise_multiplier(z)
        assert z_delta >= z
        assert clip.combined(z_delta) == pytest.approx(z, rel=1e-9)

    @pytest.mark.parametrize(("z", "bit_noise"), [(z, b) for z, b, _ in THEOREM_1])
    def test_both_mechanisms_as_they_are_compose_to_the_multiplier_charged(self, z: float, bit_noise: float) -> None:
        clip = adaptive(bit_noise)
        updates = GaussianSum(clip_norm=3.0, noise_multiplier=clip.update_noise_multiplier(z))
        # What one client adds at most, in the mechanisms' own integers, over the noise that they really draw.
        longest = np.linalg.norm(updates.quantised_sum(np.array([[3e4, -4e4]], np.float32)))
        bit = max(abs(int(clip.bits.quantised_sum(clip.centred_bits(np.array([n]), 1.0))[0])) for n in (0.5, 2.0))
        mu = math.hypot(longest / updates.scale, bit / clip.bits.scale)
        assert 1 / mu == pytest.approx(z, rel=1e-5)

    def test_bits_of_0_and_1_under_noise_meant_for_centred_ones_would_cost_twice_as_much_epsilon(self) -> None:
        # The fault of opacus 1.6's AdaClipDPOptimizer: z = sigma_b = 1 in truth gives 0.756 (1.75^-1/2).
        z_delta = adaptive(1.0).update_noise_multiplier(1.0)
        assert 1 / math.hypot(1 / z_delta, 1 / 1.0) == pytest.approx(1.75**-0.5) == pytest.approx(0.756, abs=5e-4)
        assert 1 / math.hypot(1 / z_delta, 0.5 / 1.0) == pytest.approx(1.0, rel=1e-12)

    def test_an_accountant_sees_no_difference_between_both_releases_and_the_one_charged(self) -> None:
        clip = adaptive(0.8)
        updates = GaussianSum(clip_norm=1.0, noise_multiplier=clip.update_noise_multiplier(1.2))
        both = [
            mechanism.event(sampling_rate=1.0, count=3, dimension=9, rng="os") for mechanism in (updates, clip.bits)
        ]
        one = GaussianSum(clip_norm=1.0, noise_multiplier=1.2).event(sampling_rate=1.0, count=3, dimension=9, rng="os")
        assert epsilon_pld(both, 1e-5) == pytest.approx(epsilon_pld([one], 1e-5), abs=1e-3)

    def test_the_noise_on_the_bits_has_the_stated_deviation_and_5_percent_off_is_rejected_either_way(self) -> None:
        bits, source, draws = adaptive(5.0).bits, SeededNoise(1), 20_000
        noise = bits.release(np.zeros(draws, np.int64), source)
        # The variance of a sample of normals: relative standard error sqrt(2 / draws), 1 %.
        off = {right: abs(noise.var() / right**2 - 1) / math.sqrt(2 / draws) for right in (4.75, 5.0, 5.25)}
        assert off[5.0] < 4
        assert min(off[4.75], off[5.25]) > 8


class TestBits:
    @given(norms=any_norms, clip=st.floats(2.0**-100, 2.0**100))
    def test_any_norm_whatsoever_gives_one_of_two_bits_of_half_a_unit(self, norms: NDArray[Any], clip: float) -> None:
        bits = adaptive().centred_bits(norms, clip)
        assert bits.shape == (len(norms), 1)
        assert bits.dtype == np.float32
        assert [bit == 0.5 for bit in bits[:, 0].tolist()] == [norm <= clip for norm in norms.tolist()]
        assert np.all(np.abs(bits) == 0.5)

    def test_a_norm_as_long_as_the_clip_is_within_and_one_that_is_no_number_is_not(self) -> None:
        norms = np.array([0.0, 1.5, np.nextafter(1.5, 2), math.nan, math.inf, -math.inf])
        # The last is no norm; whatever is sent, there are two bits.
        assert adaptive().centred_bits(norms, 1.5)[:, 0].tolist() == [0.5, 0.5, -0.5, -0.5, -0.5, 0.5]

    def test_a_signalling_nan_raises_no_alarm_that_would_show(self) -> None:
        norms = np.array([0x7FA00000], np.uint32).view(np.float32)
        assert adaptive().centred_bits(norms, 1.0).tolist() == [[-0.5]]  # Warnings are errors here.

    @given(norms=any_norms, norm=st.floats(width=32), clip=st.floats(0.01, 100))
    def test_one_client_more_moves_the_sum_by_half_a_unit_and_never_more(
        self, norms: NDArray[Any], norm: float, clip: float
    ) -> None:
        ours = adaptive()
        less, more = (
            ours.bits.quantised_sum(ours.centred_bits(some, clip)) for some in (norms, np.append(norms, [norm]))
        )
        assert STEPS_PER_CLIP - 1 <= abs(int((more - less)[0])) <= STEPS_PER_CLIP
        assert ours.bits.clip_norm == 0.5

    def test_a_round_without_clients_releases_noise_and_moves_the_clip(self) -> None:
        moved = released_step(adaptive(), 1.0, np.empty(0), 100, SeededNoise(2))
        assert moved != 1.0  # Which it would be without noise: b = 1/2.


class TestStep:
    def test_moves_as_worked_out_by_hand(self) -> None:
        # 100 expected, 80 within and 20 not: the centred sum is 30, b = 0.8, C = 2 exp(-0.2 (0.8 - 0.5)).
        assert adaptive().step(2.0, 30.0, cohort=100) == pytest.approx(2 * 0.9417645335842487, rel=1e-15)
        # Nobody within: b = 0, C = 2 exp(0.1); and for the 0.9 quantile at rate 1, b = 0.8: C = exp(0.1).
        assert adaptive().step(2.0, -50.0, cohort=100) == pytest.approx(2 * 1.1051709180756477, rel=1e-15)
        # An expected cohort need not be whole: 8 / 12.5 + 1/2 = 1.14, C = 2 exp(-0.128).
        assert adaptive().step(2.0, 8.0, cohort=12.5) == pytest.approx(2 * 0.8798533791446438, rel=1e-15)
        upper = adaptive(quantile=0.9, learning_rate=1.0)
        assert upper.step(1.0, 30.0, cohort=100) == pytest.approx(1.1051709180756477, rel=1e-15)

    def test_divides_by_the_expected_cohort_however_many_answered(self) -> None:
        # Half of the clients drop out, the rest are within: divided by 50 it would be b = 1, divided by 100 it is 0.75.
        clip = adaptive()
        total = clip.bits.quantised_sum(clip.centred_bits(np.full(50, 0.1), 1.0))
        noiseless = float(total[0]) * 0.5 / STEPS_PER_CLIP
        assert clip.step(1.0, noiseless, cohort=100) == pytest.approx(math.exp(-0.2 * 0.25), rel=1e-6)

    @given(
        clip=st.floats(2.0**-100, 2.0**100),
        total=st.floats(allow_nan=False, allow_infinity=False),
        cohort=st.floats(1e-300, 1e300),
        rate=st.floats(1e-3, 1e3),
    )
    def test_whatever_was_released_the_next_clip_is_one_that_the_mechanism_takes(
        self, clip: float, total: float, cohort: float, rate: float
    ) -> None:
        moved = adaptive(learning_rate=rate).step(clip, np.float64(total), cohort=cohort)
        assert GaussianSum(clip_norm=moved, noise_multiplier=1.0).clip_norm == moved
        assert np.sign(moved - clip) in (0, -np.sign(total))  # More than half within: down; fewer: up.

    def test_one_release_may_move_the_clip_through_its_whole_range(self) -> None:
        assert adaptive().step(2.0**-100, -1e9, cohort=1) == 2.0**100
        assert adaptive().step(2.0**100, 1e9, cohort=1) == 2.0**-100

    @pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize("initial", [0.02, 30.0])
    def test_settles_at_the_quantile_of_the_norms_from_above_and_from_below(
        self, quantile: float, initial: float
    ) -> None:
        clip = adaptive(5.0, initial=initial, quantile=quantile)
        draws, source = np.random.default_rng(3), SeededNoise(3)
        current, settled = clip.initial, []
        for _ in range(400):
            norms = draws.lognormal(mean=0.3, sigma=0.7, size=draws.poisson(100))
            current = released_step(clip, current, norms, 100, source)
            settled.append(math.log(current))
        # The quantile of the normal law of the logarithms; the mean of 200 rounds' is good to 0.02 or so.
        normal = {0.2: -0.8416212, 0.5: 0.0, 0.9: 1.2815516}[quantile]
        assert np.mean(settled[200:]) == pytest.approx(0.3 + 0.7 * normal, abs=0.08)


STEP: Callable[..., float] = adaptive().step
BAD_CLIPS = [0.0, -1.0, math.nan, math.inf, 2.0**-101, 2.0**101, "1", True, None]
BAD_NUMBERS = [0.0, -1.0, math.nan, math.inf, "1", True, None]


@pytest.mark.parametrize(
    ("name", "value", "call"),
    [
        *(("initial", value, lambda v: adaptive(initial=v)) for value in BAD_CLIPS),
        *(("bit_noise", value, adaptive) for value in (*BAD_NUMBERS, 0.03, 2.0**19 + 1)),
        *(("quantile", value, lambda v: adaptive(quantile=v)) for value in (*BAD_NUMBERS, 1.0)),
        *(("learning_rate", value, lambda v: adaptive(learning_rate=v)) for value in BAD_NUMBERS),
        *(("noise_multiplier", value, lambda v: adaptive().update_noise_multiplier(v)) for value in BAD_NUMBERS),
        *(("update_noise_multiplier", value, lambda v: adaptive().combined(v)) for value in BAD_NUMBERS),
        *(("clip", value, lambda v: STEP(v, 0.0, cohort=10)) for value in BAD_CLIPS),
        *(("clip", value, lambda v: adaptive().centred_bits(np.ones(1), v)) for value in BAD_CLIPS),
        *(("noisy_sum", value, lambda v: STEP(1.0, v, cohort=10)) for value in (math.nan, math.inf, "1", None)),
        *(("cohort", value, lambda v: STEP(1.0, 0.0, cohort=v)) for value in BAD_NUMBERS),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any, call: Callable[[Any], object]) -> None:
    with pytest.raises(UnsupportedEvent, match=rf"\b{name} must be .*, got {value!r}".replace("+", r"\+")):
        call(value)


@pytest.mark.parametrize(("z", "bit_noise"), [(1.0, 0.5), (2.0, 0.9), (11.0, 5.0)])
def test_bits_that_alone_cost_more_than_is_allowed_are_refused(z: float, bit_noise: float) -> None:
    with pytest.raises(UnsupportedEvent, match=r"bit_noise must be more than half the noise multiplier"):
        adaptive(bit_noise).update_noise_multiplier(z)


@pytest.mark.parametrize("bit_noise", [1 / 32, 2.0**19])
def test_the_extremes_that_are_accepted_work(bit_noise: float) -> None:
    clip = adaptive(bit_noise)
    assert clip.bits.event(sampling_rate=1.0, count=1, dimension=1, rng="os").noise_multiplier == 2 * bit_noise
    assert released_step(clip, 1.0, np.ones(3), 3, SeededNoise(4)) > 0

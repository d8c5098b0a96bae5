"""No update, however hostile, reaches the sum longer than its bound; what is decoded is as good as one Gaussian's."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import hadamard

from privacy.accountant import epsilon_pld
from privacy.distributed import DistributedNoise, Mechanism, bits_needed
from privacy.distributed_sum import (
    MOST_ROUNDINGS,
    DistributedSum,
    _signs,
    _squared_norm,
    _walsh_hadamard,
    calibrate,
    padded,
)
from privacy.errors import JobError, Refused, UnsupportedEvent
from privacy.noise import NoiseSource, SeededNoise, discrete_gaussian, skellam

ACCEPT, REJECT = 1e-3, 1e-9
DELTA = 1e-5
ROTATION = bytes(range(32))
MECHANISMS: tuple[Mechanism, ...] = ("discrete_gaussian", "skellam")
# Epsilon 4 at 1e-5 for one Gaussian release by Rényi divergence at whole orders.
CENTRAL = 1.15776925711566

Update = NDArray[np.float32]


def summed(mechanism: Mechanism = "skellam", *, parameters: int = 5, **fields: Any) -> DistributedSum:
    some: dict[str, Any] = {"clients": 3, "clip_norm": 1.0, "granularity": 0.01, "local_scale": 0.02}
    noise = DistributedNoise(mechanism=mechanism, dimension=padded(parameters), **{**some, **fields})
    return DistributedSum(noise, parameters)


def planned(mechanism: Mechanism = "discrete_gaussian", **fields: Any) -> DistributedSum:
    some: dict[str, Any] = {"parameters": 2**12, "clients": 20, "cohort": 20, "clip_norm": 1.0, "bits": 16}
    return DistributedSum.plan(mechanism=mechanism, **{"noise_multiplier": CENTRAL, **some, **fields})


def rounded(plan: DistributedSum, update: Update, source: NoiseSource) -> list[int]:
    """What `encode` adds its share of the noise to."""
    return [int(x) for x in plan._rounded(plan._rotated(update, ROTATION), source)]


def within_its_bound(plan: DistributedSum, vector: list[int]) -> bool:
    return sum(x * x for x in vector) <= Fraction(plan.noise.rounded_norm / plan.noise.granularity) ** 2


class AlwaysUp:
    """Every word is the least: whatever may be rounded up is."""

    kind = "seeded-simulation"

    def __init__(self) -> None:
        self.calls = 0

    def words(self, count: int) -> NDArray[np.uint64]:
        self.calls += 1
        return np.zeros(count, np.uint64)


sources = st.builds(AlwaysUp) | st.integers(0, 99).map(SeededNoise)
# Any pattern of bits at all, and coordinates that are all the same: subnormal, huge, infinite, NaN of both kinds.
bit_patterns = npst.arrays(np.uint32, st.integers(1, 20)).map(lambda bits: bits.view(np.float32))
values = st.sampled_from([0.0, 1e-45, 1e-30, 0.3, 1.0, 3e38, math.inf, -math.inf, math.nan])
all_equal = st.builds(lambda value, size: np.full(size, value, np.float32), values, st.integers(1, 300))
finite = npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32))


@st.composite
def plans(draw: st.DrawFn, parameters: int) -> DistributedSum:
    clip_norm = 2.0 ** draw(st.floats(-60, 60))
    grid = clip_norm * 2.0 ** draw(st.floats(-39, 8))
    beta = draw(st.sampled_from([1e-9, 0.5, 0.999, 1 - 2.0**-53]))
    fields: dict[str, Any] = {"clip_norm": clip_norm, "granularity": grid, "local_scale": grid, "beta": beta}
    return summed(draw(st.sampled_from(MECHANISMS)), parameters=parameters, **fields)


class TestRounding:
    @settings(max_examples=200)
    @given(update=bit_patterns | all_equal | finite, source=sources, data=st.data())
    def test_no_update_whatsoever_exceeds_the_norm_that_is_paid_for(
        self, update: Update, source: NoiseSource, data: st.DataObject
    ) -> None:
        plan = data.draw(plans(len(update)))
        assert within_its_bound(plan, rounded(plan, update, source))

    @pytest.mark.parametrize("size", [1, 2**14, 2**14 + 1, 50_000])
    @pytest.mark.parametrize("most", [2, 2**30, 2**42])
    def test_norms_of_long_vectors_are_compared_exactly_to_their_last_coordinate(self, size: int, most: int) -> None:
        vector = np.random.default_rng(size).integers(1 - most, most, size)
        vector[-1] = 1 - most
        assert _squared_norm(vector) == sum(int(x) ** 2 for x in vector)
        assert _squared_norm(np.full(size, 1 - most)) == size * (most - 1) ** 2

    def test_what_is_rounded_to_too_long_is_rounded_again(self) -> None:
        # 0.4 steps in each of 64 coordinates: roundings of norm sqrt(25.6) on average, and sqrt(26.56) is allowed.
        plan = summed(parameters=64, clip_norm=3.2, granularity=1.0, local_scale=1.0, beta=0.999)
        steps = np.full(64, 0.4)
        assert plan._most == 26
        plain = [int((SeededNoise(seed).words(64) < 0.4 * 2.0**64).sum()) for seed in range(50)]
        assert 10 < sum(squares > 26 for squares in plain) < 40
        lengths = [int((plan._rounded(steps, SeededNoise(seed)) ** 2).sum()) for seed in range(50)]
        assert max(lengths) == 26
        # Those that were short enough at once are kept as they are.
        assert all(length == squares for length, squares in zip(lengths, plain, strict=True) if squares <= 26)

    def test_and_where_that_does_not_help_toward_zero(self) -> None:
        plan, source = summed(parameters=64, clip_norm=20.0, granularity=1.0, local_scale=1.0, beta=0.999), AlwaysUp()
        steps = np.repeat([2.4, -2.4], [48, 16])
        assert plan._rounded(steps, source).tolist() == [2] * 48 + [-2] * 16
        assert source.calls == MOST_ROUNDINGS

    def test_whole_numbers_stay_and_the_least_below_zero_is_no_whole_step(self) -> None:
        steps = np.array([0.0, -0.0, 3.0, -3.0, -1e-300, 1e-300])
        plan = summed(parameters=6, clip_norm=10.0, granularity=1.0, local_scale=1.0)
        for source in (SeededNoise(1), AlwaysUp()):
            assert plan._rounded(steps, source).tolist() == [0, 0, 3, -3, 0, 0]

    def test_is_unbiased(self) -> None:
        plan = summed(parameters=8, clip_norm=10.0, granularity=1.0, local_scale=1.0)
        steps = np.array([0.5, -0.5, 0.01, -0.99, 2.25, -1.75, 3.5, 0.125])
        draws, source = 4000, SeededNoise(2)
        mean = np.mean([plan._rounded(steps, source) for _ in range(draws)], axis=0)
        part = steps - np.floor(steps)
        deviation = np.sqrt(part * (1 - part) / draws)
        assert np.abs((mean - steps) / deviation).max() < stats.norm.isf(ACCEPT / 16)
        # Neither the nearest step nor a fair coin would pass.
        for wrong in (np.rint(steps), np.floor(steps) + 0.5):
            assert np.abs((wrong - steps) / deviation).max() > stats.norm.isf(REJECT)

    def test_refusing_the_longest_leaves_next_to_no_bias_on_a_grid_as_fine_as_those_that_are_planned(self) -> None:
        plan = planned(parameters=512, bits=14)
        rng = np.random.default_rng(3)
        update = rng.normal(size=512).astype(np.float32)
        steps, source = plan._rotated(update, ROTATION), SeededNoise(3)
        draws = 400
        mean = np.mean([plan._rounded(steps, source) for _ in range(draws)], axis=0)
        along = float((mean - steps) @ steps) / np.linalg.norm(steps)
        assert abs(along) < 5 * 0.5 / math.sqrt(draws)  # Of `steps`, some 500 long.


class TestRotation:
    @pytest.mark.parametrize("log_size", range(10))
    def test_is_by_the_walsh_hadamard_matrix(self, log_size: int) -> None:
        size = 2**log_size
        matrix = np.array([_walsh_hadamard(row) for row in np.eye(size)])
        assert np.array_equal(matrix, hadamard(size))

    @pytest.mark.parametrize("log_size", [11, 12, 13, 17])
    def test_of_long_vectors_is_undone_by_itself_and_keeps_every_coordinate_in_its_place(self, log_size: int) -> None:
        size = 2**log_size
        whole = np.random.default_rng(1).integers(-99, 99, size).astype(np.float64)
        assert np.array_equal(_walsh_hadamard(_walsh_hadamard(whole)), whole * size)
        hot, coordinate, at = np.zeros(size), 0b10110001101 % size, 0b1101 << (log_size - 4)
        hot[at] = 1.0
        assert _walsh_hadamard(hot)[coordinate] == (-1) ** (at & coordinate).bit_count()

    def test_its_signs_are_a_published_keystream(self) -> None:
        # AES-256 of the blocks 0 and 1 under the zero key: H and the tag of test case 13 of the GCM specification
        # (McGrew and Viega 2005); no tag is but block 1, as nothing was sent. Least significant bits first.
        stream = bytes.fromhex("dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b")
        bits = [byte >> bit & 1 for byte in stream[:24] for bit in range(8)]
        last = [byte >> bit & 1 for byte in stream[24:] for bit in range(8)]
        assert stream[15] == 0x87
        # The counter is big-endian: the second block is that of counter 1.
        assert _signs(bytes(32), 256).tolist() == [1.0 - 2.0 * bit for bit in bits + last]
        assert _signs(bytes(32), 3).tolist() == [1.0, 1.0, -1.0]

    def test_of_one_round_is_not_that_of_another(self) -> None:
        agreeing = (_signs(ROTATION, 4096) == _signs(bytes(32), 4096)).mean()
        assert abs(agreeing - 0.5) < 5 * 0.5 / 64

    def test_spreads_one_hot_coordinate_that_would_leave_the_modulus_without_it(self) -> None:
        plan, source, bits = planned(bits=12), SeededNoise(5), 12
        hot = np.zeros(2**12, np.float32)
        hot[7] = 1.0

        def centred(total: NDArray[np.int64]) -> NDArray[np.int64]:
            wrapped: NDArray[np.int64] = (total + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
            return wrapped

        sums = [np.zeros(2**12, np.int64) for _ in range(2)]
        for _ in range(20):
            sums[0] += plan.encode(hot, rotation=ROTATION, source=source)
            share = discrete_gaussian(source, plan._share, 2**12)
            sums[1] += plan._rounded(hot.astype(np.float64) * 0.99 / plan.noise.granularity, source) + share
        deviation = CENTRAL * plan.noise.rounded_norm
        turned = plan.decode(centred(sums[0]), rotation=ROTATION)
        assert abs(turned[7] - 20) < 5 * deviation
        assert abs(centred(sums[1])[7] * plan.noise.granularity - 20) > 15 * deviation


class TestThereAndBack:
    @settings(max_examples=60)
    @given(update=finite, log_clip=st.floats(-20, 20), seed=st.integers(0, 9))
    def test_an_update_comes_back_clipped_and_to_the_grid(self, update: Update, log_clip: float, seed: int) -> None:
        clip_norm = 2.0**log_clip
        grid = clip_norm * 2.0**-20
        plan = summed(parameters=len(update), clip_norm=clip_norm, granularity=grid, local_scale=0.11 * grid, clients=1)
        encoded = plan.encode(update, rotation=ROTATION, source=SeededNoise(seed))
        assert encoded.shape == (plan.noise.dimension,)
        assert encoded.dtype == np.int64
        decoded = plan.decode(encoded, rotation=ROTATION)
        assert decoded.shape == update.shape
        assert decoded.dtype == np.float64
        norm = float(np.linalg.norm(update.astype(np.float64)))
        expected = update.astype(np.float64) * min(1.0, clip_norm / norm if norm else 1.0)
        # Rounding moves every coordinate by less than a step, a share by 0.11 on average.
        allowed = grid * (math.sqrt(plan.noise.dimension) + 6) + 2e-7 * clip_norm
        assert np.linalg.norm(decoded - expected) < allowed

    @given(updates=npst.arrays(np.float32, (3, 6), elements=st.floats(-2, 2, width=32)))
    def test_the_sum_decodes_to_the_sum(self, updates: Update) -> None:
        plan = summed("discrete_gaussian", parameters=6)
        encoded = [plan.encode(row, rotation=ROTATION, source=SeededNoise(i)) for i, row in enumerate(updates)]
        apart = sum(plan.decode(one, rotation=ROTATION) for one in encoded)
        assert plan.decode(np.sum(encoded, axis=0), rotation=ROTATION) == pytest.approx(apart, abs=1e-12)

    def test_of_two_coordinates_by_hand(self) -> None:
        # H turns (a, b), after the signs + and +, into (a + b, a - b) / sqrt 2: (3, 1) steps of sqrt(1/2) are a = 2.
        plan = summed(parameters=2, clip_norm=4.0, granularity=math.sqrt(0.5), local_scale=math.sqrt(0.5))
        assert plan._rotated(np.array([2.0, 1.0], np.float32), bytes(32)) == pytest.approx([3.0, 1.0], rel=1e-7)
        assert plan.decode(np.array([3, 1]), rotation=bytes(32)) == pytest.approx([2.0, 1.0])

    def test_another_rotation_decodes_to_something_else(self) -> None:
        plan, update = summed(parameters=64, granularity=1e-6, local_scale=1e-6), np.full(64, 0.1, np.float32)
        encoded = plan.encode(update, rotation=ROTATION, source=SeededNoise(1))
        assert plan.decode(encoded, rotation=ROTATION) == pytest.approx(update, abs=1e-4)
        assert np.linalg.norm(plan.decode(encoded, rotation=bytes(32)) - update) > 0.5

    def test_the_caller_s_update_is_left_as_it_was(self) -> None:
        update = np.array([3.0, math.nan, 1.0, 0.0, 0.0], np.float32)
        summed().encode(update, rotation=ROTATION, source=SeededNoise(1))
        assert update.tolist()[::2] == [3.0, 1.0, 0.0]


class TestNoise:
    @pytest.mark.parametrize("mechanism", MECHANISMS)
    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
    def test_an_update_of_zeros_or_without_a_norm_is_its_share_of_the_noise_alone(
        self, mechanism: Mechanism, value: float
    ) -> None:
        plan, update = summed(mechanism, parameters=500, local_scale=0.007), np.zeros(500, np.float32)
        update[3] = value
        drawn, reference = SeededNoise(4), SeededNoise(4)
        encoded = plan.encode(update, rotation=ROTATION, source=drawn)
        reference.words(512)  # Of the rounding, which had nothing to round.
        law = discrete_gaussian if mechanism == "discrete_gaussian" else skellam
        assert np.array_equal(encoded, law(reference, 0.007 / 0.01, 512))

    @pytest.mark.parametrize("mechanism", MECHANISMS)
    def test_a_share_has_the_planned_scale_and_none_that_is_a_twelfth_off(self, mechanism: Mechanism) -> None:
        plan = planned(mechanism, parameters=2**14, bits=14)
        share = plan.encode(np.zeros(2**14, np.float32), rotation=ROTATION, source=SeededNoise(6))
        power = float((share.astype(np.float64) ** 2).sum())
        scale = plan.noise.local_scale / plan.noise.granularity
        assert two_sided(power / scale**2, 2**14) > ACCEPT
        assert two_sided(power / (scale * 12 / 13) ** 2, 2**14) < REJECT
        assert two_sided(power / (scale * 13 / 12) ** 2, 2**14) < REJECT

    def test_no_two_shares_are_the_same(self) -> None:
        plan, source, zero = planned(parameters=64), SeededNoise(7), np.zeros(64, np.float32)
        first, second = (plan.encode(zero, rotation=ROTATION, source=source) for _ in range(2))
        assert (first == second).mean() < 0.2

    @pytest.mark.parametrize("mechanism", MECHANISMS)
    def test_shares_sized_for_the_fewest_survivors_suffice_when_three_in_ten_drop_out(
        self, mechanism: Mechanism
    ) -> None:
        # 20 clients, 14 survive: sized for 14 the sum has all the noise that is paid for, sized for 20 it has 0.7.
        dimension, zero = 2**12, np.zeros(2**12, np.float32)
        tail = {}
        for clients in (14, 20):
            plan, source = planned(mechanism, clients=clients, bits=14), SeededNoise(8, clients)
            total = sum(plan.encode(zero, rotation=ROTATION, source=source) for _ in range(14))
            noise = plan.decode(np.asarray(total), rotation=ROTATION)
            needed = (CENTRAL * plan.noise.rounded_norm) ** 2
            tail[clients] = float((noise**2).sum()) / needed
        assert two_sided(tail[14], dimension) > ACCEPT
        assert stats.chi2.cdf(tail[20], dimension) < REJECT
        assert tail[20] / dimension == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_hundred_clients_with_16_bits_err_as_one_gaussian_of_the_same_epsilon_does(mechanism: Mechanism) -> None:
    parameters, clients = 2**16, 100
    settings: dict[str, Any] = {"mechanism": mechanism, "parameters": parameters, "clients": clients}
    settings |= {"cohort": clients, "clip_norm": 1.0, "bits": 16}
    plan = DistributedSum.plan(**settings, noise_multiplier=calibrate(**settings, epsilon=4.0, delta=DELTA, rounds=1))
    rng, source = np.random.default_rng(9), SeededNoise(9)
    truth, total = np.zeros(parameters), np.zeros(plan.noise.dimension, np.int64)
    for client in range(clients):
        update = rng.normal(size=parameters).astype(np.float32)
        update *= (2.0 if client % 2 else 0.5) / length(update)  # Half of them are clipped.
        truth += update / max(1.0, length(update))
        total += plan.encode(update, rotation=ROTATION, source=source)
    wrapped = (total + 2**15) % 2**16 - 2**15
    errors = plan.decode(wrapped, rotation=ROTATION) - truth
    # A Gaussian on the sum at epsilon 4 by the same accounting; the mean of 2^16 squares is known to 0.55 %.
    assert 0.98 <= float((errors**2).mean()) / CENTRAL**2 <= 1.03
    assert abs(float(errors.mean())) < 5 * CENTRAL / 2**8


class TestPlanning:
    @settings(max_examples=40)
    @given(
        parameters=st.integers(1, 10**6),
        clients=st.integers(1, 500),
        more=st.integers(0, 100),
        z=st.floats(0.5, 8),
        bits=st.integers(16, 32),
        clip=st.floats(1e-3, 1e3),
    )
    def test_fits_the_bits_and_reaches_the_noise(
        self, parameters: int, clients: int, more: int, z: float, bits: int, clip: float
    ) -> None:
        settings: dict[str, Any] = {"parameters": parameters, "clients": clients, "cohort": clients + more}
        try:
            plan = planned(**settings, noise_multiplier=z, bits=bits, clip_norm=clip)
        except UnsupportedEvent:
            assume(False)
        assert plan.parameters <= plan.noise.dimension < 2 * plan.parameters or plan.parameters == 1
        assert plan.noise.noise_multiplier == pytest.approx(z)
        assert bits_needed(plan.noise, cohort=clients + more) <= bits

    @pytest.mark.parametrize(("mechanism", "bits"), [(m, b) for m in MECHANISMS for b in (12, 16)])
    def test_calibrated_noise_costs_what_was_asked_for_and_a_thousandth_less_of_it_more(
        self, mechanism: Mechanism, bits: int
    ) -> None:
        settings: dict[str, Any] = {"mechanism": mechanism, "bits": bits, "parameters": 4000}
        settings |= {"clients": 14, "cohort": 20, "clip_norm": 0.5}
        z = calibrate(**settings, epsilon=3.0, delta=DELTA, rounds=5)
        cost = [
            epsilon_pld([DistributedSum.plan(**settings, noise_multiplier=x).event(count=5, rng="os")], DELTA)
            for x in (z, 0.999 * z)
        ]
        assert 0.999 * 3.0 < cost[0] <= 3.0 < cost[1]

    def test_where_the_integers_cost_more_than_a_gaussian_so_does_the_calibrated_noise(self) -> None:
        # Skellam shares of few steps: at the noise that suffices for a Gaussian, epsilon is beyond 4.
        settings: dict[str, Any] = {"mechanism": "skellam", "parameters": 64, "clients": 20, "cohort": 20}
        settings |= {"clip_norm": 1.0, "bits": 6}
        gaussian = DistributedSum.plan(**settings, noise_multiplier=CENTRAL)
        assert epsilon_pld([gaussian.event(count=1, rng="os")], DELTA) > 4.05
        assert calibrate(**settings, epsilon=4.0, delta=DELTA, rounds=1) > 1.01 * CENTRAL

    def test_the_event_says_what_the_noise_is(self) -> None:
        plan = planned("skellam", bits=14)
        event = plan.event(count=7, rng="os")
        assert event.noise() == plan.noise
        assert (event.count, event.rng) == (7, "os")
        assert epsilon_pld([event], DELTA) == pytest.approx(plan.noise.epsilon(DELTA, count=7), rel=1e-9)


def calibrated(**changed: Any) -> float:
    some: dict[str, Any] = {"mechanism": "discrete_gaussian", "parameters": 2**16, "clients": 100, "cohort": 100}
    some |= {"clip_norm": 1.0, "bits": 12, "epsilon": 4.0, "delta": DELTA, "rounds": 1}
    return calibrate(**{**some, **changed})


ZERO = np.zeros(5, np.float32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        *[(JobError, "parameters must be", lambda p=p: planned(parameters=p)) for p in (0, -1, 2.0, True, "5", None)],
        *[
            (JobError, "parameters must be", lambda p=p: DistributedSum(summed().noise, p))
            for p in (0, -1, 5.0, True, None)
        ],
        *[
            (JobError, f"{p} parameters need dimension {d}, got 8", lambda p=p: DistributedSum(summed().noise, p))
            for p, d in ((4, 4), (9, 16), (1, 1))
        ],
        (JobError, "dimension 8, got 6", lambda: DistributedSum(replace(summed().noise, dimension=6), 5)),
        (JobError, r"at most 2\^16 grid steps wide, got 6.554e\+04", lambda: summed(local_scale=655.37)),
        (JobError, r"at most 2\^16 grid steps", lambda: planned("skellam", bits=26)),
        (UnsupportedEvent, "bits must be", lambda: planned(bits=3)),
        (UnsupportedEvent, "cohort must be", lambda: planned(cohort=19)),
        *[(JobError, "epsilon must be", lambda e=e: calibrated(epsilon=e)) for e in (0, -1.0, math.nan, math.inf, "4")],
        *[(UnsupportedEvent, "delta must", lambda d=d: calibrated(delta=d)) for d in (0.0, 1.0, math.nan)],
        *[(JobError, "rounds must be", lambda r=r: calibrated(rounds=r)) for r in (0, 1.5, True)],
        (UnsupportedEvent, "cohort must be", lambda: calibrated(cohort=99)),
        (UnsupportedEvent, "bits must be more", lambda: calibrated(bits=3)),
        (JobError, "epsilon 0.1 at delta 1e-05 is out of reach at 12 bits", lambda: calibrated(epsilon=0.1)),
        *[
            (Refused, r"must be \(5,\) float32, got", lambda u=u: encode(u))
            for u in (np.zeros(4, np.float32), np.zeros((1, 5), np.float32), np.zeros(5), np.zeros(5, np.int64))
        ],
        *[
            (Refused, "rotation must be 32 bytes, got", lambda r=r: encode(ZERO, rotation=r))
            for r in (b"", bytes(16), bytes(33))
        ],
        (Refused, "rotation must be 32 bytes", lambda: summed().decode(np.zeros(8, np.int64), rotation=bytes(31))),
        *[
            (JobError, "8 coordinates was", lambda s=s: summed().decode(np.ones(s, np.int64), rotation=ROTATION))
            for s in (5, 16, (1, 8))
        ],
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def encode(update: Any, rotation: bytes = ROTATION) -> object:
    return summed().encode(update, rotation=rotation, source=SeededNoise(1))


def length(update: Update) -> float:
    # Not np.linalg.norm, whose threads take ten times as long where others compute beside them.
    return math.sqrt(np.einsum("i,i->", update, update, dtype=np.float64))


def two_sided(chi_square: float, degrees: int) -> float:
    return 2 * min(stats.chi2.cdf(chi_square, degrees), stats.chi2.sf(chi_square, degrees))

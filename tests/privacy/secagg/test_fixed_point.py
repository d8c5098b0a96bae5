"""Reals come back within their step, sums of the most extreme vectors fit exactly, and rounding at random is fair."""

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import JobError, Refused
from privacy.noise import SeededNoise
from privacy.secagg import fixed_point
from privacy.secagg.fixed_point import TAIL_STEP, FixedPoint
from privacy.secagg.ring import Ring

ALL_BITS: tuple[Literal[16, 20, 32], ...] = (16, 20, 32)
NO_TAIL = np.zeros(0)

reaches = st.floats(1e-6, 1e6).map(lambda reach: float(np.float32(reach)))
fractions = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30)


class Words:
    """Hands out one word again and again."""

    kind = "scripted"

    def __init__(self, word: int) -> None:
        self.word = word

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.full(count, self.word, np.uint64)


def float32(values: Any) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def steps_of(codec: FixedPoint, body: Any, source: Any = None) -> NDArray[np.int64]:
    return codec.ring.unpack(codec.encode(float32(body), np.zeros(codec.ring.tail), source))[0]


def exact_steps(codec: FixedPoint, value: np.float32) -> Fraction:
    return Fraction(float(value)) * codec.bound / Fraction(codec.reach)


@given(fractions, reaches, st.integers(1, 1000), st.integers(0, 99))
def test_each_coordinate_comes_back_within_half_a_step_or_one_when_rounded_at_random(
    scaled: list[float], reach: float, clients: int, seed: int
) -> None:
    body = float32(scaled) * np.float32(reach)
    for bits in ALL_BITS:
        codec = FixedPoint(Ring(bits, body.size, 0), clients, reach)
        decoded, _ = codec.decode(codec.encode(body, NO_TAIL, SeededNoise(seed)))
        off = np.abs(decoded - body.astype(np.float64)) / codec.step
        assert decoded.dtype == np.float64
        assert off.max() <= (0.5 if bits == 32 else 1.0) * (1 + 1e-6)


@given(fractions, reaches, st.integers(1, 1000))
def test_rounding_to_the_nearest_is_what_exact_fractions_say(scaled: list[float], reach: float, clients: int) -> None:
    body = float32(scaled) * np.float32(reach)
    codec = FixedPoint(Ring(32, body.size, 0), clients, reach)
    for value, step in zip(body, steps_of(codec, body).tolist(), strict=True):
        exact = exact_steps(codec, value)
        assert abs(step - exact) <= Fraction(1, 2) + Fraction(1, 2**20)
        assert step == round(float(value) * (codec.bound / reach)) or abs(exact % 1 - Fraction(1, 2)) < 2**-20


@given(fractions, reaches, st.integers(1, 300), st.integers(0, 2**64 - 1), st.sampled_from([16, 20]))
def test_rounding_at_random_is_what_exact_fractions_say(
    scaled: list[float], reach: float, clients: int, word: int, bits: Any
) -> None:
    body = float32(scaled) * np.float32(reach)
    codec = FixedPoint(Ring(bits, body.size, 0), clients, reach)
    for i, (value, step) in enumerate(zip(body, steps_of(codec, body, Words(word)).tolist(), strict=True)):
        half = word >> 32 if i % 2 else word & (2**32 - 1)
        exact = exact_steps(codec, value) + Fraction(2 * half + 1, 2**33)
        nearest = round(exact)
        assert step == math.floor(exact) or (abs(exact - nearest) < 2**-20 and step in (nearest - 1, nearest))


@given(reaches, st.integers(1, 32767), st.sampled_from(ALL_BITS))
def test_exactly_the_reach_is_exactly_the_bound(reach: float, clients: int, bits: Any) -> None:
    codec = FixedPoint(Ring(bits, 3, 0), clients, reach)
    for word in (0, 2**64 - 1):  # The least and the most that rounding at random can add.
        assert steps_of(codec, [reach, -reach, 0], Words(word)).tolist() == [codec.bound, -codec.bound, 0]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("clients", [1, 2, 3, 10, 100, 1000])
def test_a_sum_of_the_most_extreme_vectors_fits_and_one_more_step_each_would_not(bits: Any, clients: int) -> None:
    codec = FixedPoint(Ring(bits, 4, 2), clients, 0.1875)
    ring, most = codec.ring, float(codec.ring.tail_bound(clients) // 2**11 * 2**11) * TAIL_STEP  # A float64.
    body, total = float32([0.1875, -0.1875, 0.1875, -0.1875]), ring.zeros()
    for client in range(clients):
        ring.add(total, codec.encode(body, np.array([most, -most]), SeededNoise(client)))
    summed, tail = codec.decode(total)
    assert summed == pytest.approx(clients * body.astype(np.float64), rel=1e-12)
    assert tail == pytest.approx([clients * most, -clients * most], rel=1e-12)
    assert clients * codec.bound <= ring.limit < clients * (codec.bound + 1)
    assert clients * ring.tail_bound(clients) <= 2**63 - 1 < clients * (ring.tail_bound(clients) + 1)


def misses(codec: FixedPoint, body: NDArray[np.float32], steps: NDArray[np.int64]) -> int:
    pairs = zip(body, steps.tolist(), strict=True)
    return sum(abs(step - exact_steps(codec, value)) > Fraction(1, 2) + Fraction(1, 2**20) for value, step in pairs)


def test_steps_beyond_24_bits_are_not_lost_to_float32() -> None:
    body = np.random.default_rng(1).uniform(0.25, 1, 1000).astype(np.float32)
    codec = FixedPoint(Ring(32, body.size, 0), 1, 1.0)
    assert misses(codec, body, steps_of(codec, body)) == 0
    careless = np.rint(body * np.float32(codec.bound)).astype(np.int64)
    assert misses(codec, body, careless) > 500


def fairness(steps: NDArray[np.int64], exact: NDArray[np.float64]) -> tuple[float, float]:
    """Standard deviations that the sum of the errors, and that of neighbours' products, are away from zero."""
    up = exact - np.floor(exact)
    variance = up * (1 - up)
    errors = steps - exact
    products = errors[::2] * errors[1::2]
    return float(errors.sum() / math.sqrt(variance.sum())), float(
        products.sum() / math.sqrt((variance[::2] * variance[1::2]).sum())
    )


@pytest.mark.parametrize("bits", [16, 20])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.9])
def test_rounding_at_random_is_unbiased_and_every_other_way_is_noticed(bits: Any, sign: int, part: float) -> None:
    codec = FixedPoint(Ring(bits, 40_000, 0), 20, 1.0)
    body = float32(np.full(40_000, sign * (7 + part) * codec.step))
    exact = body.astype(np.float64) * codec.bound
    steps = steps_of(codec, body, SeededNoise(11, bits))
    assert set(steps.tolist()) == {math.floor(exact[0]), math.ceil(exact[0])}
    bias, dependence = fairness(steps, exact)
    assert abs(bias) < 4
    assert abs(dependence) < 4
    slanted = np.floor(exact + np.random.default_rng(1).random(exact.size) ** 1.2).astype(np.int64)
    paired = np.floor(exact + np.repeat(np.random.default_rng(1).random(exact.size // 2), 2)).astype(np.int64)
    assert abs(fairness(slanted, exact)[0]) > 4.5
    assert abs(fairness(paired, exact)[1]) > 6
    if part != 0.5:
        assert abs(fairness(np.rint(exact).astype(np.int64), exact)[0]) > 6


@pytest.mark.parametrize("bits", [16, 20])
def test_whole_steps_stay_whatever_is_drawn(bits: Any) -> None:
    codec = FixedPoint(Ring(bits, 5, 0), 1, float(Ring(bits, 5, 0).limit))
    for word in (0, 2**64 - 1, 0x8000000080000000):
        assert steps_of(codec, [-3, -1, 0, 1, 100], Words(word)).tolist() == [-3, -1, 0, 1, 100]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.sampled_from(ALL_BITS))
def test_the_tail_comes_back_within_half_of_two_to_the_minus_twenty(values: list[float], bits: Any) -> None:
    codec = FixedPoint(Ring(bits, 1, len(values)), 1000, 1.0)
    words = codec.encode(float32([0.0]), np.array(values), SeededNoise(1))
    assert codec.ring.unpack(words)[1].tolist() == [round(Fraction(value) * 2**20) for value in values]
    assert np.abs(codec.decode(words)[1] - values).max() <= 2.0**-21


@pytest.mark.parametrize("bits", ALL_BITS)
def test_chunks_change_nothing(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = float32(np.random.default_rng(3).uniform(-1, 1, 70_001))
    codec, tail = FixedPoint(Ring(bits, body.size, 2), 7, 1.0), np.array([1.5, -2.5])
    whole = codec.encode(body, tail, SeededNoise(1))
    monkeypatch.setattr(fixed_point, "_CHUNK", 6 * 97)
    assert np.array_equal(codec.encode(body, tail, SeededNoise(1)), whole)


def test_an_empty_vector_is_encoded() -> None:
    for bits in ALL_BITS:
        codec = FixedPoint(Ring(bits, 0, 0), 2, 1.0)
        assert codec.decode(codec.encode(float32([]), NO_TAIL, SeededNoise(1)))[0].size == 0


NAN, INF = math.nan, math.inf
BAD_VECTORS: list[tuple[str, list[float], list[float], str]] = [
    ("nan", [0, NAN, 0], [0], "not finite"),
    ("nan first", [NAN, 0, 0], [0], "not finite"),
    ("infinity", [0, INF, 0], [0], "not finite"),
    ("minus infinity", [0, 0, -INF], [0], "not finite"),
    ("nan in the tail", [0, 0, 0], [NAN], "not finite"),
    ("infinity in the tail", [0, 0, 0], [-INF], "not finite"),
    ("nan after an overflow", [0.75, 0, NAN], [0], "not finite"),
    ("nan in the tail after an overflow", [0.75, 0, 0], [NAN], "not finite"),
    ("beyond the reach", [0, 0.75, 0], [0], "overflow: the body goes beyond its reach of 0.5"),
    ("below", [0, 0, -0.75], [0], "overflow: the body goes beyond its reach of 0.5"),
    ("by one float32", [float(np.nextafter(np.float32(0.5), np.float32(1))), 0, 0], [0], "overflow: the body"),
    ("the largest float32", [float(np.finfo(np.float32).max), 0, 0], [0], "overflow: the body"),
    ("a tail beyond", [0, 0, 0], [2.0**43], "overflow: the tail goes beyond its reach of 4.39805e"),
    ("a tail below", [0, 0, 0], [-(2.0**43)], "overflow: the tail"),
    ("the largest float64", [0, 0, 0], [float(np.finfo(np.float64).max)], "overflow: the tail"),
    ("a body too short", [0, 0], [0], "expected a body of shape"),
    ("no tail", [0, 0, 0], [], "expected a body of shape"),
]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(("body", "tail", "message"), [row[1:] for row in BAD_VECTORS], ids=[r[0] for r in BAD_VECTORS])
def test_a_vector_that_must_not_be_sent_is_refused(
    bits: Any, body: list[float], tail: list[float], message: str
) -> None:
    codec = FixedPoint(Ring(bits, 3, 1), 2, 0.5)
    for source in (SeededNoise(1), None):
        if source is None and bits != 32 and not message.startswith(("not finite", "overflow")):
            continue
        with pytest.raises(Refused, match=message) as refusal:
            codec.encode(float32(body), np.array(tail), source)
        assert "0.75" not in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bits", [16, 20])
def test_coarse_rounding_without_a_source_is_refused(bits: Any) -> None:
    with pytest.raises(Refused, match=f"rounding to {bits} bits is random and needs a noise source"):
        FixedPoint(Ring(bits, 1, 0), 2, 0.5).encode(float32([0]), NO_TAIL)


@pytest.mark.parametrize("reach", [0.0, -1.0, NAN, INF, 2.0**-101, 2.0**101])
def test_a_reach_that_cannot_work_is_refused(reach: float) -> None:
    with pytest.raises(JobError, match="the reach must lie in"):
        FixedPoint(Ring(32, 1, 0), 2, reach)


@pytest.mark.parametrize(("bits", "clients"), [(16, 0), (16, 2**15), (32, -1), (32, 2**31)])
def test_more_clients_than_the_ring_holds_are_refused(bits: Any, clients: int) -> None:
    with pytest.raises(JobError, match="bits hold the sum of 1 to"):
        FixedPoint(Ring(bits, 1, 0), clients, 1.0)

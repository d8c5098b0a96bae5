"""Words add up like the integers they stand for, and look the same on every machine."""

import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import JobError, Refused
from privacy.secagg.ring import Ring

Bits = Literal[16, 20, 32]
ALL_BITS: tuple[Bits, ...] = (16, 20, 32)
WORD = {16: 16, 20: 64, 32: 32}

rings = st.builds(Ring, st.sampled_from(ALL_BITS), st.integers(0, 20), st.integers(0, 4))
any_int64 = st.integers(-(2**63), 2**63 - 1)


def ints(values: list[int]) -> NDArray[np.int64]:
    """Modulo 2^64, as two's complement has it."""
    return np.array([(v + 2**63) % 2**64 - 2**63 for v in values], np.int64)


def centred(value: int, bits: int) -> int:
    half = 1 << bits - 1
    return (value + half) % (2 * half) - half


def vector(ring: Ring, values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    return st.tuples(
        st.lists(values, min_size=ring.body, max_size=ring.body),
        st.lists(any_int64, min_size=ring.tail, max_size=ring.tail),
    )


def unpacked_slowly(ring: Ring, words: bytes) -> tuple[list[int], list[int]]:
    """By Python's integers, from the layout alone."""
    size = WORD[ring.bits] // 8
    body = list[int]()
    for start in range(0, ring.body_bytes, size):
        word = int.from_bytes(words[start : start + size], "little")
        if ring.bits != 20:
            body.append(centred(word, ring.bits))
            continue
        for _ in range(3):
            body.append(centred(word, 21))
            word = (word - body[-1]) // 2**21
    tail = range(ring.body_bytes, ring.nbytes, 8)
    return body[: ring.body], [centred(int.from_bytes(words[s : s + 8], "little"), 64) for s in tail]


@given(st.data(), rings)
def test_integers_within_the_limit_come_back(data: st.DataObject, ring: Ring) -> None:
    body, tail = data.draw(vector(ring, st.integers(-ring.limit, ring.limit)))
    words = ring.pack(ints(body), ints(tail))
    back = ring.unpack(words)
    assert (back[0].tolist(), back[1].tolist()) == (body, tail)
    assert back[0].dtype == back[1].dtype == np.int64
    ring.check(words)
    narrow = ring.pack(np.array(body, np.int32), ints(tail))
    assert bytes(narrow) == bytes(words)


@given(st.data(), rings, st.integers(1, 5))
def test_a_sum_of_words_shows_the_sum_of_the_integers_and_nothing_else(
    data: st.DataObject, ring: Ring, clients: int
) -> None:
    # Of any integers: a sum that depended on who wrapped would show more than the noise protects.
    vectors = [data.draw(vector(ring, any_int64)) for _ in range(clients)]
    total = ring.zeros()
    for body, tail in vectors:
        ring.add(total, ring.pack(ints(body), ints(tail)))
    bodies, tails = ([sum(column) for column in zip(*part, strict=True)] for part in zip(*vectors, strict=True))
    assert bytes(total) == bytes(ring.pack(ints(bodies), ints(tails)))
    if ring.bits != 20:
        assert ring.unpack(total)[0].tolist() == [centred(value, ring.bits) for value in bodies]
    assert ring.unpack(total)[1].tolist() == [centred(value, 64) for value in tails]


@given(st.data(), rings)
def test_any_words_are_unpacked_as_a_slow_reader_unpacks_them(data: st.DataObject, ring: Ring) -> None:
    words = data.draw(st.binary(min_size=ring.nbytes, max_size=ring.nbytes))
    body, tail = ring.unpack(np.frombuffer(words, np.uint8))
    assert (body.tolist(), tail.tolist()) == unpacked_slowly(ring, words)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_long_vectors_come_back(bits: Bits) -> None:
    ring = Ring(bits, 50_001, 3)
    rng = np.random.default_rng(1)
    body = rng.integers(-ring.limit, ring.limit, ring.body, endpoint=True)
    back, tail = ring.unpack(ring.pack(body, ints([1, -2, 3])))
    assert np.array_equal(back, body)
    assert tail.tolist() == [1, -2, 3]


# Worked out by hand: two's complement, the low byte first; body filled up to 16 bytes.
LAYOUTS = [
    (Ring(16, 3, 1), [1, -2, 258], [-1], "0100 feff 0201" + 10 * "00" + 8 * "ff"),
    (Ring(32, 2, 1), [1, -2], [2**40], "01000000 feffffff" + 8 * "00" + "0000000000010000"),
    (Ring(20, 4, 0), [1, 2, 4, 5], [], "0100400000100000" + "0500000000000000"),
    (Ring(20, 1, 0), [-1], [], "ff" * 8 + "00" * 8),
    (Ring(32, 4, 0), [1, 1, 1, 1], [], "01000000" * 4),
    (Ring(16, 0, 2), [], [1, -1], "0100000000000000" + "ff" * 8),
    (Ring(32, 0, 0), [], [], ""),
]


@pytest.mark.parametrize(("ring", "body", "tail", "layout"), LAYOUTS)
def test_words_are_laid_out_as_written_down(ring: Ring, body: list[int], tail: list[int], layout: str) -> None:
    assert bytes(ring.pack(ints(body), ints(tail))) == bytes.fromhex(layout)
    assert ring.nbytes == len(bytes.fromhex(layout))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_body_may_be_put_in_piece_by_piece(bits: Bits) -> None:
    ring, body = Ring(bits, 20, 1), ints(list(range(-10, 10)))
    words = ring.zeros()
    for start in (0, 6, 9, 18):
        ring.put(words, start, body[start : {0: 6, 6: 9, 9: 18, 18: 20}[start]])
    assert bytes(words) == bytes(ring.pack(body, ints([0])))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 100])
def test_the_bound_is_exact(bits: Bits, clients: int) -> None:
    ring = Ring(bits, 2, 0)
    bound = ring.bound(clients)
    extreme, total = ints([bound, -bound]), ring.zeros()
    for _ in range(clients):
        ring.add(total, ring.pack(extreme, ints([])))
    assert ring.unpack(total)[0].tolist() == [clients * bound, -clients * bound]
    assert clients * bound <= ring.limit < clients * (bound + 1)
    for _ in range(clients):  # One step more for each.
        ring.add(total, ring.pack(ints([1, 0]), ints([])))
    assert ring.unpack(total)[0].tolist() == [clients * (bound + 1) - 2**bits, -clients * bound]


def test_limits_are_those_of_the_number_of_bits() -> None:
    assert [Ring(bits, 1, 1).limit for bits in ALL_BITS] == [2**15 - 1, 2**19 - 1, 2**31 - 1]
    assert [Ring(bits, 1, 1).bound(100) for bits in ALL_BITS] == [327, 5242, 21_474_836]
    assert Ring(32, 1, 1).tail_bound(100) == (2**63 - 1) // 100


def test_at_20_bits_a_field_takes_one_bit_more_and_then_carries_one_step() -> None:
    ring = Ring(20, 6, 0)
    most = ints([2**20 - 1, -(2**20), 2**20 - 1, -(2**20), 2**20 - 1, -(2**20)])
    assert ring.unpack(ring.pack(most, ints([])))[0].tolist() == most.tolist()
    beyond = ring.unpack(ring.pack(ints([2**20, 5, 6, 7, 8, 2**20]), ints([])))[0]
    assert beyond.tolist() == [-(2**20), 6, 6, 7, 8, -(2**20)]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_adding_changes_the_first_vector_alone(bits: Bits) -> None:
    ring = Ring(bits, 4, 1)
    into, other = ring.pack(ints([1, 2, 3, 4]), ints([5])), ring.pack(ints([10, 20, 30, 40]), ints([50]))
    before, other.flags.writeable = bytes(other), False
    ring.add(into, other)
    assert bytes(other) == before
    assert [part.tolist() for part in ring.unpack(into)] == [[11, 22, 33, 44], [55]]


def test_nothing_carries_from_the_body_into_the_tail_or_back() -> None:
    ring = Ring(32, 4, 2)
    total = ring.pack(ints([-1] * 4), ints([-1, -1]))
    ring.add(total, ring.pack(ints([1] * 4), ints([1, 0])))
    assert [part.tolist() for part in ring.unpack(total)] == [[0] * 4, [0, -1]]


@pytest.mark.parametrize("bits", [16, 32])
def test_packing_takes_no_memory_beside_the_words(bits: Bits) -> None:
    ring, body = Ring(bits, 10**6, 2), np.arange(10**6)
    tracemalloc.start()
    ring.pack(body, ints([1, 2]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ring.nbytes + 2**17


RING = Ring(32, 4, 1)
BAD_WORDS: list[tuple[str, Any]] = [
    ("short", np.zeros(23, np.uint8)),
    ("long", np.zeros(25, np.uint8)),
    ("empty", np.zeros(0, np.uint8)),
    ("signed", np.zeros(24, np.int8)),
    ("already words", np.zeros(6, np.uint32)),
    ("two-dimensional", np.zeros((1, 24), np.uint8)),
    ("every second byte", np.zeros(48, np.uint8)[::2]),
    ("backwards", np.zeros(24, np.uint8)[::-1]),
]


@pytest.mark.parametrize("words", [words for _, words in BAD_WORDS], ids=[name for name, _ in BAD_WORDS])
def test_words_of_another_form_are_refused_everywhere(words: Any) -> None:
    good = RING.zeros()
    for use in (
        lambda: RING.check(words),
        lambda: RING.unpack(words),
        lambda: RING.add(good, words),
        lambda: RING.add(words, good),
    ):
        with pytest.raises(Refused, match=r"the vector must be \(24,\) uint8, contiguous; got"):
            use()
    assert not good.any()


@pytest.mark.parametrize(
    ("body", "tail"),
    [
        (np.zeros(3), np.zeros(1)),
        (np.zeros(5), np.zeros(1)),
        (np.zeros(4), np.zeros(0)),
        (np.zeros((4, 1)), np.zeros(1)),
    ],
)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_vectors_of_another_shape_are_refused(bits: Bits, body: Any, tail: Any) -> None:
    with pytest.raises(Refused, match=r"expected a body of shape \(4,\) and a tail of \(1,\)"):
        Ring(bits, 4, 1).pack(body.astype(np.int64), tail.astype(np.int64))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("wrong", ["body", "tail"])
def test_floats_are_no_integers(bits: Bits, wrong: str) -> None:
    values: dict[str, Any] = {"body": ints([1, 2]), "tail": ints([3])}
    values[wrong] = values[wrong].astype(np.float64)
    with pytest.raises(TypeError):
        Ring(bits, 2, 1).pack(**values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((8, 1, 0), "16, 20 or 32 bits"),
        ((64, 1, 0), "16, 20 or 32 bits"),
        ((32, -1, 0), "0 or more, got a body of -1"),
        ((32, 1, -1), "a tail of -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Ring(*settings)


@pytest.mark.parametrize("clients", [0, -1, 2**15])
def test_more_clients_than_the_limit_or_none_have_no_bound(clients: int) -> None:
    with pytest.raises(JobError, match="16 bits hold the sum of 1 to 32767 clients"):
        Ring(16, 1, 0).bound(clients)
    if clients < 1:
        with pytest.raises(JobError, match="64 bits hold the sum of 1 to"):
            Ring(16, 1, 0).tail_bound(clients)

"""Masks vanish where they should, and hide the vector from whoever lacks the secret: the second is tested by itself."""

import hashlib
import hmac
import tracemalloc
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy.errors import Refused
from privacy.secagg import masks
from privacy.secagg.masks import CHUNK, LIVE, SECRET, add_streams, derive, exchange, pair_mask, self_mask
from privacy.secagg.ring import Ring

ACCEPT, REJECT = 1e-3, 1e-9  # p-values; all secrets below are fixed, so a verdict never changes.

rings = st.builds(Ring, st.sampled_from([16, 20, 32]), st.integers(0, 40), st.integers(0, 5))
secrets = st.binary(min_size=SECRET, max_size=SECRET)
streams = st.lists(st.tuples(secrets, st.sampled_from([1, -1])), max_size=4)
ROOT, OTHER_ROOT = bytes(range(32)), bytes(range(1, 33))


def secret(number: int) -> bytes:
    return hashlib.sha512(number.to_bytes(4, "little")).digest()[:SECRET]


def masked(ring: Ring, *numbers: int) -> NDArray[np.uint8]:
    words = ring.zeros()
    add_streams(words, ring, [(secret(number), 1) for number in numbers])
    return words


def added_slowly(words: bytes, ring: Ring, streams: list[tuple[bytes, int]]) -> bytes:
    """One block of AES (ECB) a counter, by Python's integers."""
    size = {16: 2, 20: 8, 32: 4}[ring.bits]
    cuts = [*range(0, ring.body_bytes, size), *range(ring.body_bytes, ring.nbytes, 8), ring.nbytes]
    for key, sign in streams:
        block = Cipher(AES(key[:32]), ECB()).encryptor()
        first = int.from_bytes(key[32:], "big")
        counters = [(first + i) % 2**128 for i in range(len(words) // 16 + 1)]
        keystream = b"".join(block.update(counter.to_bytes(16, "big")) for counter in counters)
        total = b""
        for start, stop in pairwise(cuts):
            left, right = (int.from_bytes(run[start:stop], "little") for run in (words, keystream))
            total += ((left + sign * right) % 256 ** (stop - start)).to_bytes(stop - start, "little")
        words = total
    return words


@given(st.data(), rings, streams, st.integers(1, 5))
def test_streams_are_what_a_slow_counter_mode_makes(
    data: st.DataObject, ring: Ring, streams: list[tuple[bytes, int]], threads: int
) -> None:
    before = data.draw(st.binary(min_size=ring.nbytes, max_size=ring.nbytes))
    words = np.frombuffer(bytearray(before), np.uint8)
    add_streams(words, ring, streams, threads=threads)
    assert words.tobytes() == added_slowly(before, ring, streams)


@given(st.data(), rings, streams)
def test_what_is_added_is_taken_off_again_in_any_order(
    data: st.DataObject, ring: Ring, streams: list[tuple[bytes, int]]
) -> None:
    before = data.draw(st.binary(min_size=ring.nbytes, max_size=ring.nbytes))
    words = np.frombuffer(bytearray(before), np.uint8)
    add_streams(words, ring, streams)
    add_streams(words, ring, [(key, -sign) for key, sign in data.draw(st.permutations(streams))])
    assert words.tobytes() == before


def test_the_counter_carries_through_all_of_its_bytes() -> None:
    ring = Ring(32, 12, 3)
    key = bytes(32) + b"\xff" * 16
    words = ring.zeros()
    add_streams(words, ring, [(key, 1)], threads=3)
    assert words.tobytes() == added_slowly(bytes(ring.nbytes), ring, [(key, 1)])


@pytest.mark.parametrize("bits", [16, 20, 32])
def test_chunks_threads_and_groups_of_streams_change_nothing(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(bits, 400_001, 3)
    assert ring.nbytes > 4 * CHUNK
    signed = [(secret(i), 1 if i % 3 else -1) for i in range(5)]
    whole = ring.zeros()
    add_streams(whole, ring, signed)
    for threads in (2, 3, 7):
        words = ring.zeros()
        add_streams(words, ring, signed, threads=threads)
        assert np.array_equal(words, whole)
    monkeypatch.setattr(masks, "LIVE", 2)
    monkeypatch.setattr(masks, "CHUNK", 4096)
    words = ring.zeros()
    add_streams(words, ring, signed)
    assert np.array_equal(words, whole)


def test_many_streams_are_all_added_once() -> None:
    ring, count = Ring(32, 100, 2), 3 * LIVE + 1
    one_by_one = ring.zeros()
    for i in range(count):
        add_streams(one_by_one, ring, [(secret(i), 1)])
    assert np.array_equal(masked(ring, *range(count)), one_by_one)


@pytest.mark.parametrize(("ring", "count"), [(Ring(32, 2_000_000, 2), 8), (Ring(32, 1000, 0), 2000)])
def test_masks_take_a_chunk_and_little_more_beside_the_vector_for_any_number_of_streams(ring: Ring, count: int) -> None:
    words, signed = ring.zeros(), [(secret(i), 1) for i in range(count)]
    tracemalloc.start()
    add_streams(words, ring, signed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < min(CHUNK, ring.nbytes) + 10**5


@given(st.integers(2, 6), st.sampled_from([16, 20, 32]), st.integers(1, 2**16 - 7))
def test_pair_masks_cancel_and_self_masks_come_off(clients: int, bits: Any, first: int) -> None:
    ring = Ring(bits, 33, 2)
    ids = range(first, first + clients)
    keys = {i: X25519PrivateKey.from_private_bytes(hashlib.sha256(i.to_bytes(2, "little")).digest()) for i in ids}
    public = {i: key.public_key().public_bytes_raw() for i, key in keys.items()}
    total = ring.zeros()
    for me in ids:
        signed = [(self_mask(hashlib.sha256(b"b%d" % me).digest(), ROOT), 1)]
        for peer in set(ids) - {me}:
            low, high = sorted((me, peer))
            shared = exchange(keys[me], public[peer])
            signed.append((pair_mask(shared, ROOT, low, high), 1 if me == low else -1))
        words = ring.pack(np.full(ring.body, me % 100), np.array([me, -me]))
        add_streams(words, ring, signed)
        ring.add(total, words)
    add_streams(total, ring, [(self_mask(hashlib.sha256(b"b%d" % me).digest(), ROOT), -1) for me in ids])
    body, tail = ring.unpack(total)
    assert set(body.tolist()) == {sum(me % 100 for me in ids)}
    assert tail.tolist() == [sum(ids), -sum(ids)]


# Secrecy. Masks cancel even when everybody knows the key, so none of the tests above would notice.


def uniform(words: NDArray[np.uint8]) -> float:
    """The p-value of equal chances for all byte values at even and at odd places, and for pairs of neighbours' bits."""
    halves = [stats.chisquare(np.bincount(words[start::2], minlength=256)).pvalue for start in (0, 1)]
    neighbours = np.bincount((words[:-1] & 15).astype(int) * 16 + (words[1:] >> 4), minlength=256)
    return float(min(*halves, stats.chisquare(neighbours).pvalue))


@pytest.mark.parametrize("ring", [Ring(16, 2**17, 0), Ring(20, 3 * 2**15, 0), Ring(32, 2**16, 0), Ring(32, 0, 2**15)])
def test_a_masked_zero_looks_like_noise(ring: Ring) -> None:
    assert uniform(masked(ring, 1)) > ACCEPT
    assert uniform(masked(ring, 1, 2, 3)) > ACCEPT
    values = np.random.default_rng(5).normal(scale=1e-3 * ring.limit, size=ring.body).astype(np.int64)
    plain = ring.pack(values, np.arange(ring.tail))
    assert uniform(plain) < REJECT
    add_streams(plain, ring, [(secret(4), -1)])
    assert uniform(plain) > ACCEPT


def test_the_padding_and_the_tail_are_masked_too() -> None:
    ring = Ring(16, 1, 1)
    assert np.all(np.any([masked(ring, i) for i in range(40)], axis=0))


def related(one: bytes, other: bytes) -> float:
    """The p-value of two secrets' streams agreeing in as many bits as unrelated ones do."""
    ring = Ring(32, 2**14, 0)
    first, second = ring.zeros(), ring.zeros()
    add_streams(first, ring, [(one, 1)])
    add_streams(second, ring, [(other, 1)])
    agree = int(np.unpackbits(~(first ^ second)).sum())
    return float(stats.binomtest(agree, 8 * ring.nbytes).pvalue)


def test_streams_are_unrelated_when_the_root_the_secret_the_purpose_or_an_id_differs() -> None:
    shared, other = secret(1)[:32], secret(2)[:32]
    derived = [
        self_mask(shared, ROOT),
        self_mask(shared, OTHER_ROOT),
        self_mask(other, ROOT),
        pair_mask(shared, ROOT, 1, 2),
        pair_mask(shared, OTHER_ROOT, 1, 2),
        pair_mask(other, ROOT, 1, 2),
        pair_mask(shared, ROOT, 1, 3),
        pair_mask(shared, ROOT, 2, 3),
        pair_mask(shared, ROOT, 1, 258),
        pair_mask(shared, ROOT, 1, 512),
    ]
    for one, two in combinations(derived, 2):
        assert related(one, two) > ACCEPT / 45
        assert one[:32] != two[:32]
    assert related(derived[0], derived[0]) < REJECT


@given(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 600), st.integers(1, 600)),
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 600), st.integers(1, 600)),
)
def test_no_two_pairs_share_the_beginning_of_a_stream(one: Any, other: Any) -> None:
    def beginning(key: int, root: int, a: int, b: int) -> bytes:
        ring = Ring(32, 4, 0)
        words = ring.zeros()
        low, high = min(a, b), max(a, b) + 1
        add_streams(words, ring, [(pair_mask(secret(key)[:32], (ROOT, OTHER_ROOT)[root], low, high), 1)])
        return words.tobytes()

    def meant(key: int, root: int, a: int, b: int) -> tuple[int, ...]:
        return key, root, min(a, b), max(a, b)

    assert (beginning(*one) == beginning(*other)) == (meant(*one) == meant(*other))


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 to 48 bytes, by the standard library's HMAC."""
    key = hmac.digest(salt, secret, "sha256")
    first = hmac.digest(key, info + b"\x01", "sha256")
    return (first + hmac.digest(key, first + info + b"\x02", "sha256"))[:48]


def test_derivations_are_as_written_down() -> None:
    shared = secret(3)[:32]
    assert self_mask(shared, ROOT) == hkdf(shared, ROOT, b"fedchorus secagg 1 self mask")
    ids = b"\x01\x02\xff\xff"  # 513 and 65535, little-endian.
    assert pair_mask(shared, ROOT, 513, 65535) == hkdf(shared, ROOT, b"fedchorus secagg 1 pair mask" + ids)
    assert derive(shared, salt=ROOT, info=b"x") == hkdf(shared, ROOT, b"x")[:32]


# Bad input.

P = 2**255 - 19
# The points of low order on Curve25519 and its twist: u is 0 (order 2), 1 or -1 (order 4), and two that double to 1.
ORDER_8 = [
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]


@pytest.mark.parametrize("u", ORDER_8)
def test_the_points_of_order_8_double_to_one_of_order_4(u: int) -> None:
    assert (u * u - 1) ** 2 % P == 4 * u * (u * u + 486662 * u + 1) % P  # RFC 7748, sec. 5: A = 486662.


@pytest.mark.parametrize("u", [0, 1, P - 1, P, P + 1, *ORDER_8])
def test_a_public_key_of_low_order_is_refused(u: int) -> None:
    public = u.to_bytes(32, "little")
    with pytest.raises(Refused, match="low order") as refusal:
        exchange(X25519PrivateKey.generate(), public)
    assert public.hex() not in str(refusal.value)
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_public_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(Refused, match="must be 32 bytes"):
        exchange(X25519PrivateKey.generate(), b"\x09" * length)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"streams": [(secret(1), 1), (secret(1)[:47], 1)]}, "a secret of 48 bytes"),
        ({"streams": [(secret(1), 1), (b"", 1)]}, "a secret of 48 bytes"),
        ({"streams": [(secret(1), 1), (secret(2), 0)]}, "a sign of 1 or -1"),
        ({"streams": [(secret(1), 1), (secret(2), 2)]}, "a sign of 1 or -1"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
    ],
)
def test_bad_streams_change_nothing(bad: dict[str, Any], message: str) -> None:
    ring = Ring(32, 8, 1)
    words = ring.zeros()
    with pytest.raises(ValueError, match=message):
        add_streams(words, ring, **{"streams": [(secret(1), 1)], **bad})
    assert not words.any()


def test_words_of_another_ring_are_refused() -> None:
    words = Ring(32, 8, 0).zeros()
    with pytest.raises(Refused, match="the vector must be"):
        add_streams(words, Ring(32, 8, 1), [(secret(1), 1)])
    assert not words.any()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2, 1), (1, 1), (1, 2**16), (-1, 5)])
def test_a_pair_has_two_ids_the_lower_first(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="the lower first"):
        pair_mask(bytes(32), ROOT, low, high)


@pytest.mark.parametrize(("length", "root"), [(31, 32), (33, 32), (0, 32), (32, 31), (32, 0)])
def test_a_secret_or_a_root_too_short_makes_no_mask(length: int, root: int) -> None:
    with pytest.raises(ValueError, match="32 bytes each"):
        self_mask(bytes(length), bytes(root))
    with pytest.raises(ValueError, match="32 bytes each"):
        pair_mask(bytes(length), bytes(root), 1, 2)

"""Enough shares give the secret, fewer fit every secret, and liars among the holders cost time and nothing else."""

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import FedchorusError, JobError, Refused
from privacy.secagg.shamir import MAX_SUBSETS, PRIME, combine, draw, recover, split


def element(value: int) -> bytes:
    return (value % PRIME).to_bytes(32, "little")


def entropy_of(*values: int) -> Callable[[int], bytes]:
    """Entropy that consists of these field elements, in this order."""
    source: Iterator[int] = iter(values)

    def take(count: int) -> bytes:
        assert count == 32
        return next(source).to_bytes(32, "little")

    return take


def seeded_entropy(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def slow_coefficients(points: dict[int, int]) -> list[int]:
    """The polynomial through `points`, lowest power first, by Lagrange's formula over the rationals."""
    total = [Fraction(0)] * len(points)
    for x, y in points.items():
        basis = [Fraction(1)]
        for other in points:
            if other != x:  # Multiply by (X - other) / (x - other).
                shifted, scaled = [Fraction(0), *basis], [*(-other * c for c in basis), Fraction(0)]
                basis = [(a + b) / (x - other) for a, b in zip(shifted, scaled, strict=True)]
        total = [a + y * b for a, b in zip(total, basis, strict=True)]
    return [c.numerator * pow(c.denominator, -1, PRIME) % PRIME for c in total]


def slow_value(coefficients: list[int], x: int) -> int:
    value: int = sum(c * x**power for power, c in enumerate(coefficients)) % PRIME
    return value


secrets = st.one_of(st.integers(0, PRIME - 1), st.sampled_from([0, 1, PRIME - 1]))
seeds = st.integers(0, 2**32)


@st.composite
def sharings(draw_from: st.DrawFn) -> tuple[int, list[int]]:
    """A threshold and its holders."""
    holders = draw_from(st.lists(st.integers(1, 2**16), min_size=2, max_size=9, unique=True))
    return draw_from(st.integers(2, len(holders))), holders


class TestSharing:
    @settings(max_examples=60, deadline=None)
    @given(secrets, sharings(), seeds, st.data())
    def test_any_threshold_of_the_holders_combine_to_the_secret(
        self, secret: int, sharing: tuple[int, list[int]], seed: int, data: st.DataObject
    ) -> None:
        threshold, holders = sharing
        shares = split(element(secret), threshold=threshold, holders=holders, entropy=seeded_entropy(seed))
        assert list(shares) == holders
        few = data.draw(st.lists(st.sampled_from(holders), min_size=threshold, unique=True))
        assert combine({holder: shares[holder] for holder in few}) == element(secret)

    @settings(max_examples=60, deadline=None)
    @given(secrets, secrets, sharings(), seeds, st.data())
    def test_one_holder_fewer_fits_every_other_secret_just_as_well(
        self, secret: int, other: int, sharing: tuple[int, list[int]], seed: int, data: st.DataObject
    ) -> None:
        threshold, holders = sharing
        shares = split(element(secret), threshold=threshold, holders=holders, entropy=seeded_entropy(seed))
        few = data.draw(st.permutations(holders))[: threshold - 1]
        seen = {holder: int.from_bytes(shares[holder], "little") for holder in few}
        draws = slow_coefficients({0: other} | seen)[1:]  # One choice of the draws, each as likely as any.
        again = split(element(other), threshold=threshold, holders=holders, entropy=entropy_of(*draws))
        assert {holder: again[holder] for holder in few} == {holder: shares[holder] for holder in few}

    @settings(max_examples=60, deadline=None)
    @given(secrets, sharings(), seeds)
    def test_shares_are_those_of_a_slow_implementation(
        self, secret: int, sharing: tuple[int, list[int]], seed: int
    ) -> None:
        threshold, holders = sharing
        generator = random.Random(seed)
        coefficients = [secret, *(generator.randrange(PRIME) for _ in range(threshold - 1))]
        shares = split(element(secret), threshold=threshold, holders=holders, entropy=entropy_of(*coefficients[1:]))
        assert shares == {x: element(slow_value(coefficients, x)) for x in holders}

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.integers(1, 2**16), secrets, min_size=2, max_size=9))
    def test_combining_is_interpolation_at_zero_whatever_the_shares(self, points: dict[int, int]) -> None:
        assert combine({x: element(y) for x, y in points.items()}) == element(slow_coefficients(points)[0])

    def test_a_line_checked_by_hand(self) -> None:
        assert split(element(42), threshold=2, holders=[1, 3, 65536], entropy=entropy_of(7)) == {
            1: element(49),
            3: element(63),
            65536: element(42 + 7 * 65536),
        }
        assert combine({1: element(49), 2: element(56)}) == element(42)  # 2 * 49 - 56
        assert combine({1: element(0), 2: element(1)}) == element(-1)  # Wraps: 2 * 0 - 1.
        assert combine({1: element(1), 2: element(4), 3: element(9)}) == element(0)  # x^2: 3 - 12 + 9.

    def test_a_hundred_holders_with_sets_that_differ_in_one_agree(self) -> None:
        shares = split(element(5), threshold=67, holders=range(1, 101), entropy=seeded_entropy(1))
        for left_out in (1, 34, 68):
            some = [holder for holder in range(1, 69) if holder != left_out]
            assert combine({holder: shares[holder] for holder in some}) == element(5)

    def test_the_operating_system_s_entropy_shares_differently_each_time(self) -> None:
        once, again = (split(element(5), threshold=2, holders=[1, 2]) for _ in range(2))
        assert once != again

    @pytest.mark.parametrize(
        ("threshold", "holders"),
        [(1, [1, 2]), (0, [1, 2]), (3, [1, 2]), (2, []), (2, [1, 1]), (2, [0, 1]), (2, [-1, 1]), (2, [1, 65537])],
    )
    def test_settings_that_cannot_work_are_refused(self, threshold: int, holders: list[int]) -> None:
        with pytest.raises(JobError, match=r"threshold must lie|distinct numbers"):
            split(element(5), threshold=threshold, holders=holders)

    @pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), PRIME.to_bytes(32, "little"), b"\xff" * 32])
    def test_a_secret_that_is_no_field_element_is_refused(self, secret: bytes) -> None:
        with pytest.raises(Refused, match="32 bytes") as caught:
            split(secret, threshold=2, holders=[1, 2])
        assert "ff" not in str(caught.value)

    @pytest.mark.parametrize(
        "shares",
        [
            {},
            {1: element(1)},
            {0: element(1), 1: element(1)},
            {1: element(1), 65537: element(1)},
            {1: element(1), 2: bytes(31)},
            {1: element(1), 2: PRIME.to_bytes(32, "little")},
            {1: element(1), 2: "0" * 32},
        ],
    )
    def test_malformed_shares_are_refused(self, shares: dict[int, bytes]) -> None:
        with pytest.raises(Refused, match="two or more shares"):
            combine(shares)


class TestDraw:
    def test_numbers_from_the_prime_on_are_drawn_again(self) -> None:
        assert draw(entropy_of(PRIME, 2**255 - 1, PRIME - 1, 7)) == element(PRIME - 1)

    def test_the_top_bit_is_ignored_not_rejected(self) -> None:
        assert draw(entropy_of(2**255 + 5)) == element(5)

    @pytest.mark.parametrize("bit", [0, 127, 254])
    def test_every_bit_is_drawn(self, bit: int) -> None:
        entropy = seeded_entropy(2)
        ones = sum(int.from_bytes(draw(entropy), "little") >> bit & 1 for _ in range(1000))
        assert 400 < ones < 600  # 6.3 standard deviations.

    def test_the_operating_system_is_asked_unless_told_otherwise(self) -> None:
        assert len({draw() for _ in range(10)}) == 10


class TestLiars:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 6), st.integers(0, 4), seeds, st.data())
    def test_liars_cost_nothing_but_time(self, threshold: int, liars: int, seed: int, data: st.DataObject) -> None:
        holders = list(range(1, threshold + liars + 1))
        shares = split(element(5), threshold=threshold, holders=holders, entropy=seeded_entropy(seed))
        for liar in data.draw(st.permutations(holders))[:liars]:
            shares[liar] = draw(seeded_entropy(seed + liar))
        assert recover(shares, threshold=threshold, is_right=element(5).__eq__) == element(5)

    @pytest.mark.parametrize(("threshold", "spare"), [(2, 0), (2, 3), (3, 4), (5, 2)])
    def test_every_set_is_tried_once(self, threshold: int, spare: int) -> None:
        shares = {holder: draw(seeded_entropy(holder)) for holder in range(1, threshold + spare + 1)}
        tried: list[bytes] = []

        def never(secret: bytes) -> bool:
            tried.append(secret)
            return False

        assert recover(shares, threshold=threshold, is_right=never) is None
        sets = combinations(shares, threshold)
        assert sorted(tried) == sorted(combine({holder: shares[holder] for holder in some}) for some in sets)

    def test_the_first_holders_come_first_then_sets_without_one_of_them(self) -> None:
        shares = {holder: element(1 << holder) for holder in (9, 1, 5, 3)}
        tried: list[bytes] = []

        def never(secret: bytes) -> bool:
            tried.append(secret)
            return False

        assert recover(shares, threshold=2, is_right=never) is None
        expected = [(1, 3), (3, 5), (1, 5), (5, 9), (3, 9), (1, 9)]
        assert tried == [combine({x: shares[x] for x in some}) for some in expected]

    def test_the_effort_is_bounded(self) -> None:
        shares = {holder: element(holder**5) for holder in range(1, 40)}
        tries = 0

        def never(_: bytes) -> bool:
            nonlocal tries
            tries += 1
            return False

        assert recover(shares, threshold=5, is_right=never) is None
        assert tries == MAX_SUBSETS == 4096

    @pytest.mark.parametrize(("liars", "threshold"), [(2, 89), (3, 27), (4, 15)])
    def test_the_documented_number_of_liars_stays_within_the_bound(self, liars: int, threshold: int) -> None:
        assert comb(threshold + liars, liars) <= MAX_SUBSETS < comb(threshold + 1 + liars, liars)

    def test_liars_at_the_worst_places_are_found_in_the_last_set_of_all(self) -> None:
        shares = split(element(5), threshold=15, holders=range(1, 19), entropy=seeded_entropy(3))
        liars = {holder: draw(seeded_entropy(holder)) for holder in (15, 16, 17)}
        tries = 0

        def is_right(secret: bytes) -> bool:
            nonlocal tries
            tries += 1
            return secret == element(5)

        assert recover(shares | liars, threshold=15, is_right=is_right) == element(5)
        assert tries == comb(18, 3)

    @pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33), b"\xff" * 32, PRIME.to_bytes(32, "little")])
    def test_malformed_shares_are_left_out(self, bad: bytes) -> None:
        shares = split(element(5), threshold=2, holders=[2, 3, 4], entropy=seeded_entropy(1))
        tried: list[bytes] = []

        def is_right(secret: bytes) -> bool:
            tried.append(secret)
            return secret == element(5)

        recover({0: element(1), 1: bad, **shares, 65537: element(1)}, threshold=2, is_right=is_right)
        assert tried == [element(5)]

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_too_few_shares_recover_nothing(self, count: int) -> None:
        shares = split(element(5), threshold=3, holders=[1, 2, 3], entropy=seeded_entropy(1))
        few = {holder: shares[holder] for holder in range(1, count + 1)}
        assert recover(few, threshold=3, is_right=lambda _: True) is None

    @pytest.mark.parametrize("threshold", [-1, 0, 1])
    def test_a_threshold_below_two_is_refused(self, threshold: int) -> None:
        with pytest.raises(FedchorusError, match="2 or more"):
            recover({1: element(1)}, threshold=threshold, is_right=lambda _: True)

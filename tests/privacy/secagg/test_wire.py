"""Messages read as what they were written as, and as nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refused
from privacy.secagg.session import VERSION
from privacy.secagg.view import parse_cohort, read_survivors, write_cohort
from privacy.secagg.wire import ADVERT, SIGNATURE, Advert, Kind, Reader, u16, write, write_slots, write_table

slots = st.integers(1, 2**16 - 1)
words = st.binary(min_size=32, max_size=32)
adverts = st.builds(Advert, words, slots, words, words, words, st.binary(min_size=SIGNATURE, max_size=SIGNATURE))
tables = st.dictionaries(slots, words, max_size=5)


def read_table(message: bytes) -> dict[int, bytes]:
    read = Reader(message, Kind.SHARES)
    table = read.table(32)
    read.end()
    return table


@settings(max_examples=30, deadline=None)
@given(adverts)
def test_an_advert_reads_as_written(advert: Advert) -> None:
    assert Advert.parse(bytes(advert)) == advert
    assert len(bytes(advert)) == ADVERT == 2 + 32 + 2 + 3 * 32 + 64


@settings(max_examples=30, deadline=None)
@given(st.lists(adverts, max_size=4, unique_by=lambda advert: advert.slot))
def test_a_cohort_reads_as_written_and_its_order_does_not_matter(some: list[Advert]) -> None:
    cohort = {advert.slot: advert for advert in some}
    assert parse_cohort(write_cohort(cohort)) == cohort
    assert write_cohort(dict(reversed(cohort.items()))) == write_cohort(cohort)


@settings(max_examples=50, deadline=None)
@given(tables, st.lists(slots, unique=True, max_size=8))
def test_tables_and_sets_read_as_written_whatever_their_order(table: dict[int, bytes], some: list[int]) -> None:
    message = write(Kind.SHARES, write_table(table))
    assert read_table(message) == table
    assert message == write(Kind.SHARES, write_table(dict(reversed(table.items()))))
    assert read_survivors(write(Kind.SURVIVORS, write_slots(some))) == tuple(sorted(some))


def test_a_message_is_version_kind_and_little_endian_fields() -> None:
    assert write(Kind.SURVIVORS, write_slots([0x0102, 3])) == bytes([VERSION, 6, 2, 0, 3, 0, 2, 1])
    assert write(Kind.REVEAL, write_table({0x0203: b"ab"})) == bytes([VERSION, 9, 1, 0, 3, 2]) + b"ab"


def test_each_kind_has_its_number_for_ever() -> None:
    numbers = {kind.name.lower(): int(kind) for kind in Kind}
    order = ("advert", "cohort", "shares", "boxes", "masked", "survivors", "agreement", "evidence", "reveal")
    assert numbers == {name: i for i, name in enumerate(order, 1)}


EXAMPLE = {slot: Advert(bytes(32), slot, bytes(32), bytes(32), bytes(32), bytes(64)) for slot in (1, 2)}
MESSAGES: list[tuple[Callable[[bytes], object], bytes]] = [
    (Advert.parse, bytes(EXAMPLE[1])),
    (parse_cohort, write_cohort(EXAMPLE)),
    (read_table, write(Kind.SHARES, write_table({1: bytes(32), 2: bytes(32)}))),
    (read_survivors, write(Kind.SURVIVORS, write_slots([1, 2]))),
]


@pytest.mark.parametrize(("parse", "message"), MESSAGES)
def test_no_part_of_a_message_and_no_more_than_it_is_read(parse: Callable[[bytes], object], message: bytes) -> None:
    parse(message)
    for end in range(len(message)):
        with pytest.raises(Refused, match=r"too short|expected a message of kind"):
            parse(message[:end])
    with pytest.raises(Refused, match="too long"):
        parse(message + b"\0")


@pytest.mark.parametrize(("parse", "message"), MESSAGES)
def test_another_version_or_kind_is_refused(parse: Callable[[bytes], object], message: bytes) -> None:
    for head in (bytes([VERSION + 1, message[1]]), bytes([VERSION, message[1] ^ 1]), b"\0\0"):
        with pytest.raises(Refused, match=f"expected a message of kind .*, version {VERSION}"):
            parse(head + message[2:])


@pytest.mark.parametrize("order", [(2, 1), (1, 1), (1, 3, 2), (1, 2, 2)])
def test_a_site_that_is_named_twice_or_out_of_order_is_refused(order: tuple[int, ...]) -> None:
    count = u16(len(order))
    messages: list[tuple[Callable[[bytes], object], bytes]] = [
        (read_survivors, write(Kind.SURVIVORS, count, *map(u16, order))),
        (read_table, write(Kind.SHARES, count, *(u16(slot) + bytes(32) for slot in order))),
        (parse_cohort, write(Kind.COHORT, count, *(bytes(EXAMPLE[min(slot, 2)]) for slot in order))),
    ]
    for parse, message in messages:
        with pytest.raises(Refused, match="names a site twice or out of order"):
            parse(message)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(list(Kind)))
def test_noise_is_refused_and_never_another_error(noise: bytes, kind: Kind) -> None:
    for parse in (Advert.parse, parse_cohort, read_survivors, read_table):
        with suppress(Refused):
            parse(write(kind, noise))

"""The bytes of each message of a secure sum: a version, a kind, then fields of fixed size, little-endian.

| message   | from   | what                                                                                          |
|-----------|--------|-----------------------------------------------------------------------------------------------|
| proposal  | server | the session (`privacy.secagg.session`)                                                        |
| advert    | client | two X25519 keys, a commitment to the self mask, signed by the site's identity key             |
| cohort    | server | all adverts                                                                                   |
| shares    | client | for each neighbour a box with its two shares, together sealed to the server                   |
| boxes     | server | the neighbours' boxes; with the request to train                                              |
| masked    | client | who shared, authenticated together with the masked words, which travel beside it              |
| survivors | server | whose words arrived                                                                           |
| agreement | client | a signature over that set                                                                     |
| evidence  | server | the others' signatures over it                                                                |
| reveal    | client | one share of each neighbour, sealed to the server                                             |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from privacy.errors import Refused
from privacy.secagg.session import VERSION, digest

SIGNATURE, SECRET = 64, 32
T = TypeVar("T")


class Kind(IntEnum):
    ADVERT = 1
    COHORT = 2
    SHARES = 3
    BOXES = 4
    MASKED = 5
    SURVIVORS = 6
    AGREEMENT = 7
    EVIDENCE = 8
    REVEAL = 9


def u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def write(kind: Kind, *parts: bytes) -> bytes:
    return bytes([VERSION, kind]) + b"".join(parts)


def write_table(entries: Mapping[int, bytes]) -> bytes:
    """Entries of equal size by slot, in order, behind their number."""
    return u16(len(entries)) + b"".join(u16(slot) + entries[slot] for slot in sorted(entries))


def write_slots(slots: Iterable[int]) -> bytes:
    ordered = sorted(slots)
    return u16(len(ordered)) + b"".join(map(u16, ordered))


class Reader:
    """Takes a message of one `kind` apart, or what was `sealed` in it. Raises `Refused` for anything malformed."""

    def __init__(self, message: bytes, kind: Kind, *, sealed: bool = False) -> None:
        self._rest, self._kind = message, kind
        if not sealed and self.take(2) != bytes([VERSION, kind]):
            raise Refused(f"expected a message of kind {kind.name.lower()}, version {VERSION}")

    def take(self, count: int) -> bytes:
        if len(self._rest) < count:
            raise Refused(f"a message of kind {self._kind.name.lower()} is too short")
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def rest(self) -> bytes:
        return self.take(len(self._rest))

    def table(self, size: int) -> dict[int, bytes]:
        """Entries of `size` bytes by slot; each slot once, in order."""
        return dict(self._ordered(lambda: (self.u16(), self.take(size)), lambda entry: entry[0]))

    def slots(self) -> tuple[int, ...]:
        return tuple(self._ordered(self.u16, lambda slot: slot))

    def end(self) -> None:
        if self._rest:
            raise Refused(f"a message of kind {self._kind.name.lower()} is too long")

    def _ordered(self, take: Callable[[], T], slot_of: Callable[[T], int]) -> list[T]:
        entries = [take() for _ in range(self.u16())]
        slots = [slot_of(entry) for entry in entries]
        if slots != sorted(set(slots)):
            raise Refused(f"a message of kind {self._kind.name.lower()} names a site twice or out of order")
        return entries


@dataclass(frozen=True)
class Advert:
    """A client's keys for one session. `commitment` binds it to its self mask without showing it."""

    session: bytes
    slot: int
    mask: bytes
    channel: bytes
    commitment: bytes
    signature: bytes = b""

    @property
    def signed(self) -> bytes:
        """What the identity key signs."""
        return digest("advert", self.session, u16(self.slot), self.mask, self.channel, self.commitment)

    def __bytes__(self) -> bytes:
        fields = (self.session, u16(self.slot), self.mask, self.channel, self.commitment, self.signature)
        return write(Kind.ADVERT, *fields)

    @classmethod
    def parse(cls, message: bytes) -> Advert:
        read = Reader(message, Kind.ADVERT)
        session, slot = read.take(32), read.u16()
        advert = cls(session, slot, read.take(32), read.take(32), read.take(32), read.take(SIGNATURE))
        read.end()
        return advert


ADVERT = len(bytes(Advert(bytes(32), 1, bytes(32), bytes(32), bytes(32), bytes(SIGNATURE))))

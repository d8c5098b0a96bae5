"""What client and server of a session must see and compute alike: adverts, graph, what is committed to and signed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.errors import Refused
from privacy.keys import is_signed_by
from privacy.secagg.channel import NONCE, TAG
from privacy.secagg.graph import harary
from privacy.secagg.masks import derive
from privacy.secagg.roster import Roster
from privacy.secagg.session import Session, digest
from privacy.secagg.wire import ADVERT, SECRET, Advert, Kind, Reader, u16, write, write_slots

BOX = NONCE + 2 * SECRET + TAG


class View:
    """What all honest parties of a session must see alike: the adverts, the digest of them all, and the graph."""

    def __init__(self, session: Session, adverts: dict[int, Advert]) -> None:
        self.session, self.adverts = session, adverts
        self.root = digest("root", session.id, *(bytes(adverts[slot]) for slot in sorted(adverts)))

    @cached_property
    def graph(self) -> dict[int, tuple[int, ...]]:
        return harary(sorted(self.adverts), degree=min(self.session.degree, len(self.adverts) - 1), seed=self.root)

    def neighbours(self, slot: int) -> tuple[int, ...]:
        return self.graph[slot]


def parse_cohort(message: bytes) -> dict[int, Advert]:
    """All adverts by slot, each once and in order; whose they are is for `check_advert`."""
    read = Reader(message, Kind.COHORT)
    adverts = [Advert.parse(read.take(ADVERT)) for _ in range(read.u16())]
    read.end()
    slots = [advert.slot for advert in adverts]
    if slots != sorted(set(slots)):
        raise Refused("the cohort names a site twice or out of order")
    return dict(zip(slots, adverts, strict=True))


def write_cohort(adverts: dict[int, Advert]) -> bytes:
    return write(Kind.COHORT, u16(len(adverts)), *(bytes(adverts[slot]) for slot in sorted(adverts)))


def check_advert(advert: Advert, session: Session, roster: Roster) -> None:
    """Raises `Refused` unless `advert` is of a member of `session`, signed with the key that the roster names."""
    if advert.session != session.id:
        raise Refused("an advert is of another session")
    if advert.slot not in session.members:
        raise Refused("an advert is of a site that is not a member of the session")
    if not is_signed_by(roster.slot(advert.slot).key, advert.signature, advert.signed):
        raise Refused(f"the advert of {roster.slot(advert.slot).name} is not signed with the key in the roster")


def read_survivors(message: bytes) -> tuple[int, ...]:
    read = Reader(message, Kind.SURVIVORS)
    slots = read.slots()
    read.end()
    return slots


def mask_key_of(secret: bytes, session: bytes) -> X25519PrivateKey:
    """The X25519 key that a shared `secret` stands for: whoever recovers the one has the other."""
    return X25519PrivateKey.from_private_bytes(derive(secret, salt=session, info=b"fedchorus secagg 1 mask key"))


def commitment(session: bytes, slot: int, blind: bytes) -> bytes:
    """What an advert says of its self mask, of 255 random bits: nothing, until it is shown."""
    return digest("commitment", session, u16(slot), blind)


def agreement(root: bytes, survivors: Iterable[int]) -> bytes:
    """What a client signs when it agrees to a set of survivors."""
    return digest("survivors", root, write_slots(survivors))


def sealed_context(kind: Kind, root: bytes) -> bytes:
    """What a message sealed to the server belongs to."""
    return digest("sealed", bytes([kind]), root)


def masked_context(root: bytes, sharers: Iterable[int]) -> bytes:
    """What masked words are vouched for together with: whose masks are in them."""
    return digest("masked", root, write_slots(sharers))

"""A whole federation in memory, with a server that may be told to lie: each attack is a few lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from privacy.errors import Refused
from privacy.keys import IdentityKey
from privacy.secagg.client import InMemory, SecureClient
from privacy.secagg.journal import Journal
from privacy.secagg.ring import Ring
from privacy.secagg.roster import Member, Roster
from privacy.secagg.server import STAGES, SecureServer
from privacy.secagg.session import Terms

JOB, MODEL = "ab" * 32, "cd" * 32


@lru_cache(maxsize=256)
def identity(slot: int) -> IdentityKey:
    return IdentityKey(Ed25519PrivateKey.from_private_bytes(slot.to_bytes(32, "little")))


def name(slot: int) -> str:
    return f"site-{slot}"


@lru_cache(maxsize=64)
def roster_of(slots: tuple[int, ...]) -> Roster:
    roster = Roster("test", 1, tuple(Member(slot, name(slot), identity(slot).public_hex) for slot in slots), {})
    for slot in slots:
        roster = roster.signed_by(identity(slot), name(slot))
    return roster


class Remembered(Journal):
    """A journal without a file: for schedules by the thousand, in which nobody crashes."""

    def __init__(self) -> None:
        self._claims: Counter[tuple[str, str]] = Counter()

    def claim(self, kind: str, key: str, *, most: int = 1) -> None:
        if self._claims[kind, key] >= most:
            raise Refused(f"{kind}: answered already")
        self._claims[kind, key] += 1

    def count(self, kind: str, key: str) -> int:
        return self._claims[kind, key]


@dataclass
class Federation:
    """`count` clients who hold the same terms, and vectors of whole numbers to sum; a journal file each in `folder`.

    The roster has `strangers` more, who are members of no session.
    """

    folder: Path | None
    count: int
    ring: Ring
    changes: Mapping[str, Any] = field(default_factory=dict)
    per_round: int | None = 1
    strangers: int = 0

    def __post_init__(self) -> None:
        self.slots = tuple(range(1, self.count + 1))
        self.roster = roster_of(tuple(range(1, self.count + self.strangers + 1)))
        settings: dict[str, Any] = {
            "colluders": 0,
            "rounds": 10**6,
            "cohorts": (self.slots,),
            "encoding": "whole numbers",
        }
        settings |= {"federation": "test", "roster": self.roster.hash, "job": JOB, "ring": self.ring}
        self.terms = Terms(**{**settings, **self.changes})
        self.journals = {slot: self.journal(slot) for slot in self.slots}
        self.stores = {slot: InMemory() for slot in self.slots}
        self.clients = {slot: self.client(slot) for slot in self.slots}

    def journal(self, slot: int) -> Journal:
        return Remembered() if self.folder is None else Journal(self.folder / f"journal-{slot}")

    def client(self, slot: int, **changes: Any) -> SecureClient:
        settings: dict[str, Any] = {
            "identity": identity(slot),
            "roster": self.roster,
            "terms": self.terms,
            "journal": self.journals[slot],
            "store": self.stores[slot],
            "per_round": self.per_round,
        }
        return SecureClient(name(slot), **{**settings, **changes})

    def server(self, *, round_number: int = 1, **changes: Any) -> SecureServer:
        settings: dict[str, Any] = {"members": self.slots, "round_number": round_number, "model": MODEL}
        return SecureServer(self.terms, self.roster, **{**settings, **changes})

    def secrets(self, slot: int) -> dict[str, Any]:
        """What a client keeps between two messages."""
        content = self.stores[slot].load()
        assert content is not None
        record: dict[str, Any] = json.loads(content)
        return record

    def overwrite(self, slot: int, **changes: Any) -> None:
        """Make a client lie: it goes on with other secrets than it had."""
        self.stores[slot].save(json.dumps(self.secrets(slot) | changes).encode())

    def vector(self, slot: int, *, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rng = np.random.default_rng([seed, slot])
        bound = self.ring.bound(self.count)
        body = rng.integers(-bound, bound, self.ring.body, endpoint=True)
        return body, rng.integers(-(2**40), 2**40, self.ring.tail)

    def words(self, slot: int, *, seed: int = 0) -> NDArray[np.uint8]:
        return self.ring.pack(*self.vector(slot, seed=seed))

    def check_sum(self, total: NDArray[np.uint8], slots: Iterable[int]) -> None:
        """Assert that `total` is the sum of the vectors of `slots`, number by number."""
        bodies, tails = zip(*(self.vector(slot) for slot in slots), strict=True)
        body, tail = self.ring.unpack(total)
        np.testing.assert_array_equal(body, np.sum(bodies, axis=0))
        np.testing.assert_array_equal(tail, np.sum(tails, axis=0))

    def run(
        self,
        server: SecureServer,
        *,
        drops: Mapping[str, Collection[int]] | None = None,
        until: str | None = None,
        at: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> NDArray[np.uint8]:
        """Run all stages and return the sum, or run those before `until`.

        `drops` says who is silent from which stage on, `at` what else `step` does differently at a stage. Who refused
        is in `refused`, by stage.
        """
        gone: set[int] = set()
        self.refused: dict[str, dict[int, str]] = {}
        for stage in STAGES:
            if stage == until:
                return server.session.ring.zeros()
            gone |= set((drops or {}).get(stage, ()))
            self.refused[stage] = step(self, server, stage, skip=gone, **(at or {}).get(stage, {}))
        return server.finish()


def requests(server: SecureServer, stage: str) -> dict[int, bytes]:
    """What the server sends at a stage; ends the one before."""
    match stage:
        case "advertise":
            return dict.fromkeys(server.session.members, server.proposal)
        case "share":
            return server.cohort()
        case "mask":
            return server.boxes()
        case "agree":
            return server.survivors()
        case _:
            return server.evidence()


def ask(
    federation: Federation, slot: int, stage: str, message: bytes, *, round_number: int = 1, model: str = MODEL
) -> tuple[bytes, NDArray[np.uint8] | None]:
    """One client's answer, and its masked words at the stage where it has some."""
    client = federation.clients[slot]
    match stage:
        case "advertise":
            return client.advertise(message), None
        case "share":
            return client.share(message), None
        case "mask":
            client.admit(message, round_number=round_number, model=model)
            words = federation.words(slot)
            return client.mask(words), words
        case "agree":
            return client.agree(message), None
        case _:
            return client.reveal(message), None


def unchanged(slot: int, message: Any) -> Any:
    return message


def step(
    federation: Federation,
    server: SecureServer,
    stage: str,
    *,
    skip: Collection[int] = (),
    lose: Collection[int] = (),
    request: Callable[[int, bytes], bytes] = unchanged,
    answer: Callable[[int, bytes], bytes] = unchanged,
    words: Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]] = unchanged,
) -> dict[int, str]:
    """One stage of all clients. Returns which of them, or the server about which, refused, and why.

    Those of `skip` are not reached, the answers of `lose` do not arrive; `request`, `answer` and `words` may alter
    what travels.
    """
    session, refused = server.session, dict[int, str]()
    for slot, message in requests(server, stage).items():
        if slot in skip:
            continue
        try:
            message = request(slot, message)
            reply, masked = ask(federation, slot, stage, message, round_number=session.round, model=session.model)
            if slot not in lose:
                hand_in(server, stage, slot, answer(slot, reply), None if masked is None else words(slot, masked))
        except Refused as error:
            refused[slot] = str(error)
    return refused


def hand_in(server: SecureServer, stage: str, slot: int, reply: bytes, words: NDArray[np.uint8] | None = None) -> None:
    """Give the server one answer."""
    match stage:
        case "advertise":
            server.add_advert(slot, reply)
        case "share":
            server.add_shares(slot, reply)
        case "mask":
            assert words is not None
            server.add_masked(slot, reply, words)
        case "agree":
            server.add_agreement(slot, reply)
        case _:
            server.add_reveal(slot, reply)


def flipped(message: bytes, position: int, mask: int = 1) -> bytes:
    """`message` with some bits of one byte changed."""
    return message[:position] + bytes([message[position] ^ mask]) + message[position + 1 :]

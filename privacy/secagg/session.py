"""What a secure sum is agreed on: terms that a site works out for itself, and the session that must follow them.

The server proposes a session; each client builds the one that its own terms allow and refuses any other, so neither
threshold, cohort, graph nor encoding is ever the server's choice. The SHA-256 of the session goes into every key and
signature: parties with different views share no mask and open no share of each other's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from privacy.errors import JobError, Refused
from privacy.secagg.graph import complete_threshold, graph_parameters, tolerated_dropouts
from privacy.secagg.ring import Ring

VERSION = 1
ANONYMITY = 3  # With the colluders' own vectors taken away, a sum is still of three or more.
SECURITY_BITS = 60  # For graphs that the server can try again by leaving out adverts: 20 bits above the papers' 40.


Cohorts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Shape:
    """How a cohort of `clients` is wired.

    Each client shares its secrets with `degree` others, of whom any `threshold` can take its masks away together, and
    no sum of fewer than `minimum` is shown. `dropouts` may fail in a round, as a matter of course.
    """

    clients: int
    degree: int
    threshold: int
    minimum: int
    dropouts: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(
        cls, clients: int, *, colluders: int, dropouts: int | None = None, regular: bool = False, least: int = 1
    ) -> Shape:
        """Wire `clients` against a server that lies together with `colluders` of them, while `dropouts` may fail.

        A complete graph by default; `regular` takes the sparsest that the published formulas allow (Bell et al. 2020,
        sec. 4; semi-malicious server), and a tenth of the clients for `dropouts` if none are given. Raises `JobError`
        with what would be possible.
        """
        if clients < colluders + ANONYMITY:
            raise JobError(
                f"a secure sum of {clients} sites with {colluders} in league with the server would be one of "
                f"{max(clients - colluders, 0)}: at least {colluders + ANONYMITY} sites are needed, or fewer colluders"
            )
        if regular:
            failing = clients // 10 if dropouts is None else dropouts
            # Among the fewest that may advertise colluders are denser, and the server chooses who does: so for those.
            fewest = clients - failing if colluders else clients
            if fewest < colluders + failing + ANONYMITY:
                raise JobError(
                    f"{clients} sites with {colluders} colluders and {failing} dropouts leave too few for a sparse "
                    "graph; expect fewer of either, or take the complete graph"
                )
            found = graph_parameters(
                fewest,
                corrupted=colluders / fewest,
                dropouts=failing / fewest,
                adversary="semi-malicious",
                security_bits=SECURITY_BITS,
            )
            degree, threshold = min(found.degree, clients - 1), found.threshold
        else:
            degree = clients - 1
            threshold = complete_threshold(clients, colluders=colluders, dropouts=dropouts)
            failing = tolerated_dropouts(clients, threshold) if dropouts is None else dropouts
        minimum = max(least, colluders + ANONYMITY, clients - failing)
        if minimum > clients:
            raise JobError(f"a secure sum of at least {minimum} sites cannot come from {clients}")
        return cls(clients, degree, threshold, minimum, clients - minimum)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a site holds any session of one job to; computed from the job and the roster, never from the server.

    `cohorts` are the sets of roster slots that may be summed, or a function from a round to them, where each draws its
    own; there are `rounds`. `encoding` says in words what the numbers mean; both sides only compare it.
    """

    federation: str
    roster: str
    job: str
    colluders: int
    dropouts: int | None = None
    regular: bool = False
    least: int = 1
    cohorts: Cohorts | Callable[[int], Cohorts]
    rounds: int
    ring: Ring
    encoding: str
    purpose: str = "update"

    def session(self, *, members: Sequence[int], round_number: int, model: str, server: str, nonce: str) -> Session:
        """The one session that these terms allow for `members`.

        Raises `Refused` for members that they do not allow, `JobError` where so many cannot be protected.
        """
        slots = tuple(members)
        if slots != tuple(sorted(set(slots))):
            raise Refused("the members of a session are listed once each, in order")
        if not 1 <= round_number <= self.rounds:
            raise Refused(f"round {round_number} is not one of the job's {self.rounds}")
        if slots not in (self.cohorts(round_number) if callable(self.cohorts) else self.cohorts):
            raise Refused("the session's members are not a cohort that this job allows")
        shape = Shape.of(
            len(slots), colluders=self.colluders, dropouts=self.dropouts, regular=self.regular, least=self.least
        )
        return Session(
            v=VERSION,
            federation=self.federation,
            roster=self.roster,
            job=self.job,
            round=round_number,
            model=model,
            purpose=self.purpose,
            members=slots,
            degree=shape.degree,
            threshold=shape.threshold,
            minimum=shape.minimum,
            bits=self.ring.bits,
            body=self.ring.body,
            tail=self.ring.tail,
            encoding=self.encoding,
            server=server,
            nonce=nonce,
        )


@dataclass(frozen=True, kw_only=True)
class Session:
    """One secure sum: who, of what, how protected. `server` and `nonce` are 32 fresh bytes each, in hexadecimal."""

    v: int
    federation: str
    roster: str
    job: str
    round: int
    model: str
    purpose: str
    members: tuple[int, ...]
    degree: int
    threshold: int
    minimum: int
    bits: int
    body: int
    tail: int
    encoding: str
    server: str
    nonce: str

    def __bytes__(self) -> bytes:
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def id(self) -> bytes:
        """32 bytes that name the session in every key, signature and message."""
        return digest("session", bytes(self))

    @property
    def ring(self) -> Ring:
        return Ring(self.bits, self.body, self.tail)  # type: ignore[arg-type]  # Checked against the terms' own.

    @classmethod
    def parse(cls, text: bytes) -> Session:
        """Read what the server proposes. Raises `Refused` unless it is a session, written as we write it."""
        try:
            record: Any = json.loads(text)
            types = {f.name: f.type for f in fields(cls)}
            if not isinstance(record, dict) or set(record) != set(types):
                raise ValueError
            record["members"] = tuple(record["members"])
            good = all(type(record[name]).__name__ == str(kind).partition("[")[0] for name, kind in types.items())
            if not good or not all(type(slot) is int for slot in record["members"]):
                raise ValueError
            session = cls(**record)
        except (ValueError, TypeError, RecursionError):
            raise Refused("the proposal is not a session") from None
        if bytes(session) != text or session.v != VERSION:
            raise Refused("the proposal is not a session of this version")
        return session

    def check(self, terms: Terms) -> None:
        """Refuse whatever differs from what `terms` allow for the same members, round, model and server."""
        if not all(_is_32_bytes(text) for text in (self.model, self.server, self.nonce)):
            raise Refused("the session's model, server key or nonce is malformed")
        own = terms.session(
            members=self.members,
            round_number=self.round,
            model=self.model,
            server=self.server,
            nonce=self.nonce,
        )
        for field in fields(self):
            if getattr(self, field.name) != getattr(own, field.name):
                raise Refused(f"the session's {field.name} is not what this site's terms say")


def digest(label: str, *parts: bytes) -> bytes:
    """SHA-256 of a label of this protocol and `parts`, each with its length, so that no two lists read the same."""
    hashed = hashlib.sha256()
    for part in (f"fedchorus secagg {VERSION} {label}".encode(), *parts):
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.digest()


def _is_32_bytes(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")

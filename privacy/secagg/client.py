"""A client of one secure sum after another (Bonawitz et al. 2017, CCS, sec. 6, hardened; Bell et al. 2020 for graphs).

The rules, in the order in which they protect this client's vector. Whatever breaks one is refused, nothing leaves, and
the session's secrets are wiped:

 1  advertise   the session is the one that this site's own terms allow; a round whose vector left is not asked again
 2  share       my advert is unaltered, every other is signed by a member of the pinned roster, enough are there
 3  mask        enough neighbours shared with me, and enough of their boxes open under the same view of the session
 4  agree       I am among the survivors, who all advertised; enough of them are my neighbours; I sign one set only
 5  reveal      enough neighbours signed *my* set; each peer gets one kind of share, once; then all secrets are wiped

No input or output: messages come in as bytes and go out as bytes. What must outlast the process between two messages is
kept in a `Store`; what must outlast everything (that something was released) in the site's `Journal`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy import uint8
from numpy.typing import NDArray

from privacy.errors import Refused
from privacy.keys import IdentityKey, is_signed_by
from privacy.secagg.channel import box_key, open_sealed, seal, server_key, vouch
from privacy.secagg.journal import Journal
from privacy.secagg.masks import add_streams, exchange, pair_mask, self_mask
from privacy.secagg.roster import Roster
from privacy.secagg.session import Session, Terms
from privacy.secagg.shamir import draw, split
from privacy.secagg.view import (
    BOX,
    View,
    agreement,
    check_advert,
    commitment,
    mask_key_of,
    masked_context,
    parse_cohort,
    read_survivors,
    sealed_context,
)
from privacy.secagg.wire import SECRET, SIGNATURE, Advert, Kind, Reader, write, write_table

OVER = "over"


class Store(Protocol):
    """Where one client keeps one session's secrets between two messages."""

    def load(self) -> bytes | None: ...

    def save(self, content: bytes) -> None: ...

    def wipe(self) -> None: ...


class InMemory:
    """A store for a client whose process stays: nothing is ever written anywhere."""

    def __init__(self) -> None:
        self._content: bytes | None = None

    def load(self) -> bytes | None:
        return self._content

    def save(self, content: bytes) -> None:
        self._content = content

    def wipe(self) -> None:
        self._content = None


class SecureClient:
    """One member's side. The five methods answer the server's five messages; each raises `Refused`.

    `per_round` is how often a vector may leave for one round of one job: one, unless each is paid for (None) or the
    job's terms allow a lost round to be run again.
    """

    def __init__(
        self,
        name: str,
        *,
        identity: IdentityKey,
        roster: Roster,
        terms: Terms,
        journal: Journal,
        store: Store,
        per_round: int | None = 1,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._slot = roster.member(name).slot
        self._identity, self._roster, self._terms, self._journal = identity, roster, terms, journal
        self._store, self._per_round, self._entropy = store, per_round, entropy
        self._kept: tuple[bytes, _Secrets] | None = None  # What the store holds, and what it was read from.

    def advertise(self, proposal: bytes) -> bytes:
        """Answer a session's proposal with this client's keys. An open session ends here, unfinished."""
        self.forget()
        session = Session.parse(proposal)
        session.check(self._terms)
        if self._slot not in session.members:
            raise Refused("this site is not among the session's members")
        if self._per_round is not None and self._journal.count("vector", _round(session)) >= self._per_round:
            raise Refused("this site's vector for this round has left already, and the job allows no more retries")
        entropy = self._entropy
        secrets = _Secrets(proposal, key=draw(entropy), blind=draw(entropy), channel=entropy(32))
        advert = Advert(
            session.id,
            self._slot,
            mask=secrets.mask_key.public_key().public_bytes_raw(),
            channel=secrets.channel_key.public_key().public_bytes_raw(),
            commitment=commitment(session.id, self._slot, secrets.blind),
        )
        secrets.advert = bytes(replace(advert, signature=self._identity.sign(advert.signed)))
        self._keep(secrets)
        return secrets.advert

    def share(self, message: bytes) -> bytes:
        """Check everybody's advert; share both secrets with each neighbour."""
        with self._at("share") as secrets:
            session = secrets.session
            adverts = parse_cohort(message)
            if bytes(adverts.get(self._slot, b"")) != secrets.advert:
                raise Refused("this site's own advert is missing or altered")
            for advert in adverts.values():
                check_advert(advert, session, self._roster)
            if len(adverts) < session.minimum:
                raise Refused(f"a cohort of {len(adverts)} is below the minimum of {session.minimum}")
            self._claim("share", session.id)
            secrets.cohort = message
            view = secrets.view
            neighbours = view.neighbours(self._slot)
            of_blind, of_key = (
                split(secret, threshold=session.threshold, holders=neighbours, entropy=self._entropy)
                for secret in (secrets.blind, secrets.key)
            )
            boxes = {
                peer: seal(
                    secrets.box_key(sender=self._slot, receiver=peer, own=self._slot),
                    of_blind[peer] + of_key[peer],
                    context=view.root,
                    entropy=self._entropy,
                )
                for peer in neighbours
            }
            secrets.stage = "admit"
            return self._sealed(secrets, Kind.SHARES, write_table(boxes))

    def admit(self, message: bytes, *, round_number: int, model: str) -> None:
        """Check the neighbours' boxes, before anything is computed that a `mask` would then release."""
        with self._at("admit") as secrets:
            session, view = secrets.session, secrets.view
            if (round_number, model) != (session.round, session.model):
                raise Refused("the round or the model is not the one of the session")
            read = Reader(message, Kind.BOXES)
            boxes = read.table(BOX)
            read.end()
            if not set(boxes) <= set(view.neighbours(self._slot)):
                raise Refused("a box does not come from a neighbour")
            for peer, box in boxes.items():
                key = secrets.box_key(sender=peer, receiver=self._slot, own=self._slot)
                try:
                    secrets.held[peer] = open_sealed(key, box, context=view.root)
                except Refused:
                    continue  # A lying neighbour costs itself a helper; a server with another view costs us the round.
            if len(secrets.held) < session.threshold:
                raise Refused(
                    f"{len(secrets.held)} neighbours' boxes open in this view of the session, "
                    f"the threshold is {session.threshold}"
                )
            secrets.sharers, secrets.stage = sorted(boxes), "mask"

    def mask(self, words: NDArray[uint8]) -> bytes:
        """Add all masks to `words` in place, once; return the message that goes with them."""
        with self._at("mask") as secrets:
            session, view, root = secrets.session, secrets.view, secrets.view.root
            session.ring.check(words)
            streams = [(self_mask(secrets.blind, root), 1)]
            for peer in secrets.sharers:
                low, high = sorted((self._slot, peer))
                shared = exchange(secrets.mask_key, view.adverts[peer].mask)
                streams.append((pair_mask(shared, root, low, high), 1 if peer > self._slot else -1))
            if self._per_round is not None:
                self._claim("vector", _round(session), most=self._per_round)
            if self._per_round != 1:  # One a round is one a session.
                self._claim("mask", root)
            add_streams(words, session.ring, streams)
            secrets.stage = "agree"
            proof = vouch(
                secrets.server_key(self._slot),
                words,
                context=masked_context(root, secrets.sharers),
                entropy=self._entropy,
            )
            return write(Kind.MASKED, proof)

    def agree(self, message: bytes) -> bytes:
        """Sign the set of survivors."""
        with self._at("agree") as secrets:
            session, view = secrets.session, secrets.view
            survivors = set(read_survivors(message))
            if self._slot not in survivors:
                raise Refused("this site is not among the survivors, and its vector was sent")
            if not survivors <= set(view.adverts):
                raise Refused("a survivor never advertised")
            if len(survivors) < session.minimum:
                raise Refused(f"{len(survivors)} survivors are below the minimum of {session.minimum}")
            alive = survivors & set(view.neighbours(self._slot))
            if not alive <= set(secrets.sharers):
                raise Refused("a survivor never shared its secrets with this site")
            if len(alive) < session.threshold:
                raise Refused(f"{len(alive)} neighbours survive, the threshold is {session.threshold}")
            self._claim("agree", view.root)
            secrets.survivors, secrets.stage = sorted(survivors), "reveal"
            return write(Kind.AGREEMENT, self._identity.sign(agreement(view.root, survivors)))

    def reveal(self, message: bytes) -> bytes:
        """Give the server one share of each neighbour: of the self mask of those alive, of the key of the others."""
        with self._at("reveal") as secrets:
            session, view = secrets.session, secrets.view
            read = Reader(message, Kind.EVIDENCE)
            signatures = read.table(SIGNATURE)
            read.end()
            survivors, neighbours = set(secrets.survivors), set(view.neighbours(self._slot))
            signed = agreement(view.root, survivors)
            valid = (
                peer
                for peer in survivors & neighbours & set(signatures)
                if is_signed_by(self._roster.slot(peer).key, signatures[peer], signed)
            )
            agreeing = len(list(islice(valid, session.threshold)))  # More would only cost time.
            if agreeing < session.threshold:
                raise Refused(
                    f"{agreeing} neighbours signed the survivors that this site signed, "
                    f"the threshold is {session.threshold}"
                )
            self._claim("reveal", view.root)
            shares = {
                peer: held[:SECRET] if peer in survivors else held[SECRET:] for peer, held in secrets.held.items()
            }
            secrets.stage = OVER
            return self._sealed(secrets, Kind.REVEAL, write_table(shares))

    def forget(self, *, until: int | None = None) -> None:
        """Wipe whatever is left of a session; with `until`, only if it is of that round or an earlier one."""
        if until is not None and (content := self._store.load()) is not None:
            with suppress(Refused):  # What is damaged goes as well.
                secrets = _Secrets.of(content)
                if secrets is not None and secrets.session.round > until:
                    return
        self._kept = None
        self._store.wipe()

    @contextmanager
    def _at(self, stage: str) -> Iterator[_Secrets]:
        """The open session's secrets, kept if the step succeeds; wiped after the last, or if anything goes wrong."""
        try:
            content, kept = self._store.load(), self._kept
            # What this process kept itself is not read again: that would take longer than the rest.
            secrets = kept[1] if kept is not None and kept[0] == content else _Secrets.of(content)
            if secrets is None or secrets.stage != stage:
                raise Refused(f"no session of this site waits for {stage}")
            yield secrets
            if secrets.stage == OVER:
                self.forget()
            else:
                self._keep(secrets)
        except BaseException:
            self.forget()
            raise

    def _keep(self, secrets: _Secrets) -> None:
        content = bytes(secrets)
        self._store.save(content)
        self._kept = content, secrets

    def _sealed(self, secrets: _Secrets, kind: Kind, content: bytes) -> bytes:
        context = sealed_context(kind, secrets.view.root)
        return write(kind, seal(secrets.server_key(self._slot), content, context=context, entropy=self._entropy))

    def _claim(self, kind: str, key: bytes | str, *, most: int = 1) -> None:
        self._journal.claim(kind, key if isinstance(key, str) else key.hex(), most=most)


def _round(session: Session) -> str:
    return json.dumps([session.federation, session.job, session.round, session.purpose])


@dataclass
class _Secrets:
    """One open session: everything that must be wiped when it ends. `cohort` is the message with all adverts."""

    proposal: bytes
    key: bytes = field(repr=False)
    blind: bytes = field(repr=False)
    channel: bytes = field(repr=False)
    stage: str = "share"
    advert: bytes = b""
    cohort: bytes = b""
    held: dict[int, bytes] = field(default_factory=dict, repr=False)
    sharers: list[int] = field(default_factory=list)
    survivors: list[int] = field(default_factory=list)

    def __bytes__(self) -> bytes:
        # Not `asdict`, which copies everything deeply.
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, default=bytes.hex).encode()

    @classmethod
    def of(cls, content: bytes | None) -> _Secrets | None:
        if content is None:
            return None
        try:
            record = json.loads(content)
            for name in ("proposal", "key", "blind", "channel", "advert", "cohort"):
                record[name] = bytes.fromhex(record[name])
            record["held"] = {int(peer): bytes.fromhex(shares) for peer, shares in record["held"].items()}
            return cls(**record)
        except (ValueError, TypeError, KeyError, AttributeError):  # A crash cut it short; the cause would quote it.
            raise Refused("what this site kept of its session is damaged") from None

    @cached_property
    def session(self) -> Session:
        return Session.parse(self.proposal)

    @cached_property
    def view(self) -> View:
        return View(self.session, parse_cohort(self.cohort))

    @cached_property
    def mask_key(self) -> X25519PrivateKey:
        return mask_key_of(self.key, self.session.id)

    @cached_property
    def channel_key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.channel)

    @cached_property
    def shared(self) -> dict[int, bytes]:
        """What the channel key shares with each peer; filled as it is needed."""
        return {}

    def box_key(self, *, sender: int, receiver: int, own: int) -> bytes:
        peer = sender + receiver - own
        if peer not in self.shared:
            self.shared[peer] = exchange(self.channel_key, self.view.adverts[peer].channel)
        return box_key(self.shared[peer], self.view.root, sender=sender, receiver=receiver)

    def server_key(self, own: int) -> bytes:
        shared = exchange(self.channel_key, bytes.fromhex(self.session.server))
        return server_key(shared, self.session.id, own)

"""The server of one secure sum: it passes messages on, adds masked words as they come, and takes the masks away once.

It needs no trust: whatever it gets wrong, clients refuse or the sum is of noise. What it checks is for the sum to be
right. A message that is not what the protocol says raises `Refused`, and its site counts as one that did not answer;
too few answers at a stage raise `RoundAborted`, which names the stage, the count and the threshold. Each method that
returns the next messages ends a stage: whatever arrives for it later is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy import uint8
from numpy.typing import NDArray

from privacy.errors import Refused, RoundAborted
from privacy.keys import is_signed_by
from privacy.secagg.channel import NONCE, TAG, check_vouched, open_sealed, server_key
from privacy.secagg.masks import add_streams, exchange, pair_mask, self_mask
from privacy.secagg.roster import Roster
from privacy.secagg.session import Terms
from privacy.secagg.shamir import recover
from privacy.secagg.view import (
    BOX,
    View,
    agreement,
    check_advert,
    commitment,
    mask_key_of,
    masked_context,
    sealed_context,
    write_cohort,
)
from privacy.secagg.wire import SECRET, SIGNATURE, Advert, Kind, Reader, write, write_slots, write_table

STAGES = ("advertise", "share", "mask", "agree", "reveal")


class SecureServer:
    """One session from its proposal to its sum. Sites are named by their roster slots throughout."""

    def __init__(
        self,
        terms: Terms,
        roster: Roster,
        *,
        members: Sequence[int],
        round_number: int,
        model: str,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._roster = roster
        self._key = X25519PrivateKey.from_private_bytes(entropy(32))
        self.session = terms.session(
            members=members,
            round_number=round_number,
            model=model,
            server=self._key.public_key().public_bytes_raw().hex(),
            nonce=entropy(32).hex(),
        )
        self._stage = "advertise"
        self._adverts: dict[int, Advert] = {}
        self._keys: dict[int, bytes] = {}
        self._boxes: dict[int, dict[int, bytes]] = {}
        self._masked: set[int] = set()
        self._total = self.session.ring.zeros()
        self._signatures: dict[int, bytes] = {}
        self._revealed: dict[int, dict[int, bytes]] = {}

    @property
    def proposal(self) -> bytes:
        """What each member is asked to join."""
        return bytes(self.session)

    def add_advert(self, slot: int, message: bytes) -> None:
        self._expect("advertise", slot, self.session.members, self._adverts)
        advert = Advert.parse(message)
        if advert.slot != slot:
            raise Refused("the advert is another site's")
        check_advert(advert, self.session, self._roster)
        exchange(self._key, advert.mask)  # A point of low order would stop every other site where it masks.
        shared = exchange(self._key, advert.channel)
        self._keys[slot] = server_key(shared, self.session.id, slot)
        self._adverts[slot] = advert

    def cohort(self) -> dict[int, bytes]:
        """End the adverts: what goes to each who sent one."""
        self._end("advertise", self._adverts, self.session.members, self.session.minimum)
        self._view = View(self.session, self._adverts)
        message = write_cohort(self._adverts)
        return dict.fromkeys(sorted(self._adverts), message)

    def add_shares(self, slot: int, message: bytes) -> None:
        self._expect("share", slot, self._adverts, self._boxes)
        read = Reader(self._open(slot, message, Kind.SHARES), Kind.SHARES, sealed=True)
        boxes = read.table(BOX)
        read.end()
        if set(boxes) != set(self._view.neighbours(slot)):
            raise Refused("the shares are not for the site's neighbours")
        self._boxes[slot] = boxes

    def boxes(self) -> dict[int, bytes]:
        """End the shares: what goes to each who shared, with the request to train."""
        self._end("share", self._boxes, self._adverts, self.session.minimum)
        return {slot: write(Kind.BOXES, write_table(self._boxes_for(slot))) for slot in sorted(self._boxes)}

    def _boxes_for(self, slot: int) -> dict[int, bytes]:
        peers = self._view.neighbours(slot)
        return {peer: self._boxes[peer][slot] for peer in peers if peer in self._boxes}

    def add_masked(self, slot: int, message: bytes, words: NDArray[uint8]) -> None:
        """Add a site's masked words to the sum; they may be reused afterwards."""
        self._expect("mask", slot, self._boxes, self._masked)
        read = Reader(message, Kind.MASKED)
        proof = read.take(NONCE + TAG)
        read.end()
        self.session.ring.check(words)
        context = masked_context(self._view.root, self._boxes_for(slot))
        check_vouched(self._keys[slot], words, proof, context=context)
        self.session.ring.add(self._total, words)
        self._masked.add(slot)

    def survivors(self) -> dict[int, bytes]:
        """End the masked words: the set that each of its members is asked to sign."""
        self._end("mask", self._masked, self._boxes, self.session.minimum)
        message = write(Kind.SURVIVORS, write_slots(self._masked))
        return dict.fromkeys(sorted(self._masked), message)

    def add_agreement(self, slot: int, message: bytes) -> None:
        self._expect("agree", slot, self._masked, self._signatures)
        read = Reader(message, Kind.AGREEMENT)
        signature = read.take(SIGNATURE)
        read.end()
        if not is_signed_by(self._roster.slot(slot).key, signature, agreement(self._view.root, self._masked)):
            raise Refused("the agreement is not this site's signature over the survivors")
        self._signatures[slot] = signature

    def evidence(self) -> dict[int, bytes]:
        """End the agreements: what goes to each who signed."""
        self._end("agree", self._signatures, self._masked, self.session.threshold + 1)
        return {slot: write(Kind.EVIDENCE, write_table(self._signed_near(slot))) for slot in sorted(self._signatures)}

    def _signed_near(self, slot: int) -> dict[int, bytes]:
        peers = self._view.neighbours(slot)
        return {peer: self._signatures[peer] for peer in peers if peer in self._signatures}

    def add_reveal(self, slot: int, message: bytes) -> None:
        self._expect("reveal", slot, self._signatures, self._revealed)
        read = Reader(self._open(slot, message, Kind.REVEAL), Kind.REVEAL, sealed=True)
        shares = read.table(SECRET)
        read.end()
        if not set(shares) <= set(self._boxes_for(slot)):
            raise Refused("the reveal holds shares that nobody gave to this site")
        self._revealed[slot] = shares

    @property
    def summed(self) -> tuple[int, ...]:
        """Whose words are in the sum."""
        return tuple(sorted(self._masked))

    def finish(self) -> NDArray[uint8]:
        """End the reveals: the sum of the survivors' words, exact modulo the ring."""
        session, root = self.session, self._view.root
        self._end("reveal", self._revealed, self._signatures, session.threshold + 1)
        streams: list[tuple[bytes, int]] = []
        for slot in sorted(self._boxes):
            if slot in self._masked:
                streams.append((self_mask(self._secret(slot, self._is_blind), root), -1))
                continue
            key = mask_key_of(self._secret(slot, self._is_key), session.id)
            for peer in self._view.neighbours(slot):
                if peer in self._masked:
                    pair = pair_mask(exchange(key, self._adverts[peer].mask), root, *sorted((slot, peer)))
                    streams.append((pair, -1 if slot > peer else 1))
        add_streams(self._total, session.ring, streams)
        return self._total

    def _secret(self, slot: int, is_right: Callable[[int, bytes], bool]) -> bytes:
        shares = {helper: given[slot] for helper, given in self._revealed.items() if slot in given}
        threshold = self.session.threshold
        if len(shares) >= threshold:
            secret = recover(shares, threshold=threshold, is_right=lambda secret: is_right(slot, secret))
            if secret is not None:
                return secret
        raise RoundAborted(
            f"{self._where('reveal')}: {len(shares)} shares of {self._roster.slot(slot).name} came back, "
            f"and no {threshold} of them, the threshold, fit what it advertised"
        )

    def _is_blind(self, slot: int, secret: bytes) -> bool:
        return commitment(self.session.id, slot, secret) == self._adverts[slot].commitment

    def _is_key(self, slot: int, secret: bytes) -> bool:
        public = mask_key_of(secret, self.session.id).public_key()
        return public.public_bytes_raw() == self._adverts[slot].mask

    def _open(self, slot: int, message: bytes, kind: Kind) -> bytes:
        return open_sealed(
            self._keys[slot], Reader(message, kind).rest(), context=sealed_context(kind, self._view.root)
        )

    def _expect(self, stage: str, slot: int, asked: Collection[int], had: Collection[int]) -> None:
        if self._stage != stage:
            raise Refused(f"late: the session is at {self._stage}, not {stage}")
        if slot not in asked:
            raise Refused("the site was not asked")
        if slot in had:
            raise Refused("the site has answered already")

    def _end(self, stage: str, answered: Collection[int], asked: Collection[int], needed: int) -> None:
        if self._stage != stage:
            raise RuntimeError(f"the session is at {self._stage}, not {stage}")
        self._stage = (*STAGES, "done")[STAGES.index(stage) + 1]
        if len(answered) < needed:
            self._stage = "done"
            raise RoundAborted(
                f"{self._where(stage)}: {len(answered)} of {len(asked)} sites answered, at least {needed} are needed"
            )

    def _where(self, stage: str) -> str:
        return f"round {self.session.round}: secure sum, stage {stage}"

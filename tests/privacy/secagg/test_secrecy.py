"""What the server sees of a vector is noise to it and its colluders, until enough honest sites take the masks away.

That masks cancel shows nothing of this: they do so under a public key, or if they are all zero.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from privacy.errors import RoundAborted
from privacy.secagg.channel import open_sealed
from privacy.secagg.client import _Secrets
from privacy.secagg.ring import Ring
from privacy.secagg.server import SecureServer
from privacy.secagg.shamir import combine
from privacy.secagg.view import sealed_context
from privacy.secagg.wire import Advert, Kind, Reader, write_table
from tests.privacy.secagg.federation import Federation, ask, hand_in, requests, step
from tests.privacy.secagg.slow_sum import SlowSum, interpolated

RING = Ring(32, 2000, 4)
ACCEPT = 1e-9  # Of all uniform streams so many would fail; without a mask the p-value is 0.


def stream(seed: object) -> Callable[[int], bytes]:
    """Entropy that repeats: SHAKE-128 of `seed`."""
    position = 0

    def draw(count: int) -> bytes:
        nonlocal position
        position += count
        return hashlib.shake_128(repr(seed).encode()).digest(position)[-count:]

    return draw


class Observed:
    """A session of five, threshold three, run up to the masked words, and all that was sent and kept."""

    def __init__(self, *, seed: object = None, lost: Collection[int] = (), **session: Any) -> None:
        changes = {"dropouts": 1} | ({"purpose": session.pop("purpose")} if "purpose" in session else {})
        self.federation = Federation(None, 5, RING, changes)
        if seed is not None:
            for slot in self.federation.slots:
                self.federation.clients[slot] = self.federation.client(slot, entropy=stream((seed, slot)))
            session["entropy"] = stream((seed, "server"))
        self.server = self.federation.server(**session)
        self.adverts: dict[int, bytes] = {}
        self.words: dict[int, NDArray[np.uint8]] = {}
        self.step("advertise", answer=lambda slot, message: self.adverts.setdefault(slot, message))
        self.kept = {slot: self.federation.secrets(slot) for slot in self.federation.slots}
        self.step("share")
        self.step("mask", lose=lost, words=lambda slot, words: self.words.setdefault(slot, words.copy()))
        self.held = {slot: self.federation.secrets(slot)["held"] for slot in self.federation.slots}
        self.slow = SlowSum(self.server.proposal, self.adverts)

    def step(self, stage: str, **settings: Any) -> None:
        assert step(self.federation, self.server, stage, **settings) == {}

    def secret(self, slot: int, name: str) -> bytes:
        return bytes.fromhex(self.kept[slot][name])

    def residual(self, slot: int, *, without: Collection[int] = (), blind: bool = False) -> bytes:
        """The masked words of `slot` less its vector, less the masks it has with `without`, less its self mask."""
        left = self.slow.add(self.words[slot].tobytes(), self.federation.words(slot).tobytes(), -1)
        for peer in without:
            mask = self.slow.pair_stream(peer, self.secret(peer, "key"), slot)
            left = self.slow.add(left, mask, -1 if slot < peer else 1)
        if blind:
            left = self.slow.add(left, self.slow.self_stream(self.secret(slot, "blind")), -1)
        return left


@pytest.fixture(scope="module")
def observed() -> Observed:
    return Observed(seed=0)


def is_uniform(residual: bytes) -> bool:
    """Whether bytes, and their pairs at odd distances, look like noise (chi-square)."""
    values = np.frombuffer(residual, np.uint8)
    mixed = [values, values[1:] - values[:-1], values[4:] - values[:-4], values[4:] ^ values[:-4]]
    return all(stats.chisquare(np.bincount(each, minlength=256)).pvalue > ACCEPT for each in mixed)


def test_uniformity_is_told_from_a_vector_and_from_a_repeated_mask() -> None:
    vector = Federation(None, 5, RING).words(1).tobytes()
    noise = hashlib.shake_128(b"noise").digest(len(vector))
    assert is_uniform(noise)
    assert not is_uniform(np.frombuffer(noise, np.uint8).repeat(4).tobytes()[: len(vector)])
    assert not is_uniform(bytes(len(vector)))
    assert not is_uniform(noise[:4] * (len(vector) // 4))


class TestResidual:
    @pytest.mark.parametrize("colluders", [(), (4,), (4, 5)])
    def test_of_masked_words_is_uniform_to_the_server_and_colluders_below_the_threshold(
        self, colluders: tuple[int, ...], observed: Observed
    ) -> None:
        for honest in (1, 2, 3):
            assert is_uniform(observed.residual(honest, without=colluders))

    @pytest.mark.parametrize("honest", [1, 2, 3])
    def test_is_uniform_also_after_the_reveal_took_the_self_mask_away(self, honest: int, observed: Observed) -> None:
        """Two honest peers are left, and their masks are known to nobody else."""
        assert is_uniform(observed.residual(honest, without=(4, 5), blind=True))
        assert is_uniform(observed.residual(honest, without=(4, 5, honest % 3 + 1), blind=True))

    @pytest.mark.parametrize("honest", [1, 3])
    def test_of_a_late_vector_is_uniform_although_its_key_was_recovered(self, honest: int, observed: Observed) -> None:
        """Who has the key has every pair mask: what protects the vector is the self mask, which nobody reveals."""
        peers = set(observed.federation.slots) - {honest}
        assert is_uniform(observed.residual(honest, without=peers))
        assert not is_uniform(observed.residual(honest, without=peers, blind=True))

    def test_is_nothing_once_all_masks_are_away(self, observed: Observed) -> None:
        """Or the tests above would measure noise of their own."""
        for slot in observed.federation.slots:
            peers = set(observed.federation.slots) - {slot}
            assert observed.residual(slot, without=peers, blind=True) == bytes(RING.nbytes)

    def test_of_several_sites_holds_no_mask_twice(self, observed: Observed) -> None:
        residuals = [observed.residual(slot, blind=True) for slot in observed.federation.slots]
        for left, right in combinations(residuals, 2):
            assert is_uniform(observed.slow.add(left, right))
            assert is_uniform(observed.slow.add(left, right, -1))

    def test_body_and_tail_have_masks_of_their_own(self) -> None:
        """Also within one vector no part of the keystream is used twice."""
        residual = Observed(seed=1).residual(1)
        blocks = [residual[start : start + 8] for start in range(0, len(residual) - 7, 8)]
        assert len(set(blocks)) == len(blocks)


class TestSessions:
    @pytest.mark.parametrize(
        "change",
        [{}, {"round_number": 2}, {"model": "ee" * 32}, {"purpose": "validation"}],
        ids=["nonce", "round", "model", "purpose"],
    )
    def test_share_no_mask_even_if_a_site_s_entropy_repeats(self, change: dict[str, Any]) -> None:
        """As after a machine was restored from a snapshot: the session is in every key."""
        same: dict[str, Any] = {"nonce": None if not change else b"n" * 32}
        first, second = mask_only(seed=3, **same), mask_only(seed=3, **same, **change)
        assert set(first) == set(second) == {1, 2, 3, 4, 5}
        for slot in (1, 2):
            assert is_uniform(difference(first[slot], second[slot]))
        # Pair masks cancel in the sum over all, which leaves the self masks alone.
        assert is_uniform(difference(sum_of(first), sum_of(second)))

    def test_draw_fresh_masks(self) -> None:
        first, second = mask_only(), mask_only()
        assert is_uniform(difference(first[1], second[1]))
        assert is_uniform(difference(sum_of(first), sum_of(second)))

    def test_with_other_adverts_have_other_masks(self) -> None:
        """One site's advert is not there: of the others', who draw the same, no mask is the same."""
        first, second = mask_only(seed=4, nonce=b"n" * 32), mask_only(seed=4, nonce=b"n" * 32, absent=5)
        for slot in (1, 2):
            assert is_uniform(difference(first[slot], second[slot]))
        assert is_uniform(difference(sum_of(first), sum_of(second)))

    def test_repeat_when_all_is_the_same(self) -> None:
        """The control: what the tests above vary is all that varies."""
        first, second = (mask_only(seed=4, nonce=b"n" * 32) for _ in range(2))
        assert first == second


def mask_only(
    *, seed: object = None, nonce: bytes | None = None, absent: int = 0, purpose: str = "update", **session: Any
) -> dict[int, bytes]:
    """The masks that a session of five adds to vectors of zeros."""
    federation = Federation(None, 5, RING, {"dropouts": 1, "purpose": purpose})
    federation.words = lambda slot, *, seed=0: RING.zeros()  # type: ignore[method-assign]
    if seed is not None:
        for slot in federation.slots:
            federation.clients[slot] = federation.client(slot, entropy=stream((seed, slot)))
    if nonce is not None:
        session["entropy"] = lambda count: nonce[:count]
    words: dict[int, bytes] = {}
    server = federation.server(**session)
    federation.run(server, until="agree", drops={"advertise": [absent]}, at={"mask": {"words": keep_in(words)}})
    return words


def keep_in(words: dict[int, bytes]) -> Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]:
    def keep(slot: int, masked: NDArray[np.uint8]) -> NDArray[np.uint8]:
        words[slot] = masked.tobytes()
        return masked

    return keep


def difference(left: bytes, right: bytes) -> bytes:
    return bytes(np.frombuffer(left, "<u4") - np.frombuffer(right, "<u4"))


def sum_of(words: dict[int, bytes]) -> bytes:
    return bytes(np.sum([np.frombuffer(each, "<u4") for each in words.values()], axis=0, dtype="<u4"))


class TestKeys:
    @pytest.mark.parametrize("secret", ["key", "blind"])
    def test_every_mask_needs_what_its_site_alone_has(self, secret: str) -> None:
        """All that travelled is the same; the site has another secret, and its masks have nothing left in common."""
        seen = Observed(seed=5)
        again = Federation(None, 5, RING, {"dropouts": 1})
        again.stores[1].save(replayed(seen, **{secret: ("07" * 32)}))
        masked = again.words(1)
        again.clients[1].mask(masked)
        assert is_uniform(difference(masked.tobytes(), seen.words[1].tobytes()))

    def test_with_the_same_secrets_the_masks_are_the_same(self) -> None:
        seen = Observed(seed=5)
        again = Federation(None, 5, RING, {"dropouts": 1})
        again.stores[1].save(replayed(seen))
        masked = again.words(1)
        again.clients[1].mask(masked)
        assert masked.tobytes() == seen.words[1].tobytes()

    def test_no_two_secrets_of_a_session_are_the_same(self, observed: Observed) -> None:
        secrets = [
            observed.secret(slot, name) for slot in observed.federation.slots for name in ("key", "blind", "channel")
        ]
        adverts = [Advert.parse(message) for message in observed.adverts.values()]
        public = [value for advert in adverts for value in (advert.mask, advert.channel, advert.commitment)]
        assert len(set(secrets + public)) == len(secrets + public)

    def test_no_secret_is_in_any_message(self) -> None:
        sent: list[bytes] = []

        def keep(slot: int, message: bytes) -> bytes:
            sent.append(message)
            return message

        federation = Federation(None, 4, Ring(32, 4, 1))
        server = federation.server()
        hooks: dict[str, Any] = {"request": keep, "answer": keep}
        secrets: list[bytes] = []
        for stage in ("advertise", "share", "mask", "agree", "reveal"):
            step(federation, server, stage, **hooks)
            for slot in federation.slots if stage in ("advertise", "mask") else ():
                record = federation.secrets(slot)
                secrets += [bytes.fromhex(record[name]) for name in ("key", "blind", "channel")]
                secrets += [bytes.fromhex(share)[at : at + 32] for share in record["held"].values() for at in (0, 32)]
        assert len(secrets) == 4 * 3 * 2 + 4 * 3 * 2
        assert not [
            secret for secret in secrets for message in sent if secret in message or secret.hex().encode() in message
        ]

    def test_a_client_shows_no_secret_of_itself(self, observed: Observed) -> None:
        content = observed.federation.stores[1].load()
        assert content is not None
        text = repr(_Secrets.of(content)) + repr(observed.federation.clients[1])
        for name in ("key", "blind", "channel"):
            assert observed.kept[1][name] not in text
            assert repr(observed.secret(1, name)) not in text
        assert not any(share in text for share in observed.held[1].values())


def replayed(seen: Observed, **changes: str) -> bytes:
    """What client 1 kept just before it masked, with some of it changed."""
    record = seen.federation.secrets(1) | {"stage": "mask"} | changes
    return json.dumps(record).encode()


class TestShares:
    def test_below_the_threshold_fit_every_secret(self, observed: Observed) -> None:
        """Any other secret goes through the same two shares, and gives a third that is as good as the true one."""
        held = {helper: bytes.fromhex(observed.held[helper]["1"]) for helper in (2, 3, 4, 5)}
        for at, name in ((0, "blind"), (32, "key")):
            shares = {helper: both[at : at + 32] for helper, both in held.items()}
            secret = observed.secret(1, name)
            for helpers in combinations(shares, 3):
                assert combine({helper: shares[helper] for helper in helpers}) == secret
            for pair in combinations(shares, 2):
                few = {helper: shares[helper] for helper in pair}
                assert combine(few) != secret
                for candidate in (bytes(32), b"\7" * 32, secret):
                    third = next(helper for helper in shares if helper not in few)
                    forged = interpolated(few | {0: candidate}, at=third)
                    assert combine(few | {third: forged}) == candidate
                    assert (forged == shares[third]) == (candidate == secret)

    def test_of_one_session_have_nothing_in_common(self, observed: Observed) -> None:
        shares = [share[at : at + 64] for held in observed.held.values() for share in held.values() for at in (0, 64)]
        assert len(shares) == 5 * 4 * 2
        assert len(set(shares)) == len(shares)

    @pytest.mark.parametrize("lost", [(), (4,)])
    def test_are_revealed_of_one_kind_for_each_peer(self, lost: tuple[int, ...]) -> None:
        seen = Observed(lost=lost)
        seen.step("agree")
        revealed: dict[int, bytes] = {}
        seen.step("reveal", answer=lambda slot, message: revealed.setdefault(slot, message))
        assert set(revealed) == set(seen.federation.slots) - set(lost)
        for helper, message in revealed.items():
            sealed = Reader(message, Kind.REVEAL).rest()
            context = sealed_context(Kind.REVEAL, seen.slow.root)
            both = {int(peer): bytes.fromhex(shares) for peer, shares in seen.held[helper].items()}
            assert set(both) == set(seen.federation.slots) - {helper}
            one = {peer: shares[32:] if peer in lost else shares[:32] for peer, shares in both.items()}
            assert open_sealed(seen.server._keys[helper], sealed, context=context) == write_table(one)
        seen.federation.check_sum(seen.server.finish(), seen.server.summed)

    @pytest.mark.parametrize("lost", [(), (4,)])
    def test_that_are_fewer_than_the_threshold_end_the_round(self, lost: tuple[int, ...]) -> None:
        seen = Observed(lost=lost)
        seen.step("agree")
        answering = [slot for slot in seen.federation.slots if slot not in lost][:3]
        messages = requests(seen.server, "reveal")
        for slot in answering:
            hand_in(seen.server, "reveal", slot, *ask(seen.federation, slot, "reveal", messages[slot]))
        assert_aborts(seen.server, len(answering), len(messages))


def assert_aborts(server: SecureServer, count: int, asked: int) -> None:
    with pytest.raises(RoundAborted, match=f"stage reveal: {count} of {asked} sites answered, at least 4 are needed"):
        server.finish()

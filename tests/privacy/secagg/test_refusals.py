"""A client refuses what no honest server would send, and keeps nothing; the server refuses what it cannot add."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.errors import Refused, RoundAborted
from privacy.secagg.channel import open_sealed, seal
from privacy.secagg.client import InMemory
from privacy.secagg.ring import Ring
from privacy.secagg.server import STAGES, SecureServer
from privacy.secagg.session import Session, Shape
from privacy.secagg.view import BOX, View, agreement, parse_cohort, sealed_context, write_cohort
from privacy.secagg.wire import SIGNATURE, Advert, Kind, Reader, u16, write, write_slots, write_table
from tests.privacy.secagg.federation import MODEL, Federation, ask, flipped, hand_in, identity, requests, step

RING = Ring(32, 6, 1)
LOW_ORDER = [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")]  # RFC 7748, sec. 6.1.


def five(folder: Path | None = None, **changes: Any) -> Federation:
    """Five members and a stranger; a threshold of three, a minimum of four."""
    return Federation(folder, 5, RING, {"dropouts": 1}, strangers=1, **changes)


def advert_by(slot: int, session: bytes, *, signer: int | None = None, **fields: bytes) -> Advert:
    """An advert that is signed as it should be, whatever it says."""
    content: dict[str, bytes] = {name: bytes([slot]) * 32 for name in ("mask", "channel", "commitment")} | fields
    advert = Advert(session, slot, **content)
    return replace(advert, signature=identity(slot if signer is None else signer).sign(advert.signed))


@dataclass(frozen=True)
class Attack:
    """A request to client 1 at one stage, made of the honest one; and what it says in return."""

    stage: str
    what: str
    change: Callable[[bytes, Federation, SecureServer], bytes]
    words: str


def proposing(**fields: Any) -> Callable[[bytes, Federation, SecureServer], bytes]:
    return lambda message, federation, server: bytes(replace(server.session, **fields))


def with_advert(slot: int, **fields: Any) -> Callable[[bytes, Federation, SecureServer], bytes]:
    def change(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        adverts = parse_cohort(message)
        return write_cohort(adverts | {slot: replace(adverts[slot], **fields)})

    return change


def with_signed(slot: int, *, session: bytes | None = None, **fields: Any) -> Callable[..., bytes]:
    def change(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        advert = advert_by(slot, server.session.id if session is None else session, **fields)
        return write_cohort(parse_cohort(message) | {slot: advert})

    return change


def without(*slots: int) -> Callable[..., bytes]:
    def change(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        return write_cohort({slot: advert for slot, advert in parse_cohort(message).items() if slot not in slots})

    return change


def boxes(change: Callable[[dict[int, bytes]], Mapping[int, bytes]]) -> Callable[..., bytes]:
    def changed(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        return write(Kind.BOXES, write_table(change(Reader(message, Kind.BOXES).table(BOX))))

    return changed


def survivors(*slots: int) -> Callable[..., bytes]:
    return lambda message, federation, server: write(Kind.SURVIVORS, write_slots(slots))


def evidence(change: Callable[[dict[int, bytes]], Mapping[int, bytes]]) -> Callable[..., bytes]:
    def changed(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        return write(Kind.EVIDENCE, write_table(change(Reader(message, Kind.EVIDENCE).table(SIGNATURE))))

    return changed


def signed_by_all(root: bytes, *slots: int) -> Callable[..., bytes]:
    """Everybody's signature, over another root or other survivors than they should."""
    return evidence(lambda table: {slot: identity(slot).sign(agreement(root, slots)) for slot in table})


def signed_by(*slots: int) -> Callable[..., bytes]:
    """True signatures over the true survivors."""

    def change(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        signed = agreement(server._view.root, server.summed)
        return write(Kind.EVIDENCE, write_table({slot: identity(slot).sign(signed) for slot in slots}))

    return change


def of_another_session(*, relabelled: bool) -> Callable[..., bytes]:
    """The other sites' true adverts, of another session of the same round."""

    def change(message: bytes, federation: Federation, server: SecureServer) -> bytes:
        other = five()
        step(other, second := other.server(), "advertise")
        theirs = parse_cohort(requests(second, "share")[2])
        if relabelled:
            theirs = {slot: replace(advert, session=server.session.id) for slot, advert in theirs.items()}
        return write_cohort(theirs | {1: parse_cohort(message)[1]})

    return change


SMALL = (1, 2, 3, 4)
OWN = "this site's own advert is missing or altered"
UNSIGNED = "the advert of site-2 is not signed with the key in the roster"
FEW_BOXES = "2 neighbours' boxes open in this view of the session, the threshold is 3"
FEW_SIGNED = "{} neighbours signed the survivors that this site signed, the threshold is 3"
ATTACKS = [
    Attack("advertise", "no session", lambda *_: b"{}", "the proposal is not a session"),
    Attack("advertise", "another version", proposing(v=2), "not a session of this version"),
    Attack("advertise", "another federation", proposing(federation="x"), "the session's federation is not"),
    Attack("advertise", "another roster", proposing(roster="00" * 32), "the session's roster is not"),
    Attack("advertise", "another job", proposing(job="00" * 32), "the session's job is not"),
    Attack("advertise", "another purpose", proposing(purpose="x"), "the session's purpose is not"),
    Attack("advertise", "a lower threshold", proposing(threshold=2), "the session's threshold is not"),
    Attack("advertise", "a threshold of one", proposing(threshold=1), "the session's threshold is not"),
    Attack("advertise", "a lower degree", proposing(degree=2), "the session's degree is not"),
    Attack("advertise", "a lower minimum", proposing(minimum=2), "the session's minimum is not"),
    Attack("advertise", "fewer bits", proposing(bits=16), "the session's bits is not"),
    Attack("advertise", "a longer body", proposing(body=7), "the session's body is not"),
    Attack("advertise", "no tail", proposing(tail=0), "the session's tail is not"),
    Attack("advertise", "another encoding", proposing(encoding="x"), "the session's encoding is not"),
    Attack("advertise", "a smaller cohort", proposing(members=SMALL), "not a cohort that this job allows"),
    Attack("advertise", "a stranger in the cohort", proposing(members=(*SMALL, 5, 6)), "not a cohort"),
    Attack("advertise", "members out of order", proposing(members=(2, 1, 3, 4, 5)), "once each, in order"),
    Attack("advertise", "no model", proposing(model=""), "malformed"),
    Attack("advertise", "no round", proposing(round=0), "round 0 is not one of the job's"),
    Attack("share", "my advert missing", without(1), OWN),
    Attack("share", "my mask key swapped", with_advert(1, mask=bytes(32)), OWN),
    Attack("share", "my channel key swapped", with_advert(1, channel=bytes(32)), OWN),
    Attack("share", "my commitment swapped", with_advert(1, commitment=bytes(32)), OWN),
    Attack("share", "my signature over another advert", with_signed(1), OWN),
    Attack("share", "a mask key swapped", with_advert(2, mask=bytes(32)), UNSIGNED),
    Attack("share", "a channel key swapped", with_advert(2, channel=bytes(32)), UNSIGNED),
    Attack("share", "a commitment swapped", with_advert(2, commitment=bytes(32)), UNSIGNED),
    Attack("share", "a signature swapped", with_advert(2, signature=bytes(64)), UNSIGNED),
    Attack("share", "a session swapped", with_advert(2, session=bytes(32)), "an advert is of another session"),
    Attack("share", "an advert under another's key", with_signed(2, signer=3), UNSIGNED),
    Attack("share", "an advert of another session", with_signed(2, session=bytes(32)), "is of another session"),
    Attack("share", "all adverts of another session", of_another_session(relabelled=False), "is of another session"),
    Attack("share", "the same under this session's name", of_another_session(relabelled=True), UNSIGNED),
    Attack("share", "a stranger in the roster", with_signed(6), "is not a member of the session"),
    Attack("share", "a site that is in no roster", with_signed(77), "is not a member of the session"),
    Attack("share", "too few adverts", without(2, 3), "a cohort of 3 is below the minimum of 4"),
    Attack("share", "a channel key of low order", with_signed(2, channel=bytes(32)), "not a point of low order"),
    Attack(
        "mask", "a box from a stranger", boxes(lambda table: table | {6: table[2]}), "does not come from a neighbour"
    ),
    Attack("mask", "my own box", boxes(lambda table: table | {1: table[2]}), "does not come from a neighbour"),
    Attack("mask", "too few boxes", boxes(lambda table: {2: table[2], 3: table[3]}), FEW_BOXES),
    Attack("mask", "swapped boxes", boxes(lambda t: t | {2: t[3], 3: t[2]}), FEW_BOXES),
    Attack("mask", "altered boxes", boxes(lambda t: t | {i: flipped(t[i], 80) for i in (2, 3)}), FEW_BOXES),
    Attack("agree", "a set without me", survivors(2, 3, 4, 5), "this site is not among the survivors"),
    Attack("agree", "a stranger", survivors(1, 2, 3, 4, 6), "a survivor never advertised"),
    Attack("agree", "too few survivors", survivors(1, 2, 3), "3 survivors are below the minimum of 4"),
    Attack("agree", "nobody", survivors(), "this site is not among the survivors"),
    Attack("reveal", "no signatures", evidence(lambda table: {}), FEW_SIGNED.format(0)),
    Attack("reveal", "too few", evidence(lambda table: {2: table[2], 5: table[5]}), FEW_SIGNED.format(2)),
    Attack("reveal", "swapped signatures", evidence(lambda t: t | {2: t[3], 3: t[2]}), FEW_SIGNED.format(2)),
    Attack("reveal", "signatures of another view", signed_by_all(bytes(32), 1, 2, 3, 4, 5), FEW_SIGNED.format(0)),
    Attack("reveal", "my own signature and a stranger's", signed_by(1, 2, 3, 6), FEW_SIGNED.format(2)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.stage}: {attack.what}")
def test_a_client_refuses_and_keeps_nothing(attack: Attack) -> None:
    federation = five()
    server = federation.server()
    federation.run(server, until=attack.stage)
    honest = requests(server, attack.stage)[1]
    altered = attack.change(honest, federation, server)
    assert altered != honest
    with pytest.raises(Refused, match=attack.words) as caught:
        ask(federation, 1, attack.stage, altered)
    assert "\n" not in str(caught.value)
    assert federation.stores[1].load() is None
    if attack.stage != "advertise":
        with pytest.raises(Refused, match=r"no session of this site waits for"):
            ask(federation, 1, attack.stage, honest)


def test_signatures_over_another_set_of_survivors_open_nothing() -> None:
    federation = five()
    server = federation.server()
    federation.run(server, until="reveal")
    message = requests(server, "reveal")[1]
    root = server._view.root
    for others, count in (((1, 2, 3, 4), 0), ((1, 2, 3, 4, 5), 4)):
        content = federation.stores[1].load()
        changed = signed_by_all(root, *others)(message, federation, server)
        if count:
            assert ask(federation, 1, "reveal", changed)
            continue
        with pytest.raises(Refused, match=FEW_SIGNED.format(0)):
            ask(federation, 1, "reveal", changed)
        assert content is not None
        federation.stores[1].save(content)


@pytest.mark.parametrize(("round_number", "model"), [(2, MODEL), (1, "ef" * 32), (0, ""), (2, "ef" * 32)])
def test_a_client_trains_on_no_other_model_or_round_than_it_agreed_to(round_number: int, model: str) -> None:
    federation = five()
    server = federation.server()
    federation.run(server, until="mask")
    with pytest.raises(Refused, match="the round or the model is not the one of the session"):
        federation.clients[1].admit(requests(server, "mask")[1], round_number=round_number, model=model)
    assert federation.stores[1].load() is None


@pytest.mark.parametrize("point", LOW_ORDER, ids=["0", "1", "-1"])
def test_no_key_is_agreed_on_with_a_point_of_low_order(point: bytes) -> None:
    federation = five()
    server = federation.server()
    lying = replace(server.session, server=point.hex())
    reply = {slot: federation.clients[slot].advertise(bytes(lying)) for slot in federation.slots}
    cohort = write_cohort({slot: Advert.parse(message) for slot, message in reply.items()})
    with pytest.raises(Refused, match="not a point of low order"):
        federation.clients[1].share(cohort)
    with pytest.raises(Refused, match="not a point of low order"):
        server.add_advert(2, bytes(advert_by(2, server.session.id, channel=point)))
    assert federation.stores[1].load() is None


def test_a_masked_vector_needs_true_mask_keys() -> None:
    """A member advertises a mask key of low order: the server leaves it out; if it does not, nothing leaves."""
    federation = five()
    server = federation.server()
    step(federation, server, "advertise")
    lying = replace(server._adverts[5], mask=bytes(32))
    lying = replace(lying, signature=identity(5).sign(lying.signed))
    with pytest.raises(Refused, match="not a point of low order"):
        (other := five().server()).add_advert(5, bytes(advert_by(5, other.session.id, mask=bytes(32))))
    server._adverts[5] = lying
    federation.overwrite(5, advert=bytes(lying).hex())
    step(federation, server, "share")
    refused = step(federation, server, "mask")
    assert all("not a point of low order" in refused[slot] for slot in SMALL)
    assert federation.stores[1].load() is None


def test_a_site_that_is_not_asked_to_take_part_refuses() -> None:
    federation = Federation(None, 5, RING, {"cohorts": ((1, 2, 3, 4),), "dropouts": 0})
    server = federation.server(members=SMALL)
    with pytest.raises(Refused, match="this site is not among the session's members"):
        federation.clients[5].advertise(server.proposal)


class TestOrder:
    @pytest.mark.parametrize("done", [None, *STAGES])
    @pytest.mark.parametrize("asked", STAGES[1:])
    def test_no_stage_is_answered_twice_or_out_of_order(self, done: str | None, asked: str) -> None:
        federation = five()
        server = federation.server()
        reached = STAGES[STAGES.index(done) + 1] if done in STAGES[:-1] else None
        if done is not None:
            federation.run(server, until=reached)
        if asked == reached:
            return
        with pytest.raises(Refused, match=f"no session of this site waits for {'admit' if asked == 'mask' else asked}"):
            ask(federation, 1, asked, b"")
        assert federation.stores[1].load() is None

    def test_a_vector_is_masked_once_and_only_after_its_boxes_were_checked(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="mask")
        content = federation.stores[1].load()
        assert content is not None
        with pytest.raises(Refused, match="waits for mask"):
            federation.clients[1].mask(federation.words(1))
        federation.stores[1].save(content)
        ask(federation, 1, "mask", requests(server, "mask")[1])
        with pytest.raises(Refused, match="waits for mask"):
            federation.clients[1].mask(federation.words(1))

    @pytest.mark.parametrize("words", [np.zeros(3, np.uint8), RING.zeros().view("<u4"), RING.zeros()[None]])
    def test_only_words_of_the_session_s_ring_are_masked(self, words: Any) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="mask")
        federation.clients[1].admit(requests(server, "mask")[1], round_number=1, model=MODEL)
        with pytest.raises(Refused, match="the vector must be"):
            federation.clients[1].mask(words)
        assert federation.stores[1].load() is None

    def test_a_new_proposal_ends_the_open_session(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="share")
        federation.clients[1].advertise(federation.server().proposal)
        with pytest.raises(Refused, match="own advert is missing or altered"):
            ask(federation, 1, "share", requests(server, "share")[1])

    def test_a_round_that_is_over_takes_no_later_session_with_it(self) -> None:
        federation = five()
        step(federation, federation.server(round_number=3), "advertise")
        federation.clients[1].forget(until=2)
        assert federation.stores[1].load() is not None
        for until, slot in ((3, 1), (4, 2), (None, 3)):
            federation.clients[slot].forget(until=until)
            assert federation.stores[slot].load() is None
        federation.stores[4].save(b"damaged")
        federation.clients[4].forget(until=2)
        assert federation.stores[4].load() is None

    def test_nothing_is_kept_after_the_last_answer_or_when_told_to_forget(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="reveal")
        federation.clients[1].forget()
        step(federation, server, "reveal")
        assert all(store.load() is None for store in federation.stores.values())

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\0" * 40, b'{"held": {}}', b"\xff"])
    def test_damaged_secrets_are_refused_without_being_shown(self, content: bytes) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="agree")
        federation.stores[1].save(content)
        with pytest.raises(Refused, match="what this site kept of its session is damaged") as caught:
            ask(federation, 1, "agree", requests(server, "agree")[1])
        assert caught.value.__suppress_context__
        assert federation.stores[1].load() is None


class TestViews:
    def test_two_sets_of_survivors_are_signed_and_open_nothing_together(self) -> None:
        """The server tells 1, 2, 3 that 5 is alive, and 4, 5 that 1 is lost: nobody reveals to both, nothing opens."""
        federation = five()
        server = federation.server()
        federation.run(server, until="agree")
        sets = {slot: (1, 2, 3, 4, 5) if slot <= 3 else (2, 3, 4, 5) for slot in federation.slots}
        requests(server, "agree")
        signed = {
            slot: ask(federation, slot, "agree", survivors(*sets[slot])(b"", federation, server))[0][2:]
            for slot in sets
        }
        for slot in sets:
            table = {peer: signature for peer, signature in signed.items() if peer != slot}
            with pytest.raises(Refused, match="neighbours signed the survivors that this site signed"):
                ask(federation, slot, "reveal", write(Kind.EVIDENCE, write_table(table)))
            assert federation.stores[slot].load() is None

    def test_no_second_set_is_signed(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="agree")
        requests(server, "agree")
        content = federation.stores[1].load()
        assert content is not None
        ask(federation, 1, "agree", survivors(1, 2, 3, 4, 5)(b"", federation, server))
        federation.stores[1].save(content)
        with pytest.raises(Refused, match="agree: answered already"):
            ask(federation, 1, "agree", survivors(1, 2, 3, 4)(b"", federation, server))

    def test_clients_with_different_adverts_of_one_member_open_no_box_of_each_other(self) -> None:
        """Member 5 lies with the server: it has two adverts, and 1 and 2 see the one, 3 and 4 the other."""
        federation = five()
        server = federation.server()
        step(federation, server, "advertise")
        message = requests(server, "share")[1]
        views = dict.fromkeys((1, 2), message)
        views |= dict.fromkeys((3, 4), with_signed(5)(message, federation, server))
        given: dict[int, dict[int, bytes]] = {}
        for slot, view in views.items():
            reply, _ = ask(federation, slot, "share", view)
            context = sealed_context(Kind.SHARES, View(server.session, parse_cohort(view)).root)
            content = open_sealed(server._keys[slot], reply[2:], context=context)
            given[slot] = Reader(content, Kind.SHARES, sealed=True).table(BOX)
            if slot > 2:
                with pytest.raises(Refused, match="does not open: it was altered, or made in another view"):
                    server.add_shares(slot, reply)
        for slot, peers in ((1, (2, 3, 4)), (3, (1, 2, 4))):
            with pytest.raises(Refused, match="1 neighbours' boxes open in this view"):
                ask(
                    federation,
                    slot,
                    "mask",
                    write(Kind.BOXES, write_table({peer: given[peer][slot] for peer in peers})),
                )

    def test_a_survivor_that_never_shared_is_refused(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, drops={"share": [5]}, until="agree")
        requests(server, "agree")
        with pytest.raises(Refused, match="a survivor never shared its secrets with this site"):
            ask(federation, 1, "agree", survivors(1, 2, 3, 4, 5)(b"", federation, server))
        assert federation.stores[1].load() is None

    def test_on_a_sparse_graph_the_survivors_must_be_neighbours_enough(self) -> None:
        """83 sites of whom 17 may fail: the least graph on which a server could choose all failures among one's own."""
        settings = {"regular": True, "dropouts": 17}
        federation = Federation(None, 83, RING, settings)
        shape = Shape.of(83, colluders=0, regular=True, dropouts=17)
        server = federation.server()
        step(federation, server, "advertise")
        messages = requests(server, "share")
        near = server._view.neighbours(1)
        for slot in (1, *near):
            hand_in(server, "share", slot, *ask(federation, slot, "share", messages[slot]))
        ask(federation, 1, "mask", write(Kind.BOXES, write_table(server._boxes_for(1))))
        lost = near[: shape.degree - shape.threshold + 1]
        assert len(lost) <= shape.dropouts
        alive = [slot for slot in federation.slots if slot not in lost]
        with pytest.raises(
            Refused, match=f"{shape.threshold - 1} neighbours survive, the threshold is {shape.threshold}"
        ):
            ask(federation, 1, "agree", survivors(*alive)(b"", federation, server))
        assert federation.stores[1].load() is None


class TestRollback:
    """A store that came back, from a snapshot or a crash, opens nothing that was answered before."""

    @pytest.mark.parametrize("per_round", [1, None])
    @pytest.mark.parametrize("stage", STAGES[1:])
    def test_no_answer_is_given_again_to_an_earlier_store(
        self, stage: str, per_round: int | None, tmp_path: Path
    ) -> None:
        federation = five(tmp_path, per_round=per_round)
        server = federation.server()
        federation.run(server, until=stage)
        content = federation.stores[1].load()
        assert content is not None
        message = requests(server, stage)[1]
        ask(federation, 1, stage, message)
        federation.stores[1].save(content)
        federation.clients[1] = federation.client(1, journal=federation.journal(1))  # A new process.
        kind = "vector" if stage == "mask" and per_round else stage
        with pytest.raises(Refused, match=f"{kind}: answered 1 times already"):
            ask(federation, 1, stage, message)
        assert federation.stores[1].load() is None

    def test_a_round_whose_vector_left_is_not_asked_again(self, tmp_path: Path) -> None:
        federation = five(tmp_path)
        federation.run(federation.server())
        with pytest.raises(Refused, match="this site's vector for this round has left already"):
            federation.clients[1].advertise(federation.server().proposal)
        federation.clients[1].advertise(federation.server(round_number=2).proposal)

    def test_two_open_sessions_of_one_round_get_one_vector(self, tmp_path: Path) -> None:
        """Both were begun before either ended: from two snapshots, or by two processes."""
        federation, other = five(tmp_path), five(tmp_path)
        servers = federation.server(), other.server()
        federation.run(servers[0], until="mask")
        other.run(servers[1], until="mask")
        ask(federation, 1, "mask", requests(servers[0], "mask")[1])
        with pytest.raises(Refused, match="vector: answered 1 times already"):
            ask(other, 1, "mask", requests(servers[1], "mask")[1])
        assert other.stores[1].load() is None

    @pytest.mark.parametrize(("per_round", "runs"), [(1, 1), (2, 2), (None, 3)])
    def test_a_round_is_run_again_as_often_as_the_terms_allow(
        self, per_round: int | None, runs: int, tmp_path: Path
    ) -> None:
        federation = five(tmp_path, per_round=per_round)
        for _ in range(runs):
            federation.check_sum(federation.run(federation.server()), federation.slots)
        if per_round is not None:
            with pytest.raises(RoundAborted, match="stage advertise: 0 of 5 sites answered, at least 4 are needed"):
                federation.run(federation.server())

    @pytest.mark.parametrize("stage", ["mask", "agree", "reveal"])
    def test_of_two_threads_with_the_same_store_one_answers(self, stage: str, tmp_path: Path) -> None:
        federation = five(tmp_path, per_round=None)
        server = federation.server()
        federation.run(server, until=stage)
        message, content = requests(server, stage)[1], federation.stores[1].load()
        barrier = threading.Barrier(6)

        def answer(_: int) -> bool:
            return answers(federation, stage, message, content, barrier.wait)

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(answer, range(6))) == 1

    def test_of_two_processes_with_the_same_store_one_answers(self, tmp_path: Path) -> None:
        federation = five(tmp_path)
        server = federation.server()
        federation.run(server, until="reveal")
        message, content = requests(server, "reveal")[1], federation.stores[1].load()
        fork = multiprocessing.get_context("fork")
        barrier, results = fork.Barrier(4), fork.Queue()
        processes = [
            fork.Process(
                target=lambda: results.put(answers(federation, "reveal", message, content, lambda: barrier.wait(60)))
            )
            for _ in range(4)
        ]
        for process in processes:
            process.start()
        assert sorted(results.get(timeout=60) for _ in processes) == [False, False, False, True]
        for process in processes:
            process.join()


def answers(federation: Federation, stage: str, message: bytes, content: bytes | None, wait: Callable[[], Any]) -> bool:
    """Whether a client of its own answers, with `content` kept and the site's one journal."""
    store = InMemory()
    assert content is not None
    store.save(content)
    client = federation.client(1, store=store, journal=federation.journal(1))
    wait()
    try:
        if stage == "mask":
            client.admit(message, round_number=1, model=MODEL)
            client.mask(federation.words(1))
        else:
            getattr(client, stage)(message)
    except Refused:
        return False
    return True


class TestServer:
    def test_takes_one_answer_of_each_site_that_it_asked(self) -> None:
        federation = five()
        server = federation.server()
        for stage in STAGES:
            for slot, message in requests(server, stage).items():
                reply, words = ask(federation, slot, stage, message)
                with pytest.raises(Refused, match="the site was not asked"):
                    hand_in(server, stage, 6, reply, words)
                hand_in(server, stage, slot, reply, words)
                with pytest.raises(Refused, match="the site has answered already"):
                    hand_in(server, stage, slot, reply, words)
        federation.check_sum(server.finish(), federation.slots)

    @pytest.mark.parametrize("stage", STAGES)
    def test_takes_no_answer_of_another_site(self, stage: str) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until=stage)
        messages = requests(server, stage)
        reply, words = ask(federation, 1, stage, messages[1])
        with pytest.raises(Refused):
            hand_in(server, stage, 2, reply, words)
        for slot in (2, 3, 4, 5):
            hand_in(server, stage, slot, *ask(federation, slot, stage, messages[slot]))
        for later in STAGES[STAGES.index(stage) + 1 :]:
            step(federation, server, later)
        federation.check_sum(server.finish(), server.summed)

    @pytest.mark.parametrize(
        ("stage", "numbers"),
        [
            ("advertise", "3 of 5 sites answered, at least 4 are needed"),
            ("share", "3 of 5 sites answered, at least 4 are needed"),
            ("mask", "3 of 5 sites answered, at least 4 are needed"),
            ("agree", "3 of 5 sites answered, at least 4 are needed"),
            ("reveal", "3 of 5 sites answered, at least 4 are needed"),
        ],
    )
    def test_says_at_which_stage_how_many_were_missing(self, stage: str, numbers: str) -> None:
        federation = five()
        server = federation.server()
        with pytest.raises(RoundAborted) as caught:
            federation.run(server, drops={stage: [2, 4]})
        assert str(caught.value) == f"round 1: secure sum, stage {stage}: {numbers}"
        with pytest.raises(Refused, match="late: the session is at done"):
            hand_in(server, stage, 1, b"", RING.zeros())
        with pytest.raises(RuntimeError):
            requests(server, "agree")

    @pytest.mark.parametrize("secret", ["blind", "key"])
    def test_a_helper_that_lies_costs_nothing(self, secret: str) -> None:
        """Of seven with a threshold of four, two hand in false shares of a site that stayed, or was lost."""
        federation = Federation(None, 8, RING, {"dropouts": 3})
        server = federation.server()
        federation.run(server, drops={"mask": [8]}, until="reveal")
        for liar in (2, 5):
            held = federation.secrets(liar)["held"]
            at = 0 if secret == "blind" else 32
            false = {peer: flipped(bytes.fromhex(shares), at).hex() for peer, shares in held.items()}
            federation.overwrite(liar, held=false)
        assert step(federation, server, "reveal") == {}
        federation.check_sum(server.finish(), range(1, 8))

    @pytest.mark.parametrize(("secret", "lost"), [("blind", []), ("key", [5])])
    def test_a_site_that_shared_other_secrets_than_it_advertised_ends_the_round(
        self, secret: str, lost: list[int]
    ) -> None:
        federation = five()
        server = federation.server()
        step(federation, server, "advertise")
        federation.overwrite(5, **{secret: bytes(32).hex()})
        step(federation, server, "share")
        step(federation, server, "mask", skip=lost)
        step(federation, server, "agree")
        step(federation, server, "reveal")
        with pytest.raises(
            RoundAborted, match=r"stage reveal: 4 shares of site-5 came back, and no 3 of them, the thr"
        ):
            server.finish()

    def test_takes_shares_for_the_neighbours_only(self) -> None:
        federation = five()
        server = federation.server()
        step(federation, server, "advertise")
        requests(server, "share")
        context = sealed_context(Kind.SHARES, server._view.root)
        for table in ({}, {2: bytes(92)}, dict.fromkeys((2, 3, 4, 5, 6), bytes(92)), dict.fromkeys(SMALL, bytes(92))):
            content = write(Kind.SHARES, seal(server._keys[1], write_table(table), context=context))
            with pytest.raises(Refused, match="the shares are not for the site's neighbours"):
                server.add_shares(1, content)

    def test_takes_revealed_shares_only_from_those_who_were_given_them(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="reveal")
        requests(server, "reveal")
        context = sealed_context(Kind.REVEAL, server._view.root)
        for slot in (1, 6):
            content = write(Kind.REVEAL, seal(server._keys[1], write_table({slot: bytes(32)}), context=context))
            with pytest.raises(Refused, match="the reveal holds shares that nobody gave to this site"):
                server.add_reveal(1, content)

    def test_adds_no_words_of_another_shape(self) -> None:
        federation = five()
        server = federation.server()
        federation.run(server, until="mask")
        reply, words = ask(federation, 1, "mask", requests(server, "mask")[1])
        assert words is not None
        for wrong in (words[:-1], words.view("<u4"), np.concatenate([words, words])):
            with pytest.raises(Refused, match="the vector must be"):
                server.add_masked(1, reply, wrong)
        server.add_masked(1, reply, words)


def test_the_session_a_server_proposes_is_read_back_whole() -> None:
    server = five().server()
    assert Session.parse(server.proposal) == server.session
    assert u16(server.session.members[-1]) == b"\5\0"

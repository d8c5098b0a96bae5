"""Whatever byte changes on its way, the sum is the true one of those who are in it, or there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import Refused
from privacy.secagg.ring import Ring
from privacy.secagg.server import STAGES
from privacy.secagg.view import BOX
from privacy.secagg.wire import Kind, Reader, write, write_table
from tests.privacy.secagg.federation import Federation, ask, flipped, hand_in, requests, step

RING = Ring(16, 9, 1)


def four() -> Federation:
    """Four members of whom none can be spared: every loss ends the round."""
    return Federation(None, 4, RING)


def altered(words: NDArray[np.uint8], position: int, mask: int) -> NDArray[np.uint8]:
    words[position % words.size] ^= mask
    return words


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(STAGES),
    st.sampled_from(["request", "answer", "words"]),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 2**16),
    st.integers(1, 255),
)
def test_a_changed_byte_never_changes_the_sum(stage: str, what: str, slot: int, position: int, mask: int) -> None:
    """Nor costs it more than the one site whose message it was, of which one can be spared."""
    federation = Federation(None, 5, RING, {"dropouts": 1})
    server = federation.server()

    def change(sender: int, message: Any) -> Any:
        if sender != slot:
            return message
        if isinstance(message, bytes):
            return flipped(message, position % len(message), mask)
        return altered(message, position, mask)

    total = federation.run(server, at={stage: {what: change}})
    assert set(server.summed) >= set(federation.slots) - {slot}
    federation.check_sum(total, server.summed)


@pytest.mark.parametrize("stage", STAGES)
def test_the_server_refuses_an_answer_with_any_byte_changed(stage: str) -> None:
    federation = four()
    server = federation.server()
    federation.run(server, until=stage)
    messages = requests(server, stage)
    reply, words = ask(federation, 1, stage, messages[1])
    for position in range(len(reply)):
        with pytest.raises(Refused):
            hand_in(server, stage, 1, flipped(reply, position, 1 << position % 8), words)
    for position in range(0 if words is None else words.size):
        assert words is not None
        with pytest.raises(Refused, match="not what their site vouched for"):
            hand_in(server, stage, 1, reply, altered(words.copy(), position, 1 << position % 8))
    hand_in(server, stage, 1, reply, words)
    for slot in (2, 3, 4):
        hand_in(server, stage, slot, *ask(federation, slot, stage, messages[slot]))
    for later in STAGES[STAGES.index(stage) + 1 :]:
        step(federation, server, later)
    federation.check_sum(server.finish(), federation.slots)


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_refuses_a_request_with_any_byte_changed(stage: str) -> None:
    """Or answers, to a session of another round, model or server, with what its own server refuses."""
    federation = four()
    server = federation.server()
    federation.run(server, until=stage)
    message = requests(server, stage)[1]
    content = federation.stores[1].load()
    for position in range(len(message)):
        if content is not None:
            federation.stores[1].save(content)
        try:
            reply, words = ask(federation, 1, stage, flipped(message, position, 1 << position % 7))
        except Refused:
            assert federation.stores[1].load() is None
            continue
        assert stage == "advertise"
        with pytest.raises(Refused, match="an advert is of another session"):
            hand_in(server, stage, 1, reply, words)


def test_a_box_that_is_left_out_on_its_way_never_changes_the_sum() -> None:
    """The site adds no mask with the one whose box it did not see, and the server would take one off."""
    federation = Federation(None, 5, RING, {"dropouts": 1})
    server = federation.server()

    def without(slot: int, message: bytes) -> bytes:
        table = Reader(message, Kind.BOXES).table(BOX)
        return write(Kind.BOXES, write_table({peer: box for peer, box in table.items() if (slot, peer) != (1, 2)}))

    total = federation.run(server, at={"mask": {"request": without}})
    assert federation.refused["mask"] == {1: "the masked words are not what their site vouched for"}
    assert server.summed == (2, 3, 4, 5)
    federation.check_sum(total, server.summed)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_message_of_one_site_serves_no_other(stage: str) -> None:
    """What the server sends to 2 is of no use to 1, unless it is the same for all."""
    federation = four()
    server = federation.server()
    federation.run(server, until=stage)
    messages = requests(server, stage)
    if stage in ("share", "agree"):
        assert messages[1] == messages[2]
        return
    with pytest.raises(Refused):
        ask(federation, 1, stage, messages[2])


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_of_another_session_of_the_same_sites_is_refused(stage: str) -> None:
    federation, other = four(), four()
    server, earlier = federation.server(), other.server()
    federation.run(server, until=stage)
    other.run(earlier, until=stage)
    reply, words = ask(other, 1, stage, requests(earlier, stage)[1])
    requests(server, stage)
    with pytest.raises(Refused):
        hand_in(server, stage, 1, reply, words)

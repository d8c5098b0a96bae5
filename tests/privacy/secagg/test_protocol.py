"""The sum is that of the survivors, bit for bit, for every way to drop out; or there is none, and it is said why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import Refused, RoundAborted
from privacy.secagg.ring import Ring
from privacy.secagg.server import STAGES
from privacy.secagg.session import Shape
from tests.privacy.secagg.federation import Federation, ask, hand_in, name, requests, step
from tests.privacy.secagg.slow_sum import SlowSum, interpolated

# Sparse graphs for so few clients: without colluders, and with this many dropouts.
SPARSE = [(clients, dropouts) for clients in (6, 7) for dropouts in (0, 1)]


@dataclass(frozen=True)
class Schedule:
    """Who leaves at which stage, and whether the last answer is lost on its way (True) or never made."""

    clients: int
    settings: dict[str, Any]
    ring: Ring
    leaves: dict[int, tuple[str, bool]]

    def left_at(self, stage: str, *, lost: bool) -> set[int]:
        return {slot for slot, leave in self.leaves.items() if leave == (stage, lost)}


@st.composite
def schedules(draw: Callable[..., Any], most: int = 6) -> Schedule:
    ring = Ring(draw(st.sampled_from([16, 20, 32])), draw(st.integers(0, 9)), draw(st.integers(0, 3)))
    if most >= 6 and draw(st.booleans()):
        clients, dropouts = draw(st.sampled_from(SPARSE))
        settings = {"regular": True, "dropouts": dropouts}
    else:
        clients = draw(st.integers(3, most))
        colluders = draw(st.integers(0, clients - 3))
        possible = clients - 1 - ((clients - 1 + colluders) // 2 + 1)
        settings = {"colluders": colluders, "dropouts": draw(st.none() | st.integers(0, possible))}
    leaving = st.dictionaries(
        st.integers(1, clients), st.tuples(st.sampled_from(STAGES), st.booleans()), max_size=draw(st.integers(0, 4))
    )
    return Schedule(clients, settings, ring, draw(leaving))


def predicted(
    schedule: Schedule, shape: Shape, near_of: Callable[[set[int]], dict[int, set[int]]]
) -> set[int] | tuple[Any, ...]:
    """Whose vectors the sum must hold; or at which stage how many of how many are there, and how many are needed."""

    def staying(asked: set[int], stage: str) -> set[int]:
        gone = STAGES[: STAGES.index(stage) + 1]
        return {slot for slot in asked if slot not in schedule.leaves or schedule.leaves[slot][0] not in gone}

    def with_enough(asked: set[int], stage: str) -> set[int]:
        """Who stays, and has as many neighbours among `asked` as the threshold; the others refuse."""
        return {slot for slot in staying(asked, stage) if len(near[slot] & asked) >= shape.threshold}

    members = set(range(1, schedule.clients + 1))
    adverts = staying(members, "advertise")
    if len(adverts) < shape.minimum:
        return "advertise", len(adverts), len(members), shape.minimum
    near = near_of(adverts)
    shared = staying(adverts, "share")
    masked = with_enough(shared, "mask")
    agreed = with_enough(masked, "agree")
    revealed = with_enough(agreed, "reveal")
    for stage, answered, asked, needed in (
        ("share", shared, adverts, shape.minimum),
        ("mask", masked, shared, shape.minimum),
        ("agree", agreed, masked, shape.threshold + 1),
        ("reveal", revealed, agreed, shape.threshold + 1),
    ):
        if len(answered) < needed:
            return stage, len(answered), len(asked), needed
    for slot in sorted(shared):
        if len(near[slot] & revealed) < shape.threshold:
            return "reveal", len(near[slot] & revealed), slot, shape.threshold
    return masked


def check_schedule(schedule: Schedule) -> str:
    """Run it; return the stage at which it ended."""
    federation = Federation(None, schedule.clients, schedule.ring, schedule.settings)
    server = federation.server()
    shape = Shape.of(schedule.clients, **{"colluders": 0, **schedule.settings})
    adverts: dict[int, bytes] = {}

    def near_of(slots: set[int]) -> dict[int, set[int]]:
        session = SlowSum(server.proposal, {slot: adverts[slot] for slot in slots})
        return {slot: session.neighbours(slot) for slot in slots}

    at: dict[str, dict[str, Any]] = {stage: {"lose": schedule.left_at(stage, lost=True)} for stage in STAGES}
    at["advertise"]["answer"] = lambda slot, message: adverts.setdefault(slot, message)
    drops = {stage: schedule.left_at(stage, lost=False) for stage in STAGES}
    outcome: NDArray[np.uint8] | RoundAborted
    try:
        outcome = federation.run(server, drops=drops, at=at)
    except RoundAborted as error:
        outcome = error
    expected = predicted(schedule, shape, near_of)
    if len(schedule.leaves) <= shape.dropouts:
        assert isinstance(expected, set), "a round within its dropouts must not abort"
    if isinstance(expected, set):
        assert not isinstance(outcome, RoundAborted), str(outcome)
        assert set(server.summed) == expected
        federation.check_sum(outcome, expected)
        return "done"
    stage, count, of, needed = expected
    assert isinstance(outcome, RoundAborted)
    if stage == "reveal" and count < needed and f"of {name(of)} came back" in str(outcome):
        numbers = f"{count} shares of {name(of)} came back, and no {needed} of them"
    else:
        numbers = f"{count} of {of} sites answered, at least {needed} are needed"
    assert str(outcome).startswith(f"round 1: secure sum, stage {stage}: {numbers}")
    return str(stage)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules())
def test_sums_exactly_the_survivors_or_aborts_with_stage_count_and_threshold(schedule: Schedule) -> None:
    check_schedule(schedule)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sums_exactly_for_ten_thousand_schedules() -> None:
    ends: dict[str, int] = {}

    @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(schedules(most=4) | schedules(most=5) | schedules(most=6))
    def check(schedule: Schedule) -> None:
        end = check_schedule(schedule)
        ends[end] = ends.get(end, 0) + 1

    check()
    assert sum(ends.values()) >= 10_000
    assert min(ends.get(stage, 0) for stage in (*STAGES, "done")) > 50, ends


@pytest.mark.parametrize("stage", STAGES)
def test_goes_on_without_those_who_leave_at_any_stage(stage: str) -> None:
    schedule = Schedule(7, {"dropouts": 2}, Ring(32, 5, 1), {2: (stage, False), 6: (stage, True)})
    assert check_schedule(schedule) == "done"


@pytest.mark.parametrize("stage", STAGES[1:4])
def test_names_the_stage_at_which_too_few_are_left(stage: str) -> None:
    leaves = dict.fromkeys((1, 3, 5, 7), (stage, False))
    assert check_schedule(Schedule(7, {"dropouts": 2}, Ring(32, 5, 1), leaves)) == stage


def test_counts_those_who_leave_at_different_stages_together() -> None:
    leaves = {1: ("share", False), 2: ("mask", True), 3: ("agree", False), 4: ("reveal", False)}
    assert check_schedule(Schedule(10, {"dropouts": 4}, Ring(16, 7, 2), leaves)) == "done"


def test_takes_the_masks_of_every_lost_neighbour_off_a_sparse_graph() -> None:
    settings = {"regular": True, "dropouts": 3}
    leaves = {3: ("advertise", False), 7: ("mask", True), 11: ("mask", False)}
    assert Shape.of(14, colluders=0, regular=True, dropouts=3).degree < 13
    assert check_schedule(Schedule(14, settings, Ring(20, 10, 1), leaves)) == "done"


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 6), st.sampled_from([16, 20, 32]), st.integers(0, 7), st.integers(0, 2), st.data())
def test_masked_words_and_sum_are_those_of_a_slow_independent_implementation(
    clients: int, bits: Any, body: int, tail: int, data: st.DataObject
) -> None:
    settings: dict[str, Any] = {"regular": True, "dropouts": 1} if clients == 6 else {"dropouts": int(clients == 5)}
    lost = data.draw(st.sampled_from(range(1, clients + 1))) if clients > 4 else 0
    federation = Federation(None, clients, Ring(bits, body, tail), settings)
    server = federation.server()
    adverts: dict[int, bytes] = {}
    step(federation, server, "advertise", answer=lambda slot, message: adverts.setdefault(slot, message))
    secrets = {slot: federation.secrets(slot) for slot in federation.slots}
    slow = SlowSum(server.proposal, adverts)
    step(federation, server, "share")
    masked: dict[int, NDArray[np.uint8]] = {}
    step(federation, server, "mask", lose=[lost], words=lambda slot, words: masked.setdefault(slot, words.copy()))
    for slot, words in masked.items():
        key, blind = (bytes.fromhex(secrets[slot][field]) for field in ("key", "blind"))
        plain = federation.words(slot).tobytes()
        expected = slow.masked(plain, slot=slot, key=key, blind=blind, sharers=federation.slots)
        assert words.tobytes() == expected
    helpers = {slot: federation.secrets(slot)["held"] for slot in federation.slots}
    shares = {
        slot: {
            helper: (bytes.fromhex(held[str(slot)])[:32], bytes.fromhex(held[str(slot)])[32:])
            for helper, held in helpers.items()
            if str(slot) in held
        }
        for slot in federation.slots
    }
    for slot, given_away in shares.items():
        assert set(given_away) == slow.neighbours(slot)
        some = dict(list(given_away.items())[: server.session.threshold])
        assert interpolated({helper: pair[0] for helper, pair in some.items()}).hex() == secrets[slot]["blind"]
        assert interpolated({helper: pair[1] for helper, pair in some.items()}).hex() == secrets[slot]["key"]
    step(federation, server, "agree")
    step(federation, server, "reveal")
    total = server.finish()
    assert total.tobytes() == slow.total({slot: words.tobytes() for slot, words in masked.items()}, shares)
    federation.check_sum(total, masked)


def test_a_client_serves_one_round_after_the_other(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4, Ring(32, 3, 1))
    for round_number in (1, 2, 3):
        total = federation.run(federation.server(round_number=round_number))
        federation.check_sum(total, federation.slots)
        assert all(store.load() is None for store in federation.stores.values())


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_that_comes_late_is_refused_and_changes_nothing(stage: str) -> None:
    federation = Federation(None, 5, Ring(32, 4, 1), {"dropouts": 1})
    server = federation.server()
    federation.run(server, until=stage)
    messages = requests(server, stage)
    reply, words = ask(federation, 5, stage, messages[5])
    for slot in (1, 2, 3, 4):
        hand_in(server, stage, slot, *ask(federation, slot, stage, messages[slot]))
    for later in STAGES[STAGES.index(stage) + 1 :]:
        later_messages = requests(server, later)
        with pytest.raises(Refused, match=re.escape(f"late: the session is at {later}, not {stage}")):
            hand_in(server, stage, 5, reply, words)
        for slot in later_messages:
            if slot != 5:
                hand_in(server, later, slot, *ask(federation, slot, later, later_messages[slot]))
    total = server.finish()
    with pytest.raises(Refused, match="late"):
        hand_in(server, stage, 5, reply, words)
    assert (5 in server.summed) == (stage in ("agree", "reveal"))
    federation.check_sum(total, server.summed)

"""A buffer takes who comes first by the clock, counts what is old for less, and nobody twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.collect import Collected, Failure
from simulations.asynchronous import BufferedCollector
from simulations.devices import Devices, VirtualClock
from strategies.fedbuff import FedBuff
from strategies.job import Job
from strategies.messages import Answer, Ask, Reply, Request, ask_for
from strategies.parameters import Vector
from strategies.total import Layout, Total
from tests.strategies.jobs import make_job

SITES = list("abcdef")


@dataclass
class Echo:
    """A transport to sites that add the model that they are asked with, of weight 2; `broken` ones fail."""

    broken: str = ""
    trained: list[tuple[str, int]] = field(default_factory=list)

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        for site, ask in requests.items():
            assert isinstance(ask, Ask)
            self.trained.append((site, ask.round_number))
            if site in self.broken:
                yield site, Failure(site, "dropped out")
                continue
            sent = np.append(2 * ask.model, np.float32(2)).astype(np.float32)
            yield site, Reply(site, ask.job, ask.round_number, sent, None)


def job(speeds: tuple[float, ...] = (1.0, 4.0), **changes: Any) -> Job:
    """Sites of so many kinds, as many of each, that take 8 steps a training; a site of speed 1 takes 8 seconds."""
    kinds = {f"kind-{i}": {"share": 1 / len(speeds), "speed": speed} for i, speed in enumerate(speeds)}
    for own in kinds.values():
        own["availability"] = changes.get("availability", 1.0)
    return make_job(
        strategy={"name": "fedbuff"},
        training={"local_steps": 8},
        cohort=changes.get("cohort", {}),
        simulation={"devices": kinds},
    )


@dataclass
class Room:
    job: Job
    strategy: FedBuff
    sites: Echo = field(default_factory=Echo)
    collected: list[Collected] = field(default_factory=list)
    began: list[dict[str, int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def run(self, rounds: int) -> Room:
        devices = Devices.of(self.job, dict.fromkeys(SITES, 12), Layout(2))
        assert devices is not None
        self.devices, clock = devices, VirtualClock()
        collector = BufferedCollector(self.sites, self.strategy, devices, clock)
        for number in range(1, rounds + 1):
            ask = ask_for(self.job.hash, number, self.model(number), None)
            self.collected.append(collector.collect(ask, SITES, Total(Layout(2))))
            self.began.append(collector.began)
            self.times.append(clock.now)
        return self

    @staticmethod
    def model(number: int) -> Vector:
        return np.array([number, -number], np.float32)


class TestBuffer:
    def test_a_step_is_taken_after_so_many_answers_with_nobody_waiting_for_the_slow(self) -> None:
        room = Room(job(), FedBuff(buffer=3)).run(5)
        kinds = room.devices.kinds
        fast, slow = ([s for s in SITES if kinds[s] == kind] for kind in ("kind-1", "kind-0"))
        # The fast ones fill the buffer each 2 s; at 8 s the slow ones, who still train on the first model, come too.
        assert [list(each.contributors) for each in room.collected[:3]] == [fast] * 3
        assert room.times == [2.0, 4.0, 6.0, 8.0, 8.0]
        late = {**room.began[3], **room.began[4]}
        assert {late[site] for site in slow} == {1}

    def test_what_is_old_counts_less_and_its_weight_as_ever(self) -> None:
        strategy = FedBuff(buffer=3, staleness=0.5)
        room = Room(job(), strategy).run(8)
        assert any(began != number for number, own in enumerate(room.began, 1) for began in own.values())
        for number, (collected, began) in enumerate(zip(room.collected, room.began, strict=True), start=1):
            assert set(began) == set(collected.contributors)
            wanted = sum(2 * room.model(old) * (1 + number - old) ** -0.5 for old in began.values())
            np.testing.assert_allclose(collected.total.update, wanted, rtol=1e-5)
            assert collected.total.weight == 2 * 3

    @settings(max_examples=40)
    @given(
        speeds=st.lists(st.sampled_from([0.5, 1.0, 3.0, 10.0]), min_size=1, max_size=3),
        buffer=st.integers(1, 6),
        at_once=st.one_of(st.none(), st.integers(1, 6)),
        availability=st.sampled_from([0.4, 0.8, 1.0]),
    )
    def test_nobody_counts_twice_in_a_step_or_trains_twice_on_a_model_and_time_goes_on(
        self, speeds: list[float], buffer: int, at_once: int | None, availability: float
    ) -> None:
        cohort = {} if at_once is None else {"size": at_once}
        room = Room(job(tuple(speeds), cohort=cohort, availability=availability), FedBuff(buffer=buffer)).run(12)
        assert len(set(room.sites.trained)) == len(room.sites.trained)
        for number, collected in enumerate(room.collected, start=1):
            assert len(set(collected.contributors)) == len(collected.contributors) <= buffer
            assert len(collected.contributors) == buffer
            assert all(old <= number for old in room.began[number - 1].values())
        assert room.times == sorted(room.times)

    def test_with_everyone_in_the_buffer_and_as_fast_it_is_a_round_like_any_other(self) -> None:
        room = Room(job((2.0,)), FedBuff(buffer=6)).run(3)
        assert [list(each.contributors) for each in room.collected] == [SITES] * 3
        assert room.times == [4.0, 8.0, 12.0]
        np.testing.assert_array_equal(room.collected[2].total.update, 6 * 2 * room.model(3))

    def test_only_so_many_train_at_once(self) -> None:
        room = Room(job((1.0,), cohort={"size": 2}), FedBuff(buffer=6)).run(1)
        assert room.times == [3 * 8.0]

    def test_who_fails_is_named_and_the_others_fill_the_buffer(self) -> None:
        room = Room(job((1.0,)), FedBuff(buffer=4), Echo(broken="ab")).run(2)
        for collected in room.collected:
            assert list(collected.contributors) == list("cdef")
        assert set(room.collected[0].failures) == set("ab")

    def test_a_step_is_taken_with_fewer_when_nobody_is_left_who_could_answer(self) -> None:
        room = Room(job((1.0,)), FedBuff(buffer=5), Echo(broken="abc")).run(1)
        assert list(room.collected[0].contributors) == list("def")

    def test_where_nobody_is_there_time_goes_on_until_somebody_is(self) -> None:
        room = Room(job((1.0,), availability=0.01), FedBuff(buffer=3)).run(4)
        assert [len(collected.contributors) for collected in room.collected] == [3] * 4
        assert all(not collected.failures for collected in room.collected)
        waited = np.diff([0.0, *room.times]) - 8.0
        assert waited.max() > 0
        np.testing.assert_allclose(waited % 8.0, 0.0, atol=1e-6)  # Each looks in as often as it would have trained.
        again = Room(job((1.0,), availability=0.01), FedBuff(buffer=3)).run(4)
        assert again.times == room.times

    def test_a_device_that_is_never_there_ends_nothing(self) -> None:
        assert np.isfinite(Room(job((1.0,), availability=5e-324), FedBuff(buffer=6)).run(2).times).all()

"""Devices answer in the order of a virtual clock; who is away, late or not needed adds nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import JobError
from server.collect import Collected, Failure, PlainCollector
from simulations.devices import Devices, DeviceTransport, VirtualClock, shared_out
from strategies.job import Device, Job
from strategies.messages import Answer, Ask, Reply, Request, Step, Stepped, ask_for
from strategies.parameters import Vector
from strategies.total import Layout, Total
from tests.strategies.jobs import make_job
from tests.strategies.lent import float32

SITES = list("abcdef")
ROWS = dict.fromkeys(SITES, 12)
LAYOUT = Layout(2)


@dataclass
class Sites:
    """A transport to sites that add one each and never fail; keeps who was asked, in order."""

    asked: list[str] = field(default_factory=list)
    wrong: dict[str, Vector] = field(default_factory=dict)
    """What sites send that is malformed."""

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        for site, request in requests.items():
            self.asked.append(site)
            if isinstance(request, Ask):
                yield (
                    site,
                    Reply(site, request.job, request.round_number, self.wrong.get(site, np.ones(3, np.float32)), None),
                )
            else:
                assert isinstance(request, Step)
                yield site, Stepped(site, request.job, request.round_number, request.stage, b"")


@dataclass
class Room:
    """Sites behind devices, round after round."""

    job: Job
    observed: bool = False
    sites: Sites = field(default_factory=Sites)
    clock: VirtualClock = field(default_factory=VirtualClock)
    failed: dict[int, int] = field(default_factory=dict)

    @property
    def devices(self) -> Devices:
        devices = Devices.of(self.job, ROWS, LAYOUT)
        assert devices is not None
        return devices

    @property
    def transport(self) -> DeviceTransport:
        return DeviceTransport(self.sites, self.devices, self.clock, self.observed, self.failed)

    def round(self, number: int = 1, sites: list[str] | None = None) -> Collected:
        ask = ask_for(self.job.hash, number, np.zeros(2, np.float32), None)
        return PlainCollector(self.transport).collect(ask, sites or SITES, Total(LAYOUT))

    def of_kind(self, kind: str) -> list[str]:
        return [site for site in SITES if self.devices.kinds[site] == kind]


def job(*, slow: dict[str, Any] | None = None, fast: dict[str, Any] | None = None, **changes: Any) -> Job:
    """Half of the sites take a step a second, half take four; 8 steps a round."""
    devices = {"slow": {"share": 0.5, **(slow or {})}, "fast": {"share": 0.5, "speed": 4.0, **(fast or {})}}
    training = {"local_steps": 8, **changes.pop("training", {})}
    return make_job(simulation={"devices": devices}, training=training, **changes)


class TestClock:
    def test_a_round_takes_as_long_as_its_slowest_site(self) -> None:
        room = Room(job())
        assert len(room.round(1).contributors) == 6
        assert room.clock.now == 8.0
        room.round(2, room.of_kind("fast"))
        assert room.clock.now == 8.0 + 2.0

    def test_sums_of_one_round_run_side_by_side(self) -> None:
        clock = VirtualClock()
        for number, seconds in [(1, 3.0), (1, 5.0), (1, 2.0), (2, 1.0)]:
            clock.reach(number, seconds)
        assert clock.now == 6.0

    def test_in_a_secure_sum_only_the_training_takes_time(self) -> None:
        room, ask = Room(job()), ask_for("ab" * 32, 1, np.zeros(2, np.float32), None)
        for stage, asked in [("advertise", None), ("mask", ask), ("reveal", None)]:
            step = Step("ab" * 32, 1, stage, b"", asked)  # type: ignore[arg-type]
            assert len(list(room.transport.exchange(dict.fromkeys(SITES, step)))) == 6
            assert room.clock.now == (0.0 if stage == "advertise" else 8.0)

    def test_the_budget_of_time_and_the_fixed_work_of_a_site_make_its_steps(self) -> None:
        room = Room(job(training={"budget_s": 1.5, "work": {"a": 3, "d": 3, "e": 3}}))
        for site in SITES:
            most = {"slow": 1, "fast": 6}[room.devices.kinds[site]]
            assert room.devices.pace(site).steps == (min(most, 3) if site in "ade" else most)
            assert room.devices.pace(site).seconds is None  # Nobody looks at a real clock.
        assert {room.devices.pace(site).steps for site in SITES} == {1, 3, 6}

    def test_a_site_that_trains_a_model_of_its_own_too_takes_twice_as_long_or_half_of_a_budget(self) -> None:
        room = Room(job(strategy={"name": "ditto"}))
        room.round()
        assert room.clock.now == 16.0
        room = Room(job(strategy={"name": "ditto"}, training={"budget_s": 4.0}))
        assert {room.devices.pace(site).steps for site in SITES} == {2, 8}
        room.round()
        assert room.clock.now == 4.0

    def test_a_site_trains_the_smaller_of_its_own_share_and_its_kinds(self) -> None:
        room = Room(job(slow={"trains": 0.5}, training={"weak": {"a": 0.25, "b": 0.75, "c": 0.75}}))
        own = {"a": 0.25, "b": 0.75, "c": 0.75}
        for site in SITES:
            kinds = {"slow": 0.5, "fast": 1.0}[room.devices.kinds[site]]
            assert room.devices.pace(site).share == min(own.get(site, 1.0), kinds)


class TestDeadline:
    def test_who_is_late_adds_nothing_and_the_round_lasts_until_the_deadline(self) -> None:
        room = Room(job(cohort={"deadline_s": 5}))
        collected = room.round()
        assert list(collected.contributors) == room.of_kind("fast")
        assert set(collected.failures) == set(room.of_kind("slow"))
        assert all("late" in why for why in collected.failures.values())
        assert room.clock.now == 5.0
        assert sorted(room.sites.asked) == room.of_kind("fast")

    def test_a_round_in_which_nobody_is_late_ends_before_the_deadline(self) -> None:
        room = Room(job(cohort={"deadline_s": 8}))
        assert len(room.round().contributors) == 6
        assert room.clock.now == 8.0

    def test_who_is_late_has_trained_where_its_ledger_or_memory_shows_it(self) -> None:
        room = Room(job(cohort={"deadline_s": 5}), observed=True)
        assert len(room.round().contributors) == 3
        assert sorted(room.sites.asked) == SITES


class TestOver:
    def test_the_first_answers_count_and_the_round_ends_with_them(self) -> None:
        room = Room(job(cohort={"size": 3, "over": 1.0}))
        assert room.job.cohort.asked == 6
        collected = room.round()
        assert list(collected.contributors) == room.of_kind("fast")
        assert {why.split(":")[0] for why in collected.failures.values()} == {"not needed"}
        assert room.clock.now == 2.0
        assert collected.total.weight == 3.0

    def test_who_does_not_answer_is_made_up_for(self) -> None:
        room = Room(job(fast={"availability": 1e-12}, cohort={"size": 2, "over": 2.0}))
        assert list(room.round().contributors) == room.of_kind("slow")[:2]
        assert room.clock.now == 8.0

    @pytest.mark.parametrize(
        "wrong", [np.ones(2, np.float32), np.ones(3), float32(np.nan, 1, 1), float32(1, 1, 0), float32(1, 1, -1)]
    )
    def test_an_answer_that_the_collector_refuses_makes_up_for_nobody(self, wrong: Vector) -> None:
        room = Room(job(cohort={"size": 3, "over": 1.0}))
        first = room.of_kind("fast")[0]
        room.sites.wrong[first] = wrong
        collected = room.round()
        assert list(collected.contributors) == sorted([*room.of_kind("fast")[1:], room.of_kind("slow")[0]])
        assert collected.failures[first].startswith("malformed reply")
        assert room.clock.now == 8.0

    def test_who_is_not_needed_has_trained_where_its_ledger_shows_it(self) -> None:
        room = Room(job(cohort={"size": 3, "over": 1.0}), observed=True)
        assert len(room.round().contributors) == 3
        assert sorted(room.sites.asked) == SITES
        assert room.clock.now == 2.0

    @pytest.mark.parametrize(("size", "over", "asked"), [(10, 0.3, 13), (3, 0.1, 4), (4, 0.5, 6)])
    def test_so_many_more_are_asked_rounded_up(self, size: int, over: float, asked: int) -> None:
        assert job(cohort={"size": size, "over": over}).cohort.asked == asked

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"cohort": {"over": 0.3}}, "give cohort.size too"),
            ({"cohort": {"size": 4, "over": 0.3}, "secure_aggregation": {}}, "cohort.over with secure_aggregation"),
            ({"cohort": {"size": 4, "over": 0.3}, "regions": {"n": SITES}}, "cohort.over with regions"),
            (
                {
                    "cohort": {"rate": 0.5, "over": 0.3},
                    "strategy": {"weighting": "equal"},
                    "privacy": {"client": {"noise_multiplier": 1.0, "delta": 1e-3}},
                },
                "give cohort.size too",
            ),
            ({"cohort": {"size": 4, "over": 0.0}}, "cohort.over"),
        ],
    )
    def test_where_the_first_answers_cannot_be_told_it_is_refused(self, changes: dict[str, Any], why: str) -> None:
        with pytest.raises(JobError, match=why):
            job(**changes)

    def test_a_deployment_refuses_it(self) -> None:
        from strategies.catalogue import strategy_for

        with pytest.raises(JobError, match="a deployment has none"):
            strategy_for(job(cohort={"size": 4, "over": 0.3}).portable)


class TestAvailability:
    def test_a_device_is_there_as_often_as_its_kind_says(self) -> None:
        devices = Room(job(slow={"availability": 0.7})).devices
        there = Counter(site for site in SITES for number in range(1, 401) if devices.is_there(site, number))
        for site in SITES:
            # Six deviations of 400 coins.
            assert abs(there[site] / 400 - {"slow": 0.7, "fast": 1.0}[devices.kinds[site]]) < 6 * 0.023

    def test_who_is_away_is_silent_in_every_stage_of_its_round_and_back_in_another(self) -> None:
        room = Room(job(slow={"availability": 0.5}))
        away = [{site for site in SITES if not room.devices.is_there(site, number)} for number in range(1, 30)]
        for number, missing in enumerate(away, start=1):
            assert set(room.round(number).failures) == missing
        assert set.union(*away) == set(room.of_kind("slow"))
        assert not set.intersection(*away)

    def test_a_round_that_failed_is_drawn_anew_in_each_attempt_and_no_other_is(self) -> None:
        def away(failed: dict[int, int], number: int) -> set[str]:
            return set(Room(job(slow={"availability": 0.5}), failed=failed).round(number).failures)

        for number in range(1, 6):
            assert away({}, number) == away({}, number) == away({number + 1: 3}, number)
            assert away({number: 2}, number) == away({number: 2}, number)
        assert len({tuple(sorted(away({1: attempt}, 1))) for attempt in range(12)}) > 4

    def test_a_device_is_away_as_long_as_coins_of_its_chance_say(self) -> None:
        devices = Room(job(slow={"availability": 0.2})).devices
        slow = [site for site in SITES if devices.kinds[site] == "slow"]
        looks = [devices.away(site, number) for site in slow for number in range(1, 401)]
        # Geometric: a mean of (1 - p) / p, with a deviation of sqrt(1 - p) / p over sqrt(1200); six of them.
        assert abs(np.mean(looks) - 4) < 6 * 4.5 / 1200**0.5
        assert all((look == 0) == devices.is_there(slow[0], n) for n, look in enumerate(looks[:400], start=1))

    def test_the_same_seed_is_the_same_federation_and_another_is_another(self) -> None:
        def said(seed: int) -> list[bool]:
            devices = Room(job(slow={"availability": 0.5}, seed=seed)).devices
            return [devices.is_there(site, number) for site in SITES for number in range(1, 9)]

        assert said(1) == said(1) != said(2)


@settings(max_examples=50)
@given(shares=st.lists(st.integers(1, 9), min_size=1, max_size=5), count=st.integers(1, 200), seed=st.integers(0, 9))
def test_every_kind_gets_its_share_of_the_sites_give_or_take_one(shares: list[int], count: int, seed: int) -> None:
    kinds = {f"kind-{i}": Device(share=share / sum(shares)) for i, share in enumerate(shares)}
    sites = [f"site-{i}" for i in range(count)]
    given = shared_out(sites, kinds, seed=seed)
    assert list(given) == sites
    counted = Counter(given.values())
    for kind, device in kinds.items():
        assert abs(counted[kind] - device.share * count) <= 1


def test_who_is_of_a_kind_is_drawn_and_does_not_follow_the_names() -> None:
    kinds = {"slow": Device(share=0.5), "fast": Device(share=0.5)}
    sites = [f"site-{i:03}" for i in range(100)]
    first = [list(shared_out(sites, kinds, seed=seed).values())[:50].count("slow") for seed in range(5)]
    assert all(10 < slow < 40 for slow in first)
    assert len({tuple(shared_out(sites, kinds, seed=seed).values()) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ({"a": {"share": 0.5}}, "add up to 0.5"),
        ({"a": {"share": 0.5}, "b": {"share": 0.6}}, "add up to 1.1"),
        ({"a": {"share": 1.0, "speed": 0.0}}, "speed"),
        ({"a": {"share": 1.0, "speed": 1e-320}}, "speed"),
        ({"a": {"share": 1.0, "speed": 1e300}}, "speed"),
        ({"a": {"share": 1.0, "availability": 0.0}}, "availability"),
        ({"a": {"share": 1.0, "trains": 0.0}}, "trains"),
        ({"a": {"share": 1.0, "sped": 2.0}}, "did you mean simulation.devices.a.speed"),
        ({}, "devices"),
    ],
)
def test_devices_that_cannot_be_are_refused(devices: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        make_job(simulation={"devices": devices})


def test_flowers_engine_has_no_virtual_clock() -> None:
    with pytest.raises(JobError, match="virtual clock"):
        make_job(simulation={"engine": "flower", "devices": {"a": {"share": 1.0}}})

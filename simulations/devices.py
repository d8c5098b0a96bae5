"""Devices of a simulation: how fast each site works, and whether it is there, on a clock that nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from client.pace import Pace, trainings_of
from server.collect import Failure, Transport
from strategies.job import Device, Job
from strategies.messages import Answer, Ask, MalformedMessage, Reply, Request, Step, check_reply
from strategies.total import Layout

_FOR_EVER = 1e15


@dataclass
class VirtualClock:
    """The seconds that the federation would have taken. Sums of one round that run side by side count once."""

    now: float = 0.0
    _round: int = 0
    _began: float = 0.0

    def reach(self, round_number: int, seconds: float) -> None:
        """Go on to so many seconds after the round began, if it is not that late yet."""
        if round_number != self._round:
            self._round, self._began = round_number, self.now
        self.now = max(self.now, self._began + seconds)


@dataclass(frozen=True)
class Devices:
    """What each site is and does, by the job's [simulation.devices]; the same for the same seed."""

    job: Job
    kinds: Mapping[str, str]
    rows: Mapping[str, int]
    layout: Layout

    @classmethod
    def of(cls, job: Job, rows: Mapping[str, int], layout: Layout) -> Devices | None:
        """Share the sites out among the kinds of devices, as evenly as whole sites allow; None without any.

        `rows` are each site's training rows, `layout` is that of what they add.
        """
        kinds = job.simulation.devices
        return None if kinds is None else cls(job, shared_out(list(rows), kinds, seed=job.seed), rows, layout)

    def device(self, site: str) -> Device:
        assert self.job.simulation.devices is not None
        return self.job.simulation.devices[self.kinds[site]]

    def pace(self, site: str) -> Pace:
        """What the site does in a round: its time, by the virtual clock, is so many steps."""
        device, pace = self.device(site), Pace.of(self.job, site, trainings=self._trainings)
        steps = pace.steps_of(self.job.training.steps_for(self.rows[site]))
        if pace.seconds is not None:
            steps = min(steps, max(1, math.floor(pace.seconds * device.speed / pace.trainings + 1e-9)))
        return replace(pace, steps=steps, seconds=None, share=min(pace.share, device.trains))

    def seconds(self, site: str) -> float:
        """How long the site trains in a round, for itself alone too."""
        pace = self.pace(site)
        assert pace.steps is not None
        return pace.trainings * pace.steps / self.device(site).speed

    def is_there(self, site: str, round_number: int, attempt: int = 0) -> bool:
        """Whether the site is there in a round that failed `attempt` times before."""
        return self.away(site, round_number, attempt) == 0

    def away(self, site: str, round_number: int, attempt: int = 0) -> int:
        """How often one would look for the site in vain before it is there."""
        if (availability := self.device(site).availability) == 1:
            return 0
        again = [attempt] if attempt else []
        chance = np.random.default_rng([self.job.seed, self._numbers[site], round_number, 6, *again]).random()
        return math.floor(min(math.log1p(-chance) / math.log1p(-availability), _FOR_EVER))

    @cached_property
    def _trainings(self) -> int:
        return trainings_of(self.job)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {site: number for number, site in enumerate(self.rows)}


def shared_out(sites: Sequence[str], kinds: Mapping[str, Device], *, seed: int) -> dict[str, str]:
    """The kind of each of `sites`: each kind gets its share of them, give or take one, drawn by `seed`."""
    ends = np.rint(np.cumsum([device.share for device in kinds.values()]) * len(sites)).astype(int)
    order = np.random.default_rng([seed, 7]).permutation(len(sites))
    places = np.searchsorted(ends, order, side="right")
    return {site: list(kinds)[place] for site, place in zip(sites, places, strict=True)}


@dataclass(frozen=True)
class DeviceTransport:
    """A `Transport` over another one: who is not there, is late for `cohort.deadline_s`, or answers when enough others
    have (`cohort.over`), gives no answer. Answers come in the order of the virtual clock, which this moves.

    Whoever was asked has trained, even if nobody waits for it: with `observed` its client does, since its ledger or its
    memory shows it. `failed` says how often a round failed in runs before this one, which went on from there: who is
    there is drawn anew for each attempt.
    """

    inner: Transport
    devices: Devices
    clock: VirtualClock
    observed: bool
    failed: Mapping[int, int] = field(default_factory=dict)

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        there = {
            site: request
            for site, request in requests.items()
            if self.devices.is_there(site, request.round_number, self.failed.get(request.round_number, 0))
        }
        for site in sorted(requests.keys() - there.keys()):
            yield site, Failure(site, "not there", silent=True)
        training = {site: self.devices.seconds(site) for site, request in there.items() if _trains(request)}
        yield from self.inner.exchange({site: there[site] for site in there if site not in training})
        cohort, answered = self.devices.job.cohort, 0
        enough = cohort.size if cohort.over is not None else None
        for site in sorted(training, key=lambda site: (training[site], site)):
            request, seconds, why = there[site], training[site], None
            if enough is not None and answered >= enough:
                why = "not needed: enough others answered before"
            elif seconds > (cohort.deadline_s or math.inf):
                why, seconds = f"late: it trains for {seconds:.4g} s", cohort.deadline_s or 0.0
            if why is None:
                for _, answer in self.inner.exchange({site: request}):
                    answered += self._counts(answer, request, site)
                    self.clock.reach(request.round_number, seconds)
                    yield site, answer
                continue
            if enough is None or answered < enough:
                self.clock.reach(request.round_number, seconds)
            if self.observed:
                for _ in self.inner.exchange({site: request}):
                    pass
            yield site, Failure(site, why, silent=True)

    def _counts(self, answer: Answer | Failure, request: Request, site: str) -> bool:
        """Whether the collector will add this answer: one that it refuses makes up for nobody."""
        if not isinstance(answer, Reply) or not isinstance(request, Ask):
            return False
        try:
            check_reply(answer, ask=request, site=site, layout=self.devices.layout)
        except MalformedMessage:
            return False
        return True


def _trains(request: Request) -> bool:
    return isinstance(request, Ask) or (isinstance(request, Step) and request.ask is not None)

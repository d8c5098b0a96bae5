"""Collecting a round by secure aggregation: five short stages around the training, and only sums at the end.

It stands where `server.collect.PlainCollector` stands; strategies, releases and record-level privacy do not know it is
there. A site that is silent, refuses or answers wrongly at any stage is left behind there, as long as enough are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from numpy import float64
from numpy.typing import NDArray

from privacy.errors import Refused, RoundAborted
from privacy.ledger import Head
from privacy.secagg.roster import Roster
from privacy.secagg.server import SecureServer
from privacy.secagg.session import Terms
from server.collect import Collected, Failure, Transport
from strategies.job_privacy import Robust
from strategies.messages import Ask, MalformedMessage, Refusal, Stage, Step, Stepped, check_stepped
from strategies.robust import fewest, liars, reduced
from strategies.secure import SecureSum, is_sound, rotation_of
from strategies.total import Total


@dataclass(frozen=True)
class SecureCollector:
    """Sums each of `groups` (names of sites; None: all who are asked are one) securely, and combines as `robust` says.

    Raises `RoundAborted` when too few are left for a sum to be shown: it names the stage, the count and the threshold.
    """

    transport: Transport
    plan: SecureSum
    terms: Terms
    roster: Roster
    robust: Robust
    groups: Sequence[Sequence[str]] | None = None

    def collect(self, ask: Ask, sites: Sequence[str], total: Total) -> Collected:
        return _Round(self, ask, sites).run(total)


@dataclass
class _Group:
    """One session, and the site behind each slot. `lost` is why there will be no sum."""

    server: SecureServer
    names: Mapping[int, str]
    contributors: tuple[str, ...] = ()
    lost: RoundAborted | None = None


@dataclass
class _Round:
    collector: SecureCollector
    ask: Ask
    sites: Sequence[str]
    failures: dict[str, str] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    sent: int = 0
    received: int = 0
    training: float = 0.0

    def run(self, total: Total) -> Collected:
        began, layout = time.perf_counter(), total.layout
        rotation = rotation_of(self.ask.round_number, self.ask.model_hash)
        groups = [self._session(names) for names in self.collector.groups or [self.sites]]
        try:
            sums = self._sums(groups, rotation)
        finally:
            self._forget()
        robust = self.collector.robust
        borne = liars(robust, len(groups))
        if len(sums) < fewest(robust.reduce, borne):
            raise RoundAborted(
                f"round {self.ask.round_number}: secure sum: {len(sums)} of {len(groups)} groups have a sum, and "
                f'robust.reduce = "{robust.reduce}" bears {borne} that lie of {fewest(robust.reduce, borne)} or more; '
                "mend those that failed and resume"
            )
        total.add_sum(reduced(robust, layout, sums, byzantine=borne))
        names = sorted(name for group in groups if group.lost is None for name in group.contributors)
        for site in self.sites:
            if site not in names:
                self.failures.setdefault(site, "its group was too small in the end")
        cost = {
            "upload_bytes": self.received / len(self.sites),
            "download_bytes": self.sent / len(self.sites),
            "seconds": time.perf_counter() - began - self.training,
        }
        failures = {site: why for site, why in sorted(self.failures.items()) if site not in names}
        return Collected(total, tuple(names), failures, self.heads, cost)

    def _session(self, names: Sequence[str]) -> _Group:
        collector, ask = self.collector, self.ask
        slots = {collector.roster.member(name).slot: name for name in names}
        server = SecureServer(
            collector.terms,
            collector.roster,
            members=sorted(slots),
            round_number=ask.round_number,
            model=ask.model_hash,
        )
        return _Group(server, slots)

    def _sums(self, groups: Sequence[_Group], rotation: bytes) -> list[NDArray[float64]]:
        self._stage(groups, "advertise", lambda server: dict.fromkeys(server.session.members, server.proposal))
        self._stage(groups, "share", SecureServer.cohort)
        self._stage(groups, "mask", SecureServer.boxes)
        self._stage(groups, "agree", SecureServer.survivors)
        self._stage(groups, "reveal", SecureServer.evidence)
        sums = []
        for group in self._alive(groups):
            with self._may_abort(group, groups):
                words, summed = group.server.finish(), group.server.summed
                contributions = self.collector.plan.decode(words, rotation=rotation)
                equal = len(summed) if self.collector.plan.equal else None
                if not is_sound(self.collector.plan.layout, contributions, equal_weights=equal):
                    raise RoundAborted(
                        f"round {self.ask.round_number}: secure sum: its weights are not those of honest sites, so one "
                        "of its sites, or more, sent something else than an update"
                    )
                group.contributors = tuple(group.names[slot] for slot in summed)
                sums.append(contributions)
        return sums

    def _stage(
        self, groups: Sequence[_Group], stage: Stage, messages_of: Callable[[SecureServer], Mapping[int, bytes]]
    ) -> None:
        """Send every living group its messages of one stage, and hand the answers to its session."""
        steps: dict[str, Step] = {}
        homes: dict[str, tuple[_Group, int]] = {}
        for group in self._alive(groups):
            with self._may_abort(group, groups):
                for slot, body in messages_of(group.server).items():
                    site = group.names[slot]
                    asked = self.ask if stage == "mask" else None
                    steps[site] = Step(self.ask.job, self.ask.round_number, stage, body, asked)
                    homes[site] = group, slot
        self.open |= set(steps)
        self.sent += sum(len(step.body) for step in steps.values())
        waiting = set(steps)
        answers = self.collector.transport.exchange(steps)
        while True:
            began = time.perf_counter()
            come = next(answers, None)
            if stage == "mask":  # What the sites do there is mostly training.
                self.training += time.perf_counter() - began
            if come is None:
                break
            site, answer = come
            if site not in waiting:
                continue  # A second answer, or one from a site that was not asked, never counts.
            waiting.discard(site)
            match answer:
                case Failure():
                    self.failures[site] = f"{stage}: {answer.why}"
                    if answer.silent:
                        self.open.discard(site)  # It would keep the round waiting once more.
                case Refusal():
                    self.failures[site] = f"{stage}: refused"
                case Stepped():
                    self._take(answer, steps[site], site, *homes[site])
                case _:
                    self.failures[site] = f"{stage}: malformed reply: it does not belong to a secure sum"
        self.failures |= dict.fromkeys(sorted(waiting), f"{stage}: no answer")

    def _take(self, answer: Stepped, step: Step, site: str, group: _Group, slot: int) -> None:
        server = group.server
        self.received += len(answer.body) + answer.words.nbytes
        try:
            check_stepped(answer, step=step, site=site)
            match step.stage:
                case "advertise":
                    server.add_advert(slot, answer.body)
                case "share":
                    server.add_shares(slot, answer.body)
                case "mask":
                    server.add_masked(slot, answer.body, answer.words)
                    if answer.head is not None:
                        self.heads[site] = answer.head
                case "agree":
                    server.add_agreement(slot, answer.body)
                case _:
                    server.add_reveal(slot, answer.body)
                    self.open.discard(site)  # It has wiped its secrets before it answered.
        except (MalformedMessage, Refused) as error:
            self.failures[site] = f"{step.stage}: {error}"

    def _alive(self, groups: Sequence[_Group]) -> list[_Group]:
        return [group for group in groups if group.lost is None]

    @contextmanager
    def _may_abort(self, group: _Group, groups: Sequence[_Group]) -> Iterator[None]:
        """A group that cannot be summed is left out while more than half remain; else the round ends."""
        try:
            yield
        except RoundAborted as error:
            group.lost = error
            if 2 * len(self._alive(groups)) > len(groups):
                return
            why = ", ".join(f"{site}: {why}" for site, why in list(self.failures.items())[:5])
            which = (
                f" ({len(groups) - len(self._alive(groups))} of {len(groups)} groups are lost)"
                if len(groups) > 1
                else ""
            )
            # Without privacy nothing pays for another release: such a job ends here unless it allowed for retries.
            over = any("left already" in said for said in self.failures.values())
            advice = "start the job anew under another name or seed" if over else "mend them and resume"
            raise RoundAborted(f"{error}{which}; {why or 'no failures'}; {advice}") from None

    def _forget(self) -> None:
        """Tell the sites that may still hold secrets of the round that it is over; whoever is gone wipes them later."""
        step = Step(self.ask.job, self.ask.round_number, "forget", b"")
        for _ in self.collector.transport.exchange(dict.fromkeys(sorted(self.open), step)):
            pass

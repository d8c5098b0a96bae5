"""Collecting a round: ask a cohort through a transport, check every answer, keep only the sum.

A collector turns a request into a `Total`. The plain one adds contributions, each as it comes in, so memory is
O(model) whatever the cohort; the robust one, and the secure one (`server.secure`), stand beside it with the same
method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from privacy.errors import RunError
from privacy.ledger import Head
from strategies.job import Job
from strategies.job_privacy import Robust
from strategies.messages import Answer, Ask, MalformedMessage, Refusal, Reply, Request, Stepped, check_reply
from strategies.robust import fewest, gather, liars
from strategies.total import Total


@dataclass(frozen=True)
class Failure:
    """A site that gave no usable answer, and the kind of failure in a few words; `silent` if it gave none in time."""

    site: str
    why: str
    silent: bool = False


class Transport(Protocol):
    """Carries requests to many sites."""

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        """Yield one answer for each site of `requests`, in any order, with the site that the channel says it came from.

        A reply's array may be reused once the next answer is asked for.
        """
        ...


@dataclass(frozen=True)
class Collected:
    """What a cohort added up to, who is in it, who failed and why, and the ledger heads that came along.

    `cost` is what secure aggregation took, where there was one.
    """

    total: Total
    contributors: tuple[str, ...]
    failures: Mapping[str, str]
    heads: Mapping[str, Head]
    cost: Mapping[str, float] | None = None


class Collector(Protocol):
    def collect(self, ask: Ask, sites: Sequence[str], total: Total) -> Collected:
        """Ask `sites` and add what they answer to `total`, which is fresh."""
        ...


@dataclass(frozen=True)
class PlainCollector:
    """Adds contributions as they come in. The process sees each for a moment, and keeps none."""

    transport: Transport

    def collect(self, ask: Ask, sites: Sequence[str], total: Total) -> Collected:
        contributors: list[str] = []
        failures: dict[str, str] = {}
        heads: dict[str, Head] = {}
        waiting = set(sites)
        for site, answer in self.transport.exchange(dict.fromkeys(sites, ask)):
            if site not in waiting:
                continue  # A second answer, or one from a site that was not asked, never counts.
            waiting.discard(site)
            match answer:
                case Failure():
                    failures[site] = answer.why
                case Refusal():
                    failures[site] = "refused"
                case Stepped():
                    failures[site] = "malformed reply: it belongs to a secure sum"
                case Reply():
                    try:
                        check_reply(answer, ask=ask, site=site, layout=total.layout)
                    except MalformedMessage as error:
                        failures[site] = f"malformed reply: {error}"
                        continue
                    total.add(answer.contribution)
                    contributors.append(site)
                    if answer.head is not None:
                        heads[site] = answer.head
        failures |= dict.fromkeys(sorted(waiting), "no answer")
        return Collected(total, tuple(sorted(contributors)), dict(sorted(failures.items())), heads)


@dataclass(frozen=True)
class RobustCollector:
    """Bears sites that lie: reduces contributions as `robust` says, in place of adding them up.

    A reduction other than the sum keeps all contributions of a round, 4 bytes for each number of each site that is
    asked (`strategies.robust.check_robust` refuses too many before a run); a `max_norm` alone keeps none.
    Raises `RunError` when fewer sites answer than bear those that may lie.
    """

    transport: Transport
    robust: Robust

    def collect(self, ask: Ask, sites: Sequence[str], total: Total) -> Collected:
        gathered = gather(self.robust, total.layout, len(sites))
        collected = PlainCollector(self.transport).collect(ask, sites, gathered)
        may_lie, answers = liars(self.robust, len(sites)), len(collected.contributors)
        if answers < (needed := fewest(self.robust.reduce, may_lie)):
            why = ", ".join(f"{site}: {why}" for site, why in list(collected.failures.items())[:5]) or "no failures"
            raise RunError(
                f"round {ask.round_number}: {answers} of {len(sites)} sites answered, and robust.reduce = "
                f'"{self.robust.reduce}" needs {needed} where {may_lie} may lie ({why}); mend them and resume, or '
                "start anew with a smaller robust.byzantine"
            )
        total.add_sum(gathered.reduced(may_lie))
        return replace(collected, total=total)


def collector_for(job: Job, transport: Transport) -> Collector:
    """How a job without secure aggregation collects."""
    return PlainCollector(transport) if job.robust.plain else RobustCollector(transport, job.robust)

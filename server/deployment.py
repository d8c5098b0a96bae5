"""One job at real sites, from the offer to the delivery: it waits for who is away, and goes on after every crash.

Nothing here knows Flower: the rounds are `server.rounds`, the same that a simulation runs, over a transport.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from privacy.budget import SiteBudget
from privacy.errors import FedchorusError, JobError, RunError
from privacy.events import UNIT_CLIENT
from privacy.keys import IdentityKey
from privacy.ledger import SERVER, Head, Ledger
from privacy.noise import OsNoise
from privacy.secagg.roster import Roster
from server.checkpoint import load_checkpoint, save_checkpoint
from server.cohort import draw_cohort
from server.collect import Collector, Failure, Transport, collector_for
from server.jobs import JobFolder
from server.release import CentralRelease, PlainRelease, Release, ReleasePlan
from server.rounds import Diverged, RoundResult, heads_line, newest_heads, run_rounds
from server.secure import SecureCollector
from strategies.catalogue import fitted, strategy_for
from strategies.composition import check_sites
from strategies.job import Job
from strategies.messages import Agreed, Deliver, MalformedMessage, Offer, Refusal, check_agreed
from strategies.parameters import Parameters, vector_hash
from strategies.protocol import ServerState, Strategy
from strategies.robust import check_robust
from strategies.secure import SecureSum, groups_of
from strategies.total import Layout, layout_for, training_loss

PATIENCE_S = 20.0  # So long a round waits for sites that are away, if enough are there without them.
REOFFER_S = 15.0  # A site that gave no answer to an offer is asked again so often.
ATTEMPTS = 12  # Rounds that fail one after the other before a person is asked.


class Fleet(Transport, Protocol):
    """A transport that knows who is there."""

    def online(self, wait_s: float = 0.0) -> set[str]:
        """The sites that are there now; with `wait_s`, after the next change or that long."""
        ...


class Stopped(Exception):
    """A person asked the job to stop."""


@dataclass
class Deployment:
    """The server's half of one job at the sites of `roster`.

    `ledger` is where the coordinator keeps what it releases with noise of its own. `run` raises `RunError` or
    `JobError` when a person is needed; the job can be resumed then, and goes on after its last round.
    """

    folder: JobFolder
    roster: Roster
    fleet: Fleet
    key: IdentityKey
    ledger: Path
    patience_s: float = PATIENCE_S
    pause_s: float = 2.0
    _agreed: set[str] = field(default_factory=set)
    _refused: set[str] = field(default_factory=set)
    _asked: dict[str, float] = field(default_factory=dict)
    _said: str = ""
    _began: float = 0.0
    _epsilon: Callable[[], float | None] = lambda: None

    def run(self) -> None:
        with self.folder.locked():
            try:
                self._run()
            except Stopped:
                self.folder.move("stopped", "a person stopped it; `fedchorus resume` goes on")

    def _run(self) -> None:
        job, (parameters, start) = self.folder.job, Parameters.load(self.folder.initial)
        names = sorted(member.name for member in self.roster.members)
        strategy = fitted(strategy_for(job), parameters)
        layout = layout_for(job, parameters, strategy.traits)
        secure = None
        if job.secure_aggregation is not None:
            secure = SecureSum.make(job, sites=len(names), layout=layout, layers=parameters.trained_sizes)
        check_sites(job, names)
        check_robust(job, sites=len(names), layout=layout)
        needed = max(1, job.least_answers, secure.shape.minimum if secure is not None else 0)
        if needed > len(names):
            raise JobError(f"the job needs {needed} sites, the federation has {len(names)}")
        offer = Offer(
            job.hash,
            job.toml.decode(),
            vector_hash(start),
            parameters.size,
            parameters.digest,
            version("fedchorus"),
            self.folder.approvals,
        )
        self._bind_roster()
        state = strategy.start(start, sites=len(names))
        if self.folder.checkpoint.exists():
            state = load_checkpoint(self.folder.checkpoint, job=job.hash)
        self.folder.keep_rounds(state.round_number)
        if state.round_number < job.training.rounds:
            release = self._release(job, parameters, layout, len(names), state)
            state = self._train(job, strategy, state, names, offer, needed, secure, release)
        self._conclude(job, strategy, state, parameters, names)

    def _bind_roster(self) -> None:
        """A job is its members' from first to last: who is drawn, and what that costs, follows from them."""
        path = self.folder.path / "participants.json"
        if not path.exists():
            self.roster.save(path)
        elif Roster.load(path).hash != self.roster.hash:
            raise JobError("the federation's members or keys changed since the job began; submit it as a new job")

    def _train(
        self,
        job: Job,
        strategy: Strategy,
        state: ServerState,
        names: list[str],
        offer: Offer,
        needed: int,
        secure: SecureSum | None,
        release: Release,
    ) -> ServerState:
        kept = [state]

        secret = job.cohort.rate is not None

        def cohort(number: int) -> list[str]:
            # Of a secret cohort nobody may see who is drawn: all are offered the job, and all are waited for.
            asked = draw_cohort(names, job.cohort, seed=job.seed, round_number=number, secret=lambda _: OsNoise())
            self._gather(names if secret else asked, min(needed, len(asked)), offer)
            self._began = time.monotonic()
            # A secure sum's members are fixed; elsewhere who has not agreed would only be waited for.
            return asked if secure is not None else [site for site in asked if site in self._agreed]

        def checkpoint(after: ServerState) -> None:
            save_checkpoint(after, self.folder.checkpoint, job=job.hash)
            kept[0] = after

        failed = 0
        while kept[0].round_number < job.training.rounds:
            before = kept[0].round_number
            heads, server_head = self._heads()
            try:
                run_rounds(
                    kept[0],
                    job=job,
                    strategy=strategy,
                    collector=self._collector(job, names, secure),
                    release=release,
                    cohort=cohort,
                    evaluate=lambda _: {},
                    record=lambda result: self._record(job, result),
                    checkpoint=checkpoint,
                    heads=heads,
                    server_head=server_head,
                )
            except Diverged:
                raise
            except RunError as error:
                failed = failed + 1 if kept[0].round_number == before else 1
                self.folder.note("round failed", round=kept[0].round_number + 1, why=str(error), attempt=failed)
                self.folder.keep_rounds(kept[0].round_number)
                if failed >= ATTEMPTS:
                    raise RunError(f"{failed} attempts at one round failed; the last: {error}") from None
                self._pause(self.pause_s * min(failed, 5))
        return kept[0]

    def _collector(self, job: Job, names: list[str], secure: SecureSum | None) -> Collector:
        own = job.secure_aggregation
        if secure is None or own is None:
            return collector_for(job, self.fleet)
        groups = groups_of(job, names) if job.secure_groups > 1 else None
        return SecureCollector(self.fleet, secure, secure.terms(job, self.roster), self.roster, job.robust, groups)

    def _release(self, job: Job, parameters: Parameters, layout: Layout, clients: int, state: ServerState) -> Release:
        if job.privacy.central is None:
            return PlainRelease(layout)
        plan = ReleasePlan.make(
            job, clients=clients, parameters=layout.parameters, rng=OsNoise.kind, layers=parameters.trained_sizes
        )
        ledger, (_, seen) = Ledger(self.ledger, SERVER, self.key), self._heads()
        ledger.refresh()
        if seen is not None and (len(ledger.entries) <= seen.seq or ledger.entries[seen.seq].hash != seen.hash):
            raise RunError(f"{self.ledger}: lacks what the job's rounds were charged to; restore the newest copy")
        names = sorted(member.name for member in self.roster.members)
        done = range(1, state.round_number + 1)
        release = CentralRelease(
            plan,
            job=job,
            layout=layout,
            budget=SiteBudget(ledger),
            noise=lambda _: OsNoise(),
            asked_before=(
                draw_cohort(names, job.cohort, seed=job.seed, round_number=n, secret=lambda _: OsNoise()) for n in done
            ),
        )
        release.open(simulation=False)
        self._epsilon = lambda: release.accounts().epsilon(UNIT_CLIENT, plan.limit.delta, spent_only=True)
        return release

    # -- who is there, and agrees --------------------------------------------------------------------------------------

    def _gather(self, asked: list[str], needed: int, offer: Offer) -> None:
        """Return when at least `needed` of `asked` are there and have agreed, and the rest had their time."""
        deadline, online = time.monotonic() + self.patience_s, self.fleet.online()
        while True:
            if self.folder.wants_stop:
                raise Stopped
            recently = {site for site, when in self._asked.items() if time.monotonic() - when < REOFFER_S}
            self._offer(sorted((online & set(asked)) - self._agreed - self._refused - recently), offer)
            self._asked = {site: when for site, when in self._asked.items() if site in online}
            ready = online & self._agreed & set(asked)
            if len(asked) - len(self._refused & set(asked)) < needed:
                raise JobError(
                    f"{len(self._refused)} sites refuse the job ({', '.join(sorted(self._refused))}) and {needed} of "
                    f"{len(asked)} are needed; each site's log says why"
                )
            away = set(asked) - ready - self._refused
            if not away or (len(ready) >= needed and time.monotonic() > deadline):
                self._say("running")
                return
            if len(ready) < needed:
                silent = "; some are there and do not answer: see their logs" if online & away else ""
                there = f"{len(ready)} of {needed} needed sites are there"
                self._say("waiting", f"for {', '.join(sorted(away))}: {there}{silent}")
            online = self.fleet.online(wait_s=1.0)

    def _offer(self, sites: list[str], offer: Offer) -> None:
        for site, answer in self.fleet.exchange(dict.fromkeys(sites, offer)) if sites else ():
            match answer:
                case Failure():
                    self._asked[site] = time.monotonic()
                    self.folder.note("no answer to the offer", site=site, why=answer.why)
                case Refusal():
                    self._refused.add(site)
                    self.folder.note("refused the offer", site=site)
                case _:
                    try:
                        check_agreed(answer, request=offer, site=site)
                    except MalformedMessage as error:
                        self._asked[site] = time.monotonic()
                        self.folder.note("no answer to the offer", site=site, why=str(error))
                        continue
                    self._agreed.add(site)
                    self.folder.note("agreed", site=site)

    def _say(self, state: Any, why: str = "") -> None:
        if f"{state} {why}" != self._said:
            self._said = f"{state} {why}"
            self.folder.move(state, why)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.folder.wants_stop:
                raise Stopped
            time.sleep(0.1)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _record(self, job: Job, result: RoundResult) -> None:
        collected = result.collected
        secret = job.cohort.rate is not None
        line: dict[str, Any] = {
            "round": result.round_number,
            "training_loss": training_loss(collected.total.metrics),
            "contributors": None if secret else list(collected.contributors),
            "failures": {} if secret else dict(collected.failures),
            "epsilon_client": self._epsilon(),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        if collected.cost is not None:
            line["secure"] = {key: round(value, 4) for key, value in collected.cost.items()}
        if result.heads or result.server_head:
            self.folder.append("heads.jsonl", heads_line(result.round_number, result.heads, result.server_head))
        self.folder.append("metrics.jsonl", line)
        self.folder.note("round", **{key: line[key] for key in ("round", "contributors", "failures", "seconds")})

    def _heads(self) -> tuple[dict[str, Head], Head | None]:
        return newest_heads(self.folder.lines("heads.jsonl"), where=str(self.folder.path))

    def _conclude(
        self, job: Job, strategy: Strategy, state: ServerState, parameters: Parameters, names: list[str]
    ) -> None:
        if job.privacy.central is not None:  # Again after a crash: what was planned and not reserved is free.
            SiteBudget(Ledger(self.ledger, SERVER, self.key)).settle(job.hash)
        if state.release:  # With it and the model anyone could take the last round's noise away.
            save_checkpoint(replace(state, release={}), self.folder.checkpoint, job=job.hash)
        parameters.save(state.model, self.folder.model, {"job": job.hash, "round": str(state.round_number)})
        self._say("delivering")
        handed = strategy.broadcast(state)  # More than the model where each site makes one of its own of it.
        without = self._deliver(Deliver(job.hash, state.round_number, handed, vector_hash(handed)), names)
        self.folder.write("summary.json", self._summary(job, state, names, without))
        self._say("finished", f"not delivered to {', '.join(sorted(without))}" if without else "")

    def _deliver(self, message: Deliver, names: list[str]) -> set[str]:
        """Hand the model to every site, and wait a while for those that are away; who did not get it."""
        without, deadline = set(names) - self._refused, time.monotonic() + 3 * self.patience_s
        while without:
            online = self.fleet.online(wait_s=1.0)
            for site, answer in self.fleet.exchange(dict.fromkeys(sorted(without & online), message)):
                if isinstance(answer, Agreed | Refusal):
                    without.discard(site)
            if self.folder.wants_stop:
                raise Stopped
            if time.monotonic() > deadline:
                break
            self._pause(min(self.pause_s, 2.0))
        return without

    def _summary(self, job: Job, state: ServerState, names: list[str], without: set[str]) -> Mapping[str, Any]:
        rounds = self.folder.lines("metrics.jsonl")
        return {
            "v": 1,
            "name": job.name,
            "job_hash": job.hash,
            "rounds": state.round_number,
            "sites": names,
            "contributions": {name: sum(name in (line["contributors"] or ()) for line in rounds) for name in names}
            if job.cohort.rate is None
            else None,
            "epsilon_client": rounds[-1]["epsilon_client"] if rounds else None,
            "secure_aggregation": job.secure_aggregation is not None,
            "not_delivered": sorted(without),
            "seconds": round(sum(line["seconds"] for line in rounds), 3),
            "model_hash": vector_hash(state.model),
            "versions": {name: version(name) for name in ("fedchorus", "flwr", "numpy", "dp-accounting")},
        }


def reason(error: BaseException) -> str:
    """What a person may read of an error: the message of one of ours, the kind of any other."""
    return str(error) if isinstance(error, FedchorusError) else f"unexpected {type(error).__name__}"

"""One simulated run from job to report: prepare, run the rounds, compare, write down."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from client.encodings import PADDING
from client.secure import Stopwatch
from client.site import Files, Seat, SitePlan
from privacy.accountant import epsilon
from privacy.budget import Accounts, JobAccount, LedgerAccounts, SiteBudget
from privacy.errors import LedgerError, RunError
from privacy.events import ADD_OR_REMOVE_ONE, UNIT_CLIENT, UNIT_RECORD, ZERO_OUT, Event, GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import SERVER, Head, Ledger, LedgerView
from privacy.secagg.client import InMemory
from privacy.secagg.roster import Member, Roster
from server.checkpoint import load_checkpoint, save_checkpoint
from server.collect import Collector, Transport, collector_for
from server.release import CentralRelease, PlainRelease, Release, ReleasePlan
from server.rounds import RoundResult, heads_line, newest_heads, run_rounds
from server.secure import SecureCollector
from simulations.asynchronous import BufferedCollector
from simulations.baselines import baselines
from simulations.devices import DeviceTransport, VirtualClock
from simulations.evaluation import Evaluation
from simulations.faults import Handler
from simulations.federation import Federation, plan_record, release_record
from simulations.inline import InlineTransport
from simulations.model_card import model_card
from simulations.regions import RegionCollector
from simulations.report import render_report
from simulations.run_folder import RunFolder, fresh_path
from simulations.secure_sums import protection
from strategies.fedbuff import FedBuff
from strategies.job import Job
from strategies.measured import measures
from strategies.parameters import Parameters, Vector
from strategies.protocol import ServerState
from strategies.secure import groups_of
from strategies.total import Layout, training_loss

MANY_PLANS = 8  # With more kinds of plan than this, a round's epsilon is computed for the costliest sites alone.


@dataclass(frozen=True)
class Watcher:
    """Whom a run tells what it does; every part may do nothing."""

    begin: Callable[[Path, Job], None] = lambda path, job: None
    status: Callable[[str], None] = lambda text: None
    round: Callable[[Mapping[str, Any]], None] = lambda line: None
    stop: Callable[[], bool] = lambda: False


def start_run(
    job: Job, *, out: Path | None, parent: Path, watcher: Watcher, now: datetime, after: Path | None = None
) -> dict[str, Any] | None:
    """Run `job` in a new run folder; return its summary, or None when `watcher.stop` ended it early.

    `after` is an earlier run by the same data holders: their keys, ledgers and budgets go on from there. Whatever
    cannot work (data, schema, budget) raises before a folder exists.
    """
    watcher.status("reading data")
    federation = Federation.load(job)
    private = job.privacy.record or job.privacy.client
    watcher.status("calibrating noise" if private else "preparing")
    plans, release = federation.plans(), federation.release_plan()
    folder = RunFolder.create(out or fresh_path(job, parent, now), job)
    try:
        _prepare(folder, job, federation, plans, release, after)
    except BaseException:  # Ctrl-C too: half a folder could neither be resumed nor used again.
        shutil.rmtree(folder.path)
        raise
    return _Run(folder, job, federation, plans, release, watcher).finish()


def _prepare(
    folder: RunFolder,
    job: Job,
    federation: Federation,
    plans: Mapping[str, SitePlan],
    release: ReleasePlan | None,
    after: Path | None,
) -> None:
    if after is not None:
        earlier = RunFolder.open(after)
        with earlier.locked():
            _go_on(folder, earlier, job, plans, release)
            earlier.hand_over(folder.path)
    planned: dict[str, Any] = {"v": 1, "job": job.hash, "sites": {n: plan_record(plan) for n, plan in plans.items()}}
    roster: dict[str, Any] = {"v": 1, "sites": {}}
    if release is not None:
        planned["client"] = release_record(release)
        roster["server"] = _key(folder.server_files).public_hex
    if job.privacy.at_sites:
        for name in federation.names:
            roster["sites"][name] = _key(folder.files_of(name)).public_hex
    if job.secure_aggregation is not None:
        _signed_roster(folder, job, federation.names).save(folder.participants)
    folder.write("plans.json", planned)
    federation.trainer.parameters.save(federation.trainer.read(), folder.initial_model, {"job": job.hash, "round": "0"})
    if len(roster) > 2 or roster["sites"]:
        folder.write("roster.json", roster)


def _signed_roster(folder: RunFolder, job: Job, names: list[str]) -> Roster:
    """What the participants of a federation sign before its first job; here they are all in one place."""
    keys = {name: _key(folder.files_of(name)) for name in names}
    members = tuple(Member(slot, name, keys[name].public_hex) for slot, name in enumerate(names, start=1))
    roster = Roster(job.name, 1, members, {})
    for name in names:
        roster = roster.signed_by(keys[name], name)
    return roster


def _key(files: Files) -> IdentityKey:
    return IdentityKey.load(files.identity) if files.identity.exists() else IdentityKey.create(files.identity)


def _go_on(
    folder: RunFolder, earlier: RunFolder, job: Job, plans: Mapping[str, SitePlan], release: ReleasePlan | None
) -> None:
    """Bring the ledgers of an earlier run along, and refuse what their holders' budgets do not allow."""
    if not earlier.finished:
        raise RunError(f"{earlier.path}: is not finished; resume it first")
    brought = {name: (earlier.files_of(name), folder.files_of(name)) for name, plan in plans.items() if plan.events}
    accounts = {
        name: JobAccount(job.hash, job.purpose, plan.rounds, plan.events, None, plan.limits)
        for name, plan in plans.items()
    }
    if release is not None:
        brought[SERVER] = (earlier.server_files, folder.server_files)
        accounts[SERVER] = JobAccount(job.hash, job.purpose, release.rounds, (release.event,), None, (release.limit,))
    kept = {path.stem for path in (earlier.path / "ledgers").glob("*.jsonl")}
    kept |= {SERVER} if earlier.server_files.ledger.exists() else set()
    if left := sorted(kept - set(brought)):
        whose = "the server" if left[0] == SERVER else left[0]
        raise RunError(
            f"{earlier.path}: the ledger of {whose} would stay behind, as this job charges nothing there, and what it "
            "holds would be missing from every epsilon; run the job without --after"
        )
    for name, (there, here) in brought.items():
        if not there.identity.exists():
            if name != SERVER:
                raise RunError(f"{earlier.path}: has no site {name} with a ledger; --after needs the same data holders")
            continue
        for source, target in ((there.identity, here.identity), (there.ledger, here.ledger)):
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        before = LedgerAccounts(Ledger(here.ledger, name, IdentityKey.load(here.identity))).now()
        if job.hash in before.jobs:
            raise RunError(f"{earlier.path}: this very job is in its ledgers already; give it another name or seed")
        if name != SERVER and before.dataset not in (None, job.data.dataset):
            raise RunError(f"{name}: its ledger is that of data set {before.dataset!r}, not {job.data.dataset!r}")
        before.check_affordable(accounts[name])
        for limit in accounts[name].limits:
            if not math.isfinite(before.with_plan(accounts[name]).epsilon(limit.unit, limit.delta)):
                raise RunError(
                    f"{earlier.path}: it released something at {name} that bounds nothing for a {limit.unit}, so no "
                    f"{limit.unit}-level epsilon of this job would be finite; run it without --after"
                )


def resume_run(path: Path, *, watcher: Watcher) -> dict[str, Any] | None:
    """Continue a run from its last finished round. What was spent stays spent. Raises `RunError` if it is finished."""
    folder = RunFolder.open(path)
    if folder.finished:
        raise RunError(f"{path}: this run is finished; start a new one with `fedchorus simulate`")
    job = folder.job
    watcher.status("reading data")
    federation = Federation.load(job, begun=True)
    plans = federation.plans(folder.known_plans())
    return _Run(folder, job, federation, plans, federation.release_plan(folder.known_release()), watcher).finish()


@dataclass
class _Run:
    folder: RunFolder
    job: Job
    federation: Federation
    plans: dict[str, SitePlan]
    release_plan: ReleasePlan | None
    watcher: Watcher
    _views: dict[str, LedgerView] = field(default_factory=dict)
    _accounts: dict[str, LedgerAccounts] = field(default_factory=dict)
    _release: CentralRelease | None = None
    _round_began: float = 0.0
    _stores: dict[str, InMemory] = field(default_factory=dict)
    _stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _clock: VirtualClock = field(default_factory=VirtualClock)
    _buffered: BufferedCollector | None = None

    def finish(self) -> dict[str, Any] | None:
        with self.folder.locked():
            if self.job.privacy.at_sites:
                self._views = self._open_ledgers()
                self._accounts = {name: LedgerAccounts(view) for name, view in self._views.items()}
            parameters, start = Parameters.load(self.folder.initial_model)
            state = self.federation.strategy.start(start, sites=len(self.federation.names))
            if self.folder.checkpoint.exists():
                state = load_checkpoint(self.folder.checkpoint, job=self.job.hash)
                if state.model.shape != start.shape or state.round_number > len(self.folder.lines("metrics.jsonl")):
                    raise RunError(f"{self.folder.path}: the checkpoint does not fit the rest of the run")
            self.folder.keep_rounds(state.round_number)
            evaluation = Evaluation(self.federation.trainer, self.federation.data)
            self.watcher.begin(self.folder.path, self.job)
            state = self._train(state, evaluation)
            if state.round_number < self.job.training.rounds:
                return None
            return self._conclude(state, parameters, evaluation, start)

    def _open_ledgers(self) -> dict[str, LedgerView]:
        """Views on all ledgers, each holding at least what the server last saw of it: a restored backup shows here."""
        roster = self.folder.read("roster.json").get("sites")
        if not isinstance(roster, dict) or set(roster) != set(self.federation.names):
            raise RunError(f"{self.folder.path}: roster.json does not name the sites of the job")
        views = {name: LedgerView(self.folder.files_of(name).ledger, name, key) for name, key in roster.items()}
        for site, head in self._heads()[0].items():
            _check_holds(views[site], head)
        return views

    def _heads(self) -> tuple[dict[str, Head], Head | None]:
        """The newest heads of the sites' ledgers that the server kept, and of its own."""
        return newest_heads(self.folder.lines("heads.jsonl"), where=str(self.folder.path))

    def _open_release(self, layout: Layout, state: ServerState, seen: Head | None) -> Release:
        if self.release_plan is None:
            return PlainRelease(layout)
        files = self.folder.server_files
        ledger = Ledger(files.ledger, SERVER, IdentityKey.load(files.identity))
        if seen is not None:
            _check_holds(ledger, seen)
        self._release = CentralRelease(
            self.release_plan,
            job=self.job,
            layout=layout,
            budget=SiteBudget(ledger),
            noise=lambda number: self.federation.noise("the sum", number),
            asked_before=(self.federation.cohort(number) for number in range(1, state.round_number + 1)),
        )
        self._release.open(simulation=True)
        return self._release

    def _train(self, state: ServerState, evaluation: Evaluation) -> ServerState:
        finished = [state]
        heads, server_head = self._heads()
        release = self._open_release(self.federation.layout, state, server_head)
        roster = self._roster()

        def drive(transport: Transport) -> None:
            self._round_began = time.perf_counter()
            collector = (
                self._plain_collector(transport) if roster is None else self._secure_collector(transport, roster)
            )
            finished[0] = run_rounds(
                state,
                job=self.job,
                strategy=self.federation.strategy,
                collector=collector,
                release=release,
                cohort=self.federation.cohort,
                evaluate=lambda state: self._scores(evaluation, state),
                record=self._record,
                checkpoint=lambda after: save_checkpoint(after, self.folder.checkpoint, job=self.job.hash),
                heads=heads,
                server_head=server_head,
                stop=self.watcher.stop,
            )

        if self.job.simulation.engine == "flower":
            from simulations.flower import TIMEOUT_S, run_on_flower

            self.watcher.status("starting Flower's simulation runtime")

            def drive_flower(transport: Any) -> None:
                transport.find_sites(len(self.federation.names))
                drive(transport)

            timeout_s = self.job.cohort.deadline_s or TIMEOUT_S
            run_on_flower(self.folder.path, len(self.federation.names), drive_flower, timeout_s=timeout_s)
        else:
            try:
                drive(self._on_the_clock(self._inline(roster)))
            except RunError:
                # A device's absence is drawn by the seed: going on from here, it is drawn anew.
                if self.federation.devices is not None:
                    self.folder.append("failed.jsonl", {"round": len(self.folder.lines("metrics.jsonl")) + 1})
                raise
        return finished[0]

    def _inline(self, roster: Roster | None) -> InlineTransport:
        return InlineTransport(lambda name: self._client(name, roster))

    def _on_the_clock(self, transport: Transport) -> Transport:
        """With devices, answers come when their virtual clock says."""
        devices = self.federation.devices
        if devices is None:
            return transport
        lines = self.folder.lines("metrics.jsonl")
        self._clock.now = float(lines[-1]["virtual_seconds"]) if lines else 0.0
        observed = bool(self.job.privacy.at_sites) or self.federation.strategy.traits.remembers
        failed = Counter(line["round"] for line in self.folder.lines("failed.jsonl"))
        return DeviceTransport(transport, devices, self._clock, observed, failed)

    def _roster(self) -> Roster | None:
        if self.federation.secure is None:
            return None
        roster = Roster.load(self.folder.participants)
        roster.check(None)
        return roster

    def _client(self, name: str, roster: Roster | None) -> Handler:
        seat = None
        if roster is not None and self.federation.secure is not None:
            # Kept apart from the clients, of which only so many stay open between two messages.
            store = self._stores.setdefault(name, InMemory())
            seat = Seat(self.federation.secure, roster, store, self._stopwatch)
        return self.federation.client(name, self.plans[name], self.folder.files_of(name), seat)

    def _plain_collector(self, transport: Transport) -> Collector:
        strategy, devices = self.federation.strategy, self.federation.devices
        if isinstance(strategy, FedBuff) and devices is not None:
            self._buffered = BufferedCollector(self._inline(None), strategy, devices, self._clock)
            return self._buffered
        if self.job.regions:
            return RegionCollector(transport, self.job.regions)
        return collector_for(self.job, transport)

    def _secure_collector(self, transport: Transport, roster: Roster) -> SecureCollector:
        plan, secure = self.federation.secure, self.job.secure_aggregation
        assert plan is not None
        assert secure is not None
        groups = groups_of(self.job, self.federation.names) if self.job.secure_groups > 1 else None
        return SecureCollector(transport, plan, plan.terms(self.job, roster), roster, self.job.robust, groups)

    def _scores(self, evaluation: Evaluation, state: ServerState) -> dict[str, Any]:
        """How the model does, and how each site's own does there, where the strategy makes one."""
        every = self.job.simulation.evaluate_every or 1
        if state.round_number % every and state.round_number < self.job.training.rounds:
            return {}
        scores, strategy = evaluation(state.model), self.federation.strategy
        if strategy.traits.personal:
            received = strategy.broadcast(state)
            own = {n: self.federation.own_model(received, self.folder.files_of(n)) for n in self.federation.names}
            scores["personal"] = evaluation.each(own.__getitem__)
        return scores

    def _record(self, result: RoundResult) -> None:
        collected = result.collected
        line = {
            "round": result.round_number,
            **result.evaluation,
            "training_loss": training_loss(collected.total.metrics),
            "epsilon": self._epsilons(),
            "epsilon_client": self._client_epsilon(),
            "contributors": list(collected.contributors),
            "failures": dict(collected.failures),
            "seconds": round(time.perf_counter() - self._round_began, 4),
        }
        if collected.cost is not None:
            cost = dict(collected.cost)
            cost["seconds"] += self._stopwatch.seconds  # What the sites in this process took for masking.
            self._stopwatch.seconds = 0.0
            line["secure"] = {key: round(value, 4) for key, value in cost.items()}
        if self.federation.devices is not None:
            line["virtual_seconds"] = round(self._clock.now, 6)
        if self._buffered is not None:
            line["staleness"] = self._buffered.staleness(result.round_number)
            line["began"] = self._buffered.began
        self._round_began = time.perf_counter()
        if result.heads or result.server_head:
            self.folder.append("heads.jsonl", heads_line(result.round_number, result.heads, result.server_head))
        self.folder.append("metrics.jsonl", line)
        self.watcher.round(line)

    def _epsilons(self) -> dict[str, float]:
        """Record-level epsilon spent so far, by PLD, from the ledgers themselves.

        A kind of plan costs some hundredths of a second a round; with many kinds only the sites with the largest rough
        figure are computed while training goes on, and all of them at the end.
        """
        record = self.job.privacy.record
        if record is None:
            return {}
        names = self.federation.names
        if len({plan.events for plan in self.plans.values()}) > MANY_PLANS:
            rough = {
                name: sum(
                    e.count * e.sampling_rate**2 / e.noise_multiplier**2
                    for e in self._accounts[name].now().spent(UNIT_RECORD)
                    if isinstance(e, GaussianEvent)
                )
                for name in names
            }
            largest = max(rough.values())
            names = [name for name in names if rough[name] >= largest * (1 - 1e-9)]
        return {name: self._spent(name, UNIT_RECORD, record.delta) for name in names}

    def _client_epsilon(self) -> float | None:
        """Client-level epsilon spent so far: the server's, or the largest of any client that adds noise itself."""
        if self._release is not None:
            return self._release.epsilon()
        own = self.job.privacy.client_at_sites
        return max(self._spent(n, UNIT_CLIENT, own.delta) for n in self.federation.names) if own else None

    def _spent(self, name: str, unit: str, delta: float) -> float:
        return self._accounts[name].now().epsilon(unit, delta, spent_only=True)

    def _conclude(
        self, state: ServerState, parameters: Parameters, evaluation: Evaluation, start: Vector
    ) -> dict[str, Any]:
        self._settle()
        if state.release:  # With it and the model anyone could take the last round's noise away.
            save_checkpoint(replace(state, release={}), self.folder.checkpoint, job=self.job.hash)
        scores = self._scores(evaluation, state)
        compared: dict[str, Any] = {}
        if self.job.simulation.baselines:
            compared = baselines(self.federation, evaluation, self.plans, start, progress=self.watcher.status)
        self.watcher.status("writing the report")
        summary = self._summary(scores, compared)
        parameters.save(state.model, self.folder.model, {"job": self.job.hash, "round": str(state.round_number)})
        self.folder.write_text("MODEL_CARD.md", model_card(self.job, summary, parameters))
        self.folder.write_text("report.html", self._report(summary))
        # Last: a folder with a summary is a finished run.
        self.folder.write("summary.json", summary)
        return summary

    def _settle(self) -> None:
        """The job is over: whatever was planned for it and not reserved is free again."""
        if self._release is not None:
            self._release.settle()
        for name, plan in self.plans.items():
            files = self.folder.files_of(name)
            if plan.events and files.ledger.exists():
                SiteBudget(Ledger(files.ledger, name, IdentityKey.load(files.identity))).settle(self.job.hash)

    def _report(self, summary: Mapping[str, Any]) -> str:
        return render_report(
            job_toml=self.job.toml.decode(), summary=summary, rounds=self.folder.lines("metrics.jsonl")
        )

    def _summary(self, scores: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
        record, own, lines = (
            self.job.privacy.record,
            self.job.privacy.client_at_sites,
            self.folder.lines("metrics.jsonl"),
        )
        sites: dict[str, dict[str, Any]] = {}
        # Who took part is what the amplification counts on nobody learning.
        secret = self.release_plan is not None and self.release_plan.sampled
        for name, data in self.federation.data.items():
            accounts = self._accounts[name].now() if name in self._accounts else Accounts(name)
            spent = epsilon(accounts.spent(UNIT_RECORD), record.delta) if record else None
            mine = accounts.jobs.get(self.job.hash)
            releases = sum(event.count for event in mine.spent(UNIT_RECORD)) if record and mine else 0
            metrics = {key: value for key, value in scores["sites"][name].items() if key != "rows"}
            sites[name] = {
                **plan_record(self.plans[name]),
                "test_rows": len(data.test),
                **metrics,
                "epsilon": spent.pld if spent else None,
                "epsilon_rdp": spent.rdp if spent else None,
                "delta": record.delta if record else None,
                "steps": releases or None,
                "rounds": None if secret else sum(name in line["contributors"] for line in lines),
                "client": _client_claim(accounts.spent(UNIT_CLIENT), own.delta) if own else None,
            }
        central, whole = self.job.privacy.central, None
        if self._release is not None and self.release_plan is not None and central is not None:
            whole = {
                **release_record(self.release_plan),
                **_client_claim(self._release.accounts().spent(UNIT_CLIENT), central.delta),
            }
        whole_sites = [s["client"]["epsilon"] for s in sites.values() if s["client"]]
        return {
            "run": str(self.folder.path),
            "name": self.job.name,
            "measures": measures(self.job),
            "rounds": len(lines),
            "engine": self.job.simulation.engine,
            "seed": self.job.seed,
            "job_hash": self.job.hash,
            "metrics": {key: scores[key] for key in scores if key not in ("sites", "worst_site", "personal")},
            "personal": scores.get("personal"),
            "sites": sites,
            "baselines": compared,
            "epsilon": {
                "record": max((s["epsilon"] for s in sites.values()), default=None) if record else None,
                "client": whole["epsilon"] if whole else max(whole_sites, default=None),
            },
            "client": whole,
            "placement": self.job.privacy.client.placement if self.job.privacy.client else None,
            "secure_aggregation": self._secure_summary(lines),
            "texts": self._texts(),
            "noise": self.federation.noise_kind if record or self.job.privacy.client else None,
            "adjacency": self._adjacency(),
            "seconds": round(sum(line["seconds"] for line in lines), 3),
            "versions": {name: version(name) for name in ("fedchorus", "flwr", "torch", "numpy", "dp-accounting")},
        }

    def _texts(self) -> dict[str, int] | None:
        """How many texts there are, and how many fill all the tokens that the job reads: what is longer is cut."""
        columns = list(self.job.data.columns.values())
        if self.job.evaluation is not None or [column.type for column in columns] != ["tokens"]:
            return None
        length = columns[0].length or 0
        parts = [
            records.features[:, length - 1] for d in self.federation.data.values() for records in (d.train, d.test)
        ]
        filled = np.concatenate(parts) != PADDING
        return {"texts": len(filled), "full": int(filled.sum()), "length": length}

    def _adjacency(self) -> str | None:
        privacy = self.job.privacy
        if privacy.distributed is not None and privacy.record is None:
            return ZERO_OUT
        return ADD_OR_REMOVE_ONE if privacy.record or privacy.client else None

    def _secure_summary(self, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.federation.secure is None:
            return None
        costs = [line["secure"] for line in lines if "secure" in line]
        mean = {key: round(sum(cost[key] for cost in costs) / len(costs), 4) for key in costs[0]} if costs else {}
        return {**protection(self.job, self.federation.secure), **mean}


def _client_claim(events: list[Event], delta: float) -> dict[str, Any]:
    spent = epsilon(events, delta)
    return {"epsilon": spent.pld, "epsilon_rdp": spent.rdp, "delta": delta}


def _check_holds(ledger: LedgerView, head: Head) -> None:
    """Raise `LedgerError` unless the ledger holds what the server last saw of it: a restored backup shows here."""
    ledger.refresh()
    if len(ledger.entries) <= head.seq or ledger.entries[head.seq].hash != head.hash:
        raise LedgerError(
            f"ledger of {ledger.site}: the server saw entry {head.seq} of it, which is gone or another; "
            "restore the newest copy, what was spent stays spent"
        )


def rewrite_report(path: Path) -> Path:
    """Render report.html again from what the run folder holds. Raises `RunError` for an unfinished run."""
    folder = RunFolder.open(path)
    summary = folder.read("summary.json")
    toml = (path / "job.toml").read_text(encoding="utf-8")
    folder.write_text(
        "report.html", render_report(job_toml=toml, summary=summary, rounds=folder.lines("metrics.jsonl"))
    )
    return path / "report.html"

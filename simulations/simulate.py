"""One simulated run from job to report: prepare, run the rounds, compare, write down."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.site import SitePlan, layout_for
from privacy.accountant import epsilon, epsilon_pld
from privacy.budget import charged
from privacy.errors import LedgerError, RunError
from privacy.events import ADD_OR_REMOVE_ONE
from privacy.keys import IdentityKey
from privacy.ledger import Head, LedgerView
from server.checkpoint import load_checkpoint, save_checkpoint
from server.collect import PlainCollector, Transport
from server.rounds import RoundResult, heads_line, run_rounds
from simulations.baselines import baselines
from simulations.evaluation import Evaluation
from simulations.federation import Federation, plan_record
from simulations.inline import InlineTransport
from simulations.model_card import model_card
from simulations.report import render_report
from simulations.run_folder import RunFolder, fresh_path
from strategies.job import Job
from strategies.parameters import Parameters, Vector
from strategies.protocol import ServerState

MANY_PLANS = 8  # With more kinds of plan than this, a round's epsilon is computed for the costliest sites alone.


@dataclass(frozen=True)
class Watcher:
    """Whom a run tells what it does; every part may do nothing."""

    begin: Callable[[Path, Job], None] = lambda path, job: None
    status: Callable[[str], None] = lambda text: None
    round: Callable[[Mapping[str, Any]], None] = lambda line: None
    stop: Callable[[], bool] = lambda: False


def start_run(job: Job, *, out: Path | None, parent: Path, watcher: Watcher, now: datetime) -> dict[str, Any] | None:
    """Run `job` in a new run folder; return its summary, or None when `watcher.stop` ended it early.

    Whatever cannot work (data, schema, budget) raises before a folder exists.
    """
    watcher.status("reading data")
    federation = Federation.load(job)
    watcher.status("calibrating noise" if job.privacy.record else "preparing")
    plans = federation.plans()
    folder = RunFolder.create(out or fresh_path(job, parent, now), job)
    try:
        _prepare(folder, job, federation, plans)
    except BaseException:  # Ctrl-C too: half a folder could neither be resumed nor used again.
        shutil.rmtree(folder.path)
        raise
    return _Run(folder, job, federation, plans, watcher).finish()


def _prepare(folder: RunFolder, job: Job, federation: Federation, plans: Mapping[str, SitePlan]) -> None:
    folder.write("plans.json", {"v": 1, "job": job.hash, "sites": {n: plan_record(plan) for n, plan in plans.items()}})
    federation.trainer.parameters.save(federation.trainer.read(), folder.initial_model, {"job": job.hash, "round": "0"})
    if job.privacy.record is not None:
        keys = {name: IdentityKey.create(folder.files_of(name).identity).public_hex for name in federation.names}
        folder.write("roster.json", {"v": 1, "sites": keys})


def resume_run(path: Path, *, watcher: Watcher) -> dict[str, Any] | None:
    """Continue a run from its last finished round. What was spent stays spent. Raises `RunError` if it is finished."""
    folder = RunFolder.open(path)
    if folder.finished:
        raise RunError(f"{path}: this run is finished; start a new one with `fedchorus simulate`")
    job = folder.job
    watcher.status("reading data")
    federation = Federation.load(job)
    return _Run(folder, job, federation, federation.plans(folder.known_plans()), watcher).finish()


@dataclass
class _Run:
    folder: RunFolder
    job: Job
    federation: Federation
    plans: dict[str, SitePlan]
    watcher: Watcher
    _views: dict[str, LedgerView] = field(default_factory=dict)
    _round_began: float = 0.0

    def finish(self) -> dict[str, Any] | None:
        with self.folder.locked():
            if self.job.privacy.record is not None:
                self._views = self._open_ledgers()
            parameters, start = Parameters.load(self.folder.initial_model)
            state = ServerState(start)
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
        for site, (seq, digest) in self._heads().items():
            views[site].refresh()
            if len(views[site].entries) <= seq or views[site].entries[seq].hash != digest:
                raise LedgerError(
                    f"ledger of {site}: the server saw entry {seq} of it, which is gone or another; "
                    "restore the newest copy, what was spent stays spent"
                )
        return views

    def _heads(self) -> dict[str, Head]:
        """The newest ledger heads that the server kept."""
        lines = self.folder.lines("heads.jsonl")
        try:
            return (
                {site: Head(int(seq), str(digest)) for site, (seq, digest) in lines[-1]["heads"].items()}
                if lines
                else {}
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RunError(f"{self.folder.path}: heads.jsonl is damaged") from None

    def _train(self, state: ServerState, evaluation: Evaluation) -> ServerState:
        finished = [state]
        heads = self._heads()

        def drive(transport: Transport) -> None:
            self._round_began = time.perf_counter()
            finished[0] = run_rounds(
                state,
                job=self.job,
                sites=self.federation.names,
                strategy=self.federation.strategy,
                collector=PlainCollector(transport, layout_for(self.job, self.federation.trainer.parameters.size)),
                evaluate=evaluation,
                record=self._record,
                checkpoint=lambda after: save_checkpoint(after, self.folder.checkpoint, job=self.job.hash),
                heads=heads,
                stop=self.watcher.stop,
            )

        if self.job.simulation.engine == "flower":
            from simulations.flower import run_on_flower

            self.watcher.status("starting Flower's simulation runtime")

            def drive_flower(transport: Any) -> None:
                transport.find_sites(len(self.federation.names))
                drive(transport)

            run_on_flower(self.folder.path, len(self.federation.names), drive_flower)
        else:
            drive(
                InlineTransport(lambda name: self.federation.client(name, self.plans[name], self.folder.files_of(name)))
            )
        return finished[0]

    def _record(self, result: RoundResult) -> None:
        collected = result.collected
        training = collected.total.metrics
        line = {
            "round": result.round_number,
            **result.evaluation,
            "training_loss": training["loss"] / training["examples"] if training else None,
            "epsilon": self._epsilons(),
            "contributors": list(collected.contributors),
            "failures": dict(collected.failures),
            "seconds": round(time.perf_counter() - self._round_began, 4),
        }
        self._round_began = time.perf_counter()
        if result.heads:
            self.folder.append("heads.jsonl", heads_line(result.round_number, result.heads))
        self.folder.append("metrics.jsonl", line)
        self.watcher.round(line)

    def _epsilons(self) -> dict[str, float]:
        """Epsilon spent so far, by PLD, from the ledgers themselves.

        A kind of plan costs some tenths of a second a round; with many kinds only the sites with the largest Rényi
        bound are computed while training goes on, and all of them at the end.
        """
        record = self.job.privacy.record
        if record is None:
            return {}
        events = {}
        for name, view in self._views.items():
            view.refresh()
            events[name] = charged(view.entries)
        if len({(plan.sgd, plan.event) for plan in self.plans.values()}) > MANY_PLANS:
            rough = {
                name: sum(e.count * e.sampling_rate**2 / e.noise_multiplier**2 for e in spent)
                for name, spent in events.items()
            }
            largest = max(rough.values())
            events = {name: events[name] for name in events if rough[name] >= largest * (1 - 1e-9)}
        return {name: epsilon_pld(spent, record.delta) for name, spent in events.items()}

    def _conclude(
        self, state: ServerState, parameters: Parameters, evaluation: Evaluation, start: Vector
    ) -> dict[str, Any]:
        scores = evaluation(state.model)
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

    def _report(self, summary: Mapping[str, Any]) -> str:
        return render_report(
            job_toml=self.job.toml.decode(), summary=summary, rounds=self.folder.lines("metrics.jsonl")
        )

    def _summary(self, scores: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
        record, lines = self.job.privacy.record, self.folder.lines("metrics.jsonl")
        sites: dict[str, dict[str, Any]] = {}
        for name, data in self.federation.data.items():
            spent = None
            releases = 0
            if record is not None:
                self._views[name].refresh()
                events = charged(self._views[name].entries)
                spent, releases = epsilon(events, record.delta), sum(event.count for event in events)
            metrics = {key: value for key, value in scores["sites"][name].items() if key != "rows"}
            sites[name] = {
                **plan_record(self.plans[name]),
                "test_rows": len(data.test),
                **metrics,
                "epsilon": spent.pld if spent else None,
                "epsilon_rdp": spent.rdp if spent else None,
                "delta": record.delta if record else None,
                "steps": releases or None,
                "rounds": sum(name in line["contributors"] for line in lines),
            }
        return {
            "run": str(self.folder.path),
            "name": self.job.name,
            "rounds": len(lines),
            "engine": self.job.simulation.engine,
            "seed": self.job.seed,
            "job_hash": self.job.hash,
            "metrics": {key: scores[key] for key in scores if key not in ("sites", "worst_site")},
            "sites": sites,
            "baselines": compared,
            "epsilon": {
                "record": max((s["epsilon"] for s in sites.values()), default=None) if record else None,
                "client": None,
            },
            "noise": self.federation.noise_kind if record else None,
            "adjacency": ADD_OR_REMOVE_ONE if record else None,
            "seconds": round(sum(line["seconds"] for line in lines), 3),
            "versions": {name: version(name) for name in ("fedchorus", "flwr", "torch", "numpy", "dp-accounting")},
        }


def rewrite_report(path: Path) -> Path:
    """Render report.html again from what the run folder holds. Raises `RunError` for an unfinished run."""
    folder = RunFolder.open(path)
    summary = folder.read("summary.json")
    toml = (path / "job.toml").read_text(encoding="utf-8")
    folder.write_text(
        "report.html", render_report(job_toml=toml, summary=summary, rounds=folder.lines("metrics.jsonl"))
    )
    return path / "report.html"

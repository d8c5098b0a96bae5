"""Experiment trackers that a run is written into, live or afterwards: TensorBoard, MLflow, Weights & Biases.

They only write, and only what a run's report shows. A tracker that fails is said once and left alone: no run stops or
changes because of one, and `track_run` writes the same from the run's folder afterwards. A live run waits for each call
of a tracker, however slow its server is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import tomli_w

from privacy.errors import RunError
from privacy.record_folder import RecordFolder
from simulations.report import MANY_SITES
from simulations.simulate import Watcher
from strategies.job import Job, stored_job

Figures = Mapping[str, float]
STRUCTURE = (
    "round",
    "epsilon_client",
    "seconds",
    "virtual_seconds",
    "staleness",
)  # Of a line; its other numbers are metrics.
# Of a job's data what names no column, class or place; the rest is for those who hold the records.
OF_DATA = frozenset(
    f"data.{key}"
    for key in (
        "dataset", "bundled", "target_type", "target_length", "target_log", "scaling", "on_missing", "test_fraction",
        "stratify", "split_seed", "forecast", "forecast.lags", "forecast.horizon", "forecast.harmonics",
        "forecast.spread",
    )
)  # fmt: skip
# Of a job what is keyed by its sites, or says what share of them is of a kind.
BY_SITE = frozenset(
    ("regions", "simulation.devices", "simulation.partition.mix", "task.tuning.ranks", "training.weak", "training.work")
)
TIMEOUT_S = 30
LONGEST = 500  # Characters of a setting that are written: MLflow's older servers take no more.


class Tracker(Protocol):
    """Where one run is written. Any of the three may raise, and is then not called again but for `end`."""

    @property
    def shown_by(self) -> str:
        """The command that shows what was written; without an address, which may hold a password."""
        ...

    def log(self, step: int, figures: Figures) -> None: ...

    def end(self, figures: Figures, texts: Mapping[str, str], *, finished: bool) -> None:
        """Close it; `figures` are those of the whole run, `texts` what a person reads of it."""
        ...


@dataclass(frozen=True)
class Start:
    """What a tracker is opened with: names, the run's folder, and the job's settings by their keys."""

    folder: Path
    job: str
    settings: Mapping[str, str]
    texts: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class Choice(NamedTuple):
    """A tracker and where it is to write, if that is not the run's folder."""

    kind: str
    where: str | None


def choices(asked: Sequence[str]) -> list[Choice]:
    """Read `KIND` or `KIND:WHERE`. Raises `RunError` for what is unknown, or whose package is not installed."""
    found = []
    for text in asked:
        kind, colon, where = text.partition(":")
        if kind not in KINDS:
            raise RunError(f"tracker {kind!r}: there is none of this name; choose one of {', '.join(KINDS)}")
        if colon and not where:
            raise RunError(f"tracker {text!r}: nothing follows the colon; write {kind}:{KINDS[kind].where} or {kind}")
        if importlib.util.find_spec(kind) is None:  # Each kind is called as the module that it needs.
            raise RunError(f"tracker {kind!r}: its package is missing; install it with pip install 'fedchorus[{kind}]'")
        found.append(Choice(kind, where or None))
    if doubled := [kind for kind in KINDS if [choice.kind for choice in found].count(kind) > 1]:
        raise RunError(f"tracker {doubled[0]!r}: given twice; a run is written to each tracker once")
    return found


def track_run(folder: Path, chosen: Sequence[Choice]) -> list[str]:
    """Write a run, finished or not, into trackers from its folder; the commands that show it.

    Raises `RunError` for what is no run folder, for a file in it that no run wrote so, and for a tracker that fails.
    """
    if not (folder / "job.toml").is_file():
        raise RunError(f"{folder}: no run folder (job.toml is missing)")
    run, summary = RecordFolder(folder), None
    with _whole(folder, "job.toml"):
        job = stored_job(folder / "job.toml")
        public = Public.of(job)
    with _whole(folder, "metrics.jsonl"):
        for line in run.lines("metrics.jsonl"):
            public.of_round(line)
    if (folder / "summary.json").is_file():
        with _whole(folder, "summary.json"):
            summary = run.read("summary.json")
            of_run(summary, public)
        with _whole(folder, "MODEL_CARD.md"):
            _card(folder, public)
    failed: list[str] = []
    with Tracking(chosen, failed.append) as tracking:
        tracking.begin(folder, job)
        shown = tracking.conclude(summary)
    if failed:
        raise RunError(failed[0])
    return shown


@contextmanager
def _whole(folder: Path, name: str) -> Iterator[None]:
    """Whatever stands in a file where a run writes something else is one error that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise RunError(f"{folder}: {name} is damaged") from None


class Tracking:
    """The trackers of one run. `say` gets one line of each that fails.

    Where the cohort is secret a tracker is opened when the run is over: how long a round took tells how many took part.
    """

    def __init__(self, chosen: Sequence[Choice], say: Callable[[str], None]) -> None:
        self._chosen, self._say = chosen, say
        self._open: dict[str, Tracker] = {}
        self._folder, self._public = Path(), Public()
        self._job: Job | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(None)

    def beside(self, watcher: Watcher) -> Watcher:
        """`watcher`, which tells the trackers too."""

        def begin(path: Path, job: Job) -> None:
            watcher.begin(path, job)
            self.begin(path, job)

        def of_round(line: Mapping[str, Any]) -> None:
            watcher.round(line)
            self.round(line)

        return replace(watcher, begin=begin, round=of_round)

    def begin(self, folder: Path, job: Job) -> None:
        """Open the trackers, and write the rounds that the folder of a run that is resumed holds already."""
        self._folder, self._public, self._job = folder, Public.of(job), job
        if self._public.cohort:
            self._open_all(job)

    def round(self, line: Mapping[str, Any]) -> None:
        """Write what may be shown of one line of metrics.jsonl."""
        for kind, tracker in list(self._open.items()):
            with self._apart(kind):
                tracker.log(line["round"], self._public.of_round(line))

    def conclude(self, summary: Mapping[str, Any] | None) -> list[str]:
        """Write the end of a run, or close what was written of one that was stopped; the commands that show it."""
        if self._job is not None and not self._public.cohort:
            self._open_all(self._job)
        return self._end(summary)

    def _open_all(self, job: Job) -> None:
        for kind, where in self._chosen:
            with self._apart(kind):
                tree = _kept(_portable(job), self._public)
                settings = {"job_hash": job.hash, **dict(_settings(tree))}
                start = Start(self._folder, job.name, settings, {"job.toml": tomli_w.dumps(tree)})
                self._open[kind] = KINDS[kind].open(start, where)
                for line in RecordFolder(self._folder).lines("metrics.jsonl"):
                    self._open[kind].log(line["round"], self._public.of_round(line))

    def _end(self, summary: Mapping[str, Any] | None) -> list[str]:
        shown: list[str] = []
        while self._open:
            kind, tracker = self._open.popitem()
            with self._apart(kind):
                if summary is None:
                    tracker.end({}, {}, finished=False)
                else:
                    tracker.end(of_run(summary, self._public), _card(self._folder, self._public), finished=True)
                shown.insert(0, tracker.shown_by)
        return shown

    @contextmanager
    def _apart(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # Whatever a library raises, or a server: the run goes on.
            self._drop(kind, error)

    def _drop(self, kind: str, error: Exception) -> None:
        """Go on without a tracker. Its error's text may hold an address with a password, so its kind is said."""
        self._open.pop(kind, None)
        why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        self._say(
            f"tracking by {kind} failed ({why}); the run is not touched, and `fedchorus track {self._folder} {kind}` "
            "writes it again later"
        )


# --- what is written ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Public:
    """What of a run may be written. Under client-level privacy no figure of a single site is; where the cohort is a
    secret sample, on which the guarantee counts, nothing from which who took part, or how many, could be read."""

    sites: bool = False
    cohort: bool = False

    @classmethod
    def of(cls, job: Job) -> Public:
        return cls(sites=job.privacy.client is None, cohort=job.cohort.rate is None)

    def of_round(self, line: Mapping[str, Any]) -> dict[str, float]:
        """The figures of one line of metrics.jsonl, finite, by names like `metrics/accuracy`."""
        found: dict[str, object] = {f"metrics/{key}": value for key, value in line.items() if key not in STRUCTURE}
        found["privacy/epsilon_client"] = line.get("epsilon_client")
        personal, sites, spent = (line.get(key) or {} for key in ("personal", "sites", "epsilon"))
        found |= {f"personal/{key}": value for key, value in personal.items()}
        if self.cohort:
            found["privacy/epsilon_record"] = max(map(float, spent.values()), default=None)
            found |= {f"cost/{key}": line.get(key) for key in ("seconds", "virtual_seconds")}
            found |= {f"cost/secure_{key}": value for key, value in (line.get("secure") or {}).items()}
            found |= {f"cohort/{key}": len(line.get(key) or ()) for key in ("contributors", "failures")}
            found["cohort/staleness"] = line.get("staleness")
        if self.sites and len(sites) <= MANY_SITES:
            found |= {f"sites/{name}/{key}": value for name, site in sites.items() for key, value in site.items()}
        if self.sites and self.cohort and len(spent) <= MANY_SITES:
            found |= {f"sites/{name}/epsilon_record": value for name, value in spent.items()}
        return _finite(found)


def of_run(summary: Mapping[str, Any], public: Public) -> dict[str, float]:
    """The figures of a whole run by its summary.json, also one that a federation's coordinator wrote."""
    spent = summary.get("epsilon") or {"client": summary.get("epsilon_client")}
    if not public.cohort:  # What a site spent on records, and how long all rounds took, tells how many took part.
        spent, summary = {"client": spent.get("client")}, {**summary, "seconds": None}
    found: dict[str, object] = {f"final/{key}": value for key, value in (summary.get("metrics") or {}).items()}
    found |= {f"final/epsilon_{unit}": value for unit, value in spent.items()}
    found |= {f"final/{key}": summary.get(key) for key in ("rounds", "seconds")}
    for name, scores in (summary.get("baselines") or {}).items():
        found |= {f"baselines/{name}/{key}": value for key, value in scores.items()}
    return _finite(found)


def _finite(found: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _card(folder: Path, public: Public) -> dict[str, str]:
    """The model card by its name, where there is one that may be written: it has a row for each site."""
    card = folder / "MODEL_CARD.md"
    shown = public.sites and public.cohort and card.is_file()
    return {card.name: card.read_text(encoding="utf-8")} if shown else {}


def _portable(job: Job) -> dict[str, Any]:
    """The job's settings, which lead to no file of this machine."""
    here, away = (one.model_dump(exclude_none=True, mode="json") for one in (job, job.portable))
    # Not all of the portable job: it says nothing of what was simulated, and so of noise that was seeded.
    return {**here, **{key: away[key] for key in ("task", "evaluation") if key in away}}


def _kept(tree: Mapping[str, Any], public: Public, above: str = "") -> dict[str, Any]:
    """What of a job's settings may be written."""
    kept = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        hidden = above.startswith("data.") and name not in OF_DATA
        if hidden or name == "evaluation.groups" or (not public.sites and name in BY_SITE):
            continue
        kept[key] = _kept(value, public, f"{name}.") if isinstance(value, Mapping) else value
    return kept


def _settings(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A job's settings by their dotted keys."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _settings(value, f"{name}.")
        else:
            yield name, (value if isinstance(value, str) else json.dumps(value, default=str))[:LONGEST]


# --- the trackers ---------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in `RUN/tensorboard`, or in a folder of the run's name in the one that is given.

    Written record by record, without the package's own writer: that one writes in a thread, where an error would end
    on the screen and not here, and puts the machine's name into the file's.
    """

    def __init__(self, start: Start, where: str | None) -> None:
        from torch.utils.tensorboard import summary

        self._made: Any = summary
        # Of one place for many runs by the job too: names of runs come again, those of a sweep for one.
        own = f"{start.name}-{start.settings['job_hash'][:8]}"
        folder = Path(where) / own if where else start.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self.shown_by = f"tensorboard --logdir {where or folder}"
        self._file, self._settings, self._step = folder / f"events.out.tfevents.{time.time_ns()}", start.settings, 0
        # What an earlier writing of the run left is hidden by a session that starts at step 0.
        self._write({"file_version": "brain.Event:2"}, {"session_log": {"status": "START"}})
        self._texts(start.texts)

    def log(self, step: int, figures: Figures) -> None:
        self._step = step
        self._write(*({"step": step, "summary": self._made.scalar(name, value)} for name, value in figures.items()))

    def end(self, figures: Figures, texts: Mapping[str, str], *, finished: bool) -> None:
        if finished:
            self._texts(texts)
            self.log(self._step, figures)
            self._write(*({"summary": part} for part in self._made.hparams(dict(self._settings), dict(figures))))

    def _texts(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():  # Shown as Markdown, where four spaces leave a text as it is.
            plain = text if name.endswith(".md") else re.sub("^", "    ", text, flags=re.MULTILINE)
            self._write({"step": self._step, "summary": self._made.text(name, plain)})

    def _write(self, *events: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self._file, "ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(Event(wall_time=time.time(), **event).SerializeToString())


class MlFlow:
    """A run in the experiment of the job's name, in the database `RUN/mlflow/mlflow.db`, or where the address that is
    given, or the environment's MLFLOW_TRACKING_URI, leads."""

    def __init__(self, start: Start, where: str | None) -> None:
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # A server that is gone does not hold up a round for minutes.
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT_S),
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        address, artifacts = where or os.environ.get("MLFLOW_TRACKING_URI"), None
        self.shown_by = "mlflow: the run is in the experiment " + start.job
        if not address:
            folder = start.folder.resolve() / "mlflow"
            folder.mkdir(exist_ok=True)
            address, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
            self.shown_by = f"mlflow ui --backend-store-uri {address}"
        self._client = MlflowClient(tracking_uri=address)
        known = self._client.get_experiment_by_name(start.job)
        experiment = known.experiment_id if known else self._client.create_experiment(start.job, artifacts)
        self._run: str = self._client.create_run(experiment, run_name=start.name).info.run_id
        self._texts(start.texts)
        from mlflow.entities import Param

        settings = [Param(_plain(name), value) for name, value in start.settings.items()]
        for first in range(0, len(settings), 100):  # The most that a server takes at once.
            self._client.log_batch(self._run, params=settings[first : first + 100])

    def log(self, step: int, figures: Figures) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(_plain(name), value, now, step) for name, value in figures.items()])

    def end(self, figures: Figures, texts: Mapping[str, str], *, finished: bool) -> None:
        if finished:
            self.log(0, figures)
            self._texts(texts)
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")

    def _texts(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._client.log_text(self._run, text, name)


def _plain(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name)


class WandB:
    """A run of the project that is given, or of the job's name, in `RUN/wandb`: offline, unless the environment's
    WANDB_MODE says online. The machine, its user, packages and code are no part of it."""

    def __init__(self, start: Start, where: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(
            silent=True, console="off", host="", disable_git=True, disable_code=True, save_code=False,
            disable_job_creation=True, x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
            x_save_requirements=False, login_timeout=TIMEOUT_S, init_timeout=TIMEOUT_S, finish_timeout=TIMEOUT_S,
            reinit="create_new",
        )  # fmt: skip
        self._run = wandb.init(
            project=where or start.job, name=start.name, dir=str(start.folder), mode=mode,
            config=dict(start.settings), settings=settings,
        )  # fmt: skip
        self.shown_by = f"wandb sync {Path(self._run.dir).parent}" if mode == "offline" else f"wandb: {self._run.url}"

    def log(self, step: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=step)

    def end(self, figures: Figures, texts: Mapping[str, str], *, finished: bool) -> None:
        for name, value in figures.items():
            self._run.summary[name] = value
        self._run.finish(exit_code=0 if finished else 1)


@dataclass(frozen=True)
class Kind:
    open: Callable[[Start, str | None], Tracker]
    where: str


KINDS = {
    "tensorboard": Kind(TensorBoard, "FOLDER"),
    "mlflow": Kind(MlFlow, "URI"),
    "wandb": Kind(WandB, "PROJECT"),
}
"""The trackers by their names, which are those of their modules and of the extras that bring them."""

"""A sweep: one job in every combination of some settings, each over some seeds, and all of them compared.

SWEEP/sweep.json       which runs there are, by the hashes of their jobs, and which combinations were left out and why
SWEEP/NAME/            an ordinary run folder, one for each combination and seed, named after its settings
SWEEP/sweep.csv        one row a run            SWEEP/sweep.html   the comparison as a page

The same command on the same folder goes on where it ended: finished runs are kept, broken ones are resumed.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from privacy.errors import JobError, RunError
from privacy.record_folder import RecordFolder
from simulations import shown
from simulations.headline import headline
from simulations.run_folder import fresh_path
from simulations.sweep_workers import Answer, Request
from strategies.explain import one_line
from strategies.job import Job, check_job, load_job

MOST_RUNS = 10_000
LONGEST_NAME = 100
BEGINNING = ("lock", "sweep.json.partial")  # What a sweep that was killed as it began may leave.


@dataclass(frozen=True)
class SweepRun:
    """One job of a sweep: the folder `name` it runs in, and what was swept in it, as typed, by key."""

    name: str
    settings: Mapping[str, str]
    job: Job


@dataclass(frozen=True)
class LeftOut:
    """A combination that cannot run: its values by key, and why."""

    settings: Mapping[str, str]
    why: str


@dataclass(frozen=True)
class Grid:
    """Every combination of the values of `keys`, for each of `repeat` seeds; `labels` are short names of the keys."""

    keys: Mapping[str, Sequence[str]]
    labels: Mapping[str, str]
    repeat: int
    runs: Sequence[SweepRun]
    left_out: Sequence[LeftOut]

    def words(self, settings: Mapping[str, str]) -> str:
        """A combination in words: `name=fedavg, epsilon=4`."""
        return ", ".join(f"{self.labels[key]}={shown_value(value)}" for key, value in settings.items()) or "the job"

    def title(self, run: SweepRun) -> str:
        """A run in words: `name=fedavg, epsilon=4, seed=8`."""
        return self.words(run.settings) + (f", seed={run.job.seed}" if self.repeat > 1 else "")

    def combinations(self) -> list[list[SweepRun]]:
        """The runs that differ in their seeds alone, together."""
        return [list(runs) for _, runs in itertools.groupby(self.runs, key=lambda run: tuple(run.settings.values()))]


class Workers(Protocol):
    """Who checks and runs jobs: `simulations.sweep_workers.Processes`."""

    def answers(self, requests: Sequence[Request], *, stop: Callable[[], bool]) -> Iterator[tuple[Request, Answer]]:
        """Yield each request with its answer as it comes; once `stop` says so, begin no more and end early."""
        ...


@dataclass(frozen=True)
class SweepWatcher:
    """Whom a sweep tells what it does, in lines that stay and a status that passes; every part may do nothing."""

    begin: Callable[[Path], None] = lambda path: None
    tell: Callable[[str], None] = lambda line: None
    status: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Swept:
    """What became of a sweep: the summaries of its finished runs, and why the others failed, by the runs' names."""

    path: Path
    grid: Grid
    left_out: Sequence[LeftOut]
    summaries: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]


def grid_of(path: Path, settings: Sequence[str], sweeps: Sequence[str], *, repeat: int) -> Grid:
    """Load the job of every combination of `sweeps` (each `KEY=V1,V2,...`) on top of the overrides `settings`.

    A value is what TOML makes of it, or else a plain string; one with a comma goes in quotes or brackets. Repetitions
    take the job's seed and those that follow it. A combination that is no valid job is in `left_out`. Raises `JobError`
    for what is no sweep: a value that is missing, a key twice, two combinations that are the same job.
    """
    keys: dict[str, tuple[str, ...]] = {}
    for text in sweeps:
        key, values = parse_sweep(text)
        if key in keys:
            raise JobError(f"--sweep {key}: given twice; give all its values at once")
        keys[key] = values
    if repeat > 1 and "seed" in keys:
        raise JobError("--sweep seed and --repeat both choose seeds; leave one out")
    if (number := repeat * math.prod(map(len, keys.values()))) > MOST_RUNS:
        raise JobError(f"--sweep: {number:,} runs, more than {MOST_RUNS:,}; sweep fewer values")
    if not path.is_file():
        load_job(path)  # It says what is wrong, once for all combinations.
    labels = _labels(list(keys))
    runs: list[SweepRun] = []
    left_out: list[LeftOut] = []
    for values in itertools.product(*keys.values()):
        combination = dict(zip(keys, values, strict=True))
        try:
            jobs = _jobs(path, [*settings, *(f"{key}={value}" for key, value in combination.items())], repeat)
        except JobError as error:
            left_out.append(LeftOut(combination, str(error)))
            continue
        runs += [SweepRun("", combination, job) for job in jobs]
    grid = Grid(keys, labels, repeat, _named(runs, labels, repeat), left_out)
    known: dict[str, SweepRun] = {}
    for run in grid.runs:
        if (other := known.setdefault(run.job.hash, run)) is not run:
            raise JobError(f"--sweep: {grid.title(other)} and {grid.title(run)} are the same job; leave one out")
    return grid


def run_sweep(
    grid: Grid,
    *,
    out: Path | None,
    parent: Path,
    workers: Workers,
    skip_invalid: bool,
    now: datetime,
    watcher: SweepWatcher,
) -> Swept | None:
    """Check every combination, then run what is not finished in SWEEP = `out`, by default `parent`/NAME-TIME.

    A combination that cannot work (job, data, budget) raises `JobError` before anything runs or is written; with
    `skip_invalid` the others run. A run that fails, or whose process dies, is told once and the others go on. Returns
    None when `watcher.stop` ended it early. Raises `RunError` when `out` holds anything but this very sweep.

    Each run has its own ledgers and epsilon, as if no other had been: only a simulation may do that. On real records
    the runs of a sweep compose.
    """
    if out is not None:
        _refuse_another(out, grid)
    _refuse_invalid(grid, grid.left_out, skip_invalid)
    left_out = _checked(grid, out, workers, watcher)
    if left_out is None:
        return None
    _refuse_invalid(grid, left_out, skip_invalid)
    skipped = [one.settings for one in left_out]
    runs = [run for run in grid.runs if run.settings not in skipped]
    folder = RecordFolder(out or fresh_path(runs[0].job, parent, now))
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.locked():
        _refuse_another(folder.path, grid)  # Again: another process may have begun here.
        folder.write("sweep.json", {**_identity(grid), "left_out": [vars(one) for one in left_out]})
        watcher.begin(folder.path)
        for one in left_out:
            watcher.tell(one_line(f"left out {grid.words(one.settings)}: {one.why}"))
        return _run(folder.path, grid, runs, left_out, workers, watcher)


def _run(
    path: Path,
    grid: Grid,
    runs: Sequence[SweepRun],
    left_out: Sequence[LeftOut],
    workers: Workers,
    watcher: SweepWatcher,
) -> Swept | None:
    summaries = {run.name: summary for run in runs if (summary := _summary(path, run)) is not None}
    failed: dict[str, str] = {}
    if summaries:
        watcher.tell(f"kept {len(summaries)} finished runs of {len(runs)}")
    by_name = {run.name: run for run in runs}
    requests = [Request("run", run.job, path / run.name) for run in runs if run.name not in summaries]
    watcher.status(f"running: {len(summaries)} of {len(runs)} finished")
    for request, answer in workers.answers(requests, stop=watcher.stop):
        run = by_name[request.path.name]
        if answer.ended == "failed":
            failed[run.name] = answer.why
            watcher.tell(
                one_line(f"{len(summaries) + len(failed)}/{len(runs)}  {grid.title(run)}: failed: {answer.why}")
            )
        elif (summary := _summary(path, run)) is not None:
            summaries[run.name] = summary
            watcher.tell(f"{len(summaries) + len(failed)}/{len(runs)}  {grid.title(run)}: {in_a_line(summary)}")
        watcher.status(f"running: {len(summaries)} of {len(runs)} finished")
    if len(summaries) + len(failed) < len(runs):
        return None
    ordered = {run.name: summaries[run.name] for run in runs if run.name in summaries}
    return Swept(path, grid, left_out, ordered, failed)


def in_a_line(summary: Mapping[str, Any]) -> str:
    """A finished run in a few words."""
    metric, spent = headline(summary["metrics"]), summary["epsilon"]
    words = [f"{metric.name} {metric.form(summary['metrics'].get(metric.name))}"]
    words += [f"epsilon {shown.upward(spent['record'])}"] if spent["record"] is not None else []
    words += [f"epsilon of a site {shown.upward(spent['client'])}"] if spent["client"] is not None else []
    return ", ".join([*words, f"{summary['seconds']:.1f} s"])


def _checked(grid: Grid, out: Path | None, workers: Workers, watcher: SweepWatcher) -> list[LeftOut] | None:
    """What cannot run: what is no valid job, and what its data or budgets refuse. None when it was ended early.

    Data and budgets are tried with the first seed, where no run of the combination has begun: one that has was checked.
    """
    first = {runs[0].name: runs[0] for runs in grid.combinations() if not any(_begun(out, run) for run in runs)}
    requests = [Request("check", run.job, Path(run.name)) for run in first.values()]
    why: dict[str, str] = {}
    watcher.status(f"checking {len(requests)} combinations")
    answered = 0
    for request, answer in workers.answers(requests, stop=watcher.stop):
        answered += answer.ended != "stopped"
        if answer.ended == "failed":
            why[request.path.name] = answer.why
        watcher.status(f"checking: {answered} of {len(requests)} combinations")
    if answered < len(requests):
        return None
    refused = [LeftOut(first[name].settings, why[name]) for name in first if name in why]
    return [*grid.left_out, *refused]


def _refuse_invalid(grid: Grid, left_out: Sequence[LeftOut], skip_invalid: bool) -> None:
    none_left = len(left_out) == len(grid.left_out) + len(grid.combinations())
    if left_out and (none_left or not skip_invalid):
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        hint = "; no combination can run" if none_left else "; --skip-invalid runs the others"
        raise JobError(one_line(f"{grid.words(left_out[0].settings)}: {left_out[0].why}{more}{hint}"))


def _begun(out: Path | None, run: SweepRun) -> bool:
    return out is not None and (out / run.name / "job.toml").is_file()


def _summary(path: Path, run: SweepRun) -> dict[str, Any] | None:
    """What a finished run says of itself; None of one that is not finished."""
    folder = RecordFolder(path / run.name)
    if not (folder.path / "summary.json").is_file():
        return None
    summary = folder.read("summary.json")
    if summary.get("job_hash") != run.job.hash:
        raise RunError(f"{folder.path}: holds a run of another job than the sweep's; move it away")
    return summary


def _refuse_another(out: Path, grid: Grid) -> None:
    folder = RecordFolder(out)
    if (out / "sweep.json").exists():
        known, own = folder.read("sweep.json"), _identity(grid)
        if {key: known.get(key) for key in own} != own:
            raise RunError(f"{out}: holds another sweep (sweep.json names other jobs); choose another --out")
    elif out.exists() and (not out.is_dir() or any(entry.name not in BEGINNING for entry in out.iterdir())):
        raise RunError(f"{out}: exists and is neither a sweep nor an empty folder; choose another --out")


def _identity(grid: Grid) -> dict[str, Any]:
    return {"v": 1, "keys": list(grid.keys), "runs": {run.name: run.job.hash for run in grid.runs}}


# --- from what was typed to jobs and names --------------------------------------------------------------------------


def parse_sweep(text: str) -> tuple[str, tuple[str, ...]]:
    """Take `KEY=V1,V2` apart: the key and the values as typed. Raises `JobError`."""
    sides = _split(text, "=")
    values = [value.strip() for value in _split(text[len(sides[0]) + 1 :], ",")] if len(sides) > 1 else []
    if not sides or not sides[0].strip() or not values or not all(values):
        raise JobError(
            one_line(
                f"--sweep {text}: expected KEY=V1,V2 as in strategy.name=fedavg,scaffold; a value with a comma goes in "
                "quotes or brackets"
            )
        )
    return sides[0].strip(), tuple(values)


def _split(text: str, at: str) -> list[str]:
    """The parts of `text` between the letters `at` outside quotes and brackets; none if one of these stays open."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == at and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [] if quote or depth else parts


def _jobs(path: Path, settings: Sequence[str], repeat: int) -> list[Job]:
    """The job of one combination, once for each seed."""
    job = load_job(path, settings)
    if repeat == 1:
        return [job]
    tables = job.model_dump(exclude_none=True, mode="json")
    return [check_job({**tables, "seed": job.seed + i}, where=str(path)) for i in range(repeat)]


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of each key, as few as tell it from the others."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-size:]) for size in range(1, len(parts) + 1))
        others = [f".{other}" for other in keys if other != key]
        labels[key] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), key)
    return labels


def shown_value(text: str) -> str:
    """A swept value as a person reads it: a string without its quotes."""
    value = parsed_value(text)
    return one_line(value) if isinstance(value, str) else text


def parsed_value(text: str) -> Any:
    """A swept value as a job takes it."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # Not all that tomllib raises is its own: a number of 5,000 digits.
        return text


def _named(runs: Iterable[SweepRun], labels: Mapping[str, str], repeat: int) -> list[SweepRun]:
    """Give each run a folder name of safe characters; equal ones get a number."""
    taken: set[str] = set()
    named = []
    for run in runs:
        parts = [f"{labels[key]}-{shown_value(value)}" for key, value in run.settings.items()]
        parts += [f"seed-{run.job.seed}"] if repeat > 1 or not parts else []
        stem = "_".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts)[:LONGEST_NAME]
        stem = stem.lstrip("-._") or "run"
        name = next(n for i in itertools.count(1) if (n := f"{stem}-{i}" if i > 1 else stem).lower() not in taken)
        taken.add(name.lower())
        named.append(SweepRun(name, run.settings, run.job))
    return named

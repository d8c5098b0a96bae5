"""`fedchorus simulate | plan | resume | report | scenarios | ...`: what a researcher types. Heavy imports come late."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from simulations import export_commands

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.simulate import Watcher
    from simulations.sweep_view import Comparison

INTERRUPTED = 130
AsJson = Annotated[bool, typer.Option("--json", help="Progress to stderr; one JSON object as the last line of stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", help="Write the run there too: tensorboard, mlflow or wandb.", metavar="TRACKER[:WHERE]"),
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]


def add_to(app: typer.Typer) -> None:
    app.command(name="simulate", epilog="Example: fedchorus simulate hospitals --set training.rounds=5")(simulate)
    app.command(name="resume", epilog="Example: fedchorus resume runs/hospitals-20260101-120000")(resume)
    app.command(name="report", epilog="Example: fedchorus report runs/hospitals-20260101-120000")(report)
    app.command(name="track", epilog="Example: fedchorus track runs/hospitals-20260101-120000 tensorboard")(track)
    app.command(name="scenarios", epilog="Example: fedchorus scenarios --show hospitals > my-job.toml")(scenarios)
    app.command(name="strategies", epilog="Example: fedchorus strategies")(strategies)
    app.command(name="statistics", epilog="Example: fedchorus statistics runs/hospitals-statistics")(statistics)
    app.command(name="evaluate", epilog="Example: fedchorus evaluate runs/hospitals-20260101-120000")(evaluate)
    app.command(name="schema", epilog="Example: fedchorus schema my-job.toml")(schema)
    app.command(name="plan", epilog="Example: fedchorus plan hospitals --set training.rounds=100")(plan)
    export_commands.add_to(app)


def simulate(
    job: Annotated[
        str,
        typer.Argument(help="By default the scenario hospitals.", metavar="[SCENARIO | JOB.toml]", show_default=False),
    ] = "hospitals",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key: training.rounds=5; none removes it.", metavar="KEY=VALUE"),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="inline (default) or flower.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the model, the batches and the partition.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME-TIME.")] = None,
    after: Annotated[
        Path | None, typer.Option(help="An earlier run of the same sites: their ledgers and budgets go on.")
    ] = None,
    track: Track = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="Run the job with each value; with several, all combinations.", metavar="KEY=V,V"),
    ] = None,
    repeat: Annotated[int | None, typer.Option(help="Run each combination with so many seeds.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs of a sweep at a time; by default one a core.")] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out combinations that cannot run.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a federation of many clients on this machine, and compare it with training alone and pooled."""
    from privacy.errors import JobError
    from simulations.scenarios import job_path

    settings = list(overrides or [])
    settings += [f'simulation.engine="{engine}"'] if engine is not None else []
    settings += [f"seed={seed}"] if seed is not None else []
    path = job_path(job)
    for name, count in (("--repeat", repeat), ("--jobs", jobs)):
        if count is not None and count < 1:
            raise JobError(f"{name} {count}: expected 1 or more")
    if sweep or repeat is not None:
        if after is not None or track:
            raise JobError(
                "--after and --track are for one run, not for --sweep or --repeat; `fedchorus track` writes a run of a "
                "sweep into a tracker"
            )
        _sweep(path, settings, sweep or [], repeat or 1, jobs, out=out, skip_invalid=skip_invalid, as_json=as_json)
        return
    if jobs is not None or skip_invalid:
        raise JobError("--jobs and --skip-invalid are for --sweep or --repeat")
    from simulations.simulate import start_run
    from simulations.trackers import Tracking, choices
    from strategies.job import load_job

    trackers = choices(track or [])
    resolved = load_job(path, settings)
    with _watching(as_json) as watch, Tracking(trackers, watch.note) as tracking:
        now, watcher = datetime.now(), tracking.beside(watch.watcher)
        summary = start_run(resolved, out=out, parent=Path("runs"), watcher=watcher, now=now, after=after)
        watch.conclude(summary, tracking.conclude(summary))


def _sweep(
    path: Path,
    settings: Sequence[str],
    sweeps: Sequence[str],
    repeat: int,
    jobs: int | None,
    *,
    out: Path | None,
    skip_invalid: bool,
    as_json: bool,
) -> None:
    from simulations.sweep import SweepWatcher, grid_of, run_sweep
    from simulations.sweep_view import Comparison
    from simulations.sweep_workers import Processes, cores

    grid = grid_of(path, settings, sweeps, repeat=repeat)
    with _watching(as_json) as watch, Processes(min(jobs or cores(), max(1, len(grid.runs)))) as workers:
        watcher = SweepWatcher(begin=watch.sweep, tell=watch.note, status=watch.say, stop=watch.stops)
        swept = run_sweep(
            grid, out=out, parent=Path("runs"), workers=workers, skip_invalid=skip_invalid, now=datetime.now(),
            watcher=watcher,
        )  # fmt: skip
        watch.compare(None if swept is None else Comparison.of(swept))


def resume(
    run: Annotated[str, typer.Argument(help="A run folder, or for an operator a job.", metavar="RUN | JOB")],
    operator: Annotated[Path | None, typer.Option(help="Of a job: the operator's file.", metavar="FILE")] = None,
    track: Track = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a run, or a federation's job, from its last finished round; what was spent stays spent."""
    from privacy.errors import JobError
    from server.commands import has_operator, resume_job

    if not Path(run).exists() and (operator is not None or has_operator()):
        if track:
            raise JobError("--track is for a run of this machine; `fedchorus track` writes a job's folder once fetched")
        resume_job(run, operator=operator, as_json=as_json)
        return
    from simulations.simulate import resume_run
    from simulations.trackers import Tracking, choices

    with _watching(as_json) as watch, Tracking(choices(track or []), watch.note) as tracking:
        summary = resume_run(Path(run), watcher=tracking.beside(watch.watcher))
        watch.conclude(summary, tracking.conclude(summary))


def track(
    run: RunArgument,
    trackers: Annotated[
        list[str], typer.Argument(help="tensorboard[:FOLDER], mlflow[:URI], wandb[:PROJECT].", metavar="TRACKER...")
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's figures, settings and card into experiment trackers, from its folder or one that was fetched."""
    from simulations.trackers import choices, track_run

    shown = track_run(run, choices(trackers))
    typer.echo(json.dumps({"run": str(run), "tracked": shown}) if as_json else "\n".join(shown))


def report(run: RunArgument, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Write report.html again from what a finished run's folder holds."""
    from simulations.simulate import rewrite_report

    page = str(rewrite_report(run))
    typer.echo(json.dumps({"report": page}) if as_json else page)


def statistics(
    run: Annotated[Path, typer.Argument(help="A finished run of task statistics, or a file of one.", metavar="RUN")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what a statistics job measured: means, deviations, quartiles, shares and missing values of all sites."""
    from strategies.statistics import read_statistics

    said = read_statistics(run)
    if as_json:
        typer.echo(json.dumps(said))
        return
    from rich.console import Console

    from simulations.statistics_view import print_statistics

    print_statistics(Console(), said)


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="A finished run that trained, or one that evaluated (or its file).", metavar="RUN")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of a new evaluation: evaluation.sites=20.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The new run folder; by default runs/NAME-TIME.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a finished run's model on all sites' test rows as one sum: AUC, F1, calibration, groups, sites.

    Of a run that evaluated it shows what was measured. A federation's model is evaluated by a job of its own
    (docs/evaluation.md).
    """
    from privacy.errors import JobError
    from simulations.simulate import start_run
    from strategies.figures import read_evaluation
    from strategies.job import evaluation_job, stored_job

    measured = run
    if run.is_dir() and (run / "job.toml").is_file() and stored_job(run / "job.toml").evaluation is None:
        resolved = evaluation_job(run, list(overrides or []))
        with _watching(as_json) as watch:
            now = datetime.now()
            summary = start_run(resolved, out=out, parent=Path("runs"), watcher=watch.watcher, now=now)
            measured = watch.measured(summary)
    elif overrides or out is not None:
        raise JobError(f"{run}: --set and --out are for a new evaluation of a run that trained")
    said = read_evaluation(measured)
    if as_json:
        typer.echo(json.dumps({"run": str(measured), **said}))
        return
    from rich.console import Console

    from simulations.evaluation_view import print_evaluation

    print_evaluation(Console(), said)


def schema(
    job: Annotated[str, typer.Argument(help="A job whose records are here.", metavar="SCENARIO | JOB.toml")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the job.", metavar="KEY=VALUE")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Say how each site's table differs from the job's schema, and in units from the others; exit 1 if any does."""
    from simulations.scenarios import job_path
    from simulations.schemas import schema_differences
    from strategies.job import load_job

    found = schema_differences(load_job(job_path(job), list(overrides or [])))
    if as_json:
        typer.echo(json.dumps({"sites": found}))
    else:
        for site, differences in found.items():
            for difference in differences or ["as the schema says"]:
                typer.echo(f"{site}: {difference}")
    if any(found.values()):
        raise typer.Exit(1)


def scenarios(
    show: Annotated[str | None, typer.Option(help="Print one scenario's job file.", metavar="NAME")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List the scenarios that ship with fedchorus."""
    from simulations.scenarios import describe, scenario_names, scenario_path

    if show is not None:
        typer.echo(scenario_path(show).read_text(encoding="utf-8"), nl=False)
    elif as_json:
        typer.echo(json.dumps({name: describe(name) for name in scenario_names()}))
    else:
        for name in scenario_names():
            typer.echo(f"{name:<24}{describe(name)}")


def strategies(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """List the strategies, and which kinds of protection a job may have with each."""
    from rich.console import Console
    from rich.table import Column, Table

    from strategies.catalogue import STRATEGIES
    from strategies.composition import matrix

    table = matrix(STRATEGIES)
    if as_json:
        typer.echo(json.dumps(table))
        return
    kinds = (Column(kind, overflow="fold") for kind in next(iter(table.values())))
    shown = Table(Column("strategy", no_wrap=True), *kinds, box=None)
    for name, row in table.items():
        shown.add_row(name, *("yes" if why is None else "no" for why in row.values()))
    console = Console()
    console.print(shown)
    for why in dict.fromkeys(why for row in table.values() for why in row.values() if why):
        console.print(f"no: {why}", highlight=False, soft_wrap=True, markup=False)


def plan(
    job: Annotated[
        str | None, typer.Argument(help="What to plan; without one, a calculator.", metavar="[SCENARIO | JOB.toml]")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the job.", metavar="KEY=VALUE")
    ] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise on the sum, in clip norms.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Find the noise that costs this much.")] = None,
    sampling_rate: Annotated[
        str | None,
        typer.Option(help="Each unit's chance to be in a step: 0.01 or 256/60000. By default 1.", metavar="RATE"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Releases; of shuffled batches, epochs.")] = None,
    delta: Annotated[float | None, typer.Option(help="Well below one over the rows.")] = None,
    phase: Annotated[
        list[str] | None, typer.Option(help="Noise, rate and steps; repeat it to compose.", metavar="Z,Q,T")
    ] = None,
    replace_one: Annotated[bool, typer.Option("--replace-one", help="A neighbour replaces a unit.")] = False,
    scheme: Annotated[str | None, typer.Option(help="poisson, none (shuffled) or without-replacement.")] = None,
    rows: Annotated[int | None, typer.Option(help="Refuse a delta of one over so many or more.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Say what a job would cost in privacy and in noise, before anything is spent; or answer for a few numbers."""
    began = time.perf_counter()
    from rich.console import Console

    from privacy.errors import JobError
    from simulations.calculator import calculate, print_answer

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # A pipe has no edge to wrap at.
    asked = {
        "noise_multiplier": noise_multiplier, "epsilon": epsilon, "sampling_rate": sampling_rate, "steps": steps,
        "delta": delta, "phase": phase or None, "replace_one": replace_one or None, "scheme": scheme, "rows": rows,
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
    if job is None:
        if overrides or not given:
            raise JobError("give a job (fedchorus plan hospitals), or noise, rate, steps and delta; see --help")
        answer = calculate(
            noise_multiplier=noise_multiplier, target_epsilon=epsilon, sampling_rate=sampling_rate, steps=steps,
            delta=delta, phases=phase or [], replace_one=replace_one, scheme=scheme, rows=rows,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(answer))
        else:
            print_answer(console, answer, delta=delta or 0.0)
        return
    if given:
        raise JobError(f"{given[0]} is for the calculator and cannot go with a job; change {job} with --set")
    from simulations.cautions import cautions
    from simulations.plan_view import as_record, print_plan
    from simulations.planning import JobPlan
    from simulations.scenarios import job_path
    from strategies.job import load_job

    planned = JobPlan.of(load_job(job_path(job), list(overrides or [])))
    warnings = cautions(planned)
    result = as_record(planned, warnings)
    seconds = time.perf_counter() - began
    if as_json:
        typer.echo(json.dumps({**result, "seconds": round(seconds, 3)}))
    else:
        print_plan(console, planned, warnings, seconds=seconds)


class _Watch:
    """Shows a run to a person and listens for Ctrl-C: once ends it after the round, twice at once."""

    def __init__(self, console: Console, as_json: bool, live: ExitStack) -> None:
        self._console, self._as_json, self._live = console, as_json, live
        self._interrupts = 0
        self._path: Path | None = None
        self._go_on = ""
        self._measures: str | None = None
        self._status: Any = None
        self._table: Any = None

    @property
    def watcher(self) -> Watcher:
        from simulations.simulate import Watcher

        return Watcher(begin=self._begin, status=self.say, round=self._show_round, stop=self.stops)

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def stops(self) -> bool:
        return self._interrupts > 0

    def conclude(self, summary: Mapping[str, Any] | None, tracked: Sequence[str] = ()) -> None:
        """Print the end of a run, or how to go on with one that was stopped (exit code 130)."""
        from simulations.progress import print_summary

        self._live.close()
        if summary is None:
            self.stopped()
        print_summary(self._console, summary, report=f"{summary['run']}/report.html")
        if self._measures is not None:
            from strategies.measured import SHOWN_BY

            self._console.print(f"figures fedchorus {SHOWN_BY[self._measures]} {summary['run']}", soft_wrap=True)
        for command in tracked:
            self.note(f"tracked {command}")
        if self._as_json:
            typer.echo(json.dumps(summary))

    def measured(self, summary: Mapping[str, Any] | None) -> Path:
        """The folder of a run that measured; what it says comes after."""
        self._live.close()
        if summary is None:
            self.stopped()
        return Path(summary["run"])

    def sweep(self, path: Path) -> None:
        """From here on there is something to go on with."""
        self._path, self._go_on = path, f"the same command with --out {path}"

    def compare(self, compared: Comparison | None) -> None:
        """Write and print what a sweep found; exit code 1 where a run of it failed."""
        from simulations.sweep_view import print_sweep

        self._live.close()
        if compared is None:
            self.stopped()
        compared.write()
        print_sweep(self._console, compared)
        if self._as_json:
            typer.echo(json.dumps(compared.record()))
        if compared.swept.failed:
            raise typer.Exit(1)

    def stopped(self) -> NoReturn:
        if self._path is None:
            self._console.print("stopped before the run began: nothing was written")
        else:
            self._console.print(f"stopped; go on with: {self._go_on}", soft_wrap=True, markup=False)
        raise typer.Exit(INTERRUPTED)

    def interrupted(self, signum: int, frame: object) -> None:
        self._interrupts += 1
        if self._interrupts > 1 or self._path is None:
            raise KeyboardInterrupt
        self._console.print("finishing this round; press Ctrl-C again to stop at once")

    def _begin(self, path: Path, job: Any) -> None:
        from simulations.progress import RoundTable
        from strategies.measured import measures

        self._path, self._measures, self._go_on = path, measures(job), f"fedchorus resume {path}"
        self.say("")
        title = f"{job.name}: {job.training.rounds} rounds, {job.simulation.engine} engine, job {job.hash[:12]}"
        self._table = self._live.enter_context(RoundTable(self._console, rounds=job.training.rounds, title=title))

    def _show_round(self, line: Mapping[str, Any]) -> None:
        self._table.add(line)

    def say(self, text: str) -> None:
        if self._table is None and self._console.is_terminal:
            if self._status is None:
                self._status = self._live.enter_context(self._console.status(""))
            if text:
                self._status.update(text)
            else:
                self._status.stop()


@contextmanager
def _watching(as_json: bool) -> Iterator[_Watch]:
    from rich.console import Console

    with ExitStack() as live:
        console = Console(stderr=as_json)
        if not console.is_terminal:
            console.width = max(console.width, 120)  # A pipe has no edge to wrap at.
        watch = _Watch(console, as_json, live)
        before: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, watch.interrupted)
        try:
            yield watch
        except KeyboardInterrupt:
            live.close()
            watch.stopped()
        finally:
            signal.signal(signal.SIGINT, before)

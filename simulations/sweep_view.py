"""A sweep compared: one row a combination on the terminal, one row a run as CSV, and a page with one picture."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from privacy.record_folder import RecordFolder
from simulations import charts, page, shown
from simulations.charts import Markup, element, finite
from simulations.headline import Headline, headline
from simulations.run_folder import RunFolder
from simulations.sweep import SweepRun, Swept, in_a_line, parsed_value, shown_value
from strategies.catalogue import strategy_for
from strategies.parameters import Parameters
from strategies.total import layout_for

LOGARITHMIC = 10  # Values further apart than this factor are drawn on a logarithmic axis.
SHORT = 11  # Characters that fit beside a bar.


@dataclass(frozen=True)
class Row:
    """One combination over its finished runs: means, and the largest epsilons. What no run states is None."""

    settings: Mapping[str, str]
    finished: int
    scored: int  # Of those finished, how many have the metric that is compared.
    asked: int
    mean: float | None
    deviation: float | None  # The standard deviation over seeds; None of one run.
    worst_site: float | None
    own_models: float | None
    epsilon_record: float | None
    epsilon_client: float | None
    upload_bytes: float | None
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """A sweep's combinations by the one metric that its runs are compared by."""

    swept: Swept
    metric: Headline
    rows: Sequence[Row]

    @classmethod
    def of(cls, swept: Swept) -> Comparison:
        scored = [summary.get("metrics") or {} for summary in swept.summaries.values()]
        metric = headline({name: value for one in scored for name, value in one.items() if value is not None})
        left_out = [one.settings for one in swept.left_out]
        combinations = [runs for runs in swept.grid.combinations() if runs[0].settings not in left_out]
        return cls(swept, metric, [_row(swept, runs, metric) for runs in combinations])

    @property
    def private(self) -> bool:
        return any(row.epsilon_record is not None or row.epsilon_client is not None for row in self.rows)

    def columns(self) -> dict[str, Callable[[Row], str]]:
        """The figures' columns, by their heads: those that any row has."""
        metric = self.metric
        repeated = any(row.asked > 1 or row.finished < row.asked for row in self.rows)
        known: dict[str, tuple[bool, Callable[[Row], str]]] = {
            "runs": (repeated, lambda row: f"{row.finished}/{row.asked}"),
            metric.title: (True, partial(spread_text, metric)),
            "worst site": (True, lambda row: metric.form(row.worst_site)),
            "own models": (self._any("own_models"), lambda row: metric.form(row.own_models)),
            "epsilon spent": (True, lambda row: shown.upward(row.epsilon_record)),
            "of a site": (self._any("epsilon_client"), lambda row: shown.upward(row.epsilon_client)),
            "KB up": (True, lambda row: shown.thousands(row.upload_bytes)),
            "seconds": (True, lambda row: shown.number(row.seconds, lambda seconds: f"{seconds:.1f}")),
        }
        return {head: form for head, (there, form) in known.items() if there}

    def _any(self, name: str) -> bool:
        return any(getattr(row, name) is not None for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """What the table does not say by itself."""
        number = len(self.swept.summaries)
        notes = [
            f"{self.metric.title} on all sites' test rows, mean ± standard deviation over seeds; worst site: the mean "
            "of each run's worst; KB up: what a site sends in a round"
        ]
        if without := sum(row.finished - row.scored for row in self.rows):
            notes.append(f"Runs in which {self.metric.title} is not defined, so that no mean has them: {without}.")
        if self.private and number > 1:
            notes.append(
                f"Epsilon is that of each run by itself. Only a simulation may try {number} runs at the price of one: "
                "on real records every try is paid for, and their epsilons add up."
            )
        return notes

    def write(self) -> None:
        """Put sweep.csv and sweep.html beside the runs."""
        folder = RecordFolder(self.swept.path)
        folder.write_text("sweep.csv", csv_text(self))
        folder.write_text("sweep.html", render_sweep(self))

    def record(self) -> dict[str, Any]:
        """Everything that is shown, in JSON's types."""
        swept = self.swept
        return {
            "sweep": str(swept.path),
            "metric": self.metric.name,
            "comparison": [{**vars(row), "settings": dict(row.settings)} for row in self.rows],
            "runs": {name: str(swept.path / name) for name in swept.summaries},
            "failed": dict(swept.failed),
            "left_out": [{"settings": dict(one.settings), "why": one.why} for one in swept.left_out],
        }


def spread_text(metric: Headline, row: Row) -> str:
    return metric.form(row.mean) + ("" if row.deviation is None else f" ± {metric.form(row.deviation)}")


def print_sweep(console: Console, compared: Comparison) -> None:
    """The table, what it means, what failed, and where the rest is."""
    grid, path, columns = compared.swept.grid, compared.swept.path, compared.columns()
    table = Table(*(grid.labels[key] for key in grid.keys), *columns, box=box.SIMPLE_HEAD)
    for column in table.columns[len(grid.keys) :]:
        column.justify = "right"
    for row in compared.rows:
        figures = (form(row) for form in columns.values())
        table.add_row(*(shown_value(value) for value in row.settings.values()), *figures)
    console.print(table, markup=False)
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    for note in compared.notes:
        say(note)
    for name, why in compared.swept.failed.items():
        say(f"failed  {path / name}: {why}")
    if compared.swept.failed:
        say(f"again   the same command with --out {path}")
    say(f"sweep   {path}\npage    {path}/sweep.html\nfigures {path}/sweep.csv")


def csv_text(compared: Comparison) -> str:
    """One row a run, in the order of the grid, with every metric of its model on all sites' test rows."""
    swept, metric = compared.swept, compared.metric
    names = dict.fromkeys(name for summary in swept.summaries.values() for name in summary["metrics"])
    heads = ["run", *swept.grid.keys, "seed", "state", *names, f"worst_site_{metric.name}"]
    heads += ["epsilon_record", "epsilon_client", "upload_bytes", "seconds"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(heads)), lineterminator="\n")  # A swept seed has one column.
    writer.writeheader()
    left_out = [one.settings for one in swept.left_out]
    uploads = {tuple(row.settings.values()): row.upload_bytes for row in compared.rows}
    for run in swept.grid.runs:
        summary = swept.summaries.get(run.name)
        cells = {"run": run.name, **{key: shown_value(value) for key, value in run.settings.items()}}
        cells["seed"] = str(run.job.seed)
        cells["state"] = "finished" if summary else "left out" if run.settings in left_out else "failed"
        figures: dict[str, object] = {}
        if summary is not None:
            figures = {name: summary["metrics"].get(name) for name in names}
            figures[f"worst_site_{metric.name}"] = _worst(summary, metric)
            figures |= {f"epsilon_{unit}": summary["epsilon"][unit] for unit in ("record", "client")}
            figures |= {"upload_bytes": uploads[tuple(run.settings.values())], "seconds": summary["seconds"]}
        writer.writerow({**cells, **{head: figure for head, figure in figures.items() if figure is not None}})
    return text.getvalue()


def render_sweep(compared: Comparison) -> str:
    """The page: the picture, the table, and each run with a link to its report. Deterministic."""
    swept, grid, columns = compared.swept, compared.swept.grid, compared.columns()
    name = grid.runs[0].job.name
    labels = [grid.labels[key] for key in grid.keys]
    rows = [
        [*map(shown_value, row.settings.values()), *(form(row) for form in columns.values())] for row in compared.rows
    ]
    heads, words = [*labels, *columns], set(range(max(1, len(labels))))
    table = page.table("By combination", heads, rows, words=words)
    runs = [
        [_link(run), grid.title(run), in_a_line(swept.summaries[run.name])]
        for run in grid.runs
        if run.name in swept.summaries
    ]
    runs += [[run, "-", f"failed: {why}"] for run, why in swept.failed.items()]
    runs += [["left out", grid.words(one.settings), one.why] for one in swept.left_out]
    notes = [element("p", note) for note in compared.notes]
    told = f"{len(swept.summaries)} runs finished, {len(swept.failed)} failed, {len(swept.left_out)} left out"
    body = element(
        "body",
        element("header", element("h1", name), element("p", f"A sweep: {told}.", class_="lede")),
        element(
            "main",
            page.section(
                "picture",
                f"{compared.metric.title} by setting",
                page.columns(picture(compared), element("div", *notes)),
            ),
            page.section("comparison", "The comparison", table),
            page.section("runs", "Every run", page.table("Runs", ["Folder", "Settings", "Outcome"], runs, {0, 1, 2})),
        ),
        element("footer", element("p", "This page loads nothing and runs nothing: no script, font, image or request.")),
    )
    return page.document(f"{name} · fedchorus sweep", body)


def picture(compared: Comparison) -> Markup:
    """The metric over the first swept key of numbers, a line for each combination of the others; else a bar each."""
    grid, metric = compared.swept.grid, compared.metric
    axis = next((key for key, values in grid.keys.items() if _numbers(values)), None)
    if axis is not None and any(row.mean is not None for row in compared.rows):
        return page.captioned(f"{metric.title} by {grid.labels[axis]}", _curves(compared, axis))
    names = [", ".join(map(shown_value, row.settings.values())) or "the job" for row in compared.rows]
    if any(len(name) > SHORT for name in names) or len(set(names)) < len(names):
        names = [f"row {number}" for number in range(1, len(names) + 1)]
    bars = {name: finite(row.mean) for name, row in zip(names, compared.rows, strict=True)}
    told = "; ".join(f"{name}: {spread_text(metric, row)}" for name, row in zip(names, compared.rows, strict=True))
    chart = charts.bar_chart("sweep", metric.title, told, bars, x_label=metric.name, percent=metric.share)
    return page.captioned(f"{metric.title} by combination, as in the table below", chart)


def _row(swept: Swept, runs: Sequence[SweepRun], metric: Headline) -> Row:
    done = [swept.summaries[run.name] for run in runs if run.name in swept.summaries]

    def known(figure: Callable[[Mapping[str, Any]], object]) -> list[float]:
        return [number for number in map(shown.as_number, map(figure, done)) if number is not None]

    def mean(figure: Callable[[Mapping[str, Any]], object]) -> float | None:
        return statistics.fmean(values) if (values := known(figure)) else None

    reached = known(lambda summary: summary["metrics"].get(metric.name))
    first = next((run for run in runs if run.name in swept.summaries), None)
    return Row(
        settings=runs[0].settings,
        finished=len(done),
        scored=len(reached),
        asked=len(runs),
        mean=statistics.fmean(reached) if reached else None,
        deviation=statistics.stdev(reached) if len(reached) > 1 else None,
        worst_site=mean(lambda summary: _worst(summary, metric)),
        own_models=mean(lambda summary: (summary.get("personal") or {}).get(metric.name)),
        epsilon_record=max(known(lambda summary: summary["epsilon"]["record"]), default=None),
        epsilon_client=max(known(lambda summary: summary["epsilon"]["client"]), default=None),
        upload_bytes=None if first is None else _upload(swept, first),
        seconds=mean(lambda summary: summary["seconds"]),
    )


def _worst(summary: Mapping[str, Any], metric: Headline) -> float | None:
    reached = [number for site in summary["sites"].values() if (number := finite(site.get(metric.name))) is not None]
    return min(reached, key=lambda value: metric.gain(value, 0.0), default=None)


def _upload(swept: Swept, run: SweepRun) -> float | None:
    """Bytes a site sends in a round: as counted, of secure sums; else four for each number of a contribution."""
    sums = swept.summaries[run.name].get("secure_aggregation")
    if sums is not None:
        return shown.as_number(sums.get("upload_bytes"))
    parameters, _ = Parameters.load(RunFolder(swept.path / run.name).model)
    return 4.0 * layout_for(run.job, parameters, strategy_for(run.job).traits).size


def _link(run: SweepRun) -> Markup:
    return element("a", run.name, href=f"{run.name}/report.html")


# --- the picture ----------------------------------------------------------------------------------------------------


def _numbers(values: Sequence[str]) -> dict[str, float]:
    """The numbers among a key's values; nothing unless there are two, and besides them only `none`."""
    parsed = {value: parsed_value(value) for value in values}
    numbers = {
        text: float(value)
        for text, value in parsed.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and finite(value) is not None
    }
    others = [value for text, value in parsed.items() if text not in numbers]
    return numbers if len(set(numbers.values())) > 1 and all(value == "none" for value in others) else {}


def _curves(compared: Comparison, axis: str) -> Markup:
    """Means with bars of one standard deviation over the values of `axis`; `none` stands apart, at the right."""
    grid, metric = compared.swept.grid, compared.metric
    numbers = _numbers(grid.keys[axis])
    lines: dict[str, dict[str, Row]] = {}
    for row in compared.rows:
        others = [shown_value(value) for key, value in row.settings.items() if key != axis]
        lines.setdefault(", ".join(others) or "all runs", {})[row.settings[axis]] = row
    ends = [
        row.mean + sign * (row.deviation or 0.0) for row in compared.rows if row.mean is not None for sign in (-1, 1)
    ]
    marks = charts.ticks(min(ends), max(ends))
    left, right, top, bottom, height = 64.0, charts.WIDTH - 150.0, 20.0, 236.0, 282.0
    last = right - 50 if len(numbers) < len(grid.keys[axis]) else right - 10
    across = dict.fromkeys(grid.keys[axis], last + 50) | _placed(numbers, left + 14, last)

    def up(value: float) -> float:
        return bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - top)

    parts = [element("line", class_="grid", x1=left, y1=up(mark), x2=right, y2=up(mark)) for mark in marks]
    parts += [element("text", metric.form(mark), class_="end", x=left - 8, y=up(mark) + 4) for mark in marks]
    parts += [element("text", text, class_="middle", x=x, y=bottom + 18) for text, x in across.items()]
    parts.append(element("text", grid.labels[axis], class_="middle", x=(left + right) / 2, y=height - 6))
    labels = []
    for i, (name, rows) in enumerate(lines.items()):
        aside = 4.0 * (i - (len(lines) - 1) / 2) if len(lines) < 6 else 0.0  # Bars beside, not over, each other.
        points = [
            (across[text] + aside, row.mean, row.deviation or 0.0, text in numbers)
            for text, row in sorted(rows.items(), key=lambda point: across[point[0]])
            if row.mean is not None
        ]
        if points:
            parts.append(_series(name, i, points, up))
            labels.append((up(points[-1][1]), points[-1][0], i, name))
    labels.sort()
    for (y, x, i, name), at in zip(labels, charts.apart([label[0] for label in labels], top, bottom, 15), strict=True):
        parts.append(element("path", class_=f"leader k{i % 5}", d=f"M{x + 6:.1f},{y:.1f}L{right + 10:.1f},{at:.1f}"))
        text = name if len(name) <= 18 else f"{name[:17]}…"
        parts.append(element("text", text, class_="name", x=right + 14, y=at + 4))
    told = "; ".join(
        f"{grid.words(row.settings)}: {spread_text(metric, row)}" for row in compared.rows if row.mean is not None
    )
    return element(
        "svg",
        element("title", f"{metric.title} by {grid.labels[axis]}", id="sweep-title"),
        element("desc", told, id="sweep-desc"),
        *parts,
        class_="chart",
        role="img",
        viewBox=f"0 0 {charts.WIDTH} {height:.0f}",
        aria_labelledby="sweep-title sweep-desc",
    )


def _placed(numbers: Mapping[str, float], first: float, last: float) -> dict[str, float]:
    """Where each number stands between `first` and `last`: by its logarithm if they are far apart."""
    low, high = min(numbers.values()), max(numbers.values())
    scale = math.log if low > 0 and high / low >= LOGARITHMIC else float
    share = {text: (scale(value) - scale(low)) / (scale(high) - scale(low)) for text, value in numbers.items()}
    return {text: first + part * (last - first) for text, part in share.items()}


def _series(
    name: str, number: int, points: Sequence[tuple[float, float, float, bool]], up: Callable[[float], float]
) -> Markup:
    """One line with its points (x, mean, deviation, whether the line goes through it) and their error bars."""
    kind, dash = f"k{number % 5}", None if number < 5 else "7 3"  # Five colours, then the same with dashes.
    path = "L".join(f"{x:.1f},{up(mean):.1f}" for x, mean, _, joined in points if joined)
    bars = "".join(
        f"M{x:.1f},{up(mean - error):.1f}V{up(mean + error):.1f}"
        + "".join(f"M{x - 3:.1f},{up(end):.1f}h6" for end in (mean - error, mean + error))
        for x, mean, error, _ in points
        if error > 0
    )
    return element(
        "g",
        element("title", name),
        element("path", class_=f"line {kind}", d=f"M{path}", stroke_dasharray=dash) if path else None,
        element("path", class_=f"line {kind}", d=bars) if bars else None,
        *(element("circle", class_=f"point {kind}", cx=x, cy=up(mean), r=4) for x, mean, _, _ in points),
    )

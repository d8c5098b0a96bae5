"""What a person sees while a run goes on: one row a round, and at the end what it was worth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from simulations.headline import HEADLINES, headline
from simulations.secure_sums import who_may_lie, who_saw_what

COLUMNS = ("round", "loss", "accuracy", "worst site", "epsilon", "of a site", "answered", "seconds", "ETA")
WIDTHS = (8, 9, 10, 26, 9, 11, 10, 9, 8)
SECURE_COLUMNS = ("KB up", "sum (s)")  # A site's upload in a round, and the time that summing securely took.
SECURE_WIDTHS = (9, 9)


class RoundTable:
    """A live table on a terminal; one plain line a round anywhere else. Secure sums have two columns more."""

    def __init__(self, console: Console, *, rounds: int, title: str) -> None:
        self._console, self._rounds, self._title = console, rounds, title
        self._rows: list[tuple[str, ...]] = []
        self._seconds: list[float] = []
        self._headline, self._named = HEADLINES[0].name, False
        self._columns: tuple[str, ...] = COLUMNS
        self._widths: tuple[int, ...] = WIDTHS
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        else:
            self._console.print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def add(self, line: Mapping[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        self._seconds.append(line["seconds"])
        left = (self._rounds - line["round"]) * sum(self._seconds) / len(self._seconds)
        worst = line.get("worst_site")
        epsilons = line["epsilon"].values()
        if not self._named and worst is not None:  # A round may go unscored.
            self._named, self._headline = True, headline(line).name
            self._columns = tuple(self._headline if column == "accuracy" else column for column in self._columns)
        row: tuple[str, ...] = (
            f"{line['round']}/{self._rounds}",
            figure(line.get("loss"), 4),
            figure(line.get(self._headline), 3),
            "-" if worst is None else f"{worst} {figure(line['sites'][worst].get(self._headline), 3)}",
            figure(max(epsilons, default=None), 3),
            figure(line.get("epsilon_client"), 3),
            f"{len(line['contributors'])}/{len(line['contributors']) + len(line['failures'])}",
            f"{line['seconds']:.2f}",
            time.strftime("%M:%S" if left < 3600 else "%H:%M:%S", time.gmtime(left)),
        )
        if (secure := line.get("secure")) is not None:
            if not self._rows:
                self._columns, self._widths = (*self._columns, *SECURE_COLUMNS), (*WIDTHS, *SECURE_WIDTHS)
            row += (f"{secure['upload_bytes'] / 1000:.1f}", f"{secure['seconds']:.2f}")
        if self._live is None and not self._rows:  # The first line says which columns there are.
            self._print_plain(self._columns)
        self._rows.append(row)
        if self._live is None:
            self._print_plain(row)
        else:
            self._live.update(self._table(), refresh=True)

    def _print_plain(self, row: tuple[str, ...]) -> None:
        cells = (f"{cell:>{width}}" for cell, width in zip(row, self._widths, strict=True))
        self._console.print("".join(cells), soft_wrap=True, highlight=False)

    def _table(self) -> Table:
        table = Table(*self._columns, title=self._title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in table.columns:
            column.justify = "right"
        fits = max(5, self._console.height - 8)
        for row in self._rows[-fits:]:
            table.add_row(*row)
        return table


def print_summary(console: Console, summary: Mapping[str, Any], *, report: str) -> None:
    """The comparison, the sites and what to do next; of a run that measured, no figures of its own."""
    shown = headline(summary["metrics"]).name
    others = [name for name in summary["metrics"] if name != shown]
    table = Table("", shown, *others, box=box.SIMPLE_HEAD, title="On all sites' test rows", title_justify="left")
    own = {"each site's own model (this run)": summary["personal"]} if summary.get("personal") else {}
    rows = {"federated (this run)": summary["metrics"], **own, **_comparison(summary)}
    for name, metrics in rows.items():
        table.add_row(name, figure(metrics.get(shown), 3), *(figure(metrics.get(other), 4) for other in others))
    measures = bool(summary.get("measures"))
    if not measures:
        console.print(table)
    heads = ("rows",) if measures else ("train", "test", shown, "alone")
    sites = Table("site", *heads, "epsilon", "delta", "noise", box=box.SIMPLE_HEAD)
    alone = summary["baselines"].get("local", {}).get("sites", {})
    listed = list(summary["sites"].items())
    for name, site in listed[:20]:
        reached = (str(site["test_rows"]), figure(site.get(shown), 3), figure(alone.get(name, {}).get(shown), 3))
        sites.add_row(
            name,
            str(site["train_rows"]),
            *(() if measures else reached),
            figure(site["epsilon"], 3),
            "-" if site["delta"] is None else f"{site['delta']:g}",
            figure(site["noise_multiplier"], 3),
        )
    console.print(sites)
    if len(listed) > 20:
        console.print(f"... and {len(listed) - 20} more sites in summary.json")
    if (whole := summary["epsilon"]["client"]) is not None:
        central, shared = summary["client"], summary["placement"] == "distributed"
        where = f"noise {figure(central['noise_multiplier'], 3)} on the sum" if central else "noise at each site"
        where = "a share of the noise from each site (zero-out: its update becomes zero)" if shared else where
        delta = central["delta"] if central else next(iter(summary["sites"].values()))["client"]["delta"]
        console.print(f"a whole site: epsilon {figure(whole, 3)}, delta {delta:g}, {where}", soft_wrap=True)
    if (texts := summary.get("texts")) is not None and texts["full"]:
        said = f"{texts['full']} of {texts['texts']} texts fill all {texts['length']} tokens that are read"
        console.print(f"{said}: what is longer is cut (data.columns.*.length)", soft_wrap=True)
    if (sums := summary.get("secure_aggregation")) is not None:
        _print_sums(console, sums)
    if summary["epsilon"]["record"] is None and whole is None:
        console.print("[bold]This run was not private[/]: set privacy.record in the job to protect each record.")
    elif summary["noise"] != "os":
        console.print("[bold]Noise was seeded[/]: this run repeats exactly and protects nobody.")
    console.print(
        f"run     {summary['run']}\nreport  {report}\naudit   fedchorus audit {summary['run']}", soft_wrap=True
    )


def _print_sums(console: Console, sums: Mapping[str, Any]) -> None:
    """What the server could see, and what that took; of a run without a round there are no costs."""
    for told in (who_saw_what(sums), who_may_lie(sums)):
        if told is not None:
            console.print(f"secure aggregation: {told}", soft_wrap=True, highlight=False)
    if "upload_bytes" in sums:
        up, down = (f"{sums[key] / 1000:.1f} KB" for key in ("upload_bytes", "download_bytes"))
        console.print(
            f"secure aggregation: {up} up and {down} down a site and round besides the model, {sums['seconds']:.2f} s "
            "a round at all sites and the server together",
            soft_wrap=True,
            highlight=False,
        )


def _comparison(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    names = {
        "local_private": "local-only, as private (each site alone)",
        "local": "local-only, no privacy (each site alone)",
        "pooled": "pooled, no privacy (all records in one place)",
    }
    return {name: summary["baselines"][key] for key, name in names.items() if key in summary["baselines"]}


def figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

"""An evaluation's result as a person reads it: figures with what they lie between, groups, and how sites are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from simulations import shown

RATES = ("accuracy", "precision", "recall", "specificity", "positive", "predicted", "mostly")
SHARES = frozenset({*RATES, "auc", "f1", "wape", "c_index"})


def print_evaluation(console: Console, said: Mapping[str, Any]) -> None:
    """Print what `strategies.evaluation.read_evaluation` returned; "-" stands for what no row or noise defines."""
    if not console.is_terminal:
        console.width = max(console.width, 120)  # A pipe has no edge to wrap at.
    model = {"shared": "the shared model", "own": "each site's own model"}[said["model"]]
    figures = Table(model, "value", "between", "± noise", box=box.SIMPLE_HEAD)
    for name, figure in said["figures"].items():
        figures.add_row(name.replace("_", " "), *_figure(name, figure))
    console.print(figures)
    if said.get("calibration"):
        console.print(_calibration(said["calibration"]))
    for column, groups in said["groups"].items():
        console.print(_groups(column, groups))
    for name, spread in said.get("by_site", {}).items():
        console.print(_spread(name, spread))
    console.print(_footing(said), soft_wrap=True)


def _figure(name: str, figure: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if figure is None:
        return "-", "-", "-"
    value, low, high, error = (_number(name, figure.get(key)) for key in ("value", "low", "high", "se"))
    exact = figure["low"] == figure["high"]
    return value, "exact" if exact else f"{low} and {high}", error if figure.get("se") else "-"


def _number(name: str, value: object) -> str:
    return shown.number(value, lambda number: f"{number:.4f}") if name in SHARES else shown.figure(value)


def _calibration(cells: list[Mapping[str, Any]]) -> Table:
    table = Table("predicted", "share of rows", "on average", "came true", box=box.SIMPLE_HEAD, title="Calibration")
    for cell in cells:
        table.add_row(
            f"{cell['from']:.2f} to {cell['to']:.2f}",
            shown.share(cell["share"]),
            shown.share(cell["predicted"]),
            shown.share(cell["observed"]),
        )
    return table


def _groups(column: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(column, *groups, box=box.SIMPLE_HEAD)
    table.add_row(
        "share of rows", *(shown.share(own["share"]) if own["share"] else "left out" for own in groups.values())
    )
    for name in dict.fromkeys(name for own in groups.values() for name in own["figures"]):
        table.add_row(name.replace("_", " "), *(_noisy(name, own["figures"].get(name)) for own in groups.values()))
    return table


def _noisy(name: str, figure: Mapping[str, Any] | None) -> str:
    value, _, error = _figure(name, figure)
    return value if error == "-" else f"{value} ± {error}"


def _spread(name: str, spread: Mapping[str, Any]) -> Table:
    table = Table(f"{name} of the sites", "value", "between", "± noise", box=box.SIMPLE_HEAD)
    for key in ("worst", "worst_tenth", "lowest_tenth", "median", "highest_tenth"):
        if key in spread:
            table.add_row(key.replace("_", " "), *_figure(name, spread[key]))
    table.add_row("sites that do not define it", shown.share(spread.get("undefined")), "", "")
    return table


def _footing(said: Mapping[str, Any]) -> str:
    lines = shown.of_whom(said, "test rows", f"model of job {said['of'][:12]}")
    if not said.get("epsilon"):
        lines.append("the sums are exact: nothing bounds what they tell about one row (privacy.record would)")
    if said["groups"] and said.get("smallest") is not None:
        lines.append(f"a site leaves out groups of fewer than {said['smallest']} of its rows")
    lines.append('what a figure lies "between" is what the public cells leave open; other test rows would move it too')
    return "\n".join(lines)

"""A statistics job's result as a person reads it: two tables, each figure with the standard error of its noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from simulations import shown
from strategies.statistics import MISSING, UNDECLARED


def print_statistics(console: Console, said: Mapping[str, Any]) -> None:
    """Print what `strategies.statistics.read_statistics` returned; "-" stands for what was not measured or is lost in
    noise."""
    if not console.is_terminal:
        console.width = max(console.width, 140)  # A pipe has no edge to wrap at.
    measured = {**said["columns"], **({f"{t['name']} (target)": t} if (t := said.get("target")) else {})}
    numbers = {name: own for name, own in measured.items() if own["type"] == "number"}
    categories = {name: own for name, own in measured.items() if own["type"] != "number"}
    if numbers:
        console.print(_numbers(numbers))
    if categories:
        console.print(_categories(categories))
    console.print(_footing(said), soft_wrap=True)


def _numbers(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(
        "number", "missing", "mean", "sd", "quartile 1", "median", "quartile 3", "outside", box=box.SIMPLE_HEAD
    )
    for name, own in columns.items():
        errors = own["se"]
        quartiles = zip(own.get("quartiles", [None] * 3), errors.get("quartiles", [None] * 3), strict=True)
        outside = None if own.get("below") is None else own["below"] + own["above"]
        table.add_row(
            name,
            _share(own.get(MISSING), errors.get(MISSING)),
            _figure(own.get("mean"), errors.get("mean")),
            _figure(own.get("sd"), errors.get("sd")),
            *(_figure(value, error) for value, error in quartiles),
            _share(outside, None),
        )
    return table


def _categories(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("category", MISSING, "shares of the rows that have a value", UNDECLARED, box=box.SIMPLE_HEAD)
    for name, own in columns.items():
        errors = own["se"]
        wide = errors.get("shares", {})
        shares = ", ".join(
            f"{value}: {_share(share, wide.get(value))}" for value, share in own.get("shares", {}).items()
        )
        table.add_row(
            name,
            _share(own.get(MISSING), errors.get(MISSING)),
            shares or "-",
            _share(own.get(UNDECLARED), errors.get(UNDECLARED)),
        )
    return table


def _footing(said: Mapping[str, Any]) -> str:
    lines = shown.of_whom(said, "rows", f"job {said['job'][:12]}")
    if said.get("se_of_a_share") is None:
        lines.append("how much noise is in the figures is not known here, so no standard errors are shown")
    if cells := [own["cell"] for own in said["columns"].values() if "cell" in own]:
        lines.append(f"quartiles come from {len(cells)} histograms: besides any noise they are off by at most one cell")
    return "\n".join(lines)


def _figure(value: object, error: object) -> str:
    return shown.figure(value) + (f" ± {shown.figure(error)}" if value is not None and error else "")


def _share(value: object, error: object) -> str:
    return shown.share(value) + (f" ± {shown.share(error)}" if value is not None and error else "")

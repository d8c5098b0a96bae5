"""A job's plan as a person and as a program reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.events import UNIT_RECORD, CorrelatedEvent, DistributedEvent
from simulations.calculator import figures
from simulations.cautions import Caution, named
from simulations.planning import JobPlan, Setting, Variant
from simulations.secure_sums import Figures, who_may_lie, who_saw_what

PLOT = 40  # Characters along the axis of a plot.


def as_record(plan: JobPlan, warnings: Sequence[Caution]) -> dict[str, Any]:
    """Everything that `print_plan` shows, in JSON's types."""
    return {
        "job": plan.job.name,
        "rounds": plan.job.training.rounds,
        "sites": len(plan.rows),
        "rows": plan.rows,
        "parameters": plan.parameters,
        "settings": [_setting_record(setting, plan.noise_l2(setting)) for setting in plan.settings],
        "settings_left_out": plan.left_out,
        "secure_aggregation": None if plan.secure is None else dict(plan.secure),
        "tables": {
            unit: {knob: [asdict(variant) for variant in variants] for knob, variants in table.items()}
            for unit, table in plan.tables.items()
        },
        "warnings": [asdict(warning) for warning in warnings],
    }


def print_plan(console: Console, plan: JobPlan, warnings: Sequence[Caution], *, seconds: float) -> None:
    """Show the figures, what the noise means, plots of epsilon against what could be changed, and the warnings."""
    console.print(
        f"{plan.job.name}: {plan.job.training.rounds} rounds, {len(plan.rows)} sites, {plan.parameters} parameters",
        highlight=False,
    )
    for line in () if plan.secure is None else _sums_in_words(plan.secure):
        console.print(escape(line), soft_wrap=True, highlight=False)
    if not plan.settings:
        console.print(
            "Not private: nothing bounds what the model tells of a record or a client. See [privacy].", markup=False
        )
        return
    console.print(_costs(plan.settings))
    if plan.left_out:
        console.print(f"... and {plan.left_out} more sizes of sites between these, each with its own noise")
    for setting in plan.settings:
        console.print(escape(_in_words(setting, plan.noise_l2(setting))), soft_wrap=True, highlight=False)
    for unit, knobs in plan.tables.items():
        console.print(_plots(unit, knobs, ascii_only=console.options.ascii_only))
    for warning in warnings:
        console.print(f"warning: {escape(warning.text)}", style="bold yellow", soft_wrap=True, highlight=False)
    console.print(f"{seconds:.1f} seconds; nothing was spent", highlight=False)


def _setting_record(setting: Setting, l2: float) -> dict[str, Any]:
    return {
        "unit": setting.unit,
        "placement": setting.placement,
        "who": list(setting.who),
        "units": list(setting.units),
        "noise_multiplier": setting.noise_multiplier,
        "sampling_rate": setting.rate,
        "rounds": setting.rounds,
        "releases": setting.event.count,
        "expected_size": setting.size,
        "delta": setting.own.delta,
        "target": setting.own.epsilon,
        **figures(setting.cost, setting.within),
        "error_of_the_mean": {
            "noise_per_coordinate": setting.noise_in_mean,
            "noise_l2": l2,
            "sampling_l2_bound": 1 / math.sqrt(setting.size),
        },
    }


def _costs(settings: Sequence[Setting]) -> Table:
    table = Table(
        "unit", "where", "units", "noise", "rate", "releases", "in a sum", "delta", "epsilon (PLD)", "(RDP)",
        "proven within", box=box.SIMPLE_HEAD, title="What all planned rounds cost", title_justify="left",
    )  # fmt: skip
    for setting in settings:
        fewest, most = setting.units
        table.add_row(
            setting.unit,
            escape(named(setting)),
            (f"{fewest}" if fewest == most else f"{fewest} to {most}")
            + (" rows" if setting.unit == UNIT_RECORD else " clients"),
            f"{setting.noise_multiplier:.4g}",
            f"{setting.rate:.4g}",
            str(setting.event.count),
            f"{setting.size:.4g}",
            f"{setting.own.delta:g}",
            f"{setting.cost.pld:.4f}",
            f"{setting.cost.rdp:.4f}",
            f"{setting.within.lower:.3f} to {setting.within.upper:.3f}" if setting.within else "-",
        )
    return table


def _in_words(setting: Setting, l2: float) -> str:
    of, what = ("rows", "gradients") if setting.unit == UNIT_RECORD else ("clients", "updates")
    least = " at the smallest" if setting.units[0] != setting.units[1] else ""
    counted = " (as it counts over all rounds)" if isinstance(setting.each, CorrelatedEvent) else ""
    told = (
        f"{named(setting)}: a mean of the {what} of {setting.size:.4g} {of}{least} carries noise of "
        f"{setting.noise_in_mean:.3g} clip norms on each coordinate, {l2:.3g} in L2{counted}; without any noise, which "
        f"{of} there happen to be moves it by up to {1 / math.sqrt(setting.size):.3g}"
    )
    if not isinstance(setting.each, DistributedEvent):
        return told
    return (
        f"{told}\n{named(setting)}: each adds a share of the noise, so nobody is trusted with it; shares are sized for "
        f"{setting.each.clients} honest survivors and charged for theirs alone, so a sum of all {setting.size:.4g} "
        "carries more; epsilon (by Rényi DP alone) is for one client's update becoming zero, while who takes part is "
        "public (zero-out)"
    )


def _sums_in_words(figures: Figures) -> list[str]:
    told, lies = who_saw_what(figures), who_may_lie(figures)
    fail = f"{figures['dropouts']} of {figures['sites_in_a_sum']} sites may fail in a round"
    holders = f"any {figures['threshold']} of a site's {figures['neighbours']} neighbours"
    up, down = (f"{figures[key] / 1000:.1f} KB" for key in ("upload_bytes", "download_bytes"))
    return [
        f"secure aggregation: {told}",
        *([f"secure aggregation: {lies}"] if lies is not None else []),
        f"secure aggregation: {fail}; {holders} together can take its masks away; {figures['bits']} bits a number, "
        f"{up} up and {down} down a site and round, besides the model",
    ]


def _plots(unit: str, knobs: Mapping[str, Sequence[Variant]], *, ascii_only: bool) -> Table:
    """Values beside a plot of epsilon on one logarithmic axis; a full mark and an arrow are the job's own."""
    costs = [variant.epsilon for variants in knobs.values() for variant in variants if variant.epsilon > 0] or [1.0]
    low, high = min(costs), max(costs)
    mark, own, rule, arrow = ("o", "#", ".", "<-") if ascii_only else ("○", "●", "·", "◄")
    table = Table(
        "varied", "value", "epsilon", "noise (L2)", f"{low:<{PLOT // 2}.3g}{high:>{PLOT // 2}.3g}", "",
        box=box.SIMPLE_HEAD, title_justify="left",
        title=f"{unit} level: one value changed, the others held; epsilon on a logarithmic axis",
    )  # fmt: skip
    for column in table.columns[1:4]:
        column.justify = "right"
    for knob, variants in knobs.items():
        for variant in variants:
            along = math.log(max(variant.epsilon, low) / low) / math.log(high / low) if high > low else 0.0
            at = round(along * (PLOT - 1))
            table.add_row(
                knob.replace("_", " ") if variant is variants[0] else "",
                f"{variant.value:.4g}",
                f"{variant.epsilon:.3g}",
                f"{variant.noise_l2:.3g}",
                rule * at + (own if variant.planned else mark) + rule * (PLOT - 1 - at),
                f"{arrow} this job" if variant.planned else "",
                end_section=variant is variants[-1],
            )
    return table

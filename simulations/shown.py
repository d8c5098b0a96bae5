"""Figures as text for the report: one that a run does not have reads "-", an infinite one "∞"."""

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from numbers import Real
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def as_number(value: object) -> float | None:
    """Return the value as a float, infinities included; None for NaN and what is no number."""
    number = float(value) if isinstance(value, Real) else math.nan
    return None if math.isnan(number) else number


def number(value: object, form: Callable[[float], str]) -> str:
    known = as_number(value)
    if known is None:
        return "-"
    return form(known) if math.isfinite(known) else ("∞" if known > 0 else "−∞")


def share(value: object) -> str:
    return number(value, lambda number: f"{number:.1%}")


def figure(value: object) -> str:
    return number(value, lambda number: f"{number:.3g}")


def count(value: object) -> str:
    return number(value, lambda number: f"{number:,.0f}")


def seconds(value: object) -> str:
    return number(value, lambda number: f"{number:.2f}")


def thousands(value: object) -> str:
    return number(value, lambda number: f"{number / 1000:,.1f}")


def kilobytes(value: object) -> str:
    return number(value, lambda number: f"{number / 1000:,.1f} KB")


def words(name: object) -> str:
    return str(name).replace("_", " ").replace("-", " ") if name != "-" else "-"


def upward(value: object) -> str:
    """Show an epsilon or a delta to three digits, rounded up: the page may not state less than was spent."""

    def form(number: float) -> str:
        up = Context(prec=3, rounding=ROUND_CEILING).create_decimal(f"{number:.9g}")
        if abs(up) >= Decimal("0.01"):
            return f"{up:.{max(0, 2 - up.adjusted())}f}"
        if not up or abs(up) >= Decimal("0.001"):
            return f"{up.normalize():f}"
        digits, _, exponent = f"{up.normalize():e}".partition("e")
        power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        return power if digits == "1" else f"{digits} × {power}"

    return number(value, form)


def of_whom(said: Mapping[str, Any], rows: str, job: str) -> list[str]:
    """Lines on whose `rows` a job measured, how they count, and what it spent (`strategies.measured.Finished.said`)."""
    mean = "each row counts alike" if said.get("weighting") == "rows" else "each site counts alike, whatever its rows"
    lines = [f"{count(said.get('rows'))} {rows} of {count(said.get('sites'))} sites; {mean}; {job}"]
    for unit, epsilon in said.get("epsilon", {}).items():
        lines.append(f"{unit}-level epsilon spent: {upward(epsilon)}; ± is the standard error from the noise")
    return lines


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

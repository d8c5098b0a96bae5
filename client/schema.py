"""How a site's table differs from a job's schema, one line each: which column and how, never a record's value.

What is said here is for the people at the site: `fedchorus doctor` prints it, nothing of it is sent.
"""

from __future__ import annotations

import difflib

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.statistics import value_places
from strategies.job_data import Column, Data

MOST_OUTSIDE = 0.01  # Of a column's numbers: a range that cuts off less was drawn for the bulk of them.


def differences(frame: pd.DataFrame, data: Data) -> list[str]:
    """What is not as `data` says, in the order of the schema; nothing for a table that fits."""
    found = []
    for name, column in data.columns.items():
        found += [f"column {name!r} {what}" for what in _of_column(frame, name, column)]
    target = f"the target column {data.target!r}"
    if data.target not in frame.columns:
        found.append(f"{target} {_absent(frame, data.target)}")
    elif data.target_type in (None, "class") and data.positive is None:
        classes: list[str | int | float] = data.classes if data.classes is not None else [0, 1]
        found += [f"{target} {what}" for what in _undeclared(frame[data.target], classes, "classes")]
    elif data.target_type in ("number", "time"):
        found += [f"{target} {what}" for what in _not_numbers(frame[data.target])]
    return found


def _of_column(frame: pd.DataFrame, name: str, column: Column) -> list[str]:
    if name not in frame.columns:
        return [_absent(frame, name)]
    values = frame[name]
    if len(values) and values.isna().all():
        return ["has no value in any row; is it called otherwise here?"]
    if column.type == "category":
        return _undeclared(values, column.values or [], "values")
    if column.type == "number":
        return [*_not_numbers(values), *_outside(values, column)]
    return []


def _absent(frame: pd.DataFrame, name: str) -> str:
    close = difflib.get_close_matches(name, [str(other) for other in frame.columns], n=1)
    if not close:
        folded = {str(other).casefold(): str(other) for other in frame.columns}
        close = difflib.get_close_matches(name.casefold(), folded, n=1)
        close = [folded[one] for one in close]
    return f"is absent; did you mean {close[0]!r}?" if close else "is absent, and no name in the table is like it"


def _undeclared(values: pd.Series, declared: list[str | int | float], what: str) -> list[str]:
    wrong = value_places(values, declared) == len(declared)
    if not (rows := int(wrong.sum())):
        return []
    others = values[wrong].astype(str)
    known = {str(value).strip().casefold() for value in declared}
    alike = int(others.str.strip().str.casefold().isin(known).sum())
    hint = f"; {alike} of them are, but for capitals or spaces" if alike else ""
    return [
        f"has {others.nunique()} different values, in {rows} of {len(values)} rows, that are not among the "
        f"{len(declared)} {what} of the job{hint}"
    ]


def _not_numbers(values: pd.Series) -> list[str]:
    wrong = values.notna() & pd.to_numeric(values, errors="coerce").isna()
    if not (rows := int(wrong.sum())):
        return []
    texts = values[wrong].astype(str).str.strip()
    commas = int(texts.str.fullmatch(r"[+-]?\d+,\d+").sum())
    hint = (
        f"; {commas} of them are numbers with a decimal comma" if commas else "; does data.missing list what is none?"
    )
    return [f"is text, where the job has a number, in {rows} of {len(values)} rows{hint}"]


def _outside(values: pd.Series, column: Column) -> list[str]:
    numbers = numbers_of(values)
    if column.range is None or not len(numbers):
        return []
    low, high = column.range
    below, above = float(np.mean(numbers < low)), float(np.mean(numbers > high))
    if below + above <= MOST_OUTSIDE:
        return []
    side = "above it" if not below else "below it" if not above else f"{above:.1%} above it"
    return [f"has {below + above:.1%} of its numbers outside [{low:g}, {high:g}], {side}; is it in another unit?"]


def numbers_of(values: pd.Series) -> NDArray[np.float64]:
    """The finite numbers among `values`."""
    numbers = np.asarray(pd.to_numeric(values, errors="coerce"), dtype=np.float64)
    return numbers[np.isfinite(numbers)]

"""A site's rows as phi(record), whose mean over the federation a statistics job releases (`strategies.statistics`).

Nothing here needs torch: the task that averages the rows is `client.statistics_task`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.data import Records, SiteData, held_out_rows, split
from privacy.errors import DataError
from strategies.job import Job
from strategies.job_data import Column, Data
from strategies.statistics import blocks_of, class_names, column_of, scale_of, size_of


def width(job: Job) -> int:
    """The number of coordinates of phi."""
    return size_of(blocks_of(job.data, job.task))


def phi(frame: pd.DataFrame, job: Job, *, where: str) -> Records:
    """Encode each row as phi (`strategies.statistics`): (n, width) float32 of L2 norm at most 1.

    Missing values and undeclared categories are counted, not refused; a table without rows to train on gets one in
    which everything is missing, so that its site takes part like any other. The target becomes class numbers, which
    only a simulation's partition looks at: 0 where it has none. Raises `DataError` for what is no number where one
    should be.
    """
    held_out = held_out_rows(frame, job.data)
    if not len(frame) or (held_out is not None and held_out.all()):
        frame = frame.reset_index(drop=True).reindex(range(len(frame) + 1))
        held_out = None if held_out is None else np.append(held_out, False)
    blocks = blocks_of(job.data, job.task)
    rows = np.zeros((len(frame), size_of(blocks)), dtype=np.float32)
    labelled, known = job.data.target_type in (None, "class"), len(class_names(job.data))
    classes = class_places(frame[job.data.target], job.data) if labelled else np.zeros(len(frame), dtype=np.int64)
    numbers: dict[str, NDArray[np.float64]] = {}
    for block in blocks:
        part = rows[:, block.slice]
        if block.kind == "labels":
            _mark(part, classes)
            continue
        column = column_of(job.data, block.column)
        if column.type == "category":
            places = value_places(frame[block.column], column.values or [])
            _mark(part, places if block.kind == "categories" else places - len(column.values or []) - 1)
            continue
        if block.column not in numbers:
            numbers[block.column] = as_numbers(frame[block.column], block.column, where=where)
        _measure(part, block.kind, numbers[block.column], column)
    rows *= np.float32(scale_of(blocks))
    return Records(rows, np.where(classes < known, classes, 0), held_out=held_out)


def measured(records: Records, data: Data, *, site: str, stratify: bool) -> SiteData:
    """The rows that a training job with the same split trains on: what it uses later says nothing of its test rows.

    A site with too few rows for a split, or with one class, is measured all the same; without test rows an evaluation
    finds one of zeros.
    """
    if records.held_out is None and math.ceil(data.test_fraction * len(records)) >= len(records):
        return SiteData(records, Records(np.zeros((1, records.features.shape[1]), np.float32), np.zeros(1, np.int64)))
    return split(records, data.model_copy(update={"allow_one_class": True}), site=site, stratify=stratify)


def as_numbers(values: pd.Series, name: str, *, where: str) -> NDArray[np.float64]:
    """(n,) float64, NaN where missing. Raises `DataError`, without a value, where there is text or an infinity."""
    parsed = pd.to_numeric(values, errors="coerce").astype(float)
    if wrong := int(((parsed.isna() & values.notna()) | np.isinf(parsed)).sum()):
        raise DataError(
            f"{where}: column {name!r}: {wrong} rows are not a finite number; data.missing lists what is none"
        )
    return np.asarray(parsed, dtype=np.float64)


def value_places(values: pd.Series, declared: Sequence[str | int | float]) -> NDArray[np.int64]:
    """(n,) int64: each value's place among the declared, their number where it is undeclared, one more where missing.

    Values are compared as numbers where all of the declared ones are numbers.
    """
    numeric = all(isinstance(value, int | float) for value in declared)
    keys = [float(value) if numeric else str(value) for value in declared]
    parsed = pd.to_numeric(values, errors="coerce").astype(float) if numeric else values.astype(str)
    places = parsed.map({key: place for place, key in enumerate(keys)}).to_numpy(dtype=np.float64, na_value=np.nan)
    places = np.where(np.isnan(places), len(keys), places)
    return np.where(values.isna().to_numpy(), len(keys) + 1, places).astype(np.int64)


def class_places(values: pd.Series, data: Data) -> NDArray[np.int64]:
    """(n,) int64: each target's class number, then as `value_places` has it."""
    if data.positive is None:
        return value_places(values, data.classes if data.classes is not None else [0, 1])
    places = value_places(values, data.positive)
    return np.where(places > len(data.positive), 3, np.where(places < len(data.positive), 1, 0))


def _mark(part: NDArray[np.float32], places: NDArray[np.int64]) -> None:
    """Write a one into each row of `part` ((n, k)) at its place, nothing where that is negative."""
    rows = np.flatnonzero(places >= 0)
    part[rows, places[rows]] = 1.0


def _measure(part: NDArray[np.float32], kind: str, numbers: NDArray[np.float64], column: Column) -> None:
    assert column.range is not None
    (low, high), present = column.range, ~np.isnan(numbers)
    if kind == "missing":
        part[~present, 0] = 1.0
        return
    values = numbers[present]
    if kind == "moments":
        # A middle that is rounded, in a range of few floats, would put u beyond 1, and phi beyond its norm.
        u = np.clip((np.clip(values, low, high) - (low + high) / 2) / ((high - low) / 2), -1.0, 1.0)
        part[present] = np.stack([u, u * u], axis=1)
        return
    bins = part.shape[1] - 2
    inside = np.clip((np.clip(values, low, high) - low) / (high - low) * bins, 0, bins - 1).astype(np.int64) + 1
    places = np.full(len(numbers), -1)
    places[present] = np.where(values < low, 0, np.where(values > high, bins + 1, inside))
    _mark(part, places)

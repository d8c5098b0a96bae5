"""A site's records: hold a table against the schema, encode it with public constants, split it.

Errors name the file, the column and how many rows are wrong; they never repeat a value, because a value is a record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.encodings import PADDING, Series, bags, lagged, lagged_names, pixels, windows
from client.tables import HELD_OUT
from client.tokens import answers, tagged, tokens
from privacy.errors import DataError
from strategies.job_data import Column, Data


@dataclass(frozen=True)
class Records:
    """Encoded rows: `features` (n, d) float32 and `target`: (n,) int64 class numbers from 0, or what the task is for.

    `kept` says of each row of the table that they came from whether it is here; None means all of them. `held_out` says
    which rows are for testing, where that is laid down; `groups` ((n, G) int64), for an evaluation, to which group of
    each of G columns a row belongs.
    """

    features: NDArray[np.float32]
    target: NDArray[Any]
    kept: NDArray[np.bool_] | None = None
    held_out: NDArray[np.bool_] | None = None
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: NDArray[np.int64]) -> Records:
        return Records(
            self.features[rows],
            self.target[rows],
            held_out=None if self.held_out is None else self.held_out[rows],
            groups=None if self.groups is None else self.groups[rows],
        )


@dataclass(frozen=True)
class SiteData:
    """One site's training and test rows. Training rows are what differential privacy covers."""

    train: Records
    test: Records


def class_count(data: Data) -> int:
    """How many classes the target has; of a next character, the alphabet and one for all others; 0 of a number or a
    text."""
    if data.target_type in ("number", "time", "text"):
        return 0
    if data.target_type == "next" and data.columns[data.target].type == "characters":
        return len(data.columns[data.target].alphabet or "") + 1
    return len(data.classes) if data.classes is not None else 2


def feature_names(data: Data) -> list[str]:
    """The encoded features in order: a category becomes one indicator for each value but the first."""
    names = lagged_names(data.target, data.forecast) if data.forecast is not None else []
    for name, column in data.columns.items():
        if column.type == "category":
            names += [f"{name}={value}" for value in (column.values or [])[1:]]
        else:
            parts = column.buckets or column.window or column.length or math.prod(column.shape or [1])
            names += [name] if column.type in ("number", "id") else [f"{name}[{part}]" for part in range(parts)]
    if data.target_length is not None:
        names += [f"{data.target}[{part}]" for part in range(data.target_length)]
    return names


def encode(frame: pd.DataFrame, data: Data, *, where: str, empty: bool = False) -> Records:
    """Check every column of `frame` against the schema and encode it.

    A number with a range is clipped to it and mapped onto [-1, 1], or standardised by the job's `mean` and `sd`, and
    with on_missing = "fill" the job says what stands for a missing value: its constants are public, so no statistic of
    these records enters. A missing target is never filled. Without complete rows it is refused, unless it may be
    `empty`. Raises `DataError`.
    """
    if empty and not len(frame):
        return Records(np.zeros((0, len(feature_names(data))), np.float32), np.zeros(0, np.int64))
    series = _series(frame, data, where) if data.forecast is not None else None
    if series is not None:
        frame = frame.iloc[series.rows]
    columns = {name: _parsed(frame[name], name, column, where) for name, column in data.columns.items()}
    if data.on_missing == "fill":
        columns = {name: _filled(values, data.columns[name]) for name, values in columns.items()}
    target, known = (series.target, np.ones(len(frame), dtype=bool)) if series else _targets(frame, data, where)
    complete = pd.Series(known, index=frame.index)
    for values in columns.values():
        complete &= values.notna()
    if not complete.all():
        if data.on_missing != "drop":
            targets = [data.target, *([data.event] if data.event else [])]
            names = [*columns, *targets] if data.on_missing == "refuse" else targets
            worst = max(names, key=lambda name: int(frame[name].isna().to_numpy().sum()))
            raise DataError(
                f"{where}: {int((~complete).sum())} of {len(frame)} rows have missing values "
                f'(most in column {worst!r}); mend them or set data.on_missing = "drop"'
            )
        target = target[complete.to_numpy()]
        columns = {name: values[complete] for name, values in columns.items()}
    if len(target) == 0 and empty:
        return Records(np.zeros((0, len(feature_names(data))), np.float32), target, kept=complete.to_numpy())
    if len(target) == 0:
        raise DataError(f"{where}: no rows" + (" left without missing values" if len(frame) else ""))
    parts = [series.features[complete.to_numpy()]] if series else []
    if data.target_type == "tags":
        features, target = _tagged(columns, target, data, where)
        parts.append(features)
    else:
        parts += [_encoded(columns[name], column) for name, column in data.columns.items()]
    if data.target_type == "text":  # What a model is to write it also reads, one token behind.
        parts.append(target)
    features = np.ascontiguousarray(np.concatenate(parts, axis=1), dtype=np.float32)
    held_out = series.held_out if series else held_out_rows(frame, data)
    kept = complete.to_numpy()
    return Records(
        features,
        target,
        kept=None if kept.all() else kept,
        held_out=None if held_out is None else held_out[kept],
    )


def split(records: Records, data: Data, *, site: str, stratify: bool = True) -> SiteData:
    """Training and test rows: as they are laid down, or by `data.test_fraction`. A site may have no row laid down to
    test on.

    With `stratify`, by class where every class has more than two rows and fits. Without, by a row's position in the
    table alone: then no record decides whether another is trained on, which is what record-level privacy needs.

    Raises `DataError` for a site that cannot train: too few rows, or one class only (`data.allow_one_class`).
    """
    training, testing = rows_apart(records, data, stratify=stratify)
    if records.held_out is not None:
        if not len(training):
            raise DataError(f"site {site}: all its rows are held out for testing: none is left to train on")
    elif len(records) < 2:
        raise DataError(f"site {site}: {len(records)} row is too few to train and test on")
    elif data.target_type in (None, "class") and len(np.unique(records.target)) < 2 and not data.allow_one_class:
        raise DataError(
            f"site {site}: all its rows are of one class, so it cannot learn to tell two apart; check "
            f"data.target ({data.target!r}), leave the site out, or set data.allow_one_class = true"
        )
    elif math.ceil(data.test_fraction * len(records)) == len(records):
        raise DataError(
            f"site {site}: {len(records)} rows leave none to train on at data.test_fraction = {data.test_fraction:g}"
        )
    elif not len(training) or not len(testing):
        raise DataError(f"site {site}: too few complete rows to train and test on")
    parts = SiteData(records.take(training), records.take(testing))
    return standardised(parts) if data.scaling == "site" else parts


def rows_apart(records: Records, data: Data, *, stratify: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows are for training and which for testing, as `split` has it; of a table that is too small to split all
    are for training."""
    from sklearn.model_selection import train_test_split

    if records.held_out is not None:
        return np.flatnonzero(~records.held_out), np.flatnonzero(records.held_out)
    kept = np.ones(len(records), dtype=bool) if stratify or records.kept is None else records.kept
    testing = math.ceil(data.test_fraction * len(kept))
    if len(kept) < 2 or testing == len(kept):
        return np.arange(len(records)), np.arange(0)
    # Without classes there are none to keep the shares of: all rows are alike.
    classes = data.target_type in (None, "class")
    counts = np.bincount(records.target, minlength=class_count(data)) if classes else np.array([len(records)])
    fits = min(testing, len(kept) - testing) >= np.count_nonzero(counts)
    by_class = stratify and classes and fits and counts[counts > 0].min() > 2
    train, test = (
        np.sort(rows)
        for rows in train_test_split(
            np.arange(len(kept)),
            test_size=data.test_fraction,
            random_state=data.split_seed,
            stratify=records.target if by_class else None,
        )
    )
    index = np.cumsum(kept) - 1
    return index[train[kept[train]]], index[test[kept[test]]]


def standardised(parts: SiteData) -> SiteData:
    """By the mean and standard deviation of this site's own training rows. Never with record-level privacy."""
    # In float64, where the mean of equal float32 values is exact: a constant column has a spread of zero, not of its
    # rounding errors.
    mean = parts.train.features.mean(axis=0, dtype=np.float64)
    spread = parts.train.features.std(axis=0, dtype=np.float64)
    spread[spread == 0] = 1.0

    def scaled(records: Records) -> Records:
        return replace(records, features=((records.features - mean) / spread).astype(np.float32))

    return SiteData(scaled(parts.train), scaled(parts.test))


def _parsed(values: pd.Series, name: str, column: Column, where: str) -> pd.Series:
    if column.type == "image":
        return _images(values, name, column, where)
    numeric = column.type == "category" and _numeric(column.values or [])
    if column.type in ("number", "id") or numeric:
        largest = float(np.finfo(np.float64 if column.range else np.float32).max)
        parsed = _numbers(values, name, where, largest=largest)
    else:
        parsed = values.astype(object).where(values.isna(), values.astype(str))
    if column.type == "id":
        count = column.count or 0
        wrong = parsed.notna() & ~(parsed.between(1, count) & (parsed == parsed.round()))
        _refuse_rows(wrong, name, f"not a whole number from 1 to {count}", where)
    if column.type == "category":
        allowed = [float(value) if numeric else str(value) for value in column.values or []]
        _refuse_rows(
            parsed.notna() & ~parsed.isin(allowed), name, f"not among the schema's {len(allowed)} values", where
        )
    return parsed


def _numbers(values: pd.Series, name: str, where: str, *, largest: float, what: str = "not a number") -> pd.Series:
    parsed: pd.Series = pd.to_numeric(values, errors="coerce").astype(float)
    _refuse_rows(parsed.isna() & values.notna(), name, what, where)
    _refuse_rows(parsed.abs() > largest, name, "not finite", where)
    return parsed


def _images(values: pd.Series, name: str, column: Column, where: str) -> pd.Series:
    shapes = {tuple(column.shape or []), (*(column.shape or []), 1)}
    wrong = [not (isinstance(v, np.ndarray) and v.dtype == np.uint8 and v.shape in shapes) for v in values]
    shape = " x ".join(map(str, column.shape or []))
    _refuse_rows(pd.Series(wrong, index=values.index), name, f"not an image of {shape} 8-bit numbers", where)
    return values


def _filled(values: pd.Series, column: Column) -> pd.Series:
    assert column.fill is not None, "the job's schema was checked"
    numeric = column.type == "number" or _numeric(column.values or [])
    return values.where(values.notna(), float(column.fill) if numeric else str(column.fill))


def _targets(frame: pd.DataFrame, data: Data, where: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """What is to be predicted of each row, and for which rows it is there."""
    values = frame[data.target]
    if data.target_type in ("next", "text", "tags"):
        texts = ["" if missing else str(text) for text, missing in zip(values, values.isna(), strict=True)]
        return _text_target(texts, data), values.notna().to_numpy()
    if data.target_type == "number":
        numbers = _number_target(values, data, where)
        return numbers.fillna(0.0).to_numpy(dtype=np.float32), numbers.notna().to_numpy()
    if data.target_type == "time":
        time, event = _number_target(values, data, where), _event(frame, data, where)
        known = (time.notna() & event.notna()).to_numpy()
        return np.stack([time.fillna(0.0), event.fillna(0.0)], axis=1).astype(np.float32), known
    numbers = _target(values, data, where)
    return numbers.fillna(0.0).to_numpy(dtype=np.int64), numbers.notna().to_numpy()


def _text_target(texts: list[str], data: Data) -> NDArray[Any]:
    """What comes next, what is to be written, or, not yet numbers, the tags of each text's words."""
    if data.target_type == "tags":
        return np.array(texts, dtype=object)
    if data.target_type == "text":
        (column,) = data.columns.values()
        assert column.tokenizer is not None
        assert data.target_length is not None
        return answers(texts, column.tokenizer, data.target_length).astype(np.int64)
    column = data.columns[data.target]
    if column.type == "characters":
        return windows(texts, column)[1]
    following = np.full((len(texts), column.length or 0), PADDING, dtype=np.int64)
    following[:, :-1] = _encoded(pd.Series(texts, dtype=object), column)[:, 1:]
    return following


def _tagged(
    columns: dict[str, pd.Series], tags: NDArray[Any], data: Data, where: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The tokens of texts of words, and the class of each word at its first token."""
    ((name, column),) = data.columns.items()
    assert column.tokenizer is not None
    assert column.length is not None
    numbers = {str(value): number for number, value in enumerate(data.classes or [])}
    texts, said = columns[name].tolist(), [str(one).split() for one in tags]
    unequal = [len(text.split()) != len(own) for text, own in zip(texts, said, strict=True)]
    _refuse_rows(pd.Series(unequal), data.target, f"not one tag for each word of {name!r}", where)
    strange = [not set(own) <= numbers.keys() for own in said]
    _refuse_rows(pd.Series(strange), data.target, f"not among data.classes ({len(numbers)})", where)
    return tagged(texts, [[numbers[one] for one in own] for own in said], column.tokenizer, column.length)


def _number_target(values: pd.Series, data: Data, where: str) -> pd.Series:
    largest = float(np.finfo(np.float32).max)
    numbers = _numbers(values, data.target, where, largest=largest, what="not a number (data.target)")
    if data.target_log:
        _refuse_rows(numbers <= 0, data.target, "not above zero, as data.target_log needs", where)
    if data.target_type == "time":
        _refuse_rows(numbers < 0, data.target, "times below zero", where)
    return numbers


def _event(frame: pd.DataFrame, data: Data, where: str) -> pd.Series:
    assert data.event is not None
    event = _numbers(frame[data.event], data.event, where, largest=math.inf, what="not a number (data.event)")
    _refuse_rows(event.notna() & ~event.isin([0, 1]), data.event, "neither 0 nor 1 (data.event)", where)
    return event


def held_out_rows(frame: pd.DataFrame, data: Data) -> NDArray[np.bool_] | None:
    """(n,) bool: which rows are laid down for testing; None where none are."""
    if HELD_OUT in frame.columns:
        return frame[HELD_OUT].to_numpy(dtype=bool)
    if data.held_out is None or data.held_out.column is None:
        return None
    return frame[data.held_out.column].astype(str).isin([str(v) for v in data.held_out.values or []]).to_numpy()


def _series(frame: pd.DataFrame, data: Data, where: str) -> Series:
    how = data.forecast
    assert how is not None
    values = _number_target(frame[data.target], data, where)
    _refuse_rows(values.isna(), data.target, "missing: mend them, a forecast needs every period", where)
    times = pd.Series(pd.NaT, index=frame.index, dtype="datetime64[s]")
    for form in how.formats:
        read = pd.to_datetime(frame[how.time].astype(str), format=form, errors="coerce")
        times = times.fillna(read.astype("datetime64[s]"))
    _refuse_rows(times.isna(), how.time, "not a time in one of data.forecast.formats", where)
    names = frame[how.series].astype(str).to_numpy() if how.series is not None else np.full(len(frame), "")
    low, high = data.target_range or (-1.0, 1.0)
    return lagged(
        times.to_numpy(),
        values.to_numpy(dtype=float),
        names.astype(np.str_),
        how,
        log=bool(data.target_log),
        half_range=(high - low) / 2,
        where=where,
    )


def _target(values: pd.Series, data: Data, where: str) -> pd.Series:
    """Class numbers as float, NaN where the target is missing."""
    classes = data.positive if data.positive is not None else data.classes if data.classes is not None else [0, 1]
    numeric = _numeric(classes)
    parsed = pd.to_numeric(values, errors="coerce").astype(float) if numeric else values.astype(str)
    if numeric:
        _refuse_rows(parsed.isna() & values.notna(), data.target, "not a number (data.target)", where)
    keys = [float(value) if numeric else str(value) for value in classes]
    if data.positive is not None:
        return parsed.isin(keys).astype(float).where(values.notna())
    numbers = parsed.map({key: number for number, key in enumerate(keys)})
    what = (
        f"not among data.classes ({len(keys)})"
        if data.classes
        else "neither 0 nor 1 (give data.positive or data.classes)"
    )
    _refuse_rows(numbers.isna() & values.notna(), data.target, what, where)
    return numbers.where(values.notna()).astype(float)


def _encoded(values: pd.Series, column: Column) -> NDArray[np.floating[Any]]:
    if column.type == "category":
        numeric = _numeric(column.values or [])
        levels = [float(value) if numeric else str(value) for value in (column.values or [])[1:]]
        return np.stack([(values == level).to_numpy(dtype=float) for level in levels], axis=1)
    if column.type == "text":
        return bags(values.tolist(), column)
    if column.type == "characters":
        return windows(values.tolist(), column)[0]
    if column.type == "tokens":
        assert column.tokenizer is not None
        assert column.length is not None
        return tokens(values.tolist(), column.tokenizer, column.length)
    if column.type == "image":
        return pixels(values.tolist())
    numbers = values.to_numpy(dtype=float)
    if column.type == "id":
        numbers = numbers - 1
    if column.range is not None:
        low, high = column.range
        centre, unit = (low + high) / 2, (high - low) / 2
        if column.mean is not None and column.sd is not None:
            centre, unit = column.mean, column.sd
        numbers = (np.clip(numbers, low, high) - centre) / unit
    return numbers[:, None]


def _refuse_rows(wrong: pd.Series, name: str, what: str, where: str) -> None:
    if wrong.any():
        first = int(np.flatnonzero(wrong.to_numpy())[0]) + 1
        raise DataError(f"{where}: column {name!r}: {int(wrong.sum())} rows are {what} (the first is data row {first})")


def _numeric(values: Sequence[str | int | float]) -> bool:
    return all(isinstance(value, int | float) for value in values)

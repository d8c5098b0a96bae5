"""A site's records: read a file, hold it against the schema, encode it with public constants, split it.

Errors name the file, the column and how many rows are wrong; they never repeat a value, because a value is a record.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from privacy.errors import DataError
from privacy.ledger import SITE_NAME
from strategies.job import Column, Data


@dataclass(frozen=True)
class Records:
    """Encoded rows: `features` (n, d) float32 and `target` (n,) int64, class numbers from 0.

    `kept` says of each row of the table that they came from whether it is here; None means all of them.
    """

    features: NDArray[np.float32]
    target: NDArray[np.int64]
    kept: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: NDArray[np.int64]) -> Records:
        return Records(self.features[rows], self.target[rows])


@dataclass(frozen=True)
class SiteData:
    """One site's training and test rows. Training rows are what differential privacy covers."""

    train: Records
    test: Records


def class_count(data: Data) -> int:
    return len(data.classes) if data.classes is not None else 2


def feature_names(data: Data) -> list[str]:
    """The encoded features in order: a category becomes one indicator for each value but the first."""
    names: list[str] = []
    for name, column in data.columns.items():
        names += [name] if column.type == "number" else [f"{name}={value}" for value in (column.values or [])[1:]]
    return names


def read_frame(path: Path, data: Data) -> pd.DataFrame:
    """Read a CSV or Parquet file with the schema's columns, the target and the client key; all as text or numbers.

    Raises `DataError` for a missing or unreadable file or an absent column.
    """
    try:
        if path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(
                path,
                header=0 if data.header else None,
                names=data.names,
                na_values=data.missing,
                keep_default_na=False,
                dtype=str,
                skipinitialspace=True,
            )
            # Of the first field of rows that have one more than the header pandas makes an index, and shifts the rest.
            if not isinstance(frame.index, pd.RangeIndex):
                raise DataError(f"{path}: its rows have more fields than the {len(frame.columns)} names of the columns")
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file (data.folder says where relative names start)") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, not a data file") from None
    except (ValueError, OSError) as error:
        # The parser's text can quote the line it stumbled over, so only its kind is repeated.
        raise DataError(f"{path}: cannot be read as {path.suffix or 'CSV'} ({type(error).__name__})") from None
    require_columns(frame, data, where=str(path))
    return frame


def require_columns(frame: pd.DataFrame, data: Data, *, where: str) -> None:
    """Raise `DataError`, with the nearest name, unless the schema's columns, target and client key are all there."""
    for wanted in [*data.columns, data.target, *([data.client] if data.client else [])]:
        if wanted not in frame.columns:
            close = difflib.get_close_matches(wanted, [str(name) for name in frame.columns], n=1)
            # The names are not listed: without the header that data.header promises, they are a record's values.
            hint = f"did you mean {close[0]!r}?" if close else "is its first line a header? (else data.header = false)"
            what = "target column" if wanted == data.target else "column"
            raise DataError(f"{where}: {what} {wanted!r} is absent; {hint}")


def site_frames(frame: pd.DataFrame, client: str, *, where: str) -> dict[str, pd.DataFrame]:
    """Split a table by its natural client key; keys become names that are safe in a path."""
    if frame[client].isna().any():
        raise DataError(
            f"{where}: column {client!r} (the client key) is missing in {int(frame[client].isna().sum())} rows"
        )
    frames: dict[str, pd.DataFrame] = {}
    for key, rows in frame.groupby(client, sort=True):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(key)).strip("-._")[:64]
        if not SITE_NAME.fullmatch(name):
            raise DataError(f"{where}: a value of {client!r} has no letter or digit to make a site's name of")
        if name in frames:
            raise DataError(f"{where}: two values of {client!r} both become the site name {name!r}; rename one")
        frames[name] = rows
    return frames


def encode(frame: pd.DataFrame, data: Data, *, where: str) -> Records:
    """Check every column of `frame` against the schema and encode it.

    A number with a range is clipped to it and mapped onto [-1, 1]: the constants are public, so no statistic of the
    records enters. Raises `DataError`.
    """
    columns = {name: _parsed(frame[name], name, column, where) for name, column in data.columns.items()}
    target = _target(frame[data.target], data, where)
    complete = target.notna()
    for values in columns.values():
        complete &= values.notna()
    if not complete.all():
        if data.on_missing == "refuse":
            worst = max([*columns, data.target], key=lambda name: int(frame[name].isna().to_numpy().sum()))
            raise DataError(
                f"{where}: {int((~complete).sum())} of {len(frame)} rows have missing values "
                f'(most in column {worst!r}); mend them or set data.on_missing = "drop"'
            )
        target = target[complete]
        columns = {name: values[complete] for name, values in columns.items()}
    if len(target) == 0:
        raise DataError(f"{where}: no rows" + (" left without missing values" if len(frame) else ""))
    parts = [_encoded(columns[name], column) for name, column in data.columns.items()]
    features = np.ascontiguousarray(np.concatenate(parts, axis=1), dtype=np.float32)
    return Records(features, target.to_numpy(dtype=np.int64), None if complete.all() else complete.to_numpy())


def split(records: Records, data: Data, *, site: str, stratify: bool = True) -> SiteData:
    """Training and test rows by `data.test_fraction`.

    With `stratify`, by class where every class has more than two rows and fits. Without, by a row's position in the
    table alone: then no record decides whether another is trained on, which is what record-level privacy needs.

    Raises `DataError` for a site that cannot train: too few rows, or one class only (`data.allow_one_class`).
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(records.target, minlength=class_count(data))
    if len(records) < 2:
        raise DataError(f"site {site}: {len(records)} row is too few to train and test on")
    if np.count_nonzero(counts) < 2 and not data.allow_one_class:
        raise DataError(
            f"site {site}: all its rows are of one class, so it cannot learn to tell two apart; check "
            f"data.target ({data.target!r}), leave the site out, or set data.allow_one_class = true"
        )
    testing = math.ceil(data.test_fraction * len(records))
    if testing == len(records):
        raise DataError(
            f"site {site}: {len(records)} rows leave none to train on at data.test_fraction = {data.test_fraction:g}"
        )
    fits = min(testing, len(records) - testing) >= np.count_nonzero(counts)
    by_class = stratify and fits and counts[counts > 0].min() > 2
    kept = np.ones(len(records), dtype=bool) if stratify or records.kept is None else records.kept
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
    parts = SiteData(records.take(index[train[kept[train]]]), records.take(index[test[kept[test]]]))
    if not len(parts.train) or not len(parts.test):
        raise DataError(f"site {site}: too few complete rows to train and test on")
    return _standardised(parts) if data.scaling == "site" else parts


def _standardised(parts: SiteData) -> SiteData:
    """By the mean and standard deviation of this site's own training rows. Never with record-level privacy."""
    # In float64, where the mean of equal float32 values is exact: a constant column has a spread of zero, not of its
    # rounding errors.
    mean = parts.train.features.mean(axis=0, dtype=np.float64)
    spread = parts.train.features.std(axis=0, dtype=np.float64)
    spread[spread == 0] = 1.0

    def scaled(records: Records) -> Records:
        return Records(((records.features - mean) / spread).astype(np.float32), records.target)

    return SiteData(scaled(parts.train), scaled(parts.test))


def _parsed(values: pd.Series, name: str, column: Column, where: str) -> pd.Series:
    if column.type == "number" or _numeric(column.values or []):
        parsed = pd.to_numeric(values, errors="coerce").astype(float)
        _refuse_rows(parsed.isna() & values.notna(), name, "not a number", where)
        largest = np.finfo(np.float64 if column.range is not None else np.float32).max
        _refuse_rows(parsed.abs() > largest, name, "not finite", where)
    else:
        parsed = values.astype(object).where(values.isna(), values.astype(str))
    if column.type == "category":
        allowed = [float(value) if _numeric(column.values or []) else str(value) for value in column.values or []]
        _refuse_rows(
            parsed.notna() & ~parsed.isin(allowed), name, f"not among the schema's {len(allowed)} values", where
        )
    return parsed


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


def _encoded(values: pd.Series, column: Column) -> NDArray[np.float64]:
    if column.type == "category":
        numeric = _numeric(column.values or [])
        levels = [float(value) if numeric else str(value) for value in (column.values or [])[1:]]
        return np.stack([(values == level).to_numpy(dtype=float) for level in levels], axis=1)
    numbers = values.to_numpy(dtype=float)
    if column.range is not None:
        low, high = column.range
        numbers = (np.clip(numbers, low, high) - (low + high) / 2) / ((high - low) / 2)
    return numbers[:, None]


def _refuse_rows(wrong: pd.Series, name: str, what: str, where: str) -> None:
    if wrong.any():
        first = int(np.flatnonzero(wrong.to_numpy())[0]) + 1
        raise DataError(f"{where}: column {name!r}: {int(wrong.sum())} rows are {what} (the first is data row {first})")


def _numeric(values: Sequence[str | int | float]) -> bool:
    return all(isinstance(value, int | float) for value in values)

"""Texts, images and series as numbers, by public constants alone: nothing is measured on a record.

Pure functions on arrays; `client.data` checks the columns and says in which file something is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.errors import DataError
from strategies.job_data import Column, Forecast

YEAR_DAYS = 365.25
PADDING = -1  # What follows behind the end of a text.
GAP = 1.5  # Of the smallest step between two periods: months differ by less, a missing period makes two.


def bags(texts: Sequence[str], column: Column) -> NDArray[np.float32]:
    """Count each text's n-grams of words or letters in `column.buckets` buckets: (n, buckets), each row of L2 norm 1.

    The hash is public (MurmurHash3), so no vocabulary is measured; letters are taken within words. An empty text is
    a row of zeros.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=column.buckets,
        ngram_range=column.ngrams or (1, 1),
        analyzer="word" if column.analyzer != "letters" else "char_wb",
        alternate_sign=False,
        dtype=np.float32,
    )
    result: NDArray[np.float32] = vectorizer.transform(texts).toarray()
    return result


def windows(texts: Sequence[str], column: Column) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The first characters of each text and what follows each: two (n, window) arrays of numbers in the alphabet.

    Numbers count from 1; 0 is a character outside the alphabet. Behind the end of a text the first has 0 and the second
    `PADDING`.
    """
    assert column.alphabet is not None
    assert column.window is not None
    numbers = {letter: number for number, letter in enumerate(column.alphabet, start=1)}
    before = np.zeros((len(texts), column.window), dtype=np.float32)
    after = np.full((len(texts), column.window), PADDING, dtype=np.int64)
    for row, text in enumerate(texts):
        found = [numbers.get(letter, 0) for letter in text[: column.window + 1]]
        length = max(0, len(found) - 1)
        before[row, :length], after[row, :length] = found[:length], found[1:]
    return before, after


def pixels(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Images of 0 to 255 as flat rows of [-1, 1]."""
    stacked = np.stack(images) if len(images) else np.zeros((0, 1), np.uint8)
    return stacked.reshape(len(images), -1).astype(np.float32) / np.float32(127.5) - 1


@dataclass(frozen=True)
class Series:
    """Rows made of series: which row of the table each is of, its features, its (n, 2) target, and whether it tests."""

    rows: NDArray[np.int64]
    features: NDArray[np.float64]
    target: NDArray[np.float32]
    held_out: NDArray[np.bool_]


def lagged(
    times: NDArray[np.datetime64],
    values: NDArray[np.float64],
    names: NDArray[np.str_],
    how: Forecast,
    *,
    log: bool,
    half_range: float,
    where: str,
) -> Series:
    """Make a row of each period that has `max(lags)` periods before it in its series.

    Features: each lag less the level (the mean of the last `max(lags)` periods), in `spread`s, then the season's sines
    and cosines. Target: the value and the level, in the value's unit. Raises `DataError` for a series that repeats or
    leaves out a period, or is too short.
    """
    parts = [
        _one(np.flatnonzero(names == name), times, values, how, log, half_range, where) for name in np.unique(names)
    ]
    if not parts:
        raise DataError(f"{where}: no rows")
    return Series(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.held_out for part in parts]),
    )


def lagged_names(target: str, how: Forecast) -> list[str]:
    season = [f"{wave} {k} of the year" for k in range(1, how.harmonics + 1) for wave in ("sine", "cosine")]
    return [*(f"{target} {lag} ago" for lag in how.lags), *season]


def _one(
    rows: NDArray[np.int64],
    times: NDArray[np.datetime64],
    values: NDArray[np.float64],
    how: Forecast,
    log: bool,
    half_range: float,
    where: str,
) -> Series:
    rows = rows[np.argsort(times[rows], kind="stable")]
    days = times[rows].astype("datetime64[s]").astype(np.int64) / 86400
    steps, longest = np.diff(days), max(how.lags)
    if len(rows) <= longest + how.horizon:
        raise DataError(
            f"{where}: a series of {len(rows)} periods is too short for a longest lag of {longest} and a horizon of "
            f"{how.horizon} (data.forecast): it needs {longest + how.horizon + 1}"
        )
    if steps.min() <= 0:
        raise DataError(
            f"{where}: {int((steps <= 0).sum())} periods of one series repeat a time of {how.time!r}; if it holds more "
            "than one series, name the column that tells them apart in data.forecast.series"
        )
    if steps.max() > GAP * steps.min():
        raise DataError(
            f"{where}: {int((steps > GAP * steps.min()).sum())} gaps in a series: a period of {how.time!r} is missing"
        )
    base = np.log(values[rows]) if log else values[rows]
    sums = np.concatenate([[0.0], np.cumsum(base)])
    at = np.arange(longest, len(rows))
    level = (sums[at] - sums[at - longest]) / longest
    unit = how.spread * (1.0 if log else half_range)
    angle = 2 * np.pi * (days[at] % YEAR_DAYS) / YEAR_DAYS
    season = [wave(k * angle) for k in range(1, how.harmonics + 1) for wave in (np.sin, np.cos)]
    features = np.stack([*((base[at - lag] - level) / unit for lag in how.lags), *season], axis=1)
    target = np.stack([values[rows][at], np.exp(level) if log else level], axis=1).astype(np.float32)
    return Series(rows[at], features, target, at >= len(rows) - how.horizon)

"""What a finished evaluation says: figures from the sums of its cells, with what they lie between and their noise.

Counts are shares of all rows here; every figure is a ratio, so it makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.errors import RunError
from strategies.evaluation import (
    MOMENTS,
    MOST_CLASSES,
    SITE_FIGURES,
    SITES,
    WHOLE,
    Kind,
    blocks_of,
    kind_of,
    labels_of,
    range_of,
    scale_of,
    size_of,
    times_of,
)
from strategies.job import Job
from strategies.measured import finished, read_json
from strategies.statistics import quantile

Figures = dict[str, float]
Array = NDArray[np.float64]

QUANTILES = {"median_error": 0.5, "error_90": 0.9}
_FLOAT32 = 4e-6  # Of sums of many float32 numbers: how far they may be off.
VERSION = 1
TENTHS = 10  # Cells in which calibration is shown.


def read_evaluation(run: Path) -> dict[str, Any]:
    """What a finished evaluation says (`summarise`), with rows, sites and what was spent.

    `run` is a run folder, a folder with the `job.toml` and `model.safetensors` of a federation's job, or a file that
    `fedchorus evaluate --json` wrote. Raises `RunError`.
    """
    if run.is_file():
        said = read_json(run)
        whole = said.get("v") == VERSION and said.get("model") in ("shared", "own") and isinstance(said.get("of"), str)
        if not whole or not all(isinstance(said.get(key), dict) for key in ("figures", "groups")):
            raise RunError(f"{run}: not what `fedchorus evaluate --json` writes (version {VERSION})")
        return said
    found = finished(run, what="an evaluation", ours=lambda job: job.evaluation is not None)
    return {**summarise(found.job, found.weights.astype(np.float64), noise=found.noise), **found.said()}


def summarise(job: Job, weights: Array, *, noise: float | None) -> dict[str, Any]:
    """Read an evaluation's final model ((size,) float64, the mean of phi).

    A figure is `{"value", "low", "high", "se"}`: what the cells say; between what it lies, whatever the rows' places
    within their cells (equal where the cells tell it exactly); the standard error from noise of the standard deviation
    `noise` in each weight (0 without, None where it is not known). What other test rows would change is in none of it.
    A figure that the rows or the noise leave undefined is None. Of a group that its sites left out `share` is 0.
    """
    blocks, kind, choice = blocks_of(job), kind_of(job.data), job.evaluation
    assert choice is not None
    if weights.shape != (size_of(job),):
        raise RunError(f"the model has {weights.size} weights, the job's evaluation {size_of(job)}: not its model")
    scale = scale_of(job)
    mean, error = weights / scale, None if noise is None else noise / scale
    parts: dict[tuple[str, int], dict[str, Array]] = {}
    for block in blocks:
        parts.setdefault((block.group, block.place), {})[block.kind] = mean[block.slice]
    whole = parts[WHOLE, 0]
    told = _Reader(job, kind, error)
    figures = told.figures(whole)
    total = told.count(whole)
    if "loss" in whole and total is not None:
        share, wide = float(whole["loss"][0]) / total, None
        if error is not None:  # Of the loss's own sum, and of the cells that count the rows.
            wide = choice.largest_loss * error / total * math.sqrt(1 + told.cells(whole) * share**2)
        value = choice.largest_loss * share
        figures["loss"] = _figure(value, se=wide)
        if kind == "text":  # Of the mean over texts, each the mean over its tokens.
            perplexity = math.exp(min(value, choice.largest_loss))
            figures["perplexity"] = _figure(perplexity, se=None if wide is None else perplexity * wide)
    groups: dict[str, dict[str, Any]] = {}
    for column, group in (choice.groups or {}).items():
        for place, name in enumerate(group.names):
            own = parts[column, place]
            rows = told.count(own)
            of_group: dict[str, Any] = {"share": 0.0, "figures": {}}
            if rows is not None and total is not None:
                of_group = {"share": min(1.0, rows / total), "figures": told.figures(own)}
            groups.setdefault(column, {})[name] = of_group
    said: dict[str, Any] = {
        "v": VERSION,
        "job": job.hash,
        "name": job.name,
        "of": choice.of,
        "model": choice.model,
        "kind": kind,
        "figures": figures,
        "groups": groups,
        "smallest": choice.smallest if job.privacy.record is None else None,
    }
    if kind in ("binary", "classes") and total is not None:
        said["calibration"] = _calibration(whole["scores" if kind == "binary" else "confidence"], error)
    if "confusion" in whole and total is not None:
        said["classes"] = labels_of(job.data)
        said["confusion"] = [[float(cell) for cell in row] for row in _square(whole["confusion"]) / total]
    if choice.sites is not None:
        said["by_site"] = {name: told.over_sites(name, whole[SITES + name]) for name in SITE_FIGURES[kind]}
    return said


def figures_of(kind: Kind, job: Job) -> Mapping[str, Callable[[Array], tuple[Figures, Figures, Figures]]]:
    """Of each block that has figures: what reads its counts, as values and the bounds below and above them."""
    match kind:
        case "binary":
            return {"scores": binary_figures}
        case "classes":
            hits = confusion_figures if len(labels_of(job.data)) <= MOST_CLASSES else hit_figures
            return {"confusion" if hits is confusion_figures else "confidence": hits}
        case "number":
            low, high = range_of(job)
            return {"errors": lambda counts: error_figures(counts, low, high)}
        case "text":
            return {"tokens": token_figures}
        case "time":
            return {"pairs": lambda cells: pair_figures(cells.reshape(len(times_of(job)) + 1, 2, -1))}


def token_figures(counts: Array) -> tuple[Figures, Figures, Figures]:
    """From (B,) counts of texts by the cell of the share of their tokens that were the likeliest, then the sum of these
    shares: both exact. `mostly` is the share of texts of which more than half of the tokens were."""
    cells, share = counts[:-1], float(counts[-1])
    rows = float(cells.sum())
    value = {"accuracy": _ratio(share, rows), "mostly": _ratio(float(cells[len(cells) // 2 :].sum()), rows)}
    return value, value, value


def binary_figures(cells: Array) -> tuple[Figures, Figures, Figures]:
    """From (2, B) counts of negative and positive rows by the cell of their probability, flat.

    A pair of a positive and a negative row in one cell counts half, so that the area is off by at most half the share
    of such pairs; what is counted at 0.5, an edge of cells, is exact.
    """
    negative, positive = cells.reshape(2, -1)
    wrong, right = float(negative.sum()), float(positive.sum())
    half, total = len(negative) // 2, wrong + right
    below = np.cumsum(negative) - negative
    tied = float(positive @ negative)
    hit, said = float(positive[half:].sum()), float(positive[half:].sum() + negative[half:].sum())
    pairs = right * wrong
    place = (np.arange(len(negative)) + 0.5) / len(negative)
    wide = 0.5 / len(negative)
    value = {
        "auc": _ratio(float(positive @ below) + tied / 2, pairs),
        "accuracy": _ratio(hit + float(negative[:half].sum()), total),
        "precision": _ratio(hit, said),
        "recall": _ratio(hit, right),
        "specificity": _ratio(float(negative[:half].sum()), wrong),
        "f1": _ratio(2 * hit, said + right),
        "positive": _ratio(right, total),
        "predicted": _ratio(float((positive + negative) @ place), total),
        "brier": _ratio(float(positive @ (1 - place) ** 2 + negative @ place**2), total),
        "calibration_error": _calibration_error(positive, positive + negative, place),
    }
    low, high = dict(value), dict(value)
    low["auc"], high["auc"] = value["auc"] - _ratio(tied, 2 * pairs), value["auc"] + _ratio(tied, 2 * pairs)
    low["predicted"], high["predicted"] = value["predicted"] - wide, value["predicted"] + wide
    low["brier"] = _ratio(
        float(positive @ np.maximum(0, 1 - place - wide) ** 2 + negative @ np.maximum(0, place - wide) ** 2), total
    )
    high["brier"] = _ratio(float(positive @ (1 - place + wide) ** 2 + negative @ (place + wide) ** 2), total)
    low["calibration_error"] = max(0.0, value["calibration_error"] - wide)
    high["calibration_error"] = value["calibration_error"] + wide
    return value, low, high


def confusion_figures(cells: Array) -> tuple[Figures, Figures, Figures]:
    """From (K, K) counts of rows by class and predicted class, flat: all exact. `f1` is the mean over the classes that
    have rows or predictions."""
    table = _square(cells)
    hits, rows, said = np.diagonal(table), table.sum(axis=1), table.sum(axis=0)
    either = rows + said
    known = either > 0
    value = {
        "accuracy": _ratio(float(hits.sum()), float(table.sum())),
        "f1": float(np.mean(2 * hits[known] / either[known])) if known.any() else math.nan,
        "recall": float(np.mean(hits[rows > 0] / rows[rows > 0])) if (rows > 0).any() else math.nan,
    }
    return value, value, value


def hit_figures(cells: Array) -> tuple[Figures, Figures, Figures]:
    """From (2, B) counts of wrong and right rows by the cell of their confidence, flat: the accuracy is exact."""
    wrong, right = cells.reshape(2, -1)
    value = {"accuracy": _ratio(float(right.sum()), float(cells.sum())), "calibration_error": _confidence_error(cells)}
    wide = 0.5 / len(wrong)
    low = {**value, "calibration_error": max(0.0, value["calibration_error"] - wide)}
    return value, low, {**value, "calibration_error": value["calibration_error"] + wide}


def error_figures(counts: Array, low: float, high: float) -> tuple[Figures, Figures, Figures]:
    """From (B,) counts of rows by the cell of their absolute error over the range's width, then the sums of `MOMENTS`;
    in the target's unit.

    Quantiles of the error (the smallest that so many rows do not exceed) are known to a cell, R2 to what float32 sums
    leave of its denominator. All else is exact for rows within the range; `outside` is the share of the others, of
    which an error counts as the width and a target as the end.
    """
    cells, (absolute, squared, u, u_squared, magnitude, outside) = counts[: -len(MOMENTS)], counts[-len(MOMENTS) :]
    rows, width, largest = float(cells.sum()), high - low, max(abs(low), abs(high))
    spread, fuzzy = u_squared - _ratio(u * u, rows), _FLOAT32 * max(u_squared, _ratio(u * u, rows))
    wrong = 4 * squared
    value = {
        "rmse": width * math.sqrt(max(0.0, squared / rows)) if rows > 0 else math.nan,
        "mae": _ratio(width * absolute, rows),
        "wape": _ratio(width * absolute, largest * magnitude),
        "r2": 1 - _ratio(wrong, spread) if spread > 2 * fuzzy else math.nan,
        "outside": _ratio(outside, rows),
    }
    below, above = dict(value), dict(value)
    below["r2"], above["r2"] = 1 - _ratio(wrong, spread - fuzzy), 1 - _ratio(wrong, spread + fuzzy)
    for name, share in QUANTILES.items():
        first, last = _places(cells, share)
        below[name], above[name] = first * width / len(cells), (last + 1) * width / len(cells)
        value[name] = (below[name] + above[name]) / 2
    return value, below, above


def _places(cells: Array, share: float) -> tuple[float, float]:
    """Between which cells a quantile lies, rounding of the counts considered; NaN of no rows."""
    rows = float(cells.sum())
    if not rows > 0:
        return math.nan, math.nan
    reached = np.cumsum(cells)
    ends = (share * rows * (1 - _FLOAT32), share * rows * (1 + _FLOAT32))
    first, last = (min(int(np.searchsorted(reached, end)), len(cells) - 1) for end in ends)
    return first, last


def pair_figures(cells: Array) -> tuple[Figures, Figures, Figures]:
    """From (T, 2, B) counts by the cell of time, censored or event, and the cell of risk: Harrell's concordance.

    A pair whose times are in one cell does not count, one whose risks are counts half. The bounds let all such pairs be
    for or against.
    """
    censored, events = cells[:, 0], cells[:, 1]
    rows = censored + events
    later = np.cumsum(rows[::-1], axis=0)[::-1] - rows
    below = np.cumsum(later, axis=1) - later
    right, tied = float((events * below).sum()), float((events * later).sum())
    pairs = float((events.sum(axis=1) * later.sum(axis=1)).sum())
    happened = events.sum(axis=1)
    # As shares of all rows: a row is a pair with itself here, which only widens the bounds.
    open_ = float((happened**2 / 2 + happened * censored.sum(axis=1)).sum())
    value = {"c_index": _ratio(right + tied / 2, pairs)}
    low = {"c_index": _ratio(right, pairs + open_) if pairs > 0 else math.nan}
    return value, low, {"c_index": _ratio(right + tied + open_, pairs + open_) if pairs > 0 else math.nan}


class _Reader:
    """Reads the counts of one evaluation, each with noise of the standard deviation `error` (None: not known)."""

    def __init__(self, job: Job, kind: Kind, error: float | None) -> None:
        self._job, self._error = job, error
        self._read = figures_of(kind, job)

    def count(self, parts: Mapping[str, Array]) -> float | None:
        """What the cells that hold each row once add up to; None where noise or nothing is all there is."""
        cells = self._counting(parts)
        total = float(cells.sum())
        return total if total > max(3 * math.sqrt(len(cells)) * (self._error or 0.0), 1e-9) else None

    def cells(self, parts: Mapping[str, Array]) -> int:
        """How many cells `count` adds up."""
        return len(self._counting(parts))

    def _counting(self, parts: Mapping[str, Array]) -> Array:
        name = next(n for n in ("scores", "confusion", "confidence", "errors", "pairs", "tokens") if n in parts)
        return parts[name][: -{"errors": len(MOMENTS), "tokens": 1}.get(name, 0) or None]

    def figures(self, parts: Mapping[str, Array]) -> dict[str, Any]:
        rows = self.count(parts)
        found: dict[str, Any] = {}
        for name, read in self._read.items():
            counts = parts[name]
            if rows is None:
                found |= dict.fromkeys(read(np.ones_like(counts))[0])
                continue
            value, low, high = read(counts)
            errors = self._errors(read, counts, rows)
            found |= {key: _figure(value[key], low[key], high[key], errors.get(key)) for key in value}
            if self._error != 0:
                # Noise adds to a sum of absolute differences: what it says would be too much.
                found |= {key: None for key in found if key == "calibration_error"}
                if name == "errors":
                    found |= self._quantiles(counts[: -len(MOMENTS)], rows)
        return found

    def _quantiles(self, cells: Array, rows: float) -> dict[str, Any]:
        """Quantiles of the error under noise."""
        low, high = range_of(self._job)
        noise, padded = (
            None if self._error is None else self._error / rows,
            np.concatenate([[0.0], cells / rows, [0.0]]),
        )
        width, found = (high - low) / len(cells), {}
        for name, share in QUANTILES.items():
            value, wide = quantile(padded, share, noise, 0.0, high - low)
            found[name] = _figure(value, max(0.0, value - width), min(high - low, value + width), wide)
        return found

    def _errors(
        self, read: Callable[[Array], tuple[Figures, Figures, Figures]], counts: Array, rows: float
    ) -> dict[str, float | None]:
        """The standard errors from independent noise in each count, by the delta method."""
        if not self._error:
            return {} if self._error is None else dict.fromkeys(read(counts)[0], 0.0)
        step = 1e-4 * rows
        squares: dict[str, float] = {}
        for place in range(len(counts)):
            moved = counts.copy()
            moved[place] += step
            above = read(moved)[0]
            moved[place] -= 2 * step
            for key, value in read(moved)[0].items():
                squares[key] = squares.get(key, 0.0) + ((above[key] - value) / (2 * step)) ** 2
        return {key: self._error * math.sqrt(square) for key, square in squares.items()}

    def over_sites(self, name: str, cells: Array) -> dict[str, Any]:
        """How a figure is spread over the sites, from (C + 1,) counts of sites by its cell; the last has none.

        Without noise: between what the worst site's lies, and the mean of the worst tenth of sites.
        """
        top = 1.0
        if name == "mae":
            low, high = range_of(self._job)
            top = high - low
        spread = math.sqrt(len(cells)) * (self._error or 0.0)
        total, known = float(cells.sum()), float(cells[:-1].sum())
        if not total > max(3 * spread, 1e-12) or not known > max(3 * spread, 1e-12):
            nobody = self._error == 0 and total > 1e-12
            return {"undefined": 1.0 if nobody else None}
        width, shares = top / (len(cells) - 1), cells[:-1] / known
        noise = None if self._error is None else self._error / known
        padded = np.concatenate([[0.0], shares, [0.0]])
        said: dict[str, Any] = {"cell": width, "undefined": _clipped(float(cells[-1]) / total)}
        said["shares"] = [float(share) for share in shares]
        quantiles = {"lowest_tenth": 0.1, "median": 0.5, "highest_tenth": 0.9}
        for key, share in quantiles.items():
            value, se = quantile(padded, share, noise, 0.0, top)
            ends = max(0.0, value - width), min(top, value + width)
            if self._error == 0:
                first, last = _places(shares, share)
                ends = first * width, (last + 1) * width
                value = min(max(value, ends[0]), ends[1])
            said[key] = _figure(value, *ends, se)
        if self._error == 0:
            order = np.arange(len(shares)) if name != "mae" else np.arange(len(shares))[::-1]
            worst = int(next(place for place in order if shares[place] > 1e-9))
            said["worst"] = _figure((worst + 0.5) * width, worst * width, (worst + 1) * width, 0.0)
            taken = np.minimum(shares[order], np.maximum(0.0, 0.1 - (np.cumsum(shares[order]) - shares[order])))
            mean = float(taken @ ((order + 0.5) * width)) / float(taken.sum())
            said["worst_tenth"] = _figure(mean, mean - width / 2, mean + width / 2, 0.0)
        return said


def _calibration(cells: Array, error: float | None) -> list[dict[str, float | None]]:
    """In up to ten cells of predicted probability: what was predicted, what came true, and the share of the rows."""
    wrong, right = cells.reshape(2, -1)
    place = (np.arange(len(right)) + 0.5) / len(right)
    both, total = wrong + right, float(cells.sum())
    said = []
    for part in np.array_split(np.arange(len(right)), TENTHS):
        rows = float(both[part].sum())
        known = rows > max(3 * math.sqrt(2 * len(part)) * (error or 0.0), 1e-9)
        said.append(
            {
                "from": float(part[0] / len(right)),
                "to": float((part[-1] + 1) / len(right)),
                "share": max(0.0, rows / total),
                "predicted": _clipped(float(both[part] @ place[part]) / rows) if known else None,
                "observed": _clipped(float(right[part].sum()) / rows) if known else None,
            }
        )
    return said


def _calibration_error(came_true: Array, rows: Array, place: Array) -> float:
    """The mean distance, in ten cells, between what was predicted and what came true (Naeini et al. 2015)."""
    off = 0.0
    for part in np.array_split(np.arange(len(rows)), TENTHS):
        off += abs(float(rows[part] @ place[part]) - float(came_true[part].sum()))
    return _ratio(off, float(rows.sum()))


def _confidence_error(cells: Array) -> float:
    wrong, right = cells.reshape(2, -1)
    return _calibration_error(right, wrong + right, (np.arange(len(right)) + 0.5) / len(right))


def _square(cells: Array) -> Array:
    classes = math.isqrt(len(cells))
    return cells.reshape(classes, classes)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _figure(
    value: float, low: float | None = None, high: float | None = None, se: float | None = None
) -> dict[str, float | None] | None:
    if not math.isfinite(value):
        return None
    low, high = value if low is None else low, value if high is None else high
    return {"value": value, "low": low, "high": high, "se": se if se is not None and math.isfinite(se) else None}


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))

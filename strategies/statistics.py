"""Statistics of all sites' records as one linear model: what each weight stands for, and what a finished run says.

A statistics job releases one mean, that of phi(record) over the federation's training records. phi is made of public
constants alone, in blocks:

| block      | of                    | coordinates                                                                 |
|------------|-----------------------|-----------------------------------------------------------------------------|
| missing    | each column           | 1 where it is missing                                                       |
| moments    | a number              | `missing`; u and u^2, u being the number clipped to its range, over [-1, 1] |
| histogram  | a number              | 1 in the one of `bins` equal cells of its range, below or above it          |
| categories | a category            | 1 in its value, "undeclared" or "missing"                                   |
| labels     | the target            | 1 in its class, "undeclared" or "missing"; of a number as of a column        |

All is scaled by one factor, so that phi has an L2 norm of at most 1 whatever the record: that is its sensitivity, and
the clip norm of a private statistics job. What is missing is zero in all other coordinates of its column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from privacy.errors import JobError, RunError
from strategies.job import Job
from strategies.job_data import Column, Data
from strategies.job_task import TaskChoice
from strategies.measured import check_exact, finished, read_json
from strategies.parameters import Vector

TASK = "statistics"
UNDECLARED, MISSING = "undeclared", "missing"
QUARTILES = (0.25, 0.5, 0.75)
VERSION = 1


@dataclass(frozen=True)
class Block:
    """The coordinates `start` to `start + size` of phi, all of one column."""

    column: str
    kind: str
    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


def blocks_of(data: Data, task: TaskChoice) -> list[Block]:
    """What phi holds, in order. Raises `JobError` when nothing is left to measure."""
    chosen, found, start = set(task.statistics or ()), [], 0
    bins = task.bins or 0  # A statistics job has both.

    def add(column: str, kind: str, size: int) -> None:
        nonlocal start
        found.append(Block(column, kind, start, size))
        start += size

    def add_number(name: str) -> None:
        if chosen & {"missing", "moments"}:
            add(name, "missing", 1)
        if "moments" in chosen:
            add(name, "moments", 2)
        if "histogram" in chosen:
            add(name, "histogram", bins + 2)

    for name, column in data.columns.items():
        if column.type == "number":
            add_number(name)
        elif column.type == "category" and "categories" in chosen:
            add(name, "categories", len(column.values or []) + 2)
        elif column.type == "category" and "missing" in chosen:
            add(name, "missing", 1)
    if "labels" in chosen and data.target_type in (None, "class"):
        add(data.target, "labels", len(class_names(data)) + 2)
    elif "labels" in chosen and data.target_range is not None:
        add_number(data.target)
    if not found:
        raise JobError(f"task.statistics = {task.statistics}: the data have no column of that kind; name other blocks")
    return found


def size_of(blocks: Sequence[Block]) -> int:
    return blocks[-1].start + blocks[-1].size


def scale_of(blocks: Sequence[Block]) -> float:
    """The factor that gives phi an L2 norm of at most 1: a record is in one cell of each histogram, and |u| <= 1."""
    present: dict[str, int] = {}
    for block in blocks:
        # A number is missing, or has moments and a cell: never both.
        own = {"missing": 0, "moments": 2}.get(block.kind, 1)
        present[block.column] = present.get(block.column, 0) + own
    return 1 / math.sqrt(sum(max(1, own) for own in present.values()))


def column_of(data: Data, name: str) -> Column:
    """What a block's column is: one of the features, or a target that is a number."""
    return data.columns[name] if name in data.columns else Column(range=data.target_range)


def class_names(data: Data) -> list[str]:
    if data.classes is not None:
        return [str(value) for value in data.classes]
    return ["0", "1"] if data.positive is None else ["other", "positive"]


def check_statistics(job: Job) -> None:
    """Raise `ValueError` unless the job's model is the mean of phi."""
    check_exact(job, "statistics")
    if job.data.scaling == "site":
        raise ValueError('data.scaling: statistics need a public `range` for every number: use scaling = "range"')


# -- what a run says ---------------------------------------------------------------------------------------------------


def summarise(job: Job, weights: Vector, *, noise: float | None) -> dict[str, Any]:
    """Read a statistics job's final model: per column means, deviations, quartiles and shares.

    `weights` is (size,) float32, the mean of phi; `noise` the standard deviation of the noise in each of them (0
    without differential privacy, None where it is not known here). Every figure has its standard error from that noise
    under `se`; what sampling other records would change is not in it. Shares of values and classes are of the rows that
    have one; `missing` is of all rows. A figure that noise or missing values leave undefined is None.
    """
    blocks = blocks_of(job.data, job.task)
    if weights.shape != (size_of(blocks),):
        raise RunError(f"the model has {weights.size} weights, the job's statistics {size_of(blocks)}: not its model")
    scale = scale_of(blocks)
    mean = weights.astype(np.float64) / scale
    error = None if noise is None else noise / scale
    parts: dict[str, dict[str, NDArray[np.float64]]] = {}
    for block in blocks:
        parts.setdefault(block.column, {})[block.kind] = mean[block.slice]
    columns = {
        name: _number(column, parts[name], error)
        if column.type == "number"
        else _category([str(value) for value in column.values or []], parts[name], error)
        for name, column in job.data.columns.items()
        if name in parts
    }
    said: dict[str, Any] = {"v": VERSION, "job": job.hash, "name": job.name, "se_of_a_share": error, "columns": columns}
    if (own := parts.get(job.data.target)) is not None:
        target = job.data.target
        told = (
            _category(class_names(job.data), own, error)
            if "labels" in own
            else _number(column_of(job.data, target), own, error)
        )
        said["target"] = {"name": target, **told}
    return said


def _number(column: Column, parts: Mapping[str, NDArray[np.float64]], error: float | None) -> dict[str, Any]:
    assert column.range is not None
    low, high = column.range
    middle, half = (low + high) / 2, (high - low) / 2
    said: dict[str, Any] = {"type": "number", "range": [low, high]}
    errors: dict[str, Any] = {}
    if "missing" in parts:
        missing = float(parts["missing"][0])
        said["missing"], errors["missing"] = _clipped(missing), error
    if "moments" in parts:
        present, (first, second) = 1 - missing, map(float, parts["moments"])
        known = present > 3 * (error or 0.0) and present > 1e-6
        u = first / present if known else math.nan
        variance = second / present - u * u if known else math.nan
        # By the delta method, of noise that is independent and equal in the three sums.
        u_error, variance_error = (
            (None, None)
            if error is None or not known
            else (
                error * math.hypot(1, u) / present,
                error * math.hypot(1, 2 * u, second / present - 2 * u * u) / present,
            )
        )
        sd = math.sqrt(variance) if variance > max(2 * (variance_error or 0.0), _TINY) else math.nan
        said["mean"] = min(high, max(low, middle + half * u)) if known else None
        said["sd"] = _known(half * sd)
        errors["mean"] = None if u_error is None else half * u_error
        errors["sd"] = None if variance_error is None or not sd > 0 else half * variance_error / (2 * sd)
    if "histogram" in parts:
        cells = parts["histogram"]
        total = float(cells.sum())
        spread = math.sqrt(len(cells)) * (error or 0.0)
        shares = cells / total if total > max(3 * spread, 1e-6) else np.full(len(cells), math.nan)
        said["cell"] = (high - low) / (len(cells) - 2)
        said["below"], said["above"] = _clipped(shares[0]), _clipped(shares[-1])
        said["histogram"] = [_known(share) for share in shares[1:-1]]
        noise = None if error is None or not math.isfinite(shares[0]) else error / total
        wide = _errors_of_shares(shares, noise)
        errors["below"], errors["above"], errors["histogram"] = wide[0], wide[-1], wide[1:-1]
        quartiles = [quantile(shares, p, noise, low, high) for p in QUARTILES]
        said["quartiles"] = [_known(value) for value, _ in quartiles]
        errors["quartiles"] = [_known(wide) for _, wide in quartiles]
    return {**said, "se": errors}


# Of u, which lies in [-1, 1]: below it, float32 weights cannot tell a spread from none, or from one of some size.
_TINY = 1e-6


def quantile(
    shares: NDArray[np.float64], p: float, noise: float | None, low: float, high: float
) -> tuple[float, float]:
    """The p-quantile by linear interpolation within a cell, and its standard error from noise of `noise` a share.

    Without noise it is off by at most one cell. Values outside the range count as its ends.
    """
    if not math.isfinite(shares[0]):
        return math.nan, math.nan
    # Noise makes some cells negative: a monotone curve halfway between the closest ones above and below.
    raw = np.concatenate([[0.0], np.cumsum(shares)])
    curve = (np.maximum.accumulate(raw) + np.minimum.accumulate(raw[::-1])[::-1]) / 2
    edges = np.concatenate([[low], np.linspace(low, high, len(shares) - 1), [high]])

    def at(level: float) -> float:
        place = int(np.searchsorted(curve, level, side="left"))
        if place == 0 or place >= len(curve):
            return low if place == 0 else high
        step = curve[place] - curve[place - 1]
        part = (level - curve[place - 1]) / step if step > 0 else 0.0
        return float(edges[place - 1] + part * (edges[place] - edges[place - 1]))

    if not noise:
        return at(p), 0.0 if noise == 0 else math.nan
    # Of the noise in `below` and above it: each cell up to the quantile counts 1 - p, each beyond it p.
    cells = int(np.searchsorted(curve, p, side="left"))
    wide = noise * math.sqrt(cells * (1 - p) ** 2 + (len(shares) - cells) * p**2)
    return at(p), (at(p + wide) - at(p - wide)) / 2


def _category(values: Sequence[str], parts: Mapping[str, NDArray[np.float64]], error: float | None) -> dict[str, Any]:
    said: dict[str, Any] = {"type": "category"}
    shares = parts.get("categories", parts.get("labels"))
    if shares is None:
        return {**said, "missing": _clipped(float(parts["missing"][0])), "se": {"missing": error}}
    present = float(shares[:-1].sum())
    known = present > max(3 * math.sqrt(len(shares)) * (error or 0.0), 1e-6)
    of_present = shares[:-1] / present if known else np.full(len(shares) - 1, math.nan)
    said["shares"] = {value: _clipped(share) for value, share in zip(values, of_present, strict=False)}
    said[UNDECLARED], said[MISSING] = _clipped(of_present[-1]), _clipped(shares[-1])
    wide = _errors_of_shares(of_present, error / present if error is not None and known else None)
    errors: dict[str, Any] = {"shares": dict(zip(values, wide, strict=False)), UNDECLARED: wide[-1], MISSING: error}
    return {**said, "se": errors}


def _errors_of_shares(shares: NDArray[np.float64], noise: float | None) -> list[float | None]:
    """The standard error of each share, a cell over the sum of all k, from noise of `noise` (over that sum) a cell.

    By the delta method: a cell's own noise counts 1 - s, that of each other one, which is in the sum alone, -s.
    """
    if noise is None:
        return [None] * len(shares)
    return [_known(noise * math.hypot(1 - s, math.sqrt(len(shares) - 1) * s)) for s in shares]


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _clipped(share: float) -> float | None:
    return float(min(1.0, max(0.0, share))) if math.isfinite(share) else None


# -- a run folder, and a job that uses one -----------------------------------------------------------------------------


def read_statistics(run: Path) -> dict[str, Any]:
    """What a finished statistics run says: `summarise` of its model, with the rows, the noise and what was spent.

    `run` is a run folder, a folder with the `job.toml` and `model.safetensors` of a federation's job, or a file that
    `fedchorus statistics --json` wrote. Raises `RunError`.
    """
    if run.is_file():
        return _read_file(run)
    found = finished(run, what=TASK, ours=lambda job: job.task.name == TASK)
    return {**summarise(found.job, found.weights, noise=found.noise), **found.said()}


def _read_file(path: Path) -> dict[str, Any]:
    said = read_json(path)
    if said.get("v") != VERSION or not isinstance(said.get("columns"), dict):
        raise RunError(f"{path}: not what `fedchorus statistics --json` writes (version {VERSION})")
    for name, own in said["columns"].items():
        shares = own.get("shares", {}) if isinstance(own, dict) else None
        if not isinstance(shares, dict) or not all(map(_is_figure, (own.get("mean"), own.get("sd"), *shares.values()))):
            raise RunError(f"{path}: its figures of {name!r} are not as `fedchorus statistics --json` writes them")
    return said


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def with_statistics(data: Mapping[str, Any], run: Path, *, where: str) -> dict[str, Any]:
    """Return a job's parsed `[data]` with the constants of a statistics run in its columns, in place of `statistics`.

    A number gets the mean and, where it is known above its noise, the standard deviation; `fill` is the mean, or a
    category's most frequent declared value. What a column says itself stands, and so does what no statistics job
    measures (a text, an image, an id), or what is no column at all, which the job's schema refuses. Raises `JobError`
    for a number or a category that the run did not measure.
    """
    given = data.get("columns") or {}
    if not isinstance(given, dict):
        raise JobError(f"{where}: data.columns: should be a table")
    try:
        measured = read_statistics(run)["columns"]
    except RunError as error:
        raise JobError(f"{where}: data.statistics: {error}") from None
    columns = {}
    for name, column in given.items():
        if not isinstance(column, dict):
            raise JobError(f"{where}: data.columns.{name}: should be a table")
        columns[name] = {**_constants(column, measured.get(name), name=name, run=run, where=where), **column}
    return {**{key: value for key, value in data.items() if key != "statistics"}, "columns": columns}


def _constants(column: Mapping[str, Any], said: Any, *, name: str, run: Path, where: str) -> dict[str, Any]:
    try:
        own = Column.model_validate(column)
    except ValidationError:
        return {}
    if own.type not in ("number", "category"):
        return {}
    if not isinstance(said, dict) or said.get("type") != own.type:
        raise JobError(f"{where}: data.statistics: {run} did not measure {name!r} as a {own.type}; run it anew")
    if own.type == "category":
        shares = said.get("shares") or {}
        declared = [value for value in own.values or [] if shares.get(str(value)) is not None]
        return {"fill": max(declared, key=lambda value: shares[str(value)])} if declared else {}
    if said.get("range") != list(own.range or ()):
        raise JobError(
            f"{where}: data.statistics: {run} measured {name!r} over another range than this job's: use the same"
        )
    mean, sd = said.get("mean"), said.get("sd")
    if mean is None:
        return {}
    return {"fill": mean, **({"mean": mean, "sd": sd} if sd else {})}

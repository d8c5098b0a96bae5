"""A site's test rows as phi of what a finished model makes of them, whose mean over the federation an evaluation
releases (`strategies.evaluation`)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data import Records, SiteData, class_count, encode, feature_names, rows_apart, standardised
from client.encodings import PADDING
from client.out_of_memory import OutOfMemory
from client.scores import c_index, roc_auc
from client.statistics import as_numbers, value_places
from client.tasks import initial_model, task_for
from client.training import Trainer
from privacy.errors import DataError, JobError
from strategies.evaluation import (
    MOST_CLASSES,
    SITES,
    blocks_of,
    kind_of,
    range_of,
    scale_of,
    size_of,
    times_of,
)
from strategies.job import Job
from strategies.job_task import Group
from strategies.parameters import Vector

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]
NOWHERE = -1  # The place of a row that belongs to none.


def rows_of(frame: pd.DataFrame, job: Job, *, where: str) -> Records:
    """Encode a table as the evaluated model's job does, with the group of each row in each of the columns that the
    evaluation names. A table without rows is one of no rows. Raises `DataError`."""
    assert job.evaluation is not None
    groups = job.evaluation.groups or {}
    if absent := [name for name in groups if name not in frame.columns]:
        raise DataError(f"{where}: there is no column {absent[0]!r}, which evaluation.groups names")
    records = encode(frame, job.data, where=where, empty=True)
    places = np.full((len(records) if records.kept is None else len(records.kept), len(groups)), NOWHERE)
    for column, (name, group) in enumerate(groups.items()):
        places[:, column] = group_places(frame[name], group, name=name, where=where)
    return replace(records, groups=places if records.kept is None else places[records.kept])


def group_places(values: pd.Series, group: Group, *, name: str, where: str) -> Places:
    """(n,) int64: each row's place among the groups of a column, `NOWHERE` where it is missing or in none."""
    if group.values is not None:
        places = value_places(values, group.values)
        return np.where(places < len(group.values), places, NOWHERE)
    numbers = as_numbers(values, name, where=where)
    places = np.searchsorted(np.asarray(group.edges, dtype=np.float64), numbers, side="right")
    return np.where(np.isnan(numbers), NOWHERE, places).astype(np.int64)


class Judge:
    """The evaluated job's model, and what of its outputs an evaluation counts."""

    def __init__(self, job: Job) -> None:
        """Raises `JobError` for a task whose outputs are not of the kind of its target."""
        self._job, self._kind, trained = job, kind_of(job.data), job.evaluated
        self._task = task_for(trained)
        model = initial_model(
            self._task, features=len(feature_names(job.data)), classes=class_count(job.data), seed=job.seed
        )
        self._trainer = Trainer(self._task, model, job.training)
        if getattr(self._task, "coupled", False) and self._kind != "time" and job.privacy.record is not None:
            raise JobError(
                "evaluation with privacy.record: the task's loss couples the records of a batch, so that no noise for "
                "one row covers it; take privacy.client, or [secure_aggregation] alone"
            )
        wanted = {"number": ("natural", "wanted"), "time": ("risk",)}.get(self._kind, ())
        if missing := [name for name in wanted if not hasattr(self._task, name)]:
            raise JobError(f"evaluation: task {job.task.name!r} has no method {missing[0]} (docs/extending.md)")

    def site_data(self, records: Records, model: Vector, *, site: str) -> SiteData:
        """The phi of a site's test rows under `model` ((P,) float32), as what its one round sums.

        A site without test rows takes part with one row of zeros: nothing but its weight of one row tells of it.
        Raises `JobError` for a model of other arrays.
        """
        if model.shape != (self._trainer.parameters.size,):
            raise JobError(
                f"evaluation: the model has {model.size} parameters, the task {self._trainer.parameters.size}: it is "
                "not of this job"
            )
        rows = test_rows(records, self._job)
        phi = np.zeros((max(1, len(rows)), size_of(self._job)), np.float32)
        try:
            figures = self._judge(phi, rows, model) if len(rows) else {}
        except OutOfMemory:
            raise
        except Exception as error:
            # Its text might show a record.
            raise JobError(f"task.name: {site}: evaluating the model failed ({type(error).__name__})") from error
        self._count_site(phi, figures)
        phi *= np.float32(scale_of(self._job))
        measured = Records(phi, np.zeros(len(phi), np.int64))
        return SiteData(measured, measured)

    def _judge(self, phi: Vector, rows: Records, model: Vector) -> dict[str, float]:
        """Write each row's phi, unscaled; what the site counts itself by, if it does."""
        self._trainer.load(model)
        placed = self._trainer.place(rows)
        outputs, targets = self._trainer.outputs(placed.features).cpu(), placed.targets.cpu()
        counted = self._counted(outputs, targets)
        self._write(phi, counted, outputs, targets, rows)
        choice = self._job.evaluation
        assert choice is not None
        return self._figures(counted, outputs, targets) if choice.sites is not None else {}

    def _write(self, phi: Vector, counted: dict[str, Vector], outputs: Tensor, targets: Tensor, rows: Records) -> None:
        choice = self._job.evaluation
        assert choice is not None
        assert rows.groups is not None
        shown = self._shown(rows.groups)
        for block in blocks_of(self._job):
            part = phi[:, block.slice]
            if block.kind == "loss":
                losses = self._task.loss(outputs, targets).double().numpy()
                part[:, 0] = np.clip(np.nan_to_num(losses, nan=choice.largest_loss), 0, choice.largest_loss)
                part /= np.float32(choice.largest_loss)
            elif block.kind.startswith(SITES):
                continue
            elif not block.group:
                part[:] = counted[block.kind]
            else:
                column = list(choice.groups or {}).index(block.group)
                here = (rows.groups[:, column] == block.place) & shown[column][block.place]
                part[here] = counted[block.kind][here]

    def _shown(self, groups: Places) -> list[NDArray[np.bool_]]:
        """Of each column, which of its groups this site adds to the sum."""
        choice = self._job.evaluation
        assert choice is not None
        sizes = [len(group.names) for group in (choice.groups or {}).values()]
        if self._job.privacy.record is not None:  # What one row may decide is bounded there; it decides nothing else.
            return [np.ones(size, dtype=bool) for size in sizes]
        counts = [np.bincount(groups[groups[:, n] >= 0, n], minlength=size) for n, size in enumerate(sizes)]
        return [~left_out(own, choice.smallest, nowhere=len(groups) - int(own.sum())) for own in counts]

    def _counted(self, outputs: Tensor, targets: Tensor) -> dict[str, Vector]:
        """Each of the kind's blocks for all rows: (n, size) float32."""
        choice = self._job.evaluation
        assert choice is not None
        bins = choice.bins
        match self._kind:
            case "binary":
                place = (targets.numpy() == 1) * bins + cells(_probability(outputs), bins)
                return {"scores": _marked(place, 2 * bins)}
            case "classes":
                return _class_counts(outputs, targets, class_count(self._job.data), bins)
            case "number":
                predicted, wanted = self._numbers(outputs, targets)
                return {"errors": _error_counts(predicted, wanted, *range_of(self._job), bins)}
            case "text":
                share = self._foreseen(outputs, targets)
                return {"tokens": np.column_stack([_marked(cells(share, bins), bins), share.astype(np.float32)])}
            case "time":
                ends, (time, event) = times_of(self._job), targets.double().unbind(dim=-1)
                place = 2 * np.searchsorted(np.asarray(ends), time.numpy(), side="left") + (event.numpy() == 1)
                return {"pairs": _marked(place * bins + cells(self._risk(outputs), bins), 2 * (len(ends) + 1) * bins)}

    def _numbers(self, outputs: Tensor, targets: Tensor) -> tuple[Numbers, Numbers]:
        """What was predicted and what was wanted, (n,) each, in the target's unit."""
        task: Any = self._task
        found = task.natural(outputs, targets), task.wanted(targets)
        if any(tuple(one.shape) != (len(targets),) for one in found):
            raise ValueError("natural and wanted are one number per record")
        return found[0].double().numpy(), found[1].double().numpy()

    def _foreseen(self, outputs: Tensor, targets: Tensor) -> Numbers:
        """(n,) within [0, 1]: the share of each text's tokens that were the likeliest."""
        share: Numbers = np.nan_to_num(self._task.metrics(outputs, targets)["accuracy"].double().numpy(), nan=0.0)
        return share.clip(0, 1)

    def _risk(self, outputs: Tensor) -> Numbers:
        """(n,) within [0, 1]: a rising function of the task's risk."""
        task: Any = self._task
        risk: Tensor = task.risk(outputs).double()
        intervals = self._job.task.intervals
        # Of intervals the risk is minus the expected time within them; else it is a log-hazard.
        found = 1 + risk / intervals[-1] if intervals else torch.sigmoid(risk)
        unit: Numbers = np.nan_to_num(found.numpy(), nan=0.0)
        return unit

    def _figures(self, counted: dict[str, Vector], outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """This site's own figures, each within [0, 1]; NaN where its rows do not define one."""
        match self._kind:
            case "binary":
                probability, positive = _probability(outputs), targets.numpy() == 1
                accuracy = float(np.mean((probability > 0.5) == positive))
                return {"accuracy": accuracy, "auc": roc_auc(probability, positive)}
            case "classes":
                right = counted["confidence"].reshape(len(targets), 2, -1)[:, 1]
                return {"accuracy": float(right.sum(axis=1, dtype=np.float64).mean())}
            case "number":
                (low, high), (predicted, wanted) = range_of(self._job), self._numbers(outputs, targets)
                return {"mae": float(np.mean(np.abs(predicted - wanted))) / (high - low)}
            case "text":
                return {"accuracy": float(self._foreseen(outputs, targets).mean())}
            case "time":
                time, event = targets.unbind(dim=-1)
                return {"c_index": c_index(self._risk(outputs), time.numpy(), event.numpy())}

    def _count_site(self, phi: Vector, figures: dict[str, float]) -> None:
        """Add, over all of the site's rows, 1 to the sum in the cell of each of its figures; the last is for none.

        Where rows weigh, each adds its part of that 1.
        """
        choice = self._job.evaluation
        assert choice is not None
        share = 1 / len(phi) if self._job.strategy.weighting == "rows" else 1.0
        for block in blocks_of(self._job):
            if choice.sites is not None and block.kind.startswith(SITES):
                figure = figures.get(block.kind.removeprefix(SITES), math.nan)
                place = choice.sites if math.isnan(figure) else int(cells(np.array([figure]), choice.sites)[0])
                phi[:, block.start + place] = share


def _probability(outputs: Tensor) -> Numbers:
    """(n,) float64: of the second of two classes, from one logit or two."""
    logits = outputs.double()
    found = logits.squeeze(-1).sigmoid() if logits.shape[-1] == 1 else logits.softmax(dim=-1)[:, 1]
    probability: Numbers = np.nan_to_num(found.numpy(), nan=0.0)
    return probability


def _class_counts(outputs: Tensor, targets: Tensor, classes: int, bins: int) -> dict[str, Vector]:
    """`confusion` and `confidence` of (n, K) logits, or of (n, W, K) for W characters, which share their row's 1."""
    each = targets.reshape(len(targets), -1)
    confidence, predicted = outputs.double().reshape(*each.shape, -1).softmax(dim=-1).max(dim=-1)
    there = (each != PADDING).numpy()
    share = there / np.maximum(1, there.sum(axis=1, keepdims=True))
    right = (predicted == each).numpy()
    found = {"confidence": right * bins + cells(np.nan_to_num(confidence.numpy(), nan=0.0), bins)}
    sizes = {"confidence": 2 * bins, "confusion": classes**2}
    if classes <= MOST_CLASSES:
        found["confusion"] = np.where(there, each.numpy(), 0) * classes + predicted.numpy()
    counted = {}
    for name, places in found.items():
        counted[name] = np.zeros((len(each), sizes[name]), np.float32)
        for position in range(each.shape[1]):
            np.add.at(counted[name], (np.arange(len(each)), places[:, position]), share[:, position])
    return counted


def _error_counts(predicted: Numbers, wanted: Numbers, low: float, high: float, bins: int) -> Vector:
    """The cell of each absolute error over the range's width, then `MOMENTS`: (n, bins + 6). Errors above the width
    and targets beyond the range count as its ends, and are told of."""
    error = np.nan_to_num(np.clip(np.abs(predicted - wanted) / (high - low), 0, 1), nan=1.0)
    inside = np.clip(wanted, low, high)
    u = (inside - (low + high) / 2) / ((high - low) / 2)
    u = np.clip(u, -1, 1)  # A range near the precision of numbers rounds it beyond.
    outside = (wanted != inside) | ~(np.abs(predicted - wanted) <= high - low)
    moments = np.stack([error, error**2, u, u**2, np.abs(inside) / max(abs(low), abs(high)), outside], axis=1)
    return np.concatenate([_marked(cells(error, bins), bins), moments.astype(np.float32)], axis=1)


def _marked(places: Places, size: int) -> Vector:
    """(n, size): a 1 in each row at its place."""
    marked = np.zeros((len(places), size), np.float32)
    marked[np.arange(len(places)), places] = 1.0
    return marked


def left_out(counts: NDArray[np.int64], smallest: int, *, nowhere: int = 0) -> NDArray[np.bool_]:
    """Which groups of a column a site leaves out: those of fewer than `smallest` of its rows, and then the next
    smallest, until the rows left out, and those `nowhere`, are as many or none. So what all rows less the groups shown
    would tell is of so many too."""
    out = (counts > 0) & (counts < smallest)
    for place in np.argsort(counts, kind="stable"):
        if not 0 < nowhere + counts[out].sum() < smallest:
            break
        out[place] = True
    return out


def test_rows(records: Records, job: Job) -> Records:
    """The rows that the evaluated model's job holds out for testing; none of a table that is too small to split."""
    assert job.data.stratify is not None, "check_evaluation wants it"
    training, testing = rows_apart(records, job.data, stratify=job.data.stratify)
    if job.data.scaling == "site" and len(training) and len(testing):
        return standardised(SiteData(records.take(training), records.take(testing))).test
    return records.take(testing if job.data.scaling == "range" else testing[:0])


def cells(values: Numbers, bins: int) -> Places:
    """(n,) int64: the cell of each value of [0, 1] among `bins` equal ones. An inner edge belongs to the cell below it:
    a probability of 0.5 predicts the negative class."""
    found: Places = np.clip(np.ceil(values * bins) - 1, 0, bins - 1).astype(np.int64)
    return found

"""A finished model on all sites' test rows as one sum: what each number of the sum stands for, and what it says.

An evaluation releases one mean, that of phi(row) over the federation's test rows (`strategies.measured`). Phi is made
of what the model makes of a row, in public cells:

| kind of target       | block       | coordinates                                                                |
|----------------------|-------------|----------------------------------------------------------------------------|
| two classes          | scores      | 1 in the row's class and the cell of its probability                       |
| classes, characters  | confusion   | 1 in the row's class and the class predicted; of more than 32 classes none |
|                      | confidence  | 1 in wrong or right, and the cell of the largest probability               |
| a number             | errors      | 1 in the cell of the absolute error; `MOMENTS` of the error e, the target  |
|                      |             | y and its place u in [-1, 1], on its range; 1 where one is beyond it       |
| a time               | pairs       | 1 in the cells of time, event or censoring, and risk                       |
| a text               | tokens      | 1 in the cell of the share of its tokens that were the likeliest, and that |
|                      |             | share                                                                      |
| all but a time       | loss        | the loss, up to `largest_loss`                                             |

and of each group of rows the same but for confidence and loss. With `sites` each site adds, once, a 1 in the cell of
its own figure. All is scaled by one factor, so that phi has an L2 norm of at most 1 whatever the row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from privacy.errors import JobError, RunError
from strategies.job import Job, stored_job
from strategies.job_data import Data
from strategies.measured import check_exact
from strategies.parameters import Parameters, vector_hash
from strategies.statistics import class_names

Kind = Literal["binary", "classes", "number", "time", "text"]

MOST_CLASSES = 32  # Of more the confusion of each with each is not counted.
MOMENTS = ("|e|", "e^2", "u", "u^2", "|y|", "outside")
SITE_FIGURES: Mapping[Kind, tuple[str, ...]] = {
    "binary": ("accuracy", "auc"),
    "classes": ("accuracy",),
    "number": ("mae",),
    "time": ("c_index",),
    "text": ("accuracy",),
}
WHOLE = ""  # As a group: all rows.
SITES = "sites "  # Before the figure by which sites are counted.


@dataclass(frozen=True)
class Block:
    """The coordinates `start` to `start + size` of phi: what of `group`, which is a column and its place there."""

    kind: str
    start: int
    size: int
    group: str = WHOLE
    place: int = 0

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


def kind_of(data: Data) -> Kind:
    """What kind of figures a target has."""
    match data.target_type:
        case "number" | "time":
            return data.target_type
        case "text":
            return "text"
        case "next" if any(column.type == "tokens" for column in data.columns.values()):
            return "text"
        case "next" | "tags":
            return "classes"
    return "binary" if data.classes is None or len(data.classes) == 2 else "classes"


def labels_of(data: Data) -> list[str]:
    """The names of the classes; of a next character the letters, and one for all others."""
    if data.target_type == "next":
        return ["other", *(data.columns[data.target].alphabet or "")]
    return class_names(data)


def range_of(job: Job) -> tuple[float, float]:
    """The public range of a number that is predicted."""
    assert job.evaluation is not None
    found = job.evaluation.target_range or job.data.target_range
    assert found is not None, "check_evaluation wants one"
    return found


def times_of(job: Job) -> list[float]:
    """The public ends of the cells of a survival time; a last one has no end."""
    assert job.evaluation is not None
    return job.evaluation.times or job.task.intervals or []


def blocks_of(job: Job) -> list[Block]:
    """What phi holds, in order."""
    choice, kind = job.evaluation, kind_of(job.data)
    assert choice is not None
    found: list[Block] = []

    def add(name: str, size: int, group: str = WHOLE, place: int = 0) -> None:
        start = found[-1].start + found[-1].size if found else 0
        found.append(Block(name, start, size, group, place))

    def add_rows(group: str = WHOLE, place: int = 0) -> None:
        match kind:
            case "binary":
                add("scores", 2 * choice.bins, group, place)
            case "classes":
                classes = len(labels_of(job.data))
                if classes <= MOST_CLASSES:
                    add("confusion", classes**2, group, place)
                if group == WHOLE or classes > MOST_CLASSES:
                    add("confidence", 2 * choice.bins, group, place)
            case "number":
                add("errors", choice.bins + len(MOMENTS), group, place)
            case "time":
                add("pairs", 2 * (len(times_of(job)) + 1) * choice.bins, group, place)
            case "text":
                add("tokens", choice.bins + 1, group, place)

    add_rows()
    if kind != "time":
        add("loss", 1)
    for column, group in (choice.groups or {}).items():
        for place in range(len(group.names)):
            add_rows(column, place)
    if choice.sites is not None:
        for name in SITE_FIGURES[kind]:
            add(SITES + name, choice.sites + 1)
    return found


def size_of(job: Job) -> int:
    """The number of coordinates of phi."""
    last = blocks_of(job)[-1]
    return last.start + last.size


def scale_of(job: Job) -> float:
    """The factor that gives phi an L2 norm of at most 1: a row is in one group of each column, and in one cell of each
    count; every moment is at most 1, and so is a loss."""
    most: dict[tuple[str, str], int] = {}
    for block in blocks_of(job):
        most[block.group, block.kind] = {"errors": 1 + len(MOMENTS), "tokens": 2}.get(block.kind, 1)
    return 1 / math.sqrt(sum(most.values()))


def check_evaluation(job: Job) -> None:
    """Raise `ValueError` unless the job's model is the mean of phi, and its target has what phi needs."""
    check_exact(job, "evaluations")
    choice, kind = job.evaluation, kind_of(job.data)
    assert choice is not None
    if job.task.name == "statistics":
        raise ValueError('evaluation: a job of task "statistics" has no model to evaluate; leave [evaluation] out')
    if kind == "number" and choice.target_range is None and job.data.target_range is None:
        raise ValueError("evaluation: errors are counted on a public scale: give evaluation.target_range")
    if kind != "number" and choice.target_range is not None:
        raise ValueError('evaluation.target_range is for target_type = "number"')
    if kind == "time" and not times_of(job):
        raise ValueError("evaluation: times are counted in public cells: give evaluation.times, their ends")
    if kind != "time" and choice.times is not None:
        raise ValueError('evaluation.times is for target_type = "time"')
    if choice.groups is not None and job.data.forecast is not None:
        raise ValueError(
            "evaluation.groups with data.forecast: a row is made of several periods, and belongs to no group; leave "
            "groups out"
        )
    # What is left out before rows are split moves the others' places, unless they are those of the whole table.
    by_others = kind in ("binary", "classes") or job.data.on_missing == "drop"
    if job.privacy.record is not None and job.data.stratify and job.data.held_out is None and by_others:
        raise ValueError(
            "privacy.record with data.stratify: one row's label, or that it is complete, would decide which others are "
            "tested, which no noise for one row covers; train the model with data.stratify = false, or take "
            "privacy.client"
        )
    if job.data.stratify is None:
        raise ValueError("evaluation: data.stratify says which rows are for testing: give evaluation.run, or both")
    if job.privacy.record is not None and choice.sites is not None:
        raise ValueError(
            "evaluation.sites with privacy.record: a site's figure depends on all of its rows together, which no noise "
            "for one row covers; take privacy.client, or leave sites out"
        )
    if job.privacy.record is not None and choice.model == "own":
        raise ValueError(
            'evaluation.model = "own" with privacy.record: a site\'s own model was trained on its records without '
            'noise, and only its test rows would be covered; take privacy.client, or model = "shared"'
        )


def reads_alike(job: Job, trained: Job) -> bool:
    """Whether an evaluation reads rows as the job that trained its model did, wherever they are."""
    where = dict.fromkeys(("bundled", "folder", "path", "files", "client"))
    ours, theirs = job.data, trained.data.model_copy(update={"stratify": trained.stratified})
    return ours.model_copy(update=where) == theirs.model_copy(update=where) and job.task == trained.task


def with_evaluated(raw: Mapping[str, Any], *, beside: Path, where: str) -> dict[str, Any]:
    """Return a job file's parsed text with what `evaluation.run` says: the job it evaluates, its data and its task.

    Of `[data]` the file itself may say where the records are (`bundled`, `folder`, `path`, `files`, `client`), and no
    more: rows must be read as those that the model was trained on. Raises `JobError`.
    """
    choice = dict(raw["evaluation"])
    named = choice["run"]
    if not isinstance(named, str):
        raise JobError(f"{where}: evaluation.run: should be a run folder")
    run = beside / named if (beside / named).exists() else Path(named)
    if not (run / "job.toml").is_file():
        raise JobError(f"{where}: evaluation.run: {run} is no run folder")
    trained = stored_job(run / "job.toml")
    if trained.evaluation is not None or trained.task.name == "statistics":
        raise JobError(f"{where}: evaluation.run: {run} trained no model: it is itself a measurement")
    if not (run / "model.safetensors").is_file():
        raise JobError(f"{where}: evaluation.run: {run} is not finished; `fedchorus resume` it")
    try:
        model_hash = vector_hash(Parameters.load(run / "model.safetensors")[1])
    except RunError as error:
        raise JobError(f"{where}: evaluation.run: {error}") from None
    _check_own(choice, trained, where=where)
    own, simulation = raw.get("data") or {}, raw.get("simulation") or {}
    for key, table in (("data", own), ("simulation", simulation)):
        if not isinstance(table, dict):
            raise JobError(f"{where}: {key}: should be a table, got {table!r}")
    sources = {"bundled", "folder", "path", "files", "client"}
    if strange := sorted(set(own) - sources):
        raise JobError(
            f"{where}: data.{strange[0]}: an evaluation reads rows as the model's job did; only where they are may "
            f"differ: {', '.join(sorted(sources))}"
        )
    if raw.get("task"):
        raise JobError(f"{where}: task: an evaluation has the task of the job that it evaluates; leave it out")
    data = trained.data.model_dump(exclude_none=True, mode="json")
    # Which rows are for testing must not change with the evaluation's own privacy.
    data["stratify"] = trained.stratified
    for key in ("bundled", "path", "files") if set(own) & {"bundled", "path", "files"} else ():
        data.pop(key, None)
    if "files" in own:
        data.pop("client", None)
    if own:  # As in any job, its paths start beside its own file.
        if not isinstance(own.get("folder", "."), str):
            raise JobError(f"{where}: data.folder: should be text, got {own['folder']!r}")
        own = {**own, "folder": str((beside / own.get("folder", ".")).resolve())}
    simulation = dict(simulation)
    if trained.simulation.partition is not None and "client" not in own and "files" not in own:
        simulation.setdefault("partition", trained.simulation.partition.model_dump(exclude_none=True, mode="json"))
    return {
        "name": f"{trained.name[:53]}-evaluation",
        "seed": trained.seed,
        **raw,
        "data": {**data, **own},
        "task": trained.task.model_dump(exclude_none=True, mode="json"),
        "evaluation": {"model_hash": model_hash, **choice, "run": str(run.resolve()), "of": trained.hash},
        **({"simulation": simulation} if simulation else {}),
    }


def _check_own(choice: Mapping[str, Any], trained: Job, *, where: str) -> None:
    from strategies.catalogue import strategy_for  # It builds on jobs, which build on this module.

    if choice.get("model") == "own" and not strategy_for(trained).traits.personal:
        raise JobError(
            f'{where}: evaluation.model = "own": strategy.name = "{trained.strategy.name}" leaves no site a model of '
            'its own; take "ditto" or "fedper" there, or model = "shared" here'
        )

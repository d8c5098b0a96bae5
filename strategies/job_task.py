"""The `[task]` of a job: model, loss and metrics; and its `[evaluation]`: what of a finished model is measured."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from strategies.sections import Bound, Count, NotNegative, Positive, Section, refuse_repeated


class TaskChoice(Section):
    """Model, loss and metrics. `name` may be `package.module:Name`, a class of your own (see docs/extending.md)."""

    name: str = "tabular-classification"
    model: Literal[
        "logistic-regression",
        "linear",
        "mlp",
        "resnet",
        "ft-transformer",
        "cnn",
        "causal-convolution",
        "matrix-factorisation",
    ] = "logistic-regression"
    hidden: list[Count] = Field(default=[32, 16])
    heads: Count | None = None
    loss: Literal["squared", "huber", "cox", "discrete-time"] | None = None
    huber_delta: Positive | None = None
    penalty: NotNegative | None = None
    intervals: list[Positive] | None = Field(default=None, min_length=1)
    statistics: list[Literal["moments", "histogram", "missing", "categories", "labels"]] | None = None
    bins: Annotated[int, Field(ge=2, le=1000)] | None = None

    @model_validator(mode="after")
    def _statistics_are_measured(self) -> Self:
        if self.name != "statistics" and (self.statistics is not None or self.bins is not None):
            raise ValueError('statistics and bins are for name = "statistics"')
        if self.statistics is not None and not 0 < len(set(self.statistics)) == len(self.statistics):
            raise ValueError("statistics: name one or more blocks, each once")
        return self

    @model_validator(mode="after")
    def _settings_fit_model_and_loss(self) -> Self:
        if self.heads is not None and self.model != "ft-transformer":
            raise ValueError('heads is for model = "ft-transformer"')
        if self.huber_delta is not None and self.loss != "huber":
            raise ValueError('huber_delta is for loss = "huber"')
        if self.penalty is not None and self.model != "matrix-factorisation":
            raise ValueError('penalty is for model = "matrix-factorisation"; others have training.weight_decay')
        if (self.intervals is not None) != (self.loss == "discrete-time"):
            raise ValueError('loss = "discrete-time" and intervals, the public ends of its time intervals, go together')
        if any(a >= b for a, b in pairwise(self.intervals or [])):
            raise ValueError("intervals must rise")
        return self


class Group(Section):
    """Rows by a column of the table, which need not be a feature: those of each of `values`, or of each cell between
    the `edges`, of which the lower end belongs to a cell and the upper to the next."""

    values: list[str | int | float] | None = Field(default=None, min_length=1)
    edges: list[Bound] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.values is None) == (self.edges is None):
            raise ValueError("give exactly one of values and edges")
        refuse_repeated("values", self.values)
        if any(a >= b for a, b in pairwise(self.edges or [])):
            raise ValueError("edges must rise")
        return self

    @property
    def names(self) -> list[str]:
        """Of the groups, in order."""
        if self.values is not None:
            return [str(value) for value in self.values]
        edges = self.edges or []
        inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        return [f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and above"]


class Evaluation(Section):
    """Measure the finished model of another job on every site's test rows, as one sum (docs/evaluation.md).

    `run` is that job's folder, from which a job file takes `of`, `model_hash`, `data` and `task`; `of` is its hash, by
    which the sites know it, and `model_hash` that of its shared model, which they hold theirs to. `model` is the shared
    one, or each site's `own` that a personal strategy left there. Scores are counted in `bins` equal cells, times of
    survival in the cells that end at `times`, and losses up to `largest_loss`. `groups` are measured each by itself: a
    site leaves out one of fewer than `smallest` of its test rows, and then the next smallest until those left out are
    as many. With `sites` each site also counts itself into one of so many cells of its own figures.
    """

    run: str | None = None
    of: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    model: Literal["shared", "own"] = "shared"
    bins: Annotated[int, Field(ge=10, le=1000, multiple_of=10)] = 100
    times: list[Positive] | None = Field(default=None, min_length=1)
    target_range: tuple[Bound, Bound] | None = Field(default=None, strict=False)
    largest_loss: Positive = 10.0
    groups: dict[str, Group] | None = Field(default=None, min_length=1)
    smallest: Count = 10
    sites: Annotated[int, Field(ge=2, le=100)] | None = None

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if any(a >= b for a, b in pairwise(self.times or [])):
            raise ValueError("times must rise")
        if self.target_range is not None and not self.target_range[0] < self.target_range[1]:
            raise ValueError(f"target_range must be [low, high] with low < high, got {list(self.target_range)}")
        return self

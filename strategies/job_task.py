"""The `[task]` of a job: model, loss and metrics; and its `[evaluation]`: what of a finished model is measured."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from strategies.sections import Bound, Count, Name, NotNegative, Positive, Section, Sha256, refuse_repeated


class Tuning(Section):
    """What of a pre-trained model is trained; a new head always is (docs/finetuning.md).

    `lora`: factors of rank `rank` beside the linear layers whose names end in one of `targets`, times `alpha` / `rank`.
    Of their `factors` A and B only `b` is trained, from a fixed A of orthonormal rows, so that what sites add up is
    exact; or `both`; or each in turn, round by round (`alternate`). `ranks` names weaker sites and the first so many
    of the rank that they train. Every `refactor_every` rounds the server turns the factors, so that the first matter
    most. With `calibration`, a public file of records, A starts where the inputs of each layer vary in it rather than
    at random; `calibration_hash` is filled in where the job is made. `bias` and `norms` train what these words say,
    `head` the head alone, `full` all.

    With `layers` only the last so many blocks are tuned; with `depth` only the first so many are used at all, which for
    classes is often better, as the last ones were made for another task. In the first `head_rounds` rounds the head is
    trained alone. `scale` is the length of the vectors that the
    head sees: its gradients grow with it, against the other parameters'.
    """

    method: Literal["lora", "bias", "norms", "head", "full"] = "lora"
    rank: Count = 8
    alpha: Positive | None = None
    targets: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    factors: Literal["b", "both", "alternate"] = "b"
    ranks: dict[Name, Count] | None = Field(default=None, min_length=1)
    refactor_every: Count | None = None
    calibration: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    calibration_hash: Sha256 | None = None
    layers: Count | None = None
    depth: Count | None = None
    head_rounds: Count | None = None
    scale: Positive = 1.0

    @model_validator(mode="after")
    def _of_its_method(self) -> Self:
        own = ("rank", "alpha", "targets", "factors", "ranks", "refactor_every", "calibration")
        # A resolved job holds the defaults: what is set to them is not given.
        given = {key for key in own if getattr(self, key) != type(self).model_fields[key].default}
        if self.method != "lora" and given:
            raise ValueError(f'{min(given)} is for method = "lora"')
        if self.refactor_every is not None and self.factors != "b":
            raise ValueError('refactor_every is for factors = "b": it makes new factors of the sum of B A')
        if self.ranks is not None and self.factors != "b":
            raise ValueError('ranks is for factors = "b": the columns of B are averaged each by itself')
        if self.calibration is not None and self.refactor_every is not None:
            raise ValueError("calibration scales the directions of A, which refactor_every would undo; leave one out")
        if self.calibration is None and self.calibration_hash is not None:
            raise ValueError("calibration_hash belongs to calibration")
        if any(rank >= self.rank for rank in (self.ranks or {}).values()):
            raise ValueError(f"ranks are below the rank of {self.rank}, which all other sites train")
        refuse_repeated("targets", self.targets)
        return self


class TaskChoice(Section):
    """Model, loss and metrics. `name` may be `package.module:Name`, a class of your own (see docs/extending.md).

    A `pretrained` model comes from its `checkpoint`, the same at every site: `checkpoint_hash` and `tokenizer_hash` are
    filled in where the job is made. It computes in `precision`; what is trained is float32. With `checkpointing` it
    keeps less in memory and computes more.
    """

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
        "pretrained",
    ] = "logistic-regression"
    checkpoint: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    checkpoint_hash: Sha256 | None = None
    tokenizer_hash: Sha256 | None = None
    tuning: Tuning | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    checkpointing: bool | None = None
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
    def _pretrained(self) -> Self:
        if (self.model == "pretrained") != (self.checkpoint is not None):
            raise ValueError('model = "pretrained" and checkpoint, where it lies, go together')
        for key in ("checkpoint_hash", "tokenizer_hash", "tuning", "precision", "checkpointing"):
            if getattr(self, key) is not None and self.model != "pretrained":
                raise ValueError(f'{key} is for model = "pretrained"')
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
    of: Sha256
    model_hash: Sha256
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

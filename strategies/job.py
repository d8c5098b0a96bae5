"""A job: one training run, as its TOML file says, checked before anything else happens.

Precedence: defaults < file < `--set key=value`. An unknown key is an error that names the nearest known one. The
resolved job is written to the run folder; its SHA-256 names the job in every message and ledger entry.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from privacy.errors import JobError
from strategies.explain import explain, one_line

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Bound = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]


Setting = bool | int | float | str | list[bool | int | float | str]

# What makes the model of a statistics job the mean over all records.
ONE_EXACT_ROUND = {"rounds": 1, "local_steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0}

MOST_TEXT = 2**20  # Characters of a job that comes over the network.
MOST_DOTS = 64  # In a line of it: a dotted key of n parts takes tomllib n^2 steps.


class Section(BaseModel):
    """A table of the job file. Strict: no unknown keys, no silent conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _refuse_repeated(key: str, values: Sequence[str | int | float] | None) -> None:
    texts = [str(value) for value in values or []]
    for position, value in enumerate(values or []):
        # Data are compared by number (1 is 1.0), or by text where one of the values is text (1 is "1").
        if value in list(values or [])[:position] or str(value) in texts[:position]:
            raise ValueError(f"`{key}`: {value!r} is listed twice")


class Column(Section):
    """One feature, or what becomes many by public constants.

    A number with its `range`; a category with its `values`; a text, whose n-grams of words or letters are hashed into
    `buckets`; the first `window` characters of an `alphabet`, for a next-character task; a square image of 8-bit
    numbers with its `shape` [side, side] or [side, side, channels]; an id from 1 to `count`.

    All of it is declared, not measured: a minimum or a vocabulary taken from the records would be a release. `mean` and
    `sd` standardise a number, `fill` stands for what is missing: a statistics job measures them (data.statistics).
    """

    type: Literal["number", "category", "text", "characters", "image", "id"] = "number"
    range: tuple[Bound, Bound] | None = Field(default=None, strict=False)
    values: list[str | int | float] | None = None
    buckets: Count | None = None
    ngrams: tuple[Count, Count] | None = Field(default=None, strict=False)
    analyzer: Literal["words", "letters"] | None = None
    alphabet: Annotated[str, Field(min_length=1)] | None = None
    window: Count | None = None
    shape: list[Count] | None = None
    count: Count | None = None
    mean: Bound | None = None
    sd: Positive | None = None
    fill: str | int | float | None = None

    @model_validator(mode="after")
    def _constants_fit(self) -> Self:
        if (self.mean is None) != (self.sd is None):
            raise ValueError("mean and sd go together: (number - mean) / sd")
        if self.mean is not None and self.range is None:
            raise ValueError("mean and sd are for a number with a `range`, to which it is clipped first")
        if self.fill is not None and self.type == "category" and self.fill not in (self.values or []):
            raise ValueError("fill must be one of the category's `values`")
        if self.type == "number" and isinstance(self.fill, str):
            raise ValueError("fill must be a number, as the column is")
        return self

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        if self.type == "category" and len(self.values or []) < 2:
            raise ValueError("a category needs its `values`, two or more")
        _refuse_repeated("values", self.values)
        if self.type == "category" and self.range is not None:
            raise ValueError("a category has `values`, not a `range`")
        if self.type == "number" and self.values is not None:
            raise ValueError('a number has a `range`, not `values` (or write type = "category")')
        needed, allowed = _OF_COLUMN[self.type]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"a column of type {self.type!r} needs its `{key}`")
        for key in (key for keys in _OF_COLUMN.values() for key in (*keys[0], *keys[1])):
            if getattr(self, key) is not None and key not in (*needed, *allowed):
                raise ValueError(f"a column of type {self.type!r} has no `{key}`")
        _refuse_repeated("alphabet", list(self.alphabet or ""))
        if self.ngrams is not None and self.ngrams[0] > self.ngrams[1]:
            raise ValueError(f"ngrams must be [shortest, longest], got {list(self.ngrams)}")
        if self.shape is not None and (len(self.shape) not in (2, 3) or self.shape[0] != self.shape[1]):
            raise ValueError(f"shape must be [side, side] or [side, side, channels], got {self.shape}")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range must be [low, high] with low < high, got {list(self.range)}")
        return self


# Of each type of column: the keys that it needs, and those that it may have.
_OF_COLUMN: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "number": ((), ("range",)),
    "category": (("values",), ()),
    "text": (("buckets",), ("ngrams", "analyzer")),
    "characters": (("alphabet", "window"), ()),
    "image": (("shape",), ()),
    "id": (("count",), ()),
}


class HeldOut(Section):
    """Which rows are for testing, where that is laid down: those with one of `values` in `column`; those of a second
    file beside the first (`path`); or those in other arrays of the same .npz file (`arrays`: the name of each array of
    training rows to that of the test rows)."""

    column: str | None = None
    values: list[str | int | float] | None = Field(default=None, min_length=1)
    path: str | None = None
    arrays: dict[str, str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(way is not None for way in (self.column, self.path, self.arrays)) != 1:
            raise ValueError("give exactly one of column, path and arrays")
        if (self.column is None) != (self.values is None):
            raise ValueError("column and values go together")
        return self


class Forecast(Section):
    """Make rows of a site's own series: the target `lags` periods ago, relative to its mean over the last max(`lags`)
    periods, and the season as `harmonics` pairs of sine and cosine of the day of the year.

    `time` is a column in one of `formats` (of strptime); `series` a column that tells the series of one site apart. The
    last `horizon` periods of each series are for testing. Relative values are divided by `spread`: differences of
    logarithms with data.target_log, else of the target in halves of data.target_range.
    """

    time: str
    formats: list[str] = Field(default=["%Y-%m-%d"], min_length=1)
    series: str | None = None
    lags: list[Count] = Field(default=[1], min_length=1)
    horizon: Count
    harmonics: Annotated[int, Field(ge=0, le=26)] = 2
    spread: Positive = 1.0

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        _refuse_repeated("lags", self.lags)
        return self


class Data(Section):
    """Where the records are and what they must look like.

    The target is a class: 0 or 1, or one of `classes`, or positive exactly where it is among `positive`. By
    `target_type` it may also be a number (mapped by `target_range` and `target_log` for training; metrics keep its
    unit), a time until an event or its censoring (the column `event` is 1 or 0), or the next character of a column. At
    most one of `bundled` (a data set that a dependency or fedchorus itself carries), `path` (one CSV, Parquet or .npz
    file, its sites named by the column `client`) and `files` (one file per site) says where a simulation finds the
    records; in a deployment each site has its own. Relative paths start at `folder`, which starts at the job file.
    `dataset` names the records at each site: a site keeps one ledger for each.
    """

    dataset: Name = "records"
    bundled: (
        Literal["breast-cancer", "digits", "banks", "hospitals-survival", "retailers-forecast", "retailers-recommend"]
        | None
    ) = None
    folder: str = "."
    path: str | None = None
    files: dict[Name, str] | None = None
    client: str | None = None
    target: str
    target_type: Literal["class", "number", "time", "next"] | None = None
    target_range: tuple[Bound, Bound] | None = Field(default=None, strict=False)
    target_log: bool | None = None
    event: str | None = None
    positive: list[str | int | float] | None = Field(default=None, min_length=1)
    classes: list[str | int | float] | None = Field(default=None, min_length=2)
    allow_one_class: bool = False
    header: bool = True
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    names: list[str] | None = None
    missing: list[str] = ["", "NA", "NaN", "nan", "null"]
    on_missing: Literal["refuse", "drop", "fill"] = "refuse"
    columns: dict[str, Column] = Field(min_length=1)
    scaling: Literal["range", "site"] = "range"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    stratify: bool | None = None
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    held_out: HeldOut | None = None
    forecast: Forecast | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("bundled", "path", "files") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ValueError(f"give at most one of bundled, path and files; got {' and '.join(sources)}")
        if self.positive is not None and self.classes is not None:
            raise ValueError("give at most one of positive and classes")
        _refuse_repeated("classes", self.classes)
        if not self.header and self.names is None:
            raise ValueError("header = false needs `names`, the columns in order")
        if self.header and self.names is not None:
            raise ValueError("`names` is for files without a header: set header = false")
        if self.client is not None and self.path is None and self.bundled is None:
            raise ValueError("`client` names a column of `path`; with `files` each file is a site")
        if self.target in self.columns and self.target_type != "next":
            raise ValueError(f"the target {self.target!r} is also listed in `columns`: it would be its own feature")
        if self.client is not None and self.client in self.columns:
            raise ValueError(f"the client key {self.client!r} is also listed in `columns`")
        if self.on_missing == "fill":
            empty = [name for name, column in self.columns.items() if column.fill is None]
            if empty:
                raise ValueError(
                    f'on_missing = "fill": columns.{empty[0]} has no `fill`; give data.statistics, a run of task '
                    '"statistics", or write it'
                )
        if self.scaling == "range":
            open_ended = [name for name, column in self.columns.items() if column.type == "number" and not column.range]
            if open_ended:
                raise ValueError(f'columns.{open_ended[0]} needs a `range` (or set data.scaling = "site")')
        return self

    @model_validator(mode="after")
    def _target_of_its_type(self) -> Self:
        if self.target_type not in (None, "class") and (self.positive or self.classes):
            raise ValueError('positive and classes are for target_type = "class"')
        if self.target_type != "number" and (self.target_range or self.target_log or self.forecast):
            raise ValueError('target_range, target_log and forecast are for target_type = "number"')
        if (self.target_type == "time") != (self.event is not None):
            raise ValueError('target_type = "time" and event, the column that is 1 where it happened, go together')
        if self.event is not None and self.event in (*self.columns, self.target):
            raise ValueError(f"the event {self.event!r} is also listed as another column")
        if self.target_range is not None and not self.target_range[0] < self.target_range[1]:
            raise ValueError(f"target_range must be [low, high] with low < high, got {list(self.target_range)}")
        if self.target_log and self.target_range is not None and self.target_range[0] <= 0:
            raise ValueError("target_log needs a target_range above zero")
        return self

    @model_validator(mode="after")
    def _whole_columns_and_series(self) -> Self:
        whole = [name for name, column in self.columns.items() if column.type in ("characters", "image")]
        if whole and len(self.columns) > 1:
            raise ValueError(f"columns.{whole[0]} is a whole record by itself: it must be the only one of `columns`")
        if self.target_type == "next" and (whole != [self.target] or self.columns[self.target].type != "characters"):
            raise ValueError('target_type = "next" needs a target that is the one column, of type "characters"')
        if self.scaling == "site" and any(each.type not in ("number", "category") for each in self.columns.values()):
            raise ValueError('scaling = "site" is for numbers and categories alone; leave it out')
        if self.forecast is None:
            return self
        if self.forecast.time in (*self.columns, self.target):
            raise ValueError(f"the time {self.forecast.time!r} of the forecast is also listed as another column")
        if not self.target_log and self.target_range is None:
            raise ValueError("forecast needs a public scale: set target_log = true, or give target_range")
        if self.held_out is not None:
            raise ValueError("forecast holds out the last periods of each series: leave out held_out")
        return self


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
    hidden: list[Count] = [32, 16]
    heads: Count | None = None
    loss: Literal["squared", "huber", "cox", "discrete-time"] | None = None
    huber_delta: Positive | None = None
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
        if (self.intervals is not None) != (self.loss == "discrete-time"):
            raise ValueError('loss = "discrete-time" and intervals, the public ends of its time intervals, go together')
        if any(a >= b for a, b in pairwise(self.intervals or [])):
            raise ValueError("intervals must rise")
        return self


class StrategyChoice(Section):
    """How updates become the next model. `name` may be `package.module:Name`.

    What else stands here are the strategy's own settings (docs/strategies.md); its class says what they may be.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting] = Field(init=False)

    name: str = "fedavg"
    weighting: Literal["rows", "equal"] = "rows"
    server_learning_rate: Positive | None = None


class Schedule(Section):
    """How the local learning rate changes over the rounds, as a share of `training.learning_rate`.

    It rises over the first `warmup` rounds, then stays (`constant`), falls to `last` along half a cosine (`cosine`) or
    a straight line (`linear`), or is multiplied by `factor` every `every` rounds (`step`).
    """

    kind: Literal["constant", "cosine", "linear", "step"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    last: Annotated[float, Field(ge=0, le=1)] = 0.0
    factor: Rate = 0.5
    every: Count = 10

    def share(self, round_number: int, rounds: int) -> float:
        """Of the learning rate in round `round_number` of `rounds`, counted from 1; always more than 0."""
        if round_number <= self.warmup:
            return round_number / (self.warmup + 1)
        done = (round_number - 1 - self.warmup) / max(1, rounds - self.warmup)
        match self.kind:
            case "constant":
                return 1.0
            case "cosine":
                return self.last + (1 - self.last) * (1 + math.cos(math.pi * done)) / 2
            case "linear":
                return 1 - (1 - self.last) * done
            case "step":
                return float(self.factor ** ((round_number - 1 - self.warmup) // self.every))


class Training(Section):
    """What a client does in a round. With record-level privacy a batch is a Poisson sample of expected `batch_size`.

    A site stops when `budget_s` seconds are over, after one step at least; `work` is the most steps that a site takes.
    Neither changes what a round is charged with: the steps that the job plans. `weak` is the share of the model,
    counted in parameters from its end, that a site trains; the layers before it stay as they are there.
    """

    rounds: Count
    learning_rate: Positive
    schedule: Schedule | None = None
    local_steps: Count | None = None
    local_epochs: Count | None = None
    batch_size: Count | None = None
    sampling_rate: Rate | None = None
    weight_decay: NotNegative = 0.0
    budget_s: Positive | None = None
    work: dict[Name, Count] | None = None
    weak: dict[Name, Annotated[float, Field(gt=0, lt=1)]] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @model_validator(mode="after")
    def _one_length_one_batch(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of local_steps and local_epochs")
        if (self.batch_size is None) == (self.sampling_rate is None):
            raise ValueError("give exactly one of batch_size and sampling_rate")
        return self

    def learning_rate_in(self, round_number: int) -> float:
        """The local learning rate of a round, counted from 1."""
        if self.schedule is None:
            return self.learning_rate
        return self.learning_rate * self.schedule.share(round_number, self.rounds)

    def rate_for(self, rows: int) -> float:
        """The share of a site's `rows` that a batch takes: its Poisson sampling rate under record-level privacy."""
        if self.sampling_rate is not None:
            return self.sampling_rate
        assert self.batch_size is not None
        return min(1.0, self.batch_size / rows)

    def steps_for(self, rows: int) -> int:
        """Local steps a round at a site with `rows` training rows."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return math.ceil(self.local_epochs / self.rate_for(rows) - 1e-9)


class Cohort(Section):
    """Whom a round asks: everyone; `size` sites drawn at random; each by its own coin of chance `rate`, which nobody
    outside the server sees; or each only every `separation` rounds. Fewer than `minimum` answers end the run.
    `deadline_s` is how long a round waits for them, in a deployment an hour by default. With `over` so large a share
    more are asked than `size`, and the first `size` answers count."""

    size: Count | None = None
    rate: Rate | None = None
    separation: Count | None = None
    minimum: Count | None = None
    deadline_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] | None = None
    over: Annotated[float, Field(gt=0, le=10)] | None = None

    @model_validator(mode="after")
    def _one_way_that_fits(self) -> Self:
        given = [key for key in ("size", "rate", "separation") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give at most one of size, rate and separation; got {' and '.join(given)}")
        if self.size is not None and (self.minimum or 1) > self.size:
            raise ValueError(f"cohort.minimum ({self.minimum}) is larger than cohort.size ({self.size})")
        if self.over is not None and self.size is None:
            raise ValueError("cohort.over asks more sites than the cohort.size that counts: give cohort.size too")
        return self

    @property
    def asked(self) -> int | None:
        """How many a round asks of which `size` count; None for everyone."""
        return None if self.size is None else math.ceil(self.size * (1 + (self.over or 0.0)) - 1e-9)


class Protection(Section):
    """What both units of privacy are told in.

    `epsilon` alone: the noise is calibrated so that all rounds together cost at most epsilon. `noise_multiplier`
    alone: no limit, the cost is reported. Both: epsilon is a budget, and a plan that exceeds it is refused.
    Clipping is of the whole vector, or of each of the model's parameter arrays by itself with the same total.
    A crash within a round has spent it; `spare_rounds` are planned and paid for besides `training.rounds`, so that the
    run can still go on to the end.
    """

    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Annotated[float, Field(ge=0.0625, le=2**20)] | None = None
    clip_norm: Positive = 1.0
    clipping: Literal["flat", "per-layer"] = "flat"
    spare_rounds: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _some_noise(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("give epsilon (a target), noise_multiplier, or both (epsilon is then a budget)")
        return self


class RecordPrivacy(Protection):
    """Record-level differential privacy at every site: each record's gradient is clipped to `clip_norm`."""


class AdaptiveClip(Section):
    """Let the clip norm follow a quantile of the updates' norms (Andrew et al. 2021), from `clip_norm` on.

    `bit_noise` is the noise on how many were below it; by default a twentieth of the expected cohort.
    """

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: Positive = 0.2
    bit_noise: Positive | None = None


class ClientPrivacy(Protection):
    """Client-level differential privacy: each client's whole update is clipped to `clip_norm`.

    `central`: the server adds the noise to the sum, once, and is trusted with it. `local`: each client adds it to its
    own update. `distributed`: each client adds a share, and secure aggregation shows only the sum. `shares` is how
    those are distributed. `noise`: fresh in each round, or correlated over rounds (central only, needs
    cohort.separation).
    """

    placement: Literal["central", "local", "distributed"] = "central"
    shares: Literal["discrete-gaussian", "skellam"] = "discrete-gaussian"
    noise: Literal["independent", "banded", "bsr", "blt"] = "independent"
    adaptive_clip: AdaptiveClip | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.placement != "central" and self.noise != "independent":
            raise ValueError('correlated noise needs placement = "central": one place must remember it')
        if self.shares != "discrete-gaussian" and self.placement != "distributed":
            raise ValueError('shares is for placement = "distributed": nothing else is added up from shares')
        if self.placement == "distributed" and self.clipping == "per-layer":
            raise ValueError('placement = "distributed" rotates the whole vector: it needs clipping = "flat"')
        if self.adaptive_clip is not None and (self.placement != "central" or self.noise != "independent"):
            raise ValueError('adaptive_clip needs placement = "central" and noise = "independent"')
        if self.clipping == "per-layer" and self.noise != "independent":
            raise ValueError('clipping = "per-layer" needs noise = "independent"')
        if self.noise != "independent" and self.spare_rounds:
            raise ValueError("correlated noise is planned for the whole training: it has no spare_rounds")
        return self


class Privacy(Section):
    record: RecordPrivacy | None = None
    client: ClientPrivacy | None = None

    @property
    def central(self) -> ClientPrivacy | None:
        """Client-level privacy by noise that the server adds."""
        return self.client if self.client is not None and self.client.placement == "central" else None

    @property
    def local(self) -> ClientPrivacy | None:
        """Client-level privacy by noise that each client adds."""
        return self.client if self.client is not None and self.client.placement == "local" else None

    @property
    def distributed(self) -> ClientPrivacy | None:
        """Client-level privacy by the shares of noise that all clients add."""
        return self.client if self.client is not None and self.client.placement == "distributed" else None

    @property
    def client_at_sites(self) -> ClientPrivacy | None:
        """Client-level privacy by noise that does not come from the server: each site charges itself."""
        return self.client if self.central is None else None

    @property
    def at_sites(self) -> list[Protection]:
        """What the sites protect, and therefore keep a ledger of."""
        return [own for own in (self.record, self.client_at_sites) if own is not None]


class SecureAggregation(Section):
    """Sum updates so that the server sees the sum and nothing else, even if it lies.

    The server may be in league with `colluders` of the sites, and `dropouts` of those asked may fail in a round (by
    default as many as the threshold of two thirds leaves). Each number of an update travels in `bits`; its size is at
    most `reach`. `groups` are summed apart, so that a reduction over their sums can leave out groups that lie
    (`robust`). `retries` is how often a round whose masked update already left may be run again.
    """

    colluders: Annotated[int, Field(ge=0, lt=2**15)] = 1
    dropouts: Annotated[int, Field(ge=0, lt=2**15)] | None = None
    graph: Literal["complete", "regular"] = "complete"
    bits: Literal[16, 20, 32] = 32
    reach: Positive | None = None
    groups: Count = 1
    retries: Annotated[int, Field(ge=0, lt=100)] = 0

    @model_validator(mode="after")
    def _groups_have_a_majority(self) -> Self:
        if self.groups == 2:
            raise ValueError("two groups have no majority: use three or more, or one")
        return self


def _norm(value: object) -> float | str:
    if value == "median":
        return "median"
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f'should be a number greater than 0, or "median", got {value!r}')
    return float(value)


class Robust(Section):
    """Bear sites that lie: `reduce` stands in place of the sum, over sites' updates or `secure_aggregation.groups`.

    Each counts alike, as a weight may be a lie too. `byzantine` is how many of them may lie, by default a fifth,
    rounded up. First each update is scaled down to the L2 norm `max_norm`, or to the median norm of the round. What
    needs all updates of a round at once keeps them in the server's memory, up to `memory_mib`.
    """

    reduce: Literal["sum", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"] = "sum"
    byzantine: Count | None = None
    max_norm: Annotated[float | Literal["median"], PlainValidator(_norm)] | None = None
    memory_mib: Count = 4096

    @model_validator(mode="after")
    def _liars_of_a_reduction(self) -> Self:
        if self.byzantine is not None and self.reduce == "sum":
            raise ValueError('byzantine is for a reduce that bears lies, "median", say: one moves the sum at will')
        return self

    @property
    def plain(self) -> bool:
        """Whether this is the sum and nothing else."""
        return self.reduce == "sum" and self.max_norm is None


class SiteMix(Section):
    """One simulated site: how many rows it gets and which share of them is positive."""

    rows: Count
    positive: Annotated[float, Field(ge=0, le=1)]


class Partition(Section):
    """How one table becomes many sites: a `mix` of named sites, or `clients` drawn from a Dirichlet(`alpha`)."""

    mix: dict[Name, SiteMix] | None = None
    clients: Count | None = None
    alpha: Positive = 1.0
    least_rows: Annotated[int, Field(ge=4)] = 8

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.mix is None) == (self.clients is None):
            raise ValueError("give exactly one of mix and clients")
        return self


class Faults(Section):
    """What goes wrong on purpose: chances, per site and round, that a site drops out or answers with something
    malformed; and the share of the sites, the same in every round, that lies (`byzantine`).

    | `attack`   | a lying site sends, its weight kept                                             |
    |------------|---------------------------------------------------------------------------------|
    | sign-flip  | its update times -`scale`                                                       |
    | scaled     | its update times `scale`                                                        |
    | noise      | Gaussian noise, `scale` times as long as its update                             |
    | label-flip | `scale` times the update that it trains with class c called (classes - 1 - c)   |

    `scale` is 10 by default, and 1 for label-flip.
    """

    dropout: Share = 0.0
    malformed: Share = 0.0
    byzantine: Share = 0.0
    attack: Literal["sign-flip", "scaled", "noise", "label-flip"] = "sign-flip"
    scale: Positive | None = None

    @model_validator(mode="after")
    def _share_one_chance(self) -> Self:
        if self.dropout + self.malformed > 1:
            raise ValueError(f"dropout and malformed add up to {self.dropout + self.malformed:g}, more than 1")
        return self


class Device(Section):
    """A kind of device, which a `share` of the sites are: it takes `speed` steps in a second, is there in a round with
    the chance `availability`, and trains the share `trains` of the model (`training.weak`)."""

    share: Rate
    speed: Positive = 1.0
    availability: Rate = 1.0
    trains: Rate = 1.0


class Simulation(Section):
    """What only a simulation may do. `noise = "seeded"` repeats exactly and protects nobody. Kinds of `devices` put the
    rounds on a virtual clock, which deadlines then go by."""

    engine: Literal["inline", "flower"] = "inline"
    noise: Literal["os", "seeded"] = "os"
    baselines: bool = True
    partition: Partition | None = None
    faults: Faults = Faults()
    devices: dict[Name, Device] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _devices_are_all_sites(self) -> Self:
        if self.devices is None:
            return self
        if abs((total := sum(device.share for device in self.devices.values())) - 1) > 1e-6:
            raise ValueError(f"devices: their shares add up to {total:g}, not to 1")
        if self.engine != "inline":
            raise ValueError('devices are on the virtual clock of engine = "inline"; leave out engine')
        return self


class Job(Section):
    """`purpose` is what the data holders' budgets are set for. Each of the `regions` is summed by itself, and the
    server sums the regions."""

    name: Name
    purpose: Name = "training"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    task: TaskChoice = TaskChoice()
    strategy: StrategyChoice = StrategyChoice()
    training: Training
    cohort: Cohort = Cohort()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation | None = None
    robust: Robust = Robust()
    regions: dict[Name, Annotated[list[Name], Field(min_length=1)]] | None = Field(default=None, min_length=1)
    simulation: Simulation = Simulation()

    @model_validator(mode="before")
    @classmethod
    def _complete_statistics(cls, raw: Any) -> Any:
        """A statistics job is one exact round: what only one value can be need not be written."""
        task = raw.get("task") if isinstance(raw, dict) else None
        if not isinstance(task, dict) or task.get("name") != "statistics":
            return raw
        blocks = {"statistics": ["moments", "histogram", "missing", "categories", "labels"], "bins": 20}
        simulation = raw.get("simulation", {})
        if isinstance(simulation, dict):
            simulation = {"baselines": False, **simulation}
        return {"training": dict(ONE_EXACT_ROUND), **raw, "task": {**blocks, **task}, "simulation": simulation}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.task.name == "statistics":
            from strategies.statistics import check_exact  # It reads jobs itself.

            check_exact(self)
        if self.data.scaling == "site" and self.privacy.record is not None:
            raise ValueError(
                'data.scaling = "site" standardises with statistics of the records, a release that no mechanism covers '
                'here; give every number a `range` and use data.scaling = "range" with record-level privacy'
            )
        if (self.data.path is not None) and self.data.client is None and self.simulation.partition is None:
            raise ValueError("data.path needs data.client (the column that names the site) or a [simulation.partition]")
        if self.simulation.partition is not None and (self.data.files or self.data.client):
            raise ValueError("simulation.partition splits one table: it cannot go with data.client or data.files")
        if self.data.bundled is not None and self.data.client is None and self.simulation.partition is None:
            raise ValueError("data.bundled needs a [simulation.partition]: it has no sites of its own")
        if self.data.forecast is not None and self.privacy.record is not None:
            raise ValueError(
                "data.forecast makes each row of several periods, and each period a part of many rows, so that a bound "
                "on one row protects no period; use [privacy.client], which protects a site as a whole"
            )
        faults = self.simulation.faults
        flips = faults.byzantine > 0 and faults.attack == "label-flip"
        if flips and self.data.target_type not in (None, "class"):
            raise ValueError('simulation.faults.attack = "label-flip" is for classes; take "sign-flip" or "noise"')
        if self.data.forecast is not None and self.simulation.partition is not None:
            raise ValueError("data.forecast needs whole series at each site: give data.client or data.files")
        self._check_client_privacy()
        self._check_secure_aggregation()
        self._check_strategy()
        return self

    def _check_strategy(self) -> None:
        """Hold the job against its strategy, if it is one of ours: nothing is imported by a name in a file."""
        from strategies.catalogue import STRATEGIES, strategy_for  # It builds on this module.

        if self.strategy.name in STRATEGIES:
            try:
                strategy_for(self)
            except JobError as error:
                raise ValueError(str(error)) from None

    def _check_client_privacy(self) -> None:
        client, cohort = self.privacy.client, self.cohort
        correlated = client is not None and client.noise != "independent"
        if client is not None and self.strategy.weighting != "equal":
            raise ValueError(
                "privacy.client counts every client alike, whatever its rows: one that weighed more would need more "
                'noise; set strategy.weighting = "equal"'
            )
        if correlated and cohort.separation is None:
            raise ValueError("privacy.client.noise: correlated noise needs cohort.separation: who returns when")
        if cohort.separation is not None and not correlated:
            raise ValueError("cohort.separation is for correlated noise (privacy.client.noise)")
        if cohort.rate is not None and self.privacy.central is None:
            raise ValueError(
                "cohort.rate is for central client-level privacy (privacy.client), which counts on nobody seeing who "
                "was asked; use cohort.size for cohorts that may be seen"
            )
        if (cohort.separation or 1) > self.training.rounds:
            raise ValueError(f"cohort.separation: {self.training.rounds} rounds would leave some clients out for ever")
        if self.privacy.central is not None and cohort.minimum is not None:
            raise ValueError(
                "cohort.minimum: with central client-level privacy an empty cohort is released like any other, since "
                "a run that ended would tell who took part; leave it out"
            )

    def _check_secure_aggregation(self) -> None:
        secure = self.secure_aggregation
        if secure is None:
            if self.privacy.distributed is not None:
                raise ValueError(
                    'privacy.client.placement = "distributed" needs [secure_aggregation]: without it the server would '
                    "see each update under its own share of the noise alone"
                )
            return
        if self.cohort.rate is not None:
            raise ValueError(
                "secure_aggregation shows the sites who takes part with them: cohort.rate counts on nobody seeing "
                "that; use cohort.size, or leave both out"
            )
        central = self.privacy.central
        if central is not None and central.noise != "independent":
            raise ValueError(
                'secure_aggregation with noise correlated over rounds is not there: use noise = "independent", or '
                'placement = "distributed", whose noise the server cannot take away'
            )
        if central is not None and (secure.bits < 32 or secure.groups > 1 or secure.reach is not None):
            raise ValueError(
                'secure_aggregation with placement = "central" sums whole grid steps of the clip norm, once: leave out '
                "bits, groups and reach"
            )
        if secure.groups > 1 and self.cohort.size is not None:
            raise ValueError(
                "secure_aggregation.groups are the same in all rounds, as sums over changing groups would show "
                "differences: they need every site in every round; leave out cohort.size"
            )
        if secure.retries and self.privacy.at_sites:
            raise ValueError(
                "secure_aggregation.retries is for jobs without privacy; with it each retry is a new release: use "
                "spare_rounds of privacy.record or privacy.client"
            )
        if secure.bits < 32 and secure.reach is None and self.privacy.distributed is None:
            raise ValueError(
                f"secure_aggregation.bits = {secure.bits} leaves few steps: give reach, the largest size of a number "
                "in a weighted update"
            )
        if self.privacy.distributed is not None and secure.reach is not None:
            raise ValueError("secure_aggregation.reach: distributed noise finds its own from clip_norm; leave it out")

    @cached_property
    def portable(self) -> Job:
        """The job as it is sent to data holders: without what only a simulation has, and where it finds the records."""
        sources = dict.fromkeys(("bundled", "path", "files", "client"))
        data = self.data.model_copy(update={**sources, "folder": "."})
        training = self.training.model_copy(update={"device": "auto"})  # Each site's own affair.
        return self.model_copy(update={"data": data, "training": training, "simulation": Simulation()})

    @property
    def secure_groups(self) -> int:
        """How many secure sums a round has: one for each region, or secure_aggregation.groups."""
        assert self.secure_aggregation is not None
        return len(self.regions) if self.regions else self.secure_aggregation.groups

    @property
    def least_answers(self) -> int:
        """Fewer answers in a round end the run; how many there were is private where whole clients are protected."""
        return 0 if self.privacy.central is not None else self.cohort.minimum or 1

    @cached_property
    def toml(self) -> bytes:
        """The resolved job, byte for byte what the run folder stores and the hash covers."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json")).encode()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of `toml`, hexadecimal."""
        return hashlib.sha256(self.toml).hexdigest()


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply `key=value` overrides, check everything. Raises `JobError`, one line, for any mistake."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except IsADirectoryError:
        raise JobError(f"{path}: a folder, not a job file") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(raw, override)
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("folder", "."), str) and "bundled" not in data:
        data["folder"] = str((path.parent / data.get("folder", ".")).resolve())
    if isinstance(data, dict) and isinstance(data.get("statistics"), str):
        from strategies.statistics import with_statistics

        beside = path.parent / data["statistics"]
        run = beside if beside.exists() else Path(data["statistics"])
        raw["data"] = with_statistics(data, run, where=str(path))
    return check_job(raw, where=str(path))


def parse_job(text: str, *, where: str) -> Job:
    """Read a job from its text as it travels: nothing in it refers to a file here. Raises `JobError`."""
    if len(text) > MOST_TEXT:
        raise JobError(f"{where}: longer than {MOST_TEXT} characters")
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise JobError(f"{where}: a line with more than {MOST_DOTS} dots")
    try:
        return check_job(tomllib.loads(text), where=where)
    except (ValueError, RecursionError):  # Not all that tomllib raises is its own: a number of 5,000 digits.
        raise JobError(f"{where}: not valid TOML") from None


def check_job(raw: Mapping[str, Any], *, where: str) -> Job:
    """Validate a job that was already parsed; `where` names its origin in errors."""
    try:
        return Job.model_validate(dict(raw))
    except ValidationError as error:
        raise JobError(f"{where}: {explain(error, Job, whole='the job')}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    # The first equal sign behind a whole key: a quoted part may hold others.
    ends = (position for position, letter in enumerate(override) if letter == "=" and _key_parts(override[:position]))
    end = next(ends, None)
    if end is None or len(override.splitlines()) > 1:
        raise JobError(one_line(f"--set {override}: expected key=value, for example training.rounds=5"))
    parts, text = _key_parts(override[:end]), override[end + 1 :]
    try:
        value: Any = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw
    for part in parts[:-1]:
        if value == "none" and part not in table:
            return
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise JobError(f"--set {override}: {part} is a value, not a table")
    if value == "none":
        table.pop(parts[-1], None)
    else:
        table[parts[-1]] = value


def _key_parts(key: str) -> list[str]:
    """The tables and the name in a dotted key, quoted parts and all; nothing if it is no TOML key."""
    try:
        nested: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return []
    parts = []
    while isinstance(nested, dict):
        part, nested = next(iter(nested.items()))
        parts.append(part)
    return parts

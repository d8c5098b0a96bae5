"""The `[data]` of a job: where the records are, and what they must look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from strategies.sections import Bound, Count, Name, Positive, Section, refuse_repeated


class Column(Section):
    """One feature, or what becomes many by public constants.

    A number with its `range`; a category with its `values`; a text, whose n-grams of words or letters are hashed into
    `buckets`; the first `length` tokens of a text, by the tokenizer of the task's checkpoint or of `tokenizer`, where
    `join` may name the columns that it is put together from; the first `window` characters of an `alphabet`, for a
    next-character task; a square image of 8-bit numbers with its `shape` [side, side] or [side, side, channels]; an id
    from 1 to `count`.

    All of it is declared, not measured: a minimum or a vocabulary taken from the records would be a release. `mean` and
    `sd` standardise a number, `fill` stands for what is missing: a statistics job measures them (data.statistics).
    """

    type: Literal["number", "category", "text", "tokens", "characters", "image", "id"] = "number"
    range: tuple[Bound, Bound] | None = Field(default=None, strict=False)
    values: list[str | int | float] | None = None
    buckets: Count | None = None
    ngrams: tuple[Count, Count] | None = Field(default=None, strict=False)
    analyzer: Literal["words", "letters"] | None = None
    length: Annotated[int, Field(ge=2, le=2**17)] | None = None
    tokenizer: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    join: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=2)
    alphabet: Annotated[str, Field(min_length=1)] | None = None
    window: Count | None = None
    shape: list[Count] | None = None
    count: Count | None = None
    mean: Bound | None = None
    sd: Annotated[float, Field(gt=0, le=1e300)] | None = None
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
        refuse_repeated("values", self.values)
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
        refuse_repeated("alphabet", list(self.alphabet or ""))
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
    "tokens": (("length", "tokenizer"), ("join",)),
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
        refuse_repeated("lags", self.lags)
        return self


class Data(Section):
    """Where the records are and what they must look like.

    The target is a class: 0 or 1, or one of `classes`, or positive exactly where it is among `positive`. By
    `target_type` it may also be a number (mapped by `target_range` and `target_log` for training; metrics keep its
    unit), a time until an event or its censoring (the column `event` is 1 or 0), the next character or token of a
    column, a `text` of at most `target_length` tokens, or `tags`, one of `classes` for each word of a text. At
    most one of `bundled` (a data set that a dependency or fedchorus itself carries), `path` (one CSV, Parquet or .npz
    file, its sites named by the column `client`) and `files` (one file per site) says where a simulation finds the
    records; in a deployment each site has its own. Relative paths start at `folder`, which starts at the job file.
    `dataset` names the records at each site: a site keeps one ledger for each.
    """

    dataset: Name = "records"
    bundled: (
        Literal[
            "breast-cancer",
            "digits",
            "banks",
            "banks-text",
            "hospitals-image",
            "hospitals-survival",
            "retailers-forecast",
            "retailers-recommend",
            "retailers-text",
        ]
        | None
    ) = None
    folder: str = "."
    path: str | None = None
    files: dict[Name, str] | None = None
    client: str | None = None
    target: str
    target_type: Literal["class", "number", "time", "next", "text", "tags"] | None = None
    target_length: Annotated[int, Field(ge=1, le=2**17)] | None = None
    target_range: tuple[Bound, Bound] | None = Field(default=None, strict=False)
    target_log: bool | None = None
    event: str | None = None
    positive: list[str | int | float] | None = Field(default=None, min_length=1)
    classes: list[str | int | float] | None = Field(default=None, min_length=2)
    allow_one_class: bool = False
    header: bool = True
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    names: list[str] | None = None
    missing: list[str] = Field(default=["", "NA", "NaN", "nan", "null"])
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
        refuse_repeated("classes", self.classes)
        if not self.header and self.names is None:
            raise ValueError("header = false needs `names`, the columns in order")
        if self.header and self.names is not None:
            raise ValueError("`names` is for files without a header: set header = false")
        if self.client is not None and self.path is None and self.bundled is None:
            raise ValueError("`client` names a column of `path`; with `files` each file is a site")
        if self.target in self.columns and self.target_type != "next":
            raise ValueError(f"the target {self.target!r} is also listed in `columns`: it would be its own feature")
        held = self.held_out.column if self.held_out is not None else None
        for name, column in self.columns.items():
            if taken := {self.target, self.client, self.event, held, *self.columns}.intersection(column.join or ()):
                raise ValueError(f"columns.{name}.join names {min(map(str, taken))!r}, which is something else")
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
        if self.target_type not in (None, "class", "tags") and (self.positive or self.classes):
            raise ValueError('positive and classes are for target_type = "class"')
        if self.target_type == "tags" and (self.positive or not self.classes):
            raise ValueError('target_type = "tags" needs `classes`, what a word can be, and not `positive`')
        if (self.target_type == "text") != (self.target_length is not None):
            raise ValueError('target_type = "text" and target_length, in tokens, go together')
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
        whole = [name for name, column in self.columns.items() if column.type in ("characters", "image", "tokens")]
        if whole and len(self.columns) > 1:
            raise ValueError(f"columns.{whole[0]} is a whole record by itself: it must be the only one of `columns`")
        if self.target_type == "next" and whole != [self.target]:
            raise ValueError('target_type = "next" needs a target that is the one column, of characters or tokens')
        if self.target_type in ("text", "tags") and [self.columns[name].type for name in whole] != ["tokens"]:
            raise ValueError(f'target_type = "{self.target_type}" needs a column of type "tokens"')
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

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
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import ConfigDict, Field, ValidationError, model_validator

from privacy.errors import JobError
from strategies.checkpoint import absolute, file_hash, hashes, locate, portable, resolved_file
from strategies.explain import explain, one_line
from strategies.job_data import Data
from strategies.job_privacy import Privacy, Robust, SecureAggregation
from strategies.job_task import Evaluation, TaskChoice
from strategies.sections import Count, Name, NotNegative, Positive, Rate, Section, Share

Setting = bool | int | float | str | list[bool | int | float | str]

# What makes the model of a job that measures the mean over all records.
ONE_EXACT_ROUND = {"rounds": 1, "local_steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0}

MOST_STEPS = 1e9  # In a round; nobody has the time for more.
MOST_TEXT = 2**20  # Characters of a job that comes over the network.
MOST_DOTS = 64  # In a line of it: a dotted key of n parts takes tomllib n^2 steps.


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
    counted in parameters from its end, that a site trains; the layers before it stay as they are there. At most
    `physical_batch` rows are in memory at once, whatever the batch. The `optimizer` is plain `sgd`, or `adam`, which
    begins anew in each round and decouples the weight decay.
    """

    rounds: Count
    learning_rate: Positive
    schedule: Schedule | None = None
    local_steps: Count | None = None
    local_epochs: Count | None = None
    batch_size: Count | None = None
    sampling_rate: Rate | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    weight_decay: NotNegative = 0.0
    budget_s: Positive | None = None
    work: dict[Name, Count] | None = None
    weak: dict[Name, Annotated[float, Field(gt=0, lt=1)]] | None = None
    physical_batch: Count | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @model_validator(mode="after")
    def _one_length_one_batch(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of local_steps and local_epochs")
        if (self.batch_size is None) == (self.sampling_rate is None):
            raise ValueError("give exactly one of batch_size and sampling_rate")
        steps = (self.local_epochs or 0) / (self.sampling_rate or 1.0)
        if self.sampling_rate is not None and steps > MOST_STEPS:
            raise ValueError(
                f"local_epochs = {self.local_epochs} with sampling_rate = {self.sampling_rate:g} are {steps:.3g} steps "
                f"a round, more than {MOST_STEPS:.3g}; raise sampling_rate, or give local_steps"
            )
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
    speed: Annotated[float, Field(ge=1e-6, le=1e12)] = 1.0
    availability: Rate = 1.0
    trains: Rate = 1.0


class Simulation(Section):
    """What only a simulation may do. `noise = "seeded"` repeats exactly and protects nobody. Kinds of `devices` put the
    rounds on a virtual clock, which deadlines then go by. The model is scored every `evaluate_every` rounds, and after
    the last."""

    engine: Literal["inline", "flower"] = "inline"
    evaluate_every: Count | None = None
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
    evaluation: Evaluation | None = None
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
    def _complete_measurement(cls, raw: Any) -> Any:
        """A job that measures is one exact round: what only one value can be need not be written."""
        task = raw.get("task") if isinstance(raw, dict) else None
        statistics = isinstance(task, dict) and task.get("name") == "statistics"
        if not isinstance(raw, dict) or not (statistics or raw.get("evaluation")):
            return raw
        simulation = raw.get("simulation", {})
        if isinstance(simulation, dict):
            simulation = {"baselines": False, **simulation}
        raw = {"training": dict(ONE_EXACT_ROUND), **raw, "simulation": simulation}
        if statistics:
            blocks = {"statistics": ["moments", "histogram", "missing", "categories", "labels"], "bins": 20}
            raw["task"] = {**blocks, **(task or {})}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _complete_tokens(cls, raw: Any) -> Any:
        """Texts become the tokens of the model that reads them, where the job names no other tokenizer."""
        task, data = (raw.get(key) if isinstance(raw, dict) else None for key in ("task", "data"))
        columns = data.get("columns") if isinstance(data, dict) else None
        checkpoint = task.get("checkpoint") if isinstance(task, dict) else None
        if not isinstance(columns, dict) or checkpoint is None:
            return raw

        def complete(column: Any) -> Any:
            if not isinstance(column, dict) or column.get("type") != "tokens":
                return column
            return {"tokenizer": checkpoint, **column}

        columns = {name: complete(column) for name, column in columns.items()}
        return {**raw, "data": {**(data or {}), "columns": columns}}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.task.name == "statistics":
            from strategies.statistics import check_statistics  # It reads jobs itself.

            check_statistics(self)
        if self.evaluation is not None:
            from strategies.evaluation import check_evaluation

            check_evaluation(self)
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
        for name, column in self.data.columns.items():
            # One hash covers the tokenizer and the weights that it goes with.
            if column.tokenizer is not None and column.tokenizer != self.task.checkpoint:
                raise ValueError(f"data.columns.{name}.tokenizer is that of task.checkpoint; leave it out")
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
        evaluation = self.evaluation.model_copy(update={"run": None}) if self.evaluation is not None else None
        task = self.task
        if task.checkpoint is not None:
            task = task.model_copy(update={"checkpoint": portable(task.checkpoint)})
        if task.tuning is not None and task.tuning.calibration is not None:
            tuning = task.tuning.model_copy(update={"calibration": Path(task.tuning.calibration).name})
            task = task.model_copy(update={"tuning": tuning})
        columns = {
            name: column.model_copy(update={"tokenizer": portable(column.tokenizer)}) if column.tokenizer else column
            for name, column in data.columns.items()
        }
        data = data.model_copy(update={"columns": columns})
        return self._with(
            {
                "data": data,
                "task": task,
                "training": training,
                "simulation": Simulation(),
                "evaluation": evaluation,
            }
        )

    @property
    def stratified(self) -> bool:
        """Whether labels decide which rows are for testing: not with record-level privacy, unless the job insists, as
        the label of one row would decide of others."""
        return self.data.stratify if self.data.stratify is not None else self.privacy.record is None

    @property
    def evaluated(self) -> Job:
        """Of an evaluation: the job as far as it says what the evaluated model is, and how its rows are read."""
        return self._with({"evaluation": None, "privacy": Privacy(), "simulation": Simulation()})

    def _with(self, update: Mapping[str, Any]) -> Job:
        """A copy with other values, and without what was computed of the old ones."""
        copy = self.model_copy(update=update)
        for name in ("portable", "toml", "hash"):
            copy.__dict__.pop(name, None)
        return copy

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
    return _resolved(raw, overrides, folder=path.parent, where=str(path))


def evaluation_job(run: Path, overrides: Sequence[str] = ()) -> Job:
    """The job that evaluates the model of a finished run, with `key=value` overrides. Raises `JobError`."""
    return _resolved({"evaluation": {"run": str(run.resolve())}}, overrides, folder=Path(), where=str(run))


def _resolved(raw: dict[str, Any], overrides: Sequence[str], *, folder: Path, where: str) -> Job:
    """Check a parsed job; relative paths in it start at `folder`."""
    for override in overrides:
        _apply(raw, override)
    if isinstance(evaluation := raw.get("evaluation"), dict) and "of" not in evaluation and "run" in evaluation:
        from strategies.evaluation import with_evaluated

        raw = with_evaluated(raw, beside=folder, where=where)
    task = raw.get("task")
    if isinstance(task, dict) and isinstance(task.get("checkpoint"), str):
        reference = absolute(task["checkpoint"], folder.resolve())
        # A resolved job has the hashes, and is read also where the checkpoint is not.
        known = {"checkpoint_hash", "tokenizer_hash"} <= task.keys()
        raw["task"] = {**({} if known else hashes(locate(reference))), **task, "checkpoint": reference}
    tuning = task.get("tuning") if isinstance(task, dict) else None
    if isinstance(tuning, dict) and isinstance(tuning.get("calibration"), str):
        key = "task.tuning.calibration"
        public = resolved_file(folder, tuning["calibration"], key=key)
        found = tuning.get("calibration_hash")
        given = {override.partition("=")[0].strip() for override in overrides}
        if found is None or (key in given and f"{key}_hash" not in given):
            found = file_hash(public, key=key)
        raw["task"] = {**raw["task"], "tuning": {**tuning, "calibration": str(public), "calibration_hash": found}}
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("folder", "."), str) and "bundled" not in data:
        data["folder"] = str((folder / data.get("folder", ".")).resolve())
    if isinstance(data, dict) and isinstance(data.get("statistics"), str):
        from strategies.statistics import with_statistics

        beside = folder / data["statistics"]
        run = beside if beside.exists() else Path(data["statistics"])
        raw["data"] = with_statistics(data, run, where=where)
    return check_job(raw, where=where)


def stored_job(path: Path) -> Job:
    """Read a resolved job as a folder keeps it, byte for byte what its hash covers. Raises `JobError`."""
    try:
        return check_job(tomllib.loads(path.read_text(encoding="utf-8")), where=str(path))
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise JobError(f"{path}: not valid TOML") from None


def parse_job(text: str, *, where: str) -> Job:
    """Read a job from its text as it travels: nothing in it refers to a file here. Raises `JobError`."""
    if len(text) > MOST_TEXT:
        raise JobError(f"{where}: longer than {MOST_TEXT} characters")
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise JobError(f"{where}: a line with more than {MOST_DOTS} dots")
    try:
        job = check_job(tomllib.loads(text), where=where)
        if job.task.checkpoint is not None and portable(job.task.checkpoint) != job.task.checkpoint:
            raise JobError(f"{where}: task.checkpoint is a folder of another machine; name it as models:NAME")
        tuning = job.task.tuning
        public = tuning.calibration if tuning is not None else None
        if public is not None and (public in (".", "..") or "/" in public or "\\" in public):
            raise JobError(f"{where}: task.tuning.calibration is a path of another machine; only its name travels")
        if tuning is not None and public is not None and tuning.calibration_hash is None:
            raise JobError(f"{where}: task.tuning.calibration without its hash; submit the job file, which fills it in")
        if job.task.checkpoint is not None and None in (job.task.checkpoint_hash, job.task.tokenizer_hash):
            raise JobError(f"{where}: task.checkpoint without its hashes; submit the job file, which fills them in")
        return job
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
    if end is None or len(override.splitlines()) > 1 or not _is_text(override):
        raise JobError(one_line(f"--set {override}: expected key=value, for example training.rounds=5"))
    parts, text = _key_parts(override[:end]), override[end + 1 :]
    try:
        value: Any = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):  # Not all that tomllib raises is its own: a number of 5,000 digits.
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


def _is_text(text: str) -> bool:
    """Whether a file in UTF-8 can hold it: a shell passes on any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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

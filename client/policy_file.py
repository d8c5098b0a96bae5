"""The policy file `policy.toml`: its clauses with their defaults, and how it is read. `client.policy` enforces it."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime, time, tzinfo
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, ValidationError, field_validator, model_validator

from privacy.budget import Limit
from privacy.errors import FedchorusError
from privacy.events import UNIT_CLIENT, UNIT_RECORD
from privacy.secagg.session import ANONYMITY
from strategies.explain import explain
from strategies.sections import Count, Name, NotNegative, Positive, Section

VERSION = 1
Delta = Annotated[float, Field(gt=0, lt=1)]
_DIGEST, _CODE, _KEY = r"^sha256:[0-9a-f]{64}$", r"^[^:.]+(\.[^:.]+)*:[^:.]+$", r"^[0-9a-f]{64}$"
_CLOCK = r"^([01][0-9]|2[0-3]):[0-5][0-9]$"
Digest = Annotated[str, Field(pattern=_DIGEST)]
CodeName = Annotated[str, Field(pattern=_CODE)]
PublicKey = Annotated[str, Field(pattern=_KEY)]
Clock = Annotated[str, Field(pattern=_CLOCK)]
_MEANT = {  # By pattern: what a person is told was expected.
    _DIGEST: '"sha256:" and 64 hexadecimal digits, as content hashes are printed',
    _CODE: '"package.module:Name"',
    _KEY: "an Ed25519 public key, 64 hexadecimal digits in lower case",
    _CLOCK: 'a time of day such as "06:30"',
}


class PolicyError(FedchorusError):
    """The policy file is missing, damaged or of another version: the client does not start."""


class Code(Section):
    """What may run: names that ship with fedchorus, and one's own by the hash of their source."""

    allow: list[str] = Field(default_factory=list)
    code: dict[CodeName, Digest] = Field(default_factory=dict)

    @field_validator("allow")
    @classmethod
    def _ships_with_fedchorus(cls, names: list[str]) -> list[str]:
        if own := [name for name in names if ":" in name]:
            raise ValueError(f"{own[0]!r} does not ship with fedchorus: list it under `code`, with its hash")
        return names


class DataSet(Section):
    """What one data set may cost, over all jobs for ever and in any `period_days`."""

    epsilon: Positive | None = None
    delta: Delta | None = None
    client_epsilon: Positive | None = None
    client_delta: Delta | None = None
    period_days: Annotated[int, Field(gt=0, le=36_500)] | None = None
    period_epsilon: Positive | None = None
    unlimited: bool = False

    @model_validator(mode="after")
    def _says_what_it_may_cost(self) -> Self:
        if not (self.epsilon or self.client_epsilon or self.unlimited):
            raise ValueError("give epsilon and delta, client_epsilon and client_delta, or unlimited = true")
        if self.unlimited and (self.epsilon or self.client_epsilon):
            raise ValueError("unlimited = true goes with neither epsilon nor client_epsilon")
        if (self.period_days is None) != (self.period_epsilon is None):
            raise ValueError("period_days and period_epsilon go together")
        if (self.delta is None) != (self.epsilon is None and self.period_epsilon is None):
            raise ValueError("delta goes with epsilon or period_epsilon, and they with it")
        if (self.client_delta is None) != (self.client_epsilon is None):
            raise ValueError("client_epsilon and client_delta go together")
        return self

    def limits(self) -> list[Limit]:
        """The standing budgets: what all jobs together may cost, by unit."""
        found = []
        if self.epsilon is not None and self.delta is not None:
            found.append(Limit(unit=UNIT_RECORD, epsilon=self.epsilon, delta=self.delta))
        if self.client_epsilon is not None and self.client_delta is not None:
            found.append(Limit(unit=UNIT_CLIENT, epsilon=self.client_epsilon, delta=self.client_delta))
        return found


class PrivacyRules(Section):
    """What one job must promise. Noise and clip bounds hold for each mechanism of the job."""

    require: Literal["record", "client", "either", "none"] = "record"
    largest_epsilon: Positive = 8.0
    largest_delta: Delta = 1e-3
    minimum_noise_multiplier: NotNegative = 0.5
    largest_clip_norm: Positive = 10.0
    allow_central: bool = False
    allow_adaptive_clip: bool = False


class SecureRules(Section):
    """How an update must be hidden among others."""

    required: bool = True
    minimum_cohort: Count = ANONYMITY
    minimum_colluders: Annotated[int, Field(ge=0)] = 1


class EvaluationRules(Section):
    """What may leave of how a model does at this site alone."""

    allow_plain: bool = False
    allow_site_figures: bool = False
    groups: list[str] = Field(default_factory=list)
    smallest_group: Count = 10


class Rates(Section):
    """How much, how often and when."""

    jobs_per_day: Annotated[int, Field(ge=0)] = 10
    rounds_per_job: Count = 1000
    rounds_per_hour: Annotated[int, Field(ge=0)] = 3600
    largest_model: Count = 100_000_000
    approvals: Annotated[int, Field(ge=0)] | None = None
    hours: tuple[Clock, Clock] | None = Field(default=None, strict=False)
    time_zone: str = "UTC"

    @model_validator(mode="after")
    def _can_be_told(self) -> Self:
        if self.hours is not None and self.hours[0] == self.hours[1]:
            raise ValueError("hours begin and end at the same time; leave them out to answer at any time")
        try:
            self.zone()
        except (KeyError, ValueError, OSError):
            raise ValueError(
                f"time_zone {self.time_zone!r} is not known on this machine; write one such as "
                '"Europe/Berlin" (and install tzdata if it is missing), or "UTC"'
            ) from None
        return self

    def zone(self) -> tzinfo:
        """Where `hours` are told. UTC is known on machines without a time zone database too."""
        return UTC if self.time_zone == "UTC" else ZoneInfo(self.time_zone)

    def answers_at(self, now: datetime) -> bool:
        """Whether `now` is within `hours`, which may go over midnight: from the first until just before the second."""
        if self.hours is None:
            return True
        begin, end = (time.fromisoformat(clock) for clock in self.hours)
        here = now.astimezone(self.zone()).time()
        return begin <= here < end if begin < end else here >= begin or here < end


class PolicyFile(Section):
    """What a site's policy file says. Whatever is left out has the strict reading."""

    version: Literal[1]
    purposes: list[Name] = Field(default_factory=list)
    package: Digest | None = None
    approvers: list[PublicKey] | None = None
    tasks: Code = Code()
    strategies: Code = Code()
    data: dict[Name, DataSet] = Field(default_factory=dict)
    privacy: PrivacyRules = PrivacyRules()
    secure_aggregation: SecureRules = SecureRules()
    evaluation: EvaluationRules = EvaluationRules()
    limits: Rates = Rates()

    @model_validator(mode="after")
    def _approvals_can_be_given(self) -> Self:
        wanted, given = self.limits.approvals, self.approvers
        if wanted is not None and given is not None and wanted > len(set(given)):
            raise ValueError(
                f"limits.approvals is {wanted}, but approvers has {len(set(given))} keys: no job has so many"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file. Raises `PolicyError`, one line, for whatever is wrong: nothing is allowed without it."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise PolicyError(f"{path}: no policy file; `fedchorus enrol` writes one, restore or write yours") from None
        except UnicodeDecodeError:
            raise PolicyError(f"{path}: not a text file in UTF-8") from None
        except OSError as error:
            raise PolicyError(f"{path}: the policy file cannot be read ({error.strerror})") from None
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"{path}: not valid TOML: {error}") from None
        version = raw.get("version")
        if type(version) is not int or version != VERSION:  # First: of another version no key is known.
            found = "no version" if version is None else f"version {version!r}"
            raise PolicyError(
                f"{path}: a policy of {found}, this program reads version {VERSION}: write version = {VERSION} above "
                "the first table, or install the fedchorus that the file was written for"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            said = explain(error, cls, whole="the policy", patterns=_MEANT)
            raise PolicyError(f"{path}: {said}") from None


def shown(value: object) -> str:
    """Quoted, on one line, cut: what the file or a job says may be long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


POLICY_TEMPLATE = """\
# This site's policy: what may be done with its data. What is not allowed here is refused, and a refused server is not
# told why: the client's log says it. All clauses: docs/policy.md. The client reads this file once, when it starts.
#
# Lines that begin with # and no space are settings that you can switch on by removing the #. Outside [data], and unless
# they say otherwise, they show what holds without them.
version = 1

# What for: the `purpose` of the jobs that you allow, such as ["training"].
purposes = []

# Pins the installed fedchorus to the hash of its source; by default any version that is installed here may run.
#package = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

# Whose approvals count, as Ed25519 public keys in hexadecimal; by default those that the invitation names.
#approvers = ["0000000000000000000000000000000000000000000000000000000000000000"]

# Models and training that ship with fedchorus, by name.
[tasks]
allow = ["tabular-classification"]

# Your data scientists' own, only with this very content.
#[tasks.code]
#"package.module:Name" = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

[strategies]
allow = ["fedavg"]

#[strategies.code]
#"package.module:Name" = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

# Each data set that may be used at all, by its name in the jobs (`data.dataset`, by default "records"), and what all
# jobs together may ever cost its records (epsilon, delta) or this whole site (client_epsilon, client_delta).
#[data.records]
#epsilon = 3.0
#delta = 1e-5
#client_epsilon = 10.0
#client_delta = 1e-5

# In any 30 days no more than this:
#period_days = 30
#period_epsilon = 1.0

# Or: no budget at all. Only a job's own limits then hold.
#[data.public-benchmark]
#unlimited = true

# What each job must promise. require: "record", "client", "either" or "none".
[privacy]
#require = "record"
#largest_epsilon = 8.0
#largest_delta = 1e-3
#minimum_noise_multiplier = 0.5
#largest_clip_norm = 10.0
#allow_central = false  # Noise that the server adds, after it saw the sum without it.
#allow_adaptive_clip = false  # A clip norm that the server moves.

# Whether the server must never see this site's update by itself; how few sites may be in a sum; with how many of them
# the server may be in league (a federation of three sites can withstand 0).
[secure_aggregation]
#required = true
#minimum_cohort = 3
#minimum_colluders = 1

# What a job with an [evaluation] may learn of how a model does here.
[evaluation]
#allow_plain = false  # Without secure aggregation: the server would see this site's figures by themselves.
#allow_site_figures = false  # This site's own figure as one of a count over the sites, without its name.
#groups = ["sex"]  # Columns whose groups may be measured; one that tells sites apart tells their figures.
#smallest_group = 10  # A group of fewer of this site's test rows is left out.

[limits]
#jobs_per_day = 10
#rounds_per_job = 1000
#rounds_per_hour = 3600
#largest_model = 100_000_000  # Parameters.
#approvals = 1  # How many approvers must have signed a job; by default as many as the invitation asks for.
#hours = ["20:00", "06:00"]  # When rounds are answered; by default at any time.
#time_zone = "UTC"  # Or such as "Europe/Berlin".
"""

"""The `[privacy]`, `[secure_aggregation]` and `[robust]` of a job: what protects records, sites and the sum."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from strategies.sections import Count, Positive, Section


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

"""Events: what was released, in the words an accountant can bound.

Events are stored, never epsilons: two runs composed from their events cost far less than the sum of two
epsilons. An event's dictionary form is part of the ledger's format; reading one is strict, because an event
with a key that we do not know may have been charged for something that we cannot bound.

| sampling              | adjacency           | what it is                                                           |
|-----------------------|---------------------|----------------------------------------------------------------------|
| `poisson`             | add_or_remove_one   | each unit enters each release by its own secret coin                 |
| `none`                | either              | a unit may be in each of the `count` releases: fixed or shuffled     |
|                       |                     | batches (`count` = epochs), cohorts that others can see              |
| `without_replacement` | replace_one         | a secret sample of fixed size out of a fixed population              |

Everything else is refused: add-or-remove has no meaning for samples of fixed size, shuffled batches are not amplified
(Chua et al. 2024, arXiv:2403.17673), and no accountant here speaks for Poisson sampling under replace-one.

A secure sum under distributed noise (`DistributedEvent`) is priced under `zero_out` alone and without sampling: one
client contributes zero, and who takes part is public.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from privacy.errors import UnsupportedEvent

if TYPE_CHECKING:
    from privacy.distributed import DistributedNoise, Mechanism

ADD_OR_REMOVE_ONE = "add_or_remove_one"
REPLACE_ONE = "replace_one"
ZERO_OUT = "zero_out"
UNIT_RECORD = "record"
UNIT_CLIENT = "client"
UNITS = (UNIT_RECORD, UNIT_CLIENT)
SCHEMES = {
    "poisson": (ADD_OR_REMOVE_ONE,),
    "none": (ADD_OR_REMOVE_ONE, REPLACE_ONE),
    "without_replacement": (REPLACE_ONE,),
}
LEAST_NOISE = 0.0625  # Less noise than a sixteenth of the clip norm protects nobody, and takes minutes to account for.
MOST_NOISE = 2.0**20
LEAST_RATE = 2.0**-64  # Below it nobody is ever picked (`privacy.noise.poisson_sample`).
MOST_RELEASES = 2**40
MOST_ROUNDS = 2**20

Scheme = Literal["poisson", "none", "without_replacement"]


@dataclass(frozen=True, kw_only=True)
class GaussianEvent:
    """`count` releases of a clipped sum over sampled units, each with fresh Gaussian noise.

    Sensitivity: `clip_norm` in L2 under add/remove-one of a unit, twice that under replace-one; it follows from the
    clip and is never given. Noise standard deviation: `noise_multiplier * clip_norm` on every coordinate of the *sum*.
    `sampling_rate` is the chance of a unit to be in a release (of a Poisson sample), or the sample's share of the
    population; nobody who sees the releases learns who was in. 1.0 means no sampling and no amplification.

    `discretisation_tv` bounds the total-variation distance, over all `count` releases, between the integer
    noise that was drawn and the continuous Gaussian that is charged (`privacy.noise.discretisation_tv`).
    `rng` is the kind of the noise source: "os", or "seeded-simulation", which protects nobody.

    `quantile_noise`: with each sum a count was released of how many were below the clip, each unit ±1/2, with this
    standard deviation; `noise_multiplier` is then that of both together (`privacy.adaptive_clip`) and `clip_norm` the
    first one.
    """

    unit: str = UNIT_RECORD
    adjacency: str = ADD_OR_REMOVE_ONE
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    scheme: Scheme = "poisson"
    count: int
    rng: str
    discretisation_tv: float = 0.0
    quantile_noise: float | None = None

    def __post_init__(self) -> None:
        _check_common(self.unit, self.noise_multiplier, self.clip_norm, self.rng, self.discretisation_tv)
        rate, scheme = self.sampling_rate, self.scheme
        require(scheme in get_args(Scheme), "sampling.scheme", " or ".join(SCHEMES), scheme)
        require(
            self.adjacency in SCHEMES[scheme], f"adjacency ({scheme})", " or ".join(SCHEMES[scheme]), self.adjacency
        )
        require(is_number(rate) and LEAST_RATE <= rate <= 1, "sampling.rate", "in [2^-64, 1]", rate)
        require(
            scheme != "without_replacement" or self.noise_multiplier >= 2 * LEAST_NOISE,
            f"noise_multiplier ({scheme})",
            "1/8 or more, as replacing one unit moves a sum by twice the clip norm",
            self.noise_multiplier,
        )
        require(scheme != "none" or rate == 1, "sampling.rate", "1 where nothing is sampled", rate)
        _check_count(self.count)
        bit = self.quantile_noise
        require(
            bit is None or (is_number(bit) and 2 * bit > self.noise_multiplier),
            "quantile_noise",
            "more than half the noise_multiplier",
            bit,
        )

    def as_dict(self) -> dict[str, Any]:
        record = {
            "mechanism": "gaussian",
            "unit": self.unit,
            "adjacency": self.adjacency,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "sampling": {"scheme": self.scheme, "rate": self.sampling_rate},
            "count": self.count,
            "rng": self.rng,
            "discretisation_tv": self.discretisation_tv,
        }
        return record if self.quantile_noise is None else {**record, "quantile_noise": self.quantile_noise}


@dataclass(frozen=True, kw_only=True)
class CorrelatedEvent:
    """One whole training of `rounds` rounds whose noise is correlated (`privacy.correlated`): one Gaussian release.

    Noise standard deviation: `noise_multiplier * clip_norm` on each coordinate of C X, where C is the lower-triangular
    Toeplitz matrix of `coefficients`, or of a buffered (BLT) one with `weights` and `decays`. The sensitivity is
    derived from C, from the counters that the server enforced (a unit takes part at most `participations` times, at
    least `separation` rounds apart) and from what rounding to the grid adds in `dimension` coordinates; it is never
    given. No sampling is assumed. Stopping early costs the same.
    """

    unit: str = UNIT_CLIENT
    noise_multiplier: float
    clip_norm: float
    coefficients: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    rounds: int
    participations: int
    separation: int
    dimension: int
    rng: str
    discretisation_tv: float = 0.0

    def __post_init__(self) -> None:
        _check_common(self.unit, self.noise_multiplier, self.clip_norm, self.rng, self.discretisation_tv)
        for key in ("rounds", "participations", "separation"):
            value = getattr(self, key)
            require(is_whole(value) and value <= MOST_ROUNDS, key, "a whole number in [1, 2^20]", value)
        require(is_whole(self.dimension), "dimension", "a whole number > 0", self.dimension)
        for key in ("coefficients", "weights", "decays"):
            numbers = getattr(self, key)
            require(isinstance(numbers, tuple) and all(map(is_number, numbers)), key, "finite numbers", numbers)
        banded, buffered = bool(self.coefficients), bool(self.weights) and len(self.weights) == len(self.decays)
        require(banded != buffered, "coefficients", "given, or else weights and decays", self.coefficients)
        require(not banded or not (self.weights or self.decays), "weights", "none beside coefficients", self.weights)
        require(len(self.coefficients) <= self.rounds, "coefficients", "at most one a round", len(self.coefficients))

    @property
    def count(self) -> int:
        """One release, whatever its rounds."""
        return 1

    def as_dict(self) -> dict[str, Any]:
        matrix: dict[str, Any] = {"coefficients": list(self.coefficients)}
        if self.weights:
            matrix = {"weights": list(self.weights), "decays": list(self.decays)}
        return {
            "mechanism": "correlated_gaussian",
            "unit": self.unit,
            "adjacency": ADD_OR_REMOVE_ONE,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "matrix": matrix,
            "rounds": self.rounds,
            "participations": self.participations,
            "separation": self.separation,
            "dimension": self.dimension,
            "rng": self.rng,
            "discretisation_tv": self.discretisation_tv,
        }


@dataclass(frozen=True, kw_only=True)
class DistributedEvent:
    """`count` secure sums of clients' updates, each with the shares of the noise of `clients` honest survivors.

    Unit: one client. Adjacency: zero-out, one client's update becomes zero in every sum and its shares of the noise
    stay: who takes part is public, so nothing is sampled. `clients` is how many shares were *planned* to be in the sum
    and unknown to the adversary: a round with fewer shows no sum. The other fields are those of `DistributedNoise` in
    `privacy.distributed`, which derives sensitivity, noise and cost, and refuses what it cannot price.
    """

    mechanism: Mechanism
    clients: int
    dimension: int
    clip_norm: float
    granularity: float
    local_scale: float
    beta: float
    count: int
    rng: str

    def __post_init__(self) -> None:
        self.noise()
        _check_rng(self.rng)
        _check_count(self.count)

    def noise(self) -> DistributedNoise:
        """What one of the sums costs. Raises `UnsupportedEvent` for values out of range."""
        # Imported late: it takes its checks from this module.
        from privacy.distributed import DistributedNoise

        return DistributedNoise(
            mechanism=self.mechanism,
            clients=self.clients,
            dimension=self.dimension,
            clip_norm=self.clip_norm,
            granularity=self.granularity,
            local_scale=self.local_scale,
            beta=self.beta,
        )

    @property
    def unit(self) -> str:
        """A client, always."""
        return UNIT_CLIENT

    @property
    def noise_multiplier(self) -> float:
        """The noise of a whole sum over the norm that an update may have after rounding."""
        return self.noise().noise_multiplier

    @property
    def discretisation_tv(self) -> float:
        """The samplers' own 2^-128 for each coordinate of each share; that the noise is integers is priced in full."""
        return 2.0**-128 * self.clients * self.dimension * self.count

    def as_dict(self) -> dict[str, Any]:
        return {
            "mechanism": _DISTRIBUTED + self.mechanism,
            "unit": self.unit,
            "adjacency": ZERO_OUT,
            "clients": self.clients,
            "dimension": self.dimension,
            "clip_norm": self.clip_norm,
            "granularity": self.granularity,
            "local_scale": self.local_scale,
            "beta": self.beta,
            "count": self.count,
            "rng": self.rng,
        }


Event = GaussianEvent | CorrelatedEvent | DistributedEvent
_DISTRIBUTED = "distributed_"


def event_from_dict(record: Mapping[str, Any]) -> Event:
    """Read an event's dictionary form. Raises `UnsupportedEvent` on any key, scheme or value not known here."""
    try:
        event = _read(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnsupportedEvent(f"an event is malformed: {type(error).__name__} at {error}") from None
    # The round trip refuses every other mechanism, adjacency, sampling scheme and unknown key in one place.
    if event.as_dict() != record:
        raise UnsupportedEvent(f"no accountant here bounds this event: {_differing_keys(event.as_dict(), record)}")
    return event


def of_unit(release: Sequence[Event], unit: str) -> list[Event]:
    """Select what the events of one `release` cost the `unit`.

    Where records were noised first, the client-level noise behind them costs the records nothing: post-processing.
    Where they were not, changing one record replaces its client's whole contribution, so the client-level events
    count, under replace-one. A record-level release bounds no client: `UnsupportedEvent`, as for a sampled, correlated
    or distributed client-level release asked for its records.
    """
    own = [event for event in release if event.unit == unit]
    if own or not release:
        return own
    if unit == UNIT_CLIENT:
        raise UnsupportedEvent("a record-level release bounds nothing at the level of a client")
    return [_for_a_record(event) for event in release]


def repeated(event: Event, times: int) -> list[Event]:
    """`event` so many `times`, as few events as say it."""
    if isinstance(event, CorrelatedEvent) or times < 1:
        return [event] * times
    if isinstance(event, DistributedEvent):
        return [replace(event, count=event.count * times)]
    return [replace(event, count=event.count * times, discretisation_tv=event.discretisation_tv * times)]


def _for_a_record(event: Event) -> Event:
    if not isinstance(event, GaussianEvent) or event.sampling_rate != 1:
        raise UnsupportedEvent(
            "a sampled, correlated or distributed client-level release states no record-level epsilon here"
        )
    return replace(event, unit=UNIT_RECORD, adjacency=REPLACE_ONE, scheme="none")


def _read(record: Mapping[str, Any]) -> Event:
    mechanism = record["mechanism"]
    if mechanism == "correlated_gaussian":
        return _correlated(record)
    return _distributed(record) if str(mechanism).startswith(_DISTRIBUTED) else _gaussian(record)


def _gaussian(record: Mapping[str, Any]) -> GaussianEvent:
    return GaussianEvent(
        unit=record["unit"],
        adjacency=record["adjacency"],
        noise_multiplier=record["noise_multiplier"],
        clip_norm=record["clip_norm"],
        sampling_rate=record["sampling"]["rate"],
        scheme=record["sampling"]["scheme"],
        count=record["count"],
        rng=record["rng"],
        discretisation_tv=record["discretisation_tv"],
        quantile_noise=record.get("quantile_noise"),
    )


def _correlated(record: Mapping[str, Any]) -> CorrelatedEvent:
    matrix = record["matrix"]
    return CorrelatedEvent(
        unit=record["unit"],
        noise_multiplier=record["noise_multiplier"],
        clip_norm=record["clip_norm"],
        coefficients=tuple(matrix.get("coefficients", ())),
        weights=tuple(matrix.get("weights", ())),
        decays=tuple(matrix.get("decays", ())),
        rounds=record["rounds"],
        participations=record["participations"],
        separation=record["separation"],
        dimension=record["dimension"],
        rng=record["rng"],
        discretisation_tv=record["discretisation_tv"],
    )


def _distributed(record: Mapping[str, Any]) -> DistributedEvent:
    return DistributedEvent(
        mechanism=record["mechanism"].removeprefix(_DISTRIBUTED),
        clients=record["clients"],
        dimension=record["dimension"],
        clip_norm=record["clip_norm"],
        granularity=record["granularity"],
        local_scale=record["local_scale"],
        beta=record["beta"],
        count=record["count"],
        rng=record["rng"],
    )


def _differing_keys(known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    differing = [key for key in {**known, **given} if key not in known or known[key] != given.get(key)]
    return ", ".join(f"{key} = {given.get(key)!r}" for key in differing)


def _check_common(unit: str, noise: float, clip_norm: float, rng: str, tv: float) -> None:
    require(unit in UNITS, "unit", " or ".join(UNITS), unit)
    require(is_number(noise) and LEAST_NOISE <= noise <= MOST_NOISE, "noise_multiplier", "in [1/16, 2^20]", noise)
    require(is_number(clip_norm) and clip_norm > 0, "clip_norm", "a finite number > 0", clip_norm)
    _check_rng(rng)
    require(is_number(tv) and 0 <= tv < 1, "discretisation_tv", "0 <= tv < 1", tv)


def _check_rng(rng: str) -> None:
    require(rng in ("os", "seeded-simulation"), "rng", "os or seeded-simulation", rng)


def _check_count(count: int) -> None:
    require(is_whole(count) and count <= MOST_RELEASES, "count", "a whole number in [1, 2^40]", count)


def is_number(value: object) -> bool:
    # Compared and not converted: a whole number of 400 digits has no float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require(holds: bool, key: str, expected: str, got: object) -> None:
    if not holds:
        raise UnsupportedEvent(f"event: {key} must be {expected}, got {got!r}")

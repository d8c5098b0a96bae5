"""Events: what was released, in the words an accountant can bound.

Events are stored, never epsilons: two runs composed from their events cost far less than the sum of two
epsilons. An event's dictionary form is part of the ledger's format; reading one is strict, because an event
with a key that we do not know may have been charged for something that we cannot bound.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from privacy.errors import UnsupportedEvent

ADD_OR_REMOVE_ONE = "add_or_remove_one"
UNIT_RECORD = "record"
LEAST_NOISE = 0.0625  # Less noise than a sixteenth of the clip norm protects nobody, and takes minutes to account for.
MOST_NOISE = 2.0**20
MOST_RELEASES = 2**40


@dataclass(frozen=True, kw_only=True)
class GaussianEvent:
    """`count` releases of a clipped sum of a Poisson sample, each with fresh Gaussian noise.

    Sensitivity: `clip_norm` in L2 under add/remove-one of a record. Noise standard deviation:
    `noise_multiplier * clip_norm` on every coordinate of the *sum*. Each record enters each release
    independently with probability `sampling_rate`, and nobody outside the site learns which did;
    1.0 means no sampling and no amplification.

    `discretisation_tv` bounds the total-variation distance, over all `count` releases, between the integer
    noise that was drawn and the continuous Gaussian that is charged (`privacy.noise.discretisation_tv`).
    `rng` is the kind of the noise source: "os", or "seeded-simulation", which protects nobody.
    """

    unit: str = UNIT_RECORD
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    count: int
    rng: str
    discretisation_tv: float = 0.0

    def __post_init__(self) -> None:
        _require(self.unit == UNIT_RECORD, "unit", UNIT_RECORD, self.unit)
        noise, rate, tv = self.noise_multiplier, self.sampling_rate, self.discretisation_tv
        _require(_number(noise) and LEAST_NOISE <= noise <= MOST_NOISE, "noise_multiplier", "in [1/16, 2^20]", noise)
        _require(_number(self.clip_norm) and self.clip_norm > 0, "clip_norm", "a finite number > 0", self.clip_norm)
        _require(_number(rate) and 0 < rate <= 1, "rate", "0 < rate <= 1", rate)
        _require(_whole(self.count) and self.count <= MOST_RELEASES, "count", "a whole number in [1, 2^40]", self.count)
        _require(self.rng in ("os", "seeded-simulation"), "rng", "os or seeded-simulation", self.rng)
        _require(_number(tv) and 0 <= tv < 1, "discretisation_tv", "0 <= tv < 1", tv)

    def as_dict(self) -> dict[str, Any]:
        return {
            "mechanism": "gaussian",
            "unit": self.unit,
            "adjacency": ADD_OR_REMOVE_ONE,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "sampling": {"scheme": "poisson", "rate": self.sampling_rate},
            "count": self.count,
            "rng": self.rng,
            "discretisation_tv": self.discretisation_tv,
        }


def event_from_dict(record: Mapping[str, Any]) -> GaussianEvent:
    """Read an event's dictionary form. Raises `UnsupportedEvent` on any key, scheme or value not known here."""
    try:
        event = GaussianEvent(
            unit=record["unit"],
            noise_multiplier=record["noise_multiplier"],
            clip_norm=record["clip_norm"],
            sampling_rate=record["sampling"]["rate"],
            count=record["count"],
            rng=record["rng"],
            discretisation_tv=record["discretisation_tv"],
        )
    except (KeyError, TypeError) as error:
        raise UnsupportedEvent(f"an event is malformed: {type(error).__name__} at {error}") from None
    # The round trip refuses every other mechanism, adjacency, sampling scheme and unknown key in one place.
    if event.as_dict() != record:
        raise UnsupportedEvent(f"no accountant here bounds this event: {_differing_keys(event.as_dict(), record)}")
    return event


def _differing_keys(known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    differing = [key for key in {**known, **given} if key not in known or known[key] != given.get(key)]
    return ", ".join(f"{key} = {given.get(key)!r}" for key in differing)


def _number(value: object) -> bool:
    # Compared and not converted: a whole number of 400 digits has no float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(holds: bool, key: str, expected: str, got: object) -> None:
    if not holds:
        raise UnsupportedEvent(f"event: {key} must be {expected}, got {got!r}")

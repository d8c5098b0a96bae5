"""What a strategy is: what one client adds, and what the server does with the total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.parameters import Parameters, Vector
from strategies.total import Total


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round, and all that a checkpoint holds.

    `model` is (P,) float32. `memory` holds what a strategy remembers between rounds (momentum, control variates),
    each a named array. `release` is what the noise on the sums must remember (a moving clip norm, correlated noise): it
    is secret. `round_number` counts finished rounds.
    """

    model: Vector
    round_number: int = 0
    memory: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    release: dict[str, NDArray[np.float64]] = field(default_factory=dict)


Kept = Literal["vector", "scalar"]
"""What a site keeps under a name: P numbers or one."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a strategy needs; a job is held against it before anything runs (`strategies.composition`).

    Vectors are counted in P, the number of the model's parameters.
    """

    received: int = 1
    """Vectors that the server sends to a site."""
    sent: int = 1
    """Vectors that a site adds to the sum."""
    scalars: tuple[str, ...] = ()
    """Further sums of one number each, by name."""
    reads_records: bool = False
    """Its contribution depends on the records by more than training: by a loss, say."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """What a site keeps between rounds, and its next contribution may depend on."""
    own: Mapping[str, Kept] = field(default_factory=dict)
    """What a site keeps for itself alone: no contribution ever depends on it."""
    personal: bool = False
    """Each site ends with a model of its own (`own_model`)."""
    own_weights: bool = False
    """Its weights are neither 1 nor the number of rows."""
    equal_weights: bool = False
    """It wants strategy.weighting = "equal"."""
    equal_steps: bool = False
    """Every site has to take the same number of local steps, of one size in all rounds."""
    in_step: bool = False
    """What its sites keep has to match what the server added up: an answer that is lost or left out of a sum leaves a
    lasting difference."""
    asynchronous: bool = False
    """The server does not wait for a cohort: it steps after so many contributions, of older models too."""

    def __post_init__(self) -> None:
        if both := sorted(set(self.kept) & set(self.own)):
            raise JobError(f"strategy.name: it keeps {both[0]!r} both for its contributions and for the site alone")

    @property
    def remembers(self) -> bool:
        """Whether a site keeps anything between rounds."""
        return bool(self.kept or self.own)


@dataclass(frozen=True)
class Added:
    """What a contribution holds besides its update: its weight, and a number for each of the strategy's `scalars`."""

    weight: float
    scalars: Mapping[str, float] = field(default_factory=dict)


class Local(Protocol):
    """What a site lends to a strategy's client half in one round."""

    @property
    def rows(self) -> int:
        """The number of training rows."""
        ...

    @property
    def steps(self) -> int:
        """How many steps of SGD the site takes in a round, over all calls of `fit`; fewer than it said before, once a
        call ended early because the site's time was up."""
        ...

    @property
    def share(self) -> float:
        """Of the model's parameters, the last so many are trained here and the others stay: 1 unless the site is weak
        (`strategies.partial`). `fit` sees to it."""
        ...

    @property
    def rank(self) -> int | None:
        """Of adapters with `task.tuning.ranks`, how many columns this site trains; None for all."""
        ...

    @property
    def learning_rate(self) -> float:
        """Of this round's local steps."""
        ...

    @property
    def parameters(self) -> Parameters:
        """Names and shapes of the model's arrays."""
        ...

    @property
    def memory(self) -> dict[str, Vector]:
        """What the site kept under the names of `Traits.kept`; empty before its first round. What is there when the
        contribution is made is kept: all the names or none."""
        ...

    def fit(
        self,
        start: Vector,
        *,
        pull: float = 0.0,
        towards: Vector | None = None,
        drift: Vector | None = None,
        frozen: NDArray[np.bool_] | None = None,
        steps: int | None = None,
    ) -> Vector:
        """Train from `start` ((P,) float32) on the site's records, as the job says; the model that it arrives at.

        To each step's gradient g at the model w is added `pull` (w - `towards`) + `drift`; `towards` is `start` unless
        given. Where `frozen` ((P,) bool) is true nothing moves. With record-level privacy this is DP-SGD, and all
        calls of a round together take at most `self.steps` steps, those that the site is charged for. The result is
        the trainer's own memory: it holds until the next call.
        """
        ...

    def bound(self, update: Vector) -> None:
        """Shorten `update` ((P,) float32, of weight 1) in place as the gate will, where the job protects whole sites: a
        site that remembers what it sent has to remember what left."""
        ...

    def loss(self, model: Vector) -> float:
        """The mean loss of `model` ((P,) float32) over the training rows. Refused with record-level privacy, except
        in `personalise`: it would be one more release."""
        ...


class Strategy(Protocol):
    """Both halves of one algorithm. Pure but for what `Local` does: arrays in, arrays out; no network, no clock."""

    @property
    def traits(self) -> Traits: ...

    def start(self, model: Vector, *, sites: int) -> ServerState:
        """The state before round 1 of a federation of `sites`."""
        ...

    def broadcast(self, state: ServerState) -> Vector:
        """What each site of the next round receives ((received * P,) float32); the delivered model too."""
        ...

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        """The client half: train, and write the *weighted* update into `out` ((sent * P,) float32, zeros at first)."""
        ...

    def personalise(self, received: Vector, local: Local) -> None:
        """Train what stays at the site, after its contribution has been made. Whatever is put into `local.memory` here
        is kept under the names of `Traits.own`, and no contribution ever sees it: it needs no noise."""
        ...

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        """The model ((P,) float32) that a site uses which received this and keeps that, `kept` and `own` together."""
        ...

    def step(self, state: ServerState, total: Total) -> ServerState:
        """The server half: the state after this round. Sees the total of the cohort, never one contribution."""
        ...

"""What a strategy is: what one client adds, and what the server does with the total."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.parameters import Vector
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


class Strategy(Protocol):
    """Both halves of one algorithm. Pure: arrays in, arrays out; no network, no clock, no randomness."""

    def contribution(self, start: Vector, trained: Vector, *, rows: int, out: Vector) -> float:
        """The client half: write the *weighted* update ((P,) float32) into `out`; return the weight.

        `start` is the model that the server sent, `trained` the model after local training on `rows` rows. `out` may
        be the memory of `trained`.
        """
        ...

    def step(self, state: ServerState, total: Total) -> ServerState:
        """The server half: the state after this round. Sees the total of the cohort, never one contribution."""
        ...

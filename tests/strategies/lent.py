"""What a site lends to a strategy, without records: training in a bowl of known bottom, or straight to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privacy.mechanism import clip_in_place
from strategies.parameters import Parameters, Vector
from strategies.protocol import ServerState, Strategy
from strategies.total import Layout, Total


def float32(*values: float) -> Vector:
    return np.array(values, np.float32)


@dataclass
class Lent:
    """`strategies.protocol.Local`: SGD on curvature / 2 * |w - goal|^2, or `arrives` whatever it starts from."""

    goal: Vector = field(default_factory=lambda: float32(1, 2, 3))
    curvature: float = 1.0
    arrives: Vector | None = None
    rows: int = 10
    steps: int = 4
    share: float = 1.0
    rank: int | None = None
    learning_rate: float = 0.1
    memory: dict[str, Vector] = field(default_factory=dict)
    own: dict[str, Vector] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    clip_norm: float | None = None
    taken: int = 0
    reads: int = 0

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.shapes or {"weight": self.goal.shape})

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
        steps = self.steps if steps is None else steps
        self.taken += steps
        if self.arrives is not None:
            return self.arrives.copy()
        model, anchor = start.copy(), start.copy() if towards is None else towards
        for _ in range(steps):
            gradient = self.curvature * (model - self.goal) + np.float32(pull) * (model - anchor)
            if drift is not None:
                gradient = gradient + drift
            if frozen is not None:
                gradient = np.where(frozen, np.float32(0), gradient)
            model = (model - np.float32(self.learning_rate) * gradient).astype(np.float32)
        return model

    def bound(self, update: Vector) -> None:
        if self.clip_norm is not None:
            clip_in_place(update, self.clip_norm)

    def loss(self, model: Vector) -> float:
        self.reads += 1
        return float(0.5 * self.curvature * np.square(model - self.goal).sum())


def contribute(strategy: Strategy, received: Vector, local: Lent) -> Vector:
    """One client's whole contribution, as it would be sent; what the site keeps stays in `local`."""
    traits, size = strategy.traits, local.parameters.size
    out = np.zeros(traits.sent * size, np.float32)
    before = {name: array.copy() for name, array in local.memory.items()}
    local.memory = {name: array for name, array in local.memory.items() if name in traits.kept}
    added = strategy.contribution(received, local, out)
    assert set(added.scalars) == set(traits.scalars)
    after = Lent(**{**vars(local), "memory": {**before, **local.memory}})
    strategy.personalise(received, after)
    local.memory = after.memory
    local.bound(out)  # The gate does so, whatever the strategy did.
    return np.array([*out, added.weight, *(added.scalars[name] for name in traits.scalars)], np.float32)


def total_of(strategy: Strategy, parameters: int, contributions: Sequence[Vector]) -> Total:
    total = Total(Layout(strategy.traits.sent * parameters, strategy.traits.scalars))
    for contribution in contributions:
        total.add(contribution)
    return total


def run_round(strategy: Strategy, state: ServerState, clients: Sequence[Lent]) -> ServerState:
    """One round of all `clients`."""
    received = strategy.broadcast(state)
    sent = [contribute(strategy, received, client) for client in clients]
    return strategy.step(state, total_of(strategy, state.model.size, sent))


def run_rounds(strategy: Strategy, start: Vector, clients: Sequence[Lent], rounds: int) -> ServerState:
    state = strategy.start(start, sites=len(clients))
    for _ in range(rounds):
        state = run_round(strategy, state, clients)
    return state

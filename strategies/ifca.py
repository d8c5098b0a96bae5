"""IFCA, iterative federated clustering: Ghosh et al. 2020, *An Efficient Framework for Clustered Federated Learning*
(arXiv:2006.04088), Algorithm 1, averaging models (option II)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from strategies.fedavg import FedAvg, write_update
from strategies.parameters import Parameters, Vector
from strategies.protocol import Added, Local, ServerState, Traits
from strategies.sections import Positive
from strategies.total import Total


@dataclass(frozen=True, kw_only=True)
class Ifca(FedAvg):
    """`clusters` models; each site trains the one that fits its records best, and adds to that one's sum alone.

    The others' places in its contribution hold zeros: under secure aggregation nobody learns who is in which cluster.
    The models start as the job's, all but the first moved at random by `spread` in each parameter. The model of the
    run is their mean; each site's own is its cluster's.
    """

    clusters: Annotated[int, Field(gt=0, le=64)] = 2  # Each is one more model in every message.
    spread: Positive = 0.1

    @property
    def traits(self) -> Traits:
        return Traits(
            received=self.clusters,
            sent=self.clusters,
            scalars=tuple(f"cluster_{number}" for number in range(self.clusters)),
            reads_records=True,
            kept={"cluster": "scalar"},
            personal=True,
        )

    def start(self, model: Vector, *, sites: int) -> ServerState:
        # The same for the same model: a run can be repeated.
        digest = hashlib.sha256(np.ascontiguousarray(model, dtype="<f4").tobytes()).digest()
        moved = np.random.default_rng(np.frombuffer(digest, np.uint32)).normal(
            scale=self.spread, size=(self.clusters, len(model))
        )
        moved[0] = 0
        return self._with(ServerState(model), model + moved)

    def broadcast(self, state: ServerState) -> Vector:
        models: Vector = state.memory["models"].astype(np.float32).ravel()
        return models

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        models, places = np.split(received, self.clusters), np.split(out, self.clusters)
        losses = [local.loss(model) for model in models]
        best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        local.memory["cluster"] = np.array([best], np.float32)
        weight = self.weight(local)
        write_update(models[best], local.fit(models[best]), weight, places[best])
        return Added(weight, {name: weight * (k == best) for k, name in enumerate(self.traits.scalars)})

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        models = np.split(received, self.clusters)
        if "cluster" in memory:
            return models[int(memory["cluster"][0])]
        mean: Vector = np.mean(models, axis=0, dtype=np.float32)
        return mean

    def step(self, state: ServerState, total: Total) -> ServerState:
        weights = np.array([total.metrics[name] for name in self.traits.scalars])
        sums = total.update.reshape(self.clusters, -1)
        with np.errstate(over="ignore", invalid="ignore"):
            # A cluster that nobody chose stays where it is. Sums that pass through whole numbers are not exactly zero.
            chosen = weights > 1e-6 * total.weight
            steps = np.where(chosen[:, None], sums / np.where(chosen, weights, 1.0)[:, None], 0.0)
            models = state.memory["models"].reshape(self.clusters, -1) + self.server_learning_rate * steps
            moved = self._with(state, models)
        return replace(moved, round_number=state.round_number + 1)

    def _with(self, state: ServerState, models: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> ServerState:
        mean: Vector = models.mean(axis=0).astype(np.float32)
        return replace(state, model=mean, memory={**state.memory, "models": models.ravel()})

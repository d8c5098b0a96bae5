"""Models that are shared in part. FedPer: Arivazhagan et al. 2019 (arXiv:1912.00818), Algorithm 1. FedRep: Collins et
al. 2021 (arXiv:2102.07078), Algorithm 1. FedBN: Li et al. 2021 (arXiv:2102.07623), Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.fedavg import FedAvg, write_update
from strategies.fedopt import FedAdam
from strategies.parameters import Parameters, Vector
from strategies.protocol import Added, Local, Traits
from strategies.sections import Positive, Share


@dataclass(frozen=True, kw_only=True)
class FedPer(FedAvg):
    """Arrays that `keep` names (with * and ?) stay at each site; the others are averaged as in FedAvg.

    Without `keep` it is the last layer. What stays is sent as zeros. It is trained under the job's record-level privacy
    like the rest, since it steers what is sent.
    """

    keep: tuple[str, ...] = ()

    @property
    def traits(self) -> Traits:
        return Traits(kept={"own": "vector"}, personal=True)

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        own = self.kept(local.parameters)
        start = np.where(own, local.memory.get("own", received), received)
        trained = self.fit_parts(start, own, local)
        local.memory["own"] = np.where(own, trained, np.float32(0))
        weight = self.weight(local)
        write_update(received, trained, weight, out)
        out[own] = 0
        return Added(weight)

    def fit_parts(self, start: Vector, own: NDArray[np.bool_], local: Local) -> Vector:
        """Train from `start`; `own` ((P,) bool) is what stays."""
        return local.fit(start)

    def own_model(self, received: Vector, memory: Mapping[str, Vector], parameters: Parameters) -> Vector:
        own: Vector = np.where(self.kept(parameters), memory.get("own", received), received)
        return own

    def kept(self, parameters: Parameters) -> NDArray[np.bool_]:
        """Which of the parameters stay ((P,) bool). Raises `JobError` when none or all of them would."""
        names = list(parameters.shapes)
        patterns = self.keep or self.by_default(parameters)
        chosen = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in names]
        if not any(chosen) or all(chosen):
            what = "all of" if all(chosen) else "none of"
            raise JobError(
                f"strategy.keep: {', '.join(patterns) or 'its default'} names {what} the model's arrays "
                f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); name some of them, or take a "
                "task.model that has more layers"
            )
        return np.repeat(chosen, parameters.sizes)

    def by_default(self, parameters: Parameters) -> tuple[str, ...]:
        """What stays where the job does not say: the last layer."""
        return (list(parameters.shapes)[-1].rpartition(".")[0] + ".*",)


@dataclass(frozen=True, kw_only=True)
class FedPerAdam(FedPer, FedAdam):
    """FedPer whose server takes the steps of FedAdam: for shared arrays that are rarely touched, such as the factors of
    an item that few customers have bought."""

    server_learning_rate: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """FedPer whose sites train in turn: what stays, for `own_share` of the round's steps, then what is shared.

    Each part gets one step at least; a site of one step takes it with both parts at once.
    """

    own_share: Share = 0.5

    def fit_parts(self, start: Vector, own: NDArray[np.bool_], local: Local) -> Vector:
        whole = local.steps
        if whole < 2:
            return local.fit(start)
        first = min(max(1, round(self.own_share * whole)), whole - 1)
        trained = local.fit(start, frozen=~own, steps=first).copy()
        return local.fit(trained, frozen=own, steps=whole - first)


@dataclass(frozen=True, kw_only=True)
class FedBn(FedPer):
    """FedPer that keeps the normalisation layers, for sites whose features are shifted or scaled.

    Those are the layers whose weight is a vector: every other kind of layer has a matrix or more.
    """

    def by_default(self, parameters: Parameters) -> tuple[str, ...]:
        weights = [name for name, shape in parameters.shapes.items() if name.endswith("weight") and len(shape) == 1]
        return tuple(name.removesuffix("weight") + "*" for name in weights)

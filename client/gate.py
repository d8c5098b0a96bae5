"""The gate: the last code to touch what leaves a site.

The order is the guarantee: check the request -> reserve in the site's own ledger -> train -> check the contribution
-> write it to the outbox -> commit its hash -> reply. Nothing leaves without a committed entry; a crash anywhere
leaves either nothing spent, or spent and nothing lost:

| a crash after ...  | the ledger says  | asked again for the same round and model, the site ...          |
|--------------------|------------------|------------------------------------------------------------------|
| the check          | nothing          | starts afresh                                                    |
| reserve            | spent            | reserves once more, or refuses when the plan's rounds are used up |
| commit             | spent, committed | sends the same bytes again: no new release, no new charge        |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from privacy.budget import SiteBudget
from privacy.durable import write_atomically
from privacy.errors import BudgetExceeded, FedchorusError
from strategies.messages import Ask, Refusal, Reply, check_ask
from strategies.parameters import Vector, vector_hash
from strategies.total import Layout


@dataclass(frozen=True)
class Outbox:
    """The last contribution on disk, so that what the ledger says left can be sent again, byte for byte."""

    path: Path

    def put(self, contribution: Vector) -> None:
        """Durable when this returns; replaces the one before."""
        write_atomically(self.path, np.ascontiguousarray(contribution, dtype="<f4").data)

    def get(self, digest: str) -> Vector | None:
        """The contribution whose `vector_hash` is `digest`, if it is the one kept."""
        try:
            contribution = np.fromfile(self.path, dtype="<f4").astype(np.float32, copy=False)
        except FileNotFoundError:
            return None
        return contribution if vector_hash(contribution) == digest else None


@dataclass(frozen=True)
class Account:
    """What a protected job is charged to at this site."""

    budget: SiteBudget
    outbox: Outbox


@dataclass(frozen=True)
class Gate:
    """One site's gate for one job. `account` is None for a job without differential privacy: nothing bounds it."""

    site: str
    job: str
    layout: Layout
    account: Account | None

    def pass_through(self, ask: Ask, train: Callable[[], Vector]) -> Reply | Refusal:
        """Answer `ask` with what `train` returns ((layout.size,) float32), in the order above.

        Raises `MalformedMessage` for a request that is not what this site approved, and `TrainingDiverged` when the
        contribution is not finite. A spent budget gives a `Refusal`, before any data are touched.
        """
        check_ask(ask, job=self.job, parameters=self.layout.parameters)
        if self.account is None:
            return Reply(self.site, self.job, ask.round_number, self._checked(train()), None)
        budget, outbox = self.account.budget, self.account.outbox
        sent = budget.committed(job=self.job, round_number=ask.round_number, model=ask.model_hash)
        if sent is not None and (again := outbox.get(sent)) is not None:
            return Reply(self.site, self.job, ask.round_number, again, budget.ledger.head)
        try:
            reservation = budget.reserve(
                job=self.job, round_number=ask.round_number, model=ask.model_hash, witness=ask.witness
            )
        except BudgetExceeded:
            return Refusal(self.site, self.job, ask.round_number)
        contribution = self._checked(train())
        outbox.put(contribution)
        head = budget.commit(reservation, output=vector_hash(contribution))
        return Reply(self.site, self.job, ask.round_number, contribution, head)

    def _checked(self, contribution: Vector) -> Vector:
        assert contribution.shape == (self.layout.size,)
        with np.errstate(invalid="ignore"):  # Infinities of both signs add up to NaN.
            finite = np.isfinite(np.sum(contribution, dtype=np.float64))
        if not finite:
            raise TrainingDiverged(f"{self.site}: training diverged (the update is not finite), nothing was sent")
        return contribution


class TrainingDiverged(FedchorusError):
    """Local training left a model that is not finite."""

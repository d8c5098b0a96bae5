"""The gate: the last code to touch what leaves a site.

The order is the guarantee: check the request -> reserve in the site's own ledger -> train -> bound the contribution
(`Guard`) and check it -> write it to the outbox -> commit its hash -> reply. Nothing leaves without a committed entry;
a crash anywhere leaves either nothing spent, or spent and nothing lost:

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
from privacy.ledger import Entry, Head
from privacy.mechanism import GaussianSum, clip_in_place
from privacy.noise import NoiseSource
from strategies.messages import Ask, MalformedMessage, Refusal, Reply, check_ask
from strategies.parameters import Vector, vector_hash
from strategies.total import BELOW_CLIP, Layout


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
class Guard:
    """Bounds one client's whole contribution before it leaves, and with local noise makes it private.

    Guarantee: the update has L2 norm at most the round's clip norm and weighs 1, whatever was trained on whatever
    rows. With `local` what leaves is a release of that mechanism, whose sensitivity is the clip norm.

    | an update that is | leaves as                                                                     |
    |-------------------|-------------------------------------------------------------------------------|
    | too long          | itself, scaled down to the clip norm                                          |
    | NaN or infinite   | zero: an error would reveal its client                                        |
    | zero, or no rows  | zero; with local noise, noise                                                 |
    """

    layout: Layout
    clip_norm: float | None  # None: the one that the server asks for, which moves.
    local: GaussianSum | None
    noise: Callable[[int], NoiseSource]

    def apply(self, contribution: Vector, ask: Ask) -> None:
        """Bound `contribution` ((layout.size,) float32) in place."""
        update = contribution[: self.layout.parameters]
        clip_norm = self.clip_norm if self.clip_norm is not None else ask.clip_norm
        if clip_norm is None:
            raise MalformedMessage("the request names no clip norm")
        within = clip_in_place(update, clip_norm)
        if self.local is not None:
            update[:] = self.local.release(self.local.quantised_sum(update[None]), self.noise(ask.round_number))
        metrics = {BELOW_CLIP: 0.5 if within else -0.5}
        contribution[self.layout.parameters :] = [1.0, *(metrics[name] for name in self.layout.metrics)]


@dataclass(frozen=True)
class Account:
    """What a protected job is charged to at this site."""

    budget: SiteBudget
    outbox: Outbox


@dataclass(frozen=True)
class Gate:
    """One site's gate for one job.

    `account` is None where nothing is charged to this site: a job without differential privacy, or one whose noise the
    server adds. `guard` is there where whole clients are protected.
    """

    site: str
    job: str
    layout: Layout
    account: Account | None
    guard: Guard | None = None

    def pass_through(self, ask: Ask, train: Callable[[], Vector]) -> Reply | Refusal:
        """Answer `ask` with what `train` returns ((layout.size,) float32), in the order above.

        Raises `MalformedMessage` for a request that is not what this site approved, and `TrainingDiverged` when the
        contribution is not finite. A spent budget gives a `Refusal`, before any data are touched.
        """
        self.check(ask)
        if (account := self.account) is not None:
            sent = account.budget.committed(job=self.job, round_number=ask.round_number, model=ask.model_hash)
            if sent is not None and (again := account.outbox.get(sent)) is not None:
                return Reply(self.site, self.job, ask.round_number, again, account.budget.ledger.head)
        try:
            reservation = self.reserve(ask)
        except BudgetExceeded:
            return Refusal(self.site, self.job, ask.round_number)
        contribution = self.checked(train(), ask)
        if account is not None:
            account.outbox.put(contribution)
        head = self.commit(reservation, vector_hash(contribution))
        return Reply(self.site, self.job, ask.round_number, contribution, head)

    def check(self, ask: Ask) -> None:
        """Raise `MalformedMessage` for a request to train that this site has not approved."""
        check_ask(ask, job=self.job, parameters=self.layout.asked)

    def reserve(self, ask: Ask) -> Entry | None:
        """Charge the round before any data are touched. Raises `BudgetExceeded`."""
        if self.account is None:
            return None
        return self.account.budget.reserve(
            job=self.job, round_number=ask.round_number, model=ask.model_hash, witness=ask.witness
        )

    def commit(self, reservation: Entry | None, output: str) -> Head | None:
        """Write the hash of what leaves into the ledger, before it does; the ledger's newest head."""
        if self.account is None or reservation is None:
            return None
        return self.account.budget.commit(reservation, output=output)

    def checked(self, contribution: Vector, ask: Ask) -> Vector:
        """Bound `contribution` in place. Raises `TrainingDiverged` if it is not finite."""
        assert contribution.shape == (self.layout.size,)
        if self.guard is not None:
            self.guard.apply(contribution, ask)
        with np.errstate(invalid="ignore"):  # Infinities of both signs add up to NaN.
            finite = np.isfinite(np.sum(contribution, dtype=np.float64))
        if not finite:
            raise TrainingDiverged(f"{self.site}: training diverged (the update is not finite), nothing was sent")
        return contribution


class TrainingDiverged(FedchorusError):
    """Local training left a model that is not finite."""

"""One site's client: what it answers to one request. The same code in every engine and in deployment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.gate import Account, Gate, Guard, Outbox
from client.memory import SiteMemory
from client.secure import SecureGate, Stopwatch
from privacy.accountant import noise_multiplier_for
from privacy.budget import Accounts, JobAccount, Limit, SiteBudget
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import JobError
from privacy.events import UNIT_CLIENT, UNIT_RECORD, Event
from privacy.keys import IdentityKey
from privacy.ledger import Ledger
from privacy.mechanism import GaussianSum
from privacy.noise import NoiseSource
from privacy.secagg.client import SecureClient, Store
from privacy.secagg.journal import Journal
from privacy.secagg.roster import Roster
from strategies.job import Job
from strategies.job_privacy import Protection
from strategies.messages import Answer, Ask, MalformedMessage, Request, Step
from strategies.parameters import Vector
from strategies.secure import SecureSum
from strategies.total import Layout


@dataclass(frozen=True)
class Files:
    """Where one site keeps what it must not lose: its ledger, its identity key, its last contribution, the journal of
    what it released securely; `session`, the secrets of a secure sum while it lasts; and `memory`, what its strategy
    keeps between rounds."""

    ledger: Path
    identity: Path
    outbox: Path
    journal: Path
    session: Path
    memory: Path

    @classmethod
    def within(cls, private: Path, *, ledger: Path) -> Files:
        """All but the ledger in one folder of the site's own."""
        names = ("identity.pem", "outbox.bin", "journal", "session", "memory.bin")
        return cls(ledger, *(private / name for name in names))


@dataclass(frozen=True)
class Seat:
    """A site's seat in its job's secure sums: the plan, the participants, where a session's secrets are kept."""

    plan: SecureSum
    roster: Roster
    store: Store
    stopwatch: Stopwatch


@dataclass(frozen=True)
class SitePlan:
    """What a job will do at a site with so many training rows, and what each round will cost it.

    `sgd` is None where no record-level privacy is asked for, `local` where no local noise protects the whole client.
    `events` is what one round releases; empty where nothing is charged to the site.
    """

    rows: int
    sgd: RecordLevelSgd | None = None
    local: GaussianSum | None = None
    events: tuple[Event, ...] = ()
    limits: tuple[Limit, ...] = ()
    rounds: int = 0

    @classmethod
    def make(
        cls,
        job: Job,
        *,
        rows: int,
        parameters: int,
        rng: str,
        site: str,
        noise_multiplier: float | None = None,
        layers: tuple[int, ...] = (),
        secure: SecureSum | None = None,
    ) -> SitePlan:
        """Calibrate the noise for a target; refuse a plan that exceeds its budget (`BudgetExceeded`).

        `noise_multiplier` is what an earlier call for the same job found for the records: it is checked against the
        budget, not searched for again. `layers` are the sizes of the model's arrays, for clipping each by itself.
        `secure` is the job's secure sum, whose noise shares the site is charged for.
        Raises `JobError` for a delta that one record of the site could spend on being published.
        """
        record, training = job.privacy.record, job.training
        if not job.privacy.at_sites:
            return cls(rows)
        rounds = training.rounds + max(own.spare_rounds for own in job.privacy.at_sites)
        events: list[Event] = []
        limits: list[Limit] = []
        sgd, local = None, None
        if record is not None:
            if record.delta >= 1 / rows:
                raise JobError(
                    f"{site}: privacy.record.delta is {record.delta:g}, not below 1/{rows}, one over its training "
                    "rows: it would allow to publish one of them outright"
                )
            rate, steps = training.rate_for(rows), training.steps_for(rows)
            noise = record.noise_multiplier or noise_multiplier or _calibrated(record, rate, steps * rounds)
            mechanism = _mechanism(record, noise, layers)
            sgd = RecordLevelSgd(mechanism=mechanism, sampling_rate=rate, steps=steps)
            events.append(sgd.event(dimension=parameters, rng=rng))
            limits.append(Limit(unit=UNIT_RECORD, epsilon=record.epsilon, delta=record.delta))
        if (client := job.privacy.local) is not None:
            noise = client.noise_multiplier or _calibrated(client, 1.0, rounds)
            local = _mechanism(client, noise, layers)
            # Who takes part is seen by the server, so nothing is amplified: every round counts in full.
            events.append(local.event(sampling_rate=1.0, count=1, dimension=parameters, rng=rng, unit=UNIT_CLIENT))
            limits.append(Limit(unit=UNIT_CLIENT, epsilon=client.epsilon, delta=client.delta))
        if (client := job.privacy.distributed) is not None:
            assert secure is not None
            assert secure.distributed is not None
            events.append(secure.distributed.event(count=1, rng=rng))
            limits.append(Limit(unit=UNIT_CLIENT, epsilon=client.epsilon, delta=client.delta))
        plan = cls(rows, sgd, local, tuple(events), tuple(limits), rounds)
        account = JobAccount(job.hash, job.purpose, rounds, plan.events, None, plan.limits)
        Accounts(site).check_affordable(account)
        return plan


def _mechanism(own: Protection, noise: float, layers: tuple[int, ...]) -> GaussianSum:
    apart = layers if own.clipping == "per-layer" else ()
    return GaussianSum(clip_norm=own.clip_norm, noise_multiplier=noise, layers=apart)


def _calibrated(own: Protection, rate: float, count: int) -> float:
    assert own.epsilon is not None
    return noise_multiplier_for(target_epsilon=own.epsilon, delta=own.delta, sampling_rate=rate, count=count)


class Site:
    """A data holder's client: the gate of one job, and what trains behind it.

    `train` answers a request, and what the site kept in the round before, with a contribution ((layout.size,) float32)
    and what it keeps now, in this process or in another; `guard_noise` makes the source of one round's local noise, so
    a simulation can seed each site's by itself.
    """

    def __init__(
        self,
        name: str,
        *,
        job: Job,
        plan: SitePlan,
        layout: Layout,
        train: Callable[[Ask, Vector | None], tuple[Vector, Vector | None]],
        guard_noise: Callable[[int], NoiseSource],
        files: Files | None,
        simulation: bool,
        seat: Seat | None = None,
        identity: IdentityKey | None = None,
    ) -> None:
        """`identity` is the site's key where it is loaded already; without it the one in `files` is."""
        self._name = name
        self._job, self._plan, self._layout, self._train = job, plan, layout, train
        self._guard_noise = guard_noise
        self._files, self._simulation, self._seat, self._identity = files, simulation, seat, identity
        self._gate: Gate | SecureGate | None = None

    @property
    def name(self) -> str:
        return self._name

    def handle(self, request: Request) -> Answer:
        """Train on the model that is asked with, and answer. The answer's array is this call's own memory.

        Raises `MalformedMessage` when a job with secure aggregation is asked without it, or the other way round.
        """
        match request, self.open():
            case Ask(), Gate() as gate:
                return gate.pass_through(request, lambda: self._trained(request))
            case Step(), SecureGate() as gate:
                return gate.answer(request, lambda: self._trained(_asked(request)))
        raise MalformedMessage("this site's job has it otherwise: with secure aggregation, or without")

    def _trained(self, ask: Ask) -> Vector:
        if not self._layout.memory:
            return self._train(ask, None)[0]
        assert self._files is not None, "a strategy that remembers needs a file"
        memory = SiteMemory(self._files.memory, self._layout.memory)
        contribution, kept = self._train(ask, memory.before(ask.round_number))
        # What is not finite would spoil each later round too: the site goes on with what it had before.
        if kept is not None and np.isfinite(kept).all():
            memory.keep(ask.round_number, kept)
        return contribution

    def open(self) -> Gate | SecureGate:
        """Open the gate and plan the job in the ledger. Raises `BudgetExceeded` for a plan that does not fit."""
        if self._gate is None:
            self._gate = self._open_gate()
        return self._gate

    def _key(self, files: Files) -> IdentityKey:
        return self._identity if self._identity is not None else IdentityKey.load(files.identity)

    def _open_gate(self) -> Gate | SecureGate:
        """Open the ledger on first contact: a site that is never asked writes nothing."""
        plan, account, guard = self._plan, None, None
        if plan.events:
            assert self._files is not None, "a private job needs a ledger"
            files = self._files
            budget = SiteBudget(Ledger(files.ledger, self._name, self._key(files)))
            budget.open(rows=plan.rows, simulation=self._simulation, dataset=self._job.data.dataset)
            budget.plan(
                job=self._job.hash,
                events=plan.events,
                rounds=plan.rounds,
                limits=plan.limits,
                purpose=self._job.purpose,
            )
            account = Account(budget, Outbox(files.outbox))
        if (client := self._job.privacy.client) is not None:
            fixed = None if client.adaptive_clip is not None else client.clip_norm
            guard = Guard(self._layout, fixed, plan.local, self._guard_noise)
        gate = Gate(self._name, self._job.hash, self._layout, account, guard)
        return gate if self._seat is None else self._open_seat(gate, self._seat)

    def _open_seat(self, gate: Gate, seat: Seat) -> SecureGate:
        secure, files = self._job.secure_aggregation, self._files
        assert secure is not None
        assert files is not None, "a secure sum needs a key and a journal"
        member = SecureClient(
            self._name,
            identity=self._key(files),
            roster=seat.roster,
            terms=seat.plan.terms(self._job, seat.roster),
            journal=Journal(files.journal),
            store=seat.store,
            # What is paid for in the ledger may leave as often as it is paid for; what is not, once.
            per_round=None if self._plan.events else 1 + secure.retries,
        )
        return SecureGate(gate, seat.plan, member, self._guard_noise, seat.stopwatch)


def _asked(step: Step) -> Ask:
    assert step.ask is not None
    return step.ask

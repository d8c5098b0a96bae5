"""Client-level privacy by noise on the sum: charge the round, add up on a grid, release once (McMahan et al. 2018).

The order is the guarantee: the round is reserved in the server's own ledger before anyone is asked; every contribution
is clipped and put on the grid as it comes in; the noise is added to their sum, whoever answered; its hash is committed;
only then does a strategy see it, over the *expected* cohort. An empty cohort is released like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.accountant import noise_multiplier_for
from privacy.adaptive_clip import AdaptiveClip
from privacy.budget import Accounts, JobAccount, Limit, SiteBudget
from privacy.correlated import (
    Banded,
    BufferedToeplitz,
    CorrelatedState,
    CorrelatedSum,
    Participation,
    ParticipationCounter,
    banded_coefficients,
    blt_coefficients,
    bsr_coefficients,
    rounded_sensitivity,
)
from privacy.errors import JobError
from privacy.events import UNIT_CLIENT, CorrelatedEvent, Event, GaussianEvent
from privacy.ledger import SERVER, Entry, Head
from privacy.mechanism import GaussianSum
from privacy.noise import NoiseSource, discretisation_tv
from server.cohort import expected_size
from strategies.job import Job
from strategies.job_privacy import ClientPrivacy
from strategies.parameters import Vector, vector_hash
from strategies.protocol import ServerState
from strategies.total import BELOW_CLIP, Layout, Total


class Release(Protocol):
    """What happens to a cohort's sum before a strategy sees it."""

    def reserve(self, state: ServerState, asked: Sequence[str], witness: str | None) -> float | None:
        """Charge the round after `state`, before `asked` are; return the clip norm that they are to use.

        `witness` is the digest of all heads after the round before, which the sites sign too.
        """
        ...

    def total(self) -> Total:
        """A fresh total for the round to be added up in."""
        ...

    def release(self, state: ServerState, total: Total) -> tuple[ServerState, Total]:
        """What may leave: the total, and `state` with what the noise must remember."""
        ...

    @property
    def head(self) -> Head | None:
        """The newest entry of the ledger that the rounds are charged to."""
        ...


@dataclass(frozen=True)
class PlainRelease:
    """No noise: the sum as it is."""

    layout: Layout

    def reserve(self, state: ServerState, asked: Sequence[str], witness: str | None) -> float | None:
        return None

    def total(self) -> Total:
        return Total(self.layout)

    def release(self, state: ServerState, total: Total) -> tuple[ServerState, Total]:
        return state, total

    @property
    def head(self) -> Head | None:
        return None


@dataclass(frozen=True)
class ReleasePlan:
    """What a job's central client-level privacy will do, and what it costs each client.

    `rounds` is how many reservations are planned; `cohort` the expected number of clients, the public denominator;
    `noise_multiplier` that of all that a round releases, over its sensitivity.
    """

    clients: int
    cohort: float
    rounds: int
    noise_multiplier: float
    event: Event
    limit: Limit
    mechanism: GaussianSum | CorrelatedSum
    adaptive: AdaptiveClip | None = None

    @property
    def sampled(self) -> bool:
        """Whether the cost counts on nobody learning who took part."""
        return isinstance(self.event, GaussianEvent) and self.event.sampling_rate < 1

    @classmethod
    def make(
        cls,
        job: Job,
        *,
        clients: int,
        parameters: int,
        rng: str,
        noise_multiplier: float | None = None,
        layers: tuple[int, ...] = (),
    ) -> ReleasePlan:
        """Calibrate the noise for a target; refuse a plan that exceeds its budget (`BudgetExceeded`).

        `noise_multiplier` is what an earlier call for the same job found; `layers` are the sizes of the model's arrays,
        for clipping each by itself. Raises `JobError` for a delta that one
        client in `clients` could spend on being published.
        """
        client = job.privacy.central
        assert client is not None
        if client.delta >= 1 / clients:
            raise JobError(
                f"privacy.client.delta: {client.delta:g} is not below 1/{clients}, one over the number of clients: it "
                "would allow to publish one of them outright"
            )
        correlated = client.noise != "independent"
        rounds = 1 if correlated else job.training.rounds + client.spare_rounds
        rate = secret_rate(job)
        noise = client.noise_multiplier or noise_multiplier
        if noise is None:
            assert client.epsilon is not None
            noise = noise_multiplier_for(
                target_epsilon=client.epsilon, delta=client.delta, sampling_rate=rate, count=rounds
            )
        cohort = expected_size(clients, job.cohort)
        mechanism: GaussianSum | CorrelatedSum
        event: Event
        adaptive = None
        if correlated:
            mechanism, event = _correlated(job, client, noise, parameters, rng)
        else:
            mechanism, event, adaptive = _independent(client, noise, rate, cohort, parameters, rng, layers)
        limit = Limit(unit=UNIT_CLIENT, epsilon=client.epsilon, delta=client.delta)
        plan = cls(clients, cohort, rounds, noise, event, limit, mechanism, adaptive)
        Accounts(SERVER).check_affordable(JobAccount(job.hash, job.purpose, rounds, (event,), None, (limit,)))
        return plan


def secret_rate(job: Job) -> float:
    """The chance of a client to be asked, where nobody but the server can learn who was; 1.0 where nothing amplifies.

    A site's own ledger shows in which rounds it took part, to whoever audits it.
    """
    return 1.0 if job.privacy.at_sites else job.cohort.rate or 1.0


def _independent(
    client: ClientPrivacy,
    noise: float,
    rate: float,
    cohort: float,
    parameters: int,
    rng: str,
    layers: tuple[int, ...],
) -> tuple[GaussianSum, GaussianEvent, AdaptiveClip | None]:
    apart, choice = layers if client.clipping == "per-layer" else (), client.adaptive_clip
    mechanism = GaussianSum(clip_norm=client.clip_norm, noise_multiplier=noise, layers=apart)
    event = mechanism.event(sampling_rate=rate, count=1, dimension=parameters, rng=rng, unit=UNIT_CLIENT)
    if choice is None:
        return mechanism, event, None
    bit_noise = choice.bit_noise or cohort / 20
    if 2 * bit_noise <= noise:
        raise JobError(
            f"privacy.client.adaptive_clip.bit_noise: {bit_noise:g} is not more than half the noise multiplier "
            f"{noise:.4g}: counting who is below the clip norm would cost all there is to spend; raise it"
        )
    adaptive = AdaptiveClip(
        initial=client.clip_norm,
        bit_noise=bit_noise,
        quantile=choice.quantile,
        learning_rate=choice.learning_rate,
    )
    # Both releases are of one sample, so they are one Gaussian before its amplification.
    mechanism = replace(mechanism, noise_multiplier=adaptive.update_noise_multiplier(noise))
    # The bit is one coordinate more, on a grid as fine or finer.
    tv = event.discretisation_tv + discretisation_tv(adaptive.bits.scale, 1, 1)
    return mechanism, replace(event, quantile_noise=adaptive.bit_noise, discretisation_tv=tv), adaptive


def _correlated(
    job: Job, client: ClientPrivacy, noise: float, parameters: int, rng: str
) -> tuple[CorrelatedSum, CorrelatedEvent]:
    rounds, separation = job.training.rounds, job.cohort.separation
    assert separation is not None
    participation = Participation(rounds=rounds, participations=-(-rounds // separation), separation=separation)
    strategy: Banded | BufferedToeplitz
    if client.noise == "blt":
        strategy = blt_coefficients(participation)[0]
    elif client.noise == "bsr":
        strategy = Banded(tuple(bsr_coefficients(rounds, separation).tolist()))
    else:
        strategy = Banded(tuple(banded_coefficients(participation).tolist()))
    mechanism = CorrelatedSum(
        clip_norm=client.clip_norm,
        noise_multiplier=noise,
        strategy=strategy,
        participation=participation,
        dimension=parameters,
    )
    event = CorrelatedEvent(
        noise_multiplier=noise * rounded_sensitivity(strategy, participation, dimension=parameters),
        clip_norm=client.clip_norm,
        coefficients=strategy.band if isinstance(strategy, Banded) else (),
        weights=strategy.weights if isinstance(strategy, BufferedToeplitz) else (),
        decays=strategy.decays if isinstance(strategy, BufferedToeplitz) else (),
        rounds=rounds,
        participations=participation.participations,
        separation=separation,
        dimension=parameters,
        rng=rng,
        discretisation_tv=mechanism.discretisation_tv,
    )
    return mechanism, event


class GridTotal(Total):
    """A total in whole grid steps: each contribution is clipped here whatever its client did, if it is seen here."""

    def __init__(self, layout: Layout, mechanism: GaussianSum | CorrelatedSum) -> None:
        super().__init__(layout)
        self._mechanism = mechanism
        self.steps = np.zeros(layout.parameters, dtype=np.int64)
        self.bits = np.zeros(1, dtype=np.int64)

    def add(self, contribution: Vector) -> None:
        row = contribution[: self.layout.parameters][None]
        mechanism = self._mechanism
        self.steps += mechanism.quantised(row) if isinstance(mechanism, CorrelatedSum) else mechanism.quantised_sum(row)
        if BELOW_CLIP in self.layout.metrics:
            at = self.layout.parameters + 1 + self.layout.metrics.index(BELOW_CLIP)
            within = np.where(contribution[at : at + 1] > 0, np.float32(0.5), np.float32(-0.5))
            self.bits += _BIT_GRID.quantised_sum(within[None])

    def add_sum(self, contributions: NDArray[np.float64]) -> None:
        """Add a secure sum, whose update is in grid steps already: each client clipped its own."""
        self.steps += np.rint(contributions[: self.layout.parameters]).astype(np.int64)
        if BELOW_CLIP in self.layout.metrics:
            halves = 2 * contributions[self.layout.parameters + 1 + self.layout.metrics.index(BELOW_CLIP)]
            self.bits += round(halves) * _BIT_GRID.quantised_sum(np.full((1, 1), 0.5, np.float32))

    def add_total(self, other: Total) -> None:
        assert isinstance(other, GridTotal)
        self.steps += other.steps
        self.bits += other.bits


_BIT_GRID = GaussianSum(clip_norm=0.5, noise_multiplier=1.0)  # Its grid is that of any `AdaptiveClip.bits`.


class CentralRelease:
    """The server's noise for whole clients, and the ledger that it is charged to."""

    def __init__(
        self,
        plan: ReleasePlan,
        *,
        job: Job,
        layout: Layout,
        budget: SiteBudget,
        noise: Callable[[int], NoiseSource],
        asked_before: Iterable[Sequence[str]] = (),
    ) -> None:
        """`noise` makes the source of one round; `asked_before` are the cohorts of the rounds that are done already."""
        self._plan, self._job, self._layout, self._budget, self._noise = plan, job, layout, budget, noise
        self._reservation: Entry | None = None
        self._mechanism = plan.mechanism
        self._counter: ParticipationCounter | None = None
        if isinstance(plan.mechanism, CorrelatedSum):
            self._counter = ParticipationCounter(plan.mechanism.participation)
            for number, asked in enumerate(asked_before, start=1):
                self._admit(number, asked)

    def open(self, *, simulation: bool) -> None:
        """Open the ledger and admit the job. Raises `BudgetExceeded`."""
        self._budget.open(rows=self._plan.clients, simulation=simulation, dataset="clients")
        self._budget.plan(
            job=self._job.hash,
            events=[self._plan.event],
            rounds=self._plan.rounds,
            limits=[self._plan.limit],
            purpose=self._job.purpose,
        )

    def settle(self) -> None:
        """The job is over: what was planned and not reserved is free again."""
        self._budget.settle(self._job.hash)

    def accounts(self) -> Accounts:
        """What the ledger adds up to now."""
        return self._budget.accounts()

    def epsilon(self) -> float:
        """What all reservations so far cost a client."""
        return self.accounts().epsilon(UNIT_CLIENT, self._plan.limit.delta, spent_only=True)

    @property
    def head(self) -> Head | None:
        return self._budget.ledger.head

    def _admit(self, number: int, asked: Sequence[str]) -> None:
        if self._counter is not None:
            for client in asked:
                self._counter.admit(client, number)

    def reserve(self, state: ServerState, asked: Sequence[str], witness: str | None) -> float:
        """See `Release`.

        Raises `BudgetExceeded` when the plan is used up, and `UnsupportedEvent` when a client is asked more often than
        correlated noise was scaled for.
        """
        number, mechanism = state.round_number + 1, self._plan.mechanism
        self._admit(number, asked)
        if isinstance(mechanism, CorrelatedSum):
            self._reservation = self._whole_training(number, state.model, witness)
            return mechanism.clip_norm
        clip_norm = float(state.release["clip_norm"][0]) if "clip_norm" in state.release else mechanism.clip_norm
        self._mechanism = replace(mechanism, clip_norm=clip_norm)
        self._reservation = self._budget.reserve(
            job=self._job.hash,
            round_number=number,
            model=vector_hash(state.model),
            witness=witness,
            clip_norm=clip_norm if self._plan.adaptive else None,
        )
        return clip_norm

    def _whole_training(self, number: int, model: Vector, witness: str | None) -> Entry:
        mine = [e for e in self._budget.ledger.entries if e.body.get("job") == self._job.hash]
        reserved = [entry for entry in mine if entry.kind == "reserve"]
        if any(entry.kind == "commit" and entry.body["round"] >= number for entry in mine):
            raise JobError(
                f"round {number} was released before, and its noise is gone with the crash: correlated noise cannot "
                'take a round twice; start a new run, or use privacy.client.noise = "independent"'
            )
        if reserved:
            return reserved[0]
        return self._budget.reserve(job=self._job.hash, round_number=number, model=vector_hash(model), witness=witness)

    def total(self) -> Total:
        return GridTotal(self._layout, self._mechanism)

    def release(self, state: ServerState, total: Total) -> tuple[ServerState, Total]:
        assert isinstance(total, GridTotal)
        assert self._reservation is not None
        number, mechanism = state.round_number + 1, self._mechanism
        source = self._noise(number)
        if isinstance(mechanism, CorrelatedSum):
            before = CorrelatedState(number, state.release["kept"]) if state.release else mechanism.start()
            update, after = mechanism.release(before, total.steps, source)
            memory = {"kept": after.kept}
        else:
            update = mechanism.release(total.steps, source)
            memory = {}
            if (adaptive := self._plan.adaptive) is not None:
                noisy = float(adaptive.bits.release(total.bits, source)[0])
                memory = {"clip_norm": np.array([adaptive.step(mechanism.clip_norm, noisy, cohort=self._plan.cohort)])}
        self._budget.commit(self._reservation, output=vector_hash(update.astype(np.float32)), round_number=number)
        return replace(state, release=memory), Total.of(self._layout, update, self._plan.cohort)

"""A job's plan: what it would release and cost, at the sites and at the server, before anything is spent.

Neither torch nor pandas is loaded where the job itself says how many rows its sites have. Of the records, only how many
there are is looked at, which is public (docs/decisions/004-row-counts-are-public.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

from privacy.accountant import (
    COARSE,
    WHOLE_ORDERS,
    Epsilon,
    bounds,
    epsilon_pld,
    noise_multiplier_for,
    rdp_at,
    rdp_to_epsilon,
)
from privacy.correlated import CorrelatedSum, prefix_sum_rmse
from privacy.errors import DataError, UnsupportedEvent
from privacy.events import (
    LEAST_NOISE,
    MOST_NOISE,
    UNIT_CLIENT,
    UNIT_RECORD,
    CorrelatedEvent,
    DistributedEvent,
    Event,
    GaussianEvent,
    repeated,
)
from privacy.mechanism import GaussianSum
from privacy.pld import pld_epsilon
from privacy.prv import Bounds
from server.cohort import expected_size
from server.release import ReleasePlan, secret_rate
from simulations.secure_sums import planned
from strategies import evaluation
from strategies.catalogue import strategy_for
from strategies.job import Job
from strategies.job_privacy import Protection
from strategies.job_task import TaskChoice
from strategies.robust import check_robust
from strategies.secure import SecureSum
from strategies.statistics import TASK, blocks_of, size_of
from strategies.total import layout_for

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
MOST_SETTINGS = 6  # Sites of very many sizes may each need their own noise, and a search for it.


def training_rows(job: Job) -> dict[str, int]:
    """Count each site's training rows, in the order of names: from the job where it says, else by reading the data.

    Raises `DataError` for a site that cannot train, and what reading raises.
    """
    how = job.simulation.partition
    if how is None or how.mix is None or job.evaluation is not None:
        from simulations.federation import load_sites

        return {name: len(site.train) for name, site in load_sites(job).items()}
    rows = {name: mix.rows - math.ceil(job.data.test_fraction * mix.rows) for name, mix in sorted(how.mix.items())}
    for name in (name for name, left in rows.items() if left < 1):
        raise DataError(
            f"site {name}: {how.mix[name].rows} rows leave none to train on at data.test_fraction = "
            f"{job.data.test_fraction:g}"
        )
    return rows


def parameter_count(job: Job) -> int:
    """Count the trainable parameters of the job's model; of most tasks, by building it."""
    if job.evaluation is not None:
        return evaluation.size_of(job)
    if job.task.name == TASK:
        return size_of(blocks_of(job.data, job.task))
    columns = job.data.columns.values()
    simple = all(column.type in ("number", "category") for column in columns)
    if simple and job.task.name == TaskChoice().name and job.task.model in ("logistic-regression", "mlp"):
        # From the declared columns: `client.data`, which names the features, would load pandas.
        features = sum(1 if column.type == "number" else len(column.values or []) - 1 for column in columns)
        classes = len(job.data.classes or (0, 1))
        hidden = job.task.hidden if job.task.model == "mlp" else []
        return sum((a + 1) * b for a, b in pairwise([features, *hidden, 1 if classes == 2 else classes]))
    from client.data import class_count
    from client.reading import feature_count
    from client.tasks import initial_model, task_for

    model = initial_model(task_for(job), features=feature_count(job), classes=class_count(job.data), seed=job.seed)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One noise that protects one unit of privacy, added at the sites `who` or at the server.

    `units` are the rows of the smallest and the largest of these sites, or the clients as both. A sum holds a `share`
    of them, and `secret` says whether nobody sees which. `each` is what one of the planned `rounds` releases.
    `noise_in_sum` is the noise's standard deviation on a coordinate of the sum, in clip norms; of correlated noise,
    what independent noise would need for sums over rounds that are as accurate; of noise in shares, with all of them:
    they are sized for the fewest honest survivors, whose noise alone is charged.
    """

    own: Protection
    unit: str
    placement: str
    who: tuple[str, ...]
    units: tuple[int, int]
    share: float
    secret: bool
    rounds: int
    each: Event
    noise_multiplier: float
    noise_in_sum: float

    @cached_property
    def event(self) -> Event:
        """What all planned rounds release."""
        (event,) = repeated(self.each, self.rounds)
        return event

    @cached_property
    def cost(self) -> Epsilon:
        """By each method. `rdp` is of whole orders alone: some per cent looser, and no library to load for it."""
        events, delta = [self.event], self.own.delta
        try:
            pld = epsilon_pld(events, delta)
        except UnsupportedEvent as error:
            raise UnsupportedEvent(
                f"privacy.{self.unit}: no epsilon can be stated for {self.rounds} rounds ({error}); raise the noise"
            ) from None
        rdp = min(rdp_to_epsilon(order, rdp_at(events, order), delta) for order in WHOLE_ORDERS)
        exact = self.rate == 1 and not isinstance(self.each, DistributedEvent)
        return Epsilon(delta, pld, rdp, pld if exact else None)

    @cached_property
    def within(self) -> Bounds | None:
        return bounds([self.event], self.own.delta)

    @property
    def rate(self) -> float:
        """The sampling rate that is charged: 1 where others can see who takes part."""
        return self.each.sampling_rate if isinstance(self.each, GaussianEvent) else 1.0

    @property
    def size(self) -> float:
        """The expected number of units in a sum, at the smallest site."""
        return self.share * self.units[0]

    @property
    def noise_in_mean(self) -> float:
        """The noise on a coordinate of a mean over `size` units, in clip norms."""
        return self.noise_in_sum / self.size

    @property
    def one_release(self) -> float:
        """The noise multiplier at which one release of everyone costs as much as the whole plan, or 0.01 if more."""
        target = max(self.cost.pld, 0.01)
        return noise_multiplier_for(target_epsilon=target, delta=self.own.delta, sampling_rate=1.0, count=1)

    def roughly(self, *, noise: float | None = None, rate: float | None = None, rounds: int | None = None) -> float:
        """What the plan would cost with other values: an upper bound to three digits, in a fifth of the usual time.

        Shares keep their grid; at another `rate` as much noise is charged as if the server added it.
        """
        if isinstance(self.each, DistributedEvent) and rate is None:
            wider = self.each.local_scale * (noise or self.noise_multiplier) / self.noise_multiplier
            (shares,) = repeated(replace(self.each, local_scale=wider), rounds or self.rounds)
            return epsilon_pld([shares], self.own.delta)
        noise, rate = noise or self.noise_multiplier, rate or self.rate
        count = self.event.count // self.rounds * (rounds or self.rounds)
        found = pld_epsilon((((noise, rate), count),), self.own.delta, grid=COARSE) if rate < 1 else math.inf
        if math.isfinite(found):
            return found
        event = GaussianEvent(noise_multiplier=noise, clip_norm=1.0, sampling_rate=rate, count=count, rng="os")
        return epsilon_pld([event], self.own.delta)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One `value` changed, the others held: what all rounds would cost, and the noise in the mean (L2, clip norms)."""

    value: float
    epsilon: float
    noise_l2: float
    planned: bool


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What a job would release and what that costs.

    Sites that train with the same noise are one setting, those with the fewest rows first. Of more than six, six are
    kept and `left_out` counts the others, which lie between. `secure` are the figures of its secure sums, if any.
    """

    job: Job
    rows: dict[str, int]
    parameters: int
    settings: tuple[Setting, ...]
    left_out: int
    secure: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, job: Job) -> JobPlan:
        """Plan `job`. Raises what reading its data raises, `UnsupportedEvent` for noise that no figure bounds, and
        `JobError` for a secure sum or a robust reduction that cannot be.

        A job that will be refused for its delta or its budget is planned nevertheless: see `simulations.cautions`.
        """
        rows, parameters = training_rows(job), parameter_count(job)
        groups = _groups(job, rows)
        last = len(groups) - 1
        kept = groups
        if len(groups) > MOST_SETTINGS:
            kept = [groups[round(i * last / (MOST_SETTINGS - 1))] for i in range(MOST_SETTINGS)]
        layout = layout_for(job, parameters, strategy_for(job).traits)
        check_robust(job, sites=len(rows), layout=layout)
        sums = (
            None
            if job.secure_aggregation is None
            else SecureSum.make(job, sites=len(rows), layout=layout, most_rows=max(rows.values()))
        )
        settings = [_record(job, rows, sites, parameters) for sites in kept]
        settings += [_local(job, rows, parameters)] if job.privacy.local is not None else []
        settings += [_central(job, len(rows), parameters)] if job.privacy.central is not None else []
        settings += [_distributed(job, rows, sums)] if job.privacy.distributed is not None and sums is not None else []
        return cls(
            job=job,
            rows=rows,
            parameters=parameters,
            settings=tuple(settings),
            left_out=len(groups) - len(kept),
            secure=None if sums is None else planned(job, sums, list(rows)),
        )

    def noise_l2(self, setting: Setting) -> float:
        """The noise in the mean over `setting.size` units, in clip norms."""
        return setting.noise_in_mean * math.sqrt(self.parameters)

    @cached_property
    def tables(self) -> dict[str, dict[str, list[Variant]]]:
        """By unit of privacy and by what is varied; where sites differ, for those with the fewest rows."""
        first = {setting.unit: setting for setting in reversed(self.settings)}
        return {
            unit: {knob: _distinct(variants) for knob, variants in _variants(first[unit], self.noise_l2(first[unit]))}
            for unit in sorted(first, reverse=True)
        }


def independent_rmse(rounds: int) -> float:
    """The error of prefix sums at noise 1 on each round's sum: the t-th holds t of them (see `prefix_sum_rmse`)."""
    return math.sqrt((rounds + 1) / 2)


def _groups(job: Job, rows: Mapping[str, int]) -> list[list[str]]:
    groups: dict[tuple[float, int], list[str]] = {}
    for name in sorted(rows, key=lambda name: rows[name]) if job.privacy.record is not None else []:
        groups.setdefault((job.training.rate_for(rows[name]), job.training.steps_for(rows[name])), []).append(name)
    return list(groups.values())


def _record(job: Job, rows: Mapping[str, int], sites: Sequence[str], parameters: int) -> Setting:
    # As `client.site.SitePlan` does, which would load torch.
    record, fewest = job.privacy.record, rows[sites[0]]
    assert record is not None
    rate, steps, rounds = job.training.rate_for(fewest), job.training.steps_for(fewest), _site_rounds(job)
    noise = _calibrated(record, rate, steps * rounds)
    mechanism = GaussianSum(clip_norm=record.clip_norm, noise_multiplier=noise)
    return Setting(
        own=record,
        unit=UNIT_RECORD,
        placement="site",
        who=tuple(sites),
        units=(fewest, rows[sites[-1]]),
        share=rate,
        secret=True,
        rounds=rounds,
        each=mechanism.event(sampling_rate=rate, count=steps, dimension=parameters, rng="os"),
        noise_multiplier=noise,
        noise_in_sum=noise,
    )


def _local(job: Job, rows: Mapping[str, int], parameters: int) -> Setting:
    client, clients, rounds = job.privacy.local, len(rows), _site_rounds(job)
    assert client is not None
    noise, cohort = _calibrated(client, 1.0, rounds), expected_size(clients, job.cohort)
    mechanism = GaussianSum(clip_norm=client.clip_norm, noise_multiplier=noise)
    return Setting(
        own=client,
        unit=UNIT_CLIENT,
        placement="local",
        who=tuple(rows),
        units=(clients, clients),
        share=cohort / clients,
        secret=False,
        rounds=rounds,
        each=mechanism.event(sampling_rate=1.0, count=1, dimension=parameters, rng="os", unit=UNIT_CLIENT),
        noise_multiplier=noise,
        noise_in_sum=noise * math.sqrt(cohort),  # Each client of a cohort adds its own.
    )


def _central(job: Job, clients: int, parameters: int) -> Setting:
    client = job.privacy.central
    assert client is not None
    rounds = 1 if client.noise != "independent" else job.training.rounds + client.spare_rounds
    noise = _calibrated(client, secret_rate(job), rounds)
    # The noise given, and no limit: what a job is refused for should not keep its cost from being shown.
    free = client.model_copy(
        update={"epsilon": None, "noise_multiplier": noise, "delta": min(client.delta, 0.5 / clients)}
    )
    unlimited = job.model_copy(update={"privacy": job.privacy.model_copy(update={"client": free})})
    release = ReleasePlan.make(unlimited, clients=clients, parameters=parameters, rng="os")
    if isinstance(release.mechanism, CorrelatedSum):
        participation, strategy = release.mechanism.participation, release.mechanism.strategy
        error = prefix_sum_rmse(strategy.coefficients(participation.rounds), participation)
        in_sum = noise * error / independent_rmse(participation.rounds)
    else:
        in_sum = release.mechanism.noise_multiplier
    return Setting(
        own=client,
        unit=UNIT_CLIENT,
        placement="central",
        who=("the server",),
        units=(clients, clients),
        share=release.cohort / clients,
        secret=secret_rate(job) < 1,
        rounds=release.rounds,
        each=release.event,
        noise_multiplier=noise,
        noise_in_sum=in_sum,
    )


def _distributed(job: Job, rows: Mapping[str, int], sums: SecureSum) -> Setting:
    client, clients, most = job.privacy.distributed, len(rows), sums.fixed.clients
    assert client is not None
    assert sums.distributed is not None
    noise = sums.distributed.noise
    return Setting(
        own=client,
        unit=UNIT_CLIENT,
        placement="distributed",
        who=tuple(rows),
        units=(clients, clients),
        share=most / clients,
        secret=False,
        rounds=_site_rounds(job),
        each=sums.distributed.event(count=1, rng="os"),
        noise_multiplier=noise.noise_multiplier,
        noise_in_sum=math.sqrt(most) * noise.local_scale / noise.clip_norm,
    )


def _site_rounds(job: Job) -> int:
    return job.training.rounds + max(own.spare_rounds for own in job.privacy.at_sites)


def _calibrated(own: Protection, rate: float, count: int) -> float:
    if own.noise_multiplier is not None:
        return own.noise_multiplier
    assert own.epsilon is not None
    return noise_multiplier_for(target_epsilon=own.epsilon, delta=own.delta, sampling_rate=rate, count=count)


def _variants(setting: Setting, l2: float) -> Iterator[tuple[str, list[Variant]]]:
    def at(factor: float, value: float, l2: float, cost: Callable[[], float]) -> list[Variant]:
        """The variant, or nothing where no epsilon can be stated for it."""
        planned = factor == 1
        try:
            epsilon = setting.cost.pld if planned else cost()
        except UnsupportedEvent:
            return []
        return [Variant(value=value, epsilon=epsilon, noise_l2=l2, planned=planned)]

    noises = [(factor, setting.noise_multiplier * factor) for factor in FACTORS]
    yield (
        "noise_multiplier",
        [
            variant
            for factor, noise in noises
            if LEAST_NOISE <= noise <= MOST_NOISE
            for variant in at(factor, noise, l2 * factor, partial(setting.roughly, noise=noise))
        ],
    )
    if isinstance(setting.each, CorrelatedEvent):
        return  # Nothing else moves its epsilon, and each other length or cohort would need a matrix of its own.
    rounds = [(factor, max(1, round(setting.rounds * factor))) for factor in FACTORS]
    yield (
        "rounds",
        [
            variant
            for factor, number in rounds
            for variant in at(factor, number, l2, partial(setting.roughly, rounds=number))
        ],
    )
    if isinstance(setting.each, DistributedEvent):
        return  # Who takes part is seen, and each other cohort would need a grid and a graph of its own.
    # A mean of noises that each client adds on its own shrinks with the root of the cohort alone.
    power = 0.5 if setting.placement == "local" else 1.0
    shares = [(factor, min(1.0, setting.share * factor)) for factor in FACTORS]
    yield (
        "batch" if setting.unit == UNIT_RECORD else "cohort",
        [
            variant
            for factor, share in shares
            for variant in at(
                factor,
                share * setting.units[0],
                l2 * (setting.share / share) ** power,
                partial(setting.roughly, rate=share if setting.secret else setting.rate),
            )
        ],
    )


def _distinct(variants: Sequence[Variant]) -> list[Variant]:
    """What was cut off at a limit comes once, and as the plan where the plan is at the limit."""
    by_value: dict[float, Variant] = {}
    for variant in variants:
        if variant.planned or variant.value not in by_value:
            by_value[variant.value] = variant
    return list(by_value.values())

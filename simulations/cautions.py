"""What is wrong with a job's plan: each finding with the number that says so and with what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from privacy.budget import Accounts, JobAccount, Limit
from privacy.correlated import Participation, banded_coefficients, bsr_coefficients, prefix_sum_rmse
from privacy.errors import BudgetExceeded
from privacy.events import UNIT_CLIENT, UNIT_RECORD, CorrelatedEvent
from simulations.planning import JobPlan, Setting, independent_rmse

LARGE_EPSILON = 10.0
BETTER = 1.2  # By which correlated noise must win before it is worth a word.
RARELY = 0.01  # Steps with an empty batch.
MOST_SEARCHED = 2000  # Rounds up to which the best band is searched for, which takes a fifth of a second.


@dataclass(frozen=True, kw_only=True)
class Caution:
    """`value` says that something is wrong, as it crossed `limit`; `text` says what it is and what to do.

    | `code`             | what crossed what                                                                    |
    |--------------------|--------------------------------------------------------------------------------------|
    | `over_budget`      | the plan's epsilon, the job's: the job will be refused                               |
    | `delta_refused`    | delta, one over the units: the job will be refused                                   |
    | `delta_large`      | delta, a tenth of one over the units                                                 |
    | `epsilon_large`    | epsilon, 10                                                                          |
    | `cohort_too_small` | the noise in a round's mean (L2, clip norms), 1: the longest update                  |
    | `no_amplification` | epsilon, what the same cohort drawn in secret would cost; of noise in shares, with   |
    |                    | as much noise added by a server that is trusted                                      |
    | `correlated_better`| by how much less correlated noise would disturb the model at this epsilon, 1.2       |
    | `few_rows`         | the fewest rows, those at which one mean for all of epsilon has noise of a clip norm |
    | `batches_empty`    | the share of steps whose batch is empty, 1 %                                         |
    | `batch_over_rows`  | the fewest rows, the batch size                                                      |
    """

    code: str
    unit: str
    value: float
    limit: float
    text: str


def cautions(plan: JobPlan) -> list[Caution]:
    """Look for everything in the table of `Caution`, what the job would be refused for first."""
    checks = (_on_budget, _on_delta, _on_epsilon, _on_cohort, _on_amplification, _on_correlation, _on_rows)
    return [caution for check in checks for setting in plan.settings for caution in check(plan, setting)]


def named(setting: Setting) -> str:
    """Where a setting is, in a few words."""
    who = setting.who
    return ", ".join(who) if len(who) <= 2 else f"{len(who)} sites ({who[0]}, ...)"


def _on_budget(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    own, job = setting.own, plan.job
    if own.epsilon is None:
        return
    limit = Limit(unit=setting.unit, epsilon=own.epsilon, delta=own.delta)
    account = JobAccount(job.hash, job.purpose, setting.rounds, (setting.each,), None, (limit,))
    try:
        Accounts(named(setting)).check_affordable(account)
    except BudgetExceeded as error:
        yield Caution(
            code="over_budget",
            unit=setting.unit,
            value=setting.cost.pld,
            limit=own.epsilon,
            text=f"the job will be refused: {error}",
        )


def _on_delta(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    delta, units = setting.own.delta, setting.units[0]
    of = "training rows of its smallest site" if setting.unit == UNIT_RECORD else "clients"
    stated, advice = f"privacy.{setting.unit}.delta is {delta:g}", f"take {0.1 / units:.1g} or less"
    if delta >= 1 / units and setting.placement in ("site", "central"):
        yield Caution(
            code="delta_refused",
            unit=setting.unit,
            value=delta,
            limit=1 / units,
            text=f"the job will be refused: {stated}, not below 1/{units}, one over the {of}; {advice}",
        )
    elif delta > 0.1 / units:
        yield Caution(
            code="delta_large",
            unit=setting.unit,
            value=delta,
            limit=0.1 / units,
            text=f"{stated}, more than a tenth of 1/{units}, one over the {of}: such a delta allows to publish one "
            f"{setting.unit} now and then; {advice}",
        )


def _on_epsilon(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    cost = setting.cost.pld
    if cost > LARGE_EPSILON:
        yield Caution(
            code="epsilon_large",
            unit=setting.unit,
            value=cost,
            limit=LARGE_EPSILON,
            text=f"{named(setting)}: epsilon {cost:.4g} is above {LARGE_EPSILON:g} and says little: beliefs about "
            f"one {setting.unit} may change by a factor of e^{cost:.0f}; raise the noise or lower the rounds",
        )


def _on_cohort(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    l2 = plan.noise_l2(setting)
    if setting.unit == UNIT_CLIENT and l2 > 1:
        needed = math.ceil(setting.size * l2 ** (2 if setting.placement == "local" else 1))
        yield Caution(
            code="cohort_too_small",
            unit=setting.unit,
            value=l2,
            limit=1.0,
            text=f"a mean of {setting.size:.4g} clients carries noise of {l2:.3g} clip norms, and no update is longer "
            f"than 1: more noise than signal; ask {needed} clients a round at this noise, or train fewer parameters",
        )


def _on_amplification(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    clients = setting.units[0]
    if setting.unit != UNIT_CLIENT or setting.secret or isinstance(setting.each, CorrelatedEvent) or clients == 1:
        return
    rate, how = setting.share if setting.share < 1 else 0.5, "cohort.rate"
    why = f"the draw of {setting.size:g} of {clients} clients is public" if setting.share < 1 else "everyone is asked"
    if plan.job.privacy.record is not None and plan.job.cohort.rate is not None:
        why, how = "the sites' ledgers show who took part", "without privacy.record, cohort.rate"
    if setting.placement == "local":
        why, how = "the server sees who takes part", 'placement = "central" with cohort.rate'
    if setting.placement == "distributed":
        why, how = (
            "the sites of a secure sum see each other",
            'placement = "central" (a trusted server) with cohort.rate',
        )
    sampled = setting.roughly(rate=rate)
    yield Caution(
        code="no_amplification",
        unit=setting.unit,
        value=setting.cost.pld,
        limit=sampled,
        text=f"{why}, so each client is charged for every round, epsilon {setting.cost.pld:.4g}; {how} = {rate:.4g} "
        f"({rate * clients:.4g} clients a round, in secret) would cost {sampled:.4g} at this noise",
    )


def _on_correlation(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    client, clients, rounds = plan.job.privacy.central, setting.units[0], plan.job.training.rounds
    separation = min(int(clients / setting.size), rounds)
    if setting.unit != UNIT_CLIENT or client is None or client.noise != "independent" or separation < 2:
        return
    spaced = Participation(rounds=rounds, participations=-(-rounds // separation), separation=separation)
    band = banded_coefficients(spaced) if rounds <= MOST_SEARCHED else bsr_coefficients(rounds, separation)
    correlated = setting.one_release * prefix_sum_rmse(band, spaced) / (clients / separation)
    gain = setting.noise_in_mean * independent_rmse(rounds) / correlated
    if gain > BETTER:
        yield Caution(
            code="correlated_better",
            unit=setting.unit,
            value=gain,
            limit=BETTER,
            text=f"correlated noise would disturb the model {gain:.1f} times less at the same epsilon, a client coming "
            f'back after {separation} rounds: set privacy.client.noise = "banded" and cohort.separation = {separation} '
            "without cohort.size, cohort.rate and adaptive_clip",
        )


def _on_rows(plan: JobPlan, setting: Setting) -> Iterator[Caution]:
    if setting.unit != UNIT_RECORD:
        return
    rows, at, batch_size = setting.units[0], named(setting), plan.job.training.batch_size
    enough = setting.one_release * math.sqrt(plan.parameters)
    if rows < enough:
        few = sum(plan.rows[name] < enough for name in setting.who)
        yield Caution(
            code="few_rows",
            unit=setting.unit,
            value=rows,
            limit=enough,
            text=f"{at}: {few} with fewer than {math.ceil(enough)} training rows, the fewest {rows}: even one mean of "
            f"all of them for all of epsilon {setting.cost.pld:.3g} would carry more noise than signal; pool sites, "
            "train fewer parameters, or protect clients in place of records",
        )
    empty = (1 - setting.share) ** rows
    if empty > RARELY:
        yield Caution(
            code="batches_empty",
            unit=setting.unit,
            value=empty,
            limit=RARELY,
            text=f"{at}: {rows} rows at a sampling rate of {setting.share:.3g} are an expected batch of "
            f"{setting.size:.2g}, and {empty:.0%} of the steps have none, noise alone; raise the sampling rate",
        )
    if batch_size is not None and batch_size > rows:
        yield Caution(
            code="batch_over_rows",
            unit=setting.unit,
            value=rows,
            limit=batch_size,
            text=f"{at}: training.batch_size is {batch_size}, more than {rows} rows: every record is in every step and "
            "sampling amplifies nothing; lower it",
        )

"""A site never spends more than it set aside: not after a crash, not in a race, not for a second job."""

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import privacy
from privacy.accountant import epsilon_pld, rdp_at, rdp_to_epsilon
from privacy.budget import Accounts, Filter, JobAccount, LedgerAccounts, Limit, SiteBudget, charged
from privacy.errors import BudgetExceeded, FedchorusError, LedgerError, UnsupportedEvent
from privacy.events import (
    UNIT_CLIENT,
    UNIT_RECORD,
    UNITS,
    CorrelatedEvent,
    DistributedEvent,
    Event,
    GaussianEvent,
    repeated,
)
from privacy.keys import IdentityKey
from privacy.ledger import Entry, Ledger, read_ledger

SITE, DELTA = "city-hospital", 1e-5
JOB, OTHER_JOB, MODEL, OTHER_MODEL, OUTPUT = "a" * 64, "b" * 64, "1" * 64, "2" * 64, "3" * 64


def gaussian(noise: float, rate: float = 1.0, count: int = 1, *, unit: str = UNIT_RECORD) -> GaussianEvent:
    return GaussianEvent(unit=unit, noise_multiplier=noise, clip_norm=1.0, sampling_rate=rate, count=count, rng="os")


EVENT, COSTLIER, CLIENT = gaussian(20.0, count=4), gaussian(10.0, count=4), gaussian(10.0, unit=UNIT_CLIENT)
CORRELATED = CorrelatedEvent(
    noise_multiplier=4.0,
    clip_norm=1.0,
    coefficients=(1.0, 0.5),
    rounds=3,
    participations=1,
    separation=3,
    dimension=10,
    rng="os",
)
SECURE = DistributedEvent(
    mechanism="discrete_gaussian",
    clients=14,
    dimension=4096,
    clip_norm=1.0,
    granularity=0.001,
    local_scale=3.0,
    beta=0.5,
    count=1,
    rng="os",
)


class Holder:
    """A data holder's folder. Each `start` is a fresh process, as far as the site's files can tell."""

    def __init__(self, folder: Path) -> None:
        self.path, self.key_file = folder / "ledger.jsonl", folder / "identity.pem"
        self.key = IdentityKey.create(self.key_file)

    def start(self) -> SiteBudget:
        budget = SiteBudget(Ledger(self.path, SITE, self.key))
        budget.open(rows=100, simulation=False)
        return budget

    @property
    def kinds(self) -> list[str]:
        return [entry.kind for entry in read_ledger(self.path, SITE, self.key.public_hex)]


@pytest.fixture
def holder(tmp_path: Path) -> Holder:
    return Holder(tmp_path)


def plan(
    budget: SiteBudget,
    *,
    job: str = JOB,
    events: Sequence[Event] = (EVENT,),
    rounds: int = 3,
    epsilon: float | None = None,
    delta: float = DELTA,
    purpose: str = "training",
) -> None:
    limits = [Limit(unit=unit, epsilon=epsilon, delta=delta) for unit in UNITS if unit in {e.unit for e in events}]
    budget.plan(job=job, events=events, rounds=rounds, limits=limits, purpose=purpose)


def allow(budget: SiteBudget, epsilon: float | None, *, unit: str = UNIT_RECORD, purpose: str | None = None) -> None:
    budget.set_budget(Limit(unit=unit, epsilon=epsilon, delta=DELTA), purpose=purpose)


def spend(budget: SiteBudget, round_number: int, *, job: str = JOB, output: str = OUTPUT) -> None:
    reservation = budget.reserve(job=job, round_number=round_number, model=MODEL, witness=None)
    budget.commit(reservation, output=output)


class TestOpening:
    def test_writes_who_holds_the_ledger_and_how_many_rows(self, holder: Holder) -> None:
        entry = holder.start().ledger.entries[0]
        assert entry.kind == "open"
        assert entry.body == {
            "public_key": holder.key.public_hex,
            "rows": 100,
            "simulation": False,
            "dataset": "records",
        }

    def test_an_opened_ledger_is_opened_once(self, holder: Holder) -> None:
        early = SiteBudget(Ledger(holder.path, SITE, holder.key))
        holder.start()
        holder.start()
        early.open(rows=100, simulation=False)
        assert holder.kinds == ["open"]

    @pytest.mark.parametrize("simulation", [False, True])
    def test_a_simulation_and_the_real_thing_never_continue_each_other(self, holder: Holder, simulation: bool) -> None:
        SiteBudget(Ledger(holder.path, SITE, holder.key)).open(rows=100, simulation=simulation)
        again = SiteBudget(Ledger(holder.path, SITE, holder.key))
        with pytest.raises(LedgerError, match="never continue each other"):
            again.open(rows=100, simulation=not simulation)
        again.open(rows=100, simulation=simulation)
        assert holder.kinds == ["open"]

    def test_a_ledger_is_one_data_set_s(self, holder: Holder) -> None:
        holder.start()
        again = SiteBudget(Ledger(holder.path, SITE, holder.key))
        with pytest.raises(LedgerError, match="it is that of data set 'records', not 'scans'"):
            again.open(rows=100, simulation=False, dataset="scans")
        assert again.accounts().dataset == "records"

    def test_a_ledger_that_begins_with_something_else_is_refused(self, holder: Holder) -> None:
        Ledger(holder.path, SITE, holder.key).append("settle", {"job": JOB, "simulation": False})
        with pytest.raises(LedgerError):
            holder.start()


class TestPlanning:
    def test_a_plan_says_everything_that_an_auditor_needs(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, epsilon=3.0)
        assert budget.ledger.entries[-1].body == {
            "job": JOB,
            "purpose": "training",
            "events": [EVENT.as_dict()],
            "rounds": 3,
            "filter": None,
            "limits": [{"unit": "record", "epsilon": 3.0, "delta": DELTA}],
        }

    def test_the_same_plan_again_changes_nothing(self, holder: Holder) -> None:
        plan(holder.start(), epsilon=3.0)
        plan(holder.start(), epsilon=3.0)
        assert holder.kinds == ["open", "plan"]

    def test_the_same_plan_again_changes_nothing_when_another_process_made_it(self, holder: Holder) -> None:
        first, second = holder.start(), holder.start()
        plan(first, epsilon=3.0)
        plan(second, epsilon=3.0)
        spend(second, 1)
        assert holder.kinds == ["open", "plan", "reserve", "commit"]

    @pytest.mark.parametrize(
        "change",
        [
            {"rounds": 4},
            {"rounds": 2},
            {"epsilon": 9.0},
            {"epsilon": None},
            {"delta": 1e-6},
            {"events": [COSTLIER]},
            {"events": [EVENT, EVENT]},
            {"purpose": "statistics"},
        ],
    )
    def test_the_same_job_is_never_planned_differently(self, holder: Holder, change: dict[str, object]) -> None:
        budget = holder.start()
        plan(budget, epsilon=8.0)
        with pytest.raises(LedgerError, match="planned before, differently"):
            plan(budget, **{"epsilon": 8.0, **change})  # type: ignore[arg-type]
        assert holder.kinds == ["open", "plan"]

    def test_a_plan_just_within_the_budget_is_admitted_and_one_just_over_it_refused(self, holder: Holder) -> None:
        budget, cost = holder.start(), epsilon_pld([EVENT] * 3, DELTA)
        with pytest.raises(BudgetExceeded):
            plan(budget, epsilon=cost * (1 - 1e-9))
        assert holder.kinds == ["open"]
        plan(budget, epsilon=cost)
        assert holder.kinds == ["open", "plan"]

    @pytest.mark.parametrize("limit", [0.7, 1.0, 2.0])
    def test_a_plan_over_the_budget_is_refused_with_the_largest_number_of_rounds_that_fits(
        self, holder: Holder, limit: float
    ) -> None:
        budget = holder.start()
        with pytest.raises(BudgetExceeded, match=rf"^{SITE}: 50 rounds would") as caught:
            plan(budget, rounds=50, epsilon=limit)
        fits = int(str(caught.value).partition("at most ")[2].partition(" rounds fit")[0])
        assert 0 < fits < 50
        assert f"lower training.rounds to {fits}" in str(caught.value)
        assert epsilon_pld([EVENT] * fits, DELTA) <= limit < epsilon_pld([EVENT] * (fits + 1), DELTA)
        with pytest.raises(BudgetExceeded):
            plan(budget, rounds=fits + 1, epsilon=limit)
        plan(budget, rounds=fits, epsilon=limit)
        assert holder.kinds == ["open", "plan"]

    def test_a_budget_too_small_for_one_round_says_so(self, holder: Holder) -> None:
        with pytest.raises(BudgetExceeded, match="not one round fits: raise the noise multiplier"):
            plan(holder.start(), epsilon=0.1)
        assert holder.kinds == ["open"]

    def test_without_a_limit_any_plan_with_a_stated_cost_is_admitted(self, holder: Holder) -> None:
        plan(holder.start(), rounds=10_000, epsilon=None)
        assert holder.kinds == ["open", "plan"]

    def test_without_a_limit_a_plan_whose_cost_nobody_can_state_is_refused(self, holder: Holder) -> None:
        loud = GaussianEvent(
            noise_multiplier=0.25, clip_norm=1.0, sampling_rate=1.0, count=200, rng="os", discretisation_tv=1e-28
        )
        with pytest.raises(BudgetExceeded, match="no epsilon can be stated"):
            plan(holder.start(), events=[loud], epsilon=None)
        assert holder.kinds == ["open"]

    def test_nor_is_one_that_bounds_nothing_for_the_unit_that_it_is_limited_for(self, holder: Holder) -> None:
        limits = [Limit(unit=unit, epsilon=None, delta=DELTA) for unit in UNITS]
        with pytest.raises(BudgetExceeded, match="no client-level epsilon can be stated"):
            holder.start().plan(job=JOB, events=[EVENT], rounds=1, limits=limits)
        assert holder.kinds == ["open"]

    def test_a_message_is_one_line_with_the_figures_and_the_advice(self, holder: Holder) -> None:
        with pytest.raises(BudgetExceeded) as caught:
            plan(holder.start(), rounds=50, epsilon=1.0)
        message, cost = str(caught.value), epsilon_pld([EVENT] * 50, DELTA)
        assert f"epsilon {cost:.4g} at delta 1e-05 (record level), the job's limit is 1;" in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"rounds": 0}, "rounds"),
            ({"rounds": -1}, "rounds"),
            ({"rounds": 2.0}, "rounds"),
            ({"rounds": True}, "rounds"),
            ({"events": []}, "either events or a filter, got 0 events"),
            ({"limits": []}, r"\['record'\] once, got \[\]"),
            ({"limits": [Limit(epsilon=1.0, delta=DELTA)] * 2}, "record"),
            ({"limits": [Limit(unit=UNIT_CLIENT, epsilon=1.0, delta=DELTA)]}, "record"),
            ({"events": [EVENT, CLIENT]}, "client"),
        ],
    )
    def test_a_plan_that_would_bound_nothing_is_refused_and_writes_nothing(
        self, holder: Holder, change: dict[str, Any], named: str
    ) -> None:
        asked: dict[str, Any] = {"events": [EVENT], "rounds": 1, "limits": [Limit(epsilon=1.0, delta=DELTA)]}
        with pytest.raises(UnsupportedEvent, match=f"^plan: .*{named}"):
            holder.start().plan(job=JOB, **{**asked, **change})
        assert holder.kinds == ["open"]

    def test_nor_is_such_a_plan_believed_when_the_site_signed_it_all_the_same(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        body = dict(budget.ledger.entries[-1].body)
        changes: list[dict[str, Any]] = [{"rounds": 0}, {"limits": []}, {"filter": FILTER.as_dict()}]
        for change in changes:
            with pytest.raises(UnsupportedEvent):
                JobAccount.of({**body, **change})

    @pytest.mark.parametrize(
        ("make", "named"),
        [
            (lambda: Limit(unit="user", epsilon=1.0, delta=DELTA), "unit"),
            *[(lambda delta=d: Limit(epsilon=1.0, delta=delta), "delta") for d in (0.0, 1.0, -1e-5, 2.0, math.nan)],
            *[(lambda eps=e: Limit(epsilon=eps, delta=DELTA), "epsilon") for e in (0.0, -1.0, math.inf, math.nan)],
            (lambda: Filter(unit="user", order=8, rdp=1.0), "unit"),
            *[(lambda rdp=r: Filter(order=8, rdp=rdp), "rdp") for r in (0.0, -1.0, math.inf, math.nan)],
            *[(lambda order=o: Filter(order=order, rdp=1.0), "order") for o in (1, 0, -8, 2**17, 2.0, 2.5, True)],
            *[(lambda noise=z: gaussian(noise), "noise_multiplier") for z in (-1.0, 0.0, math.nan, math.inf)],
        ],
    )
    def test_a_limit_or_a_filter_that_means_nothing_cannot_be_made(
        self, make: Callable[[], object], named: str
    ) -> None:
        with pytest.raises(UnsupportedEvent, match=f"{named} must be|{named} must lie"):
            make()


class TestSpending:
    def test_a_round_is_charged_before_anything_else_happens(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        reservation = budget.reserve(job=JOB, round_number=7, model=MODEL, witness="4" * 64)
        assert reservation == read_ledger(holder.path, SITE, holder.key.public_hex)[-1]
        assert reservation.body == {
            "job": JOB,
            "round": 7,
            "model": MODEL,
            "witness": "4" * 64,
            "events": [EVENT.as_dict()],
        }
        assert charged(budget.ledger.entries) == [EVENT]

    def test_a_commit_closes_its_reservation_and_says_what_left(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        reservation = budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        head = budget.commit(reservation, output=OUTPUT)
        entry = read_ledger(holder.path, SITE, holder.key.public_hex)[-1]
        assert entry.head == head == budget.ledger.head
        assert entry.body == {"job": JOB, "round": 1, "reserve": reservation.seq, "output": OUTPUT}
        assert charged(budget.ledger.entries) == [EVENT]

    def test_the_round_beyond_the_plan_is_refused_and_writes_nothing(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, rounds=2)
        spend(budget, 1)
        spend(budget, 2)
        before = holder.path.read_bytes()
        with pytest.raises(BudgetExceeded, match="round 3 reserves more than the plan's 2 rounds"):
            budget.reserve(job=JOB, round_number=3, model=MODEL, witness=None)
        assert holder.path.read_bytes() == before

    @pytest.mark.parametrize("crashes", [1, 2, 3])
    def test_a_crash_between_reserve_and_commit_stays_spent(self, holder: Holder, crashes: int) -> None:
        for _ in range(crashes):
            budget = holder.start()
            plan(budget, rounds=3)
            budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        budget = holder.start()
        assert charged(budget.ledger.entries) == [EVENT] * crashes
        for round_number in range(3 - crashes):
            spend(budget, round_number + 1)
        with pytest.raises(BudgetExceeded):
            budget.reserve(job=JOB, round_number=3, model=MODEL, witness=None)

    def test_a_round_of_a_job_without_a_plan_is_refused(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        with pytest.raises(LedgerError, match=r"a round of job bbbbbbbbbbbb has no plan"):
            budget.reserve(job=OTHER_JOB, round_number=1, model=MODEL, witness=None)
        assert holder.kinds == ["open", "plan"]

    def test_a_second_commit_of_one_reservation_is_refused(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        reservation = budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        budget.commit(reservation, output=OUTPUT)
        for again in (budget, holder.start()):
            with pytest.raises(LedgerError, match="commits entry 2 a second time"):
                again.commit(reservation, output="5" * 64)
        assert holder.kinds == ["open", "plan", "reserve", "commit"]

    def test_only_a_reservation_of_this_very_ledger_can_be_committed(self, holder: Holder, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        elsewhere = Holder(tmp_path / "elsewhere").start()
        plan(elsewhere)
        foreign = elsewhere.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        budget = holder.start()
        plan(budget)
        spend(budget, 1)
        opening, planned, reserved, committed = budget.ledger.entries
        for entry in (foreign, opening, planned, committed):
            with pytest.raises(LedgerError, match=f"entry {entry.seq} is no reservation"):
                budget.commit(entry, output=OUTPUT)
        assert reserved.kind == "reserve"
        assert holder.kinds == ["open", "plan", "reserve", "commit"]

    def test_every_reservation_is_charged_by_the_event_that_its_plan_states(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, rounds=1)
        plan(budget, job=OTHER_JOB, events=[COSTLIER], rounds=2)
        spend(budget, 1, job=OTHER_JOB)
        spend(budget, 1)
        spend(budget, 2, job=OTHER_JOB)
        assert charged(budget.ledger.entries) == [COSTLIER, EVENT, COSTLIER]

    def test_a_fixed_plan_s_round_releases_what_was_planned_and_nothing_else(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        for events in ([COSTLIER], [EVENT, EVENT], []):
            with pytest.raises(BudgetExceeded, match="another event than its plan states"):
                budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None, events=events)
        assert budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None, events=[EVENT]).kind == "reserve"

    def test_a_clip_norm_that_moves_is_written_beside_the_events(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        entry = budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None, clip_norm=0.75)
        assert entry.body["clip_norm"] == 0.75
        assert entry.body["events"] == [EVENT.as_dict()]

    def test_what_nobody_can_bound_is_refused_not_skipped(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        body = {"job": JOB, "round": 1, "model": MODEL, "witness": None}
        budget.ledger.append("reserve", {**body, "events": [EVENT.as_dict()]})
        budget.ledger.append("reserve", {**body, "events": [{**EVENT.as_dict(), "mechanism": "magic"}]})
        with pytest.raises(UnsupportedEvent):
            charged(budget.ledger.entries)
        accounts = LedgerAccounts(budget.ledger)
        for _ in range(2):  # The second time, too; and what could be read is not charged again.
            with pytest.raises(UnsupportedEvent):
                accounts.now()
        assert accounts._accounts.jobs[JOB].used == 1
        with pytest.raises(UnsupportedEvent):
            plan(budget, job=OTHER_JOB, epsilon=8.0)

    def test_what_was_reserved_without_a_plan_is_spent_all_the_same(self, holder: Holder) -> None:
        budget = holder.start()
        body = {"job": OTHER_JOB, "round": 1, "model": MODEL, "witness": None, "events": [COSTLIER.as_dict()]}
        assert budget.accounts().breach("reserve", body) == "reserves a round of a job that was never planned"
        budget.ledger.append("reserve", body)
        accounts = budget.accounts()
        assert accounts.spent(UNIT_RECORD) == [COSTLIER]
        assert accounts.epsilon(UNIT_RECORD, DELTA) == epsilon_pld([COSTLIER], DELTA)
        assert accounts.breach("reserve", body) == "reserves a round of a job that was never planned"

    def test_rounds_under_distributed_noise_are_planned_up_to_the_budget_of_clients_and_charged_one_by_one(
        self, holder: Holder
    ) -> None:
        budget, cost = holder.start(), epsilon_pld(repeated(SECURE, 3), DELTA)
        allow(budget, cost, unit=UNIT_CLIENT)
        with pytest.raises(BudgetExceeded, match="at most 3 rounds fit"):
            plan(budget, events=[SECURE], rounds=4)
        plan(budget, events=[SECURE], rounds=3)
        for round_number in (1, 2):
            spend(budget, round_number)
        accounts = holder.start().accounts()
        assert accounts.spent(UNIT_CLIENT) == repeated(SECURE, 2)
        assert accounts.epsilon(UNIT_CLIENT, DELTA, spent_only=True) == epsilon_pld(repeated(SECURE, 2), DELTA) < cost
        assert accounts.epsilon(UNIT_CLIENT, DELTA) == cost
        # Nobody says what they cost one record.
        assert accounts.epsilon(UNIT_RECORD, DELTA) == math.inf

    def test_a_training_with_correlated_noise_is_one_reservation_with_a_commit_a_round(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, events=[CORRELATED], rounds=1)
        reservation = budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        for round_number in (1, 2, 3):
            budget.commit(reservation, output=str(round_number) * 64, round_number=round_number)
        with pytest.raises(LedgerError, match="a second time"):
            budget.commit(reservation, output=OUTPUT, round_number=2)
        assert budget.accounts().spent(UNIT_CLIENT) == [CORRELATED]
        assert budget.committed(job=JOB, round_number=1, model=MODEL) == "1" * 64

    def test_any_other_reservation_is_of_its_own_round_alone(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        reservation = budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        with pytest.raises(LedgerError, match="commits another round than entry 2 reserved"):
            budget.commit(reservation, output=OUTPUT, round_number=2)
        assert holder.kinds == ["open", "plan", "reserve"]


class TestSendingAgain:
    """What already left may leave again: it releases nothing new."""

    def test_finds_what_left_in_this_round_for_this_model_also_after_a_restart(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        spend(budget, 1, output="6" * 64)
        spend(budget, 2, output="7" * 64)
        for again in (budget, holder.start()):
            assert again.committed(job=JOB, round_number=1, model=MODEL) == "6" * 64
            assert again.committed(job=JOB, round_number=2, model=MODEL) == "7" * 64

    def test_finds_nothing_for_another_round_model_or_job(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        spend(budget, 1)
        assert budget.committed(job=JOB, round_number=2, model=MODEL) is None
        assert budget.committed(job=JOB, round_number=1, model=OTHER_MODEL) is None
        assert budget.committed(job=OTHER_JOB, round_number=1, model=MODEL) is None

    def test_finds_nothing_that_was_reserved_and_never_committed(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        assert holder.start().committed(job=JOB, round_number=1, model=MODEL) is None

    def test_finds_the_newest_when_a_crash_made_a_round_leave_twice(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        spend(budget, 1, output="6" * 64)
        spend(budget, 1, output="7" * 64)
        assert budget.committed(job=JOB, round_number=1, model=MODEL) == "7" * 64

    def test_finds_what_another_process_committed(self, holder: Holder) -> None:
        first, second = holder.start(), holder.start()
        plan(first)
        spend(first, 1)
        assert second.committed(job=JOB, round_number=1, model=MODEL) == OUTPUT


def cost(rounds: int, event: Event = EVENT, delta: float = DELTA) -> float:
    return epsilon_pld(repeated(event, rounds), delta)


class TestSeveralJobs:
    def test_a_job_s_own_limit_bounds_that_job_alone(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, rounds=3, epsilon=cost(3))
        plan(budget, job=OTHER_JOB, rounds=3, epsilon=cost(3))
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == cost(6) > cost(3)

    def test_what_an_earlier_job_spent_counts_against_the_next(self, holder: Holder) -> None:
        budget = holder.start()
        allow(budget, cost(4))
        plan(budget, rounds=3)
        for round_number in (1, 2, 3):
            spend(budget, round_number)
        with pytest.raises(
            BudgetExceeded, match=r"the data holder's budget for all purposes is .*at most 1 rounds fit"
        ):
            plan(holder.start(), job=OTHER_JOB, rounds=2)
        plan(holder.start(), job=OTHER_JOB, rounds=1)

    def test_what_an_earlier_job_may_still_spend_counts_as_well(self, holder: Holder) -> None:
        # Otherwise two jobs admitted before either begins would together overspend what each of them respects.
        budget = holder.start()
        allow(budget, cost(4))
        plan(budget, rounds=3)
        with pytest.raises(BudgetExceeded, match="at most 1 rounds fit"):
            plan(budget, job=OTHER_JOB, rounds=2)

    def test_two_jobs_cost_what_their_events_do_together_and_not_the_sum_of_two_epsilons(self, holder: Holder) -> None:
        # 2.1736 against 1.8282 + 1.1337 = 2.962, all three by dp-accounting 0.6's PLD; the PRV accountant of Gopi, Lee,
        # Wutschitz 2021 (arXiv:2106.02848) has the first in [2.1634, 2.1837].
        budget = holder.start()
        first, second = gaussian(1.0, 0.01, 100), gaussian(1.1, 256 / 60000, 703)
        allow(budget, 2.18)
        plan(budget, events=[first], rounds=10, epsilon=1.83)
        plan(budget, job=OTHER_JOB, events=[second], rounds=5, epsilon=1.14)
        accounts = budget.accounts()
        assert accounts.epsilon(UNIT_RECORD, DELTA) == pytest.approx(2.1736, abs=1e-3)
        assert accounts.epsilon(UNIT_RECORD, DELTA, spent_only=True) == 0
        alone = [accounts.epsilon(UNIT_RECORD, DELTA, jobs=own.__eq__) for own in (JOB, OTHER_JOB)]
        assert alone == pytest.approx([1.8282, 1.1337], abs=1e-3)

    @pytest.mark.parametrize("kept", [None, 0.5])
    def test_a_lowered_budget_refuses_further_plans_and_a_lifted_one_none(
        self, holder: Holder, kept: float | None
    ) -> None:
        budget = holder.start()
        allow(budget, cost(6))
        plan(budget, rounds=3)
        allow(budget, kept)
        spend(budget, 1)  # What was admitted goes on.
        if kept is None:
            plan(holder.start(), job=OTHER_JOB, rounds=1000)
        else:
            with pytest.raises(BudgetExceeded, match="not one round fits"):
                plan(holder.start(), job=OTHER_JOB, rounds=1)

    def test_a_lowered_budget_of_one_purpose_refuses_no_plan_of_another(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, rounds=3)
        allow(budget, 0.1, purpose="training")
        plan(budget, job=OTHER_JOB, purpose="statistics")
        with pytest.raises(BudgetExceeded, match="purpose 'training'"):
            plan(budget, job="c" * 64)

    def test_how_many_rounds_fit_is_known_before_a_plan_is_made(self, holder: Holder) -> None:
        budget = holder.start()
        allow(budget, cost(10))
        plan(budget, rounds=3)
        asked = JobAccount(OTHER_JOB, "training", 100, (EVENT,), None, (Limit(epsilon=None, delta=DELTA),))
        assert budget.accounts().rounds_that_fit(asked) == 7
        allow(budget, 0.1)
        assert budget.accounts().rounds_that_fit(asked) == 0
        assert Accounts(SITE).rounds_that_fit(asked) == 100
        assert OTHER_JOB not in budget.accounts().jobs


class TestPurposes:
    def test_one_purpose_s_budget_does_not_bind_another_and_the_one_for_all_binds_both(self, holder: Holder) -> None:
        budget = holder.start()
        allow(budget, cost(2), purpose="training")
        allow(budget, cost(5))
        with pytest.raises(BudgetExceeded, match="budget for purpose 'training' is"):
            plan(budget, rounds=3)
        plan(budget, job=OTHER_JOB, rounds=4, purpose="statistics")
        with pytest.raises(BudgetExceeded, match=r"budget for all purposes is .*at most 1 rounds fit"):
            plan(budget, rounds=2)
        plan(budget, rounds=1)
        accounts = budget.accounts()
        assert accounts.epsilon(UNIT_RECORD, DELTA, purpose="statistics") == cost(4)
        assert accounts.epsilon(UNIT_RECORD, DELTA, purpose="training") == cost(1)
        assert accounts.epsilon(UNIT_RECORD, DELTA, purpose="other") == 0
        assert accounts.epsilon(UNIT_RECORD, DELTA) == cost(5)

    @settings(max_examples=25, deadline=None)
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["plan", "round", "settle"]), st.sampled_from("abc"), st.integers(1, 3)),
            max_size=14,
        )
    )
    # Two jobs, each within the budget, both admitted before either begins; and room that a settled one leaves.
    @example(steps=[("plan", "a", 3), ("plan", "b", 2), *[("round", "a", 1)] * 3, *[("round", "b", 1)] * 2])
    @example(steps=[("plan", "a", 3), ("round", "a", 1), ("settle", "a", 1), ("plan", "b", 2), ("plan", "c", 3)])
    def test_whatever_jobs_come_and_however_they_interleave_every_budget_holds(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
    ) -> None:
        holder, purpose_of = Holder(tmp_path_factory.mktemp("holder")), {"a": "one", "b": "one", "c": "two"}
        budgets = {None: cost(4), "one": cost(3), "two": cost(2)}
        for purpose, limit in budgets.items():
            allow(holder.start(), limit, purpose=purpose)
        for act, job, rounds in steps:
            budget = holder.start()
            try:
                if act == "plan":
                    plan(budget, job=job * 64, rounds=rounds, purpose=purpose_of[job])
                elif act == "round":
                    spend(budget, rounds, job=job * 64)
                else:
                    budget.settle(job * 64)
            except LedgerError as error:
                assert any(why in str(error) for why in ("no plan", "planned before", "no job"))  # noqa: PT017
            except BudgetExceeded:
                pass
            accounts = holder.start().accounts()
            for purpose, limit in budgets.items():
                assert accounts.epsilon(UNIT_RECORD, DELTA, purpose=purpose) <= limit
        assert epsilon_pld(charged(holder.start().ledger.entries), DELTA) <= budgets[None]


class TestSettling:
    def test_frees_what_was_set_aside_and_nothing_that_was_reserved(self, holder: Holder) -> None:
        budget = holder.start()
        allow(budget, cost(5))
        plan(budget, rounds=5)
        spend(budget, 1)
        budget.reserve(job=JOB, round_number=2, model=MODEL, witness=None)  # Never committed: spent all the same.
        budget.settle(JOB)
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == cost(2)
        with pytest.raises(BudgetExceeded, match="at most 3 rounds fit"):
            plan(holder.start(), job=OTHER_JOB, rounds=4)
        plan(holder.start(), job=OTHER_JOB, rounds=3)

    def test_a_settled_job_reserves_nothing_more_even_when_its_plan_is_made_again(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, rounds=5)
        open_reservation = budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None)
        budget.settle(JOB)
        for again in (budget, holder.start()):
            plan(again, rounds=5)
            with pytest.raises(BudgetExceeded, match="a job that was settled"):
                again.reserve(job=JOB, round_number=2, model=MODEL, witness=None)
        budget.commit(open_reservation, output=OUTPUT)  # What was reserved before may still leave.
        assert holder.kinds == ["open", "plan", "reserve", "settle", "commit"]

    def test_settling_twice_changes_nothing_also_when_another_process_did(self, holder: Holder) -> None:
        first, second = holder.start(), holder.start()
        plan(first)
        second.accounts()
        first.settle(JOB)
        second.settle(JOB)
        first.settle(JOB)
        assert holder.kinds == ["open", "plan", "settle"]
        assert first.accounts().breach("settle", {"job": JOB}) == "settles a job that is not under way"

    def test_a_settlement_that_another_process_made_meanwhile_is_no_error(
        self, holder: Holder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow, fast = holder.start(), holder.start()
        plan(slow)
        append = slow.ledger.append

        def overtaken(*arguments: Any, **rules: Any) -> Entry:
            fast.settle(JOB)
            return append(*arguments, **rules)

        monkeypatch.setattr(slow.ledger, "append", overtaken)
        slow.settle(JOB)
        assert holder.kinds == ["open", "plan", "settle"]

    def test_only_a_planned_job_can_be_settled(self, holder: Holder) -> None:
        with pytest.raises(LedgerError, match="there is no job bbbbbbbbbbbb to settle"):
            holder.start().settle(OTHER_JOB)

    def test_a_job_that_was_settled_before_its_first_round_never_was(self, holder: Holder) -> None:
        # Neither its lack of a bound for clients nor its filter outlives it.
        budget = holder.start()
        plan(budget, rounds=5)
        budget.plan_adaptive(job="c" * 64, rounds=5, bound=FILTER, limits=[ANY])
        budget.settle(JOB)
        budget.settle("c" * 64)
        plan(budget, job=OTHER_JOB, events=[CLIENT], rounds=1)
        assert budget.accounts().epsilon(UNIT_CLIENT, DELTA) == cost(1, CLIENT)


class TestUnits:
    def test_a_budget_for_records_binds_a_job_that_protects_whole_clients(self, holder: Holder) -> None:
        # What a client's noise leaves of a record costs it twice the sensitivity, so half the noise.
        budget, twice = holder.start(), gaussian(5.0)
        allow(budget, cost(4, twice))
        with pytest.raises(BudgetExceeded, match=r"\(record level\).*at most 4 rounds fit"):
            plan(budget, events=[CLIENT], rounds=5)
        plan(budget, events=[CLIENT], rounds=4)
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == cost(4, twice)
        assert budget.accounts().epsilon(UNIT_CLIENT, DELTA) == cost(4, CLIENT)

    def test_a_job_that_bounds_nothing_for_clients_fits_no_budget_of_clients(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, events=[CLIENT], rounds=4)
        assert budget.accounts().epsilon(UNIT_CLIENT, DELTA) == cost(4, CLIENT)
        allow(budget, cost(9, CLIENT), unit=UNIT_CLIENT)
        with pytest.raises(BudgetExceeded, match="no client-level epsilon can be stated"):
            plan(budget, job=OTHER_JOB, events=[EVENT])
        allow(budget, None, unit=UNIT_CLIENT)
        plan(budget, job=OTHER_JOB, events=[EVENT])
        assert budget.accounts().epsilon(UNIT_CLIENT, DELTA) == math.inf
        spend(budget, 1, job=OTHER_JOB)
        assert budget.accounts().epsilon(UNIT_CLIENT, DELTA, spent_only=True) == math.inf

    def test_where_both_are_noised_each_is_charged_its_own(self, holder: Holder) -> None:
        budget = holder.start()
        allow(budget, cost(3), unit=UNIT_RECORD)
        allow(budget, cost(4, CLIENT), unit=UNIT_CLIENT)
        with pytest.raises(BudgetExceeded, match=r"\(record level\).*at most 3 rounds fit"):
            plan(budget, events=[EVENT, CLIENT], rounds=4)
        plan(budget, events=[EVENT, CLIENT], rounds=3)
        spend(budget, 1)
        accounts = budget.accounts()
        for unit, event in ((UNIT_RECORD, EVENT), (UNIT_CLIENT, CLIENT)):
            assert accounts.epsilon(unit, DELTA) == cost(3, event)
            assert accounts.epsilon(unit, DELTA, spent_only=True) == cost(1, event)
            assert accounts.spent(unit) == [event]


ORDER = 8
FILTER, ANY = Filter(order=ORDER, rdp=1.0), Limit(epsilon=None, delta=DELTA)
noises = st.floats(0.3, 30)
rates = st.sampled_from([1.0, 0.5, 0.1, 0.01])


class TestAdaptivePlans:
    """Events chosen on the way, as far as a filter holds them."""

    def offer(self, budget: SiteBudget, events: Sequence[Event] | None, round_number: int = 1) -> bool:
        try:
            budget.reserve(job=JOB, round_number=round_number, model=MODEL, witness=None, events=events)
        except BudgetExceeded as error:
            assert "filter holds" in str(error)  # noqa: PT017
            return False
        return True

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), order=st.sampled_from([2, 8, 40]), rdp=st.floats(0.01, 20))
    def test_whatever_is_offered_and_whatever_was_answered_the_filter_and_the_limit_hold(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, order: int, rdp: float
    ) -> None:
        holder, limit = Holder(tmp_path_factory.mktemp("holder")), rdp_to_epsilon(order, rdp, DELTA)
        bound = Filter(order=order, rdp=rdp)
        holder.start().plan_adaptive(
            job=JOB, rounds=100, bound=bound, limits=[Limit(epsilon=max(limit, 1e-300), delta=DELTA)]
        )
        taken, refused = list[GaussianEvent](), 0
        for number in range(data.draw(st.integers(1, 8))):
            budget, left = holder.start(), rdp - rdp_at(taken, order)
            event = gaussian(data.draw(noises), data.draw(rates))
            most = max(1, int(left / rdp_at([event], order))) if left > 0 else 1
            # The adversary knows what is left: it takes all of it, or one more, and pushes after a refusal.
            count = data.draw(st.sampled_from([1, most, most + 1, 1 + most // 2, 1 + refused]))
            event = gaussian(event.noise_multiplier, event.sampling_rate, count)
            total = rdp_at([*taken, event], order)
            if self.offer(budget, [event], number):
                taken.append(event)
                assert total <= rdp * (1 + 1e-11)
            else:
                refused += 1
                assert total > rdp  # Nor is anything refused that fits.
            accounts = holder.start().accounts()
            assert rdp_at(accounts.spent(UNIT_RECORD), order) == rdp_at(charged(budget.ledger.entries), order)
            assert rdp_at(charged(budget.ledger.entries), order) <= rdp * (1 + 1e-11)
            assert accounts.epsilon(UNIT_RECORD, DELTA) == limit
            assert accounts.epsilon(UNIT_RECORD, DELTA, spent_only=True) <= limit * (1 + 1e-11)
        budget.settle(JOB)
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) <= limit * (1 + 1e-11)

    @settings(max_examples=12, deadline=None)
    @given(
        fixed=st.lists(st.sampled_from([gaussian(1.5, 0.05, 20), gaussian(4.0)]), max_size=2),
        adaptive=st.lists(st.sampled_from([gaussian(1.0, 0.05), gaussian(3.0, 1.0)]), min_size=1, max_size=3),
    )
    def test_one_adaptive_job_makes_the_whole_ledger_s_figure_a_renyi_one(
        self, tmp_path_factory: pytest.TempPathFactory, fixed: list[GaussianEvent], adaptive: list[GaussianEvent]
    ) -> None:
        budget = Holder(tmp_path_factory.mktemp("holder")).start()
        budget.plan_adaptive(job=JOB, rounds=9, bound=Filter(order=ORDER, rdp=40.0), limits=[ANY])
        for number, event in enumerate(adaptive):
            assert self.offer(budget, [event], number)
        for number, event in enumerate(fixed):
            plan(budget, job=str(number) * 64, events=[event], rounds=1)
            spend(budget, 1, job=str(number) * 64)
        everything, accounts = [*adaptive, *fixed], budget.accounts()
        renyi = rdp_to_epsilon(ORDER, rdp_at(everything, ORDER), DELTA)
        assert accounts.epsilon(UNIT_RECORD, DELTA, spent_only=True) == pytest.approx(renyi)
        assert renyi >= epsilon_pld(everything, DELTA)
        reserved = rdp_to_epsilon(ORDER, 40.0 + rdp_at(fixed, ORDER), DELTA)
        assert accounts.epsilon(UNIT_RECORD, DELTA) == pytest.approx(reserved)
        # Other purposes and jobs keep their sharper figure.
        chosen = accounts.epsilon(UNIT_RECORD, DELTA, jobs=lambda job: job != JOB)
        assert chosen == epsilon_pld(fixed, DELTA)

    def test_one_that_has_reserved_nothing_leaves_what_was_spent_its_sharper_figure(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget)
        spend(budget, 1)
        budget.plan_adaptive(job=OTHER_JOB, rounds=2, bound=FILTER, limits=[ANY])
        accounts = budget.accounts()
        assert accounts.epsilon(UNIT_RECORD, DELTA, spent_only=True) == cost(1)
        assert accounts.epsilon(UNIT_RECORD, DELTA) > cost(3)
        budget.settle(OTHER_JOB)
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == cost(3)

    def test_two_filters_are_added_at_the_lower_of_their_orders(self, holder: Holder) -> None:
        # A Rényi divergence grows with its order: each bound holds there, and one order must serve both.
        budget = holder.start()
        budget.plan_adaptive(job=JOB, rounds=2, bound=Filter(order=16, rdp=0.5), limits=[ANY])
        budget.plan_adaptive(job=OTHER_JOB, rounds=2, bound=Filter(order=8, rdp=0.25), limits=[ANY])
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == pytest.approx(rdp_to_epsilon(8, 0.75, DELTA))
        self.offer(budget, [EVENT])
        budget.settle(JOB)
        total = rdp_at([EVENT], 8) + 0.25
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == pytest.approx(rdp_to_epsilon(8, total, DELTA))

    def test_one_that_could_exceed_its_limit_or_the_holder_s_budget_is_refused(self, holder: Holder) -> None:
        budget, most = holder.start(), rdp_to_epsilon(ORDER, 1.0, DELTA)
        with pytest.raises(BudgetExceeded, match=r"the job's limit is .*; lower the filter's rdp"):
            budget.plan_adaptive(
                job=JOB, rounds=2, bound=FILTER, limits=[Limit(epsilon=most * (1 - 1e-9), delta=DELTA)]
            )
        allow(budget, most)
        plan(budget, rounds=1)
        with pytest.raises(BudgetExceeded, match=r"the data holder's budget .*; lower the filter's rdp"):
            budget.plan_adaptive(job=OTHER_JOB, rounds=2, bound=FILTER, limits=[ANY])
        left = Filter(order=ORDER, rdp=1.0 - rdp_at([EVENT], ORDER) - 1e-12)
        budget.plan_adaptive(job=OTHER_JOB, rounds=2, bound=left, limits=[ANY])

    @pytest.mark.parametrize("events", [None, []])
    def test_a_round_that_names_no_events_would_be_free_and_is_refused(
        self, holder: Holder, events: list[Event] | None
    ) -> None:
        budget = holder.start()
        budget.plan_adaptive(job=JOB, rounds=2, bound=FILTER, limits=[ANY])
        with pytest.raises(BudgetExceeded, match="each round must name its own"):
            budget.reserve(job=JOB, round_number=1, model=MODEL, witness=None, events=events)

    def test_no_more_rounds_than_planned_however_little_they_cost(self, holder: Holder) -> None:
        budget = holder.start()
        budget.plan_adaptive(job=JOB, rounds=2, bound=FILTER, limits=[ANY])
        assert [self.offer(budget, [gaussian(1000.0)], number) for number in (1, 2)] == [True, True]
        with pytest.raises(BudgetExceeded, match="more than the plan's 2 rounds"):
            budget.reserve(job=JOB, round_number=3, model=MODEL, witness=None, events=[gaussian(1000.0)])

    def test_an_event_of_a_unit_that_the_filter_does_not_speak_of_is_refused(self, holder: Holder) -> None:
        budget = holder.start()
        limit = Limit(unit=UNIT_CLIENT, epsilon=None, delta=DELTA)
        budget.plan_adaptive(job=JOB, rounds=2, bound=Filter(unit=UNIT_CLIENT, order=ORDER, rdp=1.0), limits=[limit])
        with pytest.raises(UnsupportedEvent):
            self.offer(budget, [EVENT])
        assert self.offer(budget, [CLIENT])
        assert budget.accounts().epsilon(UNIT_RECORD, DELTA) == math.inf
        assert holder.kinds == ["open", "plan", "reserve"]


def at_once(count: int, act: Callable[[int, Callable[[], None]], str]) -> list[str]:
    """What `act` said, or the error that it raised, in each of so many processes.

    `act` is given its number and a wait until every process has come so far.
    """
    barrier, held_open = os.pipe()
    ends = []
    for number in range(count):
        out, into = os.pipe()
        if (process := os.fork()) == 0:
            told = "nothing"
            try:

                def wait() -> None:
                    os.close(held_open)
                    os.read(barrier, 1)  # Ends when the last process has closed its end.

                told = act(number, wait)
            except FedchorusError as error:
                told = type(error).__name__
            finally:
                os.write(into, told.encode())
                os._exit(0)
        os.close(into)
        ends.append((process, out))
    os.close(held_open)
    said = []
    for process, out in ends:
        with open(out, "rb") as file:
            said.append(file.read().decode())
        os.waitpid(process, 0)
    os.close(barrier)
    return said


class TestRaces:
    def test_a_hundred_processes_that_reserve_at_once_get_what_was_planned_and_no_more(self, holder: Holder) -> None:
        allow(holder.start(), cost(37))
        plan(holder.start(), rounds=37, epsilon=cost(37))

        def reserve(number: int, wait: Callable[[], None]) -> str:
            budget = holder.start()
            wait()
            budget.commit(
                budget.reserve(job=JOB, round_number=number, model=MODEL, witness=None), output=f"{number:064x}"
            )
            return "reserved"

        said = at_once(100, reserve)
        assert sorted(said) == ["BudgetExceeded"] * 63 + ["reserved"] * 37
        entries = read_ledger(holder.path, SITE, holder.key.public_hex)
        reserved = [entry for entry in entries if entry.kind == "reserve"]
        assert [entry.body["round"] in range(100) and said[entry.body["round"]] for entry in reserved] == [
            "reserved"
        ] * 37
        assert sorted(e.body["reserve"] for e in entries if e.kind == "commit") == [entry.seq for entry in reserved]
        assert epsilon_pld(charged(entries), DELTA) <= cost(37)

    def test_a_hundred_processes_that_plan_at_once_share_one_budget(self, holder: Holder) -> None:
        allow(holder.start(), cost(41))

        def admit(number: int, wait: Callable[[], None]) -> str:
            budget = holder.start()
            wait()
            plan(budget, job=f"{number:064x}", rounds=2)
            spend(budget, 1, job=f"{number:064x}")
            return "admitted"

        assert sorted(at_once(100, admit)) == ["BudgetExceeded"] * 80 + ["admitted"] * 20
        entries = read_ledger(holder.path, SITE, holder.key.public_hex)
        assert [sum(entry.kind == kind for entry in entries) for kind in ("plan", "reserve", "commit")] == [20] * 3
        assert Accounts.of(SITE, entries).epsilon(UNIT_RECORD, DELTA) == cost(40) < cost(41)

    def test_processes_that_make_the_same_plan_at_once_make_one(self, holder: Holder) -> None:
        def admit(number: int, wait: Callable[[], None]) -> str:
            budget = SiteBudget(Ledger(holder.path, SITE, holder.key))
            wait()
            try:
                budget.open(rows=100, simulation=False)
            except LedgerError:
                budget.open(rows=100, simulation=False)  # "try again", it says.
            plan(budget)
            budget.settle(JOB)
            return "done"

        assert at_once(20, admit) == ["done"] * 20
        assert holder.kinds == ["open", "plan", "settle"]

    def test_a_decision_taken_on_a_stale_view_is_overruled_under_the_lock(self, holder: Holder) -> None:
        plan(holder.start(), rounds=1)
        slow, fast = holder.start(), holder.start()
        spend(fast, 1)
        with pytest.raises(BudgetExceeded):
            slow.reserve(job=JOB, round_number=1, model=MODEL, witness=None)


class TestKillMinusNine:
    """A process may end at any instruction: what it said it did is done, and what it spent stays spent."""

    ROUNDS = 3

    def live(self, holder: Holder, say: Callable[[Entry], object]) -> None:
        """A whole job, telling of each entry that it was acknowledged."""
        budget = holder.start()
        plan(budget, rounds=self.ROUNDS, epsilon=cost(self.ROUNDS))
        say(budget.ledger.entries[1])
        for round_number in (1, 2):
            reservation = budget.reserve(job=JOB, round_number=round_number, model=MODEL, witness=None)
            say(reservation)
            budget.commit(reservation, output=OUTPUT)
            say(budget.ledger.entries[reservation.seq + 1])
        budget.settle(JOB)
        say(budget.ledger.entries[-1])

    def killed_at(self, line: int, holder: Holder) -> tuple[bool, list[str]]:
        """Whether a child was killed at its `line`-th line of the package, and what was acknowledged by then."""
        out, into = os.pipe()
        if (process := os.fork()) == 0:
            package, seen = str(Path(privacy.__file__).parent), 0

            def trace(frame: FrameType, event: str, _: object) -> Any:
                nonlocal seen
                if not frame.f_code.co_filename.startswith(package):
                    return None
                if event == "line":
                    seen += 1
                    if seen == line:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            try:
                sys.settrace(trace)
                self.live(holder, lambda entry: os.write(into, f"{entry.hash}\n".encode()))
                os._exit(0)
            finally:
                os._exit(1)
        os.close(into)
        with open(out, "rb") as file:
            acknowledged = file.read().decode().split()
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        return os.WIFSIGNALED(status), acknowledged

    def die_everywhere(self, holder: Holder, every: int) -> int:
        """Kill at every so-manieth line until one life is lived to its end; return how many were not."""
        began, lives = holder.path.parent / "began.jsonl", 0
        holder.start()
        shutil.copyfile(holder.path, began)
        while True:
            shutil.copyfile(began, holder.path)
            killed, acknowledged = self.killed_at(1 + lives * every, holder)
            budget = holder.start()  # Opens and verifies.
            written = [entry.hash for entry in budget.ledger.entries]
            assert set(acknowledged) <= set(written)
            assert len(written) - len(acknowledged) in (1, 2)  # The opening, and one written and not yet told of.
            spent = len(charged(budget.ledger.entries))
            plan(budget, rounds=self.ROUNDS, epsilon=cost(self.ROUNDS))
            settled = budget.accounts().jobs[JOB].settled
            for _ in range(0 if settled else self.ROUNDS - spent):
                spend(budget, 3)
            with pytest.raises(BudgetExceeded):
                spend(budget, 3)
            entries = read_ledger(holder.path, SITE, holder.key.public_hex)
            assert [entry.hash for entry in entries[: len(written)]] == written
            assert len(charged(entries)) == (spent if settled else self.ROUNDS)
            if not killed:
                assert settled
                assert len(acknowledged) == 6
                return lives
            lives += 1

    def test_at_a_sample_of_instructions_never_unspends(self, holder: Holder) -> None:
        assert self.die_everywhere(holder, every=31) >= 20

    @pytest.mark.slow
    def test_at_any_instruction_never_unspends(self, holder: Holder) -> None:
        assert self.die_everywhere(holder, every=1) >= 500


class TestLength:
    def lines_of(self, act: Callable[[], object]) -> int:
        """How many lines of the package `act` runs: its work, whatever the machine."""
        package, seen = str(Path(privacy.__file__).parent), 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal seen
            seen += event == "line"
            return trace if frame.f_code.co_filename.startswith(package) else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            act()
        finally:
            sys.settrace(before)
        return seen

    def test_a_round_costs_no_more_work_in_a_long_ledger_than_in_a_short_one(self, holder: Holder) -> None:
        budget, work = holder.start(), list[int]()
        plan(budget, rounds=1000)
        budget.plan_adaptive(job=OTHER_JOB, rounds=1000, bound=FILTER, limits=[ANY])

        def both() -> None:
            spend(budget, 1)
            assert budget.committed(job=JOB, round_number=1, model=MODEL) == OUTPUT
            event = gaussian(1000.0)
            budget.reserve(job=OTHER_JOB, round_number=1, model=MODEL, witness=None, events=[event])

        for _ in range(3):
            both()
            work.append(self.lines_of(both))
            for _ in range(60):
                spend(budget, 2)
        assert work[0] == work[1] == work[2] > 100

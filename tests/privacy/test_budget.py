"""A site never spends more than it set aside: not after a crash, not in a race, not for a second job."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privacy.accountant import epsilon_pld
from privacy.budget import SiteBudget, charged, check_affordable
from privacy.errors import BudgetExceeded, LedgerError, UnsupportedEvent
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Ledger, read_ledger

SITE, DELTA = "city-hospital", 1e-5
JOB, OTHER_JOB, MODEL, OTHER_MODEL, OUTPUT = "a" * 64, "b" * 64, "1" * 64, "2" * 64, "3" * 64
EVENT = GaussianEvent(noise_multiplier=20.0, clip_norm=1.0, sampling_rate=1.0, count=4, rng="os")
COSTLIER = GaussianEvent(noise_multiplier=10.0, clip_norm=1.0, sampling_rate=1.0, count=4, rng="os")


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
    event: GaussianEvent = EVENT,
    rounds: int = 3,
    epsilon: float | None = None,
    delta: float = DELTA,
) -> None:
    budget.plan(job=job, event=event, rounds=rounds, epsilon=epsilon, delta=delta)


def spend(budget: SiteBudget, round_number: int, *, job: str = JOB, output: str = OUTPUT) -> None:
    reservation = budget.reserve(job=job, round_number=round_number, model=MODEL, witness=None)
    budget.commit(reservation, output=output)


class TestOpening:
    def test_writes_who_holds_the_ledger_and_how_many_rows(self, holder: Holder) -> None:
        entry = holder.start().ledger.entries[0]
        assert entry.kind == "open"
        assert entry.body == {"public_key": holder.key.public_hex, "rows": 100, "simulation": False}

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

    def test_a_ledger_that_begins_with_something_else_is_refused(self, holder: Holder) -> None:
        Ledger(holder.path, SITE, holder.key).append("plan", {"simulation": False})
        with pytest.raises(LedgerError):
            holder.start()


class TestPlanning:
    def test_a_plan_says_everything_that_an_auditor_needs(self, holder: Holder) -> None:
        budget = holder.start()
        plan(budget, epsilon=3.0)
        assert budget.ledger.entries[-1].body == {
            "job": JOB,
            "event": EVENT.as_dict(),
            "rounds": 3,
            "epsilon": 3.0,
            "delta": DELTA,
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
        [{"rounds": 4}, {"rounds": 2}, {"epsilon": 9.0}, {"epsilon": None}, {"delta": 1e-6}, {"event": COSTLIER}],
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
            plan(holder.start(), event=loud, epsilon=None)
        assert holder.kinds == ["open"]


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
            "event": EVENT.as_dict(),
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
        with pytest.raises(BudgetExceeded, match="all 2 planned rounds are spent"):
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
            with pytest.raises(LedgerError, match="entry 2 was committed before"):
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
        plan(budget, job=OTHER_JOB, event=COSTLIER, rounds=2)
        spend(budget, 1, job=OTHER_JOB)
        spend(budget, 1)
        spend(budget, 2, job=OTHER_JOB)
        assert charged(budget.ledger.entries) == [COSTLIER, EVENT, COSTLIER]

    def test_what_nobody_can_bound_is_refused_not_skipped(self, holder: Holder) -> None:
        budget = holder.start()
        budget.ledger.append("reserve", {"job": JOB, "round": 1, "event": {**EVENT.as_dict(), "mechanism": "magic"}})
        with pytest.raises(UnsupportedEvent):
            charged(budget.ledger.entries)
        with pytest.raises(UnsupportedEvent):
            plan(budget, epsilon=8.0)


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


class TestSeveralJobs:
    def test_what_an_earlier_job_spent_counts_against_the_next(self, holder: Holder) -> None:
        budget, limit = holder.start(), epsilon_pld([EVENT] * 4, DELTA)
        plan(budget, rounds=3, epsilon=limit)
        for round_number in (1, 2, 3):
            spend(budget, round_number)
        with pytest.raises(BudgetExceeded, match="at most 1 rounds fit"):
            plan(holder.start(), job=OTHER_JOB, rounds=2, epsilon=limit)
        plan(holder.start(), job=OTHER_JOB, rounds=1, epsilon=limit)

    def test_what_an_earlier_job_may_still_spend_counts_as_well(self, holder: Holder) -> None:
        # Otherwise two jobs admitted before either begins would together overspend what each of them respects.
        budget, limit = holder.start(), epsilon_pld([EVENT] * 4, DELTA)
        plan(budget, rounds=3, epsilon=limit)
        with pytest.raises(BudgetExceeded, match="at most 1 rounds fit"):
            plan(budget, job=OTHER_JOB, rounds=2, epsilon=limit)

    @settings(max_examples=20, deadline=None)
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["plan", "round"]), st.sampled_from("abc"), st.integers(1, 3)), max_size=14
        )
    )
    # Two jobs, each within the budget, both admitted before either begins.
    @example(steps=[("plan", "a", 3), ("plan", "b", 2), *[("round", "a", 1)] * 3, *[("round", "b", 1)] * 2])
    def test_whatever_jobs_come_and_however_they_interleave_the_budget_holds(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
    ) -> None:
        holder, limit = Holder(tmp_path_factory.mktemp("holder")), epsilon_pld([EVENT] * 4, DELTA)
        for act, job, rounds in steps:
            budget = holder.start()
            try:
                if act == "plan":
                    plan(budget, job=job * 64, rounds=rounds, epsilon=limit)
                else:
                    spend(budget, rounds, job=job * 64)
            except LedgerError as error:
                assert "no plan" in str(error) or "planned before" in str(error)  # noqa: PT017
            except BudgetExceeded:
                pass
            assert epsilon_pld(charged(budget.ledger.entries), DELTA) <= limit


RACE = """
import sys
from pathlib import Path
from privacy.budget import SiteBudget
from privacy.errors import BudgetExceeded
from privacy.keys import IdentityKey
from privacy.ledger import Ledger

budget = SiteBudget(Ledger(Path(sys.argv[1]), "city-hospital", IdentityKey.load(Path(sys.argv[2]))))
budget.open(rows=100, simulation=False)
print("ready", flush=True)
sys.stdin.readline()
for job in ("a" * 64, "b" * 64):
    won = 0
    for number in range(100):
        try:
            entry = budget.reserve(job=job, round_number=number, model="1" * 64, witness=None)
        except BudgetExceeded:
            break
        budget.commit(entry, output="3" * 64)
        won += 1
    print(won)
"""


class TestRaces:
    def race(self, holder: Holder) -> list[list[int]]:
        """How many rounds of either job each of two processes got."""
        command = [sys.executable, "-c", RACE, str(holder.path), str(holder.key_file)]
        racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            for racer in racers:
                assert racer.stdout is not None
                assert racer.stdout.readline() == "ready\n"
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("go\n")
                racer.stdin.flush()
            return [[int(won) for won in racer.communicate(timeout=60)[0].split()] for racer in racers]
        finally:
            for racer in racers:
                racer.kill()
                racer.wait()

    def test_of_two_processes_racing_for_the_last_planned_round_exactly_one_wins(self, holder: Holder) -> None:
        plan(holder.start(), rounds=1)
        plan(holder.start(), job=OTHER_JOB, rounds=40)
        first, second = self.race(holder)
        assert sorted([first[0], second[0]]) == [0, 1]
        assert first[1] + second[1] == 40
        entries = read_ledger(holder.path, SITE, holder.key.public_hex)
        assert len(entries) == 3 + 2 * 41
        closed = [entry.body["reserve"] for entry in entries if entry.kind == "commit"]
        assert sorted(closed) == [entry.seq for entry in entries if entry.kind == "reserve"]

    def test_a_decision_taken_on_a_stale_view_is_overruled_under_the_lock(self, holder: Holder) -> None:
        plan(holder.start(), rounds=1)
        slow, fast = holder.start(), holder.start()
        spend(fast, 1)
        with pytest.raises(BudgetExceeded):
            slow.reserve(job=JOB, round_number=1, model=MODEL, witness=None)


class TestAffordable:
    def test_accepts_exactly_what_fits(self) -> None:
        limit = epsilon_pld([EVENT] * 5, DELTA)
        check_affordable(EVENT, rounds=5, epsilon=limit, delta=DELTA, site=SITE)
        check_affordable(EVENT, rounds=3, epsilon=limit, delta=DELTA, spent=[EVENT] * 2, site=SITE)
        with pytest.raises(BudgetExceeded):
            check_affordable(EVENT, rounds=6, epsilon=limit, delta=DELTA, site=SITE)
        with pytest.raises(BudgetExceeded):
            check_affordable(EVENT, rounds=3, epsilon=limit, delta=DELTA, spent=[EVENT] * 3, site=SITE)

    def test_a_message_is_one_line_with_the_figures_and_the_advice(self) -> None:
        with pytest.raises(BudgetExceeded) as caught:
            check_affordable(EVENT, rounds=50, epsilon=1.0, delta=DELTA, site=SITE)
        message = str(caught.value)
        cost = epsilon_pld([EVENT] * 50, DELTA)
        assert f"epsilon {cost:.4g} at delta 1e-05, the budget is 1;" in message
        assert "\n" not in message

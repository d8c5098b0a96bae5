"""A site's policy refuses whatever it does not allow, names every clause, and stops a client whose file is damaged."""

import itertools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from client.content import PACKAGE
from client.history import History
from client.policy import POLICY_TEMPLATE, JobRequest, Policy, PolicyError, PolicyRefused, set_budgets
from client.policy_file import PolicyFile, PrivacyRules, Rates, SecureRules
from client.site import SitePlan
from privacy.accountant import epsilon_pld
from privacy.budget import Limit, SiteBudget
from privacy.events import UNIT_CLIENT, GaussianEvent, repeated
from privacy.keys import IdentityKey
from privacy.ledger import Entry, Ledger
from strategies.explain import known_keys
from strategies.job import Job
from tests.strategies.jobs import make_job

ROOT = Path(__file__).parent.parent.parent
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HASH, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
ANN, BOB, EVE = "1" * 64, "2" * 64, "e" * 64
OWN = "mypackage.tasks:Mine"
DELTA = 1e-4
# Every row in every step: unsampled noise is the cheapest to account for.
STEPS = {"local_steps": 1, "batch_size": None, "sampling_rate": 1.0}
PRIVATE: Mapping[str, Any] = {
    "training": STEPS,
    "privacy": {"record": {"noise_multiplier": 8.0, "delta": DELTA}},
    "secure_aggregation": {},
}
LOCAL = {"noise_multiplier": 8.0, "delta": DELTA, "placement": "local"}
CENTRAL = {"epsilon": 2.0, "noise_multiplier": 8.0, "delta": DELTA, "placement": "central"}
PLAIN: Mapping[str, Any] = {"privacy": {}}
ONE_ROUND = {"rounds": 1, "learning_rate": 1.0, "local_steps": 1, "batch_size": None, "sampling_rate": 1.0}
OF = {"of": "a" * 64, "model_hash": "a" * 64}
EVALUATION: Mapping[str, Any] = {"training": ONE_ROUND, "data": {"stratify": False}, "evaluation": OF}
ALLOWED: Mapping[str, Any] = {
    "version": 1,
    "purposes": ["training"],
    "tasks": {"allow": ["tabular-classification"]},
    "strategies": {"allow": ["fedavg"]},
    "data": {"records": {"epsilon": 3.0, "delta": DELTA}},
}
NO_BUDGET: Mapping[str, Any] = {"data": {"records": {"unlimited": True}}}


def policy(**changes: Any) -> Policy:
    """The policy that allows the private job, with keys merged into its tables."""
    raw = deepcopy(dict(ALLOWED))
    for name, change in changes.items():
        raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
    return Policy.model_validate(raw)


def plan_of(job: Job) -> SitePlan:
    return SitePlan.make(job, rows=100, parameters=4, rng="os", site="north")


def request(job: Job | None = None, **changes: Any) -> JobRequest:
    job = job or make_job(**PRIVATE)
    fields: dict[str, Any] = {
        "job": job,
        "parameters": 4,
        "sites": 5,
        "plan": plan_of(job),
        "code": {PACKAGE: HASH, job.task.name: HASH, job.strategy.name: HASH},
        "approvals": frozenset(),
        "approvers": frozenset(),
        "approvals_required": 0,
    }
    return JobRequest(**{**fields, **changes})


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.jsonl")


def refused(
    own: Policy, asked: JobRequest, history: History, ledger: Sequence[Entry] = (), *, now: datetime = NOW
) -> tuple[str, ...]:
    """The clauses that `own` refuses the job for; none if it takes it."""
    try:
        own.check(asked, ledger=ledger, now=now, history=history)
    except PolicyRefused as error:
        return error.clauses
    return ()


def test_takes_what_it_allows(history: History) -> None:
    assert refused(policy(), request(), history) == ()


# The clause; what the policy says otherwise; what the job does; what else is asked.
Changes = Mapping[str, Any]
CLAUSES: list[tuple[str, Changes, Changes, Changes]] = [
    ("tasks.allow", {"tasks": {"allow": []}}, {}, {}),
    ("tasks.code", {}, {"task": {"name": OWN}}, {}),
    ("tasks.code", {"tasks": {"code": {OWN: OTHER}}}, {"task": {"name": OWN}}, {}),
    ("strategies.allow", {"strategies": {"allow": []}}, {}, {}),
    ("strategies.code", {}, {"strategy": {"name": OWN}}, {}),
    ("strategies.code", {"strategies": {"code": {OWN: OTHER}}}, {"strategy": {"name": OWN}}, {}),
    ("package", {"package": OTHER}, {}, {}),
    ("package", {"package": HASH}, {}, {"code": {}}),
    ("purposes", {"purposes": ["screening"]}, {}, {}),
    ("purposes", {"purposes": []}, {}, {}),
    ("data.images", {}, {"data": {"dataset": "images"}}, {}),
    ("data.records", {"data": {}}, {}, {}),
    ("data.records.epsilon", {"data": {"records": {"epsilon": 0.4, "delta": DELTA}}}, {}, {}),
    ("data.records.epsilon", {"privacy": {"require": "none"}}, PLAIN, {}),
    ("data.records.client_epsilon", {"data": {"records": {"client_epsilon": 9.0, "client_delta": DELTA}}}, {}, {}),
    (
        "data.records.period_epsilon",
        {"data": {"records": {"unlimited": True, "delta": DELTA, "period_days": 7, "period_epsilon": 0.4}}},
        {},
        {},
    ),
    ("privacy.require", NO_BUDGET, PLAIN, {}),
    ("privacy.require", {"privacy": {"require": "either"}, **NO_BUDGET}, PLAIN, {}),
    ("privacy.require", {"privacy": {"require": "client"}}, {}, {}),
    ("privacy.require", NO_BUDGET, {"privacy": {"client": LOCAL}, "strategy": {"weighting": "equal"}}, {}),
    ("privacy", {}, {"simulation": {"noise": "seeded"}}, {}),
    ("privacy.largest_epsilon", {"privacy": {"largest_epsilon": 0.4}}, {}, {}),
    ("privacy.largest_delta", {"privacy": {"largest_delta": 1e-5}}, {}, {}),
    ("privacy.minimum_noise_multiplier", {"privacy": {"minimum_noise_multiplier": 8.1}}, {}, {}),
    ("privacy.largest_clip_norm", {"privacy": {"largest_clip_norm": 0.9}}, {}, {}),
    ("secure_aggregation.required", {}, {"secure_aggregation": None}, {}),
    ("secure_aggregation.minimum_cohort", {"secure_aggregation": {"minimum_cohort": 5}}, {}, {}),
    ("secure_aggregation.minimum_cohort", {}, {}, {"sites": 3}),
    ("secure_aggregation.minimum_cohort", {}, {"cohort": {"size": 3}}, {}),
    ("secure_aggregation.minimum_cohort", {}, {"cohort": {"size": 5}}, {"sites": 3}),
    (
        "secure_aggregation.minimum_cohort",
        {"secure_aggregation": {"minimum_cohort": 6}},
        {"secure_aggregation": {"groups": 3}, "robust": {"reduce": "median"}},
        {"sites": 15},
    ),
    ("secure_aggregation.minimum_colluders", {"secure_aggregation": {"minimum_colluders": 2}}, {}, {}),
    (
        "evaluation.allow_plain",
        {"secure_aggregation": {"required": False}},
        {**EVALUATION, "secure_aggregation": None},
        {},
    ),
    (
        "evaluation.allow_site_figures",
        {"privacy": {"require": "none"}, **NO_BUDGET},
        {**EVALUATION, "privacy": None, "evaluation": {**OF, "sites": 10}},
        {},
    ),
    (
        "evaluation.groups",
        {"privacy": {"require": "none"}, "evaluation": {"groups": ["age"]}, **NO_BUDGET},
        {**EVALUATION, "privacy": None, "evaluation": {**OF, "groups": {"sex": {"values": ["F"]}}}},
        {},
    ),
    (
        "evaluation.smallest_group",
        {"privacy": {"require": "none"}, "evaluation": {"groups": ["sex"]}, **NO_BUDGET},
        {
            **EVALUATION,
            "privacy": None,
            "evaluation": {**OF, "groups": {"sex": {"values": ["F"]}}, "smallest": 9},
        },
        {},
    ),
    ("limits.jobs_per_day", {"limits": {"jobs_per_day": 0}}, {}, {}),
    ("limits.rounds_per_job", {"limits": {"rounds_per_job": 1}}, {}, {}),
    (
        "limits.rounds_per_job",
        {"limits": {"rounds_per_job": 1}, "privacy": {"require": "none"}, **NO_BUDGET},
        PLAIN,
        {},
    ),
    (
        "limits.rounds_per_job",
        {"limits": {"rounds_per_job": 2}},
        {"privacy": {"record": {**PRIVATE["privacy"]["record"], "spare_rounds": 1}}},
        {},
    ),
    ("limits.largest_model", {"limits": {"largest_model": 3}}, {}, {}),
    ("limits.approvals", {"limits": {"approvals": 1}}, {}, {"approvers": frozenset({ANN})}),
    ("limits.approvals", {"approvers": [ANN]}, {}, {"approvers": frozenset({BOB}), "approvals": frozenset({BOB})}),
    (
        "limits.approvals",
        {},
        {},
        {"approvals": frozenset({EVE}), "approvers": frozenset({ANN}), "approvals_required": 1},
    ),
    (
        "limits.approvals",
        {"approvers": [ANN], "limits": {"approvals": 1}},
        {},
        {"approvals": frozenset({ANN}), "approvers": frozenset({ANN, BOB}), "approvals_required": 2},
    ),
]


def job_with(changes: Mapping[str, Any]) -> Job:
    return make_job(**{k: v for k, v in {**PRIVATE, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    ("clause", "rules", "job", "asked"), CLAUSES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refuses_what_violates_one_clause_and_names_it_alone(
    clause: str, rules: Changes, job: Changes, asked: Changes, history: History
) -> None:
    own = policy(**rules) if rules != {"data": {}} else Policy.model_validate({**ALLOWED, "data": {}})
    assert refused(own, request(job_with(job), **asked), history) == (clause,)


@pytest.mark.parametrize(
    ("rules", "job", "asked"),
    [
        ({"privacy": {"largest_delta": DELTA, "minimum_noise_multiplier": 8.0, "largest_clip_norm": 1.0}}, {}, {}),
        ({"limits": {"rounds_per_job": 2, "largest_model": 4, "jobs_per_day": 1}}, {}, {}),
        ({"secure_aggregation": {"minimum_cohort": 4, "minimum_colluders": 1}}, {}, {"sites": 5}),
        ({"secure_aggregation": {"minimum_cohort": 5}}, {"secure_aggregation": {"dropouts": 0}}, {}),
        ({"secure_aggregation": {"minimum_cohort": 5}}, {"cohort": {"minimum": 5}}, {}),
        ({"secure_aggregation": {"minimum_cohort": 90}}, {"secure_aggregation": {"graph": "regular"}}, {"sites": 100}),
        ({"limits": {"approvals": 1}}, {}, {"approvals": frozenset({ANN, EVE}), "approvers": frozenset({ANN, BOB})}),
        ({"approvers": [ANN]}, {}, {"approvals": frozenset({ANN, BOB}), "approvers": frozenset({BOB})}),
    ],
    ids=str,
)
def test_takes_what_is_just_within(rules: Changes, job: Changes, asked: Changes, history: History) -> None:
    assert refused(policy(**rules), request(job_with(job), **asked), history) == ()


CENTRAL_JOB: Mapping[str, Any] = {"privacy": {"client": CENTRAL}, "strategy": {"weighting": "equal"}}
TRUSTING: Mapping[str, Any] = {"privacy": {"require": "client", "allow_central": True}, **NO_BUDGET}


@pytest.mark.parametrize(
    ("clauses", "privacy", "client"),
    [
        ((), {}, {}),
        (("privacy.allow_central",), {"allow_central": False}, {}),
        (("privacy.allow_adaptive_clip",), {}, {"adaptive_clip": {}}),
        ((), {"allow_adaptive_clip": True}, {"adaptive_clip": {}}),
        (("privacy.largest_epsilon",), {}, {"epsilon": None}),
        (("privacy.largest_epsilon",), {"largest_epsilon": 1.9}, {}),
        (("privacy.largest_delta",), {"largest_delta": 1e-5}, {}),
        (("privacy.minimum_noise_multiplier",), {}, {"noise_multiplier": None}),
        ((), {"minimum_noise_multiplier": 0}, {"noise_multiplier": None}),
        (("privacy.minimum_noise_multiplier",), {"minimum_noise_multiplier": 9.0}, {}),
        (("privacy.largest_clip_norm",), {"largest_clip_norm": 0.5}, {}),
        (("privacy.require",), {"require": "record"}, {}),
    ],
)
def test_holds_noise_that_the_server_adds_to_what_the_job_states(
    clauses: tuple[str, ...], privacy: dict[str, Any], client: dict[str, Any], history: History
) -> None:
    stated = {key: value for key, value in {**CENTRAL, **client}.items() if value is not None}
    job = job_with({**CENTRAL_JOB, "privacy": {"client": stated}})
    own = policy(**{**TRUSTING, "privacy": {**TRUSTING["privacy"], **privacy}})
    assert refused(own, request(job), history) == clauses
    if not clauses:  # No limit can hold what is not charged here.
        assert refused(
            policy(**{**TRUSTING, "privacy": {**TRUSTING["privacy"], **privacy}, "data": ALLOWED["data"]}),
            request(job),
            history,
        ) == ("data.records.epsilon",)


@pytest.mark.parametrize("require", ["record", "client", "either", "none"])
def test_requires_the_unit_that_it_says(require: str, history: History) -> None:
    record, local = {"record": PRIVATE["privacy"]["record"]}, {"client": LOCAL}
    jobs = {"record": record, "client": local, "either": {**record, **local}, "none": {}}
    own = policy(privacy={"require": require}, **NO_BUDGET)
    taken = {
        name
        for name, privacy in jobs.items()
        if not refused(own, request(job_with({"privacy": privacy, "strategy": {"weighting": "equal"}})), history)
    }
    expected = {
        "record": {"record", "either"},
        "client": {"client", "either"},
        "either": {"record", "client", "either"},
    }
    assert taken == expected.get(require, set(jobs))


def test_own_code_runs_with_the_content_that_is_listed(history: History) -> None:
    own = policy(tasks={"code": {OWN: HASH}}, strategies={"code": {OWN: HASH}}, package=HASH)
    assert refused(own, request(job_with({"task": {"name": OWN}, "strategy": {"name": OWN}})), history) == ()


def test_what_needs_no_data_is_refused_before_any_is_opened(history: History) -> None:
    own = policy(tasks={"code": {OWN: HASH}}, purposes=["screening"], limits={"largest_model": 1})
    job = job_with({"task": {"name": OWN}, "data": {"dataset": "other"}})
    asked = replace(request(job), plan=SitePlan(0), code={OWN: OTHER})
    with pytest.raises(PolicyRefused) as caught:
        own.check_offer(asked, now=NOW, history=history)
    assert caught.value.clauses == ("tasks.code", "purposes", "data.other", "limits.largest_model")
    good = replace(asked, job=job_with({"task": {"name": OWN}}), code={OWN: HASH})
    policy(tasks={"code": {OWN: HASH}}).check_offer(good, now=NOW, history=history)


def test_seeded_noise_in_a_plan_is_refused_whatever_the_job_says(history: History) -> None:
    job = make_job(**PRIVATE)
    seeded = SitePlan.make(job, rows=100, parameters=4, rng="seeded-simulation", site="north")
    assert refused(policy(privacy={"require": "none"}), request(job, plan=seeded), history) == ("privacy",)


def test_lists_every_violated_clause(history: History) -> None:
    own = policy(
        purposes=[],
        tasks={"allow": []},
        strategies={"allow": []},
        package=OTHER,
        privacy={
            "largest_epsilon": 0.1,
            "largest_delta": 1e-9,
            "minimum_noise_multiplier": 9,
            "largest_clip_norm": 0.1,
        },
        limits={"jobs_per_day": 0, "rounds_per_job": 1, "largest_model": 1, "approvals": 1},
        data={"records": {"epsilon": 0.1, "delta": DELTA, "period_days": 1, "period_epsilon": 0.1}},
        secure_aggregation={"minimum_cohort": 9, "minimum_colluders": 3},
    )
    assert set(refused(own, request(), history)) == {
        "purposes",
        "tasks.allow",
        "strategies.allow",
        "package",
        "privacy.largest_epsilon",
        "privacy.largest_delta",
        "privacy.minimum_noise_multiplier",
        "privacy.largest_clip_norm",
        "limits.jobs_per_day",
        "limits.rounds_per_job",
        "limits.largest_model",
        "limits.approvals",
        "data.records.epsilon",
        "data.records.period_epsilon",
        "secure_aggregation.minimum_cohort",
        "secure_aggregation.minimum_colluders",
    }


def test_the_message_says_what_each_clause_holds_against_the_job(history: History) -> None:
    own = policy(limits={"largest_model": 3}, data={"records": {"epsilon": 0.4, "delta": DELTA}})
    with pytest.raises(PolicyRefused) as caught:
        own.check(request(), ledger=(), now=NOW, history=history)
    cost = epsilon_pld(repeated(request().plan.events[0], 2), DELTA)
    assert str(caught.value) == (
        f"this site's policy refuses job {request().job.hash[:12]}: data.records.epsilon: it would reach {cost:.4g} at "
        "delta 0.0001 (record level), not 0.4; limits.largest_model: the model has 4 parameters, not 3"
    )
    assert caught.value.clause == "data.records.epsilon"


def test_what_a_job_says_stays_on_one_short_line(history: History) -> None:
    with pytest.raises(PolicyRefused) as caught:
        policy().check(request(job_with({"task": {"name": "a\nb" * 9999}})), ledger=(), now=NOW, history=history)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_time_without_its_zone_is_the_callers_error(history: History) -> None:
    with pytest.raises(ValueError, match="zone"):
        policy().check(request(), ledger=(), now=NOW.replace(tzinfo=None), history=history)
    with pytest.raises(ValueError, match="zone"):
        policy().check_round("a" * 64, now=NOW.replace(tzinfo=None), history=history)


JOBS: tuple[Mapping[str, Any], ...] = (
    {},
    PLAIN,
    {"secure_aggregation": None},
    {**PLAIN, "secure_aggregation": None, "purpose": "screening"},
    {"task": {"name": OWN}},
    {"secure_aggregation": {"colluders": 0}},
    {"privacy": {"client": LOCAL}, "strategy": {"weighting": "equal"}},
    CENTRAL_JOB,
    {"training": {**STEPS, "rounds": 20}},
)
KNOBS: Mapping[str, tuple[Any, ...]] = {  # From the loosest to the strictest.
    "purposes": (["training", "screening"], ["training"], []),
    "package": (None, HASH, OTHER),
    "tasks": ({"allow": ["tabular-classification"], "code": {OWN: HASH}}, {"code": {OWN: HASH}}, {}),
    "data": ({"unlimited": True}, {"epsilon": 3.0, "delta": DELTA}, {"epsilon": 0.9, "delta": DELTA}),
    "approvers": (None, [ANN, BOB], [BOB]),
    "privacy.require": ("none", "either", "record"),
    "privacy.largest_epsilon": (100.0, 2.0, 0.6),
    "privacy.minimum_noise_multiplier": (0, 8, 8.5),
    "privacy.allow_central": (True, False),
    "secure_aggregation.required": (False, True),
    "secure_aggregation.minimum_colluders": (0, 1, 2),
    "secure_aggregation.minimum_cohort": (1, 4, 5),
    "limits.rounds_per_job": (100, 19, 1),
    "limits.approvals": (None, 1, 2),
}


@lru_cache
def requests() -> tuple[JobRequest, ...]:
    return tuple(
        request(job_with(job), approvals=signed, approvers=frozenset({ANN, BOB}))
        for job, signed in itertools.product(JOBS, (frozenset[str](), frozenset({ANN}), frozenset({ANN, BOB})))
    )


def taken_by(turned: Mapping[str, int], history: History) -> set[int]:
    raw: dict[str, Any] = deepcopy(dict(ALLOWED))
    for knob, position in turned.items():
        table, _, key = knob.partition(".")
        value = KNOBS[knob][min(position, len(KNOBS[knob]) - 1)]
        value = {"records": value} if knob == "data" else value
        if key and value is not None:
            raw.setdefault(table, {})[key] = value
        elif value is not None:
            raw[knob] = value
    if raw.get("approvers") == [BOB]:
        raw.get("limits", {}).pop("approvals", None)  # Two of one key is refused when it is read.
    own = Policy.model_validate(raw)
    return {number for number, asked in enumerate(requests()) if not refused(own, asked, history)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_further_restriction_never_admits_a_further_job(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    history = History(tmp_path_factory.getbasetemp() / "never-written.jsonl")
    turned = {knob: data.draw(st.sampled_from((0, 0, 0, 1)), label=knob) for knob in KNOBS}
    knob = data.draw(st.sampled_from(sorted(KNOBS)))
    before, after = taken_by(turned, history), taken_by({**turned, knob: turned[knob] + 1}, history)
    assert after <= before


@pytest.mark.parametrize("knob", KNOBS)
def test_each_of_these_restrictions_keeps_some_job_out(knob: str, history: History) -> None:
    loosest = dict.fromkeys(KNOBS, 0)
    assert taken_by({**loosest, knob: len(KNOBS[knob]) - 1}, history) < taken_by(loosest, history)


class TestPeriod:
    """At most so much may be reserved within any window, by the times of the ledger's entries."""

    EVENT = GaussianEvent(noise_multiplier=8.0, clip_norm=1.0, sampling_rate=1.0, count=1, rng="os")

    @staticmethod
    def rules(epsilon: float, days: int = 10) -> Policy:
        data = {"unlimited": True, "delta": DELTA, "period_days": days, "period_epsilon": epsilon}
        return policy(data={"records": data})

    @classmethod
    def cost(cls, rounds: int) -> float:
        return epsilon_pld(repeated(cls.EVENT, rounds), DELTA)

    @classmethod
    def entries(cls, *written: tuple[str, float, Any]) -> list[Entry]:
        """(kind, days before NOW, job or (job, rounds)) in the order of a ledger."""
        out: list[Entry] = []
        for seq, (kind, ago, what) in enumerate(written):
            job, rounds = what if isinstance(what, tuple) else (what, 0)
            body: dict[str, Any] = {"job": job}
            if kind == "plan":
                limits = [Limit(epsilon=None, delta=DELTA).as_dict()]
                body |= {"purpose": "p", "events": [cls.EVENT.as_dict()], "rounds": rounds, "filter": None}
                body |= {"limits": limits}
            elif kind == "reserve":
                body |= {"round": 1, "model": "", "witness": None, "events": [cls.EVENT.as_dict()]}
            time = (NOW - timedelta(days=ago)).isoformat()
            out.append(Entry(seq, "north", time, kind, body, "", "", ""))
        return out

    @pytest.mark.parametrize(
        ("counted", "written"),
        [
            (0, []),
            (3, [("plan", 50, ("old", 3)), *[("reserve", 1, "old")] * 3]),
            (0, [("plan", 50, ("old", 3)), *[("reserve", 11, "old")] * 3]),
            (0, [("plan", 50, ("old", 1)), ("reserve", 10, "old")]),
            (1, [("plan", 50, ("old", 1)), ("reserve", 10 - 1e-6, "old")]),
            (2, [("plan", 50, ("old", 5)), *[("reserve", 11, "old")] * 3]),
            (3, [("plan", 50, ("old", 5)), *[("reserve", 11, "old")] * 2, ("reserve", 2, "old")]),
            (1, [("plan", 50, ("old", 5)), ("reserve", 11, "old"), ("reserve", 2, "old"), ("settle", 1, "old")]),
            (1, [("plan", 50, ("old", 1)), ("reserve", -3, "old")]),
            (1, [("reserve", 1, "never planned")]),
            (3, [("plan", 9, ("a", 2)), ("reserve", 9, "a"), ("plan", 8, ("b", 1)), ("reserve", 1, "b")]),
        ],
        ids=str,
    )
    def test_counts_what_was_reserved_within_it_and_what_may_still_be(
        self, counted: int, written: list[tuple[str, float, Any]], history: History
    ) -> None:
        ledger = self.entries(*written)
        exact = self.cost(counted + 2)  # The job's own two rounds.
        assert refused(self.rules(exact * 1.000001), request(), history, ledger) == ()
        clauses = refused(self.rules(exact * 0.999999), request(), history, ledger)
        assert clauses == ("data.records.period_epsilon",)

    def test_a_time_that_says_nothing_counts(self, history: History) -> None:
        ledger = self.entries(("plan", 50, ("old", 1)), ("reserve", 40, "old"))
        for time in ("yesterday", "2020-01-01T00:00:00"):
            strange = [ledger[0], Entry(1, "north", time, "reserve", ledger[1].body, "", "", "")]
            assert refused(self.rules(self.cost(2) * 1.01), request(), history, strange)
        assert not refused(self.rules(self.cost(2) * 1.01), request(), history, ledger)

    def test_a_job_that_was_admitted_counts_once(self, history: History) -> None:
        job = make_job(**PRIVATE)
        ledger = self.entries(("plan", 1, (job.hash, 2)), ("reserve", 1, job.hash))
        assert refused(self.rules(self.cost(2) * 1.000001), request(job), history, ledger) == ()
        assert refused(self.rules(self.cost(2) * 0.999999), request(job), history, ledger)
        long_ago = self.entries(("plan", 50, (job.hash, 2)), *[("reserve", 40, job.hash)] * 2)
        assert refused(self.rules(0.01), request(job), history, long_ago) == ()

    def test_a_job_over_before_the_window_says_nothing_whatever_it_protected(self, history: History) -> None:
        ledger = self.entries(("plan", 50, ("old", 1)), ("reserve", 40, "old"))
        sampled = GaussianEvent(
            unit=UNIT_CLIENT, noise_multiplier=8.0, clip_norm=1.0, sampling_rate=0.5, count=1, rng="os"
        )
        limits = [Limit(unit=UNIT_CLIENT, epsilon=None, delta=DELTA).as_dict()]
        bodies = [{**entry.body, "events": [sampled.as_dict()], "limits": limits} for entry in ledger]
        ledger = [Entry(e.seq, e.site, e.time, e.kind, b, "", "", "") for e, b in zip(ledger, bodies, strict=True)]
        assert refused(self.rules(self.cost(2) * 1.01), request(), history, ledger) == ()
        assert refused(self.rules(self.cost(2) * 1.01, days=45), request(), history, ledger)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["admit", "go", "go", "settle"])), max_size=25))
    def test_no_window_ever_holds_more_than_is_allowed(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]]
    ) -> None:
        """Whatever is admitted and run when: of the reservations in any ten days, never more than six rounds' worth."""
        history = History(tmp_path_factory.getbasetemp() / "never-written.jsonl")
        own, day, written = self.rules(self.cost(6) * 1.000001), 0, list[tuple[str, float, Any]]()
        left: dict[str, int] = {}
        for pause, step in steps:
            day += pause
            running = [name for name, rounds in left.items() if rounds]
            if step == "admit":
                now = NOW + timedelta(days=day)
                if not refused(own, request(), history, self.entries(*written), now=now):
                    written.append(("plan", -day, (f"job {len(left)}", 2)))
                    left[f"job {len(left)}"] = 2
            elif running and step == "go":
                left[running[0]] -= 1
                written.append(("reserve", -day, running[0]))
            elif running:
                left[running[-1]] = 0
                written.append(("settle", -day, running[-1]))
        days = [-ago for kind, ago, _ in written if kind == "reserve"]
        assert all(sum(end - 10 < at <= end for at in days) <= 6 for end in days)


class TestStandingBudgets:
    @pytest.fixture
    def budget(self, tmp_path: Path) -> SiteBudget:
        key = IdentityKey.create(tmp_path / "identity.pem")
        budget = SiteBudget(Ledger(tmp_path / "records.jsonl", "north", key, clock=lambda: NOW))
        budget.open(rows=100, simulation=False)
        return budget

    def test_are_what_the_policy_says_of_the_data_set(self) -> None:
        both = {"epsilon": 3.0, "delta": 1e-4, "client_epsilon": 9.0, "client_delta": 1e-5}
        own = policy(data={"records": both, "open": {"unlimited": True}})
        assert own.budgets("records") == [
            Limit(epsilon=3.0, delta=1e-4),
            Limit(unit=UNIT_CLIENT, epsilon=9.0, delta=1e-5),
        ]
        assert own.budgets("open") == own.budgets("unlisted") == []

    @pytest.mark.parametrize(
        ("epsilon", "delta", "replaced"),
        [
            (3.0, 1e-4, False),
            (2.0, 1e-4, True),
            (3.0, 1e-5, True),
            (4.0, 1e-4, False),
            (3.0, 1e-3, False),
            (2.0, 1e-3, False),
            (4.0, 1e-5, False),
        ],
    )
    def test_only_a_stricter_one_replaces_what_stands(
        self, epsilon: float, delta: float, replaced: bool, budget: SiteBudget
    ) -> None:
        set_budgets(budget, [Limit(epsilon=3.0, delta=1e-4)])
        set_budgets(budget, [Limit(epsilon=epsilon, delta=delta)])
        assert len(budget.ledger.entries) == (3 if replaced else 2)
        standing = budget.accounts().budgets[(None, "record")]
        assert standing == (Limit(epsilon=epsilon, delta=delta) if replaced else Limit(epsilon=3.0, delta=1e-4))

    def test_one_that_was_lifted_stands_again_and_units_stand_apart(self, budget: SiteBudget) -> None:
        budget.set_budget(Limit(epsilon=None, delta=1e-9))
        limits = [Limit(epsilon=3.0, delta=1e-4), Limit(unit=UNIT_CLIENT, epsilon=9.0, delta=1e-4)]
        set_budgets(budget, limits)
        set_budgets(budget, limits)
        assert list(budget.accounts().budgets.values()) == limits
        assert len(budget.ledger.entries) == 4

    def test_jobs_of_a_ledger_count_together_against_the_policy(self, budget: SiteBudget, history: History) -> None:
        first, second = make_job(**PRIVATE), job_with({"name": "second"})
        plan = plan_of(first)
        alone, both = (epsilon_pld(repeated(plan.events[0], rounds), DELTA) for rounds in (2, 4))
        own = policy(data={"records": {"epsilon": (alone + both) / 2, "delta": DELTA}})
        assert refused(own, request(first), history, budget.ledger.entries) == ()
        budget.plan(job=first.hash, events=plan.events, rounds=plan.rounds, limits=plan.limits)
        assert refused(own, request(first), history, budget.ledger.entries) == ()
        assert refused(own, request(second), history, budget.ledger.entries) == ("data.records.epsilon",)

    def test_another_data_sets_ledger_is_refused(self, budget: SiteBudget, history: History) -> None:
        own = policy(data={"images": {"epsilon": 3.0, "delta": DELTA}})
        asked = request(job_with({"data": {"dataset": "images"}}))
        assert refused(own, asked, history, budget.ledger.entries) == ("data.images",)


class TestRates:
    def test_jobs_of_a_day_are_counted_and_one_that_goes_on_is_not_new(self, history: History) -> None:
        own, asked = policy(limits={"jobs_per_day": 2}), request()
        history.admit("1" * 64, now=NOW - timedelta(days=1))
        history.admit("2" * 64, now=NOW - timedelta(days=1) + timedelta(milliseconds=1))
        assert refused(own, asked, history) == ()
        history.admit("3" * 64, now=NOW)
        assert refused(own, asked, history) == ("limits.jobs_per_day",)
        history.admit(asked.job.hash, now=NOW - timedelta(days=3))
        assert refused(own, asked, history) == ()

    def test_rounds_of_an_hour_are_counted_over_all_jobs(self, history: History) -> None:
        own = policy(limits={"rounds_per_hour": 2})
        history.answer("1" * 64, 1, now=NOW - timedelta(hours=1))
        history.answer("1" * 64, 2, now=NOW - timedelta(minutes=59))
        own.check_round("2" * 64, now=NOW, history=history)
        history.answer("2" * 64, 1, now=NOW)
        with pytest.raises(PolicyRefused, match=r"a round of job 222222222222: limits\.rounds_per_hour: 2 ") as caught:
            own.check_round("2" * 64, now=NOW, history=history)
        assert caught.value.clauses == ("limits.rounds_per_hour",)
        own.check_round("2" * 64, now=NOW + timedelta(minutes=1), history=history)

    @pytest.mark.parametrize(
        ("hours", "zone", "answers"),
        [
            (["09:00", "17:00"], "UTC", range(9, 17)),
            (["20:00", "06:00"], "UTC", [20, 21, 22, 23, *range(6)]),
            (["00:00", "01:00"], "UTC", [0]),
            (["09:00", "17:00"], "Asia/Tokyo", range(8)),
            (None, "UTC", range(24)),
        ],
    )
    def test_answers_from_the_first_hour_until_just_before_the_second(
        self, hours: list[str] | None, zone: str, answers: Sequence[int], history: History
    ) -> None:
        own = policy(limits={"time_zone": zone, **({"hours": hours} if hours else {})})
        found = []
        for hour in range(24):
            first = NOW.replace(hour=hour).astimezone(timezone(timedelta(hours=-5)))
            said = [
                self.answered(own, moment, history) for moment in (first, first + timedelta(minutes=59, seconds=59))
            ]
            assert said[0] == said[1]
            found += [hour] * said[0]
        assert found == sorted(answers)

    @staticmethod
    def answered(own: Policy, now: datetime, history: History) -> bool:
        try:
            own.check_round("a" * 64, now=now, history=history)
        except PolicyRefused as error:
            return error.clauses != ("limits.hours",)
        return True


def toml(**changes: Any) -> str:
    return tomli_w.dumps({**ALLOWED, **changes})


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(toml(), encoding="utf-8-sig")
    assert Policy.load(path) == policy()


BROKEN: list[tuple[str | bytes, str]] = [
    ("", "a policy of no version, this program reads version 1"),
    ("purposes = []", "a policy of no version"),
    ("version = 2\nanything = 1", "a policy of version 2, this program reads version 1"),
    ("version = true", "a policy of version True"),
    ("version = 1.0", "a policy of version 1.0"),
    ('version = "1"', "a policy of version '1'"),
    ("version = 1\nversion = 1", "not valid TOML"),
    ("version = 1\n[tasks", "not valid TOML"),
    (b"version = 1 # \xff", "not a text file in UTF-8"),
    ("version = 1\npurpose = []", "unknown key purpose; did you mean purposes?"),
    ("version = 1\n[tasks]\nalow = []", "unknown key tasks.alow; did you mean tasks.allow?"),
    ("version = 1\n[tasks]\npurposes = []", "unknown key tasks.purposes; did you mean purposes?"),
    ("version = 1\n[data.x]\nepsilonn = 1", "unknown key data.x.epsilonn; did you mean data.x.epsilon?"),
    ("version = 1\nrounds_per_hours = 1", "unknown key rounds_per_hours; did you mean limits.rounds_per_hour?"),
    ("version = 1\nqqq = 1", "unknown key qqq; known here: version, purposes,"),
    ("version = 1\n[limits]\n'a\nb' = 1", "not valid TOML"),
    ('version = 1\n"a\\nb" = 1', "unknown key a b; known here"),
    ("version = 1\ndata = 1", "data: "),
    ("version = 1\n[data]\nx = 1", "data.x: should be a table, got 1"),
    ('version = 1\n[data."a b"]\nunlimited = true', "data.a b: 'a b' is not a name"),
    ("version = 1\n[data.x]", "data.x: give epsilon and delta, client_epsilon and client_delta, or unlimited = true"),
    ("version = 1\n[data.x]\nepsilon = 1.0", "data.x: delta goes with epsilon"),
    ("version = 1\n[data.x]\nunlimited = true\ndelta = 0.1", "data.x: delta goes with epsilon"),
    ("version = 1\n[data.x]\nclient_epsilon = 1.0", "data.x: client_epsilon and client_delta go together"),
    ("version = 1\n[data.x]\nepsilon = 1.0\ndelta = 0.1\nunlimited = true", "data.x: unlimited = true goes with"),
    ("version = 1\n[data.x]\nepsilon = 1.0\ndelta = 0.1\nperiod_days = 3", "data.x: period_days and period_epsilon"),
    ("version = 1\n[data.x]\nepsilon = 0.0\ndelta = 0.1", "data.x.epsilon: should be greater than 0, got 0.0"),
    ("version = 1\n[data.x]\nepsilon = inf\ndelta = 0.1", "data.x.epsilon: should be a finite number, got inf"),
    ("version = 1\n[data.x]\nepsilon = nan\ndelta = 0.1", "data.x.epsilon: "),
    ("version = 1\n[data.x]\nepsilon = 1.0\ndelta = 1.0", "data.x.delta: should be less than 1, got 1.0"),
    ("version = 1\n[data.x]\nunlimited = 1", "data.x.unlimited: should be a valid boolean, got 1"),
    ("version = 1\npackage = 'md5:00'", "package: 'md5:00' is not \"sha256:\" and 64 hexadecimal digits"),
    (f"version = 1\n[tasks.code]\n'a.b:C' = '{'a' * 64}'", "tasks.code.a.b:C: "),
    (f"version = 1\n[tasks.code]\nplain = '{HASH}'", "tasks.code.plain: 'plain' is not \"package.module:Name\""),
    ("version = 1\n[tasks]\nallow = ['a.b:C']", "tasks.allow: 'a.b:C' does not ship with fedchorus: list it under"),
    (f"version = 1\napprovers = ['{'A' * 64}']", "is not an Ed25519 public key"),
    (
        f"version = 1\napprovers = ['{ANN}', '{ANN}']\n[limits]\napprovals = 2",
        "limits.approvals is 2, but approvers has 1",
    ),
    (
        "version = 1\n[privacy]\nrequire = 'records'",
        "privacy.require: should be 'record', 'client', 'either' or 'none'",
    ),
    ("version = 1\n[privacy]\nallow_central = 'no'", "privacy.allow_central: should be a valid boolean, got 'no'"),
    ("version = 1\n[secure_aggregation]\nminimum_cohort = 0", "secure_aggregation.minimum_cohort: "),
    ("version = 1\n[limits]\njobs_per_day = -1", "limits.jobs_per_day: "),
    ("version = 1\n[limits]\nhours = ['9:00', '17:00']", "limits.hours.0: '9:00' is not a time of day such as"),
    ("version = 1\n[limits]\nhours = ['24:00', '17:00']", "limits.hours.0: "),
    ("version = 1\n[limits]\nhours = ['09:00']", "limits.hours"),
    ("version = 1\n[limits]\nhours = ['09:00', '09:00']", "limits: hours begin and end at the same time"),
    (
        "version = 1\n[limits]\ntime_zone = 'Mars/Olympus'",
        "limits: time_zone 'Mars/Olympus' is not known on this machine",
    ),
    ("version = 1\n[limits]\ntime_zone = '../UTC'", "limits: time_zone '../UTC' is not known on this machine"),
    ("version = 1\nqqq = 1\n[limits]\njobs_per_day = -1", "(and 1 more)"),
]


@pytest.mark.parametrize(("content", "said"), BROKEN, ids=lambda value: repr(value)[:60])
def test_a_broken_file_stops_the_client_with_one_line(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("make", "said"), [(Path.mkdir, "cannot be read"), (lambda path: None, "no policy file")])
def test_no_file_stops_the_client(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "policy.toml")
    with pytest.raises(PolicyError, match=said):
        Policy.load(tmp_path / "policy.toml")


class TestTemplate:
    def test_is_valid_and_refuses_a_job_until_its_purpose_and_data_are_listed(
        self, tmp_path: Path, history: History
    ) -> None:
        path = tmp_path / "policy.toml"
        path.write_text(POLICY_TEMPLATE)
        own = Policy.load(path)
        assert refused(own, request(), history) == ("purposes", "data.records")
        plain = request(job_with({**PLAIN, "secure_aggregation": None, "task": {"name": OWN}}))
        assert set(refused(own, plain, history)) == {
            "purposes",
            "data.records",
            "tasks.code",
            "privacy.require",
            "secure_aggregation.required",
        }
        path.write_text(
            POLICY_TEMPLATE.replace("purposes = []", 'purposes = ["training"]').replace(
                "#[data.records]\n#epsilon = 3.0\n#delta = 1e-5", "[data.records]\nepsilon = 3.0\ndelta = 1e-4"
            )
        )
        assert refused(Policy.load(path), request(), history) == ()

    def test_shows_every_clause_with_the_default_that_holds_without_it(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.toml"
        path.write_text(re.sub(r"^#(?=\S)", "", POLICY_TEMPLATE, flags=re.MULTILINE))
        whole = Policy.load(path)
        shown = {f"{'.'.join(table)}.{key}" for table, key in clauses_of(tomllib.loads(path.read_text()))}
        assert shown == {f"{'.'.join(table)}.{key}" for table, key in known_keys(PolicyFile)}
        assert whole.privacy == PrivacyRules()
        assert whole.secure_aggregation == SecureRules()
        told = ("approvals", "hours")  # Without them: what the invitation says; always.
        assert whole.limits.model_dump(exclude=set(told)) == Rates().model_dump(exclude=set(told))


def clauses_of(raw: Mapping[str, Any], table: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    found = [(table, key) for key in raw] if table != ("data",) else []
    for key, value in raw.items():
        if isinstance(value, dict) and key != "code":
            found += clauses_of(value, (*table, "*" if table == ("data",) else key))
    return found


def test_the_reference_names_every_clause_with_its_default() -> None:
    text = (ROOT / "docs" / "policy.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", text, flags=re.MULTILINE))
    sections = {"tasks", "strategies", "data", "privacy", "secure_aggregation", "evaluation", "limits"}
    assert rows.keys() == {key for _, key in known_keys(PolicyFile)} - sections
    for rules in (PrivacyRules(), SecureRules(), Rates()):
        for key, value in rules.model_dump(exclude_none=True).items():
            assert tomllib.loads(f"value = {rows[key].strip('` ')}")["value"] == value, key


def test_the_smallest_policy_in_the_reference_admits_a_job(tmp_path: Path, history: History) -> None:
    text = (ROOT / "docs" / "policy.md").read_text()
    path = tmp_path / "policy.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)[0])
    assert refused(Policy.load(path), request(), history) == ()

"""The site's policy: what its engineer allows, and the refusal of all else.

What the policy file does not allow is refused. It is read before the client connects: one that is missing, damaged or
of another version stops the client there. `Policy.check` runs before a job is admitted, `Policy.check_round` before
each of its rounds; both find every clause that is violated. What they say is for the site's own log: the caller gives
the server one constant answer for all refusals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from client.content import PACKAGE
from client.history import History
from client.policy_file import POLICY_TEMPLATE as POLICY_TEMPLATE
from client.policy_file import Code, PolicyFile, shown
from client.policy_file import PolicyError as PolicyError
from client.site import SitePlan
from privacy.budget import Accounts, JobAccount, Limit, SiteBudget
from privacy.errors import FedchorusError, JobError, UnsupportedEvent
from privacy.events import UNIT_CLIENT, UNIT_RECORD
from privacy.ledger import Entry
from privacy.secagg.session import Shape
from strategies.job import Job


class Policy(PolicyFile):
    """A site's policy: load it once, check each job and each round. `client.policy_file` has its clauses."""

    def check(self, request: JobRequest, *, ledger: Sequence[Entry], now: datetime, history: History) -> None:
        """Refuse a job that violates any clause: `PolicyRefused` names them all.

        `ledger` are the verified entries of the job's data set, none where it has no ledger yet; `now` names its zone.
        A job that was admitted before is measured like a new one, but counts once. Raises `UnsupportedEvent` for a
        ledger that nobody can add up: admit nothing then.
        """
        _must_name_its_zone(now)
        violations = [
            *self._what_runs(request.job, request.code),
            *self._data(request, ledger, now),
            *self._privacy(request),
            *self._secure(request),
            *self._evaluation(request.job),
            *self._limits(request, now, history),
        ]
        if violations:
            raise PolicyRefused(f"job {request.job.hash[:12]}", violations)

    def check_offer(self, request: JobRequest, *, now: datetime, history: History) -> None:
        """Refuse whatever can be refused before the job's code runs and its data are opened: all but its cost.

        `request.plan` is not known yet: it has no rows and no events. Raises `PolicyRefused`.
        """
        _must_name_its_zone(now)
        dataset = request.job.data.dataset
        violations = [
            *self._what_runs(request.job, request.code),
            *([] if dataset in self.data else [Violation(f"data.{dataset}", "the data set is not listed")]),
            *self._privacy(request),
            *self._secure(request),
            *self._evaluation(request.job),
            *self._limits(request, now, history),
        ]
        if violations:
            raise PolicyRefused(f"job {request.job.hash[:12]}", violations)

    def check_round(self, job: str, *, now: datetime, history: History) -> None:
        """Refuse a round outside `limits.hours` or above `limits.rounds_per_hour`. Raises `PolicyRefused`."""
        _must_name_its_zone(now)
        limits, violations = self.limits, []
        answered = history.rounds_since(now - timedelta(hours=1))
        if answered >= limits.rounds_per_hour:
            violations.append(Violation("limits.rounds_per_hour", f"{answered} rounds were answered within an hour"))
        if not limits.answers_at(now):
            violations.append(Violation("limits.hours", f"no round is answered at {now.astimezone(UTC):%H:%M} UTC"))
        if violations:
            raise PolicyRefused(f"a round of job {job[:12]}", violations)

    def budgets(self, dataset: str) -> list[Limit]:
        """The standing budgets of a data set, for `set_budgets`: none for one that is unlimited or not listed."""
        return self.data[dataset].limits() if dataset in self.data else []

    def _what_runs(self, job: Job, code: Mapping[str, str]) -> Iterator[Violation]:
        for table, name in (("tasks", job.task.name), ("strategies", job.strategy.name)):
            listed: Code = getattr(self, table)
            if ":" not in name:
                if name not in listed.allow:
                    yield Violation(f"{table}.allow", f"{shown(name)} is not listed")
            elif name not in listed.code:
                yield Violation(f"{table}.code", f"{shown(name)} is not listed")
            elif listed.code[name] != code.get(name):
                found = code.get(name, "nothing")
                yield Violation(f"{table}.code", f"{shown(name)} is installed with another content, {found}")
        if self.package not in (None, code.get(PACKAGE)):
            yield Violation("package", f"the installed fedchorus is {code.get(PACKAGE)}")
        if job.purpose not in self.purposes:
            yield Violation("purposes", f"{shown(job.purpose)} is not listed")

    def _data(self, request: JobRequest, ledger: Sequence[Entry], now: datetime) -> Iterator[Violation]:
        job, plan = request.job, request.plan
        table = f"data.{job.data.dataset}"
        if (rules := self.data.get(job.data.dataset)) is None:
            yield Violation(table, "the data set is not listed")
            return
        accounts = Accounts.of("this site", ledger)
        if accounts.dataset not in (None, job.data.dataset):
            yield Violation(table, f"the ledger is that of data set {accounts.dataset}")
        new = None if job.hash in accounts.jobs else _account(job, plan)
        bounds = [("epsilon" if b.unit == UNIT_RECORD else "client_epsilon", accounts, b) for b in rules.limits()]
        if rules.period_days is not None and rules.delta is not None:
            recent = _since(now - timedelta(days=rules.period_days), ledger, accounts)
            bounds.append(("period_epsilon", recent, Limit(epsilon=rules.period_epsilon, delta=rules.delta)))
        for key, before, bound in bounds:
            assert bound.epsilon is not None
            clause, cost = f"{table}.{key}", _cost(before, new, bound)
            if not plan.events:
                yield Violation(clause, "the job charges nothing to this site's ledger, so no limit could hold it")
            elif not cost <= bound.epsilon:
                reached = "no epsilon can be stated with it" if cost == float("inf") else f"it would reach {cost:.4g}"
                yield Violation(
                    clause, f"{reached} at delta {bound.delta:g} ({bound.unit} level), not {bound.epsilon:g}"
                )

    def _privacy(self, request: JobRequest) -> Iterator[Violation]:
        job, plan, rules = request.job, request.plan, self.privacy
        record, client, central = job.privacy.record, job.privacy.client, job.privacy.central
        has = {"record": record is not None, "client": client is not None, "none": True}
        if not has.get(rules.require, record is not None or client is not None):
            yield Violation("privacy.require", f"the job gives no such privacy, {rules.require} is required")
        if job.simulation.noise != "os" or any(event.rng != "os" for event in plan.events):
            yield Violation("privacy", "the job's noise is seeded, which protects nobody")
        if central is not None and not rules.allow_central:
            yield Violation("privacy.allow_central", "the server would add the noise, after it saw the sum without it")
        if client is not None and client.adaptive_clip is not None and not rules.allow_adaptive_clip:
            yield Violation("privacy.allow_adaptive_clip", "the server would move the clip norm from round to round")
        promised = [(limit, _cost(Accounts(""), _account(job, plan), limit)) for limit in plan.limits]
        noise = [(event.noise_multiplier, event.clip_norm) for event in plan.events]
        if central is not None:  # This site is not charged for it: what counts is what the job states.
            stated = Limit(unit=UNIT_CLIENT, epsilon=central.epsilon, delta=central.delta)
            promised.append((stated, central.epsilon or float("inf")))
            noise.append((central.noise_multiplier or 0.0, central.clip_norm))
        for limit, cost in promised:
            if not cost <= rules.largest_epsilon:
                said = "none can be stated for the job" if cost == float("inf") else f"the job costs {cost:.4g}"
                yield Violation(
                    "privacy.largest_epsilon", f"{said} ({limit.unit} level), not {rules.largest_epsilon:g}"
                )
            if limit.delta > rules.largest_delta:
                why = f"the job's is {limit.delta:g} ({limit.unit} level), not {rules.largest_delta:g}"
                yield Violation("privacy.largest_delta", why)
        for multiplier, clip_norm in noise:
            if multiplier < rules.minimum_noise_multiplier:
                said = f"the job's is {multiplier:.4g}" if multiplier else "the job leaves it to the server"
                why = f"{said}, not {rules.minimum_noise_multiplier:g}"
                yield Violation("privacy.minimum_noise_multiplier", why)
            if clip_norm > rules.largest_clip_norm:
                yield Violation(
                    "privacy.largest_clip_norm", f"the job's is {clip_norm:g}, not {rules.largest_clip_norm:g}"
                )

    def _secure(self, request: JobRequest) -> Iterator[Violation]:
        secure, cohort, rules = request.job.secure_aggregation, request.job.cohort, self.secure_aggregation
        if secure is None:
            if rules.required:
                yield Violation("secure_aggregation.required", "the server would see this site's update by itself")
            return
        if secure.colluders < rules.minimum_colluders:
            why = f"the job withstands {secure.colluders}, not {rules.minimum_colluders}"
            yield Violation("secure_aggregation.minimum_colluders", why)
        smallest = min(cohort.size or request.sites, request.sites) // secure.groups
        if request.job.regions:
            smallest = min(len(region) for region in request.job.regions.values())
        try:
            shape = Shape.of(
                smallest,
                colluders=secure.colluders,
                dropouts=secure.dropouts,
                regular=secure.graph == "regular",
                least=cohort.minimum or 1,
            )
        except JobError as error:
            yield Violation("secure_aggregation.minimum_cohort", str(error))
            return
        if shape.minimum < rules.minimum_cohort:
            why = f"the job would show a sum of {shape.minimum} sites, not {rules.minimum_cohort}"
            yield Violation("secure_aggregation.minimum_cohort", why)

    def _evaluation(self, job: Job) -> Iterator[Violation]:
        choice, rules = job.evaluation, self.evaluation
        if choice is None:
            return
        if job.secure_aggregation is None and not rules.allow_plain:
            yield Violation("evaluation.allow_plain", "the server would see this site's figures by themselves")
        if choice.sites is not None and not rules.allow_site_figures:
            yield Violation("evaluation.allow_site_figures", "the job counts sites by their own figures")
        if strange := sorted(set(choice.groups or {}) - set(rules.groups)):
            yield Violation("evaluation.groups", f"{shown(strange[0])} is not listed")
        if choice.groups and job.privacy.record is None and choice.smallest < rules.smallest_group:
            why = f"the job's smallest is {choice.smallest}, not {rules.smallest_group}"
            yield Violation("evaluation.smallest_group", why)

    def _limits(self, request: JobRequest, now: datetime, history: History) -> Iterator[Violation]:
        job, limits = request.job, self.limits
        admitted = history.jobs_since(now - timedelta(days=1))
        if admitted >= limits.jobs_per_day and not history.knows(job.hash):
            yield Violation("limits.jobs_per_day", f"{admitted} jobs were admitted within 24 hours")
        rounds = max(job.training.rounds, request.plan.rounds)
        if rounds > limits.rounds_per_job:
            yield Violation("limits.rounds_per_job", f"the job has {rounds}, not {limits.rounds_per_job}")
        if request.parameters > limits.largest_model:
            why = f"the model has {request.parameters} parameters, not {limits.largest_model}"
            yield Violation("limits.largest_model", why)
        counted = request.approvers if self.approvers is None else frozenset(self.approvers)
        # Whoever lists approvers wants one of them to sign.
        wanted = limits.approvals if limits.approvals is not None else int(self.approvers is not None)
        # Both must hold, so that what a site adds never takes away what its federation asks for.
        for keys, least, whose in (
            (counted, wanted, "this site counts"),
            (request.approvers, request.approvals_required, "the federation counts"),
        ):
            if (signed := len(request.approvals & keys)) < least:
                yield Violation("limits.approvals", f"{signed} approvers that {whose} have signed, not {least}")


class Violation(NamedTuple):
    clause: str
    why: str


class PolicyRefused(FedchorusError):
    """The policy allows it not. `clauses` are all that are violated, as the file calls them; `clause` is the first."""

    def __init__(self, what: str, violations: Sequence[Violation]) -> None:
        self.clauses = tuple(violation.clause for violation in violations)
        said = "; ".join(f"{violation.clause}: {violation.why}" for violation in violations)
        super().__init__(" ".join(f"this site's policy refuses {what}: {said}".split()))

    @property
    def clause(self) -> str:
        return self.clauses[0]


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What a job asks of this site, as the site worked it out for itself.

    `parameters` is the model's size, `sites` that of the roster, `code` what `client.content.content_of` says,
    `approvals` the public keys (hex) whose signatures for this very job were verified. `approvers` and
    `approvals_required` are the federation's own, from the invitation.
    """

    job: Job
    parameters: int
    sites: int
    plan: SitePlan
    code: Mapping[str, str]
    approvals: frozenset[str]
    approvers: frozenset[str]
    approvals_required: int


def set_budgets(budget: SiteBudget, limits: Sequence[Limit]) -> None:
    """Make `limits` (`Policy.budgets`) standing budgets of all purposes in the ledger, which then enforces them itself.

    One that stands there is replaced by one that is as strict in epsilon and delta and stricter in one of them. Any
    other stays, so that a looser policy file lifts nothing that was signed: `fedchorus budget --set` does.
    """
    standing = budget.accounts().budgets
    for limit in limits:
        before = standing.get((None, limit.unit))
        if before is None or before.epsilon is None or (limit != before and _within(limit, before)):
            budget.set_budget(limit)


def _must_name_its_zone(now: datetime) -> None:
    if now.tzinfo is None:
        raise ValueError("a time without its zone")


def _within(limit: Limit, before: Limit) -> bool:
    assert limit.epsilon is not None
    assert before.epsilon is not None
    return limit.epsilon <= before.epsilon and limit.delta <= before.delta


def _account(job: Job, plan: SitePlan) -> JobAccount:
    return JobAccount(job.hash, job.purpose, plan.rounds, plan.events, None, plan.limits)


def _cost(before: Accounts, new: JobAccount | None, limit: Limit) -> float:
    """What `new` and all of `before` cost together at the limit's unit and delta; infinite if nobody can say."""
    try:
        return (before if new is None else before.with_plan(new)).epsilon(limit.unit, limit.delta)
    except UnsupportedEvent:
        return float("inf")


def _since(moment: datetime, entries: Sequence[Entry], accounts: Accounts) -> Accounts:
    """Of the `accounts` of all `entries`: what was reserved after `moment`, and what plans may still reserve.

    Guarantee: if that and a new plan keep a limit at every admission, the reservations within any window as long as
    from `moment` to the admission keep it: those before the last admission in it were counted there, and those after
    it come from plans that were.
    """
    recent = Accounts.of("this site", [entry for entry in entries if not _reserved_by(entry, moment)])
    for job, whole in accounts.jobs.items():
        if (own := recent.jobs.get(job)) is not None:
            own.rounds -= whole.used - own.used
            if not own.used and own.rounds <= 0:  # Over before the window, whatever it protected.
                del recent.jobs[job]
    return recent


def _reserved_by(entry: Entry, moment: datetime) -> bool:
    """Whether it is a reservation at or before `moment`. One whose time says nothing never is: it counts."""
    try:
        return entry.kind == "reserve" and datetime.fromisoformat(entry.time) <= moment
    except (ValueError, TypeError):
        return False

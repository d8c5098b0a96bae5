"""A site's budget as its ledger keeps it: plan once, reserve before the data are touched, commit what left, settle.

A ledger is one data set's. Its holder may set budgets, per unit of privacy, for one purpose or for all of them
together. The rules, which `Accounts` states once, for the site that enforces them under the ledger's lock and for the
auditor who replays them:

1. A job is admitted once, as a `plan`: the events of each of at most so many rounds, or, where they will be chosen on
   the way, a Rényi bound at one order fixed now. The job must keep its own limits, and everything charged, whatever
   admitted plans may still charge, and the new plan must together fit every budget of its purpose and of all
   (`BudgetExceeded`), at the budget's unit: a job that bounds nothing for a client fits no budget of clients.
   A fixed plan may stop early under any accountant. One with adaptive events is bounded by its filter alone (Feldman
   and Zrnic 2021, arXiv:2008.11193), and makes the whole ledger's figure a Rényi one.
2. A round is reserved before data are touched. From then on it is spent: a crash refunds nothing.
3. Never more than the plan holds, counted across restarts: the round beyond is refused.
4. A commit closes one reservation of the same round, once, and says what left by its hash. The one reservation of a
   whole training with correlated noise takes a commit a round.
5. A settled job reserves no more; what it set aside and never reserved is free again.

Durable before every return; safe between processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from privacy.accountant import epsilon_pld, rdp_at, rdp_to_epsilon
from privacy.distributed import MOST_ORDER
from privacy.errors import BudgetExceeded, LedgerError, UnsupportedEvent
from privacy.events import UNIT_RECORD, UNITS, CorrelatedEvent, Event, event_from_dict, of_unit, repeated
from privacy.ledger import Entry, Head, Ledger, LedgerView

Events = tuple[Event, ...]
"""What one round releases."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """At most `epsilon` (None: anything that can be stated) at `delta`, for one unit of privacy."""

    unit: str = UNIT_RECORD
    epsilon: float | None
    delta: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UnsupportedEvent(f"unit must be {' or '.join(UNITS)}, got {self.unit!r}")
        if not 0 < self.delta < 1:
            raise UnsupportedEvent(f"delta must lie between 0 and 1, got {self.delta!r}")
        if self.epsilon is not None and not 0 < self.epsilon < float("inf"):
            raise UnsupportedEvent(f"epsilon must be a finite number > 0, got {self.epsilon!r}")

    def as_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "epsilon": self.epsilon, "delta": self.delta}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Limit:
        return cls(unit=record["unit"], epsilon=record["epsilon"], delta=record["delta"])


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Events chosen on the way may add up to `rdp` at the whole order `order`, for one unit, and no further."""

    unit: str = UNIT_RECORD
    order: int
    rdp: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UnsupportedEvent(f"unit must be {' or '.join(UNITS)}, got {self.unit!r}")
        if type(self.order) is not int or not 2 <= self.order <= MOST_ORDER:
            raise UnsupportedEvent(f"a filter's order must be a whole number in [2, {MOST_ORDER}], got {self.order!r}")
        if not 0 < self.rdp < float("inf"):
            raise UnsupportedEvent(f"a filter's rdp must be a finite number > 0, got {self.rdp!r}")

    def as_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "order": self.order, "rdp": self.rdp}


@dataclass
class JobAccount:
    """One job in a ledger: what it planned and what it has reserved so far."""

    job: str
    purpose: str
    rounds: int  # 0: it reserved without a plan, which counts all the same.
    events: Events  # Of one round; empty where they are chosen on the way.
    filter: Filter | None
    limits: tuple[Limit, ...]
    groups: Counter[Events] = field(default_factory=Counter)
    rdp: list[float] = field(default_factory=list)  # Of each round reserved under a filter, at its order.
    settled: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> JobAccount:
        """Read a plan's body. Raises `UnsupportedEvent` for one that would bound nothing."""
        kept = body["filter"]
        account = cls(
            job=body["job"],
            purpose=body["purpose"],
            rounds=body["rounds"],
            events=_events(body["events"]),
            filter=None if kept is None else Filter(unit=kept["unit"], order=kept["order"], rdp=kept["rdp"]),
            limits=tuple(Limit.from_dict(limit) for limit in body["limits"]),
        )
        if type(account.rounds) is not int or account.rounds < 1:
            raise UnsupportedEvent(f"plan: rounds must be a whole number > 0, got {account.rounds!r}")
        if bool(account.events) == (account.filter is not None):
            raise UnsupportedEvent(f"plan: expected either events or a filter, got {len(account.events)} events")
        units = {e.unit for e in account.events} if account.filter is None else {account.filter.unit}
        limited = [limit.unit for limit in account.limits]
        if len(limited) > len(set(limited)) or not units <= set(limited):
            raise UnsupportedEvent(f"plan: limits must name each of {sorted(units)} once, got {limited}")
        return account

    @property
    def used(self) -> int:
        return self.groups.total()

    def charge(self, events: Events) -> None:
        if self.filter is not None:  # First: it may raise, and a round is charged whole or not at all.
            self.rdp.append(rdp_at(of_unit(events, self.filter.unit), self.filter.order))
        self.groups[events] += 1

    def spent(self, unit: str) -> list[Event]:
        return [e for group, times in self.groups.items() for one in of_unit(group, unit) for e in repeated(one, times)]

    def set_aside(self, unit: str) -> list[Event]:
        """What a fixed plan may still reserve."""
        left = 0 if self.settled else self.rounds - self.used
        return [e for one in of_unit(self.events, unit) for e in repeated(one, left)]

    def filtered(self, order: int, *, spent_only: bool) -> float:
        """The Rényi bound at `order` <= the filter's own of an adaptive job."""
        assert self.filter is not None
        if self.settled or spent_only:
            return rdp_at(self.spent(self.filter.unit), order)
        return self.filter.rdp  # At a higher order: Rényi divergences grow with the order.


class Accounts:
    """What a ledger's entries add up to, and which rule a further entry would break."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.dataset: str | None = None
        self.jobs: dict[str, JobAccount] = {}
        self.budgets: dict[tuple[str | None, str], Limit] = {}  # By purpose (None: all together) and unit.
        # By entry: job, round, model, and where it takes a commit a round, the last round.
        self._reserved: dict[int, tuple[str, int, str | None, int]] = {}
        self._committed: set[tuple[int, int]] = set()
        self._outputs: dict[tuple[str, int, str | None], str] = {}  # By job, round and model.

    @classmethod
    def of(cls, site: str, entries: Iterable[Entry]) -> Accounts:
        """Raises `UnsupportedEvent` for an event that nobody can bound."""
        accounts = cls(site)
        for entry in entries:
            accounts.add(entry)
        return accounts

    def add(self, entry: Entry) -> None:
        body = entry.body
        match entry.kind:
            case "open":
                self.dataset = body["dataset"]
            case "budget":
                self.budgets[(body["purpose"], body["unit"])] = Limit.from_dict(body)
            case "plan":
                self.jobs.setdefault(body["job"], JobAccount.of(body))
            case "reserve":
                events = _events(body["events"])
                self.jobs.setdefault(body["job"], JobAccount(body["job"], "", 0, (), None, ())).charge(events)
                last = max((event.rounds for event in events if isinstance(event, CorrelatedEvent)), default=0)
                self._reserved[entry.seq] = (body["job"], body["round"], body.get("model"), last)
            case "commit":
                self._committed.add((body["reserve"], body["round"]))
                if body["reserve"] in self._reserved:
                    job, _, model, _ = self._reserved[body["reserve"]]
                    self._outputs[(job, body["round"], model)] = body["output"]
            case "settle" if body["job"] in self.jobs:
                self.jobs[body["job"]].settled = True

    def breach(self, kind: str, body: Mapping[str, Any]) -> str | None:
        """Say which of rules 2 to 5 an entry would break that is added now; None if it breaks none."""
        if kind == "reserve":
            return self._reserve_breach(body)
        if kind == "commit":
            return self._commit_breach(body)
        if kind == "settle" and (body["job"] not in self.jobs or self.jobs[body["job"]].settled):
            return "settles a job that is not under way"
        if kind == "plan" and body["job"] in self.jobs:
            return "plans a job a second time"
        return "a second opening entry" if kind == "open" and self.dataset is not None else None

    def _reserve_breach(self, body: Mapping[str, Any]) -> str | None:
        account = self.jobs.get(body["job"])
        if account is None or not account.rounds:
            return "reserves a round of a job that was never planned"
        if account.settled:
            return "reserves a round of a job that was settled"
        if account.used >= account.rounds:
            return f"reserves more than the plan's {account.rounds} rounds"
        events = _events(body["events"])
        if account.filter is None:
            return None if events == account.events else "reserves another event than its plan states"
        if not events:
            return "reserves nothing: where events are chosen on the way, each round must name its own"
        bound = account.filter
        total = math.fsum([*account.rdp, rdp_at(of_unit(events, bound.unit), bound.order)])
        if total > bound.rdp * (1 + 1e-12):
            return f"reserves more than its filter holds ({total:.4g} of {bound.rdp:.4g} at order {bound.order})"
        return None

    def _commit_breach(self, body: Mapping[str, Any]) -> str | None:
        seq = body["reserve"]
        if seq not in self._reserved:
            return "commits a release that was never reserved"
        job, round_number, _, last = self._reserved[seq]
        if job != body["job"] or (body["round"] != round_number and not last):
            return f"commits another round than entry {seq} reserved"
        if (seq, body["round"]) in self._committed:
            return f"commits entry {seq} a second time: two releases, one charge"
        if last and not (type(body["round"]) is int and 1 <= body["round"] <= last):
            return f"commits round {body['round']} of a training whose noise is for {last}"
        return None

    def epsilon(
        self,
        unit: str,
        delta: float,
        *,
        purpose: str | None = None,
        spent_only: bool = False,
        jobs: Callable[[str], bool] = lambda job: True,
    ) -> float:
        """What the ledger's jobs cost the `unit` at `delta`: reserved and, unless `spent_only`, set aside.

        0 where nothing was reserved, infinite where a job bounds nothing for that unit.
        """
        chosen = [
            account
            for account in self.jobs.values()
            if jobs(account.job) and purpose in (None, account.purpose)
            if account.used or not (spent_only or account.settled)
        ]
        adaptive = [account for account in chosen if account.filter is not None]
        if any(account.filter is not None and account.filter.unit != unit for account in adaptive):
            return float("inf")
        try:
            fixed = [
                event
                for a in chosen
                if a.filter is None
                for event in [*a.spent(unit), *([] if spent_only else a.set_aside(unit))]
            ]
        except UnsupportedEvent:
            return float("inf")
        if not adaptive:
            return epsilon_pld(fixed, delta)
        order = min(account.filter.order for account in adaptive if account.filter is not None)
        total = rdp_at(fixed, order) + sum(account.filtered(order, spent_only=spent_only) for account in adaptive)
        return rdp_to_epsilon(order, total, delta) if total else 0.0

    def spent(self, unit: str) -> list[Event]:
        """Every event that was reserved, as it counts for the `unit`, whether or not it was committed."""
        return [event for account in self.jobs.values() for event in account.spent(unit)]

    def output_of(self, *, job: str, round_number: int, model: str) -> str | None:
        """The hash of what was committed last for this round of this job and this model."""
        return self._outputs.get((job, round_number, model))

    def with_plan(self, account: JobAccount) -> Accounts:
        """What these accounts' jobs would be with one more."""
        trial = Accounts(self.site)
        trial.jobs, trial.budgets = {**self.jobs, account.job: account}, self.budgets
        return trial

    def check_affordable(self, account: JobAccount) -> None:
        """Rule 1 for a job that is not admitted yet. Raises `BudgetExceeded`, with how many of its rounds would fit."""
        for bound in self._bounds_on(account):
            bound.check(account)

    def rounds_that_fit(self, account: JobAccount) -> int:
        """How many of the rounds of a job that is not admitted yet rule 1 would admit."""
        bounds = self._bounds_on(account)
        return _most(account.rounds, lambda rounds: all(bound.admits(account, rounds) for bound in bounds))

    def _bounds_on(self, account: JobAccount) -> list[_Bound]:
        """The job's own limits, each over this job alone, and the holder's budgets, each over all that it covers."""
        own = [_Bound(Accounts(self.site), limit, None, "the job's limit is") for limit in account.limits]
        return own + [
            _Bound(self, limit, purpose, f"the data holder's budget for {named(purpose)} is")
            for (purpose, _), limit in self.budgets.items()
            if purpose in (None, account.purpose) and limit.epsilon is not None
        ]


@dataclass(frozen=True)
class _Bound:
    """What one limit says about one more job after those of `before`."""

    before: Accounts
    limit: Limit
    purpose: str | None
    what: str

    def cost(self, account: JobAccount, rounds: int) -> float:
        trial = self.before.with_plan(replace(account, rounds=rounds))
        return trial.epsilon(self.limit.unit, self.limit.delta, purpose=self.purpose)

    def admits(self, account: JobAccount, rounds: int) -> bool:
        try:
            cost = self.cost(account, rounds)
        except UnsupportedEvent:
            return False
        return cost < float("inf") and (self.limit.epsilon is None or cost <= self.limit.epsilon)

    def check(self, account: JobAccount) -> None:
        if self.admits(account, account.rounds):
            return
        site, rounds, limit = self.before.site, account.rounds, self.limit
        try:
            whole = self.cost(account, rounds)
        except UnsupportedEvent as error:
            raise BudgetExceeded(
                f"{site}: no epsilon can be stated for {rounds} rounds ({error}); raise the noise"
            ) from None
        if whole == float("inf"):
            raise BudgetExceeded(
                f"{site}: no {limit.unit}-level epsilon can be stated for {rounds} rounds and what was planned before; "
                f"protect every {limit.unit} in each job that one limit binds"
            )
        fits = 0 if account.filter is not None else _most(rounds, lambda n: self.admits(account, n))
        advice = "not one round fits: raise the noise multiplier or sample fewer records"
        if account.filter is not None:
            advice = "lower the filter's rdp"
        elif fits:
            advice = f"at most {fits} rounds fit: lower training.rounds to {fits} or raise the noise multiplier"
        raise BudgetExceeded(
            f"{site}: {rounds} rounds would cost epsilon {whole:.4g} at delta {limit.delta:g} "
            f"({limit.unit} level), {self.what} {limit.epsilon:g}; {advice}"
        )


def named(purpose: str | None) -> str:
    return "all purposes" if purpose is None else f"purpose {purpose!r}"


class LedgerAccounts:
    """The accounts of a ledger that grows: `now` reads and adds only what is new."""

    def __init__(self, ledger: LedgerView) -> None:
        self._ledger, self._accounts, self._known = ledger, Accounts(ledger.site), 0

    def now(self) -> Accounts:
        self._ledger.refresh()
        return self.after(self._ledger.entries)

    def after(self, entries: tuple[Entry, ...]) -> Accounts:
        """The accounts of `entries`, which begin with all that were added before."""
        for entry in entries[self._known :]:
            self._accounts.add(entry)
            self._known += 1  # One by one: an entry that raises must not charge those before it a second time.
        return self._accounts


class SiteBudget:
    """The state machine over one site's ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._accounts = LedgerAccounts(ledger)

    def accounts(self) -> Accounts:
        """What the ledger adds up to now."""
        return self._accounts.now()

    def open(self, *, rows: int, simulation: bool, dataset: str = "records") -> None:
        """Write the first entry of a new ledger; on an existing one, check that it is of the same kind and data set."""
        self.ledger.refresh()
        if not self.ledger.entries:
            body = {"public_key": self.ledger.public_hex, "rows": rows, "simulation": simulation, "dataset": dataset}
            self.ledger.append("open", body, admit=_must_be_empty)
        first = self.ledger.entries[0]
        if first.kind != "open" or first.body.get("simulation") is not simulation:
            raise LedgerError(
                f"ledger of {self.ledger.site}: a simulation's ledger and a real one never continue each other"
            )
        if first.body.get("dataset") != dataset:
            raise LedgerError(
                f"ledger of {self.ledger.site}: it is that of data set {first.body.get('dataset')!r}, not {dataset!r}"
            )

    def set_budget(self, limit: Limit, *, purpose: str | None = None) -> None:
        """Let the jobs of one purpose, or of all together (None), cost at most `limit` from now on.

        A budget below what is spent refuses every further plan; what was admitted goes on. An epsilon of None lifts
        the budget.
        """
        self.ledger.append("budget", {"purpose": purpose, **limit.as_dict()})

    def plan(
        self, *, job: str, events: Sequence[Event], rounds: int, limits: Sequence[Limit], purpose: str = "training"
    ) -> None:
        """Admit a job (named by its hash) that releases `events` in each of at most `rounds` rounds.

        `limits`: what this job may cost, one for each unit that its events protect. Admitting the same plan again
        (a resumed run) changes nothing. Raises `BudgetExceeded` with the largest number of rounds that fits.
        """
        self._plan(job, [event.as_dict() for event in events], rounds, None, limits, purpose)

    def plan_adaptive(
        self, *, job: str, rounds: int, bound: Filter, limits: Sequence[Limit], purpose: str = "training"
    ) -> None:
        """Admit a job whose events will be chosen on the way, each given to `reserve`, as far as `bound` holds them."""
        self._plan(job, [], rounds, bound, limits, purpose)

    def _plan(
        self, job: str, events: list[Any], rounds: int, bound: Filter | None, limits: Sequence[Limit], purpose: str
    ) -> None:
        body = {
            "job": job,
            "purpose": purpose,
            "events": events,
            "rounds": rounds,
            "filter": None if bound is None else bound.as_dict(),
            "limits": [limit.as_dict() for limit in limits],
        }
        account = JobAccount.of(body)

        def admit(entries: tuple[Entry, ...]) -> None:
            accounts = self._accounts.after(entries)
            if job in accounts.jobs:
                raise LedgerError(f"ledger of {self.ledger.site}: job {job[:12]} was planned before, differently")
            accounts.check_affordable(account)

        def admitted() -> bool:
            return any(entry.kind == "plan" and entry.body == body for entry in self.ledger.entries)

        self.ledger.refresh()
        if not admitted():
            try:
                self.ledger.append("plan", body, admit=admit)
            except LedgerError:
                if not admitted():  # Another process made the very same plan in the meantime.
                    raise

    def reserve(
        self,
        *,
        job: str,
        round_number: int,
        model: str,
        witness: str | None,
        events: Sequence[Event] | None = None,
        clip_norm: float | None = None,
    ) -> Entry:
        """Charge round `round_number`; the entry is on disk when this returns, before any data are touched.

        `model` is the SHA-256 of the model that was received; `witness` the digest of all sites' heads after the
        round before, as the server sent it; `events` are given for an adaptive plan alone, and `clip_norm` where it
        moves from round to round. Raises `BudgetExceeded` when what was planned is used up.
        """
        account = self.accounts().jobs.get(job)
        if account is None:
            raise LedgerError(f"ledger of {self.ledger.site}: a round of job {job[:12]} has no plan")
        chosen = [event.as_dict() for event in (account.events if events is None else events)]
        body = {"job": job, "round": round_number, "model": model, "witness": witness, "events": chosen}
        if clip_norm is not None:
            body["clip_norm"] = clip_norm

        def admit(entries: tuple[Entry, ...]) -> None:
            why = self._accounts.after(entries).breach("reserve", body)
            if why is not None:
                raise BudgetExceeded(f"{self.ledger.site}: round {round_number} {why} (a crash spends its own)")

        return self.ledger.append("reserve", body, admit=admit)

    def commit(self, reservation: Entry, *, output: str, round_number: int | None = None) -> Head:
        """Record that the vector with SHA-256 `output` leaves under `reservation`; durable before the reply."""
        foreign = LedgerError(f"ledger of {self.ledger.site}: entry {reservation.seq} is no reservation of its own")
        if reservation.kind != "reserve":
            raise foreign
        body = {
            "job": reservation.body["job"],
            "round": reservation.body["round"] if round_number is None else round_number,
            "reserve": reservation.seq,
            "output": output,
        }

        def admit(entries: tuple[Entry, ...]) -> None:
            if reservation not in entries[reservation.seq : reservation.seq + 1]:
                raise foreign
            why = self._accounts.after(entries).breach("commit", body)
            if why is not None:
                raise LedgerError(f"ledger of {self.ledger.site}: {why}")

        return self.ledger.append("commit", body, admit=admit).head

    def settle(self, job: str) -> None:
        """End a job: it reserves no more, and what it set aside is free again. Settling twice changes nothing."""
        account = self.accounts().jobs.get(job)
        if account is None:
            raise LedgerError(f"ledger of {self.ledger.site}: there is no job {job[:12]} to settle")

        def admit(entries: tuple[Entry, ...]) -> None:
            if self._accounts.after(entries).jobs[job].settled:
                raise LedgerError(f"ledger of {self.ledger.site}: job {job[:12]} was settled before")

        try:
            self.ledger.append("settle", {"job": job}, admit=admit)
        except LedgerError:
            if not account.settled:
                raise

    def committed(self, *, job: str, round_number: int, model: str) -> str | None:
        """The hash of what already left in this round for this very model, if anything did.

        Sending the same bytes again releases nothing new, so it costs nothing.
        """
        return self.accounts().output_of(job=job, round_number=round_number, model=model)


def charged(entries: Iterable[Entry]) -> list[Event]:
    """Every event that `entries` reserved, of either unit, whether or not it was committed."""
    return [event for entry in entries if entry.kind == "reserve" for event in _events(entry.body["events"])]


def _events(records: Iterable[Mapping[str, Any]]) -> Events:
    return tuple(event_from_dict(record) for record in records)


def _most(highest: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to `highest` that fits, where whatever is smaller fits too."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _must_be_empty(entries: tuple[Entry, ...]) -> None:
    if entries:
        raise LedgerError("the ledger was opened by another process at the same moment; try again")

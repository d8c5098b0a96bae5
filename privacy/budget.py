"""A site's budget as its ledger keeps it: plan once, reserve before the data are touched, commit what left.

The rules, each of which `SiteBudget` enforces under the ledger's lock:

1. A job is admitted once, as a `plan`: one event per round, at most so many rounds. Everything the ledger already
   charged, whatever earlier plans may still charge and the whole plan must together fit the budget, or the plan is
   refused (`BudgetExceeded`) and nothing is written.
   The plan is fixed, so stopping early is allowed and any accountant is valid (Feldman and Zrnic 2021 need their
   filter only where parameters are adaptive).
2. A round is reserved before data are touched. From then on it is spent: a crash refunds nothing.
3. Never more reservations than the plan has rounds, counted across restarts: the round beyond is refused.
4. A commit closes one reservation of the same round, once, and says what left by its hash.

Durable before every return; safe between processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from privacy.accountant import epsilon_pld, largest_count
from privacy.errors import BudgetExceeded, LedgerError, UnsupportedEvent
from privacy.events import GaussianEvent, event_from_dict
from privacy.ledger import Entry, Head, Ledger


class SiteBudget:
    """The state machine over one site's ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def open(self, *, rows: int, simulation: bool) -> None:
        """Write the first entry of a new ledger; on an existing one, check that it is of the same kind."""
        self.ledger.refresh()
        if not self.ledger.entries:
            self.ledger.append(
                "open",
                {"public_key": self.ledger.public_hex, "rows": rows, "simulation": simulation},
                admit=_must_be_empty,
            )
        first = self.ledger.entries[0]
        if first.kind != "open" or first.body.get("simulation") is not simulation:
            raise LedgerError(
                f"ledger of {self.ledger.site}: a simulation's ledger and a real one never continue each other"
            )

    def plan(self, *, job: str, event: GaussianEvent, rounds: int, epsilon: float | None, delta: float) -> None:
        """Admit a job (named by its hash) that releases `event` in each of at most `rounds` rounds.

        `epsilon` at `delta` is the budget; None means that the site set no limit. Admitting the same plan again
        (a resumed run) changes nothing. Raises `BudgetExceeded` with the largest number of rounds that fits.
        """
        body = {"job": job, "event": event.as_dict(), "rounds": rounds, "epsilon": epsilon, "delta": delta}

        def admit(entries: tuple[Entry, ...]) -> None:
            if any(entry.kind == "plan" and entry.body["job"] == job for entry in entries):
                raise LedgerError(f"ledger of {self.ledger.site}: job {job[:12]} was planned before, differently")
            check_affordable(
                event, rounds=rounds, epsilon=epsilon, delta=delta, spent=owed(entries), site=self.ledger.site
            )

        def admitted() -> bool:
            return any(entry.kind == "plan" and entry.body == body for entry in self.ledger.entries)

        if not admitted():
            try:
                self.ledger.append("plan", body, admit=admit)
            except LedgerError:
                if not admitted():  # Another process made the very same plan in the meantime.
                    raise

    def reserve(self, *, job: str, round_number: int, model: str, witness: str | None) -> Entry:
        """Charge round `round_number`; the entry is on disk when this returns, before any data are touched.

        `model` is the SHA-256 of the model that was received; `witness` the digest of all sites' heads after the
        round before, as the server sent it. Raises `BudgetExceeded` when the plan's rounds are used up.
        """
        self.ledger.refresh()
        plan = _plan_of(self.ledger.entries, job, self.ledger.site)

        def admit(entries: tuple[Entry, ...]) -> None:
            used = sum(entry.kind == "reserve" and entry.body["job"] == job for entry in entries)
            if used >= plan["rounds"]:
                raise BudgetExceeded(
                    f"{self.ledger.site}: all {plan['rounds']} planned rounds are spent (a crash spends its own)"
                )

        body = {"job": job, "round": round_number, "model": model, "witness": witness, "event": plan["event"]}
        return self.ledger.append("reserve", body, admit=admit)

    def commit(self, reservation: Entry, *, output: str) -> Head:
        """Record that the vector with SHA-256 `output` leaves under `reservation`; durable before the reply."""

        foreign = LedgerError(f"ledger of {self.ledger.site}: entry {reservation.seq} is no reservation of its own")
        if reservation.kind != "reserve":
            raise foreign

        def admit(entries: tuple[Entry, ...]) -> None:
            if reservation not in entries[reservation.seq : reservation.seq + 1]:
                raise foreign
            if any(entry.kind == "commit" and entry.body["reserve"] == reservation.seq for entry in entries):
                raise LedgerError(f"ledger of {self.ledger.site}: entry {reservation.seq} was committed before")

        body = {
            "job": reservation.body["job"],
            "round": reservation.body["round"],
            "reserve": reservation.seq,
            "output": output,
        }
        return self.ledger.append("commit", body, admit=admit).head

    def committed(self, *, job: str, round_number: int, model: str) -> str | None:
        """The hash of what already left in this round for this very model, if anything did.

        Sending the same bytes again releases nothing new, so it costs nothing.
        """
        self.ledger.refresh()
        reserves = {
            entry.seq
            for entry in self.ledger.entries
            if entry.kind == "reserve"
            and (entry.body["job"], entry.body["round"], entry.body["model"]) == (job, round_number, model)
        }
        for entry in reversed(self.ledger.entries):
            if entry.kind == "commit" and entry.body["reserve"] in reserves:
                return str(entry.body["output"])
        return None


def charged(entries: Iterable[Entry]) -> list[GaussianEvent]:
    """Every event that `entries` spent: one per reservation, whether or not it was committed.

    Raises `UnsupportedEvent` for an event that nobody can bound.
    """
    return [event_from_dict(entry.body["event"]) for entry in entries if entry.kind == "reserve"]


def owed(entries: Sequence[Entry]) -> list[GaussianEvent]:
    """What `entries` spent and what their plans may still spend. A job that ended early keeps what it set aside."""
    events, used = charged(entries), Counter(entry.body["job"] for entry in entries if entry.kind == "reserve")
    for plan in entries:
        if plan.kind == "plan":
            left = plan.body["rounds"] - used[plan.body["job"]]
            events += [event_from_dict(plan.body["event"])] * left
    return events


def check_affordable(
    event: GaussianEvent,
    *,
    rounds: int,
    epsilon: float | None,
    delta: float,
    spent: Iterable[GaussianEvent] = (),
    site: str,
) -> None:
    """Raise `BudgetExceeded`, with the largest number of rounds that fits, unless the whole plan does.

    Without a limit (`epsilon` is None) a plan need only cost something that the accountant can state.
    """
    before = list(spent)
    try:
        cost = epsilon_pld([*before, *[event] * rounds], delta)
    except UnsupportedEvent as error:
        raise BudgetExceeded(
            f"{site}: no epsilon can be stated for {rounds} rounds ({error}); raise the noise"
        ) from None
    if epsilon is None or cost <= epsilon:
        return
    fits = largest_count(event, target_epsilon=epsilon, delta=delta, at_most=rounds, before=before)
    advice = (
        f"at most {fits} rounds fit: lower training.rounds to {fits} or raise the noise multiplier"
        if fits
        else f"not one round fits: raise the noise multiplier ({event.noise_multiplier:.4g}) or sample fewer records"
    )
    raise BudgetExceeded(
        f"{site}: {rounds} rounds would cost epsilon {cost:.4g} at delta {delta:g}, the budget is {epsilon:g}; {advice}"
    )


def _plan_of(entries: Iterable[Entry], job: str, site: str) -> Mapping[str, Any]:
    for entry in entries:
        if entry.kind == "plan" and entry.body["job"] == job:
            return entry.body
    raise LedgerError(f"ledger of {site}: a round of job {job[:12]} has no plan")


def _must_be_empty(entries: tuple[Entry, ...]) -> None:
    if entries:
        raise LedgerError("the ledger was opened by another process at the same moment; try again")

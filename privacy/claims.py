"""What a run wrote down beside its ledgers, held against what its sites signed.

Without these, whoever holds a run folder could cut all ledgers back to an earlier round, leave out the costliest site,
or put a job with a stronger promise beside them, and every chain would still hold. What no signature covers cannot be
checked at all: accuracies, the model, the report's prose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from privacy.events import ADD_OR_REMOVE_ONE
from privacy.ledger import Entry

Report = Callable[[str | None, int | None, str], None]
"""Takes a finding: the site, the entry's number, why."""

Record = Mapping[str, Any]


def check_names(
    report: Report, roster: Record, summary: Record | None, rounds: Sequence[Record], heads: Sequence[Record]
) -> None:
    """Whoever appears anywhere is in the roster, and the summary leaves nobody out."""
    seen: dict[str, str] = {}
    for line in heads:
        seen |= dict.fromkeys(line["heads"], "heads.jsonl")
    for line in rounds:
        seen |= dict.fromkeys([*line["contributors"], *line["failures"]], "metrics.jsonl")
    if summary is not None:
        seen |= dict.fromkeys(summary["sites"], "summary.json")
        for site in sorted(set(roster) - set(summary["sites"])):
            report(site, None, "is in the roster, but summary.json leaves it out")
    for site in sorted(set(seen) - set(roster), key=str):
        report(str(site), None, f"is named in {seen[site]}, but not in the roster")


def check_rounds(report: Report, job: Record, summary: Record | None, rounds: Sequence[Record]) -> None:
    """A finished run has every round of its job, once and in order."""
    planned = job["training"]["rounds"]
    if summary is not None and summary["rounds"] != planned:
        report(None, None, f"claims {summary['rounds']} rounds, its job has {planned}")
    numbers = [line["round"] for line in rounds]
    if summary is not None and numbers != list(range(1, planned + 1)):
        report(None, None, f"metrics.jsonl does not hold rounds 1 to {planned}, once each and in order")


def check_job(report: Report, job: Record, job_hash: str, site: str, entries: Sequence[Entry]) -> None:
    """The ledger was written for this very job, and for as many rounds as it has."""
    plans = [entry for entry in entries if entry.kind == "plan" and entry.body["job"] == job_hash]
    if not plans:
        report(site, None, "its ledger holds no plan for the job in job.toml")
    record = job["privacy"]["record"]
    for plan in plans:
        if plan.body["rounds"] != job["training"]["rounds"] + record.get("spare_rounds", 0):
            report(site, plan.seq, f"plans {plan.body['rounds']} rounds, which is not what job.toml says")
        for key in ("epsilon", "delta"):
            if plan.body[key] != record.get(key):
                report(site, plan.seq, f"plans {key} {plan.body[key]}, job.toml says {record.get(key)}")


def check_commits(report: Report, job_hash: str, site: str, entries: Sequence[Entry], rounds: Sequence[Record]) -> None:
    """What a site signed off was counted, or its loss was noted: no round is hidden from the metrics."""
    heard = {line["round"] for line in rounds if site in line["contributors"] or site in line["failures"]}
    for entry in entries:
        if entry.kind == "commit" and entry.body["job"] == job_hash and entry.body["round"] not in heard:
            report(site, entry.seq, f"commits round {entry.body['round']}, of which metrics.jsonl knows nothing")


def check_figures(report: Report, site: str, entries: Sequence[Entry], job_hash: str, claim: Record) -> None:
    """What the summary says of a site's noise is what the site planned. A figure that it leaves out claims nothing."""
    plan = next((entry.body for entry in entries if entry.kind == "plan" and entry.body["job"] == job_hash), None)
    if plan is None:
        return
    event = plan["event"]
    steps = sum(e.body["event"]["count"] for e in entries if e.kind == "reserve" and e.body["job"] == job_hash)
    signed = {
        "delta": plan["delta"],
        "noise_multiplier": event["noise_multiplier"],
        "sampling_rate": event["sampling"]["rate"],
        "steps_per_round": event["count"],
        "steps": steps or None,
        "train_rows": entries[0].body["rows"],
    }
    for key, value in signed.items():
        if key in claim and claim[key] != value:
            report(site, None, f"summary.json claims {key} {claim[key]}, its ledger says {value}")


def check_statement(report: Report, summary: Record, seeded: bool) -> None:
    """The run's own words on its noise, adjacency and units."""
    noise = "seeded-simulation" if seeded else "os"
    for key, value in {"noise": noise, "adjacency": ADD_OR_REMOVE_ONE}.items():
        if summary.get(key, value) != value:
            report(None, None, f"claims {key} {summary[key]!r}, the events say {value!r}")
    if summary["epsilon"].get("client") is not None:
        report(None, None, "claims a client-level epsilon; no ledger holds a client-level event")

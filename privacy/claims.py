"""What a run wrote down beside its ledgers, held against what its sites and its server signed.

Without these, whoever holds a run folder could cut all ledgers back to an earlier round, leave out the costliest site,
or put a job with a stronger promise beside them, and every chain would still hold. What no signature covers cannot be
checked at all: accuracies, the model, the report's prose.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from privacy.events import ADD_OR_REMOVE_ONE, UNIT_CLIENT, UNIT_RECORD, UNITS, ZERO_OUT
from privacy.ledger import SERVER, Entry
from privacy.secure_claims import Record, Report, SecurePromise


def _none(event: Record) -> Iterator[str]:
    return iter(())


@dataclass(frozen=True)
class Promise:
    """What a resolved job says of one ledger: of its data set, and of the plan that it must hold.

    `events` are those of one round where the ledger is of so many rows (or clients), with the keys that the job fixes:
    a noise multiplier that was calibrated is not among them. `differences` says what else of an event is not the job's.
    """

    dataset: str | None = None
    purpose: str | None = None
    rounds: int | None = None
    limits: Sequence[Record] = ()
    events: Callable[[int], list[dict[str, Any]]] = lambda rows: []
    differences: Callable[[Record], Iterator[str]] = _none

    @property
    def units(self) -> frozenset[str]:
        return frozenset(limit["unit"] for limit in self.limits)


@dataclass(frozen=True)
class Ledgers:
    """Whose ledgers a job's privacy is written in, what it promises of each, and of its secure sums if it has any.

    `adjacency` is the records' where both units are protected.
    """

    of_site: Promise | None = None
    of_server: Promise | None = None
    secure: SecurePromise | None = None
    adjacency: str = ADD_OR_REMOVE_ONE

    @property
    def units(self) -> frozenset[str]:
        return frozenset().union(*(own.units for own in (self.of_site, self.of_server) if own is not None))


def ledgers_of(job: Record, sites: int, parameters: int | None = None) -> Ledgers:
    """Read from a resolved job: records are protected at the sites; whole clients there, or centrally at the server.

    `sites` is how many take part, `parameters` how many numbers the model has: noise in shares, charged at each of them
    like local noise, depends on both.
    """
    record, client, rounds = job["privacy"].get("record"), job["privacy"].get("client"), job["training"]["rounds"]
    placement = client.get("placement", "central") if client is not None else None
    central, own = (client, None) if placement == "central" else (None, client)
    shared = placement == "distributed"
    secure = SecurePromise(job, sites, parameters) if shared or job.get("secure_aggregation") is not None else None
    seeded = job.get("simulation", {}).get("noise", "os") == "seeded"
    every = {"adjacency": ADD_OR_REMOVE_ONE, "rng": "seeded-simulation" if seeded else "os"}
    of_site = of_server = None
    purpose = job.get("purpose", "training")
    if record or own:
        of_site = Promise(
            dataset=job.get("data", {}).get("dataset", "records"),
            purpose=purpose,
            rounds=rounds + max(section.get("spare_rounds", 0) for section in (record, own) if section),
            limits=[_limit(unit, section) for unit, section in ((UNIT_RECORD, record), (UNIT_CLIENT, own)) if section],
            events=lambda rows: [
                *([every | _of_records(record, job["training"], rows)] if record else []),
                *([every | (secure.event() if shared and secure else _of_local(own))] if own else []),
            ],
            differences=secure.differences if shared and secure else _none,
        )
    if central:
        correlated = central.get("noise", "independent") != "independent"
        of_server = Promise(
            dataset="clients",
            purpose=purpose,
            rounds=1 if correlated else rounds + central.get("spare_rounds", 0),
            limits=[_limit(UNIT_CLIENT, central)],
            events=lambda clients: [
                every
                | (
                    _correlated(central, rounds, job["cohort"]["separation"])
                    if correlated
                    else _of_clients(central, job.get("cohort", {}), clients, seen=bool(record))
                )
            ],
        )
    return Ledgers(of_site, of_server, secure, ZERO_OUT if shared and not record else ADD_OR_REMOVE_ONE)


def _limit(unit: str, section: Record) -> dict[str, Any]:
    return {"unit": unit, "epsilon": section.get("epsilon"), "delta": section["delta"]}


def _gaussian(unit: str, own: Record, *, rate: float, count: int) -> dict[str, Any]:
    return {"mechanism": "gaussian", "unit": unit, "sampling": rate, "count": count, "quantile_noise": None, **_of(own)}


def _of_local(client: Record) -> dict[str, Any]:
    return _gaussian(UNIT_CLIENT, client, rate=1.0, count=1)


def _of_records(record: Record, training: Record, rows: int) -> dict[str, Any]:
    rate = training["sampling_rate"] if "sampling_rate" in training else min(1.0, training["batch_size"] / rows)
    steps = training.get("local_steps") or math.ceil(training["local_epochs"] / rate - 1e-9)
    return _gaussian(UNIT_RECORD, record, rate=rate, count=steps)


def _of_clients(client: Record, cohort: Record, clients: int, *, seen: bool) -> dict[str, Any]:
    # A cohort of fixed size is drawn in public, and one whose sites keep ledgers is seen in them (`seen`): everyone is
    # charged as if always in it.
    rate, adaptive = cohort.get("rate", 1.0), client.get("adaptive_clip")
    event = _gaussian(UNIT_CLIENT, client, rate=1.0 if seen else rate, count=1)
    if adaptive is None:
        return event
    expected = rate * clients if "rate" in cohort else min(cohort.get("size", clients), clients)
    return event | {"quantile_noise": adaptive.get("bit_noise", expected / 20)}


def _correlated(client: Record, rounds: int, separation: int) -> dict[str, Any]:
    own = {key: value for key, value in _of(client).items() if key != "noise_multiplier"}  # The ledger's is of C X.
    counters = {"rounds": rounds, "separation": separation, "participations": -(-rounds // separation)}
    return {"mechanism": "correlated_gaussian", "unit": UNIT_CLIENT, **own, **counters}


def _of(own: Record) -> dict[str, Any]:
    return {key: own[key] for key in ("noise_multiplier", "clip_norm") if key in own}


def check_job(
    report: Report, job_hash: str, site: str, entries: Sequence[Entry], promise: Promise | None, summary: Record | None
) -> None:
    """The ledger was written for this very job, on its data set, with its events, limits, purpose and rounds."""
    plans = [entry for entry in entries if entry.kind == "plan" and entry.body["job"] == job_hash]
    if not plans:
        report(site, None, "its ledger holds no plan for the job in job.toml")
    for plan in plans:
        opening = entries[0].body
        if promise is None:
            report(site, plan.seq, "plans a job that protects nothing here")
            continue
        if opening["dataset"] != promise.dataset:
            report(site, 0, f"is the ledger of data set {opening['dataset']!r}, job.toml says {promise.dataset!r}")
        for key in ("rounds", "purpose"):
            if plan.body[key] != getattr(promise, key):
                report(site, plan.seq, f"plans {key} {plan.body[key]!r}, job.toml says {getattr(promise, key)!r}")
        _check_limits(report, site, plan, promise, opening["rows"])
        _check_events(report, site, plan, promise.events(opening["rows"]), promise.differences)
        if site == SERVER and summary is not None and len(summary["sites"]) != opening["rows"]:
            report(site, 0, f"is of {opening['rows']} clients, summary.json names {len(summary['sites'])}")


def _check_limits(report: Report, site: str, plan: Entry, promise: Promise, rows: int) -> None:
    limits = {limit["unit"]: limit for limit in promise.limits}
    if {limit["unit"] for limit in plan.body["limits"]} != set(limits):
        report(site, plan.seq, "protects other units than job.toml says")
    for limit in plan.body["limits"]:
        unit = limit["unit"]
        for key in ("epsilon", "delta"):
            if unit in limits and limit[key] != limits[unit][key]:
                report(site, plan.seq, f"plans {key} {limit[key]}, job.toml says {limits[unit][key]}")
        counted_here = unit == UNIT_CLIENT if site == SERVER else unit == UNIT_RECORD
        if counted_here and limit["delta"] * rows >= 1:
            report(site, plan.seq, f"delta {limit['delta']:g} is not below 1/{rows}: it allows to publish one outright")


def _check_events(
    report: Report,
    site: str,
    plan: Entry,
    promised: Sequence[Record],
    differences: Callable[[Record], Iterator[str]],
) -> None:
    """Without this a ledger could count on a sampling, a clip norm or an adjacency that the job never asked for."""
    planned = plan.body["events"]
    if plan.body["filter"] is not None or [e["unit"] for e in planned] != [e["unit"] for e in promised]:
        report(site, plan.seq, "releases other events than job.toml says")
        return
    for event, expected in zip(planned, promised, strict=True):
        for key, value in expected.items():
            said = event.get("sampling", {}).get("rate") if key == "sampling" else event.get(key)
            if said != value:
                named = "sampling rate" if key == "sampling" else key
                report(site, plan.seq, f"plans {named} {said} for a {event['unit']}, job.toml says {value}")
        for why in differences(event):
            report(site, plan.seq, why)


def check_names(
    report: Report,
    roster: Record,
    of_site: Promise | None,
    summary: Record | None,
    rounds: Sequence[Record],
    heads: Sequence[Record],
) -> None:
    """Whoever appears anywhere is known, and the summary leaves nobody out.

    Known is who is in the roster; where no site keeps a ledger there is none, and the summary says who is a client.
    """
    seen: dict[str, str] = {}
    for line in heads:
        seen |= dict.fromkeys(line["heads"], "heads.jsonl")
    for line in rounds:
        seen |= dict.fromkeys([*line["contributors"], *line["failures"]], "metrics.jsonl")
    known, where = set(roster), "the roster"
    if summary is not None and of_site is None:
        known, where = known | set(summary["sites"]), "summary.json"
    elif summary is not None:
        seen |= dict.fromkeys(summary["sites"], "summary.json")
        for site in sorted(set(roster) - set(summary["sites"])):
            report(site, None, "is in the roster, but summary.json leaves it out")
    if summary is not None or of_site is not None:
        for site in sorted(set(seen) - known, key=str):
            report(str(site), None, f"is named in {seen[site]}, but not in {where}")


def check_keys(report: Report, keys: Record) -> None:
    """Everyone has a key of their own: one key for two ledgers is one person who vouches for themselves."""
    owner: dict[bytes, str] = {}
    for name, key in sorted(keys.items()):
        first = owner.setdefault(bytes.fromhex(key), name)
        if first != name:
            report(name, None, f"has the key of {first}")


def check_rounds(
    report: Report, job: Record, wanted: Ledgers, summary: Record | None, rounds: Sequence[Record]
) -> None:
    """A finished run has every round of its job, once and in order, and counts enough updates, each once."""
    planned = job["training"]["rounds"]
    if summary is not None and summary["rounds"] != planned:
        report(None, None, f"claims {summary['rounds']} rounds, its job has {planned}")
    numbers = [line["round"] for line in rounds]
    if summary is not None and numbers != list(range(1, planned + 1)):
        report(None, None, f"metrics.jsonl does not hold rounds 1 to {planned}, once each and in order")
    # With central noise an empty cohort is released like any other.
    least = 0 if wanted.of_server is not None else job.get("cohort", {}).get("minimum", 1)
    if wanted.secure is not None:  # A sum of fewer is never shown: its noise was planned for so many.
        least = max(least, wanted.secure.least_answers)
    for line in rounds:
        if len(set(line["contributors"])) < len(line["contributors"]):
            report(None, None, f"round {line['round']} counts an update twice")
        if len(line["contributors"]) < least:
            why = f"round {line['round']} counts {len(line['contributors'])} updates, its job needs {least}"
            report(None, None, why)
    for key, unit in (("epsilon", UNIT_RECORD), ("epsilon_client", UNIT_CLIENT)):
        if unit not in wanted.units and any(line.get(key) for line in rounds):
            report(None, None, f"metrics.jsonl claims a {unit}-level epsilon; the job protects no {unit}")


def repeated_rounds(job_hash: str, ledgers: Mapping[str, Sequence[Entry]]) -> set[int]:
    """Rounds that some ledger reserves twice: a crash lost them, and their first cohort may have been another."""
    reserved = Counter(
        (site, entry.body["round"])
        for site, entries in ledgers.items()
        for entry in entries
        if entry.kind == "reserve" and entry.body["job"] == job_hash
    )
    return {number for (_, number), times in reserved.items() if times > 1}


def trained_in(line: Record, site: str) -> int:
    """The round in which a site trained what this line counts: an earlier one, where the server waits for nobody."""
    number: int = line.get("began", {}).get(site, line["round"])
    return number


def check_commits(
    report: Report,
    job_hash: str,
    site: str,
    entries: Sequence[Entry],
    rounds: Sequence[Record],
    ledgers: Mapping[str, Sequence[Entry]],
) -> None:
    """What was signed off was counted, or its loss was noted: no round is hidden from the metrics.

    Of a round that was lost in a crash and taken again, what the first attempt signed was counted nowhere.
    """
    heard = {
        trained_in(line, site)
        for line in rounds
        if site == SERVER or site in line["contributors"] or site in line["failures"]
    } | repeated_rounds(job_hash, ledgers)
    for entry in entries:
        if entry.kind == "commit" and entry.body["job"] == job_hash and entry.body["round"] not in heard:
            report(site, entry.seq, f"commits round {entry.body['round']}, of which metrics.jsonl knows nothing")


def check_models(report: Report, job_hash: str, ledgers: Mapping[str, Sequence[Entry]]) -> None:
    """In each round everyone was given the same model: one made for a single site could single its records out."""
    given: dict[int, list[tuple[str, Entry]]] = {}
    for site, entries in sorted(ledgers.items()):
        for entry in entries:
            if entry.kind == "reserve" and entry.body["job"] == job_hash:
                given.setdefault(entry.body["round"], []).append((site, entry))
    for number, reserved in given.items():
        usual, _ = Counter(entry.body["model"] for _, entry in reserved).most_common(1)[0]
        for site, entry in reserved:
            if entry.body["model"] != usual:
                report(site, entry.seq, f"was given another model than the others in round {number}")


def check_participation(report: Report, job_hash: str, entries: Sequence[Entry], rounds: Sequence[Record]) -> None:
    """Correlated noise is scaled for how often and how soon a client returns: no client was counted beyond that."""
    plan = _plan_of(entries, job_hash)
    event = plan["events"][0] if plan is not None else {}
    if "separation" not in event:
        return
    taken: dict[str, list[int]] = {}
    for line in rounds:
        for client in line["contributors"]:
            taken.setdefault(client, []).append(line["round"])
    for client, numbers in sorted(taken.items()):
        if len(numbers) > event["participations"]:
            why = f"was counted {len(numbers)} times, its noise is for {event['participations']}"
            report(client, None, why)
        for before, after in itertools.pairwise(numbers):
            if after - before < event["separation"]:
                why = f"was counted in rounds {before} and {after}, its noise is for {event['separation']} apart"
                report(client, None, why)


def check_figures(report: Report, site: str, entries: Sequence[Entry], job_hash: str, claim: Record) -> None:
    """What the summary says of a site's noise is what the site planned. A figure that it leaves out claims nothing."""
    plan = _plan_of(entries, job_hash)
    if plan is None:
        return
    signed: dict[str, Any] = {"train_rows": entries[0].body["rows"]}
    for event in plan["events"]:
        if event["unit"] == UNIT_RECORD:
            mine = [e.body["events"] for e in entries if e.kind == "reserve" and e.body["job"] == job_hash]
            steps = sum(one["count"] for events in mine for one in events if one["unit"] == UNIT_RECORD)
            signed |= {
                "delta": _delta(plan, UNIT_RECORD),
                "noise_multiplier": event["noise_multiplier"],
                "sampling_rate": event["sampling"]["rate"],
                "steps_per_round": event["count"],
                "steps": steps or None,
            }
    _compare(report, site, claim, signed)
    _compare(report, site, claim.get("client") or {}, {"delta": _delta(plan, UNIT_CLIENT)})


def check_client_figures(report: Report, entries: Sequence[Entry], job_hash: str, claim: Record) -> None:
    """What the summary says of the noise for whole clients is what the server planned."""
    plan = _plan_of(entries, job_hash)
    if plan is None:
        return
    (event,) = plan["events"]
    signed = {
        "delta": _delta(plan, UNIT_CLIENT),
        "noise_multiplier": event["noise_multiplier"],
        "clip_norm": event["clip_norm"],
        "sampling_rate": event["sampling"]["rate"] if "sampling" in event else 1.0,
        "clients": entries[0].body["rows"],
    }
    _compare(report, SERVER, claim, signed)


def _compare(report: Report, site: str, claim: Record, signed: Record) -> None:
    for key, value in signed.items():
        if key in claim and claim[key] != value:
            report(site, None, f"summary.json claims {key} {claim[key]}, its ledger says {value}")


def check_statement(report: Report, summary: Record, seeded: bool, wanted: Ledgers) -> None:
    """The run's own words on its noise, adjacency, units and secure sums."""
    noise = "seeded-simulation" if seeded else "os"
    for key, value in {"noise": noise, "adjacency": wanted.adjacency}.items():
        if summary.get(key, value) != value:
            report(None, None, f"claims {key} {summary[key]!r}, the events say {value!r}")
    for unit in UNITS:
        if summary["epsilon"].get(unit) is not None and unit not in wanted.units:
            report(None, None, f"claims a {unit}-level epsilon; no ledger holds a {unit}-level event")
    if summary.get("client") is not None and wanted.of_server is None:
        report(None, None, "claims noise that the server added; job.toml asks for none")
    sums = summary.get("secure_aggregation") or {}
    if sums and wanted.secure is None:
        report(None, None, "claims secure aggregation; job.toml asks for none")
    for key, value in wanted.secure.figures.items() if wanted.secure is not None else ():
        if sums.get(key) != value:
            report(None, None, f"claims {key} {sums.get(key)!r} of its secure sums, job.toml makes it {value!r}")


def _plan_of(entries: Sequence[Entry], job_hash: str) -> Record | None:
    return next((entry.body for entry in entries if entry.kind == "plan" and entry.body["job"] == job_hash), None)


def _delta(plan: Record, unit: str) -> float | None:
    return next((limit["delta"] for limit in plan["limits"] if limit["unit"] == unit), None)

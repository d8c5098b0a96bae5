"""The audit: what an outsider can verify of a run with nothing but its ledgers and public keys.

    1. every chain and every signature, against the keys that the roster pins;
    2. truncation: the heads that the server kept each round, and the digests of them that the *other* sites signed;
    3. epsilon, recomputed from the events by PLD and RDP, against what the run claims and last said as it trained;
    4. that each update that was counted has a committed reservation in its site's ledger, made for this very job.

It believes no number that the run wrote down. It needs neither torch nor flwr.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy import claims
from privacy.accountant import Epsilon, epsilon, epsilon_pld
from privacy.budget import charged
from privacy.errors import FedchorusError, LedgerCorrupt, RunError, UnsupportedEvent
from privacy.events import GaussianEvent
from privacy.ledger import SITE_NAME, Entry, Head, digest_of, read_ledger

TOLERANCE = 1e-3  # Of a claimed epsilon: ten times the accountant's grid, far below any figure that matters.


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. `entry` is a ledger entry's number, or None for the run as a whole."""

    site: str | None
    entry: int | None
    why: str

    def __str__(self) -> str:
        where = [] if self.site is None else [self.site]
        if self.entry is not None:
            where.append(f"entry {self.entry}")
        return ": ".join([", ".join(where), self.why] if where else [self.why])


@dataclass
class SiteAudit:
    """What the audit makes of one site; `spent` is None when its ledger cannot be trusted or bounded."""

    site: str
    entries: int = 0
    releases: int = 0
    delta: float | None = None
    claimed: float | None = None
    spent: Epsilon | None = None
    seeded: bool = False
    ok: bool = True


@dataclass
class Audit:
    sites: dict[str, SiteAudit] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def report(self, site: str | None, entry: int | None, why: str) -> None:
        self.findings.append(Finding(site, entry, why))

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable report; an epsilon that cannot be recomputed is null."""
        bounded = [site.spent.pld for site in self.sites.values() if site.spent is not None]
        record = max(bounded) if bounded and len(bounded) == len(self.sites) else None
        return {
            "ok": self.ok,
            "findings": [{"site": f.site, "entry": f.entry, "why": f.why} for f in self.findings],
            "notices": self.notices,
            "epsilon": {
                "record": _finite(record),
                "client": None,
                "sites": {name: _site_dict(site) for name, site in sorted(self.sites.items())},
            },
        }


def audit_run(run: Path) -> Audit:
    """Audit one run folder. Raises `RunError` only when `run` is not a run folder; all else is a finding."""
    if not (run / "job.toml").is_file():
        raise RunError(f"{run}: no run folder (job.toml is missing); give the folder that `simulate` printed")
    audit = Audit()
    job = _load_job(run)
    if job is not None and not _is_private(job):
        audit.findings.append(Finding(None, None, "the job had no differential privacy: nothing is bounded"))
        return audit
    roster = _load_json(run / "roster.json", audit, default={}).get("sites")
    if not isinstance(roster, dict) or not roster or not all(map(SITE_NAME.fullmatch, roster)):
        audit.findings.append(Finding(None, None, "roster.json is missing, names no site, or one that is no name"))
        return audit
    summary = _load_json(run / "summary.json", audit, default=None)
    if summary is None:
        audit.findings.append(Finding(None, None, "the run is not finished: it makes no claim yet (summary.json)"))
    rounds = _load_lines(run / "metrics.jsonl", audit)
    heads = _load_lines(run / "heads.jsonl", audit)
    job_hash = _job_hash(run, summary, audit)

    for stray in sorted(path.stem for path in (run / "ledgers").glob("*.jsonl") if path.stem not in roster):
        audit.findings.append(Finding(stray, None, "there is a ledger of a site that the roster does not name"))
    ledgers: dict[str, list[Entry]] = {}
    for site, public_hex in sorted(roster.items()):
        audit.sites[site] = SiteAudit(site)
        try:
            ledgers[site] = read_ledger(run / "ledgers" / f"{site}.jsonl", site, public_hex)
        except FileNotFoundError:
            _run_check(audit, site, _check_absence, audit.sites[site], heads, rounds, _claim(summary, site))
        except LedgerCorrupt as error:
            audit.findings.append(Finding(site, error.entry, error.why))
        except (OSError, TypeError, ValueError) as error:
            audit.findings.append(Finding(site, None, f"its ledger or key cannot be read ({type(error).__name__})"))

    for site, entries in ledgers.items():
        _run_check(audit, site, _check_opening, audit.sites[site], entries)
        _run_check(audit, site, _check_spending, audit.sites[site], entries, _claim(summary, site))
        _run_check(audit, site, _check_heads, site, entries, heads)
        _run_check(audit, site, _check_witnesses, site, entries, heads)
        _run_check(audit, site, _check_contributions, site, entries, heads, rounds, job_hash)
        _run_check(audit, site, _check_round_claims, audit.sites[site], entries, rounds, job_hash)
        _hold_to(audit, site, claims.check_job, job, job_hash, site, entries)
        _hold_to(audit, site, claims.check_commits, job_hash, site, entries, rounds)
        _hold_to(audit, site, claims.check_figures, site, entries, job_hash, _claim(summary, site))
    _run_check(audit, None, _check_totals, summary)
    _hold_to(audit, None, claims.check_names, roster, summary, rounds, heads)
    _hold_to(audit, None, claims.check_rounds, job, summary, rounds)
    if summary is not None:
        _hold_to(audit, None, claims.check_statement, summary, any(site.seeded for site in audit.sites.values()))
    for finding in audit.findings:
        if finding.site in audit.sites:
            audit.sites[finding.site].ok = False
    return audit


Lines = Sequence[Mapping[str, Any]]
Record = Mapping[str, Any]
# What a signed or unsigned record of any shape can provoke. A fault of our own would be reported as one of the run's.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)


def _run_check(audit: Audit, site: str | None, check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(audit, *arguments)
    except FedchorusError as error:
        audit.findings.append(Finding(site, None, str(error)))
    except _MALFORMED as error:
        audit.findings.append(
            Finding(site, None, f"what was written of it is malformed ({type(error).__name__}: {error})")
        )


def _hold_to(audit: Audit, site: str | None, claim: Callable[..., None], *arguments: Any) -> None:
    """Run one of the checks of `privacy.claims`."""
    _run_check(audit, site, lambda audit: claim(audit.report, *arguments))


def _check_absence(audit: Audit, site: SiteAudit, heads: Lines, rounds: Lines, claim: Record) -> None:
    """A site that was never asked has written nothing; one that was has a head, an update or a claim to show for it."""
    seen = any(site.site in line.get("heads", {}) for line in heads)
    counted = any(site.site in line.get("contributors", ()) for line in rounds)
    site.claimed = _finite(claim.get("epsilon"))
    if seen or counted or site.claimed:
        audit.findings.append(Finding(site.site, None, "its ledger is missing"))
    else:
        site.spent = Epsilon(0.0, 0.0, 0.0, 0.0)
        audit.notices.append(f"{site.site} was never asked: it wrote no ledger")


def _check_opening(audit: Audit, site: SiteAudit, entries: Sequence[Entry]) -> None:
    site.entries = len(entries)
    if not entries or entries[0].kind != "open":
        audit.findings.append(Finding(site.site, 0, "the ledger does not begin with an opening entry"))
    elif entries[0].body["simulation"]:
        _notice(audit, "a simulation: the sites' keys, data and noise were all on one machine")
    for entry in entries[1:]:
        if entry.kind == "open":
            audit.findings.append(Finding(site.site, entry.seq, "a second opening entry"))


def _check_spending(audit: Audit, site: SiteAudit, entries: Sequence[Entry], claim: Record) -> None:
    plans = [entry for entry in entries if entry.kind == "plan"]
    for entry in entries:
        if entry.kind == "reserve":
            _check_reservation(audit, site, entries, entry)
        if entry.kind == "commit":
            _check_commit(audit, site, entries, entry)
    events = charged(entries)
    site.releases = sum(event.count for event in events)
    _check_noise_kind(audit, site, entries, events)
    site.delta = _delta(plans, claim)
    site.claimed = _finite(claim.get("epsilon"))
    if site.delta is None:
        if events:
            audit.findings.append(
                Finding(site.site, None, "no plan or claim states a delta: nothing can be recomputed")
            )
        return
    site.spent = epsilon(events, site.delta)
    if site.spent.pld > site.spent.rdp * 1.001 + 0.005:
        audit.findings.append(
            Finding(
                site.site, None, f"PLD ({site.spent.pld:.4f}) exceeds RDP ({site.spent.rdp:.4f}): do not trust either"
            )
        )
    for plan in plans:
        # A budget binds the plans up to its own; a later job may have been given a larger one.
        limit, jobs = plan.body["epsilon"], [p.body["job"] for p in plans if p.seq <= plan.seq]
        if limit is not None:
            bound = charged(e for e in entries if e.kind == "reserve" and e.body["job"] in jobs)
            cost = epsilon_pld(bound, plan.body["delta"])
            if cost > limit + TOLERANCE:
                audit.findings.append(
                    Finding(site.site, plan.seq, f"spent epsilon {cost:.4f}, over its budget of {limit:g}")
                )
    if claim:
        _compare(audit, site.site, "claims", site.claimed, site.spent.pld)
    if "epsilon_rdp" in claim:
        _compare(audit, site.site, "claims by RDP", claim["epsilon_rdp"], site.spent.rdp)


def _check_reservation(audit: Audit, site: SiteAudit, entries: Sequence[Entry], entry: Entry) -> None:
    plan = next((p for p in entries[: entry.seq] if p.kind == "plan" and p.body["job"] == entry.body["job"]), None)
    if plan is None:
        audit.findings.append(Finding(site.site, entry.seq, "reserves a round of a job that was never planned"))
    elif plan.body["event"] != entry.body["event"]:
        audit.findings.append(Finding(site.site, entry.seq, "reserves another event than its plan states"))
    else:
        used = sum(e.kind == "reserve" and e.body["job"] == entry.body["job"] for e in entries[: entry.seq + 1])
        if used > plan.body["rounds"]:
            audit.findings.append(
                Finding(site.site, entry.seq, f"reserves more than the plan's {plan.body['rounds']} rounds")
            )


def _check_commit(audit: Audit, site: SiteAudit, entries: Sequence[Entry], entry: Entry) -> None:
    seq = entry.body["reserve"]
    reservation = entries[seq] if isinstance(seq, int) and 0 <= seq < entry.seq else None
    if reservation is None or reservation.kind != "reserve":
        audit.findings.append(Finding(site.site, entry.seq, "commits a release that was never reserved"))
    elif (reservation.body["job"], reservation.body["round"]) != (entry.body["job"], entry.body["round"]):
        audit.findings.append(Finding(site.site, entry.seq, f"commits another round than entry {seq} reserved"))
    elif any(e.kind == "commit" and e.body["reserve"] == seq for e in entries[: entry.seq]):
        audit.findings.append(
            Finding(site.site, entry.seq, f"commits entry {seq} a second time: two releases, one charge")
        )


def _check_noise_kind(audit: Audit, site: SiteAudit, entries: Sequence[Entry], events: Iterable[GaussianEvent]) -> None:
    if all(event.rng == "os" for event in events):
        return
    site.seeded = True
    if entries[0].body["simulation"]:
        _notice(audit, "noise was seeded, so it protects nobody: the epsilons say what real noise would have cost")
    else:
        raise UnsupportedEvent("noise was seeded outside a simulation: epsilon is infinite")


def _check_heads(audit: Audit, site: str, entries: Sequence[Entry], heads: Lines) -> None:
    for line in heads:
        kept = line.get("heads", {}).get(site)
        if kept is None:
            continue
        head = Head(*kept)
        if head.seq < 0 or head.seq >= len(entries):
            audit.findings.append(
                Finding(
                    site,
                    len(entries),
                    f"missing: in round {line.get('round')} the ledger reached entry {head.seq}; it was truncated",
                )
            )
            return
        if entries[head.seq].hash != head.hash:
            audit.findings.append(
                Finding(site, head.seq, f"is not the entry that the server saw in round {line.get('round')}")
            )
            return


def _check_witnesses(audit: Audit, site: str, entries: Sequence[Entry], heads: Lines) -> None:
    """Each reservation signs the digest of all heads after the round before: one site vouches for the others."""
    digests = {line.get("round"): digest_of(line) for line in heads}
    for entry in entries:
        if entry.kind == "reserve" and entry.body.get("witness") is not None:
            expected = digests.get(entry.body.get("round", 0) - 1)
            if expected != entry.body["witness"]:
                audit.findings.append(
                    Finding(
                        site,
                        entry.seq,
                        f"signed other heads for round {entry.body.get('round', 0) - 1} than heads.jsonl holds: "
                        "that file, or a site's ledger, was changed afterwards",
                    )
                )


def _check_contributions(
    audit: Audit, site: str, entries: Sequence[Entry], heads: Lines, rounds: Lines, job: str
) -> None:
    committed = {e.body.get("round") for e in entries if e.kind == "commit" and e.body.get("job") == job}
    kept = {line.get("round") for line in heads if site in line.get("heads", {})}
    for line in rounds:
        number = line.get("round")
        if site in line.get("contributors", ()):
            if number not in committed:
                audit.findings.append(
                    Finding(site, None, f"its update was counted in round {number} without a committed entry")
                )
            if number not in kept:
                audit.findings.append(
                    Finding(
                        site, None, f"its update was counted in round {number}, but heads.jsonl holds no head of it"
                    )
                )


def _check_round_claims(audit: Audit, site: SiteAudit, entries: Sequence[Entry], rounds: Lines, job: str) -> None:
    """The last epsilon claimed while training, by the events up to that round; earlier ones are the same formula."""
    claims = [
        (line["round"], line["epsilon"][site.site]) for line in rounds if site.site in (line.get("epsilon") or {})
    ]
    if claims and site.delta is not None:
        last, claimed = claims[-1]
        events = charged(
            e for e in entries if e.kind == "reserve" and (e.body["job"] != job or e.body["round"] <= last)
        )
        _compare(audit, site.site, "metrics.jsonl claims", claimed, epsilon_pld(events, site.delta))


def _check_totals(audit: Audit, summary: Record | None) -> None:
    spent = [site.spent.pld for site in audit.sites.values() if site.spent is not None]
    if summary is not None and len(spent) == len(audit.sites):
        _compare(audit, None, "the run claims", (summary.get("epsilon") or {}).get("record"), max(spent))


def _compare(audit: Audit, site: str | None, who: str, claimed: object, recomputed: float) -> None:
    figure = _finite(claimed)
    if figure is None:
        if recomputed > 0:
            audit.findings.append(Finding(site, None, f"{who} no epsilon, the events cost {recomputed:.4f}"))
    elif abs(figure - recomputed) > TOLERANCE:
        audit.findings.append(Finding(site, None, f"{who} epsilon {figure:.4f}, the events cost {recomputed:.4f}"))


def _delta(plans: Sequence[Entry], claim: Record) -> float | None:
    stated = [plan.body["delta"] for plan in plans if plan.body["delta"] is not None]
    delta = min(stated) if stated else claim.get("delta")
    return float(delta) if delta is not None else None


def _claim(summary: Record | None, site: str) -> Record:
    """What the run says about `site`. A finished run that says nothing claims no epsilon."""
    if summary is None:
        return {}
    sites = summary.get("sites")
    claim = sites.get(site) if isinstance(sites, dict) else None
    return claim if isinstance(claim, dict) else {"epsilon": None}


def _load_job(run: Path) -> Record | None:
    try:
        return tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None  # Whatever it was, its ledgers speak for themselves; the checks that need it will say so.


def _is_private(job: Record) -> bool:
    privacy = job.get("privacy", {})
    return not isinstance(privacy, dict) or "record" in privacy


def _job_hash(run: Path, summary: Record | None, audit: Audit) -> str:
    actual = hashlib.sha256((run / "job.toml").read_bytes()).hexdigest()
    if summary is not None and summary.get("job_hash") != actual:
        audit.findings.append(Finding(None, None, "job.toml is not the job that the run claims to have run"))
    return actual


def _load_json(path: Path, audit: Audit, *, default: Any) -> Any:
    try:
        loaded = json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        audit.findings.append(Finding(None, None, f"{path.name} is not a JSON object"))
        return default
    return loaded


def _load_lines(path: Path, audit: Audit) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        audit.findings.append(Finding(None, None, f"{path.name} is missing"))
        return []
    loaded = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            audit.findings.append(Finding(None, None, f"{path.name}, line {number}: not a JSON object"))
            continue
        loaded.append(record)
    return loaded


def _notice(audit: Audit, text: str) -> None:
    if text not in audit.notices:
        audit.notices.append(text)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def _site_dict(site: SiteAudit) -> dict[str, Any]:
    spent = site.spent
    return {
        "ok": site.ok,
        "entries": site.entries,
        "releases": site.releases,
        "delta": _finite(site.delta),
        "pld": _finite(spent.pld) if spent else None,
        "rdp": _finite(spent.rdp) if spent else None,
        "exact": _finite(spent.exact) if spent else None,
        "claimed": site.claimed,
    }

"""The audit: what an outsider can verify of a run with nothing but its ledgers and public keys.

    1. every chain and every signature, against the keys that the roster pins;
    2. truncation: the heads that the server kept each round, and the digests of them that the *other* sites signed;
    3. every rule of the budgets, replayed entry by entry (`privacy.budget.Accounts`);
    4. epsilon, recomputed from the events by PLD and RDP, inside an interval proven by a third method, against what the
       run claims and last said as it trained: of records by each site's ledger, of whole clients by the server's where
       the server adds the noise, by each site's where the clients do;
    5. that each update that was counted has a committed reservation in its site's ledger, made for this very job, and
       each sum that was released one in the server's;
    6. of secure sums, that all participants signed who they are, and that noise in shares was priced for the fewest
       honest survivors that the job allows.

Every ledger, a site's or the server's, goes through the same checks. None believes a number that the run wrote down.
It needs neither torch nor flwr.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy import claims
from privacy.accountant import Epsilon, bounds, epsilon
from privacy.budget import Accounts, JobAccount, charged
from privacy.errors import BudgetExceeded, FedchorusError, LedgerCorrupt, RunError, UnsupportedEvent
from privacy.events import UNIT_CLIENT, UNIT_RECORD, UNITS, DistributedEvent, Event, GaussianEvent
from privacy.ledger import SERVER, SITE_NAME, Entry, Head, digest_of, read_ledger
from privacy.prv import Bounds
from privacy.secagg.roster import Roster
from privacy.secure_claims import check_participants

_LONGEST_HEADER = 100_000_000  # Bytes; the format allows no more.
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
class Spending:
    """What one ledger spent of one unit of privacy; `epsilon` is None when it cannot be trusted or bounded."""

    unit: str
    delta: float | None = None
    claimed: float | None = None
    releases: int = 0
    epsilon: Epsilon | None = None
    within: Bounds | None = None

    def as_dict(self) -> dict[str, Any]:
        spent, within = self.epsilon, self.within
        return {
            "delta": _finite(self.delta),
            "pld": _finite(spent.pld) if spent else None,
            "rdp": _finite(spent.rdp) if spent else None,
            "exact": _finite(spent.exact) if spent else None,
            "lower": _finite(within.lower) if within else None,
            "estimate": _finite(within.estimate) if within else None,
            "upper": _finite(within.upper) if within else None,
            "claimed": self.claimed,
        }


@dataclass
class SiteAudit:
    """What the audit makes of one ledger: a site's, or the server's. `units` are those that its job protects in it."""

    site: str
    units: frozenset[str] = frozenset()
    entries: int = 0
    releases: int = 0
    spent: list[Spending] = field(default_factory=list)
    seeded: bool = False
    ok: bool = True

    def of_unit(self, unit: str) -> Spending | None:
        return next((spending for spending in self.spent if spending.unit == unit), None)

    def as_dict(self) -> dict[str, Any]:
        record, client = self.of_unit(UNIT_RECORD), self.of_unit(UNIT_CLIENT)
        return {
            "ok": self.ok,
            "entries": self.entries,
            "releases": self.releases,
            **(record or Spending(UNIT_RECORD)).as_dict(),
            "client": client.as_dict() if client else None,
        }


@dataclass
class Audit:
    sites: dict[str, SiteAudit] = field(default_factory=dict)
    server: SiteAudit | None = None
    findings: list[Finding] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def ledgers(self) -> list[SiteAudit]:
        return [*self.sites.values(), *([self.server] if self.server else [])]

    def report(self, site: str | None, entry: int | None, why: str) -> None:
        self.findings.append(Finding(site, entry, why))

    def notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)

    def largest(self, unit: str) -> float | None:
        """The largest epsilon of any ledger that speaks of the unit; None if one that should cannot be recomputed."""
        spent = [ledger.of_unit(unit) for ledger in self.ledgers if unit in ledger.units or ledger.of_unit(unit)]
        known = [spending.epsilon.pld for spending in spent if spending is not None and spending.epsilon is not None]
        return max(known) if known and len(known) == len(spent) else None

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable report; an epsilon that cannot be recomputed is null."""
        return {
            "ok": self.ok,
            "findings": [{"site": f.site, "entry": f.entry, "why": f.why} for f in self.findings],
            "notices": self.notices,
            "epsilon": {
                "record": _finite(self.largest(UNIT_RECORD)),
                "client": _finite(self.largest(UNIT_CLIENT)),
                "sites": {name: site.as_dict() for name, site in sorted(self.sites.items())},
                "server": self.server.as_dict() if self.server else None,
            },
        }


Record = Mapping[str, Any]
Lines = Sequence[Record]
# What a signed or unsigned record of any shape can provoke. A fault of our own would be reported as one of the run's.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)


@dataclass(frozen=True)
class _Folder:
    """What lies beside the ledgers. Nobody signed it: its methods may raise any of `_MALFORMED`."""

    job: Record | None
    job_hash: str
    wanted: claims.Ledgers
    summary: Record | None
    rounds: Lines
    heads: Lines
    keys: Record

    def promise(self, name: str) -> claims.Promise | None:
        return self.wanted.of_server if name == SERVER else self.wanted.of_site

    def head(self, line: Record, name: str) -> Head | None:
        head = line.get("server") if name == SERVER else line.get("heads", {}).get(name)
        return None if head is None else Head(*head)

    def counted(self, line: Record, name: str) -> bool:
        """Whether the round of `line` needs an entry of `name`: every one needs the server's."""
        return name == SERVER or name in line.get("contributors", ())

    def claims(self, name: str) -> dict[str, Record]:
        """What a finished run says of one ledger's privacy, by unit; one that says nothing claims no epsilon."""
        if self.summary is None:
            return {}
        promise, nothing = self.promise(name), {"epsilon": None}
        units = promise.units if promise is not None else frozenset()
        if name == SERVER:
            return {UNIT_CLIENT: self.summary.get("client") or nothing}
        claim = self.summary["sites"].get(name) or nothing
        client = claim.get("client")
        return {
            **({UNIT_RECORD: claim} if UNIT_RECORD in units or _finite(claim.get("epsilon")) is not None else {}),
            **({UNIT_CLIENT: client or nothing} if UNIT_CLIENT in units or client else {}),
        }

    def last_said(self, name: str | None) -> tuple[int, object] | None:
        """The last epsilon claimed while training, and after which round: of a site's records, or of clients (None)."""
        said = [
            (line["round"], line.get("epsilon_client") if name is None else (line.get("epsilon") or {}).get(name))
            for line in self.rounds
        ]
        return next((one for one in reversed(said) if one[1] is not None), None)


def audit_run(run: Path) -> Audit:
    """Audit one run folder. Raises `RunError` only when `run` is not a run folder; all else is a finding."""
    if not (run / "job.toml").is_file():
        raise RunError(f"{run}: no run folder (job.toml is missing); give the folder that `simulate` printed")
    audit = Audit()
    job = _load_job(run)
    if job is not None and not _is_private(job):
        audit.report(None, None, "the job had no differential privacy: nothing is bounded")
        return audit
    kept = _load_json(run / "roster.json", audit, default={})
    roster, server_key = kept.get("sites"), kept.get("server")
    # Where no site keeps a ledger, who takes part in secure sums stands in the list that the participants signed.
    sites = len(roster) if isinstance(roster, dict) and roster else _participants(run)
    wanted = _ledgers_of(job, sites, _model_size(run), audit)
    if (
        not isinstance(roster, dict)
        or not all(map(SITE_NAME.fullmatch, roster))
        or (wanted.of_site is not None and not roster)
    ):
        audit.report(None, None, "roster.json is missing, names no site, or one that is no name")
        return audit
    summary = _load_json(run / "summary.json", audit, default=None)
    if summary is None:
        audit.report(None, None, "the run is not finished: it makes no claim yet (summary.json)")
    rounds, heads = _load_lines(run / "metrics.jsonl", audit), _load_lines(run / "heads.jsonl", audit)
    keys = dict(roster)
    for stray in sorted(path.stem for path in (run / "ledgers").glob("*.jsonl") if path.stem not in roster):
        audit.report(stray, None, "there is a ledger of a site that the roster does not name")
    for site in sorted(roster):
        audit.sites[site] = SiteAudit(site, wanted.of_site.units if wanted.of_site else frozenset())
    paths = {site: run / "ledgers" / f"{site}.jsonl" for site in audit.sites}
    if wanted.of_server is not None:
        audit.server = SiteAudit(SERVER, wanted.of_server.units)
        paths[SERVER], keys[SERVER] = run / "server.jsonl", server_key
        if server_key is None:
            audit.report(SERVER, None, "roster.json has no key of the server, which adds the noise")
    elif (run / "server.jsonl").exists():
        audit.report(SERVER, None, "there is a ledger of the server, job.toml asks for no noise of its")
    folder = _Folder(job, _job_hash(run, summary, audit), wanted, summary, rounds, heads, keys)
    ledgers: dict[str, list[Entry]] = {}
    for ledger in audit.ledgers:
        path = paths[ledger.site]
        if not path.exists():
            _run_check(audit, ledger.site, _check_absence, ledger, folder)
        elif (entries := _read(audit, path, ledger.site, keys[ledger.site])) is not None:
            ledgers[ledger.site] = entries
            _audit_ledger(audit, ledger, entries, folder)
    for site, entries in ledgers.items():
        _hold_to(audit, site, claims.check_commits, folder.job_hash, site, entries, folder.rounds, ledgers)
    _run_check(audit, None, _check_totals, folder)
    _run_check(audit, None, _check_local_rounds, ledgers, folder)
    if wanted.secure is not None:
        _run_check(audit, None, _check_participants, run / "participants.json", roster)
    _hold_to(audit, None, claims.check_keys, {name: key for name, key in keys.items() if key is not None})
    _hold_to(audit, None, claims.check_names, roster, wanted.of_site, summary, rounds, heads)
    _hold_to(audit, None, claims.check_rounds, job, wanted, summary, rounds)
    _hold_to(audit, None, claims.check_models, folder.job_hash, ledgers)
    if summary is not None:
        seeded = any(ledger.seeded for ledger in audit.ledgers)
        _hold_to(audit, None, claims.check_statement, summary, seeded, wanted)
    blamed = {finding.site for finding in audit.findings}
    for ledger in audit.ledgers:
        ledger.ok = ledger.site not in blamed
    return audit


def _audit_ledger(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    site, job_hash = ledger.site, folder.job_hash
    for check in (
        _check_opening,
        _check_rules,
        _check_spending,
        _check_heads,
        _check_witnesses,
        _check_contributions,
        _check_round_claims,
    ):
        _run_check(audit, site, check, ledger, entries, folder)
    _hold_to(audit, site, claims.check_job, job_hash, site, entries, folder.promise(site), folder.summary)
    if site == SERVER:
        _hold_to(audit, site, claims.check_participation, job_hash, entries, folder.rounds)
    _run_check(audit, site, _check_figures, ledger, entries, folder)


def _run_check(audit: Audit, site: str | None, check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(audit, *arguments)
    except (FedchorusError, *_MALFORMED) as error:
        audit.report(site, None, _why(error))


def _why(error: BaseException) -> str:
    if isinstance(error, FedchorusError):
        return str(error)
    return f"what was written of it is malformed ({type(error).__name__}: {error})"


def _hold_to(audit: Audit, site: str | None, claim: Callable[..., None], *arguments: Any) -> None:
    """Run one of the checks of `privacy.claims`."""
    _run_check(audit, site, lambda audit: claim(audit.report, *arguments))


def _read(audit: Audit, path: Path, site: str, public_hex: str) -> list[Entry] | None:
    """A verified ledger, or None where it cannot be trusted."""
    try:
        return read_ledger(path, site, public_hex)
    except LedgerCorrupt as error:
        audit.report(site, error.entry, error.why)
    except (OSError, TypeError, ValueError) as error:
        audit.report(site, None, f"its ledger or key cannot be read ({type(error).__name__})")
    return None


def _check_absence(audit: Audit, ledger: SiteAudit, folder: _Folder) -> None:
    """A site that was never asked has written nothing; one that was has a head, an update or a claim to show for it."""
    site, claimed = ledger.site, folder.claims(ledger.site)
    seen = any(folder.head(line, site) is not None for line in folder.heads)
    counted = any(folder.counted(line, site) for line in folder.rounds)
    if site == SERVER or seen or counted or any(_finite(claim.get("epsilon")) for claim in claimed.values()):
        audit.report(site, None, "its ledger is missing")
        return
    for unit in ledger.units:
        figure = _finite(claimed.get(unit, {}).get("epsilon"))
        ledger.spent.append(Spending(unit, None, figure, 0, Epsilon(0.0, 0.0, 0.0, 0.0), Bounds(0.0, 0.0, 0.0)))
    audit.notice(f"{site} was never asked: it wrote no ledger")


def _check_opening(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    ledger.entries = len(entries)
    if not entries or entries[0].kind != "open":
        audit.report(ledger.site, 0, "the ledger does not begin with an opening entry")
        return
    opening = entries[0].body
    if bytes.fromhex(opening["public_key"]) != bytes.fromhex(folder.keys[ledger.site]):
        audit.report(ledger.site, 0, "names another key than the roster")
    if opening["simulation"]:
        audit.notice("a simulation: the sites' keys, data and noise were all on one machine")


def _check_rules(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    """Replay the ledger under the rules that the site was to enforce."""
    accounts = Accounts(ledger.site)
    for entry in entries:
        try:
            why = _breach(accounts, entry, entries)
            accounts.add(entry)
        except (FedchorusError, *_MALFORMED) as error:
            why = _why(error)
        if why is not None:
            audit.report(ledger.site, entry.seq, why)


def _breach(accounts: Accounts, entry: Entry, entries: Sequence[Entry]) -> str | None:
    """Which rule `entry` breaks. That of the clip norm and of a training's rounds are the releases' own."""
    body = entry.body
    why = accounts.breach(entry.kind, body)
    if why is not None:
        return why
    if entry.kind == "plan":
        try:
            accounts.check_affordable(JobAccount.of(body))
        except BudgetExceeded as error:
            return f"admits a job over its budget: {error}"
    if entry.kind == "reserve":
        moves = any(event.get("quantile_noise") is not None for event in body["events"])
        clip_norm = body.get("clip_norm")
        if moves and (_finite(clip_norm) or 0.0) <= 0:
            return f"reserves a round of an adaptive clip norm with the clip norm {clip_norm!r}"
        if not moves and clip_norm is not None:
            return "reserves another clip norm than its event states"
    return None


def _check_spending(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    accounts, claimed = Accounts.of(ledger.site, entries), folder.claims(ledger.site)
    released = charged(entries)
    ledger.releases = sum(event.count for event in released)
    own = accounts.jobs.get(folder.job_hash)
    planned = {limit.unit: limit.delta for limit in own.limits} if own is not None else {}
    others = [limit for account in accounts.jobs.values() for limit in account.limits]
    # What other jobs in this ledger protected is their runs' to claim.
    for unit in [unit for unit in UNITS if unit in {*ledger.units, *planned, *claimed}]:
        claim = claimed.get(unit, {})
        stated = [limit.delta for limit in others if limit.unit == unit]
        delta = planned.get(unit) or (min(stated) if stated else claim.get("delta"))
        spending = Spending(unit, delta, _finite(claim.get("epsilon")))
        ledger.spent.append(spending)
        if delta is None:
            if released:
                audit.report(ledger.site, None, "no plan or claim states a delta: nothing can be recomputed")
            continue
        _recompute(audit, ledger.site, spending, accounts)
        assert spending.epsilon is not None
        if claim:
            who = "claims" if unit == UNIT_RECORD else "claims for whole clients"
            _compare(audit, ledger.site, who, spending.claimed, spending.epsilon.pld)
        if "epsilon_rdp" in claim:
            _compare(audit, ledger.site, "claims by RDP", claim["epsilon_rdp"], spending.epsilon.rdp)
    # Last: what was claimed of seeded noise is compared before it is called infinite.
    _check_noise_kind(audit, ledger, entries, released)


def _recompute(audit: Audit, site: str, spending: Spending, accounts: Accounts) -> None:
    assert spending.delta is not None
    events = accounts.spent(spending.unit)
    spending.releases = sum(event.count for event in events)
    if any(isinstance(event, DistributedEvent) for event in events):
        audit.notice(
            "where noise came in shares, epsilon is by Rényi DP alone and for zero-out: one client's update becomes "
            "zero, while who takes part is public"
        )
    if any(account.filter is not None and account.used for account in accounts.jobs.values()):
        bound = accounts.epsilon(spending.unit, spending.delta, spent_only=True)
        spending.epsilon = Epsilon(spending.delta, bound, bound, None)  # Chosen on the way: Rényi at one order alone.
        return
    spending.epsilon = epsilon(events, spending.delta)
    spending.within = bounds(events, spending.delta)
    for method, figure in (("PLD", spending.epsilon.pld), ("RDP", spending.epsilon.rdp)):
        if spending.within is not None and figure < spending.within.lower - TOLERANCE:
            why = f"{method} ({figure:.4f}) is below a proven lower bound ({spending.within.lower:.4f}): trust neither"
            audit.report(site, None, why)


def _check_noise_kind(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], events: Iterable[Event]) -> None:
    if all(event.rng == "os" for event in events):
        return
    ledger.seeded = True
    if entries[0].body["simulation"]:
        audit.notice("noise was seeded, so it protects nobody: the epsilons say what real noise would have cost")
    else:
        ledger.spent = []
        raise UnsupportedEvent("noise was seeded outside a simulation: epsilon is infinite")


def _check_heads(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    for line in folder.heads:
        seen = folder.head(line, ledger.site)
        if seen is None:
            continue
        if seen.seq < 0 or seen.seq >= len(entries):
            why = f"missing: in round {line.get('round')} the ledger reached entry {seen.seq}; it was truncated"
            audit.report(ledger.site, len(entries), why)
            return
        if entries[seen.seq].hash != seen.hash:
            audit.report(ledger.site, seen.seq, f"is not the entry that the server saw in round {line.get('round')}")
            return


def _check_witnesses(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    """Each reservation signs the digest of all heads after the round before: one site vouches for the others.

    The server signs none: it keeps the heads itself.
    """
    digests = {line.get("round"): digest_of(line) for line in folder.heads}
    for entry in entries:
        if ledger.site != SERVER and entry.kind == "reserve" and entry.body["job"] == folder.job_hash:
            before = entry.body["round"] - 1
            if digests.get(before) != entry.body["witness"]:
                why = (
                    f"signed other heads for round {before} than heads.jsonl holds: "
                    "that file, or a site's ledger, was changed afterwards"
                )
                audit.report(ledger.site, entry.seq, why)


def _check_contributions(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    """Each round that counts on this ledger has a committed entry in it, which the head kept of that round covers."""
    site = ledger.site
    committed = {
        e.body["round"]: e.seq for e in reversed(entries) if e.kind == "commit" and e.body["job"] == folder.job_hash
    }
    kept = {line.get("round"): head for line in folder.heads if (head := folder.head(line, site)) is not None}
    for line in folder.rounds:
        number = line.get("round")
        what = f"round {number} was released" if site == SERVER else f"its update was counted in round {number}"
        if folder.counted(line, site):
            trained = claims.trained_in(line, site)
            if trained not in committed:
                audit.report(site, None, f"{what} without a committed entry")
            if number not in kept:
                audit.report(site, None, f"{what}, but heads.jsonl holds no head of it")
            elif kept[number].seq < committed.get(trained, 0):
                audit.report(site, None, f"{what}, but the head that heads.jsonl holds of it is older")
    if site == SERVER and any(
        event.sampling_rate < 1 for event in charged(entries) if isinstance(event, GaussianEvent)
    ):
        audit.notice(
            "the cohorts were a secret sample, and metrics.jsonl names them: epsilon for whole clients holds against "
            "those alone who never see that file"
        )


def _check_round_claims(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    """The last epsilon claimed while training, by the events up to that round; earlier ones are the same formula."""
    unit = UNIT_CLIENT if ledger.site == SERVER else UNIT_RECORD
    said, spending = folder.last_said(None if ledger.site == SERVER else ledger.site), ledger.of_unit(unit)
    if said is not None and spending is not None and spending.delta is not None:
        recomputed = _spent_by(ledger.site, entries, unit, spending.delta, said[0], folder.job_hash)
        _compare(audit, ledger.site, "metrics.jsonl claims", said[1], recomputed)


def _check_local_rounds(audit: Audit, ledgers: Mapping[str, Sequence[Entry]], folder: _Folder) -> None:
    """The same for clients that add their noise themselves: the run says the largest of them."""
    said, promise = folder.last_said(None), folder.wanted.of_site
    if said is None or promise is None or UNIT_CLIENT not in promise.units:
        return
    delta = next(limit["delta"] for limit in promise.limits if limit["unit"] == UNIT_CLIENT)
    spent = [_spent_by(s, entries, UNIT_CLIENT, delta, said[0], folder.job_hash) for s, entries in ledgers.items()]
    _compare(audit, None, "metrics.jsonl claims for whole clients", said[1], max(spent, default=0.0))


def _spent_by(site: str, entries: Sequence[Entry], unit: str, delta: float, last: int, job: str) -> float:
    # What other jobs reserved after this one's last entry had not been spent when the claim was made.
    end = max((e.seq for e in entries if e.kind in ("reserve", "commit") and e.body["job"] == job), default=-1)
    until = (e for e in entries[: end + 1] if e.kind != "reserve" or e.body["job"] != job or e.body["round"] <= last)
    return Accounts.of(site, until).epsilon(unit, delta, spent_only=True)


def _check_figures(audit: Audit, ledger: SiteAudit, entries: Sequence[Entry], folder: _Folder) -> None:
    if folder.summary is None:
        return
    if ledger.site == SERVER:
        claim = folder.claims(SERVER)[UNIT_CLIENT]
        claims.check_client_figures(audit.report, entries, folder.job_hash, claim)
    else:
        claim = folder.summary["sites"].get(ledger.site) or {}
        claims.check_figures(audit.report, ledger.site, entries, folder.job_hash, claim)


def _model_size(run: Path) -> int | None:
    """How many numbers the released model has, by its file's header (safetensors: a length, JSON), if it is one."""
    try:
        with open(run / "model.safetensors", "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            arrays = json.loads(file.read(min(length, _LONGEST_HEADER)))
        return int(sum(math.prod(array["shape"]) for name, array in arrays.items() if name != "__metadata__"))
    except (OSError, *_MALFORMED):
        return None


def _participants(run: Path) -> int:
    """How many there are, if the list can be read; whether it can be trusted is `_check_participants`'."""
    try:
        return len(Roster.load(run / "participants.json").members)
    except FedchorusError:
        return 0


def _check_participants(audit: Audit, path: Path, roster: Record) -> None:
    check_participants(audit.report, Roster.load(path), roster)


def _check_totals(audit: Audit, folder: _Folder) -> None:
    if folder.summary is None:
        return
    claimed = folder.summary.get("epsilon") or {}
    for unit in UNITS:
        spent = audit.largest(unit)
        if spent is not None and unit in folder.wanted.units:
            who = "the run claims" if unit == UNIT_RECORD else "the run claims for whole clients"
            _compare(audit, None, who, claimed.get(unit), spent)


def _compare(audit: Audit, site: str | None, who: str, claimed: object, recomputed: float) -> None:
    figure = _finite(claimed)
    if figure is None:
        if recomputed > 0:
            audit.report(site, None, f"{who} no epsilon, the events cost {recomputed:.4f}")
    elif abs(figure - recomputed) > TOLERANCE:
        audit.report(site, None, f"{who} epsilon {figure:.4f}, the events cost {recomputed:.4f}")


def _load_job(run: Path) -> Record | None:
    try:
        return tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _is_private(job: Record) -> bool:
    privacy = job.get("privacy", {})
    return not isinstance(privacy, dict) or any(unit in privacy for unit in UNITS)


def _ledgers_of(job: Record | None, sites: int, parameters: int | None, audit: Audit) -> claims.Ledgers:
    try:
        if job is not None:
            return claims.ledgers_of(job, sites, parameters)
    except _MALFORMED:
        pass
    # Whatever it was, the ledgers speak for themselves.
    audit.report(None, None, "job.toml is no job that this program can read")
    return claims.Ledgers(of_site=claims.Promise())


def _job_hash(run: Path, summary: Record | None, audit: Audit) -> str:
    actual = hashlib.sha256((run / "job.toml").read_bytes()).hexdigest()
    if summary is not None and summary.get("job_hash") != actual:
        audit.report(None, None, "job.toml is not the job that the run claims to have run")
    return actual


def _load_json(path: Path, audit: Audit, *, default: Any) -> Any:
    try:
        loaded = _parse(path.read_bytes())
    except FileNotFoundError:
        return default
    except OSError:
        loaded = None
    if loaded is None:
        audit.report(None, None, f"{path.name} is not a JSON object")
    return default if loaded is None else loaded


def _load_lines(path: Path, audit: Audit) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        audit.report(None, None, f"{path.name} is missing")
        return []
    loaded = [_parse(line) for line in lines]
    for number, record in enumerate(loaded, start=1):
        if record is None:
            audit.report(None, None, f"{path.name}, line {number}: not a JSON object")
    return [record for record in loaded if record is not None]


def _parse(text: bytes) -> dict[str, Any] | None:
    """A JSON object that says everything once: of a key given twice, readers take either."""
    try:
        loaded = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key is given twice")
    return record


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None

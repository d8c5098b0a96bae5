"""`fedchorus audit` and `fedchorus budget`: what an auditor and a data holder type. Need neither torch nor flwr."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from privacy.audit import Audit
    from privacy.budget import Accounts, JobAccount, Limit, SiteBudget


def add_to(app: typer.Typer) -> None:
    app.command(name="audit", epilog="Example: fedchorus audit runs/hospitals-20260101-120000")(audit)
    app.command(
        name="budget",
        epilog="Example: fedchorus budget ledgers/hospital.jsonl --set 3,1e-5 --identity private/identity.pem",
    )(budget)


def audit(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")] = False,
) -> None:
    """Verify every ledger of a run and recompute what was spent.

    Exit code 0 only when every chain and signature holds and every claim of the run matches its events.
    """
    from privacy.audit import audit_run

    result = audit_run(run)
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        _print(result, run)
    raise typer.Exit(0 if result.ok else 1)


def _print(result: Audit, run: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from privacy.audit import Spending

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # A pipe has no edge to wrap at.
    ledgers = [*result.sites.values(), *([result.server] if result.server else [])]
    if ledgers:
        table = Table(
            "ledger", "unit", "entries", "releases", "epsilon (PLD)", "(RDP)", "proven within", "claimed", "delta", "",
            box=box.SIMPLE_HEAD,
        )  # fmt: skip
        for ledger in ledgers:
            for spending in ledger.spent or [Spending("-")]:
                within = spending.within
                table.add_row(
                    ledger.site,
                    spending.unit,
                    str(ledger.entries),
                    str(spending.releases),
                    _figure(spending.epsilon.pld if spending.epsilon else None),
                    _figure(spending.epsilon.rdp if spending.epsilon else None),
                    f"{within.lower:.3f} to {within.upper:.3f}" if within else "-",
                    _figure(spending.claimed),
                    "-" if spending.delta is None else f"{spending.delta:g}",
                    "ok" if ledger.ok else "NOT OK",
                )
        console.print(table)
    for notice in result.notices:
        console.print(f"note: {escape(notice)}", soft_wrap=True)
    for finding in result.findings:
        console.print(f"finding: {escape(str(finding))}", style="bold red", soft_wrap=True)
    console.print(
        f"{escape(str(run))}: every chain, signature and claim holds"
        if result.ok
        else f"{escape(str(run))}: NOT OK, {len(result.findings)} findings",
        style="bold",
        soft_wrap=True,
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def budget(
    path: Annotated[Path, typer.Argument(help="A run folder, or one ledger file.", metavar="PATH")],
    key: Annotated[
        str | None, typer.Option(help="The public key of the ledger file; else its run's roster has it.", metavar="HEX")
    ] = None,
    planned: Annotated[
        list[str] | None,
        typer.Option(
            help="Show what a job would cost on top: noise multiplier, sampling rate, steps a round, rounds. "
            "Repeatable, each on top of those before it.",
            metavar="Z,Q,STEPS,ROUNDS",
        ),
    ] = None,
    new: Annotated[
        str | None, typer.Option("--set", help="Append a budget; epsilon `none` lifts it.", metavar="EPSILON,DELTA")
    ] = None,
    settle: Annotated[
        str | None, typer.Option(help="End the job whose hash begins so; free what it set aside.", metavar="JOB")
    ] = None,
    unit: Annotated[str, typer.Option(help="Of --set and --planned: record or client.")] = "record",
    purpose: Annotated[
        str | None, typer.Option(help="Of --set (default: all together) and --planned (default: training).")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(help="The private key that signs --set and --settle.", metavar="FILE.pem")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="Its first line opens that key.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")] = False,
) -> None:
    """Show what each ledger may spend, has spent and has set aside; set a budget or settle a job.

    Each ledger is verified first. "With set aside" composes what was spent with all that the jobs under way may still
    spend; "left" is what that leaves of the limit. Epsilons do not add up: a job of more may fit, --planned tells.
    Exit code 0 only when every ledger holds.
    """
    ledgers = _ledgers(path, key)
    jobs = [_planned_job(text, unit, purpose, number) for number, text in enumerate(planned or (), start=1)]
    if new is not None or settle is not None:
        limit = None if new is None else _limit(new, unit)
        own = _own_budget(path, ledgers, identity, passphrase_file)
        job = None if settle is None else _job_named(settle, own)
        if limit is not None:
            own.set_budget(limit, purpose=purpose or None)
        if job is not None:
            own.settle(job)
    statements = [_statement(site, file, public_hex, jobs) for site, (file, public_hex) in sorted(ledgers.items())]
    ok = all(statement["ok"] for statement in statements)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "ledgers": statements}))
    else:
        _print_statements(statements)
    raise typer.Exit(0 if ok else 1)


def _ledgers(path: Path, key: str | None) -> dict[str, tuple[Path, str]]:
    """Each ledger's file and the public key that is pinned for it, by site."""
    from privacy.errors import RunError
    from privacy.ledger import SERVER

    if path.is_file():
        site = _site_of(path)
        rosters = [folder / "roster.json" for folder in (path.parent, path.parent.parent)]
        pinned = key or next((_roster(roster) for roster in rosters if roster.is_file()), {}).get(site)
        if pinned is None:
            raise RunError(f"{path}: no roster beside it names {site}; give its public key with --key")
        return {site: (path, pinned)}
    if key is not None or not (path / "roster.json").is_file():
        raise RunError(f"{path}: expected a run folder with its roster.json, or one ledger file and its --key")
    files = {
        site: (path / "server.jsonl" if site == SERVER else path / "ledgers" / f"{site}.jsonl", public_hex)
        for site, public_hex in _roster(path / "roster.json").items()
    }
    # A site that was never asked has none; that one is missing which should be there is for the audit to find.
    return {site: (file, public_hex) for site, (file, public_hex) in files.items() if file.exists()}


def _roster(path: Path) -> dict[str, str]:
    from privacy.errors import RunError
    from privacy.ledger import SERVER, SITE_NAME

    try:
        kept = json.loads(path.read_bytes())
        if "body" in kept:  # That of a federation, which its members signed.
            kept = {"sites": {member["name"]: member["key"] for member in kept["body"]["members"]}}
        roster = {**kept["sites"], **({SERVER: kept["server"]} if kept.get("server") else {})}
        if all(isinstance(hex_, str) and (s == SERVER or SITE_NAME.fullmatch(s)) for s, hex_ in roster.items()):
            return roster
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise RunError(f"{path}: expected the public key of each site, found something else")


def _site_of(path: Path) -> str:
    """The name in the ledger's first line: whoever reads the ledger then verifies that it was signed."""
    from privacy.errors import LedgerError
    from privacy.ledger import SERVER, SITE_NAME

    with open(path, "rb") as file:
        line = file.readline(2**20)
    try:
        site = json.loads(line)["site"]
        if site == SERVER or SITE_NAME.fullmatch(site):
            return str(site)
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise LedgerError(f"{path}: not a ledger: its first line names no site")


def _own_budget(
    path: Path, ledgers: Mapping[str, tuple[Path, str]], identity: Path | None, passphrase_file: Path | None
) -> SiteBudget:
    """The ledger whose owner's key `identity` is, verified. Raises `LedgerError` where it is nobody's here."""
    from privacy.budget import SiteBudget
    from privacy.errors import LedgerError
    from privacy.keys import IdentityKey, read_passphrase
    from privacy.ledger import Ledger

    if identity is None:
        raise LedgerError("--set and --settle write a signed entry: give the ledger's private key as --identity")
    signer = IdentityKey.load(identity, read_passphrase(passphrase_file))
    for site, (file, public_hex) in ledgers.items():
        if signer.public_hex == public_hex:
            ledger = Ledger(file, site, signer)
            if not ledger.entries:
                raise LedgerError(f"ledger of {site}: {file} has no entry yet; the site's first job opens it")
            return SiteBudget(ledger)
    owners = " or ".join(f"{site}'s ({public_hex[:16]}...)" for site, (_, public_hex) in sorted(ledgers.items()))
    raise LedgerError(f"{identity}: its key {signer.public_hex[:16]}... is not {owners or 'a key'} of {path}")


def _job_named(prefix: str, own: SiteBudget) -> str:
    from privacy.errors import LedgerError

    found = [job for job in own.accounts().jobs if prefix and job.startswith(prefix)]
    if len(found) != 1:
        raise LedgerError(f"ledger of {own.ledger.site}: {len(found)} jobs begin with {prefix!r}; name one")
    return found[0]


def _limit(text: str, unit: str) -> Limit:
    from privacy.budget import Limit

    lifted = text.startswith("none,")
    epsilon, delta = _numbers("--set", text.replace("none", "0", 1) if lifted else text, 2, "EPSILON,DELTA")
    return Limit(unit=unit, epsilon=None if lifted else epsilon, delta=delta)


def _planned_job(text: str, unit: str, purpose: str | None, number: int) -> JobAccount:
    from privacy.budget import JobAccount, Limit
    from privacy.errors import UnsupportedEvent
    from privacy.events import GaussianEvent

    noise, rate, steps, rounds = _numbers("--planned", text, 4, "Z,Q,STEPS,ROUNDS")
    if not (steps.is_integer() and rounds.is_integer() and rounds >= 1):
        raise UnsupportedEvent(f"--planned: expected whole steps and rounds > 0 in Z,Q,STEPS,ROUNDS, got {text!r}")
    # The clip norm does not matter to the cost, nor does the noise's grid in the digits that are shown.
    event = GaussianEvent(
        unit=unit, noise_multiplier=noise, clip_norm=1, sampling_rate=rate, count=int(steps), rng="os"
    )
    limit = Limit(unit=unit, epsilon=None, delta=1e-5)
    return JobAccount(f"planned {number}", purpose or "training", int(rounds), (event,), None, (limit,))


def _numbers(option: str, text: str, count: int, form: str) -> list[float]:
    from privacy.errors import UnsupportedEvent

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise UnsupportedEvent(f"{option}: expected {form}, got {text!r}")
    return numbers


def _statement(site: str, file: Path, public_hex: str, planned: Sequence[JobAccount]) -> dict[str, Any]:
    """What one ledger's budgets come to, or why it cannot be trusted."""
    from privacy.budget import Accounts
    from privacy.errors import FedchorusError
    from privacy.ledger import LedgerView

    statement: dict[str, Any] = {"site": site, "ok": False, "why": None}
    try:
        view = LedgerView(file, site, public_hex)
        view.refresh()
        accounts = Accounts.of(site, view.entries)
    except FedchorusError as error:
        return {**statement, "why": str(error)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # Signed by the site, and yet no entry of ours.
        return {**statement, "why": f"ledger of {site}: an entry is malformed ({type(error).__name__}: {error})"}
    lines = _budget_lines(accounts, planned)
    return {
        **statement,
        "ok": True,
        "entries": len(view.entries),
        "budgets": lines,
        "jobs": [_job_line(accounts, job) for job in accounts.jobs.values()],
        "planned": _planned_lines(accounts, planned, lines),
    }


def _budget_lines(accounts: Accounts, planned: Sequence[JobAccount]) -> list[dict[str, Any]]:
    """One line for each unit, over all purposes and for each; an epsilon that nobody can state is None."""
    jobs, deltas = list(accounts.jobs.values()), dict[str, float]()
    for limit in [*(limit for job in jobs for limit in job.limits), *accounts.budgets.values()]:
        deltas[limit.unit] = min(limit.delta, deltas.get(limit.unit, 1.0))
    for limit in [limit for job in planned for limit in job.limits]:
        deltas.setdefault(limit.unit, limit.delta)
    purposes = {job.purpose for job in [*jobs, *planned]} | {purpose for purpose, _ in accounts.budgets if purpose}
    lines = []
    for unit in sorted(deltas, reverse=True):
        for purpose in [None, *sorted(purposes)]:
            budget = accounts.budgets.get((purpose, unit))
            most, delta = (None, deltas[unit]) if budget is None else (budget.epsilon, budget.delta)
            together = _epsilon(accounts, unit, delta, purpose=purpose)
            lines.append(
                {
                    "unit": unit,
                    "purpose": purpose,
                    "limit": most,
                    "delta": delta,
                    "spent": _epsilon(accounts, unit, delta, purpose=purpose, spent_only=True),
                    "with_set_aside": together,
                    "left": None if most is None else 0.0 if together is None else max(0.0, most - together),
                }
            )
    return lines


def _job_line(accounts: Accounts, job: JobAccount) -> dict[str, Any]:
    return {
        "job": job.job,
        "purpose": job.purpose,
        "state": "settled" if job.settled else "under way" if job.rounds else "never planned",
        "rounds": job.rounds,
        "reserved": job.used,
        "limits": [
            {
                **limit.as_dict(),
                "spent": _epsilon(accounts, limit.unit, limit.delta, spent_only=True, jobs=job.job.__eq__),
            }
            for limit in job.limits
        ],
    }


def _planned_lines(
    accounts: Accounts, planned: Sequence[JobAccount], lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What each planned job costs together with all that was charged, set aside or planned before it."""
    costs = []
    for job in planned:
        after = accounts.with_plan(job)
        costs.append(
            {
                "job": job.job,
                "purpose": job.purpose,
                "rounds": job.rounds,
                "rounds_that_fit": accounts.rounds_that_fit(job),
                "together": [
                    {
                        **{key: line[key] for key in ("unit", "purpose", "limit", "delta")},
                        "epsilon": _epsilon(after, line["unit"], line["delta"], purpose=line["purpose"]),
                    }
                    for line in lines
                    if line["purpose"] in (None, job.purpose)
                ],
            }
        )
        accounts = after
    return costs


def _epsilon(accounts: Accounts, unit: str, delta: float, **chosen: Any) -> float | None:
    from privacy.errors import UnsupportedEvent

    try:
        epsilon = accounts.epsilon(unit, delta, **chosen)
    except UnsupportedEvent:
        return None
    return epsilon if math.isfinite(epsilon) else None


def _print_statements(statements: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # A pipe has no edge to wrap at.

    def show(*columns: str, rows: Sequence[Sequence[str]]) -> None:
        table = Table(*columns, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*map(escape, row))
        if rows:
            console.print(table)

    def bound(value: float | None) -> str:
        return "unbounded" if value is None else f"{value:.4f}"

    for statement in statements:
        if not statement["ok"]:
            console.print(f"NOT OK: {escape(statement['why'])}", style="bold red", soft_wrap=True)
            continue
        console.print(f"{escape(statement['site'])}: every entry verified ({statement['entries']})", style="bold")
        show(
            "unit", "purpose", "limit", "delta", "spent", "with set aside", "left",
            rows=[
                (
                    line["unit"],
                    line["purpose"] or "(all)",
                    "none" if line["limit"] is None else f"{line['limit']:g}",
                    f"{line['delta']:g}",
                    bound(line["spent"]),
                    bound(line["with_set_aside"]),
                    _figure(line["left"]),
                )
                for line in statement["budgets"]
            ],
        )  # fmt: skip
        show(
            "job", "purpose", "state", "rounds", "spent",
            rows=[
                (
                    job["job"][:12],
                    job["purpose"],
                    job["state"],
                    f"{job['reserved']} of {job['rounds']}",
                    ", ".join(f"{bound(limit['spent'])} ({limit['unit']})" for limit in job["limits"]),
                )
                for job in statement["jobs"]
            ],
        )  # fmt: skip
        show(
            "job", "rounds", "rounds that fit", "epsilon with all before",
            rows=[
                (
                    job["job"],
                    str(job["rounds"]),
                    str(job["rounds_that_fit"]),
                    ", ".join(
                        f"{bound(line['epsilon'])} ({line['unit']}, {line['purpose'] or 'all'})"
                        for line in job["together"]
                    ),
                )
                for job in statement["planned"]
            ],
        )  # fmt: skip
    if not statements:
        console.print("no ledger has been written yet")

"""`fedchorus audit`: what an auditor types. Needs neither torch nor flwr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from privacy.audit import Audit


def add_to(app: typer.Typer) -> None:
    app.command(name="audit", epilog="Example: fedchorus audit runs/hospitals-20260101-120000")(audit)


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

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # A pipe has no edge to wrap at.
    if result.sites:
        table = Table(
            "site", "entries", "releases", "epsilon (PLD)", "epsilon (RDP)", "claimed", "delta", "", box=box.SIMPLE_HEAD
        )
        for site in result.sites.values():
            table.add_row(
                site.site,
                str(site.entries),
                str(site.releases),
                _figure(site.spent.pld if site.spent else None),
                _figure(site.spent.rdp if site.spent else None),
                _figure(site.claimed),
                "-" if site.delta is None else f"{site.delta:g}",
                "ok" if site.ok else "NOT OK",
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

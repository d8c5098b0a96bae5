"""`fedchorus client | doctor | content`: what a data holder's engineer types. Heavy imports come late."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="The site's folder, as `fedchorus enrol` made it.", metavar="DIR")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the site's keys.", metavar="FILE")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")]


def add_to(app: typer.Typer) -> None:
    app.command(name="client", epilog="Example: fedchorus client north/")(client)
    app.command(name="doctor", epilog="Example: fedchorus doctor north/")(doctor)
    app.command(name="content", epilog="Example: fedchorus content job.toml >> north/policy.toml")(content)


def client(folder: Folder, passphrase_file: PassphraseFile = None, verbose: Verbose = False) -> None:
    """Run this site: connect to the coordinator, answer what the policy allows, go on after every crash."""
    from client.settings import Settings
    from privacy.errors import FedchorusError
    from privacy.keys import read_passphrase
    from privacy.logbook import Logbook
    from privacy.supervisor import NEEDS_A_PERSON, keep_alive

    try:
        site = Settings.load(folder).name
    except FedchorusError as error:
        # Not 1: a service manager starts again what ended so, and only a person can mend this.
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(NEEDS_A_PERSON) from None
    secret = read_passphrase(passphrase_file) or b""
    log = Logbook(f"client {site}", folder / "log.jsonl")
    raise typer.Exit(keep_alive([sys.executable, "-m", "client.node", str(folder)], log=log, secret=secret))


def doctor(
    folder: Folder,
    job: Annotated[
        Path | None, typer.Option(help="Try this job here, too: its terms, its data, its cost.", metavar="JOB.toml")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Look for what would stop this site before a job does, and say how to mend each thing."""
    from client.doctor import examine
    from privacy.keys import read_passphrase

    findings = examine(folder, read_passphrase(passphrase_file), job=job)
    for finding in findings:
        typer.echo(f"{finding.mark} {finding.what}: {finding.found}", err=as_json)
        if finding.fix:
            typer.echo(f"      -> {finding.fix}", err=as_json)
    ok = not any(finding.level == "error" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "findings": [finding.as_dict() for finding in findings]}))
    raise typer.Exit(0 if ok else 1)


def content(
    job: Annotated[Path, typer.Argument(help="A job file.", metavar="JOB.toml")], verbose: Verbose = False
) -> None:
    """Print what a policy file has to say to allow a job's task and strategy as they are installed here."""
    from client.content import describe
    from strategies.job import load_job

    typer.echo(describe(load_job(job)), nl=False)

"""`fedchorus enrol` and `fedchorus accept`: what a site's engineer types to join a federation."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.enrol import Review

PassphraseFile = Annotated[
    Path | None, typer.Option(help="A file with the passphrase of the site's keys.", metavar="FILE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: fedchorus enrol invitation.json --name north --out north")(enrol)
    app.command(epilog="Example: fedchorus accept north north.kit.json")(accept)


def enrol(
    invitation: Annotated[Path, typer.Argument(help="The coordinator's invitation.json.", metavar="INVITATION")],
    name: Annotated[str, typer.Option(help="This site's name in the federation.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="The site's folder, which this makes.", metavar="DIR")],
    fingerprint: Annotated[
        str | None, typer.Option(help="What the coordinator read out; another invitation is refused.", metavar="F")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make this site's keys, settings and policy, and a request to join. The keys never leave the folder."""
    from client.enrol import enrol as make
    from client.enrol import read_invitation
    from client.policy import POLICY_TEMPLATE
    from privacy.enrolment import is_fingerprint, key_fingerprint
    from privacy.errors import Refused
    from privacy.keys import read_passphrase

    invited = read_invitation(invitation)
    if fingerprint is not None and not is_fingerprint(fingerprint, invited.fingerprint):
        raise Refused(
            f"{invitation}: its fingerprint is {invited.fingerprint}, not the one given; ask the coordinator again"
        )
    request = make(invited, name, out, policy=POLICY_TEMPLATE, passphrase=read_passphrase(passphrase_file))
    if as_json:
        record = {
            "folder": str(out),
            "invitation": invited.fingerprint,
            "request": request.fingerprint,
            "key": key_fingerprint(request.identity),
        }
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{out}: the folder of {name} in {invited.federation}; keep a backup of its keys, which are secret")
    typer.echo(f"fingerprint of the invitation: {invited.fingerprint}")
    typer.echo(f"fingerprint of the request:    {request.fingerprint}")
    typer.echo(f"fingerprint of {name}'s key: {key_fingerprint(request.identity)}")
    typer.echo("next:")
    typer.echo("  1. call the coordinator: the invitation's fingerprint must be the one that you hear")
    typer.echo(f"  2. read out the request's fingerprint, and send {out / 'request.json'}")
    typer.echo(f"  3. edit {out / 'policy.toml'} (what may leave) and {out / 'site.toml'} (where the data are)")
    typer.echo(f"  4. when the kit is here: fedchorus accept {out} {name}.kit.json")


def accept(
    folder: Annotated[Path, typer.Argument(help="The site's folder.", metavar="DIR")],
    kit: Annotated[Path, typer.Argument(help="The coordinator's kit for this site.", metavar="KIT")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: the members' fingerprints were compared.")] = False,
    allow_changed_keys: Annotated[
        bool, typer.Option("--allow-changed-keys", help="A known member's key changed, or the roster is older: go on.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Accept a kit: show all members, ask, sign the roster, install the certificate.

    From then on this site works with these members under these keys alone.
    """
    from client.enrol import accept as take
    from client.enrol import review
    from privacy.keys import read_passphrase

    reviewed = review(folder, kit)
    _echo_review(reviewed, quiet=as_json)
    if not yes and not (reviewed.warnings and not allow_changed_keys):
        typer.confirm("Are these the members, and did they read out these fingerprints?", abort=True, err=True)
    roster = take(
        folder,
        reviewed,
        now=datetime.now(UTC),
        passphrase=read_passphrase(passphrase_file),
        allow_changed_keys=allow_changed_keys,
    )
    missing = [member.name for member in roster.members if member.name not in roster.signatures]
    if as_json:
        record = {"site": reviewed.kit.site, "roster": roster.hash, "version": roster.version, "unsigned": missing}
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{folder}: the roster is signed and pinned, the certificate is installed")
    if missing:
        typer.echo(f"still to sign it: {', '.join(missing)}")
    typer.echo(f"next: fedchorus client {folder}")


def _echo_review(reviewed: Review, *, quiet: bool) -> None:
    from privacy.enrolment import key_fingerprint

    roster = reviewed.roster
    typer.echo(f"fingerprint of the invitation: {reviewed.invitation.fingerprint}", err=quiet)
    typer.echo(f"roster of {roster.federation}, version {roster.version}; members and their keys:", err=quiet)
    width = max(len(member.name) for member in roster.members)
    for member in roster.members:
        own = "  (this site)" if member.name == reviewed.kit.site else ""
        typer.echo(f"  {member.name:{width}}  {key_fingerprint(member.key)}{own}", err=quiet)
    for line in reviewed.news:
        typer.echo(f"new: {line}", err=quiet)
    for line in reviewed.warnings:
        typer.echo(f"WARNING: {line}", err=True)

"""`fedchorus provision`, `sign`, `revoke` and `token`: what a coordinator types to make and keep a federation."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.membership import Pending, Signed

Folder = Annotated[Path, typer.Argument(help="The coordinator's folder.", metavar="DIR")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="A file with the passphrase of the coordinator's keys.", metavar="FILE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: fedchorus provision federation.toml --out coordinator")(provision)
    app.command(epilog="Example: fedchorus sign coordinator north/request.json south/request.json")(sign)
    app.command(epilog='Example: fedchorus revoke coordinator north --reason "laptop stolen"')(revoke)
    app.command(epilog="Example: fedchorus token coordinator alice")(token)


def provision(
    federation: Annotated[Path, typer.Argument(help="The federation's name, address and operators.", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="The coordinator's folder, which this makes.", metavar="DIR")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make a federation: certificate authority, the server's keys and certificate, invitation, operators' tokens."""
    from privacy.keys import read_passphrase
    from server.provision import provision as make

    made = make(federation, out, now=datetime.now(UTC), passphrase=read_passphrase(passphrase_file))
    invitation = made.invitation
    operators = {name: str(path) for name, path in made.operators.items()}
    if as_json:
        _print_json(folder=str(out), fingerprint=invitation.fingerprint, operators=operators)
        return
    typer.echo(f"{out}: the folder of the coordinator of {invitation.federation}; its keys are secret")
    typer.echo(f"fingerprint of the invitation: {invitation.fingerprint}")
    typer.echo("next:")
    typer.echo(f"  1. send {out / 'invitation.json'} to each site, and read the fingerprint out over the phone")
    for name, path in operators.items():
        typer.echo(f"  2. hand {path} to {name}, who submits jobs, over a safe way: it holds a secret token")
    typer.echo(f"  3. start the server: fedchorus server {out}")
    typer.echo(f"  4. when the sites' requests are here: fedchorus sign {out} REQUEST...")


def sign(
    folder: Folder,
    requests: Annotated[list[Path], typer.Argument(help="Sites' request.json files.", metavar="REQUEST...")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: the fingerprints were compared.")] = False,
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(help="A fingerprint that a site read out, in place of asking. Repeatable.", metavar="F"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="A known site may come with a new key.")] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Let sites in: check their requests, ask, issue certificates, write a kit for each.

    Give all requests that are there in one call: each change of members is a new roster, which every site must accept.
    A request of a known site with the same key renews its certificate.
    """
    from privacy.keys import read_passphrase
    from server.membership import read_request, review
    from server.membership import sign as issue

    pending = review(folder, [read_request(folder, path) for path in requests], replace_keys=replace)
    for item in pending:
        _echo_pending(item, quiet=as_json)
    _compare(pending, fingerprint)
    if not yes and not fingerprint:
        typer.confirm("Did each site read out its fingerprint, and is it the same?", abort=True, err=True)
    now, passphrase = datetime.now(UTC), read_passphrase(passphrase_file)
    signed = issue(folder, [item.request for item in pending], now=now, passphrase=passphrase, replace_keys=replace)
    _echo_signed(signed, as_json=as_json)


def revoke(
    folder: Folder,
    site: Annotated[str, typer.Argument(help="The site's name.", metavar="SITE")],
    reason: Annotated[str, typer.Option(help="Why, for the record.", metavar="TEXT")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Let a site in no longer, from its next call on; make a roster without it and kits for the others."""
    from privacy.keys import read_passphrase
    from server.membership import revoke as end

    signed = end(folder, site, reason=reason, now=datetime.now(UTC), passphrase=read_passphrase(passphrase_file))
    if not as_json:
        typer.echo(f"{site} is revoked: its certificates and its identity key are let in no longer")
    _echo_signed(signed, as_json=as_json)


def token(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The operator's name.", metavar="NAME")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make a new token for an operator, who submits jobs; an older one of the same name ends."""
    from server.operators import new_token
    from server.provision import read_invitation

    path = new_token(folder, name, read_invitation(folder), now=datetime.now(UTC))
    if as_json:
        _print_json(operator=name, file=str(path))
    else:
        typer.echo(f"hand {path} to {name} over a safe way: it holds a secret token, which is kept nowhere else")


def _echo_pending(item: Pending, *, quiet: bool) -> None:
    meaning = {
        "new": "a new site",
        "renewal": "a known site, same key: a new certificate",
        "replacement": "A KNOWN SITE WITH A NEW KEY: the old key and its certificates end",
    }
    typer.echo(f"{item.request.site}: {meaning[item.kind]}", err=quiet)
    typer.echo(f"  fingerprint of the request: {item.request.fingerprint}", err=quiet)


def _compare(pending: list[Pending], given: list[str] | None) -> None:
    from privacy.enrolment import is_fingerprint
    from privacy.errors import Refused

    for item in pending if given else []:
        if not any(is_fingerprint(one, item.request.fingerprint) for one in given or []):
            raise Refused(f"{item.request.site}: its request's fingerprint is none of those given; do not sign it")


def _echo_signed(signed: Signed, *, as_json: bool) -> None:
    if as_json:
        kits = {site: str(path) for site, path in signed.kits.items()}
        _print_json(kits=kits, roster_version=signed.version, roster_changed=signed.changed)
        return
    if signed.changed:
        typer.echo(f"the roster is now version {signed.version}: every site accepts it with its kit")
    for site, path in signed.kits.items():
        typer.echo(f"send {path} to {site}, who types: fedchorus accept DIR {path.name}")


def _print_json(**record: Any) -> None:
    typer.echo(json.dumps(record))

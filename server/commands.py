"""`fedchorus server | submit | approve | status | logs | stop | fetch`: what coordinators and operators type."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.remote import Remote
    from strategies.job import Job
    from strategies.parameters import Parameters, Vector

AsJson = Annotated[bool, typer.Option("--json", help="Progress to stderr; one JSON object as the last line of stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the keys.", metavar="FILE")
]
OperatorFile = Annotated[
    Path | None,
    typer.Option(
        "--operator", help="The operator's file; else $FEDCHORUS_OPERATOR, else operator.json.", metavar="FILE"
    ),
]
JobName = Annotated[str, typer.Argument(help="A job's id, or its beginning.", metavar="JOB")]
OPERATOR_VARIABLE = "FEDCHORUS_OPERATOR"
BuildModel = Callable[["Job"], "tuple[Parameters, Vector]"]
ENDED = ("finished", "stopped", "paused")


def add_to(app: typer.Typer, *, build_model: BuildModel) -> None:
    """`build_model` makes the model that a job starts from: it needs the training framework, which a server lacks."""

    def submit_job(
        job: Annotated[Path, typer.Argument(help="A job file.", metavar="JOB.toml")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", help="Override a key: training.rounds=5.", metavar="KEY=VALUE")
        ] = None,
        approvals: Annotated[
            list[Path] | None, typer.Option("--approval", help="What `fedchorus approve` wrote.", metavar="FILE")
        ] = None,
        model: Annotated[
            Path | None, typer.Option(help="The model to start from; by default the task's own, from the job's seed.")
        ] = None,
        wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
        operator: OperatorFile = None,
        as_json: AsJson = False,
        verbose: Verbose = False,
    ) -> None:
        """Submit a job to the federation: checked, hashed, and run when its sites are there and agree."""
        resolved, content, _ = _prepared(job, overrides, model, build_model)
        pairs = [_approval(path) for path in approvals or []]
        with _remote(operator) as remote:
            view = remote.submit(resolved.toml.decode(), content, pairs)
            typer.echo(f"submitted {view['id']} (job hash {view['hash']})", err=as_json)
            if wait:
                view = _follow(remote, view["id"], err=as_json)
        if as_json:
            typer.echo(json.dumps(view))
        if wait and view["state"] != "finished":
            raise typer.Exit(1)

    def approve(
        job: Annotated[Path, typer.Argument(help="A job file.", metavar="JOB.toml")],
        key: Annotated[Path, typer.Option(help="The approver's Ed25519 key (PEM); made if there is none.")],
        out: Annotated[Path, typer.Option(help="Where to write the approval.")],
        overrides: Annotated[
            list[str] | None,
            typer.Option("--set", help="Override a key, as it will be submitted.", metavar="KEY=VALUE"),
        ] = None,
        model: Annotated[Path | None, typer.Option(help="The model to start from.")] = None,
        passphrase_file: PassphraseFile = None,
        verbose: Verbose = False,
    ) -> None:
        """Sign a job and the model it starts from, as one of the federation's approvers."""
        from privacy.keys import IdentityKey, read_passphrase
        from strategies.messages import approval_of

        resolved, _, digest = _prepared(job, overrides, model, build_model)
        passphrase = read_passphrase(passphrase_file)
        signer = IdentityKey.load(key, passphrase) if key.exists() else IdentityKey.create(key, passphrase)
        signature = signer.sign(approval_of(resolved.hash, digest)).hex()
        out.write_text(json.dumps({"key": signer.public_hex, "signature": signature}) + "\n")
        typer.echo(f"{out}: approves job {resolved.hash} with key {signer.public_hex}")

    app.command(name="server", epilog="Example: fedchorus server coordinator/")(server)
    app.command(name="submit", epilog="Example: fedchorus submit job.toml --wait")(submit_job)
    app.command(name="approve", epilog="Example: fedchorus approve job.toml --key alice.pem --out alice.json")(approve)
    app.command(name="status", epilog="Example: fedchorus status")(status)
    app.command(name="logs", epilog="Example: fedchorus logs hospitals-1a2b3c4d --follow")(logs)
    app.command(name="stop", epilog="Example: fedchorus stop hospitals-1a2b3c4d")(stop)
    app.command(name="fetch", epilog="Example: fedchorus fetch hospitals-1a2b3c4d --out model.safetensors")(fetch)


def server(
    folder: Annotated[Path, typer.Argument(help="The folder that `fedchorus provision` made.", metavar="DIR")],
    passphrase_file: PassphraseFile = None,
    verbose: Verbose = False,
) -> None:
    """Run the coordinator: sites connect to it, operators submit to it; it goes on after every crash."""
    from privacy.errors import FedchorusError
    from privacy.keys import read_passphrase
    from privacy.logbook import Logbook
    from privacy.supervisor import NEEDS_A_PERSON, keep_alive
    from server.provision import ServerSettings

    try:
        settings = ServerSettings.load(folder)
    except FedchorusError as error:
        # Not 1: a service manager starts again what ended so, and only a person can mend this.
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(NEEDS_A_PERSON) from None
    secret = read_passphrase(passphrase_file) or b""
    log = Logbook("server", folder / "log.jsonl")
    log.info("starts", federation=settings.federation, listen=settings.listen)
    raise typer.Exit(keep_alive([sys.executable, "-m", "server.process", str(folder)], log=log, secret=secret))


def status(
    job: Annotated[str | None, typer.Argument(help="One job; without it, all, and the sites.", metavar="JOB")] = None,
    operator: OperatorFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show where jobs stand and which sites are there."""
    with _remote(operator) as remote:
        found: dict[str, Any] = {"jobs": [remote.job(job)] if job else remote.jobs(), **({} if job else remote.sites())}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, site in found.get("sites", {}).items():
        state = "online" if site["online"] else "offline"
        typer.echo(f"site {name:<24}{state}{'' if site['signed'] else ', has not accepted the roster yet'}")
    for view in found["jobs"]:
        typer.echo(_line(view))


def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    operator: OperatorFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what happened to a job. What happened at a site is in that site's own log."""
    with _remote(operator) as remote:
        seen = 0
        while True:
            ended = remote.job(job)["state"] in ENDED
            for event in remote.events(job, seen):
                seen += 1
                typer.echo(json.dumps(event) if as_json else _event(event))
            if not follow or ended:
                return
            time.sleep(0.5)


def stop(job: JobName, operator: OperatorFile = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Stop a job after the message under way; `fedchorus resume` goes on."""
    with _remote(operator) as remote:
        view = remote.stop(job)
    typer.echo(json.dumps(view) if as_json else f"{view['id']}: is asked to stop")


def resume_job(job: str, *, operator: Path | None = None, as_json: bool) -> None:
    """Go on with a job that was stopped or needs a person, from its last round."""
    with _remote(operator) as remote:
        view = remote.resume(job)
    typer.echo(json.dumps(view) if as_json else _line(view))


def fetch(
    job: JobName,
    out: Annotated[
        Path, typer.Option(help="NAME.safetensors for the model alone; else a folder with job and summary.")
    ],
    operator: OperatorFile = None,
    verbose: Verbose = False,
) -> None:
    """Fetch the model of a finished job, alone or as a folder that `statistics` and `evaluate` read."""
    with _remote(operator) as remote:
        if out.suffix == ".safetensors":
            remote.fetch(job, out)
        else:
            remote.fetch_folder(job, out)
    typer.echo(str(out))


def has_operator() -> bool:
    """Whether this shell is an operator's."""
    return OPERATOR_VARIABLE in os.environ or Path("operator.json").exists()


def _remote(operator: Path | None) -> Remote:
    from privacy.errors import RunError
    from server.operators import Operator
    from server.remote import Remote

    if operator is None and not has_operator():
        raise RunError(
            f"no operator's file: give --operator FILE, or set {OPERATOR_VARIABLE}; the coordinator makes one with "
            "`fedchorus token`"
        )
    return Remote(Operator.load(operator or Path(os.environ.get(OPERATOR_VARIABLE, "operator.json"))))


def _prepared(
    path: Path, overrides: list[str] | None, model: Path | None, build_model: BuildModel
) -> tuple[Job, bytes, str]:
    """The job as it travels, the bytes of its model and the model's hash."""
    from strategies.catalogue import strategy_for
    from strategies.job import load_job
    from strategies.parameters import Parameters, vector_hash

    here = load_job(path, overrides or [])
    job = here.portable
    strategy_for(job)
    if model is not None:
        _, vector = Parameters.load(model)
        return job, model.read_bytes(), vector_hash(vector)
    parameters, vector = build_model(here)  # Its checkpoint is named as it is found here.
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "initial.safetensors"
        parameters.save(vector, written, {"job": job.hash, "round": "0"})
        return job, written.read_bytes(), vector_hash(vector)


def _approval(path: Path) -> tuple[str, str]:
    from privacy.errors import JobError

    try:
        record = json.loads(path.read_bytes())
        return str(record["key"]), str(record["signature"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise JobError(f"{path}: not an approval; `fedchorus approve` writes one") from None


def _follow(remote: Remote, job: str, *, err: bool) -> dict[str, Any]:
    seen = 0
    while True:
        view = remote.job(job)
        for event in remote.events(job, seen):
            seen += 1
            typer.echo(_event(event), err=err)
        if view["state"] in ENDED:
            return view
        time.sleep(0.5)


def _line(view: dict[str, Any]) -> str:
    why = f" ({view['why']})" if view["why"] else ""
    return f"job  {view['id']:<32} {view['state']:<10} round {view['rounds']} of {view['of']}{why}"


def _event(event: dict[str, Any]) -> str:
    said = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event") and value)
    return f"{str(event['time'])[11:19]} {event['event']}{f': {said}' if said else ''}"

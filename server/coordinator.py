"""The coordinator's one process: Flower's SuperLink behind the guard, our API, and the job that runs.

    sites -- TLS --> listeners -> guard -> link (Flower's Fleet API)
    operators ----------------------> api   -> this
    ServerApp -- loopback ----------> link (Flower's Runtime API), api (internal)

One job runs at a time, in the order of submission, in a process of its own (`server.serverapp`). When that is killed
it is started again, and when this one is, both are: the job goes on after its last round.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography import x509

from privacy.authority import Authority, Peer, Revocations, peer_of
from privacy.enrolment import Invitation, split_address
from privacy.errors import JobError, RunError
from privacy.keys import IdentityKey
from privacy.logbook import Logbook
from privacy.secagg.roster import Roster
from privacy.supervisor import only_one
from server.audit_log import AuditLog
from server.deployment import reason
from server.flower_auth import RunNotes, TokenAuthn
from server.guard import Guard, Operators
from server.jobs import UNFINISHED, JobFolder, check_submission, jobs_in
from server.link import Link, RunTicket
from server.listen import Caller, Listeners, PublicListener
from server.membership import add_signature, renew, site_keys
from server.provision import ServerSettings, read_invitation, renew_server

RESTART_S = 1.0
IN_VAIN = 20  # So often a job's process may end, one time after the other, before a person is asked.
RENEW_BEFORE = 1 / 3  # Of a certificate's life.
MOST_MODEL = 2**36


@dataclass
class Coordinator:
    """What `fedchorus server` runs: `serve` until `stop`. See `server.api.Office` for what the API asks of it."""

    folder: Path
    log: Logbook
    passphrase: bytes | None = None
    settings: ServerSettings = field(init=False)
    invitation: Invitation = field(init=False)
    _secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _running: str = ""
    _restarts: int = 0
    _in_vain: int = 0
    _last: tuple[str, int] = ("", 0)
    _started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.settings = ServerSettings.load(self.folder)
        self.invitation = read_invitation(self.folder)
        self._key = IdentityKey.load(self.folder / "identity.pem", self.passphrase)
        self._authority = Authority.load(self.folder / "authority", self.passphrase)
        self._revocations = Revocations(self.folder / "revoked.json")
        (self.folder / "jobs").mkdir(exist_ok=True)

    def serve(self) -> None:
        """Serve until `stop`. Raises `RunError` for whatever keeps the server from starting."""
        with only_one(self.folder / "lock", what="the coordinator's server"):
            self._serve()

    def _serve(self) -> None:
        from server.api import make_api

        self._renew_own()
        operators = Operators(self.folder / "operators.json")
        self._link = Link(
            database=self.folder / "flower.db",
            sites=site_keys(self.folder),
            control=TokenAuthn(lambda token: operators.name_of(token) is not None or self._is_own(token)),
            notes=RunNotes(),
            site_of=_site_of,
        )
        self._link.end_all_runs()  # Of a process that was killed.
        host, port = split_address(self.settings.listen)
        with AuditLog(self.folder / "audit.jsonl", key=self._key) as audit:
            guard: Guard[Peer] = Guard(
                self._link,
                api=make_api(self),
                audit=audit,
                peer_of=peer_of,
                is_revoked=self._revocations.is_revoked,
                operators=operators,
                internal_secret=self._secret,
                public_metrics=self.settings.public_metrics,
            )
            self._listeners = Listeners(
                guard,
                public=PublicListener(
                    certificate=self.folder / "tls" / "server.pem",
                    key=self.folder / "tls" / "server.key",
                    key_passphrase=self.passphrase,
                    client_authority=self.folder / "authority" / "ca.pem",
                    host=host,
                    port=port,
                ),
            )
            clerk = threading.Thread(target=self._work, name="jobs")
            clerk.start()
            self.log.info("serves", federation=self.settings.federation, listen=self.settings.listen)
            try:
                self._listeners.serve()
            finally:
                self._stopping.set()
                clerk.join()

    def stop(self) -> None:
        """End soon, from any thread: what runs can be resumed, and is when the server starts again."""
        self._stopping.set()
        self._link.let_go()
        self._listeners.stop()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._listeners.started.wait()
        while not self._stopping.wait(0.2):
            try:
                self._renew_own()
                waiting = [job for job in jobs_in(self.folder / "jobs") if job.state in UNFINISHED]
                if waiting and self._has_everybody(waiting[0]):
                    self._run(waiting[0])
            except Exception as error:  # noqa: BLE001 (one damaged file must not end the work on all jobs unnoticed)
                self.log.error("the work on jobs is held up", why=reason(error))
                self._stopping.wait(10.0)

    def _has_everybody(self, job: JobFolder) -> bool:
        """Whether all members have signed the roster: before that there is no federation to run a job in."""
        roster = Roster.load(self.folder / "roster.json") if (self.folder / "roster.json").exists() else None
        missing = ["everybody"] if roster is None else sorted({m.name for m in roster.members} - set(roster.signatures))
        if missing and not self._stopping.is_set():
            why = f"for {', '.join(missing)} to sign the roster (`fedchorus accept`, then `fedchorus client`)"
            if job.read("state.json").get("why") != why:
                job.move("waiting", why)
            self._stopping.wait(1.0)
        return not missing

    def _run(self, job: JobFolder) -> None:
        """Run one ServerApp process to its end; the loop above starts it again unless the job has ended."""
        self._link.enrol(site_keys(self.folder))
        ticket = self._link.open_run()
        self._running = job.id
        try:
            code = self._watch(job, ticket)
        finally:
            self._running = ""
            self._link.close_run(ticket)
        if self._stopping.is_set() or job.state not in UNFINISHED:
            return
        self._restarts += 1
        job.note("the ServerApp's process ended", code=code)
        rounds = len(job.lines("metrics.jsonl"))
        self._in_vain = self._in_vain + 1 if (job.id, rounds) == self._last else 1
        self._last = (job.id, rounds)
        if self._in_vain >= IN_VAIN:
            job.move("paused", f"its process ended {self._in_vain} times without a round; see the server's output")
            return
        self.log.warning("a ServerApp ended and is started again", job=job.id, code=code)
        self._stopping.wait(RESTART_S)

    def _watch(self, job: JobFolder, ticket: RunTicket) -> int:
        told = {
            "run": ticket.run,
            "task": ticket.task,
            "token": ticket.token,
            "port": self._listeners.ports["loopback"],
            "secret": self._secret,
            "passphrase": self.passphrase.decode() if self.passphrase is not None else None,
            "deadline_s": self.settings.round_deadline_s,
            "patience_s": self.settings.patience_s,
        }
        command = [sys.executable, "-m", "server.serverapp", str(self.folder), job.id]
        # Its calls go to loopback alone, and must not go to a proxy that the environment names.
        plain = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=plain) as process:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(told).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # It ended already: `wait` says how.
            while process.poll() is None and not self._stopping.wait(0.1):
                pass
            if process.poll() is None:
                process.terminate()
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()

    # -- what the API asks ---------------------------------------------------------------------------------------------

    def federation(self) -> dict[str, Any]:
        return {"federation": self.settings.federation, "version": version("fedchorus"), "time": time.time()}

    def keep_model(self, digest: str, at: int, piece: bytes) -> dict[str, Any]:
        path = self._upload(digest)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(path, "r+b" if path.exists() else "x+b") as file:
            if at > file.seek(0, 2) or at + len(piece) > MOST_MODEL:
                raise RunError(f"a piece that begins at {at} does not continue the {file.tell()} bytes that are here")
            file.seek(at)
            file.write(piece)
            file.truncate()
            return {"bytes": file.tell()}

    def submit(self, record: dict[str, Any], *, operator: str) -> dict[str, Any]:
        if not re.fullmatch("[0-9a-f]{64}", str(record["model"])):  # It becomes a file's name.
            raise JobError("the job's initial model is not named by its SHA-256")
        model = self._upload(str(record["model"]))
        approvals = [(str(key), str(signature)) for key, signature in record["approvals"]]
        if not model.exists() or hashlib.sha256(model.read_bytes()).hexdigest() != model.stem:
            raise JobError("the job's initial model did not come whole; submit it again")
        job, _ = check_submission(
            str(record["toml"]),
            model,
            approvals,
            approvers=self.invitation.approvers,
            required=self.invitation.required,
            strategies=self.settings.strategies,
        )
        content = model.read_bytes()
        folder = JobFolder.create(self.folder / "jobs", job, model=content, approvals=approvals)
        folder.note("submitted by", operator=operator)
        model.unlink()
        return folder.view()

    def jobs(self) -> list[dict[str, Any]]:
        return [job.view() for job in jobs_in(self.folder / "jobs")]

    def job(self, name: str) -> dict[str, Any]:
        return self._job(name).view()

    def events(self, name: str, after: int) -> list[dict[str, Any]]:
        return self._job(name).events(after)

    def result(self, name: str) -> dict[str, Any]:
        job = self._job(name)
        summary = job.read("summary.json") if job.state == "finished" else None
        return {"toml": job.job.toml.decode(), "summary": summary}

    def model(self, name: str, at: int) -> bytes:
        from server.api import PIECE

        job = self._job(name)
        if not job.model.exists():
            raise RunError(f"job {job.id}: has no model yet, it is {job.state}")
        with open(job.model, "rb") as file:
            file.seek(at)
            return file.read(PIECE)

    def stop_job(self, name: str) -> dict[str, Any]:
        job = self._job(name)
        if job.state not in UNFINISHED:
            raise RunError(f"job {job.id}: is {job.state}, there is nothing to stop")
        job.ask_to_stop()
        if self._running != job.id:
            job.move("stopped", "a person stopped it; `fedchorus resume` goes on")
        return job.view()

    def resume_job(self, name: str) -> dict[str, Any]:
        job = self._job(name)
        if job.state not in ("stopped", "paused") and not job.lacks_delivery:
            raise RunError(f"job {job.id}: is {job.state}, there is nothing to resume")
        (job.path / "stop").unlink(missing_ok=True)
        self._in_vain = 0
        job.move("queued", "resumed")
        return job.view()

    def sites(self) -> dict[str, Any]:
        path = self.folder / "roster.json"
        roster = Roster.load(path) if path.exists() else None
        signed, known = set(roster.signatures if roster is not None else ()), self._link.sites()
        return {
            "roster": None if roster is None else {"version": roster.version, "hash": roster.hash},
            "sites": {
                member.name: {
                    "online": known.get(member.name, {}).get("online", False),
                    "signed": member.name in signed,
                }
                for member in (roster.members if roster is not None else ())
            },
        }

    def certificate(self, site: str, csr: str, certificate_der: bytes) -> dict[str, Any]:
        days, now = self.settings.certificate_days, datetime.now(UTC)
        peer = peer_of(certificate_der)
        pem = renew(self.folder, csr.encode(), peer=peer, authority=self._authority, days=days, now=now)
        self._link.enrol(site_keys(self.folder))
        return {"certificate": pem.decode()}

    def sign_roster(self, site: str, signature: str) -> dict[str, Any]:
        roster = add_signature(self.folder, site, signature)
        self._link.enrol(site_keys(self.folder))  # It may have been signed since the server began.
        return {"hash": roster.hash, "version": roster.version, "signatures": dict(roster.signatures)}

    def ring(self, sites: list[str]) -> None:
        self._link.ring(sites)

    async def wait(self, since: int, timeout_s: float) -> dict[str, Any]:
        number, sites = await self._link.wait(since, min(timeout_s, 30.0))
        return {"version": number, "sites": sites}

    def metrics(self) -> str:
        from server.metrics import render

        sites, jobs = self._link.sites(), jobs_in(self.folder / "jobs")
        return render(sites, [job.view() for job in jobs], restarts=self._restarts, started=self._started)

    def _is_own(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._secret.encode())

    # -- its own affairs -----------------------------------------------------------------------------------------------

    def _job(self, name: str) -> JobFolder:
        return JobFolder.open(self.folder / "jobs", name)

    def _upload(self, digest: str) -> Path:
        return self.folder / "uploads" / f"{digest}.safetensors"

    def _renew_own(self) -> None:
        certificate = x509.load_pem_x509_certificate((self.folder / "tls" / "server.pem").read_bytes())
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if datetime.now(UTC) > end - (end - begin) * RENEW_BEFORE:
            renew_server(self.folder, now=datetime.now(UTC), passphrase=self.passphrase)


def _site_of(scope: Mapping[str, Any]) -> str | None:
    caller: Caller | None = scope.get("fedchorus")
    return None if caller is None else caller.site

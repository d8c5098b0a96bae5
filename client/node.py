"""A site's node: connect, answer, reconnect. `python -m client.node FOLDER`, kept alive by `fedchorus client`.

Losing the network, or the server, is no error but a wait that is said: the node tries again for as long as it runs.
A mistake in the site's own files ends it before it connects, with exit code 2.
"""

from __future__ import annotations

import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import httpx
from cryptography import x509

from client.desk import Desk
from client.enrol import add_signatures, install_certificate, read_invitation, renewal_csr
from client.fleet import FleetLink, Incoming, NotAdmitted, RunOver, Stranger, Unreachable, _said
from client.health import HealthServer, Status
from client.policy import Policy
from client.settings import Settings, SiteFolder
from privacy.errors import FedchorusError, Refused, RunError
from privacy.keys import IdentityKey, TlsKey
from privacy.logbook import Logbook
from privacy.secagg.roster import Roster
from privacy.supervisor import NEEDS_A_PERSON, STOPPED, end_with_parent, only_one
from strategies.messages import MalformedMessage

FIRST_S, LONGEST_S = 0.5, 5.0  # Between two attempts to reach the server.
RENEW_BEFORE = 1 / 3  # Of a certificate's life.


class Node:
    """One site's node. `run` returns when `stop` was called."""

    def __init__(self, folder: Path, log: Logbook, passphrase: bytes | None = None) -> None:
        """Check all of the site's own files. Raises a `FedchorusError` for whatever a person must mend."""
        self.folder, self.log, self._passphrase = SiteFolder(folder), log, passphrase
        self.settings = Settings.load(folder)
        self.policy = Policy.load(self.folder.policy)
        self.invitation = read_invitation(self.folder.invitation)
        self._tls = TlsKey.load(self.folder.tls_key, passphrase)
        self._identity = IdentityKey.load(self.folder.identity, passphrase)
        self._roster = self._own_roster()
        self.status = Status(self.settings.name)
        self._stopping = threading.Event()
        self._pause_s = FIRST_S
        self._desk: Desk | None = None

    def run(self) -> None:
        """Connect and answer until `stop`, whatever happens to the network or the server."""
        health = HealthServer(self.settings.health.listen, self.status) if self.settings.health.listen else None
        try:
            while not self._stopping.is_set():
                try:
                    self._session()
                except (FedchorusError, httpx.HTTPError, OSError) as error:
                    why = str(error) or type(error).__name__
                    self.status.say("waiting", why)
                    self.log.warning("no connection to the coordinator", why=why, again_in_s=round(self._pause_s, 1))
                    self._stopping.wait(self._pause_s)
                    self._pause_s = min(self._pause_s * 2, LONGEST_S)
        finally:
            if self._desk is not None:
                self._desk.close()
            if health is not None:
                health.close()

    def stop(self) -> None:
        self._stopping.set()

    def _session(self) -> None:
        """One connection, from the handshake to its loss. Raises what ended it."""
        self._renew_if_due()
        with self._api() as api:
            self._hand_in_signature(api)
        if self._stopping.is_set():
            return
        link = FleetLink(self.settings.server, context=self._context(), key=self._tls)
        try:
            link.activate()
            self._pause_s = FIRST_S
            self.status.say("connected")
            self.log.info("connected", server=self.settings.server, roster=self._roster.hash)
            self._desk = self._desk or Desk(
                folder=self.folder,
                settings=self.settings,
                policy=self.policy,
                invitation=self.invitation,
                identity=self._identity,
                roster=self._roster,
                log=self.log,
            )
            while not self._stopping.is_set():
                if self._renew_if_due():
                    return  # Connect anew, with the new certificate.
                self._serve_one(link, self._desk)
        finally:
            link.close()

    def _serve_one(self, link: FleetLink, desk: Desk) -> None:
        try:
            incoming = link.receive()
        except Stranger as error:
            self.log.warning("refused a message", why=str(error))
            link.decline(error.message)
            return
        except (RunOver, Refused, MalformedMessage) as error:
            self.log.warning("a message was lost", why=str(error))
            return
        if incoming is not None:
            with self.status.busy(answered=lambda: desk.answered, refused=lambda: desk.refused):
                self._answer(link, desk, incoming)

    def _answer(self, link: FleetLink, desk: Desk, incoming: Incoming) -> None:
        try:
            text, seal, answer = desk.answer(incoming.text, incoming.seal, incoming.array)
        except Exception as error:  # noqa: BLE001 (nothing of it leaves, whatever it is)
            why = str(error) if isinstance(error, FedchorusError) else f"unexpected {type(error).__name__}"
            self.log.warning("gave no answer", why=why)
            self._quietly(lambda: link.decline(incoming.message))
            return
        self._quietly(lambda: link.answer(incoming, text, seal, answer))

    def _quietly(self, send: Callable[[], None]) -> None:
        try:
            send()
        except RunOver as error:
            self.log.info("an answer came too late", why=str(error))

    # -- enrolment that goes on ----------------------------------------------------------------------------------------

    def _own_roster(self) -> Roster:
        if not self.folder.roster.exists() or not self.settings.roster:
            raise RunError(
                f"{self.folder.path}: not enrolled yet: send request.json to the coordinator, then `fedchorus accept "
                f"{self.folder.path} KIT` with the kit that comes back"
            )
        roster = Roster.load(self.folder.roster)
        if roster.hash != self.settings.roster:
            raise RunError(f"{self.folder.roster}: not the roster that site.toml pins; run `fedchorus accept` again")
        return roster

    def _hand_in_signature(self, api: httpx.Client) -> None:
        """Give the coordinator this site's signature under the roster, and wait for everybody else's."""
        said = ""
        while not self._stopping.is_set():
            mine = self._roster.signatures[self.settings.name]
            found = _checked(api.post("/site/roster", json={"signature": mine}))
            if found.get("hash") != self._roster.hash:
                raise NotAdmitted(
                    f"the coordinator's roster is version {found.get('version')}, this site agreed to version "
                    f"{self._roster.version}; ask the coordinator for the new kit, then `fedchorus accept`"
                )
            signatures = found.get("signatures")
            if not isinstance(signatures, dict):
                raise Unreachable("the server answers without the roster's signatures; compare versions")
            self._roster = add_signatures(self.folder.path, signatures)
            missing = sorted({member.name for member in self._roster.members} - set(self._roster.signatures))
            if not missing:
                self._roster.check(self.settings.roster)
                return
            why = f"for {', '.join(missing)} to accept the roster"
            if why != said:
                self.log.info("waits", why=why)
                self.status.say("waiting", why)
                said = why
            self._stopping.wait(2.0)

    def _renew_if_due(self) -> bool:
        certificate = x509.load_pem_x509_certificate(self.folder.certificate.read_bytes())
        begin, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
        self.status.certificate_until = end.timestamp()
        if now < end - (end - begin) * RENEW_BEFORE or time.monotonic() < self.status.no_renewal_before:
            return False
        self.status.no_renewal_before = time.monotonic() + 60.0
        try:
            with self._api() as api:
                csr = renewal_csr(self.folder.path, self._passphrase).decode()
                found = _checked(api.post("/site/certificate", json={"csr": csr}))
            pem = str(found["certificate"]).encode()
            install_certificate(self.folder.path, pem, now=now, passphrase=self._passphrase)
        except (FedchorusError, httpx.HTTPError, KeyError) as error:
            self.log.warning("the certificate was not renewed", why=str(error), valid_until=end.isoformat())
            return False
        self.log.info("the certificate was renewed")
        return True

    def _context(self) -> ssl.SSLContext:
        return client_context(self.folder, self._passphrase)

    def _api(self) -> httpx.Client:
        base = f"https://{self.settings.server}/v1/fedchorus"
        return httpx.Client(base_url=base, verify=self._context(), timeout=30.0)


def client_context(folder: SiteFolder, passphrase: bytes | None = None) -> ssl.SSLContext:
    """TLS with this site's certificate, which believes the federation's authority and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(folder.authority)
        context.load_cert_chain(folder.certificate, folder.tls_key, password=passphrase or b"")
    except (OSError, ssl.SSLError) as error:
        raise RunError(
            f"{folder.path}: certificate, key and authority do not go together ({error.args[-1]}); accept the kit again"
        ) from None
    return context


def _checked(answer: httpx.Response) -> dict[str, object]:
    if answer.status_code in (401, 403):
        raise NotAdmitted(f"the server does not let this site in: {_said(answer) or answer.status_code}")
    try:
        record = answer.json() if answer.status_code == 200 else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        said = _said(answer) or "it is busy or of another version"
        raise Unreachable(f"the server answers {answer.status_code}: {said}")
    return record


def main() -> None:
    folder = Path(sys.argv[1])
    log = Logbook(f"client {_name_of(folder)}", folder / "log.jsonl")
    passphrase = sys.stdin.buffer.readline().rstrip(b"\n") or None
    end_with_parent()
    try:
        node = Node(folder, log, passphrase)
    except FedchorusError as error:
        log.error("cannot start", why=str(error))
        sys.exit(NEEDS_A_PERSON)

    def stop(number: int, frame: FrameType | None) -> None:
        node.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        with only_one(node.folder.state / "lock", what="this site's client"):
            node.run()
    except RunError as error:
        log.error("cannot run", why=str(error))
        sys.exit(NEEDS_A_PERSON)
    log.info("stopped")
    sys.exit(STOPPED)


def _name_of(folder: Path) -> str:
    try:
        return Settings.load(folder).name
    except FedchorusError:  # Which is said in a moment.
        return folder.name


if __name__ == "__main__":
    main()

"""The doctor finds each broken thing by itself, says how to mend it, and leaves everything as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import client.commands
from client.doctor import Finding, examine
from client.enrol import accept, add_signatures, enrol, install_certificate, review
from client.machine import Machine
from client.policy import Policy, PolicyRefused
from client.rehearsal import Rehearsal
from client.sandbox import ROOT, Wrapper
from client.settings import Settings, SiteFolder
from client.trainer_process import Opened
from privacy.accountant import noise_multiplier_for
from privacy.authority import Authority, make_csr
from privacy.budget import Limit, SiteBudget
from privacy.enrolment import Invitation
from privacy.errors import DataError, RunError
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey, TlsKey
from privacy.ledger import Ledger
from privacy.secagg.roster import Roster
from server.membership import add_signature, sign
from server.provision import provision
from strategies.job import Job, load_job
from strategies.parameters import Parameters
from strategies.total import Layout

NOW = datetime.now(UTC)
POLICY = """\
version = 1
purposes = ["training"]
[tasks]
allow = ["tabular-classification"]
[strategies]
allow = ["fedavg"]
[data.records]
epsilon = 3.0
delta = 1e-5
[secure_aggregation]
required = false
"""
JOB = """\
name = "try"
purpose = "training"
[data]
target = "y"
columns = { x = { range = [0, 1] } }
[training]
rounds = 1
learning_rate = 0.5
local_steps = 1
batch_size = 4
[privacy.record]
noise_multiplier = 2.0
epsilon = 3.0
delta = 1e-5
[simulation]
noise = "seeded"
"""
SECRET = "0.123456789"  # A record's value.
Unwell = dict[str, str]
Break = Callable[["Site"], object]
HEALTHY = {
    "site.toml", "policy.toml", "invitation", "identity key", "TLS key", "roster", "certificate", "server",
    "federation", "version", "clock", "disk", "memory", "open files", "client", "GPU", "isolation", "history",
    "data set records", "ledger of records", "budget of records",
}  # fmt: skip
UNKNOWN = {"federation", "version", "clock"}  # To a site that the server does not let in.
HIDES = {
    "policy.toml": {"budget of records"},
    "TLS key": UNKNOWN,
    "certificate": UNKNOWN,
    "ledger of records": {"budget of records"},
    "data": {"data set records", "ledger of records", "budget of records"},
}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Answers GET /v1/fedchorus/federation over TLS: 401 without a certificate, else whatever a test says."""

    def __init__(self, port: socket.socket, *, certificate: Path, key: Path, authority: Path) -> None:
        self.answer: Callable[[], tuple[int, Any]] = self.well
        self.pause_s = 0.0  # Between two bytes of an answer.
        self.address = f"127.0.0.1:{port.getsockname()[1]}"

        def answer_of(connection: ssl.SSLSocket) -> tuple[int, Any]:
            return self.answer() if connection.getpeercert() else (401, {"error": "no valid credential; as it says"})

        def pause_of() -> float:
            return self.pause_s

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                assert isinstance(self.connection, ssl.SSLSocket)
                status, record = answer_of(self.connection)
                body = record if isinstance(record, bytes) else json.dumps(record).encode()
                self.send_response(status if self.path == "/v1/fedchorus/federation" else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                for byte in [body] if not pause_of() else map(bytes, zip(body, strict=False)):
                    time.sleep(pause_of())
                    self.wfile.write(byte)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Http(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # A client that ended the handshake.

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_OPTIONAL
        self._http = Http(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._http.socket.close()
        self._http.socket = context.wrap_socket(port, server_side=True, do_handshake_on_connect=False)
        self._http.server_activate()
        self._thread = threading.Thread(target=partial(self._http.serve_forever, poll_interval=0.05))
        self._thread.start()

    @staticmethod
    def well(**changes: Any) -> tuple[int, Any]:
        return 200, {"federation": "cancer", "version": version("fedchorus"), "time": time.time(), **changes}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@dataclass
class Facts(Machine):
    """A machine on which all is well, without looking."""

    free: int = 10**11
    memory: int = 10**10
    files: int = 65536
    found_gpus: list[str] | None = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    wraps: Wrapper = "bubblewrap"
    running: list[int] = field(default_factory=list)
    closed: tuple[str, ...] = ()
    shape: tuple[int, int] | None = (24, 2)

    def free_bytes(self, folder: Path) -> int:
        return self.free

    def is_writable(self, path: Path) -> bool:
        return path.name not in self.closed and super().is_writable(path)

    def is_readable(self, path: Path) -> bool:
        return path.name not in self.closed

    def memory_bytes(self) -> int:
        return self.memory

    def open_files(self) -> int:
        return self.files

    def gpu_nodes(self) -> list[str]:
        return self.nodes

    def gpus(self) -> list[str]:
        if self.found_gpus is None:
            raise RunError("torch cannot be imported by this Python")
        return self.found_gpus

    def wrapper(self) -> Wrapper:
        return self.wraps

    def table_shape(self, path: Path) -> tuple[int, int]:
        if self.shape is None:
            raise DataError(f"{path}: cannot be read as .csv (ParserError)")
        return self.shape

    def nodes_of(self, folder: Path) -> list[int]:
        return self.running


@dataclass
class Site:
    """A copy of an enrolled site's folder, for a test to break, and the coordinator's."""

    files: SiteFolder
    coordinator: Path
    machine: Facts = field(default_factory=Facts)

    @property
    def data(self) -> Path:
        return self.files.path / "records.csv"

    def edit(self, path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def certify(self, key: Path, *, name: str = "north", days: float, now: datetime) -> None:
        authority = Authority.load(self.coordinator / "authority")
        pem = authority.issue_client(make_csr(TlsKey.load(key), name), site=name, days=days, now=now)
        self.files.certificate.write_bytes(pem)

    def spend(self, epsilon: float, *, dataset: str = "records") -> None:
        """Let a job set `epsilon` aside in the ledger."""
        ledger = Ledger(self.files.ledger("records"), "north", IdentityKey.load(self.files.identity))
        budget = SiteBudget(ledger)
        budget.open(rows=24, simulation=False, dataset=dataset)
        noise = noise_multiplier_for(target_epsilon=epsilon, delta=1e-5, sampling_rate=1.0, count=1)
        event = GaussianEvent(
            noise_multiplier=noise, clip_norm=1.0, sampling_rate=1.0, count=1, discretisation_tv=0.0, rng="os"
        )
        limit = Limit(epsilon=None, delta=1e-5)
        budget.plan(job="ab" * 32, purpose="training", rounds=1, events=[event], limits=[limit])

    def examine(self, **more: Any) -> list[Finding]:
        return examine(self.files.path, machine=self.machine, timeout_s=more.pop("timeout_s", 8.0), **more)

    def unwell(self, **more: Any) -> Unwell:
        return unwell(self.examine(**more))


def unwell(findings: list[Finding]) -> Unwell:
    for finding in findings:
        assert bool(finding.fix) == (finding.level != "ok"), finding
        assert "\n" not in finding.found + finding.fix
    return {finding.what: finding.level for finding in findings if finding.level != "ok"}


@dataclass
class Federation:
    folder: Path
    server: Server

    def site(self, folder: Path) -> Site:
        shutil.copytree(self.folder / "north", folder / "north")
        return Site(SiteFolder(folder / "north"), self.folder / "coordinator")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    coordinator, names = folder / "coordinator", ("north", "south")
    port = socket.create_server(("127.0.0.1", 0))
    (folder / "federation.toml").write_text(f'name = "cancer"\naddress = "127.0.0.1:{port.getsockname()[1]}"\n')
    invitation = provision(folder / "federation.toml", coordinator, now=NOW).invitation
    sign(coordinator, [enrol(invitation, name, folder / name, policy=POLICY) for name in names], now=NOW)
    for name in names:
        kit = coordinator / "kits" / f"{name}.kit.json"
        roster = accept(folder / name, review(folder / name, kit), now=NOW)
        signatures = add_signature(coordinator, name, roster.signatures[name]).signatures
    north = folder / "north"
    add_signatures(north, signatures)
    rows = "".join(f"{row / 24 if row else SECRET},{row % 2}\n" for row in range(24))
    (north / "records.csv").write_text(f"x,y\n{rows}")
    (north / "records.csv").chmod(0o644)
    with open(north / "site.toml", "a") as file:
        file.write('\n[data.records]\npath = "records.csv"\n')
    tls = coordinator / "tls"
    server = Server(
        port, certificate=tls / "server.pem", key=tls / "server.key", authority=coordinator / "authority" / "ca.pem"
    )
    yield Federation(folder, server)
    server.close()


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> Site:
    federation.server.answer = federation.server.well
    return federation.site(tmp_path)


@pytest.fixture
def server(federation: Federation) -> Server:
    return federation.server


def address_of(site: Site) -> str:
    return Invitation.parse(site.files.invitation.read_bytes()).address


def move_to(site: Site, address: str) -> None:
    site.edit(site.files.settings, f'server = "{address_of(site)}"', f'server = "{address}"')


def contents(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestHealthy:
    def test_finds_nothing_to_mend(self, site: Site) -> None:
        findings = site.examine()
        assert unwell(findings) == {}
        assert {finding.what for finding in findings} == HEALTHY

    def test_without_a_server_finds_that_and_no_more(self, site: Site) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            port = gone.getsockname()[1]
        move_to(site, f"127.0.0.1:{port}")
        assert site.unwell() == {"server": "error"}

    def test_changes_nothing_and_shows_neither_keys_nor_records(self, site: Site) -> None:
        site.spend(1.0)
        before = contents(site.files.path)
        findings = str([finding.as_dict() for finding in site.examine()])
        assert contents(site.files.path) == before
        assert SECRET not in findings
        for key in (site.files.identity, site.files.tls_key):
            assert key.read_text().splitlines()[1] not in findings

    def test_with_the_passphrase_opens_keys_that_have_one(self, site: Site) -> None:
        for path, kind in ((site.files.identity, IdentityKey), (site.files.tls_key, TlsKey)):
            with_passphrase(path, kind, b"secret")
        findings = site.examine(passphrase=b"secret")
        assert unwell(findings) == {}
        assert "answers, and lets this site in" in next(
            finding.found for finding in findings if finding.what == "server"
        )
        for wrong in (None, b"another"):
            assert site.unwell(passphrase=wrong) == {"identity key": "error", "TLS key": "error"}

    def test_before_the_kit_is_there_says_so_and_tries_the_way_to_the_server(self, site: Site) -> None:
        site.edit(site.files.settings, f'roster = "{pinned(site)}"', 'roster = ""')
        for path in (site.files.roster, site.files.certificate, site.files.authority):
            path.unlink()
        findings = site.examine()
        assert unwell(findings) == {"roster": "error"}
        (server,) = [finding for finding in findings if finding.what == "server"]
        assert "answers over TLS" in server.found

    def test_of_no_folder_says_that_alone(self, tmp_path: Path) -> None:
        assert unwell(examine(tmp_path / "none")) == {"folder": "error"}


def with_passphrase(path: Path, kind: type[IdentityKey] | type[TlsKey], passphrase: bytes) -> None:
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(path.read_bytes(), None)
    hidden = form.BestAvailableEncryption(passphrase)
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, hidden))
    kind.load(path, passphrase)


def pinned(site: Site) -> str:
    return Roster.load(site.files.roster).hash


def resign(site: Site, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    roster = Roster.load(site.files.roster)
    replace(roster, signatures=change(dict(roster.signatures))).save(site.files.roster)


def another(kind: type[IdentityKey] | type[TlsKey], path: Path) -> None:
    path.unlink()
    kind.create(path)


def tamper(site: Site) -> None:
    site.spend(1.0)
    site.edit(site.files.ledger("records"), "training", "research")


def of_another(site: Site) -> None:
    (site.files.path / "other").mkdir()
    TlsKey.create(site.files.path / "other" / "key")
    site.certify(site.files.path / "other" / "key", days=30, now=NOW)


def strange_authority(site: Site) -> None:
    (site.files.path / "other").mkdir()
    other = Authority.create(site.files.path / "other", "cancer", now=NOW)
    site.files.authority.write_bytes(other.pem)
    csr = make_csr(TlsKey.load(site.files.tls_key), "north")
    site.files.certificate.write_bytes(other.issue_client(csr, site="north", days=30, now=NOW))


def in_settings(old: str, new: str) -> Break:
    return lambda site: site.edit(site.files.settings, old, new)


BROKEN: dict[str, tuple[Break, Unwell]] = {
    "a key of the policy misspelt": (lambda s: s.edit(s.files.policy, "purposes", "purpose"), {"policy.toml": "error"}),
    "no policy": (lambda s: s.files.policy.unlink(), {"policy.toml": "error"}),
    "a policy that allows nothing": (
        lambda s: s.edit(s.files.policy, '["training"]', "[]"), {"policy.toml": "warning"},
    ),
    "a data set that the policy does not list": (
        lambda s: s.edit(s.files.policy, "[data.records]", "[data.others]"), {"budget of records": "warning"},
    ),
    "no invitation": (lambda s: s.files.invitation.unlink(), {"invitation": "error"}),
    "an invitation cut off": (lambda s: s.files.invitation.write_bytes(b"{"), {"invitation": "error"}),
    "another coordinator in site.toml": (
        in_settings('coordinator = "', f'coordinator = "{"ab" * 32}" #'), {"invitation": "error"},
    ),
    "no identity key": (lambda s: s.files.identity.unlink(), {"identity key": "error"}),
    "an identity key that others can read": (lambda s: s.files.identity.chmod(0o640), {"identity key": "error"}),
    "a TLS key that is none": (lambda s: s.files.tls_key.write_text("?"), {"TLS key": "error"}),
    "a TLS key that others can read": (lambda s: s.files.tls_key.chmod(0o604), {"TLS key": "error"}),
    "another TLS key": (lambda s: another(TlsKey, s.files.tls_key), {"certificate": "error"}),
    "another identity key": (lambda s: another(IdentityKey, s.files.identity), {"roster": "error"}),
    "no roster": (lambda s: s.files.roster.unlink(), {"roster": "error"}),
    "a roster cut off": (lambda s: s.files.roster.write_bytes(b"{"), {"roster": "error"}),
    "a roster that was never pinned": (
        lambda s: s.edit(s.files.settings, f'roster = "{pinned(s)}"', 'roster = ""'), {"roster": "error"},
    ),
    "another roster than the pinned one": (
        lambda s: s.edit(s.files.settings, pinned(s), "ab" * 32), {"roster": "error"},
    ),
    "a false signature": (
        lambda s: resign(s, lambda signed: {**signed, "south": signed["north"]}), {"roster": "error"},
    ),
    "no signature of its own": (lambda s: resign(s, lambda signed: {"south": signed["south"]}), {"roster": "error"}),
    "a member that has not signed": (
        lambda s: resign(s, lambda signed: {"north": signed["north"]}), {"roster": "warning"},
    ),
    "no certificate": (lambda s: s.files.certificate.unlink(), {"certificate": "error"}),
    "a certificate that is none": (lambda s: s.files.certificate.write_text("?"), {"certificate": "error"}),
    "a certificate for another key": (of_another, {"certificate": "error"}),
    "a certificate of another site": (
        lambda s: s.certify(s.files.tls_key, name="south", days=30, now=NOW), {"certificate": "error"},
    ),
    "an expired certificate": (
        lambda s: s.certify(s.files.tls_key, days=9, now=NOW - timedelta(days=10)),
        {"certificate": "error", "server": "error"},
    ),
    "a certificate of tomorrow": (
        lambda s: s.certify(s.files.tls_key, days=9, now=NOW + timedelta(days=1)),
        {"certificate": "error", "server": "error"},
    ),
    "a certificate in its last third": (
        lambda s: s.certify(s.files.tls_key, days=30, now=NOW - timedelta(days=20.5)), {"certificate": "warning"},
    ),
    "another authority": (strange_authority, {"certificate": "error", "server": "error"}),
    "a damaged authority": (lambda s: s.files.authority.write_text(""), {"certificate": "error"}),
    "a history that was changed": (
        lambda s: (s.files.state / "history.jsonl").write_text("{}\n"), {"history": "error"},
    ),
    "no data file": (lambda s: s.data.unlink(), {"data set records": "error"}),
    "a data file that others can change": (lambda s: s.data.chmod(0o646), {"data set records": "warning"}),
    "a data file that its group can change": (lambda s: s.data.chmod(0o664), {"data set records": "warning"}),
    "no data set": (in_settings('[data.records]\npath = "records.csv"', ""), {"data": "warning"}),
    "a ledger that was changed": (tamper, {"ledger of records": "error"}),
    "the ledger of another data set": (lambda s: s.spend(1.0, dataset="others"), {"ledger of records": "error"}),
    "a budget used up": (lambda s: s.spend(3.2), {"budget of records": "error"}),
    "a budget nearly used up": (lambda s: s.spend(2.9), {"budget of records": "warning"}),
}  # fmt: skip


class TestOneBrokenThing:
    @pytest.mark.parametrize("name", BROKEN)
    def test_is_found_and_hides_nothing(self, site: Site, name: str) -> None:
        break_it, expected = BROKEN[name]
        break_it(site)
        findings = site.examine()
        assert unwell(findings) == expected
        hidden = set[str]().union(*(HIDES.get(what, ()) for what in expected))
        assert HEALTHY - {finding.what for finding in findings} <= hidden

    def test_in_site_toml_is_found_and_leaves_what_stands_elsewhere_to_be_looked_at(self, site: Site) -> None:
        site.edit(site.files.settings, "max_clock_skew_s", "most_clock_skew_s")
        (site.files.state / "history.jsonl").write_text("{}\n")
        findings = site.examine()
        assert unwell(findings) == {"site.toml": "error", "history": "error"}
        assert "did you mean max_clock_skew_s" in findings[0].found
        assert "server" in {finding.what for finding in findings}

    def test_does_not_hide_the_next(self, site: Site) -> None:
        for name in ("no policy", "no identity key", "no roster", "a certificate for another key", "no data file"):
            BROKEN[name][0](site)
        expected = {"policy.toml": "error", "identity key": "error", "roster": "error", "certificate": "error"}
        # Without key and roster nobody knows whose ledger it is.
        assert site.unwell() == {**expected, "data set records": "error", "ledger of records": "error"}

    def test_of_the_first_data_set_does_not_hide_the_second(self, site: Site) -> None:
        with open(site.files.settings, "a") as file:
            file.write('[data.more]\npath = "more.csv"\n')
        site.data.unlink()
        site.data.symlink_to(site.data)
        (site.files.path / "ledgers" / "records.jsonl").mkdir()
        found = site.unwell()
        expected = {"data set records": "error", "ledger of records": "error", "data set more": "error"}
        assert found == {**expected, "budget of more": "warning"}

    @pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
    def test_of_another_user_is_said(self, site: Site) -> None:
        os.chown(site.files.identity, 12345, 12345)
        assert site.unwell() == {"identity key": "warning"}

    def test_that_is_no_fault_is_none(self, site: Site) -> None:
        site.spend(1.0)
        with open(site.files.ledger("records"), "ab") as file:
            file.write(b'{"cut off by a crash')
        site.edit(site.files.policy, "epsilon = 3.0\ndelta = 1e-5", "unlimited = true")
        assert site.unwell() == {}

    def test_in_the_ledger_own_s_budget_counts_too(self, site: Site) -> None:
        site.spend(1.0)
        budget = SiteBudget(Ledger(site.files.ledger("records"), "north", IdentityKey.load(site.files.identity)))
        budget.set_budget(Limit(epsilon=1.05, delta=1e-5))
        assert site.unwell() == {"budget of records": "warning"}


MACHINES: dict[str, tuple[dict[str, Any], Unwell]] = {
    "little disk": ({"free": 4 * 10**9}, {"disk": "warning"}),
    "no disk": ({"free": 10**8}, {"disk": "error"}),
    "a ledger folder that cannot be written": ({"closed": ("ledgers",)}, {"disk": "error"}),
    "a data file that cannot be read": ({"closed": ("records.csv",)}, {"data set records": "error"}),
    "data that are no table": ({"shape": None}, {"data set records": "error"}),
    "data without a row": ({"shape": (0, 2)}, {"data set records": "error"}),
    "little memory": ({"memory": 10**9}, {"memory": "warning"}),
    "no memory": ({"memory": 10**8}, {"memory": "error"}),
    "few open files": ({"files": 1000}, {"open files": "warning"}),
    "very few open files": ({"files": 64}, {"open files": "error"}),
    "one client": ({"running": [7]}, {}),
    "two clients": ({"running": [7, 8]}, {"client": "error"}),
    "a GPU": ({"found_gpus": ["H100"], "nodes": ["/dev/nvidia0"]}, {}),
    "a GPU that torch does not use": ({"nodes": ["/dev/nvidia0"]}, {"GPU": "warning"}),
    "no torch": ({"found_gpus": None}, {"GPU": "error"}),
    "no isolation": ({"wraps": "limits"}, {"isolation": "warning"}),
    "namespaces": ({"wraps": "namespaces"}, {}),
}


class TestMachine:
    @pytest.mark.parametrize("name", MACHINES)
    def test_what_it_lacks_is_found(self, site: Site, name: str) -> None:
        facts, expected = MACHINES[name]
        site.machine = Facts(**facts)
        assert site.unwell() == expected

    def test_without_isolation_serves_no_site_that_requires_it(self, site: Site) -> None:
        site.edit(site.files.settings, 'isolation = "auto"', 'isolation = "required"')
        assert site.unwell() == {}
        site.machine = Facts(wraps="limits")
        assert site.unwell() == {"isolation": "error"}

    def test_s_isolation_that_is_switched_off_is_said(self, site: Site) -> None:
        site.edit(site.files.settings, 'isolation = "auto"', 'isolation = "none"')
        assert site.unwell() == {"isolation": "warning"}

    def test_must_have_the_memory_that_the_trainer_is_given(self, site: Site) -> None:
        site.edit(site.files.settings, "# memory_gb = 16", "memory_gb = 16")
        assert site.unwell() == {"memory": "warning"}

    def test_as_it_is_tells_nothing_of_a_table_s_records(self, tmp_path: Path) -> None:
        (tmp_path / "bad.csv").write_text(f'x,y\n1,2\n3,"{SECRET}\n')
        with pytest.raises(DataError, match=r"bad\.csv: cannot be read as \.csv \(ParserError\)") as raised:
            Machine().table_shape(tmp_path / "bad.csv")
        assert SECRET not in str(raised.value)

    def test_as_it_is_has_some_of_everything(self, tmp_path: Path) -> None:
        machine = Machine()
        assert machine.free_bytes(tmp_path) > 0
        assert machine.memory_bytes() > 0
        assert machine.open_files() > 0

    def test_as_it_is_sees_the_nodes_of_this_folder_alone(self, tmp_path: Path) -> None:
        (tmp_path / "client").mkdir()
        (tmp_path / "client" / "__init__.py").touch()
        (tmp_path / "client" / "node.py").write_text("print('up', flush=True)\ninput()\n")
        (tmp_path / "north").mkdir()
        command = [sys.executable, "-m", "client.node", "north"]
        with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as node:
            assert node.stdout is not None
            node.stdout.readline()
            assert Machine().nodes_of(tmp_path / "north") == [node.pid]
            assert Machine().nodes_of(tmp_path) == []


def rehearsal(site: Site, job: Job) -> Rehearsal:
    """A job whose data were opened: 18 rows to train on."""
    settings, policy = Settings.load(site.files.path), Policy.load(site.files.policy)
    invitation = Invitation.parse(site.files.invitation.read_bytes())
    tried = Rehearsal(job, site.files, settings, policy, invitation, sites=2, ledger=(), now=NOW)
    tried._opened = Opened(18, 6, Parameters({"weight": (1, 1), "bias": (1,)}), "cpu", Layout(2))
    return tried


def answers(**changes: Any) -> Callable[[], tuple[int, Any]]:
    return lambda: Server.well(**changes)


ANSWERS: dict[str, tuple[Callable[[], tuple[int, Any]], Unwell, str]] = {
    "another federation": (answers(federation="heart"), {"federation": "error"}, "the server's is heart"),
    "another version": (answers(version="99.0"), {"version": "error"}, "the server's is 99.0"),
    "a clock that is off": (lambda: Server.well(time=time.time() + 150), {"clock": "warning"}, "s ahead of"),
    "a clock that is far off": (lambda: Server.well(time=time.time() - 301), {"clock": "error"}, "s behind"),
    "a clock near enough": (lambda: Server.well(time=time.time() - 90), {}, ""),
    "no time": (answers(time=float("nan")), {"server": "error"}, "answers 200, and not as a fedchorus server"),
    "a refusal": (lambda: (403, {"error": "not allowed; why"}), {"server": "error"}, r"\(403: not allowed\)"),
    "another program's page": (lambda: (200, b"<html>"), {"server": "error"}, "answers 200, and not as"),
    "an error": (lambda: (500, {"error": "no"}), {"server": "error"}, "answers 500, and not as"),
    "an error that looks well": (lambda: (500, Server.well()[1]), {"server": "error"}, "answers 500, and not as"),
    "a list": (lambda: (200, []), {"server": "error"}, "answers 200, and not as"),
    "too deep": (lambda: (200, b"[" * 60_000), {"server": "error"}, "answers 200, and not as"),
}


@contextmanager
def listening(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """A TCP listener that hands its first connection to `serve`; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accepted() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=accepted)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


class TestServer:
    @pytest.mark.parametrize("name", ANSWERS)
    def test_s_answer_is_held_to_the_site_s_own_settings(self, site: Site, server: Server, name: str) -> None:
        server.answer, expected, said = ANSWERS[name]
        findings = site.examine()
        assert unwell(findings) == expected
        for finding in findings:
            assert finding.level == "ok" or re.search(said, finding.found)

    def test_of_an_unknown_name_is_a_matter_of_dns(self, site: Site) -> None:
        move_to(site, "nowhere.invalid:8443")
        assert self.found(site).startswith("DNS: no address is known here for nowhere.invalid")

    def test_that_does_not_run_is_a_matter_of_tcp(self, site: Site) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = f"127.0.0.1:{gone.getsockname()[1]}"
        move_to(site, address)
        assert self.found(site) == f"TCP: {address} refuses the connection: nothing listens there"

    def test_that_says_nothing_is_given_up_in_time(self, site: Site) -> None:
        with listening(lambda connection: [*iter(lambda: connection.recv(4096), b"")]) as address:
            move_to(site, address)
            began = time.monotonic()
            found = self.found(site, timeout_s=1.0)
            assert time.monotonic() - began < 8
        assert found.startswith(f"TLS: {address} accepts the connection, and then says nothing")

    def test_that_answers_byte_by_byte_is_given_up_in_time(self, site: Site, server: Server) -> None:
        server.answer, server.pause_s = lambda: (200, b"0123456789abcdef"), 0.25
        try:
            assert self.found(site, timeout_s=1.0).startswith("no whole answer from 127.0.0.1")
        finally:
            server.pause_s = 0.0

    def test_that_speaks_no_tls_is_told_from_one_that_does(self, site: Site) -> None:
        def plain(connection: socket.socket) -> None:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        with listening(plain) as address:
            move_to(site, address)
            assert self.found(site).startswith(f"TLS: {address} does not speak TLS")

    def test_of_another_authority_is_not_believed(self, site: Site, tmp_path: Path) -> None:
        with self.strange(tmp_path, site, shows_own=False) as address:
            move_to(site, address)
            assert self.found(site).startswith(f"TLS: the certificate that {address} shows is not the federation's")

    def test_that_refuses_the_certificate_in_the_handshake_is_understood(self, site: Site, tmp_path: Path) -> None:
        with self.strange(tmp_path, site, shows_own=True) as address:
            move_to(site, address)
            assert re.match(r"TLS: the server refuses this site's certificate|TLS or HTTP: .* ended", self.found(site))

    def test_behind_a_proxy_that_does_not_let_through_is_a_matter_of_the_proxy(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            proxy = f"127.0.0.1:{gone.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", f"http://user:hush@{proxy}")
        found = self.found(site)
        assert found.startswith(f"proxy: {proxy}, which this machine's settings name")
        assert "hush" not in found
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert site.unwell() == {}

    def found(self, site: Site, **more: Any) -> str:
        findings = site.examine(**more)
        assert unwell(findings) == {"server": "error"}
        return next(finding.found for finding in findings if finding.what == "server")

    @contextmanager
    def strange(self, folder: Path, site: Site, *, shows_own: bool) -> Iterator[str]:
        """A server that trusts another authority's sites; its own certificate is the federation's or not."""
        (folder / "other").mkdir()
        other = Authority.create(folder / "other", "cancer", now=NOW)
        key = TlsKey.create(folder / "other" / "server.key")
        (folder / "other" / "server.pem").write_bytes(other.issue_server(key, ["127.0.0.1"], days=2, now=NOW))
        tls = site.coordinator / "tls" if shows_own else folder / "other"
        server = Server(
            socket.create_server(("127.0.0.1", 0)),
            certificate=tls / "server.pem",
            key=tls / "server.key",
            authority=folder / "other" / "ca.pem",
        )
        try:
            yield server.address
        finally:
            server.close()


class TestJob:
    def test_is_tried_with_the_real_machine_and_the_command_says_so(self, site: Site, tmp_path: Path) -> None:
        (tmp_path / "job.toml").write_text(JOB)
        before = contents(site.files.path)
        app = typer.Typer()
        client.commands.add_to(app)
        shown = CliRunner().invoke(app, ["doctor", str(site.files.path), "--job", str(tmp_path / "job.toml"), "--json"])
        said = json.loads(shown.stdout.splitlines()[-1])
        assert contents(site.files.path) == before
        found = {finding["what"]: finding for finding in said["findings"]}
        assert found["data set records"]["found"].endswith("24 rows, 2 columns")
        assert found["GPU"]["level"] in ("ok", "warning")
        assert {name: found[name]["level"] for name in ("job's terms", "job's data", "job's cost")} == {
            "job's terms": "ok", "job's data": "ok", "job's cost": "ok",
        }  # fmt: skip
        assert "18 rows to train on, 6 to test" in found["job's data"]["found"]
        assert said["ok"] == (shown.exit_code == 0) == (not any(f["level"] == "error" for f in said["findings"]))
        assert SECRET not in shown.output

    @pytest.mark.parametrize(
        ("old", "new", "expected", "said"),
        [
            ("rounds =", "round =", {"job": "error"}, "training.rounds"),
            ('purpose = "training"', 'purpose = "ads"', {"job's terms": "error"}, "purposes: 'ads' is not listed"),
            (
                "[data]",
                '[data]\ndataset = "others"',
                {"job's terms": "error"},
                "data.others: the data set is not listed",
            ),
        ],
    )
    def test_that_cannot_work_here_is_refused_as_the_client_would(
        self, site: Site, tmp_path: Path, old: str, new: str, expected: Unwell, said: str
    ) -> None:
        (tmp_path / "job.toml").write_text(JOB.replace(old, new))
        findings = site.examine(job=tmp_path / "job.toml")
        assert unwell(findings) == expected
        assert said in findings[-1].found

    def test_on_data_that_the_site_does_not_have_is_refused(self, site: Site, tmp_path: Path) -> None:
        with open(site.files.policy, "a") as file:
            file.write("[data.others]\nunlimited = true\n")
        (tmp_path / "job.toml").write_text(JOB.replace("[data]", '[data]\ndataset = "others"'))
        findings = site.examine(job=tmp_path / "job.toml")
        assert unwell(findings) == {"job's data": "error"}
        assert "known here: records" in findings[-1].found

    def test_on_data_that_differ_from_its_schema_is_told_every_difference_at_once(
        self, site: Site, tmp_path: Path
    ) -> None:
        (tmp_path / "job.toml").write_text(JOB)
        site.data.write_text("X,y\n5,yes\n")
        found = [finding for finding in site.examine(job=tmp_path / "job.toml") if finding.what.startswith("job's")]
        assert [(finding.level, finding.what) for finding in found] == [
            ("ok", "job's terms"), ("warning", "job's schema"), ("warning", "job's schema"), ("error", "job's data"),
        ]  # fmt: skip
        assert found[1].found == "column 'x' is absent; did you mean 'X'?"
        assert "the target column 'y' has 1 different values" in found[2].found
        assert "yes" not in found[2].found

    def test_that_costs_more_than_the_budget_has_left_is_refused(self, site: Site, tmp_path: Path) -> None:
        (tmp_path / "job.toml").write_text(JOB)
        tried = rehearsal(site, load_job(tmp_path / "job.toml").portable)
        assert "admit it" in tried.cost()
        site.spend(3.0)
        tried.ledger = Ledger(site.files.ledger("records"), "north", IdentityKey.load(site.files.identity)).entries
        with pytest.raises(PolicyRefused, match=r"data\.records\.epsilon: it would reach"):
            tried.cost()

    def test_is_not_tried_where_the_site_s_own_files_are_not_in_order(self, site: Site, tmp_path: Path) -> None:
        (tmp_path / "job.toml").write_text(JOB)
        site.files.policy.unlink()
        assert site.unwell(job=tmp_path / "job.toml") == {"policy.toml": "error", "job": "error"}


def test_a_certificate_that_was_renewed_is_well_again(site: Site) -> None:
    site.certify(site.files.tls_key, days=30, now=NOW - timedelta(days=19))
    assert site.unwell() == {}
    site.certify(site.files.tls_key, days=30, now=NOW - timedelta(days=25))
    assert site.unwell() == {"certificate": "warning"}
    authority = Authority.load(site.coordinator / "authority")
    csr = make_csr(TlsKey.load(site.files.tls_key), "north")
    install_certificate(site.files.path, authority.issue_client(csr, site="north", days=60, now=NOW), now=NOW)
    assert site.unwell() == {}


def test_the_doctor_itself_needs_neither_torch_nor_flower() -> None:
    program = "import sys, client.doctor; print(sorted({'torch', 'flwr', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

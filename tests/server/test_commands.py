"""What operators and engineers type, against a server on loopback over TLS: it works, or one line says what to do."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedchorus import main
from privacy.errors import FedchorusError
from privacy.keys import IdentityKey
from privacy.logbook import Logbook
from server.api import make_api
from server.coordinator import Coordinator
from server.jobs import JobFolder, State, jobs_in
from server.listen import App, Caller, Receive, Scope, Send, error_body
from server.operators import FORMAT, Operator
from server.provision import provision
from strategies.job import load_job
from strategies.parameters import Parameters
from tests.deployment.federation import deployed_job
from tests.server.tls import Authority, serving

TOKEN = "an operator's secret token"
PEOPLE = ("alice", "bob")


@dataclass
class Office:
    """An operator's desk: a real coordinator's API on loopback, the operator's file, a job and a model."""

    folder: Path
    coordinator: Coordinator
    operator: Operator

    @property
    def file(self) -> Path:
        return self.folder / "operator.json"

    def write(self, operator: Operator) -> None:
        self.file.write_text(json.dumps({"format": FORMAT, **asdict(operator)}))

    @property
    def jobs(self) -> list[JobFolder]:
        return jobs_in(self.folder / "coordinator" / "jobs")

    def submitted(self) -> JobFolder:
        done = fedchorus("submit", "job.toml", "--model", "model.safetensors")
        assert done.returncode == 0, done.stderr
        return self.jobs[-1]


class NoLink:
    def sites(self) -> dict[str, Any]:
        return {"north": {"online": True}}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def shared(authority: Authority) -> Iterator[tuple[list[App], int]]:
    """One server for all tests; the application of the running test is in the list."""
    apps: list[App] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        await apps[-1](scope, receive, send)

    with serving(app, authority, authority.issue("server", server=True)) as listeners:
        yield apps, listeners.ports["public"]


def guarded(api: App) -> App:
    """The token alone of what the guard checks."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if (b"authorization", f"Bearer {TOKEN}".encode()) in scope["headers"]:
            await api({**scope, "fedchorus": Caller("public", None, "127.0.0.1", operator="ops")}, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": error_body("no valid credential: a person needs a token")})

    return app


@pytest.fixture
def office(
    shared: tuple[list[App], int], authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Office:
    apps, port = shared
    keys = {name: IdentityKey.create(tmp_path / f"{name}.pem") for name in PEOPLE}
    approvers = "".join(f'{name} = "{key.public_hex}"\n' for name, key in keys.items())
    approval = f"[approval]\nrequired = 0\n[approval.approvers]\n{approvers}"
    (tmp_path / "federation.toml").write_text(f'name = "thorax"\naddress = "127.0.0.1:9"\n{approval}')
    provision(tmp_path / "federation.toml", tmp_path / "coordinator", now=datetime.now(UTC))
    coordinator = Coordinator(tmp_path / "coordinator", Logbook("server", None, stream=None))
    coordinator._link = NoLink()  # type: ignore[assignment]
    apps.append(guarded(make_api(coordinator)))
    operator = Operator(
        operator="ops",
        federation="thorax",
        address=f"127.0.0.1:{port}",
        authority=authority.pem.read_text(),
        token=TOKEN,
    )
    office = Office(tmp_path, coordinator, operator)
    office.write(operator)
    (tmp_path / "job.toml").write_bytes(deployed_job().toml.replace(b'folder = "."\n', b""))
    Parameters({"weight": (3,)}).save(np.ones(3, np.float32), tmp_path / "model.safetensors", {"round": "0"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDCHORUS_OPERATOR", raising=False)
    return office


def fedchorus(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as it is typed, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["fedchorus", *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(str(end.code or 0))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def mistake(*arguments: str, code: int = 1) -> str:
    """The one line that a mistake is told in."""
    done = fedchorus(*arguments)
    assert done.returncode == code, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert TOKEN not in done.stderr + done.stdout
    return line


def is_in(job: JobFolder, state: State) -> bool:
    return job.state == state


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestSubmit:
    def test_a_job_is_sent_in_its_portable_form_and_named(self, office: Office) -> None:
        done = fedchorus("submit", "job.toml", "--model", "model.safetensors")
        (job,) = office.jobs
        assert done.stdout == f"submitted {job.id} (job hash {job.job.hash})\n"
        assert job.job == load_job(office.folder / "job.toml").portable
        assert job.initial.read_bytes() == (office.folder / "model.safetensors").read_bytes()

    def test_overrides_are_part_of_the_job(self, office: Office) -> None:
        fedchorus("submit", "job.toml", "--model", "model.safetensors", "--set", "training.rounds=7")
        assert office.jobs[0].job.training.rounds == 7

    def test_json_is_the_last_line_and_all_of_standard_output(self, office: Office) -> None:
        done = fedchorus("submit", "job.toml", "--model", "model.safetensors", "--json")
        view = last_json(done)
        assert (view["state"], view["id"]) == ("queued", office.jobs[0].id)
        assert len(done.stdout.splitlines()) == 1
        assert "submitted" in done.stderr

    def test_a_large_model_goes_in_pieces(self, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.remote.PIECE", 100)
        job = office.submitted()
        assert job.initial.read_bytes() == (office.folder / "model.safetensors").read_bytes()

    @pytest.mark.parametrize(("end", "code"), [("finished", 0), ("paused", 1), ("stopped", 1)])
    def test_wait_follows_the_job_and_says_by_its_code_how_it_ended(
        self, office: Office, end: State, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: office.jobs[0].move(end, "a reason"))
        done = fedchorus("submit", "job.toml", "--model", "model.safetensors", "--wait", "--json")
        assert done.returncode == code
        assert json.loads(done.stdout.splitlines()[-1])["state"] == end
        assert f"state: state {end}, why a reason" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("none.toml", "--model", "model.safetensors"), "none.toml: no such job file"),
            (("job.toml", "--model", "none"), "none: no such model file"),
            (("job.toml", "--model", "job.toml"), "not a model file of fedchorus"),
            (("job.toml", "--set", "training.round=1"), "did you mean training.rounds?"),
            (("job.toml", "--model", "model.safetensors", "--approval", "job.toml"), "not an approval"),
            (("job.toml", "--model", "model.safetensors", "--approval", "none"), "none: No such file"),
            (("job.toml", "--model", "model.safetensors", "--operator", "none"), "cannot be read"),
            (("job.toml", "--model", "model.safetensors", "--set", 'strategy.name="evil:Code"'), "evil"),
        ],
    )
    def test_a_mistake_is_one_line_and_nothing_is_sent(
        self, office: Office, arguments: tuple[str, ...], said: str
    ) -> None:
        assert said in mistake("submit", *arguments)
        assert office.jobs == []

    def test_the_same_job_twice_is_one_line(self, office: Office) -> None:
        office.submitted()
        assert "this very job was submitted before" in mistake("submit", "job.toml", "--model", "model.safetensors")


class TestApprove:
    def approve(self, name: str, *more: str) -> str:
        done = fedchorus(
            *("approve", "job.toml", "--key", f"{name}.pem", "--out", f"{name}.json", "--model", "model.safetensors"),
            *more,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_k_of_n_approvals_let_a_job_in(self, office: Office) -> None:
        office.coordinator.invitation = replace(office.coordinator.invitation, required=2, signature="")
        submit = ("submit", "job.toml", "--model", "model.safetensors")
        assert "needs 2 approvals and has 0; ask alice, bob" in mistake(*submit)
        said = self.approve("alice")
        assert load_job(office.folder / "job.toml").portable.hash in said
        assert "has 1; ask bob" in mistake(*submit, "--approval", "alice.json", "--approval", "alice.json")
        self.approve("bob")
        assert fedchorus(*submit, "--approval", "alice.json", "--approval", "bob.json").returncode == 0
        assert len(office.jobs[0].approvals) == 2

    def test_an_approval_is_for_the_job_with_its_overrides(self, office: Office) -> None:
        office.coordinator.invitation = replace(office.coordinator.invitation, required=1, signature="")
        submit = ("submit", "job.toml", "--model", "model.safetensors", "--approval", "alice.json")
        self.approve("alice", "--set", "training.rounds=7")
        assert "has 0" in mistake(*submit)
        assert fedchorus(*submit, "--set", "training.rounds=7").returncode == 0

    def test_a_key_is_made_where_there_is_none_for_its_owner_alone(self, office: Office) -> None:
        self.approve("carol")
        key = office.folder / "carol.pem"
        assert key.stat().st_mode & 0o077 == 0
        assert json.loads((office.folder / "carol.json").read_text())["key"] == IdentityKey.load(key).public_hex
        before = key.read_bytes()
        self.approve("carol")
        assert key.read_bytes() == before

    def test_a_protected_key_needs_its_passphrase(self, office: Office) -> None:
        (office.folder / "words").write_text("correct horse\n")
        self.approve("carol", "--passphrase-file", "words")
        base = ("approve", "job.toml", "--key", "carol.pem", "--out", "x.json", "--model", "model.safetensors")
        assert "give its passphrase" in mistake(*base)
        (office.folder / "words").write_text("another\n")
        assert "passphrase is another one" in mistake(*base, "--passphrase-file", "words")


class TestJobs:
    def test_status_shows_sites_and_jobs_to_people_and_machines(self, office: Office) -> None:
        job = office.submitted()
        done = fedchorus("status")
        assert f"job  {job.id}" in done.stdout
        assert "queued     round 0 of 2" in done.stdout
        found = last_json(fedchorus("status", "--json"))
        assert [view["id"] for view in found["jobs"]] == [job.id]
        assert found["sites"] == {}
        assert last_json(fedchorus("status", job.id[:10], "--json"))["jobs"][0]["id"] == job.id

    def test_logs_are_lines_for_people_or_json_lines(self, office: Office) -> None:
        job = office.submitted()
        job.note("round", number=1, why="a line\nwith a break")
        done = fedchorus("logs", job.id)
        assert done.returncode == 0
        events = [json.loads(line) for line in fedchorus("logs", job.id, "--json").stdout.splitlines()]
        assert [event["event"] for event in events] == ["submitted", "state", "submitted by", "round"]
        assert events == job.events()

    def test_logs_follow_until_the_job_ends(self, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
        job = office.submitted()
        monkeypatch.setattr(time, "sleep", lambda seconds: job.move("finished"))
        done = fedchorus("logs", job.id, "--follow")
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1].endswith("state: state finished")

    def test_a_job_is_stopped_and_resumed(self, office: Office) -> None:
        job = office.submitted()
        assert fedchorus("stop", job.id).stdout == f"{job.id}: is asked to stop\n"
        assert is_in(job, "stopped")
        assert "there is nothing to stop" in mistake("stop", job.id)
        assert "queued" in fedchorus("resume", job.id).stdout
        assert is_in(job, "queued")
        assert "there is nothing to resume" in mistake("resume", job.id)
        job.move("paused", "the disk is full")
        assert last_json(fedchorus("resume", job.id, "--json"))["state"] == "queued"
        assert last_json(fedchorus("stop", job.id, "--json"))["id"] == job.id

    def test_resume_takes_a_folder_as_a_run_and_without_an_operators_file_everything(
        self, office: Office, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = office.submitted()
        job.move("stopped")
        (office.folder / job.id).mkdir()
        assert "no run folder" in mistake("resume", job.id)
        assert is_in(job, "stopped")
        (office.folder / job.id).rmdir()
        elsewhere = office.folder / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        assert "no run folder" in mistake("resume", job.id)
        monkeypatch.setenv("FEDCHORUS_OPERATOR", str(office.file))
        assert fedchorus("resume", job.id).returncode == 0
        assert is_in(job, "queued")

    def test_a_model_is_fetched_whole(self, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
        job = office.submitted()
        monkeypatch.setattr("server.api.PIECE", 100)
        job.model.write_bytes(bytes(range(256)) * 3)
        assert fedchorus("fetch", job.id, "--out", "got.safetensors").stdout == "got.safetensors\n"
        assert (office.folder / "got.safetensors").read_bytes() == job.model.read_bytes()

    def test_a_finished_job_is_fetched_as_a_folder_that_reads_as_a_run(self, office: Office) -> None:
        job = office.submitted()
        assert "is not finished" in mistake("fetch", job.id, "--out", "got")
        assert not (office.folder / "got").exists()
        job.model.write_bytes(b"a model")
        job.write("summary.json", {"sites": ["north"]})
        job.move("finished")
        fedchorus("fetch", job.id, "--out", "got")
        assert (office.folder / "got" / "job.toml").read_bytes() == job.job.toml
        assert (office.folder / "got" / "model.safetensors").read_bytes() == b"a model"
        assert json.loads((office.folder / "got" / "summary.json").read_text()) == {"sites": ["north"]}
        assert "is there already" in mistake("fetch", job.id, "--out", "got")

    def test_a_model_that_is_not_there_yet_leaves_nothing_behind(self, office: Office) -> None:
        job = office.submitted()
        before = set(office.folder.iterdir())
        assert "has no model yet, it is queued" in mistake("fetch", job.id, "--out", "got.safetensors")
        assert set(office.folder.iterdir()) == before

    @pytest.mark.parametrize("name", ["nobody", "no body", "../jobs", "%00", "é", "\x07"])
    @pytest.mark.parametrize("command", ["status", "logs", "stop", "resume", "fetch"])
    def test_a_job_that_is_not_there_is_one_line(self, office: Office, command: str, name: str) -> None:
        mistake(command, name, *(("--out", "x") if command == "fetch" else ()))


class TestServer:
    """What is wrong with the way to the server, or at the other end of it."""

    def test_a_wrong_token_is_said(self, office: Office) -> None:
        office.write(replace(office.operator, token="another"))
        assert "no valid credential" in mistake("status")

    def test_no_server_is_said_with_its_address_and_what_to_check(self, office: Office) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        office.write(replace(office.operator, address=f"127.0.0.1:{port}"))
        assert f"127.0.0.1:{port}: no answer" in (said := mistake("status"))
        assert "check the address, the network and that `fedchorus server` runs" in said

    def test_another_authority_is_not_believed(self, office: Office, tmp_path: Path) -> None:
        office.write(replace(office.operator, authority=Authority(tmp_path / "other").pem.read_text()))
        assert "certificate verify failed" in mistake("status").lower()

    @pytest.mark.parametrize(
        "change",
        [
            {"authority": ""},
            {"authority": "no certificate"},
            {"authority": "é"},
            {"address": "no address:x"},
            {"address": "é:9"},
            {"address": "127.0.0.1:99999"},
            {"token": "a\nb"},
            {"token": "é"},
        ],
    )
    def test_a_damaged_operators_file_is_one_line(self, office: Office, change: dict[str, str]) -> None:
        office.write(replace(office.operator, **change))
        mistake("status")

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b"{", b"\xff", b'{"format": "fedchorus operator 2"}', b"[" * 10**5]
    )
    def test_what_is_no_operators_file_is_said(self, office: Office, content: bytes) -> None:
        office.file.write_bytes(content)
        assert "not an operator's file; the coordinator makes one with fedchorus token" in mistake("status")

    @pytest.mark.parametrize(
        ("status", "kind", "body"),
        [
            (200, b"text/html", b"<html>Log in to the hospital's network</html>"),
            (200, b"application/json", b"<html>"),
            (200, b"application/json", b"[" * 100_000),
            (302, b"text/html", b""),
            (400, b"application/json", b"[]"),
            (500, b"text/plain", b"Internal Server Error"),
            (502, b"application/json", b"[" * 100_000),
        ],
    )
    def test_another_program_at_the_address_is_one_line(
        self, office: Office, shared: tuple[list[App], int], status: int, kind: bytes, body: bytes
    ) -> None:
        async def other(scope: Scope, receive: Receive, send: Send) -> None:
            headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        shared[0].append(other)
        assert office.operator.address in mistake("status")

    def test_a_trace_is_shown_to_who_asks_for_it(self, office: Office) -> None:
        office.file.unlink()
        with pytest.raises(FedchorusError):
            fedchorus("status", "--verbose")


class TestProcesses:
    """`fedchorus server` and `fedchorus client` on folders that a person must mend: code 2, so nothing tries again."""

    @pytest.mark.parametrize("command", ["server", "client"])
    def test_a_folder_of_another_kind_is_one_line(self, command: str, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        said = mistake(command, str(tmp_path), code=2)
        assert "server.toml" in said or "site.toml" in said

    def test_content_prints_what_a_policy_must_say(self, office: Office) -> None:
        done = fedchorus("content", "job.toml")
        assert done.returncode == 0
        assert "tabular-classification" in done.stdout
        assert "no such job file" in mistake("content", "none.toml")

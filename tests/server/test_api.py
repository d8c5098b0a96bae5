"""Our HTTP API: who may call what, what a bad call gets, and jobs and models as they travel."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import numpy as np
import pytest

from privacy.errors import RunError
from privacy.logbook import Logbook
from server.api import MOST_BODY, PIECE, Office, make_api
from server.coordinator import Coordinator
from server.jobs import JobFolder
from server.listen import App, Caller, Receive, Scope, Send
from server.provision import provision
from strategies.parameters import Parameters
from tests.deployment.federation import deployed_job

OPERATOR = Caller("public", None, "127.0.0.1", operator="ops")
SITE = Caller("public", b"its certificate", "127.0.0.1", site="north")
SERVER = Caller("loopback", None, "127.0.0.1", internal=True)
NOBODY = Caller("public", None, "127.0.0.1")
DIGEST = "ab" * 32
BASE = "/v1/fedchorus"


@dataclass
class Clerk:
    """An office that only remembers what it was asked; `fault` is raised instead."""

    asked: list[tuple[str, Any]] = field(default_factory=list)
    fault: Exception | None = None

    def _note(self, call: str, *given: Any) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        self.asked.append((call, given))
        return {"call": call}

    def federation(self) -> dict[str, Any]:
        return self._note("federation")

    def keep_model(self, digest: str, at: int, piece: bytes) -> dict[str, Any]:
        return self._note("keep_model", digest, at, len(piece))

    def submit(self, record: dict[str, Any], *, operator: str) -> dict[str, Any]:
        return self._note("submit", record, operator)

    def jobs(self) -> list[dict[str, Any]]:
        return [self._note("jobs")]

    def job(self, name: str) -> dict[str, Any]:
        return self._note("job", name)

    def events(self, name: str, after: int) -> list[dict[str, Any]]:
        return [self._note("events", name, after)]

    def result(self, name: str) -> dict[str, Any]:
        return self._note("result", name)

    def model(self, name: str, at: int) -> bytes:
        self._note("model", name, at)
        return b"bytes"

    def stop_job(self, name: str) -> dict[str, Any]:
        return self._note("stop_job", name)

    def resume_job(self, name: str) -> dict[str, Any]:
        return self._note("resume_job", name)

    def sites(self) -> dict[str, Any]:
        return self._note("sites")

    def certificate(self, site: str, csr: str, certificate_der: bytes) -> dict[str, Any]:
        return self._note("certificate", site, csr, certificate_der)

    def sign_roster(self, site: str, signature: str) -> dict[str, Any]:
        return self._note("sign_roster", site, signature)

    def metrics(self) -> str:
        self._note("metrics")
        return "fedchorus_up 1\n"

    def ring(self, sites: list[str]) -> None:
        self._note("ring", sites)

    async def wait(self, since: int, timeout_s: float) -> dict[str, Any]:
        return self._note("wait", since, timeout_s)


def behind(app: App, caller: Caller) -> App:
    """What the guard does when it has found out who calls."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "fedchorus": caller}, receive, send)

    return guarded


class Direct(httpx.BaseTransport):
    """Calls an application without a network; what comes out of it as an exception comes out here too."""

    def __init__(self, app: App) -> None:
        self._app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def exchange() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app)) as client:
                answer = await client.request(request.method, request.url, content=request.read())
                return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

        return asyncio.run(exchange())


def client(office: Office, caller: Caller) -> httpx.Client:
    return httpx.Client(transport=Direct(behind(make_api(office), caller)), base_url="http://server")


CALLS: list[tuple[str, str, Any, str, str]] = [  # Method, path, body, who may, what the office is asked.
    ("GET", "/federation", None, "all", "federation"),
    ("PUT", f"/models/{DIGEST}?at=7", b"piece", "operator", "keep_model"),
    ("POST", "/jobs", b"{}", "operator", "submit"),
    ("GET", "/jobs", None, "operator", "jobs"),
    ("GET", "/jobs/one-12345678", None, "operator", "job"),
    ("GET", "/jobs/one-12345678/events?after=3", None, "operator", "events"),
    ("GET", "/jobs/one-12345678/result", None, "operator", "result"),
    ("GET", "/jobs/one-12345678/model?at=9", None, "operator", "model"),
    ("POST", "/jobs/one-12345678/stop", None, "operator", "stop_job"),
    ("POST", "/jobs/one-12345678/resume", None, "operator", "resume_job"),
    ("GET", "/sites", None, "operator", "sites"),
    ("POST", "/site/certificate", b'{"csr": "pem"}', "site", "certificate"),
    ("POST", "/site/roster", b'{"signature": "hex"}', "site", "sign_roster"),
    ("POST", "/internal/wait", b'{"since": 1, "timeout_s": 0.5}', "internal", "wait"),
    ("POST", "/internal/ring", b'{"sites": ["north"]}', "internal", "ring"),
]


class TestWhoMayCallWhat:
    @pytest.mark.parametrize(
        ("kind", "caller"), [("operator", OPERATOR), ("site", SITE), ("internal", SERVER), ("", NOBODY)]
    )
    @pytest.mark.parametrize(("method", "path", "body", "who", "call"), CALLS, ids=[call[4] for call in CALLS])
    def test_each_call_is_for_those_of_the_table_alone(
        self, method: str, path: str, body: Any, who: str, call: str, kind: str, caller: Caller
    ) -> None:
        office = Clerk()
        answer = client(office, caller).request(method, BASE + path, content=body)
        if who in ("all", kind):
            assert answer.status_code == 200
            assert [asked for asked, _ in office.asked] == [call]
        else:
            assert answer.status_code == 403
            assert answer.json()["error"].startswith("this call is for ")
            assert office.asked == []

    def test_the_table_has_every_call_of_the_office(self) -> None:
        assert {call for *_, call in CALLS} | {"metrics"} == {
            name for name in vars(Office) if not name.startswith("_") and get_type_hints(getattr(Office, name))
        }

    def test_who_calls_is_told_from_the_connection_and_never_from_the_body(self) -> None:
        office = Clerk()
        body = {"csr": "pem", "site": "south", "signature": "hex", "operator": "root"}
        client(office, SITE).post(f"{BASE}/site/certificate", json=body)
        client(office, SITE).post(f"{BASE}/site/roster", json=body)
        client(office, OPERATOR).post(f"{BASE}/jobs", json=body)
        assert office.asked == [
            ("certificate", ("north", "pem", b"its certificate")),
            ("sign_roster", ("north", "hex")),
            ("submit", (body, "ops")),
        ]

    def test_numbers_and_names_reach_the_office(self) -> None:
        office = Clerk()
        with client(office, OPERATOR) as api:
            api.put(f"{BASE}/models/{DIGEST}?at=7", content=b"piece")
            api.get(f"{BASE}/jobs/one-12345678/events?after=3")
            assert api.get(f"{BASE}/jobs/one-12345678/model").content == b"bytes"
        assert office.asked == [
            ("keep_model", (DIGEST, 7, 5)),
            ("events", ("one-12345678", 3)),
            ("model", ("one-12345678", 0)),
        ]

    def test_metrics_are_text(self) -> None:
        assert client(Clerk(), NOBODY).get("/metrics").text == "fedchorus_up 1\n"


class TestBadCalls:
    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "/site/certificate", b""),
            ("POST", "/site/certificate", b"{"),
            ("POST", "/site/certificate", b"\xff"),
            ("POST", "/site/certificate", b"[]"),
            ("POST", "/site/certificate", b"{}"),
            ("POST", "/site/certificate", b"[" * 100_000),
            ("POST", "/site/roster", b"null"),
            ("POST", "/site/roster", b'{"signatures": ""}'),
            ("POST", "/internal/wait", b'{"since": "x", "timeout_s": 1}'),
            ("POST", "/internal/wait", b'{"since": Infinity, "timeout_s": 1}'),
            ("POST", "/internal/ring", b'{"sites": 3}'),
            ("PUT", "/models/short?at=0", b"x"),
            ("PUT", f"/models/{DIGEST.upper()}?at=0", b"x"),
            ("PUT", f"/models/{DIGEST}?at=-1", b"x"),
            ("PUT", f"/models/{DIGEST}?at=1e3", b"x"),
            ("PUT", f"/models/{DIGEST}?at=" + "9" * 5000, b"x"),
            ("PUT", f"/models/{DIGEST}?at=%D9%A1", b"x"),  # An Arabic digit.
            ("GET", "/jobs/x/events?after=x", None),
        ],
    )
    def test_a_body_or_address_that_is_not_ours_is_one_line(self, method: str, path: str, body: Any) -> None:
        office, caller = Clerk(), Caller("loopback", b"", "127.0.0.1", "north", "ops", internal=True)
        answer = client(office, caller).request(method, BASE + path, content=body)
        assert answer.status_code == 400
        assert set(answer.json()) == {"error"}
        assert answer.json()["error"].isprintable()
        assert "Traceback" not in answer.text
        assert office.asked == []

    def test_a_refusal_is_its_one_line(self) -> None:
        answer = client(Clerk(fault=RunError("job x: no such job")), OPERATOR).get(f"{BASE}/jobs/x")
        assert (answer.status_code, answer.json()) == (400, {"error": "job x: no such job"})

    @pytest.mark.parametrize(("path", "most"), [("/site/roster", MOST_BODY), (f"/models/{DIGEST}", PIECE)])
    def test_a_body_may_be_as_long_as_it_says_and_no_longer(self, path: str, most: int) -> None:
        office, caller = Clerk(), Caller("public", b"", "127.0.0.1", "north", "ops")
        method = "PUT" if path.startswith("/models") else "POST"
        padding = most - len('{"signature": ""}')
        body = (b'{"signature": "' + b"a" * padding + b'"}').ljust(most)
        assert len(body) == most
        assert client(office, caller).request(method, BASE + path, content=body).status_code == 200
        answer = client(office, caller).request(method, BASE + path, content=body + b" ")
        assert (answer.status_code, len(office.asked)) == (400, 1)
        assert f"longer than {most} bytes" in answer.json()["error"]

    @pytest.mark.parametrize(
        ("method", "path"),
        [("GET", "/models"), ("DELETE", "/jobs"), ("PUT", "/jobs/x"), ("GET", "/internal/wait"), ("GET", "/nothing")],
    )
    def test_what_is_not_in_the_table_is_not_there(self, method: str, path: str) -> None:
        assert client(Clerk(), OPERATOR).request(method, BASE + path).status_code in (404, 405)


@dataclass
class Desk:
    """A real coordinator without its network, as an operator reaches it."""

    folder: Path
    office: Coordinator
    api: httpx.Client

    def model(self, name: str = "initial") -> bytes:
        path = self.folder / f"{name}.safetensors"
        Parameters({"weight": (3,)}).save(np.array([0.5, -2.0, 4.0], np.float32), path, {"round": "0"})
        return path.read_bytes()

    def put(self, content: bytes, at: int = 0, digest: str | None = None) -> Any:
        name = digest or hashlib.sha256(content).hexdigest()
        return self.api.put(f"{BASE}/models/{name}?at={at}", content=content[at:])

    def submit(self, **changes: Any) -> Any:
        record = {"toml": deployed_job().toml.decode(), "model": hashlib.sha256(self.model()).hexdigest()}
        body = json.dumps({**record, "approvals": [], **changes})  # In ASCII: half a character goes too.
        return self.api.post(f"{BASE}/jobs", content=body.encode())

    @property
    def uploads(self) -> Path:
        return self.folder / "coordinator" / "uploads"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "federation.toml").write_text('name = "thorax"\naddress = "127.0.0.1:9"\n')
    provision(tmp_path / "federation.toml", tmp_path / "coordinator", now=datetime.now(UTC))
    office = Coordinator(tmp_path / "coordinator", Logbook("server", None, stream=None))
    with client(office, OPERATOR) as api:
        yield Desk(tmp_path, office, api)


def error(answer: Any) -> str:
    assert answer.status_code == 400
    said: str = answer.json()["error"]
    assert said.isprintable()
    return said


class TestSubmission:
    def test_a_job_with_its_model_is_queued_and_shown(self, desk: Desk) -> None:
        desk.put(desk.model())
        view = desk.submit().json()
        assert (view["state"], view["rounds"], view["of"]) == ("queued", 0, 2)
        assert desk.api.get(f"{BASE}/jobs").json() == [view]
        assert desk.api.get(f"{BASE}/jobs/{view['id']}").json() == view
        events = desk.api.get(f"{BASE}/jobs/{view['id']}/events?after=0").json()
        assert [event["event"] for event in events] == ["submitted", "state", "submitted by"]
        assert events[-1]["operator"] == "ops"
        assert list(desk.uploads.iterdir()) == []

    def test_a_model_comes_in_pieces(self, desk: Desk) -> None:
        content = desk.model()
        digest = hashlib.sha256(content).hexdigest()
        for at in range(0, len(content), 50):
            answer = desk.api.put(f"{BASE}/models/{digest}?at={at}", content=content[at : at + 50])
            assert answer.json() == {"bytes": min(at + 50, len(content))}
        assert desk.submit().status_code == 200

    def test_a_piece_that_came_twice_does_no_harm(self, desk: Desk) -> None:
        content = desk.model()
        desk.put(content)
        assert desk.put(content, at=20).json() == {"bytes": len(content)}
        assert desk.submit().status_code == 200

    def test_a_piece_that_leaves_a_gap_is_refused(self, desk: Desk) -> None:
        assert "does not continue the 0 bytes" in error(desk.put(b"x" * 30, at=20))
        desk.put(b"x" * 10, digest=DIGEST)
        assert "begins at 11 does not continue the 10 bytes" in error(desk.put(b"x" * 30, at=11, digest=DIGEST))

    def test_a_model_may_not_be_larger_than_a_model(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.coordinator.MOST_MODEL", 100)
        assert desk.put(b"x" * 100, digest=DIGEST).status_code == 200
        error(desk.put(b"x" * 101, digest=DIGEST))
        error(desk.put(b"x" * 101, at=100, digest=DIGEST))

    def test_a_model_that_is_not_what_its_name_says_is_refused(self, desk: Desk) -> None:
        content = desk.model()
        assert "did not come whole" in error(desk.submit())
        desk.put(content[:-1], digest=hashlib.sha256(content).hexdigest())
        assert "did not come whole" in error(desk.submit())
        desk.put(bytes(len(content)), digest=hashlib.sha256(content).hexdigest())
        assert "did not come whole" in error(desk.submit())
        assert desk.api.get(f"{BASE}/jobs").json() == []

    @pytest.mark.parametrize("model", ["../server", "x" * 300, "\0", "", None, 3, ["a"], DIGEST.upper()])
    def test_a_name_of_a_model_never_leads_elsewhere(self, desk: Desk, model: Any) -> None:
        assert "not named by its SHA-256" in error(desk.submit(model=model))

    def test_a_job_that_names_code_which_server_toml_does_not_list_is_refused(self, desk: Desk) -> None:
        desk.put(desk.model())
        toml = deployed_job(strategy={"name": "evil.module:Strategy"}).toml.decode()
        assert "'evil.module:Strategy' is not among the strategies" in error(desk.submit(toml=toml))
        assert not any((desk.folder / "coordinator" / "jobs").iterdir())

    def test_files_beside_the_job_are_no_part_of_a_submission(self, desk: Desk) -> None:
        desk.put(desk.model())
        view = desk.submit(fab="UEsDBA==", code="import os").json()
        kept = b"".join(path.read_bytes() for path in (desk.folder / "coordinator" / "jobs" / view["id"]).iterdir())
        assert b"import os" not in kept
        assert b"UEsDBA" not in kept

    @pytest.mark.parametrize(
        "changes",
        [
            {"approvals": None},
            {"approvals": [[]]},
            {"approvals": [["a", "b", "c"]]},
            {"approvals": {"a": "b"}},
            {"toml": None},
            {"toml": "\ud800"},
            {"toml": "name = 1"},
        ],
    )
    def test_a_submission_of_another_shape_is_refused(self, desk: Desk, changes: dict[str, Any]) -> None:
        desk.put(desk.model())
        error(desk.submit(**changes))
        assert not any((desk.folder / "coordinator" / "jobs").iterdir())


class TestJobs:
    @pytest.fixture
    def job(self, desk: Desk) -> JobFolder:
        desk.put(desk.model())
        return JobFolder(desk.folder / "coordinator" / "jobs" / desk.submit().json()["id"])

    def test_a_queued_job_is_stopped_resumed_and_stopped_again(self, desk: Desk, job: JobFolder) -> None:
        for _ in range(2):
            view = desk.api.post(f"{BASE}/jobs/{job.id}/stop").json()
            assert (view["state"], job.wants_stop) == ("stopped", True)
            assert "there is nothing to stop" in error(desk.api.post(f"{BASE}/jobs/{job.id}/stop"))
            view = desk.api.post(f"{BASE}/jobs/{job.id}/resume").json()
            assert (view["state"], job.wants_stop) == ("queued", False)
            assert "there is nothing to resume" in error(desk.api.post(f"{BASE}/jobs/{job.id}/resume"))

    def test_a_running_job_is_asked_and_stops_by_itself(self, desk: Desk, job: JobFolder) -> None:
        job.move("running")
        desk.office._running = job.id
        assert desk.api.post(f"{BASE}/jobs/{job.id}/stop").json()["state"] == "running"
        assert job.wants_stop

    def test_a_job_that_needs_a_person_is_resumed(self, desk: Desk, job: JobFolder) -> None:
        job.move("paused", "the disk is full")
        assert desk.api.get(f"{BASE}/jobs/{job.id}").json()["why"] == "the disk is full"
        assert desk.api.post(f"{BASE}/jobs/{job.id}/resume").json()["state"] == "queued"

    def test_a_model_is_fetched_in_pieces_that_make_it_whole(
        self, desk: Desk, job: JobFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.api.PIECE", 10)
        assert "has no model yet, it is queued" in error(desk.api.get(f"{BASE}/jobs/{job.id}/model?at=0"))
        job.model.write_bytes(bytes(range(25)))
        got = b""
        while piece := desk.api.get(f"{BASE}/jobs/{job.id}/model?at={len(got)}").content:
            assert len(piece) <= 10
            got += piece
        assert got == bytes(range(25))
        assert desk.api.get(f"{BASE}/jobs/{job.id}/model?at=99").content == b""

    @pytest.mark.parametrize("what", ["", "/events", "/model"])
    @pytest.mark.parametrize("name", ["x", "..", "%2e%2e%2fserver.toml", "smallest%00", "%0a"])
    def test_an_unknown_job_is_named_in_one_line(self, desk: Desk, job: JobFolder, name: str, what: str) -> None:
        answer = desk.api.get(f"{BASE}/jobs/{name}{what}")
        assert answer.status_code in (400, 404)
        assert "toml" not in answer.text
        if answer.status_code == 400:
            assert f"known: {job.id}" in error(answer)

    def test_a_job_file_that_was_changed_is_shown_as_damaged(self, desk: Desk, job: JobFolder) -> None:
        path = job.path / "job.toml"
        path.write_bytes(path.read_bytes().replace(b"rounds = 2", b"rounds = 9"))
        (view,) = desk.api.get(f"{BASE}/jobs").json()
        assert (view["id"], view["state"]) == (job.id, "damaged")

    def test_the_federation_says_its_name_version_and_time(self, desk: Desk) -> None:
        found = desk.api.get(f"{BASE}/federation").json()
        assert set(found) == {"federation", "version", "time"}
        assert found["federation"] == "thorax"
        assert abs(found["time"] - datetime.now(UTC).timestamp()) < 60
        assert json.dumps(found)

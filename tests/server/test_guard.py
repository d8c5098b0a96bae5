"""The guard: every row of its table over real TLS; nobody is another, is too much, or outlives their certificate."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privacy.errors import LedgerError, Refused, RunError
from server.audit_log import Call
from server.guard import CONTROL_READS, FLEET_CALLS, RUNS, Guard, Operators, Rates
from server.listen import Caller, Listeners, Message, Receive, Scope, Send
from tests.server.tls import Authority, Issued, client_of, loopback_of, serving

TOKEN, SECRET = "an operator's token", "the server's own secret"
LIMIT = 100_000


@dataclass(frozen=True)
class FakePeer:
    site: str
    not_before: datetime
    not_after: datetime
    public_bytes: bytes


def peer_of(der: bytes) -> FakePeer:
    certificate = x509.load_der_x509_certificate(der)
    name = str(certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)
    if name.startswith("_"):
        raise Refused("no site has this name")
    public = certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return FakePeer(name, certificate.not_valid_before_utc, certificate.not_valid_after_utc, public)


@dataclass
class Recorder:
    """An audit log in memory."""

    calls: list[Call] = field(default_factory=list)
    broken: bool = False

    def record(self, call: Call) -> None:
        self.calls.append(call)

    def check(self) -> None:
        if self.broken:
            raise LedgerError("the disk is full")


@dataclass
class Answers:
    """An application that answers 200 with its name, reads whole bodies and remembers its callers."""

    name: str
    seen: list[tuple[str, Caller]] = field(default_factory=list)
    status: int = 200
    held: asyncio.Event | None = None
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    most_bytes: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        self.seen.append((scope["path"], scope["fedchorus"]))
        scope[RUNS].add(7)
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RuntimeError("the client has gone")
            size, more = size + len(message["body"]), message.get("more_body", False)
            self.most_bytes = max(self.most_bytes, size)
        if self.held is not None:
            self.arrived.release()
            await self.held.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.name.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@dataclass
class World:
    """A guard with everything around it, behind real listeners."""

    authority: Authority
    operators: Path
    north: Issued
    south: Issued
    flower: Answers = field(default_factory=lambda: Answers("flower"))
    api: Answers = field(default_factory=lambda: Answers("api"))
    audit: Recorder = field(default_factory=Recorder)
    activated: list[str] = field(default_factory=list)
    revoked: set[str] = field(default_factory=set)
    ahead: timedelta = timedelta()
    seconds: float = 0.0
    listeners: Listeners = field(init=False)

    def guard(self, **more: Any) -> Guard[FakePeer]:
        return Guard(
            self.flower,
            api=self.api,
            audit=self.audit,
            peer_of=peer_of,
            is_revoked=self.is_revoked,
            operators=Operators(self.operators),
            internal_secret=SECRET,
            on_activate=self.activated.append,
            body_bytes=LIMIT,
            clock=lambda: datetime.now(UTC) + self.ahead,
            timer=lambda: self.seconds,
            **more,
        )

    def is_revoked(self, peer: FakePeer) -> bool:
        if peer.site == "unclear":
            raise LedgerError("revoked.json is damaged")
        return peer.site in self.revoked

    def public(self, identity: Issued | None = None) -> httpx.Client:
        return client_of(self.listeners, self.authority, identity)

    def loopback(self) -> httpx.Client:
        return loopback_of(self.listeners)

    def reset(self) -> None:
        self.flower.seen, self.api.seen, self.flower.status, self.flower.held = [], [], 200, None
        self.flower.most_bytes, self.audit.calls, self.audit.broken, self.ahead = 0, [], False, timedelta()
        self.activated.clear()
        self.revoked.clear()
        self.seconds += 1000  # Every bucket is full again.


def digest(token: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(token.encode()).hexdigest(), "created": "2026-05-04T12:00:00+00:00"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("guard")
    authority = Authority(folder / "authority")
    operators = folder / "operators.json"
    operators.write_text(json.dumps({"ada": digest(TOKEN), "bob": digest("another")}))
    made = World(authority, operators, authority.issue("north"), authority.issue("south"))
    with serving(made.guard(), authority, authority.issue("_server", server=True)) as made.listeners:
        yield made


@pytest.fixture
def world(running: World) -> World:
    running.reset()
    return running


def node(issued: Issued) -> dict[str, str]:
    return {"flwr-public-key": b64encode(issued.public_bytes).decode()}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def is_refusal(reply: httpx.Response, status: int) -> bool:
    assert reply.status_code == status
    (text,) = reply.json().values()
    assert list(reply.json()) == ["error"]
    assert "\n" not in text
    assert "south" not in reply.text
    return True


PUBLIC_ROWS = [
    # method, path, identity, token, answer
    *[("POST", f"/v1/fleet/{call}", "north", None, "flower") for call in sorted(FLEET_CALLS)],
    *[("POST", f"/v1/fleet/{call}", None, None, 401) for call in sorted(FLEET_CALLS)],
    ("POST", "/v1/fleet/pull-messages", None, TOKEN, 401),
    ("GET", "/v1/fleet/pull-messages", "north", None, 404),
    ("POST", "/v1/fleet/register-node", "north", None, 403),
    ("POST", "/v1/fleet/unregister-node", "north", None, 403),
    ("POST", "/v1/fleet/register-node", None, None, 401),
    ("POST", "/v1/fleet/pull-messages/", "north", None, 404),
    ("POST", "/v1/fleet/pull%2dmessages", "north", None, "flower"),
    ("POST", "/v1/fleet//register-node", "north", None, 404),
    ("POST", "/v1/fleet/%2e%2e/control/start-run", "north", None, 404),
    ("POST", "/v1/fleet/invented", "north", None, 404),
    ("POST", "//v1/fleet/pull-messages", "north", None, 404),
    ("POST", "/V1/fleet/pull-messages", "north", None, 404),
    ("POST", "/v1/runtime/acquire-task", "north", TOKEN, 404),
    ("POST", "/v1/runtime/pull-messages", None, None, 404),
    *[("POST", f"/v1/control/{call}", None, TOKEN, "flower") for call in sorted(CONTROL_READS)],
    ("POST", "/v1/control/list-runs", None, None, 401),
    ("POST", "/v1/control/list-runs", "north", None, 401),
    ("POST", "/v1/control/list-runs", "north", TOKEN, "flower"),
    ("POST", "/v1/control/list-runs", None, "wrong", 401),
    ("POST", "/v1/control/list-runs", None, SECRET, 401),
    ("POST", "/v1/control/start-run", None, TOKEN, 403),
    ("POST", "/v1/control/register-node", None, TOKEN, 403),
    ("POST", "/v1/control/add-app", None, TOKEN, 403),
    ("POST", "/v1/control/stop-run", None, TOKEN, 403),
    ("POST", "/v1/control/start-run", None, None, 401),
    ("GET", "/v1/fedchorus/jobs", None, TOKEN, "api"),
    ("POST", "/v1/fedchorus/renew", "north", None, "api"),
    ("POST", "/v1/fedchorus/jobs", None, None, 401),
    ("POST", "/v1/fedchorus/jobs", None, "wrong", 401),
    ("POST", "/v1/fedchorus/jobs", None, SECRET, 401),
    ("GET", "/health", None, None, "flower"),
    ("HEAD", "/health", None, None, "flower"),
    ("POST", "/health", None, None, 404),
    ("GET", "/metrics", None, None, 404),
    ("GET", "/docs", None, TOKEN, 404),
    ("GET", "/openapi.json", "north", TOKEN, 404),
    ("GET", "/", None, None, 404),
]


@pytest.mark.parametrize(("method", "path", "identity", "token", "answer"), PUBLIC_ROWS)
def test_the_public_listener_answers_as_its_table_says(
    method: str, path: str, identity: str | None, token: str | None, answer: str | int, world: World
) -> None:
    issued = world.north if identity else None
    headers = {**(node(issued) if issued else {}), **(bearer(token) if token else {})}
    with world.public(issued) as client:
        reply = client.send(client.build_request(method, path, headers=headers))
    passed = [name for name, app in (("flower", world.flower), ("api", world.api)) if app.seen]
    if isinstance(answer, int):
        assert is_refusal(reply, answer)
        assert passed == []
        assert world.audit.calls[-1].status == answer
        assert world.audit.calls[-1].why
    else:
        assert (reply.status_code, passed) == (200, [answer])


LOOPBACK_ROWS = [
    ("POST", "/v1/runtime/acquire-task", None, "flower"),
    ("POST", "/v1/fleet/pull-messages", None, 403),
    ("POST", "/v1/fleet/pull-messages", SECRET, 403),
    ("POST", "/v1/control/start-run", None, 401),
    ("POST", "/v1/control/start-run", "wrong", 401),
    ("POST", "/v1/control/start-run", TOKEN, "flower"),
    ("POST", "/v1/control/start-run", SECRET, "flower"),
    ("POST", "/v1/fedchorus/rounds", SECRET, "api"),
    ("POST", "/v1/fedchorus/rounds", None, 401),
    ("POST", "/v1/fedchorus/rounds", TOKEN, 401),
    ("GET", "/health", None, "flower"),
    ("GET", "/metrics", None, "api"),
    ("GET", "/docs", None, 404),
    ("GET", "/openapi.json", SECRET, 404),
]


@pytest.mark.parametrize(("method", "path", "token", "answer"), LOOPBACK_ROWS)
def test_the_loopback_listener_answers_as_its_table_says(
    method: str, path: str, token: str | None, answer: str | int, world: World
) -> None:
    with world.loopback() as client:
        reply = client.request(method, path, headers={**node(world.north), **(bearer(token) if token else {})})
    passed = [name for name, app in (("flower", world.flower), ("api", world.api)) if app.seen]
    if isinstance(answer, int):
        assert is_refusal(reply, answer)
        assert passed == []
    else:
        assert (reply.status_code, passed) == (200, [answer])


def test_a_job_with_code_is_told_the_way(world: World) -> None:
    with world.public() as client:
        reply = client.post("/v1/control/start-run", headers=bearer(TOKEN))
    assert "fedchorus submit" in reply.json()["error"]


@pytest.mark.parametrize(
    "header",
    [
        [],
        ["south"],
        ["north", "south"],
        ["north", "north"],
        ["not base64!"],
        [""],
    ],
)
def test_no_node_speaks_under_another_key_than_its_certificates(header: list[str], world: World) -> None:
    keys = {"north": node(world.north)["flwr-public-key"], "south": node(world.south)["flwr-public-key"]}
    headers = [("flwr-public-key", keys.get(value, value)) for value in header]
    with world.public(world.north) as client:
        assert is_refusal(client.post("/v1/fleet/pull-messages", headers=headers), 403)
        assert world.flower.seen == []
        assert client.post("/v1/fleet/pull-messages", headers=node(world.north)).status_code == 200


@pytest.mark.parametrize("event", ["expired", "not valid yet", "revoked"])
def test_a_connection_does_not_outlive_its_certificate(event: str, world: World) -> None:
    with world.public(world.north) as client:
        with client.stream("POST", "/v1/fleet/pull-messages", headers=node(world.north)) as first:
            connection = address_of(first)
            first.read()
        if event == "revoked":
            world.revoked.add("north")
        else:
            world.ahead = timedelta(days=60 if event == "expired" else -60)
        with client.stream("POST", "/v1/fleet/pull-messages", headers=node(world.north)) as second:
            assert address_of(second) == connection
            second.read()
        assert is_refusal(second, 403)
        assert is_refusal(client.post("/v1/fedchorus/renew"), 403)
    assert first.status_code == 200
    assert len(world.flower.seen) == 1
    assert event in world.audit.calls[-1].why
    assert world.audit.calls[-1].who == "site north"  # The authority signed that name, whatever came later.
    with world.public(world.south) as other:
        expected = 200 if event == "revoked" else 403
        assert other.post("/v1/fleet/pull-messages", headers=node(world.south)).status_code == expected


def address_of(reply: httpx.Response) -> Any:
    return reply.extensions["network_stream"].get_extra_info("client_addr")


@pytest.mark.parametrize("name", ["_server_as_client", "unclear"])
def test_a_certificate_that_is_no_sites_or_cannot_be_checked_is_refused(name: str, world: World) -> None:
    odd = world.authority.issue(name)
    with world.public(odd) as client:
        assert is_refusal(client.post("/v1/fleet/pull-messages", headers=node(odd)), 403)
    assert world.flower.seen == []


def test_the_api_learns_who_calls(world: World) -> None:
    with world.public(world.north) as client:
        client.post("/v1/fedchorus/renew", headers=bearer(TOKEN))
    _, caller = world.api.seen[-1]
    assert (caller.site, caller.operator, caller.internal) == ("north", "ada", False)
    with world.loopback() as own:
        own.post("/v1/fedchorus/rounds", headers=bearer(SECRET))
    assert world.api.seen[-1][1].internal


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", TOKEN)],
        [("authorization", f"Basic {TOKEN}")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer \xff\xfe".encode("latin-1").decode("latin-1"))],
        [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer wrong")],
        [("authorization", f"Bearer {hashlib.sha256(TOKEN.encode()).hexdigest()}")],
    ],
)
def test_what_is_not_one_good_token_is_none(headers: list[tuple[str, str]], world: World) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    with world.public() as client:
        assert is_refusal(client.post("/v1/control/list-runs", headers=raw), 401)


def test_operators_come_and_go_while_the_server_runs(world: World) -> None:
    before = world.operators.read_text()
    with world.public() as client:

        def status(token: str) -> int:
            return client.post("/v1/control/list-runs", headers=bearer(token)).status_code

        assert (status(TOKEN), status("new")) == (200, 401)
        world.operators.write_text(json.dumps({"eve": digest("new"), "ada": digest("changed")}))
        assert (status(TOKEN), status("new")) == (401, 200)
        for damaged in ("{", "[]", '{"eve": {}}', '{"eve": {"sha256": "12"}}', ""):
            world.operators.write_text(damaged)
            assert status("new") == 401
        world.operators.unlink()
        assert status("new") == 401
        world.operators.write_text(before)
        assert status(TOKEN) == 200


def test_a_damaged_file_of_operators_stops_the_start(tmp_path: Path) -> None:
    for content in (None, "{", '{"ada": {"sha256": "zz"}}'):
        path = tmp_path / "operators.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(RunError, match="not a file of operators"):
            Operators(path)


def test_activation_is_told_when_it_succeeded(world: World) -> None:
    with world.public(world.north) as client:
        client.post("/v1/fleet/activate-node", headers=node(world.north))
        client.post("/v1/fleet/pull-messages", headers=node(world.north))
        world.flower.status = 401
        client.post("/v1/fleet/activate-node", headers=node(world.north))
        world.flower.status = 200
        client.post("/v1/fleet/activate-node", headers=node(world.south))
    assert world.activated == ["north"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_without_being_kept(declared: bool, world: World) -> None:
    body = bytes(LIMIT * 5)
    content = body if declared else iter([body[at : at + 10_000] for at in range(0, len(body), 10_000)])
    with world.public(world.north) as client:
        reply = client.post("/v1/fleet/push-object", headers=node(world.north), content=content)
        assert is_refusal(reply, 413)
        assert len(world.flower.seen) == (0 if declared else 1)
        assert client.post("/v1/fleet/push-object", headers=node(world.north), content=bytes(LIMIT)).is_success
    assert world.flower.most_bytes == LIMIT
    refused = next(call for call in world.audit.calls if call.status == 413)
    assert refused.bytes_in < 3 * LIMIT


def test_a_caller_that_leaves_is_no_error_of_the_server(world: World) -> None:
    with world.public(world.north) as client:
        port = world.listeners.ports["loopback"]
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall(b"POST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n")
            wire.sendall(f"authorization: Bearer {SECRET}\r\n\r\nabc".encode())
            while not world.flower.seen:
                assert client.get("/health").status_code == 200
        while not any(call.status == 499 for call in world.audit.calls):
            assert client.get("/health").status_code == 200
    left = next(call for call in world.audit.calls if call.status == 499)
    assert (left.path, left.who, left.bytes_in) == ("/v1/control/list-runs", "server", 3)


def test_the_audit_log_has_who_what_and_how_much(world: World) -> None:
    with world.public(world.north) as client:
        client.post("/v1/fleet/push-object?token=secret", headers=node(world.north), content=b"12345")
        client.get("/health")
        client.post("/v1/control/list-runs", headers=bearer(TOKEN))
        client.get("/" + "x" * 500 + TOKEN)
    first, second, third = world.audit.calls
    assert first == Call(
        who="site north",
        address="127.0.0.1",
        listener="public",
        method="POST",
        path="/v1/fleet/push-object",
        status=200,
        runs=(7,),
        bytes_in=5,
        bytes_out=6,
    )
    assert (second.who, second.path, second.status) == ("operator ada", "/v1/control/list-runs", 200)
    assert (third.status, len(third.path)) == (404, 120)
    assert TOKEN not in str(world.audit.calls)
    assert "secret" not in str(world.audit.calls)


def test_what_cannot_be_recorded_is_not_served(world: World) -> None:
    world.audit.broken = True
    with world.public(world.north) as client:
        assert is_refusal(client.post("/v1/fleet/pull-messages", headers=node(world.north)), 503)
    assert world.flower.seen == []


class Direct:
    """The guard without a network, for what depends on its clock alone."""

    def __init__(self, world: World, **more: Any) -> None:
        self.world, self.guard = world, world.guard(**more)

    def scope(self, path: str, issued: Issued | None, address: str) -> Scope:
        headers = [(name.encode(), value.encode()) for name, value in (node(issued) if issued else {}).items()]
        caller = Caller("public", issued.der if issued else None, address)
        return {"type": "http", "method": "POST", "path": path, "headers": headers, "fedchorus": caller}

    async def status(self, path: str, issued: Issued | None = None, address: str = "10.0.0.1") -> int:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.guard(self.scope(path, issued, address), receive, send)
        return int(sent[0]["status"])


PULL = "/v1/fleet/pull-messages"


def test_a_flood_from_one_caller_does_not_starve_the_others(world: World) -> None:
    async def flood() -> None:
        direct = Direct(world, rates=Rates(known_per_s=10, known_burst=20, anonymous_per_s=1, anonymous_burst=5))
        answers = [await direct.status(PULL, world.north) for _ in range(30)]
        assert answers == [200] * 20 + [429] * 10
        assert await direct.status(PULL, world.south) == 200
        world.seconds += 0.5  # Five more, and no more than the burst after a long rest.
        assert [await direct.status(PULL, world.north) for _ in range(6)] == [200] * 5 + [429]
        world.seconds += 1e6
        assert [await direct.status(PULL, world.north) for _ in range(21)] == [200] * 20 + [429]
        answers = [await direct.status("/docs") for _ in range(8)]
        assert answers == [404] * 5 + [429] * 3
        assert await direct.status("/docs", address="10.0.0.2") == 404
        assert await direct.status(PULL, world.south) == 200  # From the same address as the flood.

    asyncio.run(flood())


def test_our_own_processes_are_not_held_back(world: World) -> None:
    with world.loopback() as own:
        assert {own.post("/v1/runtime/push-object").status_code for _ in range(Rates().anonymous_burst + 1)} == {200}


def test_calls_under_way_are_bounded_for_each_caller(world: World) -> None:
    async def crowd() -> None:
        world.flower.held = asyncio.Event()
        direct = Direct(world, rates=Rates(at_once=3))
        first = [asyncio.create_task(direct.status(PULL, world.north)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await direct.status(PULL, world.north) == 429
        other = asyncio.create_task(direct.status(PULL, world.south))
        await asyncio.sleep(0)
        world.flower.held.set()
        assert await asyncio.gather(*first, other) == [200] * 4
        assert await direct.status(PULL, world.north) == 200

    asyncio.run(crowd())


def test_a_fault_in_the_application_is_recorded_and_passed_on(world: World) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    direct = Direct(world)
    direct.guard = Guard(
        broken,
        api=broken,
        audit=world.audit,
        peer_of=peer_of,
        is_revoked=world.is_revoked,
        operators=Operators(world.operators),
        internal_secret=SECRET,
    )
    with pytest.raises(ZeroDivisionError):
        asyncio.run(direct.status(PULL, world.north))
    assert world.audit.calls[-1].status == 500


def test_a_websocket_is_closed(world: World) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(world.guard()({"type": "websocket", "path": PULL}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    with world.public() as client:
        reply = client.get("/v1/runtime/stream", headers={**upgrade, "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="})
    assert is_refusal(reply, 404)


def test_metrics_are_public_only_where_asked_for(world: World) -> None:
    async def statuses() -> list[int]:
        found = []
        for public in (False, True):
            direct = Direct(world, public_metrics=public)
            scope = {**direct.scope("/metrics", None, "10.0.0.1"), "method": "GET"}
            direct.scope = lambda *_, scope=scope: scope  # type: ignore[method-assign]
            found.append(await direct.status("/metrics"))
        return found

    assert asyncio.run(statuses()) == [404, 200]


def test_an_empty_internal_secret_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="empty"):
        Guard(
            world.flower,
            api=world.api,
            audit=world.audit,
            peer_of=peer_of,
            is_revoked=world.is_revoked,
            operators=Operators(world.operators),
            internal_secret="",
        )


def test_flower_itself_works_behind_the_guard(tmp_path: Path) -> None:
    """A node activates with its certificate's key, its runs are noted, and a call around the guard needs a token."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.proto.control_pb2 import RegisterNodeRequest
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
    from flwr.proto.node_pb2 import Node
    from flwr.proto.run_pb2 import GetRunRequest
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    from server.flower_auth import RunNotes, TokenAuthn

    authority, operators, audit = Authority(tmp_path), tmp_path / "operators.json", Recorder()
    north, notes = authority.issue("north"), RunNotes()
    operators.write_text("{}")
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=b"x" * 32,
        authn_plugin=TokenAuthn(lambda token: token == SECRET),
        event_log_plugin=notes,
        fleet_event_log_plugin=notes,
        enable_event_log=True,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="rest",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=":flwr-in-memory:",
        isolation="process",
        runtime_dependency_install=False,
    )
    flower = create_app(config, SuperLinkLifespan)
    assert {f"/v1/fleet/{call}" for call in FLEET_CALLS | {"register-node", "unregister-node"}} == {
        path for path in flower.openapi()["paths"] if path.startswith("/v1/fleet/")
    }
    assert {f"/v1/control/{call}" for call in CONTROL_READS} <= set(flower.openapi()["paths"])
    activated: list[str] = []
    guard = Guard(
        flower,
        api=Answers("api"),
        audit=audit,
        peer_of=peer_of,
        is_revoked=lambda peer: False,
        operators=Operators(operators),
        internal_secret=SECRET,
        on_activate=activated.append,
    )

    def signed() -> dict[str, str]:
        stamp = now().isoformat()
        signature = north.private.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "content-type": "application/protobuf",
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(north.public_bytes).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        }

    with (
        serving(guard, authority, authority.issue("_server", server=True)) as listeners,
        client_of(listeners, authority, north) as site,
        loopback_of(listeners) as own,
    ):
        register = RegisterNodeRequest(public_key=north.public_bytes).SerializeToString()
        headers = {"content-type": "application/protobuf", **bearer(SECRET)}
        assert own.post("/v1/control/register-node", headers=headers, content=register).status_code == 200
        activate = ActivateNodeRequest(public_key=north.public_bytes, heartbeat_interval=30).SerializeToString()
        reply = site.post("/v1/fleet/activate-node", headers=signed(), content=activate)
        assert reply.status_code == 200
        known = ActivateNodeResponse.FromString(reply.content).node_id
        asked = GetRunRequest(node=Node(node_id=known), run_id=12345).SerializeToString()
        site.post("/v1/fleet/get-run", headers=signed(), content=asked)
        assert own.get("/health").status_code == 200
    assert activated == ["north"]
    assert audit.calls[-1].runs == (12345,)

    async def around() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(flower), base_url="http://x") as client:
            tokens = [{}, bearer("wrong"), bearer(SECRET)]
            replies = [
                await client.post(
                    "/v1/control/list-runs", headers={"content-type": "application/protobuf", **token}, content=b""
                )
                for token in tokens
            ]
            return [reply.status_code for reply in replies]

    assert asyncio.run(around()) == [401, 401, 200]

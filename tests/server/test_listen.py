"""Two listeners for one application: who called reaches it, and nobody can be slow, large or many without end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from privacy.errors import RunError
from server.listen import Caller, Limits, Listeners, PublicListener, Receive, Scope, Send
from tests.server.tls import Authority, Issued, client_of, context_of, loopback_of, serving


class Echo:
    """Answers with who called and how much came; holds /wait until released; sends much for /much."""

    def __init__(self) -> None:
        self.lifespans: list[str] = []
        self.calls: list[Caller] = []
        self.ports: set[int] = set()
        self.waiting = threading.Semaphore(0)
        self.released = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                self.lifespans.append(phase)
                await send({"type": f"lifespan.{phase}.complete"})
            return
        caller = scope["fedchorus"]
        self.calls.append(caller)
        self.ports.add(scope["client"][1])
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        if scope["path"] == "/wait":
            self.waiting.release()
            while not self.released.is_set():
                await asyncio.sleep(0.01)
        body = json.dumps({"listener": caller.listener, "address": caller.address, "size": size}).encode()
        if scope["path"] == "/much":
            body = bytes(50_000_000)
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Issued:
    return authority.issue("server", server=True)


@pytest.fixture(scope="module")
def north(authority: Authority) -> Issued:
    return authority.issue("north")


LIMITS = Limits(
    header_bytes=8192,
    header_timeout_s=1.0,  # Also for the handshake, on a machine with much else to do.
    body_timeout_s=0.4,
    body_bytes_per_s=100,
    connections_per_address=80,
)


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def strict(echo: Echo, authority: Authority, server: Issued) -> Iterator[Listeners]:
    with serving(echo, authority, server, limits=LIMITS) as listeners:
        yield listeners


@pytest.fixture
def wire(strict: Listeners, authority: Authority) -> Iterator[ssl.SSLSocket]:
    with connect(strict, authority) as secured:
        yield secured


def connect(listeners: Listeners, authority: Authority) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", listeners.ports["public"]), timeout=10)
    return context_of(authority).wrap_socket(raw, server_hostname="127.0.0.1")


def ask(wire: ssl.SSLSocket) -> None:
    """One request, and all of its answer."""
    wire.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    got = b""
    while not got.endswith(b"}"):
        piece = wire.recv(65536)
        assert piece
        got += piece
    assert got.startswith(b"HTTP/1.1 200")


def answer(wire: ssl.SSLSocket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    while piece := wire.recv(65536):
        got += piece
    return got


def test_the_application_learns_who_called_where(
    strict: Listeners, echo: Echo, authority: Authority, north: Issued
) -> None:
    with client_of(strict, authority) as anonymous, client_of(strict, authority, north) as site:
        assert anonymous.get("/").json() == {"listener": "public", "address": "127.0.0.1", "size": 0}
        assert echo.calls[-1] == Caller("public", None, "127.0.0.1")
        site.get("/")
        assert echo.calls[-1].certificate_der == north.der
    with loopback_of(strict) as own:
        own.get("/")
    assert echo.calls[-1] == Caller("loopback", None, "127.0.0.1")


def test_a_header_cannot_say_where_a_call_came_from(strict: Listeners, echo: Echo) -> None:
    with loopback_of(strict) as own:
        headers = {"x-forwarded-for": "10.1.1.1", "x-forwarded-proto": "https", "forwarded": "for=10.1.1.1"}
        assert own.get("/", headers=headers).json()["address"] == "127.0.0.1"


def test_the_lifespan_runs_once_for_both_listeners(authority: Authority, server: Issued) -> None:
    app = Echo()
    with serving(app, authority, server):
        assert app.lifespans == ["startup"]
    assert app.lifespans == ["startup", "shutdown"]


def test_without_loopback_there_is_one_listener(authority: Authority, server: Issued) -> None:
    with serving(Echo(), authority, server, loopback=False) as listeners:
        assert set(listeners.ports) == {"public"}


@pytest.mark.parametrize("kind", ["foreign authority", "expired", "for servers"])
def test_a_certificate_that_is_not_good_ends_the_handshake(
    kind: str, strict: Listeners, echo: Echo, authority: Authority, tmp_path: Path
) -> None:
    bad = {
        "foreign authority": lambda: Authority(tmp_path, "authority").issue("north"),
        "expired": lambda: authority.issue("old", days=-1),
        "for servers": lambda: authority.issue("other", server=True),
    }[kind]()
    before = len(echo.calls)
    with client_of(strict, authority, bad) as client, pytest.raises(httpx.TransportError):
        client.get("/")
    assert len(echo.calls) == before


def test_tls_is_1_3_where_the_caller_can_and_not_below_1_2(strict: Listeners, authority: Authority) -> None:
    for highest, expected in ((ssl.TLSVersion.TLSv1_3, "TLSv1.3"), (ssl.TLSVersion.TLSv1_2, "TLSv1.2")):
        context = context_of(authority)
        context.maximum_version = highest
        raw = socket.create_connection(("127.0.0.1", strict.ports["public"]))
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as wire:
            assert wire.version() == expected
            wire.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answer(wire).startswith(b"HTTP/1.1 200")
            assert wire.session is None or not wire.session.has_ticket  # The next connection proves its key again.
    context = context_of(authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.SSLv3
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", strict.ports["public"])) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""])
def test_headers_may_not_grow_without_end(end: bytes, wire: ssl.SSLSocket, echo: Echo) -> None:
    before = len(echo.calls)
    wire.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"y" * 9000 + end)
    assert answer(wire).startswith(b"HTTP/1.1 431 ")
    assert len(echo.calls) == before


def test_what_is_not_http_gets_one_line(wire: ssl.SSLSocket) -> None:
    wire.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    head, _, body = answer(wire).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(body)) == {"error"}


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost:", b"\r\n"])
def test_headers_that_come_too_slowly_are_not_waited_for(first: bytes, wire: ssl.SSLSocket) -> None:
    wire.sendall(first) if first else None
    began = time.monotonic()
    assert answer(wire).startswith(b"HTTP/1.1 408 ")
    assert 0.2 < time.monotonic() - began < 5


def test_headers_may_not_trickle_on_a_used_connection(wire: ssl.SSLSocket) -> None:
    ask(wire)

    def trickle() -> bool:  # Each piece would end the keep-alive timer anew.
        try:
            wire.sendall(b"\r\n")
        except (ConnectionError, ssl.SSLError):
            return True
        time.sleep(0.05)
        return False

    assert eventually(trickle, seconds=5)


def test_a_quiet_connection_is_kept(wire: ssl.SSLSocket) -> None:
    ask(wire)
    wire.settimeout(1.3)  # Longer than the time for headers.
    with pytest.raises(TimeoutError):
        wire.recv(1)
    wire.settimeout(10)
    ask(wire)


def test_a_body_that_comes_too_slowly_is_not_waited_for(wire: ssl.SSLSocket) -> None:
    wire.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
    assert answer(wire).startswith(b"HTTP/1.1 408 ")


def test_a_slow_but_steady_body_arrives(wire: ssl.SSLSocket) -> None:
    wire.sendall(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 400\r\n\r\n")
    for _ in range(10):  # Twice as long as the time for a body, at more than the rate.
        wire.sendall(b"x" * 40)
        time.sleep(0.08)
    assert b'"size": 400' in answer(wire)


def test_a_caller_that_reads_nothing_is_cut_off(authority: Authority, server: Issued) -> None:
    limits = Limits(write_timeout_s=0.5)
    with serving(Echo(), authority, server, limits=limits) as listeners, connect(listeners, authority) as wire:
        wire.sendall(b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n")
        assert listeners._server is not None
        connections = listeners._server.server_state.connections
        assert eventually(lambda: len(connections) == 1)
        assert eventually(lambda: not connections)


def test_connections_are_bounded_for_each_address_and_freed(authority: Authority, server: Issued) -> None:
    with serving(Echo(), authority, server, limits=Limits(connections_per_address=3)) as listeners:
        held = [connect(listeners, authority) for _ in range(3)]
        for wire in held:
            ask(wire)
        with connect(listeners, authority) as refused:
            assert answer(refused).startswith(b"HTTP/1.1 503 ")
        with loopback_of(listeners) as own:
            assert own.get("/").status_code == 200
        held.pop().close()
        with client_of(listeners, authority) as client:
            assert eventually(lambda: _status(client) == 200)
        for wire in held:
            wire.close()


def _status(client: httpx.Client) -> int:
    try:
        return client.get("/").status_code
    except httpx.TransportError:
        return 0


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def test_64_callers_are_served_at_once_over_kept_connections(
    authority: Authority, server: Issued, north: Issued
) -> None:
    app = Echo()

    async def all_of_them(listeners: Listeners) -> None:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64, keepalive_expiry=60)
        url = f"https://127.0.0.1:{listeners.ports['public']}"
        context = context_of(authority, north)
        async with httpx.AsyncClient(
            base_url=url, verify=context, limits=limits, timeout=20, trust_env=False
        ) as client:
            for path in ("/wait", "/", "/"):
                calls = asyncio.gather(*(client.get(path) for _ in range(64)))
                if path == "/wait":
                    for _ in range(64):  # All are in the application before one is answered.
                        assert await asyncio.to_thread(app.waiting.acquire, timeout=15)
                    app.released.set()
                assert {reply.status_code for reply in await calls} == {200}

    with serving(app, authority, server) as listeners:
        asyncio.run(all_of_them(listeners))
    assert len(app.ports) == 64


def test_a_renewed_certificate_is_served_without_a_stop(authority: Authority, tmp_path: Path) -> None:
    first, second = authority.issue("first", server=True), authority.issue("second", server=True)
    live = Issued(tmp_path / "server.pem", tmp_path / "server.key", b"", b"", first.private)
    put(first, live)
    with serving(Echo(), authority, live) as listeners, client_of(listeners, authority) as kept:
        assert kept.get("/").status_code == 200
        assert served(listeners, authority) == first.der
        replace(second.certificate, live.certificate)  # Not yet with its key: the pair does not fit.
        time.sleep(1.3)
        assert served(listeners, authority) == first.der
        replace(second.key, live.key)
        assert eventually(lambda: served(listeners, authority) == second.der)
        assert kept.get("/").status_code == 200  # On the connection of before.


def put(issued: Issued, live: Issued) -> None:
    shutil.copyfile(issued.certificate, live.certificate)
    shutil.copyfile(issued.key, live.key)


def replace(source: Path, target: Path) -> None:
    shutil.copyfile(source, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)


def served(listeners: Listeners, authority: Authority) -> bytes | None:
    with connect(listeners, authority) as wire:
        return wire.getpeercert(binary_form=True)


def test_stop_lets_a_request_under_way_finish(authority: Authority, server: Issued) -> None:
    app = Echo()
    replies: list[httpx.Response] = []
    with serving(app, authority, server) as listeners, client_of(listeners, authority) as client:
        thread = threading.Thread(target=lambda: replies.append(client.get("/wait")))
        thread.start()
        assert app.waiting.acquire(timeout=10)
        listeners.stop()
        assert eventually(lambda: refuses(listeners.ports["public"]))
        app.released.set()
        thread.join(10)
    assert replies[0].status_code == 200
    assert app.lifespans == ["startup", "shutdown"]


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


def test_a_stop_before_the_start_is_not_forgotten(authority: Authority, server: Issued) -> None:
    public = PublicListener(
        certificate=server.certificate, key=server.key, client_authority=authority.pem, host="127.0.0.1", port=0
    )
    listeners = Listeners(Echo(), public=public)
    listeners.stop()
    listeners.serve()
    assert not listeners.started.is_set()


@pytest.mark.parametrize("fault", ["no certificate", "another's key", "no authority", "port taken", "app fails"])
def test_what_keeps_the_server_from_starting_is_named(
    fault: str, authority: Authority, server: Issued, north: Issued, tmp_path: Path
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("no database")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        public = PublicListener(
            certificate=tmp_path / "none.pem" if fault == "no certificate" else server.certificate,
            key=north.key if fault == "another's key" else server.key,
            client_authority=tmp_path / "none.pem" if fault == "no authority" else authority.pem,
            host="127.0.0.1",
            port=taken.getsockname()[1] if fault == "port taken" else 0,
        )
        with pytest.raises(RunError) as error:
            Listeners(broken if fault == "app fails" else Echo(), public=public).serve()
    assert "\n" not in str(error.value)
    expected = {"port taken": "cannot listen", "app fails": "did not start"}
    assert expected.get(fault, "no TLS with") in str(error.value)

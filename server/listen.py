"""One ASGI application on two listeners: TLS for sites and operators, plain HTTP on loopback for our own processes.

A site proves itself with its client certificate in the TLS handshake; a person with a token or a health probe comes
without one, so certificates are asked for and not demanded: what each caller may do is `server.guard`'s. Sessions are
never resumed, so that every connection proves its key again.

A request reaches the application as soon as its headers are in, and at most 64 KiB of its body wait unread; what a
whole body may weigh is the guard's too. Slowness is bounded here: `Limits`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from privacy.errors import RunError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
_TICKS_PER_S = 10  # uvicorn's.
_UNSENT_BYTES = 2**16  # Of an answer, before the application has to wait; TLS would have eight times as much.
_GRACE_S = 10  # For requests under way when the server stops.
_ERRORS = {
    400: "not a request of HTTP/1.1",
    408: "the request came too slowly; check the network between this machine and the server, then try again",
    431: "the request's headers are too large for this server",
    503: "the server has as many connections as it takes; try again in a minute",
}


@dataclass(frozen=True)
class Caller:
    """Who is at the other end, put into every request's `scope["fedchorus"]`.

    The listener sets the first three; `server.guard` sets the rest once it has checked them.
    """

    listener: Literal["public", "loopback"]
    certificate_der: bytes | None  # Its chain and key were proven in the handshake; dates and revocation then.
    address: str
    site: str | None = None
    operator: str | None = None
    internal: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long, how many and how slow a caller may be."""

    header_bytes: int = 32 * 1024
    header_timeout_s: float = 10.0  # For the handshake, and again for all headers of a request.
    body_timeout_s: float = 30.0  # For a whole body, prolonged by every `body_bytes_per_s` that came.
    body_bytes_per_s: int = 16 * 1024
    write_timeout_s: float = 60.0  # Without a caller reading any of its answer.
    keep_alive_s: int = 90  # Longer than a node's heartbeat, so that a quiet site need not connect anew.
    connections: int = 1024
    connections_per_address: int = 256  # Many sites may share one address.


@dataclass(frozen=True, kw_only=True)
class PublicListener:
    """The address that sites reach, this server's certificate, and the authority that signs theirs. Port 0: a free one.

    A new certificate or key in the same files is taken up within a second or two; open connections stay.
    """

    certificate: Path
    key: Path
    client_authority: Path
    key_passphrase: bytes | None = field(default=None, repr=False)
    host: str = "0.0.0.0"
    port: int = 8443


class Listeners:
    """Serve `app` on the public listener and, with `loopback`, on a free port of 127.0.0.1; its lifespan runs once.

    `started` is set when both accept; `ports` then says where. No signal handlers are installed: call `stop` from
    yours, from any thread.
    """

    def __init__(
        self, app: App, *, public: PublicListener, loopback: bool = True, limits: Limits | None = None
    ) -> None:
        self.started = threading.Event()
        self.ports: dict[str, int] = {}
        self._app, self._public, self._loopback, self._limits = app, public, loopback, limits or Limits()
        self._server: _Server | None = None
        self._stopped = False

    def serve(self) -> None:
        """Serve until `stop`; then let requests under way finish, ten seconds at most.

        Raises `RunError` when a file cannot be used, the address is taken or the application does not start.
        """
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,  # The audit log has who and what, without query strings.
            proxy_headers=False,  # A header must not say where a call came from.
            server_header=False,
            timeout_keep_alive=self._limits.keep_alive_s,
            timeout_graceful_shutdown=_GRACE_S,
        )
        certificate = _Certificate(self._public)
        with contextlib.ExitStack() as stack:
            doors = [_Door("public", _bind(self._public.host, self._public.port), self._limits, certificate.context)]
            stack.callback(doors[0].socket.close)
            if self._loopback:
                doors.append(_Door("loopback", _bind("127.0.0.1", 0), self._limits))
                stack.callback(doors[1].socket.close)
            self.ports = {door.listener: door.socket.getsockname()[1] for door in doors}
            self._server = _Server(config, doors, certificate, self.started)
            if self._stopped:
                return
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(self._server.serve())
            if not self._server.started:
                raise RunError("the server's application did not start; its log says why")

    def stop(self) -> None:
        """End `serve` soon. May be called from a signal handler, more than once, and before `serve`."""
        self._stopped = True
        if self._server is not None:
            self._server.should_exit = True


def error_body(text: str) -> bytes:
    """The body of every refusal: one line for a person."""
    return json.dumps({"error": text}).encode()


@dataclass
class _Door:
    listener: Literal["public", "loopback"]
    socket: socket.socket
    limits: Limits
    tls: ssl.SSLContext | None = None
    open: Counter[str] = field(default_factory=Counter)  # Connections by address.

    def is_full(self, address: str) -> bool:
        limits = self.limits
        return self.open.total() > limits.connections or (
            self.listener == "public" and self.open[address] > limits.connections_per_address
        )


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host}, port {port} ({error.strerror}); "
            "end the program that holds it, or choose another address"
        ) from None


class _Certificate:
    """The server's certificate in a live TLS context, loaded again when its files change."""

    def __init__(self, public: PublicListener) -> None:
        self._public = public
        self._stamp = self._files()
        try:
            self.context = self._fresh()
            self.context.load_verify_locations(public.client_authority)
        except OSError as error:  # ssl.SSLError is one; it has no file name, so name them all.
            files = f"{public.certificate}, {public.key} and {public.client_authority}"
            raise RunError(f"no TLS with {files}: {error.strerror or error}; restore them or provision again") from None
        self.context.verify_mode = ssl.CERT_OPTIONAL

    def refresh(self) -> None:
        """Take up changed files. A pair that does not fit, as between two writes, is left for the next second."""
        stamp = self._files()
        if stamp == self._stamp:
            return
        try:
            self._fresh()  # A failed load would leave the live context without a key.
            password = self._public.key_passphrase or ""
            self.context.load_cert_chain(self._public.certificate, self._public.key, password=password)
        except OSError as error:
            _log.warning("%s: the new certificate is not in use yet (%s)", self._public.certificate, error)
            return
        self._stamp = stamp
        _log.info("%s: the new certificate is in use", self._public.certificate)

    def _fresh(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # For 1.2; those of 1.3 are all of this kind.
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0
        # Never none: a protected key is then an error, not a question at a terminal that nobody sees.
        context.load_cert_chain(self._public.certificate, self._public.key, password=self._public.key_passphrase or "")
        return context

    def _files(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in (self._public.certificate, self._public.key))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class _Server(uvicorn.Server):
    """uvicorn's server, accepting at several doors that differ in TLS."""

    def __init__(
        self, config: uvicorn.Config, doors: list[_Door], certificate: _Certificate, started: threading.Event
    ) -> None:
        super().__init__(config)
        self._doors, self._certificate, self._accepts = doors, certificate, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        loop = asyncio.get_running_loop()
        self.servers = []
        for door in self._doors:
            connection = partial(_Connection, self.config, self.server_state, self.lifespan.state, door=door)
            timeout = door.limits.header_timeout_s if door.tls else None
            server = await loop.create_server(
                connection,
                sock=door.socket,
                ssl=door.tls,
                ssl_handshake_timeout=timeout,
                ssl_shutdown_timeout=timeout,
            )
            self.servers.append(server)
        self.started = True
        self._accepts.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_S == 0:
            self._certificate.refresh()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn raises them again when it has stopped, which would end the process before its clean-up.


class _Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection, which knows its caller and bounds how slow it may be."""

    def __init__(
        self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], *, door: _Door
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._door, self._limits = door, door.limits
        self._reading: asyncio.TimerHandle | None = None  # For the headers or the body that is due.
        self._in_headers, self._header_bytes = True, 0
        self._body_since, self._body_bytes = 0.0, 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # The kernel ends a connection whose answers nobody reads: TLS transports do not report theirs as unsent.
        unread_ms = round(self._limits.write_timeout_s * 1000)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread_ms)
        transport.set_write_buffer_limits(_UNSENT_BYTES)
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        self._caller = Caller(self._door.listener, certificate, self.client[0] if self.client else "")
        self._door.open[self._caller.address] += 1
        if self._door.is_full(self._caller.address):
            self._refuse(503)
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        address = self._caller.address
        self._door.open[address] -= 1
        if not self._door.open[address]:
            del self._door.open[address]
        self._cancel_reading()
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._reading is None:
            self._await_headers()  # Of the next request; its first bytes have also ended the keep-alive timer.
        super().data_received(data)
        if self._in_headers:
            # The parser gathers an endless header line in memory, and calls nobody before its end.
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.header_bytes:
                self._refuse(431)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0
        self.scope["fedchorus"] = self._caller  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        self._cancel_reading()
        self._in_headers = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.header_bytes:
            self._refuse(431)
        if self._refused:
            return
        self._body_since, self._body_bytes = self.loop.time(), 0
        self._reading = self.loop.call_later(self._limits.body_timeout_s, self._check_body)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            self._cancel_reading()
            super().on_message_complete()

    def _await_headers(self) -> None:
        self._reading = self.loop.call_later(self._limits.header_timeout_s, self._refuse, 408)

    def _check_body(self) -> None:
        now, limits = self.loop.time(), self._limits
        if self.flow.read_paused:  # We are the slow end.
            self._body_since, self._body_bytes = now, 0
        due = self._body_since + limits.body_timeout_s + self._body_bytes / limits.body_bytes_per_s
        if now < due:
            self._reading = self.loop.call_at(due, self._check_body)
        else:
            self._refuse(408)

    def _cancel_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _refuse(self, status: int) -> None:
        """Say why, where no answer is under way, and close; the application sees that its caller has gone."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        cycle = cast(RequestResponseCycle | None, self.cycle)
        answering = False
        if cycle is not None and not cycle.response_complete:
            answering = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
        if not answering:
            body = error_body(_ERRORS[status])
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

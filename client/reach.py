"""Ask the coordinator's server who it is, as the node would, and say where on the way it fails: DNS, TCP, TLS or HTTP.

The call is httpx's, as the node's are: where the environment names a proxy, it goes that way too.
"""

from __future__ import annotations

import json
import math
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx

from privacy.enrolment import split_address
from privacy.errors import FedchorusError

PATH = "/v1/fedchorus/federation"
MOST_BYTES = 2**16


@dataclass(frozen=True)
class Answer:
    """What the server says of itself; `ahead_s` is its clock less this machine's, half the round trip taken off."""

    federation: str
    version: str
    ahead_s: float


class NotReached(FedchorusError):
    """The server was not reached, or did not answer as one: what was `found`, and what would `fix` it.

    `status` is HTTP's where the server answered, and let nobody in.
    """

    def __init__(self, found: str, fix: str, *, status: int | None = None) -> None:
        super().__init__(f"{found}; {fix}")
        self.found, self.fix, self.status = found, fix, status


def ask_server(address: str, context: ssl.SSLContext, *, clock: Callable[[], float], timeout_s: float) -> Answer:
    """Get `PATH` from `address` ("host:port") over TLS; in `timeout_s` it has answered or is given up.

    `clock` says the seconds since 1970 here. Raises `NotReached`.
    """
    host, port = split_address(address)
    outcome: list[Answer | NotReached] = []

    def call() -> None:
        try:
            outcome.append(_asked(address, context, clock=clock, timeout_s=timeout_s / 2))
        except NotReached as error:
            outcome.append(error)
        except (httpx.HTTPError, OSError) as error:
            outcome.append(_explained(error, host, port, timeout_s / 2))

    # A thread, since the resolver has no limit of its own, and a peer that sends byte by byte never meets httpx's.
    thread = threading.Thread(target=call, name="reach", daemon=True)
    thread.start()
    thread.join(timeout_s)
    found = outcome[0] if outcome else _slow(f"no whole answer from {address}", timeout_s)
    if isinstance(found, NotReached):
        raise found
    return found


def _asked(address: str, context: ssl.SSLContext, *, clock: Callable[[], float], timeout_s: float) -> Answer:
    with httpx.Client(base_url=f"https://{address}", verify=context, timeout=timeout_s) as client:
        here, began = clock(), time.monotonic()
        with client.stream("GET", PATH) as response:
            half = (time.monotonic() - began) / 2
            body = next(response.iter_bytes(MOST_BYTES), b"")
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        record = {}
    status = response.status_code
    if status in (401, 403):
        said = _line(record.get("error", "without a reason")).partition(";")[0]  # What follows sends people here.
        raise NotReached(f"HTTP: {address} does not let this site in ({status}: {said})", _ASK, status=status)
    match record:
        case {"federation": str(federation), "version": str(version), "time": int() | float() as then} if (
            status == 200 and math.isfinite(then)
        ):
            return Answer(_line(federation), _line(version), then - here - half)
    raise NotReached(
        f"HTTP: {address} answers {status}, and not as a fedchorus server does",
        "check the address `server` in site.toml: another program, or a proxy on the way, answers there; if it is "
        "right, ask the coordinator whether the server is of another version",
    )


_ASK = (
    "mend what is said about the certificate first; if that is well, ask the coordinator whether this site's "
    "certificate was withdrawn, or the server's folder changed"
)


def _explained(error: Exception, host: str, port: int, timeout_s: float) -> NotReached:
    """Where a failed call failed, from what httpx's error was caused by."""
    causes = list(_causes(error))
    where, text = f"{host}:{port}", " ".join(str(cause) for cause in causes)
    on_the_way = isinstance(error, httpx.ProxyError | httpx.ConnectError | httpx.ConnectTimeout)
    if (proxy := _proxy_for(host)) and on_the_way and not any(isinstance(cause, ssl.SSLError) for cause in causes):
        return NotReached(
            f"proxy: {proxy}, which this machine's settings name, does not pass {where} on ({_line(error)})",
            f"let the proxy pass CONNECT to {where}, or name {host} in the variable no_proxy of the client's service",
        )
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return NotReached(
            f"DNS: no address is known here for {host}",
            "check `server` in site.toml for a typing error, then whether this machine's name server resolves it "
            f"(`getent hosts {host}`); an entry in /etc/hosts helps too",
        )
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return NotReached(
                f"TLS: the certificate that {where} shows is not the federation's ({_line(cause.verify_message)})",
                "if something on the way opens TLS (an inspecting firewall or proxy), it must let this address pass "
                "untouched; check this machine's clock; else ask the coordinator whether the server's address or "
                "certificate changed",
            )
        if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
            why = _line(str(cause.reason).partition("ALERT_")[2] or cause.reason).replace("_", " ").lower()
            return NotReached(f"TLS: the server refuses this site's certificate ({why})", _ASK)
        if isinstance(cause, ssl.SSLError):
            return NotReached(
                f"TLS: {where} does not speak TLS as a fedchorus server does ({_line(cause.reason)})",
                "check the port of `server` in site.toml, and whether a proxy on the way changes what passes",
            )
        if isinstance(cause, ConnectionRefusedError):
            return NotReached(
                f"TCP: {where} refuses the connection: nothing listens there",
                "check the port of `server` in site.toml; else ask the coordinator whether the server runs",
            )
    if isinstance(error, httpx.TimeoutException) and "handshake" in text:
        return NotReached(
            f"TLS: {where} accepts the connection, and then says nothing for {timeout_s:g} s",
            "a firewall that lets TCP through and stops TLS looks so; ask for outgoing TLS to this address",
        )
    if isinstance(error, httpx.ConnectTimeout):
        return NotReached(
            f"TCP: no answer from {where} within {timeout_s:g} s",
            f"a firewall on the way drops it: allow outgoing TCP from this machine to {where}",
        )
    if isinstance(error, httpx.ConnectError):
        return NotReached(
            f"TCP: no connection to {where} ({_line(causes[-1])})",
            "check this machine's network: cable, address, default route",
        )
    if isinstance(error, httpx.TimeoutException):
        return _slow(f"HTTP: no answer from {where}", timeout_s)
    # Under TLS 1.3 a server that refuses a certificate may be gone before its reason arrives.
    return NotReached(f"TLS or HTTP: {where} ended the connection without an answer ({type(error).__name__})", _ASK)


def _proxy_for(host: str) -> str | None:
    """The proxy that httpx takes to `host`, as the environment has it: its host and port, never its password."""
    proxies = urllib.request.getproxies()
    named = proxies.get("https") or proxies.get("all")
    if named is None or urllib.request.proxy_bypass(host):
        return None
    parts = urllib.parse.urlsplit(named if "//" in named else f"//{named}")
    return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname


def _slow(what: str, timeout_s: float) -> NotReached:
    return NotReached(
        f"{what} within {timeout_s:g} s",
        "try again; if it stays so, the name server, the network or the server itself is overloaded",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(text: object) -> str:
    """One printable line of at most 300 characters: it comes from the other end."""
    return "".join(letter for letter in " ".join(str(text).split()) if letter.isprintable())[:300]

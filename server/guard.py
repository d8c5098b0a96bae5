"""The guard in front of Flower's server: for every HTTP call it decides who may do what, before Flower sees it.

| path              | public listener                                         | loopback listener                |
|-------------------|---------------------------------------------------------|----------------------------------|
| /v1/fleet/*       | a site's certificate and the same key in Flower's header | refused                          |
| /v1/runtime/*     | not there                                               | yes: Flower's own secrets guard it |
| /v1/control/*     | reads, with an operator's token                         | with a token or the secret       |
| /v1/fedchorus/*   | a token or a certificate: the API decides                | with the secret                  |
| /health           | yes                                                     | yes                              |
| /metrics          | only where asked for                                    | yes                              |
| all else          | not there                                               | not there                        |

Flower alone would let anyone who reaches its port register keys and start runs, and lets a node speak for any key it
holds. Here a node's key is its certificate's, certificates are checked on every call (a connection outlives them), and
what is not on a list is not there. Refusals say the same to everyone; the audit log has the reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from privacy.errors import FedchorusError, LedgerError, RunError
from server.audit_log import Call
from server.listen import App, Caller, Message, Receive, Scope, Send, error_body

FLEET_CALLS = frozenset(
    {"activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab"}
    | {"push-object", "pull-object", "confirm-message-received"}
)
CONTROL_READS = frozenset(
    {"list-runs", "list-nodes", "list-run-series", "get-run-series", "list-run-series-events", "list-federations"}
    | {"show-federation"}  # No streams: each would hold one of the few threads that all calls share.
)
NODE_KEY_HEADER = b"flwr-public-key"  # flwr.supercore.constant.FLEET_HTTP_PUBLIC_KEY_HEADER
RUNS = "fedchorus.runs"  # A set in the scope, to which `server.flower_auth` adds the run ids that Flower reads.
_TEXTS = {
    401: "no valid credential: a site needs the certificate of its kit (`fedchorus doctor` checks it), "
    "a person an operator's token",
    403: "not allowed for this caller; run `fedchorus doctor` at the site, then ask the coordinator whether its "
    "certificate has expired or was withdrawn",
    404: "nothing here; check the server's address and the versions at both ends",
    413: "the request is larger than this server takes; ask the coordinator to raise the limit",
    429: "too many calls at once; wait a second, then try again",
    503: "the server cannot keep its audit log and serves nobody; tell the coordinator to look at its disk",
}
_NO_CODE = "jobs are submitted with `fedchorus submit`; bundles with code are not accepted"
_CLIENT_GONE = 499  # In the audit log alone: nobody was left to be told.
_log = logging.getLogger(__name__)


class Peer(Protocol):
    """What a site's certificate says. `public_bytes` is the key as Flower's header carries it, before base64."""

    @property
    def site(self) -> str: ...
    @property
    def not_before(self) -> datetime: ...
    @property
    def not_after(self) -> datetime: ...
    @property
    def public_bytes(self) -> bytes: ...


P = TypeVar("P", bound=Peer)


class Audit(Protocol):
    """What the guard asks of `server.audit_log.AuditLog`."""

    def record(self, call: Call) -> None: ...
    def check(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Calls a second, and how many may come at once, for each caller: a flood from one must not starve the others."""

    known_per_s: float = 200.0
    known_burst: int = 1000
    anonymous_per_s: float = 20.0  # For each address.
    anonymous_burst: int = 200
    at_once: int = 64  # Calls under way.


class Operators:
    """The people with a token: {name: {"sha256": hexadecimal, "created": ISO time}}, read again when the file changes.

    A file that is missing or damaged later on lets nobody in.
    """

    def __init__(self, path: Path) -> None:
        """Raises `RunError` when the file cannot be used."""
        self._path = path
        self._stamp = self._now()
        self._digests = self._read()

    def name_of(self, token: str) -> str | None:
        """Who holds `token`, in time that does not depend on how much of it is right."""
        if (stamp := self._now()) != self._stamp:
            self._stamp = stamp
            try:
                self._digests = self._read()
            except RunError as error:
                _log.error("%s; no operator is let in until then", error)
                self._digests = {}
        digest, found = _sha256(token), None
        for name, expected in self._digests.items():
            if hmac.compare_digest(digest, expected):
                found = name
        return found

    def _now(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> dict[str, str]:
        try:
            record = json.loads(self._path.read_bytes())
            digests = {str(name): str(entry["sha256"]) for name, entry in record.items()}
            if any(len(bytes.fromhex(digest)) != 32 or digest != digest.lower() for digest in digests.values()):
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RunError(f"{self._path}: not a file of operators; restore it, or make tokens anew") from None
        return digests


class Guard(Generic[P]):
    """The ASGI application in front of Flower's and of our own API. See the table above.

    `peer_of` reads a certificate that the handshake has verified and raises `Refused` for one that is no site's;
    `is_revoked` is asked on every call, and an error from it refuses. `internal_secret` is the ServerApp's bearer
    token on loopback. `on_activate(site)` is told of every node that started, and must return at once. `api` serves
    /v1/fedchorus/* and /metrics, and finds `Caller.site`, `.operator` and `.internal` in `scope["fedchorus"]`. The
    lifespan is Flower's alone.
    """

    def __init__(
        self,
        flower: App,
        *,
        api: App,
        audit: Audit,
        peer_of: Callable[[bytes], P],
        is_revoked: Callable[[P], bool],
        operators: Operators,
        internal_secret: str,
        on_activate: Callable[[str], None] = lambda site: None,
        public_metrics: bool = False,
        body_bytes: int = 64 * 1024 * 1024,
        rates: Rates | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if not internal_secret:
            raise ValueError("the internal secret is empty")
        self._flower, self._api, self._audit, self._operators = flower, api, audit, operators
        self._peer_of, self._is_revoked = lru_cache(4096)(peer_of), is_revoked
        self._internal, self._on_activate = _sha256(internal_secret), on_activate
        self._public_metrics, self._body_bytes, self._clock, self._timer = public_metrics, body_bytes, clock, timer
        self._rates = rates or Rates()
        self._known: OrderedDict[str, _Meter] = OrderedDict()
        self._anonymous: OrderedDict[str, _Meter] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._flower(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, _Exchange(receive, send, self._body_bytes))
        else:  # A WebSocket: nothing here speaks it.
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, exchange: _Exchange) -> None:
        visit = self._identify(scope)
        meter = self._meter(visit)
        runs: set[int] = set()
        if meter is not None:
            meter.at_once += 1
        try:
            try:
                if meter is not None:
                    meter.admit(self._timer(), self._rates.at_once)
                app = self._application(scope, visit)
                self._check_audit()
                if _declared_length(scope) > self._body_bytes:
                    raise _Refusal(413, "declared body")
                await app({**scope, "fedchorus": visit.caller, RUNS: runs}, exchange.receive, exchange.send)
            except Exception:
                if not exchange.is_over:  # Else it was told that its caller had gone, which is what it says.
                    raise
            if exchange.is_too_large:
                raise _Refusal(413, "body")
        except _Refusal as refusal:
            await self._record(scope, visit, exchange, status=refusal.status, why=refusal.why)
            await exchange.refuse(refusal.status, refusal.text)
        except BaseException:
            await self._record(scope, visit, exchange, status=exchange.status or 500, runs=runs)
            raise
        else:
            status = exchange.status or _CLIENT_GONE
            await self._record(scope, visit, exchange, status=status, runs=runs)
            if scope["path"] == "/v1/fleet/activate-node" and status < 300 and visit.caller.site is not None:
                self._on_activate(visit.caller.site)
        finally:
            if meter is not None:
                meter.at_once -= 1

    def _application(self, scope: Scope, visit: _Visit) -> App:
        """The application that answers, or `_Refusal`: the table above."""
        method, path, caller = scope["method"], scope["path"], visit.caller
        public = caller.listener == "public"
        if path == "/health" and method in ("GET", "HEAD"):
            return self._flower
        if path == "/metrics" and method == "GET" and (self._public_metrics or not public):
            return self._api
        if path.startswith("/v1/fleet/"):
            if not public:
                raise _Refusal(403, "fleet call on loopback")
            self._check_node(method, path.removeprefix("/v1/fleet/"), scope, visit)
            return self._flower
        if path.startswith("/v1/runtime/") and not public:
            return self._flower
        if path.startswith("/v1/control/"):
            if caller.operator is None and not caller.internal:
                raise _Refusal(401, visit.rejected or "no token")
            if public and path.removeprefix("/v1/control/") not in CONTROL_READS:
                raise _Refusal(403, "not a read", _NO_CODE)
            return self._flower
        if path.startswith("/v1/fedchorus/"):
            if not caller.internal and (not public or (caller.operator is None and caller.site is None)):
                raise _Refusal(403 if visit.rejected else 401, visit.rejected or "no token, no certificate")
            return self._api
        raise _Refusal(404, "unknown path")

    def _check_audit(self) -> None:
        try:
            self._audit.check()
        except LedgerError:
            raise _Refusal(503, "audit log") from None

    def _check_node(self, method: str, call: str, scope: Scope, visit: _Visit) -> None:
        if visit.peer is None and not visit.rejected:
            raise _Refusal(401, "no certificate")
        if visit.rejected or visit.peer is None:
            raise _Refusal(403, visit.rejected)
        if call in ("register-node", "unregister-node"):
            raise _Refusal(403, "keys come with enrolment alone")
        if call not in FLEET_CALLS or method != "POST":
            raise _Refusal(404, "unknown fleet call")
        keys = [value for name, value in scope["headers"] if name == NODE_KEY_HEADER]
        try:  # Exactly one: Flower reads the first of several.
            key = b64decode(keys[0], validate=True) if len(keys) == 1 else b""
        except ValueError:
            key = b""
        if not hmac.compare_digest(key, visit.peer.public_bytes):
            raise _Refusal(403, "another node's key than the certificate's")

    def _identify(self, scope: Scope) -> _Visit:
        """Who calls, as far as it is proven now."""
        caller: Caller = scope["fedchorus"]
        peer, rejected = None, ""
        if caller.certificate_der is not None:
            now = self._clock()
            try:
                peer = self._peer_of(caller.certificate_der)
                if not peer.not_before <= now <= peer.not_after:
                    rejected = "certificate expired" if now > peer.not_after else "certificate not valid yet"
                elif self._is_revoked(peer):
                    rejected = "certificate revoked"
            except FedchorusError:
                rejected = "certificate not known to be good" if peer else "not a site's certificate"
        token = _bearer(scope)
        operator = self._operators.name_of(token) if token else None
        internal = caller.listener == "loopback" and hmac.compare_digest(_sha256(token), self._internal)
        site = peer.site if peer and not rejected else None
        who = "server" if internal else f"operator {operator}" if operator else f"site {peer.site}" if peer else ""
        return _Visit(replace(caller, site=site, operator=operator, internal=internal), who, peer, rejected)

    def _meter(self, visit: _Visit) -> _Meter | None:
        if visit.caller.listener == "loopback":
            return None
        rates = self._rates
        if visit.who:
            return _kept(self._known, visit.who, _Meter(rates.known_per_s, rates.known_burst, self._timer()))
        fresh = _Meter(rates.anonymous_per_s, rates.anonymous_burst, self._timer())
        return _kept(self._anonymous, _network(visit.caller.address), fresh)

    async def _record(
        self,
        scope: Scope,
        visit: _Visit,
        exchange: _Exchange,
        *,
        status: int,
        why: str = "",
        runs: frozenset[int] | set[int] = frozenset(),
    ) -> None:
        path: str = scope["path"]
        kept = ("/v1/fleet/", "/v1/control/", "/v1/fedchorus/")
        if status < 400 and (not path.startswith(kept) or path.startswith("/v1/fedchorus/internal/")):
            return  # What our own processes say to each other, several times a second, is nobody's call.
        call = Call(
            who=visit.who or "anonymous",
            address=visit.caller.address,
            listener=visit.caller.listener,
            method=scope["method"],
            path=path[:120],
            status=status,
            why=why,
            runs=tuple(sorted(runs)),
            bytes_in=exchange.bytes_in,
            bytes_out=exchange.bytes_out,
        )
        if call.is_urgent:
            await asyncio.to_thread(self._audit.record, call)  # It waits for the disk.
        else:
            self._audit.record(call)


@dataclass(frozen=True)
class _Visit:
    caller: Caller
    who: str  # Empty: anonymous. A site whose certificate is rejected is named, as the authority signed the name.
    peer: Peer | None
    rejected: str


class _Refusal(Exception):
    def __init__(self, status: int, why: str, text: str | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.text = status, why, text or _TEXTS[status]


class _Meter:
    """A token bucket, and the calls under way."""

    def __init__(self, per_s: float, burst: int, now: float) -> None:
        self._per_s, self._burst, self._left, self._at = per_s, burst, float(burst), now
        self.at_once = 0

    def admit(self, now: float, at_once: int) -> None:
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            raise _Refusal(429, "too many calls a second")
        if self.at_once > at_once:
            raise _Refusal(429, "too many calls under way")
        self._left -= 1


class _Exchange:
    """One request and its answer: counts bytes, and ends a body that is too large without keeping it."""

    def __init__(self, receive: Receive, send: Send, body_bytes: int) -> None:
        self._receive, self._send, self._body_bytes = receive, send, body_bytes
        self.status = self.bytes_in = self.bytes_out = 0
        self.is_too_large = self._gone = self._complete = False

    @property
    def is_over(self) -> bool:
        return self.is_too_large or self._gone

    async def receive(self) -> Message:
        if self.is_too_large:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = not self._complete
            return message
        self.bytes_in += len(message.get("body", b""))
        if self.bytes_in > self._body_bytes:
            self.is_too_large = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.is_over:
            return  # What an application says to a caller that it takes for gone.
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.bytes_out += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, status: int, text: str) -> None:
        """Answer and close: what is left of the body is not read."""
        if self.status:  # An answer is under way, so cut it off.
            return
        body = error_body(text)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"connection", b"close")]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [(b"retry-after", b"1")] if status == 429 else []
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _network(address: str) -> str:
    """Whose an address is: of IPv6 its first half, as one customer has all addresses in it."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


def _bearer(scope: Scope) -> str:
    """The token of the one Authorization header; empty where there is none, or more than one."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = values[0].decode("latin-1").partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" else ""


def _declared_length(scope: Scope) -> int:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return max((int(value) for value in lengths if value.isdigit()), default=0)


def _kept(meters: OrderedDict[str, _Meter], key: str, fresh: _Meter) -> _Meter:
    """The meter of `key`. The least recently used of more than 4096 go: a full bucket's worth of memory is enough."""
    meter = meters.setdefault(key, fresh)
    meters.move_to_end(key)
    if len(meters) > 4096:
        meters.popitem(last=False)
    return meter


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

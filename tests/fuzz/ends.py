"""The decoders at the two ends of a connection, each behind the real code that reads for it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import socket
import ssl
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from client.fleet import FleetLink, NotAdmitted, RunOver, Stranger, Unreachable
from client.node import Node
from client.pipe import MalformedFrame, Pipe, PipeClosed
from privacy.authority import peer_of
from privacy.errors import Refused
from privacy.keys import IdentityKey, TlsKey
from privacy.logbook import Logbook
from server.api import make_api
from server.coordinator import Coordinator
from server.guard import Guard, Operators
from server.listen import Caller, Scope
from server.sealed import _Sent
from strategies.envelope import COORDINATOR, Seal, array_digest
from strategies.messages import MalformedMessage, Reply, ask_for, header
from strategies.parameters import Parameters
from tests.deployment.federation import Thorax, a_server_app, deployed_job
from tests.fuzz.decoder import DIGEST, MODEL, Decoder, NoResponse, der_of, other_npy_header, text_of
from tests.fuzz.mutation import confuse_json, digits, flip, insert, truncate


def at_the_site(thorax: Thorax, stack: contextlib.ExitStack) -> dict[str, Decoder]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    north = thorax.folder / "north"
    link = FleetLink("127.0.0.1:9", context=context, key=TlsKey.load(north / "keys" / "tls.key"))
    link._client._client.close()
    link._node = FlowerNode(node_id=7)
    bodies: dict[str, bytes] = {}

    def server(request: httpx.Request) -> httpx.Response:
        call = request.url.path.rpartition("/")[2]
        if call != "pull-object":
            return httpx.Response(200, content=bodies.get(call, b""))
        return httpx.Response(200, content=bodies.get(PullObjectRequest.FromString(request.content).object_id, b""))

    link._client._client = stack.enter_context(httpx.Client(transport=httpx.MockTransport(server)))
    valid = _flower_message()
    order = list(valid)

    def receive(data: bytes) -> object:
        """The first byte says which of Flower's answers the rest is."""
        which = order[data[0] % len(order)] if data else order[0]
        bodies.clear()
        bodies.update(valid)
        bodies[which] = data[1:]
        if which != "pull-messages":
            with contextlib.suppress(Exception):
                answer = PullObjectResponse.FromString(data[1:])
                answer.object_available = True  # Else Flower would ask again for two hours.
                bodies[which] = answer.SerializeToString()
        return link.receive()

    corpus = tuple(bytes([number]) + valid[name] for number, name in enumerate(order))
    node = Node(north, Logbook("fuzz", None, stream=None))
    said: list[httpx.Response] = []

    def coordinator(request: httpx.Request) -> httpx.Response:
        node._stopping.set()  # It asks once.
        return said.pop()

    def hand_in_signature(data: bytes) -> None:
        node._stopping.clear()
        said.append(httpx.Response((200, 200, 401, 403, 400, 500)[data[0] % 6 if data else 0], content=data[1:]))
        with httpx.Client(base_url="https://server/v1", transport=httpx.MockTransport(coordinator)) as api:
            node._hand_in_signature(api)

    roster = thorax.roster
    told = {"hash": roster.hash, "version": roster.version, "signatures": dict(roster.signatures)}
    refusal = {"error": "no valid credential"}
    near, far = socket.socketpair()
    stack.callback(near.close)
    stack.callback(far.close)

    def frame(data: bytes) -> object:
        one, other = socket.socketpair()
        with one, other:
            other.sendall(data[:100_000])
            other.close()
            return Pipe(one).receive(np.empty(3, np.float32))

    said_by_trainer = b'{"rows": 40, "loss": 0.5}'
    return {
        "Flower's answers": Decoder(
            receive,
            corpus,
            (Stranger, MalformedMessage, Unreachable, RunOver),
            ("client.fleet.FleetLink.receive", "client.fleet._opened"),
            (_other_object,),
            share=0.25,
        ),
        "the coordinator's answers": Decoder(
            hand_in_signature,
            (
                b"\0" + json.dumps(told).encode(),
                b"\2" + json.dumps(refusal).encode(),
                b"\4" + json.dumps(refusal).encode(),
            ),
            (Unreachable, NotAdmitted, Refused),
            ("client.node._checked", "client.enrol.add_signatures"),
            (_confuse_behind_first,),
            share=0.25,
            quotes=True,  # What the server says is for a person: one line, of 500 letters at most.
        ),
        "the trainer's frames": Decoder(
            frame,
            (
                b"fct1" + len(said_by_trainer).to_bytes(4, "little") + bytes(8) + said_by_trainer,
                b"fct1" + (2).to_bytes(4, "little") + (12).to_bytes(8, "little") + b"{}" + MODEL.tobytes(),
            ),
            (MalformedFrame, PipeClosed),
            ("client.pipe.Pipe.receive",),
            share=0.5,
        ),
    }


def _confuse_behind_first(data: bytes, rng: random.Random) -> bytes:
    return data[:1] + confuse_json(data[1:], rng)


def _other_object(data: bytes, rng: random.Random) -> bytes:
    """Change what is inside one of Flower's objects, not its wrapping."""
    try:
        answer = PullObjectResponse.FromString(data[1:])
    except Exception:  # noqa: BLE001 (protobuf's own errors; it is no answer then)
        return flip(data, rng)
    changed = rng.choice((flip, insert, truncate, digits, digits))(answer.object_content, rng)
    answer = PullObjectResponse(object_found=True, object_available=True, object_content=changed)
    return data[:1] + bytes(answer.SerializeToString())


def _flower_message() -> dict[str, bytes]:
    """Flower's answers that make up one message: the one to `pull-messages`, and one for each object by its id."""
    record = ConfigRecord({"json": "{}", "seal": "{}"})
    with a_server_app():
        content = RecordDict({"header": record, "vector": ArrayRecord({"flat": Array(MODEL)})})
        message = Message(content, 9, "query.fedchorus")
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        tree, deflated = get_object_tree(message), {name: one.deflate() for name, one in objects.items()}
        first = PullMessagesResponse(messages_list=[message_to_proto(message)], message_object_trees=[tree])
    answers = {"pull-messages": first.SerializeToString()}
    for name, one in deflated.items():
        answer = PullObjectResponse(object_found=True, object_available=True, object_content=one)
        answers[name] = answer.SerializeToString()
    return answers


# -- at the server -----------------------------------------------------------------------------------------------------


def at_the_server(thorax: Thorax, stack: contextlib.ExitStack) -> dict[str, Decoder]:
    runner = stack.enter_context(asyncio.Runner())
    coordinator = Coordinator(thorax.coordinator, Logbook("fuzz", None, stream=None))
    api = make_api(coordinator)
    (thorax.coordinator / "uploads").mkdir()
    job = deployed_job()
    path = thorax.folder / "submitted.safetensors"
    Parameters({"weight": (3,)}).save(MODEL, path, {"job": job.hash, "round": "0"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    upload = thorax.coordinator / "uploads" / f"{digest}.safetensors"
    submission = json.dumps({"toml": job.toml.decode(), "model": digest, "approvals": [[DIGEST, "cd" * 64]]})
    caller = Caller("public", None, "127.0.0.1", operator="ops")
    site = Caller("public", None, "127.0.0.1", site="north")
    server = Caller("loopback", None, "127.0.0.1", internal=True)

    def call(method: str, path: str, body: bytes, who: Caller) -> int:
        if method == "POST" and path.endswith("/jobs"):
            shutil.copy(thorax.folder / "submitted.safetensors", upload)
            shutil.rmtree(thorax.coordinator / "jobs")
            (thorax.coordinator / "jobs").mkdir()
        path, _, query = path.partition("?")
        path = path.encode(errors="replace").decode()  # As uvicorn has it.
        scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": [], "fedchorus": who}
        scope |= {
            "query_string": query.encode(errors="replace"),
            "http_version": "1.1",
            "scheme": "https",
            "root_path": "",
        }
        status, said = runner.run(_exchange(api, scope, body))
        assert status in (200, 307, 400, 403, 404, 405), status
        if status == 400:
            record = json.loads(said)
            raise NoResponse(record["error"])
        return status

    lines = {
        "submit": (b"POST /v1/fedchorus/jobs", caller),
        "piece": (f"PUT /v1/fedchorus/models/{DIGEST}?at=0".encode(), caller),
        "roster": (b"POST /v1/fedchorus/site/roster", site),
        "wait": (b"POST /v1/fedchorus/internal/wait", server),
        "ring": (b"POST /v1/fedchorus/internal/ring", server),
    }
    coordinator._link = _NoLink()  # type: ignore[assignment]  # What needs Flower's server is tested with it.

    def body_of(name: str) -> Callable[[bytes], object]:
        line, who = lines[name]
        method, _, target = line.decode().partition(" ")
        return lambda data: call(method, target, data, who)

    def address(data: bytes) -> object:
        method, _, target = text_of(data).partition(" ")
        return call(
            "GET" if method not in ("GET", "POST", "PUT") else method, target.replace("/internal/", "/"), b"{}", caller
        )

    guard = Guard(
        _hello,
        api=_hello,
        audit=_NoAudit(),
        peer_of=peer_of,
        is_revoked=lambda peer: False,
        operators=Operators(thorax.coordinator / "operators.json"),
        internal_secret="secret",
        timer=_Steps(),
    )
    der = der_of((thorax.folder / "north" / "certificate.pem").read_bytes())

    def headers(data: bytes) -> object:
        first, *rest = data.split(b"\n")
        pairs = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in rest)]
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": first.decode("latin-1"),
            "query_string": b"",
            "headers": pairs,
        }
        scope["fedchorus"] = Caller("public", der, "127.0.0.1")
        status, _ = runner.run(_exchange(guard, scope, b""))
        assert status in (200, 401, 403, 404, 413), status
        return status

    transport = thorax.transport
    request = ask_for(DIGEST, 1, MODEL, None)
    seal = Seal(kind="request", sender=COORDINATOR, recipient="north", nonce=DIGEST, time=1.0, until=2.0)
    sent = _Sent(request, seal, "", activations=1, pulls=1, answers=0)
    site_key = IdentityKey.load(thorax.folder / "north" / "keys" / "identity.pem")
    text = header(Reply("north", DIGEST, 1, MODEL, None))
    back = Seal(kind="answer", sender="north", recipient=COORDINATOR, nonce=DIGEST, time=1.0, until=2.0)
    back_text = back.signed(site_key, text, array_digest(MODEL)).text
    with a_server_app():
        outgoing = Message(RecordDict(), 9, "query.fedchorus")

    def opened(data: bytes) -> object:
        """Three parts: header, seal and array, each behind its length."""
        parts = []
        for _ in range(3):
            size = int.from_bytes(data[:4], "little")
            parts.append(data[4 : 4 + size])
            data = data[4 + size :]
        record = ConfigRecord({"json": parts[0].decode("utf-8", "replace"), "array": parts[2]})
        record["seal"] = parts[1].decode("utf-8", "replace")
        with a_server_app():
            reply = Message(RecordDict({"header": record}), reply_to=outgoing)
            answer = transport._opened("north", sent, reply)
        why = getattr(answer, "why", "")
        assert "\n" not in why
        return answer

    framed = b"".join(
        len(part).to_bytes(4, "little") + part for part in (text.encode(), back_text.encode(), Array(MODEL).data)
    )
    assert isinstance(opened(framed), Reply)
    bearer = b"/v1/fleet/pull-messages\nauthorization: Bearer abc\nflwr-public-key: QUJD\ncontent-length: 12"
    said = (NoResponse,)
    return {
        "a submission": Decoder(
            body_of("submit"), (submission.encode(),), said, (), (confuse_json,), share=0.1, quotes=True
        ),
        "a piece of a model": Decoder(body_of("piece"), (b"piece",), said, (), share=0.1),
        "a signature": Decoder(
            body_of("roster"),
            (json.dumps({"signature": thorax.roster.signatures["north"]}).encode(),),
            said,
            (),
            (confuse_json,),
            share=0.1,
        ),
        "the door": Decoder(
            body_of("wait"), (b'{"since": 1, "timeout_s": 0.0}',), said, (), (confuse_json,), share=0.1
        ),
        "the bell": Decoder(body_of("ring"), (b'{"sites": ["north"]}',), said, (), (confuse_json,), share=0.1),
        "an address": Decoder(
            address,
            tuple(
                f"{method} /v1/fedchorus/{path}".encode()
                for method, path in (
                    ("GET", "jobs/smallest-12345678/events?after=1"),
                    ("GET", "jobs/smallest-12345678/model?at=1"),
                    ("POST", "jobs/smallest-12345678/stop"),
                    ("PUT", f"models/{DIGEST}?at=3"),
                )
            ),
            said,
            ("server.api._number", "server.api._json", "server.api._body", "server.jobs.JobFolder.open"),
            share=0.2,
            quotes=True,
        ),
        "a call's headers": Decoder(headers, (bearer,), (), ("server.guard._bearer",), share=0.4),
        "a sealed answer": Decoder(
            opened, (framed,), (), ("server.sealed.SealedTransport._opened",), (_confuse_parts,), share=0.5
        ),
    }


def _confuse_parts(data: bytes, rng: random.Random) -> bytes:
    parts = []
    for _ in range(3):
        size = int.from_bytes(data[:4], "little")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    which = rng.randrange(3)
    parts[which] = (other_npy_header if which == 2 else confuse_json)(parts[which], rng)
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


async def _exchange(app: Any, scope: Scope, body: bytes) -> tuple[int, bytes]:
    """One request to an ASGI application; the status and the body of its answer."""
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def _hello(scope: Scope, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


class _NoAudit:
    def record(self, call: object) -> None: ...
    def check(self) -> None: ...


class _NoLink:
    def ring(self, sites: list[str]) -> None: ...
    def enrol(self, keys: dict[str, bytes]) -> None: ...
    def sites(self) -> dict[str, Any]:
        return {}

    async def wait(self, since: int, timeout_s: float) -> tuple[int, dict[str, Any]]:
        return since, {}


class _Steps:
    """A clock that goes on by a second with every look: nobody is ever too fast."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 1.0
        return self._now

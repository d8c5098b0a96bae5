"""One site's node on Flower's Fleet API: Flower's own client and node authentication, and a loop of ours around it.

Flower's SuperNode starts a process for each message, sleeps three seconds between two questions, and unpacks and
imports the code that comes with a run. This node answers in the process it is in, and never asks for a run's bundle:
whatever a server ships, nothing of it is fetched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Read by flwr when it is imported: nothing leaves this machine by itself.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from privacy.errors import FedchorusError
from privacy.keys import TlsKey
from strategies.messages import Answer, MalformedMessage, Words, flat_array, unflat
from strategies.parameters import Vector

logging.getLogger("flwr").setLevel(logging.ERROR)
logging.getLogger("httpx").setLevel(logging.WARNING)
MOST_BYTES = 2**33  # Of one message: a model of two thousand million parameters.
SMALL = 2**18  # Bytes of an array that travels in the header's record.
PUSH_TRIES = 6


class Unreachable(FedchorusError):
    """The coordinator's server does not answer now: wait, and try again."""


class NotAdmitted(FedchorusError):
    """The coordinator's server answers, and does not let this site in. Says why, and what to do."""


@dataclass(frozen=True)
class Incoming:
    """One message as it came: its header, seal and array, not checked yet."""

    message: Message
    text: str
    seal: str
    array: Vector | Words


class FleetLink:
    """The connection of one site. `context` has its certificate and trusts the federation's authority alone.

    Every method raises `Unreachable` or `NotAdmitted`.
    """

    def __init__(self, address: str, *, context: ssl.SSLContext, key: TlsKey) -> None:
        private = key.private
        self._client = FleetHttpClient(
            f"https://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
            ],
            verify=context,
            timeout=40.0,
        )
        self._key = public_key_to_bytes(private.public_key())
        self._node: Node | None = None
        self._quiet = threading.Event()
        self._beating: threading.Thread | None = None

    def activate(self) -> None:
        """Say that this site is there, and keep saying so in the background."""
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        with _explained():
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        self._quiet.clear()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    def receive(self) -> Incoming | None:
        """Wait for the next message, some seconds at most. Raises `MalformedMessage` for one that is not ours."""
        node = self._there
        with _explained():
            answer = self._client.PullMessages(PullMessagesRequest(node=node))
            if not answer.messages_list:
                return None
            head = message_from_proto(answer.messages_list[0])
            message = self._fetched(head, answer.message_object_trees[0], node)
        return _opened(message)

    def answer(self, incoming: Incoming, text: str, seal: str, answer: Answer) -> None:
        """Send a sealed answer."""
        reply = Message(_packed(text, seal, flat_array(answer)), reply_to=incoming.message)
        self._send(reply, incoming.message.metadata)

    def decline(self, incoming: Message) -> None:
        """Say that there is no answer, and nothing about why."""
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "this site gives no answer")
        self._send(Message(error, reply_to=incoming), incoming.metadata)

    def close(self) -> None:
        """Say goodbye, so that nobody waits for this site."""
        self._quiet.set()
        if self._node is not None:
            with contextlib.suppress(httpx.HTTPError):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client._client.close()

    @property
    def _there(self) -> Node:
        assert self._node is not None, "activate it first"
        return self._node

    def _fetched(self, head: Message, tree: ObjectTree, node: Node) -> Message:
        run, size = head.metadata.run_id, 0
        pull = make_pull_object_fn_protobuf(self._client.PullObject, node, run)

        def bounded(object_id: str) -> bytes:
            nonlocal size
            content: bytes = pull(object_id)
            size += len(content)
            if size > MOST_BYTES:
                raise MalformedMessage(f"a message of more than {MOST_BYTES} bytes")
            return content

        contents = pull_objects([node.object_id for node in iterate_object_tree(tree)], pull_object_fn=bounded)
        confirm = make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run)
        confirm(head.metadata.message_id)
        try:
            message = inflate_object_from_contents(head.metadata.message_id, contents)
        except Exception as error:  # noqa: BLE001 (Flower's readers raise whatever they stumble over)
            raise MalformedMessage(f"a message that Flower cannot read ({type(error).__name__})") from None
        if not isinstance(message, Message):
            raise MalformedMessage("what came is no message")
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return message

    def _send(self, message: Message, asked: Metadata) -> None:
        """Send it whole; a connection that breaks is tried again: the work behind an answer is worth a minute."""
        node, run = self._there, message.metadata.run_id
        message.metadata.__dict__.update(_created_at=asked.created_at, _ttl=asked.ttl)  # By the server's clock.
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree = get_object_tree(message)
            head = remove_content_from_message(message) if message.has_content() else message
            request = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            for tries in range(PUSH_TRIES):
                try:
                    with _explained():
                        taken = self._client.PushMessages(request)
                        push = make_push_object_fn_protobuf(self._client.PushObject, node, run, taken.session_id)
                        objects: dict[str, Any] = get_all_nested_objects(message)
                        push_objects(objects, push, object_ids_to_push=set(taken.objects_to_push))
                    return
                except Unreachable:
                    if tries == PUSH_TRIES - 1:
                        raise
                    self._quiet.wait(min(2.0**tries, 15.0))

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._quiet.wait(HEARTBEAT_DEFAULT_INTERVAL * 0.5):
            with contextlib.suppress(httpx.HTTPError, ValueError):  # The loop notices, and says so.
                self._client.SendNodeHeartbeat(request)


class RunOver(FedchorusError):
    """The run that a message belonged to has ended; nobody waits for the answer."""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what HTTP raises into what a person can act on."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, said = error.response.status_code, _said(error.response)
        if status in (401, 403) and said:
            raise NotAdmitted(f"the server does not let this site in: {said}") from None
        if status == 401:
            raise NotAdmitted("the server does not know this node, or its clock is another") from None
        if status == 412 and error.request.url.path.endswith("activate-node"):
            raise NotAdmitted(
                "the server does not know this site's key; was it signed, and is it the newest kit?"
            ) from None
        if status >= 500 or status in (404, 429):
            raise Unreachable(f"the server answers {status}: {said or 'it is busy or starting'}") from None
        raise RunOver(f"the run of this message is over, or takes no such answer ({status})") from None
    except ObjectPullError:
        raise RunOver("a part of a message is gone: its run is over") from None
    except ValueError:
        raise Unreachable("what the server answers is not Flower's; compare the versions at both ends") from None
    except ObjectPushError:
        raise Unreachable("the server did not take a part of an answer: it is busy") from None
    except httpx.TransportError as error:
        text = str(error)
        if "verify failed" in text.lower():
            raise NotAdmitted(f"the server's certificate is not the federation's ({text}); check the clock") from None
        if "alert" in text.lower():
            raise NotAdmitted(f"the server does not accept this site's certificate ({text}); was it renewed?") from None
        raise Unreachable(f"no connection ({type(error).__name__}: {text or 'no words'})") from None


def _said(response: httpx.Response) -> str:
    """The one line of our guard, or nothing where Flower itself, or something else, answered."""
    try:
        said = response.json()["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return said if isinstance(said, str) and said.isprintable() and len(said) < 500 else ""


def _packed(text: str, seal: str, array: Vector | Words) -> RecordDict:
    """A small array travels in the header's record: Flower takes a request for each part of a message."""
    if array.nbytes > SMALL:
        record = ConfigRecord({"json": text, "seal": seal})
        return RecordDict({"header": record, "vector": ArrayRecord({"flat": Array(array)})})
    return RecordDict({"header": ConfigRecord({"json": text, "seal": seal, "array": Array(array).data})})


def _opened(message: Message) -> Incoming:
    try:
        header = message.content["header"]
        text, seal = header["json"], header["seal"]
        data = header["array"] if "array" in header else message.content["vector"]["flat"].data
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Stranger(message, "a message without header, seal and array") from None
    if not isinstance(text, str) or not isinstance(seal, str) or not isinstance(data, bytes):
        raise Stranger(message, "a message whose header, seal or array is of another type")
    try:
        return Incoming(message, text, seal, unflat(data))
    except MalformedMessage as error:
        raise Stranger(message, str(error)) from None


class Stranger(FedchorusError):
    """A message that came over the link and is not one of this protocol's."""

    def __init__(self, message: Message, why: str) -> None:
        super().__init__(why)
        self.message = message

"""Carrying requests over Flower: one message a site, answers pulled and handed on one by one.

Flower's own loop waits for all replies and keeps them; pulling them here keeps one at a time in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from privacy.errors import RunError
from server.collect import Failure
from strategies.messages import (
    Answer,
    Ask,
    MalformedMessage,
    Request,
    Step,
    Words,
    flat_array,
    header,
    parse_answer,
    unflat,
)
from strategies.parameters import Vector

IDENTIFY = f"{MessageType.QUERY}.identify"
TRAIN = MessageType.TRAIN
STEP = f"{MessageType.QUERY}.step"


class FlowerTransport:
    """A `server.collect.Transport` over a Flower `Grid`.

    `timeout_s` ends the wait for an answer to a request to train, `step_timeout_s` that for any other; `poll_s` is how
    often answers are pulled.
    """

    def __init__(self, grid: Grid, *, timeout_s: float, step_timeout_s: float = 120.0, poll_s: float = 0.05) -> None:
        self._grid, self._timeout_s, self._poll_s = grid, timeout_s, poll_s
        self._step_timeout_s = min(timeout_s, step_timeout_s)
        self._nodes: Mapping[str, int] = {}

    def find_sites(self, expected: int) -> list[str]:
        """Ask every connected node for its site's name until `expected` of them have answered.

        Raises `RunError` when they do not within the timeout.
        """
        deadline = time.monotonic() + self._timeout_s
        while len(nodes := list(self._grid.get_node_ids())) < expected:
            if time.monotonic() > deadline:
                raise RunError(f"{len(nodes)} of {expected} nodes connected within {self._timeout_s:g} s")
            time.sleep(self._poll_s)
        messages = {node: Message(RecordDict(), node, IDENTIFY) for node in nodes}
        self._nodes = {
            str(reply.content["site"]["name"]): node
            for node, reply in self._pull(messages, self._timeout_s)
            if reply is not None and reply.has_content()
        }
        if len(self._nodes) < expected:
            raise RunError(f"{len(self._nodes)} of {expected} nodes named their site")
        return sorted(self._nodes)

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        names = {self._nodes[site]: site for site in requests}
        messages = {
            node: Message(_pack(requests[site]), node, TRAIN if _trains(requests[site]) else STEP)
            for node, site in names.items()
        }
        if all(isinstance(request, Step) and request.stage == "forget" for request in requests.values()):
            self._grid.push_messages(list(messages.values()))  # Nobody waits for those who may be gone.
            return
        wait_s = self._timeout_s if any(map(_trains, requests.values())) else self._step_timeout_s
        for node, reply in self._pull(messages, wait_s):
            yield names[node], _answer(names[node], reply)

    def _pull(self, messages: Mapping[int, Message], timeout_s: float) -> Iterator[tuple[int, Message | None]]:
        """Yield each node's reply as it comes; None for those that have not answered in time."""
        ids = list(self._grid.push_messages(list(messages.values())))
        # An error reply carries the server's own node id as its source: only the message it answers tells whose it is.
        waiting = dict(zip(ids, messages, strict=True))
        deadline = time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply
            if not replies:
                time.sleep(self._poll_s)
        for node in waiting.values():
            yield node, None


def _trains(request: Request) -> bool:
    return isinstance(request, Ask) or (isinstance(request, Step) and request.ask is not None)


def _answer(site: str, reply: Message | None) -> Answer | Failure:
    if reply is None:
        return Failure(site, "no answer in time", silent=True)
    if reply.has_error():
        return Failure(site, "failed at the site")
    try:
        return parse_answer(*_unpack(reply.content))
    except MalformedMessage as error:
        return Failure(site, f"malformed reply: {error}")


def _pack(request: Request) -> RecordDict:
    return RecordDict({"header": ConfigRecord({"json": header(request)}), "vector": pack_array(flat_array(request))})


def _unpack(content: RecordDict) -> tuple[str, Vector | Words]:
    """Raises `MalformedMessage` when the content is not what `_pack` makes."""
    try:
        text = content["header"]["json"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedMessage("the content is not one header and one flat array") from None
    if not isinstance(text, str):
        raise MalformedMessage("the header is not text")
    return text, unpack_array(content)


def pack_array(array: Vector | Words) -> ArrayRecord:
    """One flat array: Flower parses a header per array, so one is the cheapest number of arrays."""
    return ArrayRecord({"flat": Array(array)})


def unpack_array(content: RecordDict) -> Vector | Words:
    """Raises `MalformedMessage` when the content has not what `pack_array` makes as its vector."""
    try:
        data = content["vector"]["flat"].data
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedMessage("the content is not one header and one flat array") from None
    if not isinstance(data, bytes):
        raise MalformedMessage("the array is not bytes")
    return unflat(data)

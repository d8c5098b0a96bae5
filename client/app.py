"""The client as a Flower ClientApp: decode, let the site's own code answer, encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from strategies.messages import Ask, MalformedMessage, Refusal, Reply, header, parse_ask
from strategies.parameters import Vector


class Client(Protocol):
    @property
    def name(self) -> str: ...

    def handle(self, ask: Ask) -> Reply | Refusal: ...


def make_client_app(open_client: Callable[[Context], Client]) -> ClientApp:
    """A ClientApp for the client that `open_client` finds for a node's context.

    An exception of the client becomes Flower's error reply: the server learns that there is no answer, not why.
    """
    app = ClientApp()

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        site = ConfigRecord({"name": open_client(context).name})
        return Message(RecordDict({"site": site}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        text, model = _unpack(message.content)
        answer = open_client(context).handle(parse_ask(text, model))
        vector = answer.contribution if isinstance(answer, Reply) else np.zeros(0, dtype=np.float32)
        return Message(_pack(header(answer), vector), reply_to=message)

    return app


def _pack(text: str, vector: Vector) -> RecordDict:
    return RecordDict({"header": ConfigRecord({"json": text}), "vector": ArrayRecord({"flat": Array(vector)})})


def _unpack(content: RecordDict) -> tuple[str, Vector]:
    """Raises `MalformedMessage` when the content is not what `_pack` makes."""
    try:
        text, vector = content["header"]["json"], content["vector"]["flat"].numpy()
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedMessage("the content is not one header and one flat array") from None
    if not isinstance(text, str):
        raise MalformedMessage("the header is not text")
    return text, vector

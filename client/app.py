"""The client as a Flower ClientApp: decode, let the site's own code answer, encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from privacy.errors import FedchorusError
from strategies.messages import Answer, MalformedMessage, Request, Words, flat_array, header, parse_request, unflat
from strategies.parameters import Vector


class Client(Protocol):
    @property
    def name(self) -> str: ...

    def handle(self, request: Request) -> Answer: ...


class NoAnswer(FedchorusError):
    """All that leaves a site of what went wrong there."""


def make_client_app(open_client: Callable[[Context], Client]) -> ClientApp:
    """A ClientApp for the client that `open_client` finds for a node's context.

    Flower sends an exception's type and words to the server. The client's never get that far: the server learns that
    there is no answer, not why.
    """
    app = ClientApp()

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        site = ConfigRecord({"name": open_client(context).name})
        return Message(RecordDict({"site": site}), reply_to=message)

    def answer(message: Message, context: Context) -> Message:
        try:
            answer = open_client(context).handle(parse_request(*_unpack(message.content)))
        except BaseException:  # noqa: BLE001 (raised again, without what it says)
            raise NoAnswer("this site gives no answer") from None
        return Message(_pack(answer), reply_to=message)

    app.train()(answer)
    app.query("step")(answer)
    return app


def _pack(answer: Answer) -> RecordDict:
    array = ArrayRecord({"flat": Array(flat_array(answer))})
    return RecordDict({"header": ConfigRecord({"json": header(answer)}), "vector": array})


def _unpack(content: RecordDict) -> tuple[str, Vector | Words]:
    """Raises `MalformedMessage` when the content is not what `_pack` makes."""
    try:
        text, data = content["header"]["json"], content["vector"]["flat"].data
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedMessage("the content is not one header and one flat array") from None
    if not isinstance(text, str) or not isinstance(data, bytes):
        raise MalformedMessage("the header is not text, or the array not bytes")
    return text, unflat(data)

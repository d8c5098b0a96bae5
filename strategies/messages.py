"""What server and clients say to each other, and the checks at the trust boundary.

A message is a small JSON header and one flat array: a float32 vector, or the masked words of a secure sum. Headers
carry a version, and what is checked once here is trusted behind it. Vectors never enter an error.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from privacy.errors import FedchorusError
from privacy.ledger import Head
from strategies.parameters import Vector, vector_hash
from strategies.total import Layout

VERSION = 1


class MalformedMessage(FedchorusError):
    """A message is not what the protocol says. The text says which check failed, never what the values were."""


@dataclass(frozen=True)
class Ask:
    """The server asks a site to train: the job's hash, the round, the model ((P,) float32) and its hash.

    `witness` is the digest of all sites' ledger heads after the round before (`heads_line`): each site signs it
    into its own ledger, so that no one can rewrite a ledger later without the others' consent. `clip_norm` bounds
    this round's update where whole clients are protected.
    """

    job: str
    round_number: int
    model: Vector
    model_hash: str
    witness: str | None
    clip_norm: float | None = None


@dataclass(frozen=True)
class Reply:
    """A site's contribution ((layout.size,) float32) and its ledger's newest head; the only thing that leaves it."""

    site: str
    job: str
    round_number: int
    contribution: Vector
    head: Head | None


@dataclass(frozen=True)
class Refusal:
    """A site declines. It has no reason field: a reason could tell something about the records."""

    site: str
    job: str
    round_number: int


Stage = Literal["advertise", "share", "mask", "agree", "reveal", "forget"]


@dataclass(frozen=True)
class Step:
    """One of the server's messages of a secure sum: `body` is `privacy.secagg`'s. With `mask` comes the request to
    train; `forget` says that the session is over."""

    job: str
    round_number: int
    stage: Stage
    body: bytes = field(repr=False)
    ask: Ask | None = None


@dataclass(frozen=True)
class Stepped:
    """A site's answer to a step; after `mask` with its masked words (uint8) and its ledger's newest head."""

    site: str
    job: str
    round_number: int
    stage: Stage
    body: bytes = field(repr=False)
    words: Words = field(default_factory=lambda: np.zeros(0, np.uint8), repr=False)
    head: Head | None = None


@dataclass(frozen=True)
class Offer:
    """The server offers a job before its first round: the whole job, and the model that it begins with, by its hash.

    `shapes` is the digest of the model's arrays (`Parameters.digest`), of `parameters` scalars; `version` is the
    server's package. `approvals` are (public key, signature) pairs over `approval_of`, in hexadecimal.
    """

    job: str
    toml: str = field(repr=False)
    model_hash: str
    parameters: int
    shapes: str
    version: str
    approvals: tuple[tuple[str, str], ...] = ()
    round_number: int = 0


@dataclass(frozen=True)
class Deliver:
    """The server hands the job's last model to a site: the job is over, what was not spent of its plan is free."""

    job: str
    round_number: int
    model: Vector
    model_hash: str


@dataclass(frozen=True)
class Agreed:
    """A site takes an offer, or has kept a delivered model; with its ledger's newest head."""

    site: str
    job: str
    round_number: int
    head: Head | None = None


Request = Ask | Step | Offer | Deliver
Answer = Reply | Refusal | Stepped | Agreed
Words = NDArray[np.uint8]


def ask_for(job: str, round_number: int, model: Vector, witness: str | None, clip_norm: float | None = None) -> Ask:
    return Ask(job, round_number, model, vector_hash(model), witness, clip_norm)


def check_ask(ask: Ask, *, job: str, parameters: int) -> None:
    """At a site: refuse another job, another shape or dtype, a wrong hash, or a model that is not finite."""
    if ask.job != job:
        raise MalformedMessage("the request is for another job than this site has approved")
    if ask.round_number < 1:
        raise MalformedMessage(f"round numbers start at 1, got {ask.round_number}")
    _check_vector(ask.model, parameters, "the model")
    if vector_hash(ask.model) != ask.model_hash:
        raise MalformedMessage("the model is not the one that its hash names")


def check_reply(reply: Reply, *, ask: Ask, site: str, layout: Layout) -> None:
    """At the server: refuse a reply of another site, job or round, or one that no honest client could have made."""
    if reply.site != site:
        raise MalformedMessage("the reply carries another site's name")
    if (reply.job, reply.round_number) != (ask.job, ask.round_number):
        raise MalformedMessage("the reply is for another job or round")
    _check_vector(reply.contribution, layout.size, "the contribution")
    if not reply.contribution[layout.parameters] > 0:
        raise MalformedMessage("the weight is not positive")


def check_stepped(answer: Stepped, *, step: Step, site: str) -> None:
    """At the server: refuse an answer of another site, job, round or stage. What it holds is `privacy.secagg`'s."""
    if answer.site != site:
        raise MalformedMessage("the answer carries another site's name")
    if (answer.job, answer.round_number, answer.stage) != (step.job, step.round_number, step.stage):
        raise MalformedMessage("the answer is for another job, round or stage")


def check_deliver(message: Deliver, *, job: str, parameters: int) -> None:
    """At a site: refuse a model of another job or shape, one that its hash does not name, or one that is not finite."""
    check_ask(
        Ask(message.job, message.round_number, message.model, message.model_hash, None), job=job, parameters=parameters
    )


def check_agreed(answer: Answer, *, request: Offer | Deliver, site: str) -> Agreed:
    """At the server: refuse an answer of another site, job or round, or of another kind."""
    if not isinstance(answer, Agreed):
        raise MalformedMessage("the answer is of another kind than its request")
    if answer.site != site:
        raise MalformedMessage("the answer carries another site's name")
    if (answer.job, answer.round_number) != (request.job, request.round_number):
        raise MalformedMessage("the answer is for another job or round")
    return answer


def approval_of(job: str, model_hash: str) -> bytes:
    """What an approver signs: the job and the model that it begins with."""
    return b"fedchorus approval v1\0" + bytes.fromhex(job) + bytes.fromhex(model_hash)


def _check_vector(vector: object, size: int, what: str) -> None:
    if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.shape != (size,):
        found = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise MalformedMessage(f"{what} must be float32 ({size},), got {found}")
    # One pass without a temporary: a sum is finite only if every value is (or overflows, which float64 cannot here).
    with np.errstate(invalid="ignore"):  # Infinities of both signs add up to NaN: no need to warn as well.
        finite = np.isfinite(np.sum(vector, dtype=np.float64))
    if not finite:
        raise MalformedMessage(f"{what} is not finite")


NOTHING = np.zeros(0, np.float32)


def flat_array(message: Request | Answer) -> Vector | Words:
    """The array that travels beside a message's header."""
    match message:
        case Ask() | Deliver():
            return message.model
        case Reply():
            return message.contribution
        case Step():
            return NOTHING if message.ask is None else message.ask.model
        case Stepped():
            return message.words
        case Refusal() | Offer() | Agreed():
            return NOTHING


_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(<f4|\|u1)', 'fortran_order': False, 'shape': \(([0-9]{1,15}),\), \} *\n",
    re.DOTALL,
)


def unflat(data: bytes) -> Vector | Words:
    """The array in `data`, an .npy file of version 1.0 that holds one flat float32 or uint8 array and nothing more.

    Read by hand, as numpy writes it: numpy's own reader evaluates the header as Python, which nine kilobytes can keep
    busy for half a minute. Raises `MalformedMessage`.
    """
    found = _NPY.match(data)
    if found is None or found.end() != 10 + int.from_bytes(found[1], "little"):
        raise MalformedMessage("the array is not one of flat float32 or bytes in .npy form, version 1.0")
    dtype = np.dtype(found[2].decode())
    if len(data) - found.end() != int(found[3]) * dtype.itemsize:
        raise MalformedMessage("the array is not as long as it says")
    flat: Vector | Words = np.frombuffer(data, dtype, offset=found.end()).copy()
    return flat


OFFERED = ("toml", "model_hash", "parameters", "shapes", "version", "approvals")


def header(message: Request | Answer) -> str:
    """The JSON header of a message; its array travels beside it."""
    match message:
        case Ask():
            fields = _ask_fields(message)
        case Reply():
            fields = {"site": message.site, "head": message.head}
        case Refusal():
            fields = {"site": message.site}
        case Agreed():
            fields = {"site": message.site, "head": message.head}
        case Deliver():
            fields = {"model_hash": message.model_hash}
        case Offer():
            fields = {name: getattr(message, name) for name in OFFERED}
        case Step():
            ask = None if message.ask is None else _ask_fields(message.ask)
            fields = {"stage": message.stage, "body": _text(message.body), "ask": ask}
        case Stepped():
            fields = {"site": message.site, "stage": message.stage, "body": _text(message.body), "head": message.head}
    kind = type(message).__name__.lower()
    return json.dumps({"v": VERSION, "kind": kind, "job": message.job, "round": message.round_number, **fields})


def _ask_fields(ask: Ask) -> dict[str, Any]:
    return {"model_hash": ask.model_hash, "witness": ask.witness, "clip_norm": ask.clip_norm}


def parse_request(text: str, array: Vector | Words) -> Request:
    """Raises `MalformedMessage`; the model itself is checked by `check_ask`."""
    ask_keys = {"model_hash", "witness", "clip_norm"}
    kinds = {"ask": ask_keys, "step": {"stage", "body", "ask"}, "offer": set(OFFERED), "deliver": {"model_hash"}}
    fields = _parse(text, kinds)
    match fields["kind"]:
        case "ask":
            return _ask(fields, fields, array)
        case "offer":
            return _offer(fields)
        case "deliver":
            asked = _ask(fields, {**fields, "witness": None, "clip_norm": None}, array)
            return Deliver(asked.job, asked.round_number, asked.model, asked.model_hash)
    asked = fields["ask"]
    if asked is not None and (not isinstance(asked, dict) or set(asked) != ask_keys):
        raise MalformedMessage("the header's request to train has other keys than one has")
    if (fields["stage"] == "mask") != (asked is not None):
        raise MalformedMessage("a request to train comes with the stage mask, and with no other")
    ask = None if asked is None else _ask(fields, asked, array)
    return Step(fields["job"], fields["round"], _stage(fields["stage"]), _body(fields["body"]), ask)


def _ask(fields: dict[str, Any], asked: dict[str, Any], array: Vector | Words) -> Ask:
    witness, clip_norm = asked["witness"], asked["clip_norm"]
    if not _is_digest(asked["model_hash"]) or not (witness is None or _is_digest(witness)):
        raise MalformedMessage("the header's model_hash or witness is not a SHA-256 in hexadecimal")
    if clip_norm is not None and not (type(clip_norm) is float and 0 < clip_norm < float("inf")):
        raise MalformedMessage("the header's clip_norm is not a finite number > 0")
    if array.dtype != np.float32:
        raise MalformedMessage("the model is not float32")
    return Ask(fields["job"], fields["round"], array.view(np.float32), asked["model_hash"], witness, clip_norm)


def _offer(fields: dict[str, Any]) -> Offer:
    approvals = fields["approvals"]
    if not all(isinstance(fields[name], str) for name in ("toml", "version")):
        raise MalformedMessage("the offer's toml or version is not text")
    if not (_is_digest(fields["model_hash"]) and _is_digest(fields["shapes"]) and _is_digest(fields["job"])):
        raise MalformedMessage("the offer's job, model_hash or shapes is not a SHA-256 in hexadecimal")
    if type(fields["parameters"]) is not int or fields["parameters"] < 1 or fields["round"] != 0:
        raise MalformedMessage("the offer's parameters or round is not a whole number that it can be")
    if not isinstance(approvals, list) or not all(_is_approval(pair) for pair in approvals):
        raise MalformedMessage("the offer's approvals are not pairs of a key and a signature in hexadecimal")
    given = {name: fields[name] for name in OFFERED if name != "approvals"}
    return Offer(fields["job"], approvals=tuple((key, signature) for key, signature in approvals), **given)


def _is_approval(pair: object) -> bool:
    match pair:
        case [str(key), str(signature)]:
            return _is_digest(key) and re.fullmatch("[0-9a-f]{128}", signature) is not None
    return False


def parse_answer(text: str, array: Vector | Words) -> Answer:
    """Raises `MalformedMessage`; the array itself is checked by `check_reply` or the secure sum."""
    kinds = {"reply": {"site", "head"}, "refusal": {"site"}, "stepped": {"site", "stage", "body", "head"}}
    kinds["agreed"] = {"site", "head"}
    fields = _parse(text, kinds)
    if not isinstance(fields["site"], str):
        raise MalformedMessage("the header's site is not a string")
    site, job, number = fields["site"], fields["job"], fields["round"]
    match fields["kind"]:
        case "refusal":
            return Refusal(site, job, number)
        case "agreed":
            return Agreed(site, job, number, _head(fields["head"]))
        case "reply":
            return Reply(site, job, number, array, _head(fields["head"]))  # type: ignore[arg-type]  # `check_reply`.
        case _:
            if array.dtype != np.uint8:
                raise MalformedMessage("the masked words are not bytes")
            stage, body = _stage(fields["stage"]), _body(fields["body"])
            return Stepped(site, job, number, stage, body, array.view(np.uint8), _head(fields["head"]))


def _stage(value: Any) -> Stage:
    if value not in get_args(Stage):
        raise MalformedMessage("the header's stage is not one of a secure sum")
    stage: Stage = value
    return stage


def _text(body: bytes) -> str:
    return base64.b64encode(body).decode("ascii")


def _body(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise MalformedMessage("the header's body is not base64") from None


def _parse(text: str, kinds: dict[str, set[str]]) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # Deep nesting is a sender's cheapest way to raise the second.
        raise MalformedMessage("the header is not JSON") from None
    if not isinstance(fields, dict) or type(fields.get("v")) is not int or fields["v"] != VERSION:
        raise MalformedMessage(f"the header is not of version {VERSION}")
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise MalformedMessage(f"expected {' or '.join(kinds)}")
    if set(fields) != {"v", "kind", "job", "round"} | kinds[kind]:
        raise MalformedMessage("the header's keys are not those of its kind")
    if not isinstance(fields["job"], str) or type(fields["round"]) is not int:
        raise MalformedMessage("the header's job or round has the wrong type")
    return fields


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _head(value: Any) -> Head | None:
    if value is None:
        return None
    match value:
        case [int(seq), str(digest)] if type(seq) is int and seq >= 0:
            return Head(seq, digest)
    raise MalformedMessage("the header's ledger head is malformed")

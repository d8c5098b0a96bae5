"""What server and clients say to each other, and the checks at the trust boundary.

A message is a small JSON header and one flat float32 vector. Headers carry a version, and what is checked once here
is trusted behind it. Vectors never enter an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def _check_vector(vector: object, size: int, what: str) -> None:
    if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.shape != (size,):
        found = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise MalformedMessage(f"{what} must be float32 ({size},), got {found}")
    # One pass without a temporary: a sum is finite only if every value is (or overflows, which float64 cannot here).
    with np.errstate(invalid="ignore"):  # Infinities of both signs add up to NaN: no need to warn as well.
        finite = np.isfinite(np.sum(vector, dtype=np.float64))
    if not finite:
        raise MalformedMessage(f"{what} is not finite")


def header(message: Ask | Reply | Refusal) -> str:
    """The JSON header of a message; its vector travels beside it."""
    match message:
        case Ask():
            fields: dict[str, Any] = {
                "model_hash": message.model_hash,
                "witness": message.witness,
                "clip_norm": message.clip_norm,
            }
        case Reply():
            fields = {"site": message.site, "head": message.head}
        case Refusal():
            fields = {"site": message.site}
    kind = type(message).__name__.lower()
    return json.dumps({"v": VERSION, "kind": kind, "job": message.job, "round": message.round_number, **fields})


def parse_ask(text: str, vector: Vector) -> Ask:
    """Raises `MalformedMessage`; the model itself is checked by `check_ask`."""
    fields = _parse(text, {"ask": {"model_hash", "witness", "clip_norm"}})
    witness, clip_norm = fields["witness"], fields["clip_norm"]
    if not _is_digest(fields["model_hash"]) or not (witness is None or _is_digest(witness)):
        raise MalformedMessage("the header's model_hash or witness is not a SHA-256 in hexadecimal")
    if clip_norm is not None and not (type(clip_norm) is float and 0 < clip_norm < float("inf")):
        raise MalformedMessage("the header's clip_norm is not a finite number > 0")
    return Ask(fields["job"], fields["round"], vector, fields["model_hash"], witness, clip_norm)


def parse_answer(text: str, vector: Vector) -> Reply | Refusal:
    """Raises `MalformedMessage`; the contribution itself is checked by `check_reply`."""
    fields = _parse(text, {"reply": {"site", "head"}, "refusal": {"site"}})
    if not isinstance(fields["site"], str):
        raise MalformedMessage("the header's site is not a string")
    if fields["kind"] == "refusal":
        return Refusal(fields["site"], fields["job"], fields["round"])
    return Reply(fields["site"], fields["job"], fields["round"], vector, _head(fields["head"]))


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

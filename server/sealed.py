"""Carrying sealed requests to sites over Flower, and only answers that the site itself sealed for this very request.

What a site's restart loses is sent again where that is safe (an offer, a request to train: the gate sends the same
bytes again, or charges anew), and is a failure where it is not: a step of a secure sum.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from privacy.errors import Refused
from privacy.keys import IdentityKey
from server.collect import Failure
from server.transport import pack_array, unpack_array
from strategies.envelope import COORDINATOR, Seal, array_digest
from strategies.messages import (
    Answer,
    Ask,
    MalformedMessage,
    Offer,
    Request,
    Step,
    flat_array,
    header,
    parse_answer,
    unflat,
)

FLEET = f"{MessageType.QUERY}.fedchorus"
LARGE = 2**20  # Answers to larger messages are fetched one by one: their number must not show in our memory.
SMALL = 2**18
RESENDS = 5
OFFER_S, DELIVER_S = 60.0, 600.0
MISSED = 3  # A site that asked for its next message so often, and has no answer to this one, does not have it.


class Door(Protocol):
    """What the SuperLink's process tells about the sites."""

    def wait(self, since: int, timeout_s: float) -> tuple[int, dict[str, dict[str, Any]]]:
        """Return the version of the sites' `server.link.Presence`, and these, once it differs from `since`."""
        ...

    def ring(self, sites: list[str]) -> None:
        """Let each of `sites` fetch one more message."""
        ...


@dataclass
class _Sent:
    """One request on its way to one site."""

    request: Request
    seal: Seal
    message: str
    activations: int
    pulls: int
    answers: int
    tries: int = 1


@dataclass
class SealedTransport:
    """A `server.collect.Transport` to enrolled sites.

    `keys` are the sites' identity keys, `key` the coordinator's. `deadline_s` ends the wait for an answer to anything
    that makes a site train, `step_timeout_s` for a step that does not. A message that was not fetched by then is never
    handed out.
    """

    grid: Grid
    door: Door
    key: IdentityKey
    keys: Mapping[str, str]
    deadline_s: float
    step_timeout_s: float = 120.0
    clock: Callable[[], float] = time.time
    _version: int = -1
    _sites: dict[str, dict[str, Any]] = field(default_factory=dict)

    def online(self, wait_s: float = 0.0) -> set[str]:
        """Which sites are there now; with `wait_s`, after the next change or that long."""
        self._look(wait_s)
        return {site for site, presence in self._sites.items() if presence["online"]}

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        online = self.online()
        for site in requests.keys() - online:
            yield site, Failure(site, "offline", silent=True)
        there = {site: request for site, request in requests.items() if site in online}
        wait_s = min(map(self._patience, there.values()), default=0.0)
        waiting = self._send(there, ttl_s=wait_s)
        yield from ((site, Failure(site, "Flower did not take the message")) for site in there.keys() - waiting.keys())
        if all(isinstance(request, Step) and request.stage == "forget" for request in there.values()):
            return  # Nobody waits for those who may be gone.
        deadline = time.monotonic() + wait_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = {site: sent for site, sent in waiting.items() if self._has_answered(site, sent)}
            for site, answer in self._answers(ready):
                if waiting.pop(site, None) is not None:
                    yield site, answer
            for site in [site for site in waiting if self._is_lost(site, waiting[site])]:
                sent = waiting.pop(site)
                again = (
                    {}
                    if isinstance(sent.request, Step) or sent.tries > RESENDS
                    else self._send({site: sent.request}, ttl_s=left, tries=sent.tries + 1)
                )
                if not again:
                    yield site, Failure(site, "restarted within the round")
                waiting |= again
            for site in [site for site in waiting if not self._sites[site]["online"]]:
                del waiting[site]
                yield site, Failure(site, "went away", silent=True)
            if not waiting:
                return
            self._look(min(left, 2.0))
        for site in waiting:
            yield site, Failure(site, "no answer in time", silent=True)

    def _patience(self, request: Request) -> float:
        match request:
            case Ask():
                return self.deadline_s
            case Step():
                return self.step_timeout_s if request.ask is None else self.deadline_s
            case Offer():  # A site that needs longer to open its data is there when it is offered again.
                return min(self.deadline_s, OFFER_S)
        return min(self.deadline_s, DELIVER_S)

    def _look(self, wait_s: float) -> None:
        self._version, self._sites = self.door.wait(self._version if wait_s else -1, wait_s)

    def _send(self, requests: Mapping[str, Request], *, ttl_s: float, tries: int = 1) -> dict[str, _Sent]:
        messages, sent = [], {}
        packed: dict[int, tuple[bytes, ArrayRecord | bytes]] = {}  # The same model goes to all: once in memory.
        for site, request in requests.items():
            nonce, text, array = secrets.token_hex(32), header(request), flat_array(request)
            if id(array) not in packed:
                whole = pack_array(array) if array.nbytes > SMALL else Array(array).data
                packed[id(array)] = array_digest(array), whole
            digest, whole = packed[id(array)]
            now = self.clock()
            seal = Seal(
                kind="request", sender=COORDINATOR, recipient=site, nonce=nonce, time=now, until=now + max(ttl_s, 1.0)
            )
            seal = seal.signed(self.key, text, digest)
            record = _content(text, seal.text, whole)
            presence = self._sites[site]
            messages.append(Message(record, presence["node"], FLEET, ttl=max(ttl_s, 1.0)))
            sent[site] = _Sent(
                request, seal, "", presence["activations"], presence["pulls"], presence["answers"], tries
            )
        if not messages:
            return {}
        for site, message in zip(list(sent), self.grid.push_messages(messages), strict=True):
            sent[site].message = message or ""
        self._look(0.0)  # Pushing much takes long, and idle sites ask all the time.
        for site, one in sent.items():
            one.pulls = self._sites[site]["pulls"]
        taken = {site: one for site, one in sent.items() if one.message}
        self.door.ring(list(taken))
        return taken

    def _has_answered(self, site: str, sent: _Sent) -> bool:
        """Whether an answer is there, whole: Flower would wait for minutes for the rest of one that was cut off."""
        presence = self._sites[site]
        whole: bool = presence["answers"] > sent.answers and presence["activations"] == sent.activations
        return whole

    def _is_lost(self, site: str, sent: _Sent) -> bool:
        presence = self._sites[site]
        missed: bool = presence["pulls"] >= sent.pulls + MISSED
        return missed or presence["activations"] != sent.activations

    def _answers(self, sent: Mapping[str, _Sent]) -> Iterator[tuple[str, Answer | Failure]]:
        sites = {one.message: site for site, one in sent.items()}
        large = any(flat_array(one.request).nbytes > LARGE for one in sent.values())
        for ids in [[message] for message in sites] if large else [list(sites)]:
            for reply in self.grid.pull_messages(ids) if ids else ():
                site = sites.get(reply.metadata.reply_to_message_id)
                if site is not None:
                    yield site, self._opened(site, sent[site], reply)

    def _opened(self, site: str, sent: _Sent, reply: Message) -> Answer | Failure:
        if reply.has_error():
            return Failure(site, "failed at the site")
        try:
            record = reply.content["header"]
            text, seal = record["json"], Seal.parse(record["seal"])
            array = unflat(record["array"]) if "array" in record else unpack_array(reply.content)
            if not isinstance(text, str):
                raise MalformedMessage("the header is not text")
            expected = {"kind": "answer", "sender": site, "recipient": COORDINATOR, "nonce": sent.seal.nonce}
            seal.check(self.keys[site], text, array_digest(array), **expected)
            return parse_answer(text, array)
        except (KeyError, TypeError, ValueError, AttributeError):
            return Failure(site, "malformed reply: the content is not one header, one seal and one flat array")
        except (MalformedMessage, Refused) as error:
            return Failure(site, f"malformed reply: {error}")


def _content(text: str, seal: str, array: ArrayRecord | bytes) -> RecordDict:
    """A small array travels in the header's record: Flower takes a request for each part of a message."""
    if isinstance(array, bytes):
        return RecordDict({"header": ConfigRecord({"json": text, "seal": seal, "array": array})})
    return RecordDict({"header": ConfigRecord({"json": text, "seal": seal}), "vector": array})

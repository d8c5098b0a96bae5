"""Sealing messages end to end: who speaks, to whom, in answer to what, and that not a bit was changed on the way.

Transport security ends at the machine that terminates it, and Flower does not bind an answer to the node that gives
it. So every message of a deployment carries a seal: an Ed25519 signature of its sender over its header, the digest of
its array, both names, the time, and a nonce of 32 bytes that is fresh in each request and comes back in its answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privacy.errors import Refused
from privacy.keys import IdentityKey, is_signed_by
from strategies.messages import Words
from strategies.parameters import Vector

VERSION = 1
COORDINATOR = "_coordinator"  # No site can be called so.
Kind = Literal["request", "answer"]
_DOMAIN = b"fedchorus seal v1\0"


@dataclass(frozen=True, kw_only=True)
class Seal:
    """`sender` signed a message of `kind` for `recipient` at `time` (seconds since 1970, the sender's clock).

    It is to be believed `until` then: a request waits in a queue while its site is at work, and a large one is long on
    its way.
    """

    kind: Kind
    sender: str
    recipient: str
    nonce: str
    time: float
    until: float
    signature: str = ""

    @property
    def text(self) -> str:
        """The seal as it travels: JSON."""
        return json.dumps({"v": VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def parse(cls, text: object) -> Seal:
        """Raises `Refused` for anything that is not a seal, written as `text` writes it."""
        try:
            if not isinstance(text, str) or len(text) > 1024:
                raise ValueError
            record = json.loads(text)
            seal = cls(**{name: record[name] for name in cls.__dataclass_fields__})
            if seal.text != text or not _is_well_formed(seal):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refused("the message's seal is not one of this version") from None
        return seal

    def signed(self, key: IdentityKey, header: str, array_digest: bytes) -> Seal:
        """This seal with `key`'s signature over it, a message's `header` and the digest of its array."""
        signature = key.sign(self._message(header, array_digest)).hex()
        return Seal(**{**asdict(self), "signature": signature})

    def check(self, public_hex: str, header: str, array_digest: bytes, **expected: str) -> None:
        """Refuse a seal that `public_hex` did not sign over exactly this, or whose fields are not the `expected`."""
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise Refused(f"the message's {name} is not the expected one")
        if not is_signed_by(public_hex, bytes.fromhex(self.signature), self._message(header, array_digest)):
            raise Refused("the message's signature is not its sender's: it was altered, or sent in another's name")

    def _message(self, header: str, array_digest: bytes) -> bytes:
        said: dict[str, Any] = {**asdict(self), "v": VERSION}
        del said["signature"]
        digests = hashlib.sha256(header.encode()).digest() + array_digest
        return _DOMAIN + digests + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def array_digest(array: Vector | Words) -> bytes:
    """SHA-256 of an array's type, length and bytes."""
    hashed = hashlib.sha256(f"{array.dtype.str} {array.size} ".encode())
    if array.size:  # An empty array has no memory to show.
        hashed.update(array.data)
    return hashed.digest()


def _is_well_formed(seal: Seal) -> bool:
    texts = (seal.kind, seal.sender, seal.recipient, seal.nonce, seal.signature)
    return (
        all(isinstance(text, str) for text in texts)
        and seal.kind in ("request", "answer")
        and re.fullmatch("[0-9a-f]{64}", seal.nonce) is not None
        and re.fullmatch("[0-9a-f]{128}", seal.signature) is not None
        and all(type(moment) is float and 0 <= moment < 2**33 for moment in (seal.time, seal.until))
    )

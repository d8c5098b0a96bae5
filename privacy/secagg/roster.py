"""The roster: who takes part, under which key, signed by everyone in it. The trust root against the server.

A server that hands out the participants' keys can hand out its own instead, and read every update. So the list is
made once, out of band: each participant signs it, and each client pins its hash in its own settings, where no server
reaches. A new member, key or name is a new version, signed again by all.

The file is JSON:

    {"body": {"federation": NAME, "format": "fedchorus roster 1", "members": [{"key": HEX, "name": NAME, "slot": N},
     ...], "version": N}, "signatures": {NAME: HEX, ...}}

The hash is the SHA-256 of the body's canonical form (`privacy.ledger.canonical`), members ascending by slot. A
signature is Ed25519 over "fedchorus roster v1 signature\\0" + that hash's 32 bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from privacy.durable import write_atomically
from privacy.errors import JobError, Refused
from privacy.keys import IdentityKey, is_signed_by
from privacy.ledger import SITE_NAME, digest_of

FORMAT = "fedchorus roster 1"
MAX_SLOT = 2**16 - 1
MAX_VERSION = 2**31 - 1
MAX_BYTES = 2**25  # All 65,535 slots take three quarters of it.
_KEY, _SIGNATURE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")
_SIGNATURE_DOMAIN = b"fedchorus roster v1 signature\0"


@dataclass(frozen=True)
class Member:
    """One participant: `slot` (1 to 2^16 - 1) is its number in every session, `key` its Ed25519 public key (hex).

    Raises `Refused` for a slot, name or key of another form.
    """

    slot: int
    name: str
    key: str

    def __post_init__(self) -> None:
        if type(self.slot) is not int or not 1 <= self.slot <= MAX_SLOT:
            raise Refused(f"roster: a slot must be a whole number in [1, {MAX_SLOT}]")
        if not _is(SITE_NAME, self.name):
            raise Refused(
                f"roster: slot {self.slot} has no name of up to 64 letters, digits, dots, dashes and underscores"
            )
        if not _is(_KEY, self.key):
            raise Refused(f"roster: {self.name}'s key must be 64 hexadecimal digits, lower case")


@dataclass(frozen=True)
class Roster:
    """The participants of `federation` and their signatures (hex, by name), as of `version` (from 1).

    Members are kept in the order of their slots. Slots, names and keys are distinct: nobody sits twice. Raises
    `Refused` for anything of another form, and for signatures by people who are not in it. A roster that was made is
    well-formed; that it can be trusted is for `check`.
    """

    federation: str
    version: int
    members: tuple[Member, ...]
    signatures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is(SITE_NAME, self.federation):
            raise Refused(
                "roster: its federation has no name of up to 64 letters, digits, dots, dashes and underscores"
            )
        if type(self.version) is not int or not 1 <= self.version <= MAX_VERSION:
            raise Refused(f"roster of {self.federation}: the version must be a whole number in [1, {MAX_VERSION}]")
        if not self.members:
            raise Refused(f"roster of {self.federation}: it has no members")
        for what in ("slot", "name", "key"):
            taken: dict[object, str] = {}
            for member in self.members:
                value = getattr(member, what)
                if value in taken:
                    raise Refused(f"roster of {self.federation}: {taken[value]} and {member.name} have the same {what}")
                taken[value] = member.name
        names = {member.name for member in self.members}
        for name, signature in self.signatures.items():
            if name not in names or not _is(_SIGNATURE, signature):
                raise Refused(
                    f"roster of {self.federation}: a signature is not by a member, or not 128 hexadecimal digits"
                )
        object.__setattr__(self, "members", tuple(sorted(self.members, key=lambda member: member.slot)))

    @property
    def body(self) -> dict[str, Any]:
        """What is hashed and signed."""
        members = [{"slot": member.slot, "name": member.name, "key": member.key} for member in self.members]
        return {"format": FORMAT, "federation": self.federation, "version": self.version, "members": members}

    @cached_property
    def hash(self) -> str:
        """What each client pins: SHA-256 of the body, 64 hexadecimal digits. Signatures do not change it."""
        return digest_of(self.body)

    def signed_by(self, identity: IdentityKey, name: str) -> Roster:
        """Add the signature of member `name`. Raises `Refused` if the roster has another key for that name."""
        if self.member(name).key != identity.public_hex:
            raise Refused(f"roster of {self.federation}: {name}'s key in it is not the identity key that would sign")
        return replace(self, signatures={**self.signatures, name: identity.sign(self._message).hex()})

    def check(self, pinned: str | None) -> None:
        """Return if every member has signed and the hash is the one `pinned`; raise `Refused`, naming who, if not.

        None, before a first pin, shows only that whoever has the keys agreed: anyone can make keys and sign with
        them. A key that is no point of the curve verifies nothing. One of small order, for which anyone can sign, has
        no honest owner and endangers nobody else: it is like a key that its owner gave away.
        """
        if pinned is not None and pinned != self.hash:
            raise Refused(
                f"roster of {self.federation}, version {self.version}: its hash is {self.hash}, the one pinned here is "
                f"{pinned}; ask the other sites, not the server, which is right"
            )
        for member in self.members:
            signature = self.signatures.get(member.name)
            if signature is None:
                raise Refused(f"roster of {self.federation}, version {self.version}: {member.name} has not signed it")
            if not is_signed_by(member.key, bytes.fromhex(signature), self._message):
                raise Refused(
                    f"roster of {self.federation}, version {self.version}: {member.name}'s signature is not over this "
                    "roster by this key"
                )

    def member(self, name: str) -> Member:
        """Find a member by name. Raises `Refused` for a stranger."""
        found = self._by_name.get(name)
        if found is None:
            raise Refused(f"roster of {self.federation}, version {self.version}: no member is called {name!r}")
        return found

    def slot(self, number: int) -> Member:
        """Find a member by slot. Raises `Refused` for a number that nobody has."""
        found = self._by_slot.get(number)
        if found is None:
            raise Refused(f"roster of {self.federation}, version {self.version}: no member has slot {number!r}")
        return found

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Read a roster; whether it can be trusted is for `check`.

        Raises `JobError` for a file that cannot be read, and `Refused` for one above 32 MiB, of another format, with a
        field too many, too few, twice or of a wrong type.
        """
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise JobError(f"{path}: the roster cannot be read ({error.strerror})") from None
        if len(data) > MAX_BYTES:
            raise Refused(f"{path}: a roster has at most {MAX_BYTES} bytes")
        try:
            record = json.loads(data, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError):
            raise Refused(f"{path}: not JSON in UTF-8 in which no field is given twice") from None
        return _parsed(record)

    def save(self, path: Path) -> None:
        """Write the roster to `path`, whole or not at all."""
        record = {"body": self.body, "signatures": dict(self.signatures)}
        write_atomically(path, json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")

    @cached_property
    def _message(self) -> bytes:
        return _SIGNATURE_DOMAIN + bytes.fromhex(self.hash)

    @cached_property
    def _by_name(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    @cached_property
    def _by_slot(self) -> dict[int, Member]:
        return {member.slot: member for member in self.members}


def _parsed(record: object) -> Roster:
    whole = _table(record, "body", "signatures")
    body = _table(whole["body"], "federation", "format", "members", "version")
    if body["format"] != FORMAT:
        raise Refused(f"roster: expected the format {FORMAT!r}; this program reads no other")
    if not isinstance(body["members"], list) or not isinstance(whole["signatures"], dict):
        raise Refused("roster: members must be a list, signatures a table by name")
    members = tuple(Member(**_table(member, "key", "name", "slot")) for member in body["members"])
    return Roster(body["federation"], body["version"], members, whole["signatures"])


def _table(value: object, *fields: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise Refused(f"roster: expected a table of exactly {', '.join(fields)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a field is given twice")
    return table


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None

"""The three documents of an enrolment. None is secret; each says who made it, and is compared over another channel.

    coordinator                              site
    Invitation  ---------------------------> whose fingerprint the coordinator reads out over the phone
                <--------------------------- EnrolmentRequest, whose fingerprint the site reads out
    Kit         ---------------------------> certificate and roster; the sites compare the members' key fingerprints

Each is JSON: {"body": {"format": ..., ...}, "signature": HEX}. A document's hash is the SHA-256 of its body's
canonical form (`privacy.ledger.canonical`); its signature is Ed25519 over its format + " signature\\0" + the hash's
32 bytes. A request names the hash of its invitation and a kit that of its request: neither fits another exchange.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self

from privacy.authority import Peer, authority_of, key_of_csr, make_csr, peer_of_pem
from privacy.errors import Refused
from privacy.keys import IdentityKey, TlsKey, is_signed_by
from privacy.ledger import SITE_NAME, digest_of
from privacy.secagg.roster import _SIGNATURE_DOMAIN as ROSTER_SIGNATURE
from privacy.secagg.roster import MAX_BYTES, Roster, _parsed, _without_repeats

_HEX_32, _HEX_64 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A body of named fields, signed by one identity key. Raises `Refused` for a field of another form."""

    FORMAT: ClassVar[str]
    MOST_BYTES: ClassVar[int] = 2**16

    signature: str = ""

    def __post_init__(self) -> None:
        if self.signature and not _is(_HEX_64, self.signature):
            raise self._odd("signature must be 128 hexadecimal digits, lower case")
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the body, 64 hexadecimal digits. The signature does not change it."""
        return digest_of(self._body)

    @property
    def fingerprint(self) -> str:
        """What two people compare over the phone."""
        return fingerprint(self.hash)

    def to_bytes(self) -> bytes:
        return json.dumps({"body": self._body, "signature": self.signature}, indent=1, sort_keys=True).encode() + b"\n"

    @property
    def _body(self) -> dict[str, Any]:
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "signature"}
        return {"format": self.FORMAT, **{key: _plain(value) for key, value in named.items()}}

    @property
    def _message(self) -> bytes:
        return f"{self.FORMAT} signature\0".encode() + bytes.fromhex(self.hash)

    def _signed(self, identity: IdentityKey) -> Self:
        return replace(self, signature=identity.sign(self._message).hex())

    def _check_signed(self, public_hex: str, whose: str) -> None:
        if not is_signed_by(public_hex, bytes.fromhex(self.signature), self._message):
            raise self._odd(f"not signed by {whose}, or changed after it was; ask for it again")

    @classmethod
    def _read(cls, data: bytes) -> Self:
        """Parse strictly: bounded, no field twice, exactly the known ones. The signature is the caller's to check."""
        if len(data) > cls.MOST_BYTES:
            raise cls._odd(f"more than {cls.MOST_BYTES} bytes")
        try:
            record = json.loads(data, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError):
            raise cls._odd("not JSON in UTF-8 in which no field is given twice") from None
        if not isinstance(record, dict) or set(record) != {"body", "signature"} or not isinstance(record["body"], dict):
            raise cls._odd("expected a table of exactly body and signature: is this another file?")
        body = record["body"]
        if body.get("format") != cls.FORMAT:
            raise cls._odd(f"expected the format {cls.FORMAT!r}; this program reads no other")
        names = {item.name for item in fields(cls)} - {"signature"}
        if set(body) != names | {"format"}:
            raise cls._odd(f"expected exactly the fields {', '.join(sorted(names))}")
        if not _is(_HEX_64, record["signature"]):
            raise cls._odd("signature must be 128 hexadecimal digits, lower case")
        return cls(**{name: body[name] for name in names}, signature=record["signature"])

    @classmethod
    def _odd(cls, why: str) -> Refused:
        return Refused(f"{cls.FORMAT.split()[1]}: {why}")

    def _need(self, pattern: re.Pattern[str], **values: object) -> None:
        for name, value in values.items():
            if not _is(pattern, value):
                what = "a name" if pattern is SITE_NAME else "64 hexadecimal digits, lower case"
                raise self._odd(f"{name} must be {what}")


@dataclass(frozen=True, kw_only=True)
class Invitation(_Document):
    """How to reach a federation and whom to believe: what a site needs before it asks to join.

    `address` is the server's "host:port", `authority` the certificate of the coordinator's authority (PEM),
    `coordinator` its identity key (hex). `required` of the `approvers` (hex keys by name) sign each job.
    """

    FORMAT = "fedchorus invitation 1"

    federation: str
    address: str
    authority: str
    coordinator: str
    approvers: Mapping[str, str] = field(default_factory=dict)
    required: int = 0

    def _check(self) -> None:
        self._need(SITE_NAME, federation=self.federation)
        self._need(_HEX_32, coordinator=self.coordinator)
        split_address(self.address)
        authority_of(_ascii(self.authority))
        if not isinstance(self.approvers, Mapping):
            raise self._odd("approvers must be keys by name")
        for name, key in self.approvers.items():
            self._need(SITE_NAME, approver=name)
            self._need(_HEX_32, **{f"approver {name}": key})
        if len(set(self.approvers.values())) != len(self.approvers):
            raise self._odd("two approvers have the same key")
        if type(self.required) is not int or not 0 <= self.required <= len(self.approvers):
            raise self._odd(f"required must be a whole number in [0, {len(self.approvers)}], the number of approvers")

    def signed(self, identity: IdentityKey) -> Invitation:
        """Sign as the coordinator. Raises `Refused` for another key than the one that it names."""
        if identity.public_hex != self.coordinator:
            raise self._odd("it names another coordinator than the key that would sign it")
        return self._signed(identity)

    @classmethod
    def parse(cls, data: bytes) -> Invitation:
        """Read an invitation. It proves only that it is whole: anyone can make one. Compare its fingerprint."""
        invitation = cls._read(data)
        invitation._check_signed(invitation.coordinator, "the coordinator that it names")
        return invitation


@dataclass(frozen=True, kw_only=True)
class EnrolmentRequest(_Document):
    """A site asks to join under its own two keys: `csr` (PEM) has the TLS key, `identity` (hex) is the identity key."""

    FORMAT = "fedchorus request 1"

    federation: str
    site: str
    csr: str
    identity: str
    nonce: str
    invitation: str

    def _check(self) -> None:
        self._need(SITE_NAME, federation=self.federation, site=self.site)
        self._need(_HEX_32, identity=self.identity, nonce=self.nonce, invitation=self.invitation)
        key_of_csr(_ascii(self.csr), self.site)

    @classmethod
    def make(cls, invitation: Invitation, site: str, *, identity: IdentityKey, tls: TlsKey) -> EnrolmentRequest:
        """Ask to join as `site`, in answer to `invitation`; signed over all of it by the identity key."""
        return cls(
            federation=invitation.federation,
            site=site,
            csr=make_csr(tls, site).decode(),
            identity=identity.public_hex,
            nonce=secrets.token_hex(32),
            invitation=invitation.hash,
        )._signed(identity)

    @classmethod
    def parse(cls, data: bytes, invitation: Invitation) -> EnrolmentRequest:
        """Read a request in answer to `invitation`.

        Guarantee: whoever made it holds both keys, and made them sign this name, federation and invitation. That this
        is the site of that name shows its fingerprint alone. Raises `Refused` for anything else.
        """
        request = cls._read(data)
        request._check_signed(request.identity, "the identity key that it names")
        if (request.federation, request.invitation) != (invitation.federation, invitation.hash):
            raise cls._odd(f"{request.site} answers another invitation; send it this federation's and ask it to enrol")
        return request


@dataclass(frozen=True, kw_only=True)
class Kit(_Document):
    """What a site receives: its certificate (PEM) and the roster with the signatures that there are so far."""

    FORMAT = "fedchorus kit 1"
    MOST_BYTES = MAX_BYTES + 2**16

    federation: str
    site: str
    certificate: str
    request: str
    roster: Mapping[str, Any]

    def _check(self) -> None:
        self._need(SITE_NAME, federation=self.federation, site=self.site)
        self._need(_HEX_32, request=self.request)
        _ascii(self.certificate)
        if self.participants.federation != self.federation:
            raise self._odd("its roster is of another federation")
        self.participants.member(self.site)

    @cached_property
    def participants(self) -> Roster:
        return _parsed(self.roster)

    @classmethod
    def make(cls, coordinator: IdentityKey, *, site: str, certificate: bytes, request: str, roster: Roster) -> Kit:
        """Answer the request of hash `request`; signed by the coordinator."""
        record = {"body": roster.body, "signatures": dict(roster.signatures)}
        return cls(
            federation=roster.federation, site=site, certificate=certificate.decode(), request=request, roster=record
        )._signed(coordinator)

    @classmethod
    def parse(cls, data: bytes, request: EnrolmentRequest, invitation: Invitation) -> Kit:
        """Read the kit that answers `request`, and hold it to the site's own request and invitation.

        Guarantee: the coordinator of the invitation made it for this request; its certificate is one of the
        invitation's authority in this site's name; its roster has the site under the request's identity key. Raises
        `Refused` for anything else. That the certificate is for the TLS key here is for whoever has that key to see.
        """
        kit = cls._read(data)
        kit._check_signed(invitation.coordinator, "the coordinator of the invitation")
        if (kit.federation, kit.site) != (request.federation, request.site):
            raise cls._odd(f"it is for {kit.site} of {kit.federation}, this is {request.site} of {request.federation}")
        if kit.request != request.hash:
            raise cls._odd(f"it answers another request of {kit.site} than the one here; send the coordinator this one")
        if kit.peer(invitation).site != kit.site:
            raise cls._odd("its certificate is another site's; tell the coordinator")
        if kit.participants.member(kit.site).key != request.identity:
            raise cls._odd(f"its roster has another identity key for {kit.site} than this site's; do not go on")
        return kit

    def peer(self, invitation: Invitation) -> Peer:
        """Who the certificate is for. Raises `Refused` unless the invitation's authority issued it."""
        return peer_of_pem(_ascii(self.certificate), authority=authority_of(_ascii(invitation.authority)))


def fingerprint(digest: str) -> str:
    """Shorten a SHA-256 (hex) to its first 160 bits, in ten groups of four digits that can be read over the phone."""
    return " ".join(digest[start : start + 4] for start in range(0, 40, 4))


def key_fingerprint(public_hex: str) -> str:
    """The fingerprint of an identity key: of the SHA-256 of its 32 bytes."""
    return fingerprint(hashlib.sha256(bytes.fromhex(public_hex)).hexdigest())


def is_fingerprint(given: str, expected: str) -> bool:
    """Whether a person typed `expected`, whatever its capitals, spaces, dashes and colons. A part of it is not it."""
    digits = re.sub(r"[\s:-]", "", given).lower()
    return hmac.compare_digest(digits.encode(), expected.replace(" ", "").encode())


def with_signatures(roster: Roster, signatures: Mapping[str, str]) -> Roster:
    """Add others' signatures (hex, by name) to a roster. Raises `Refused` for one that its member did not make."""
    added = replace(roster, signatures={**roster.signatures, **signatures})
    for name, signature in signatures.items():
        message = ROSTER_SIGNATURE + bytes.fromhex(roster.hash)
        if not is_signed_by(roster.member(name).key, bytes.fromhex(signature), message):
            raise Refused(f"roster of {roster.federation}, version {roster.version}: {name} did not sign this one")
    return added


def split_address(address: object) -> tuple[str, int]:
    """Take "host:port" apart; an IPv6 address stands in brackets. Raises `Refused` for anything else."""
    host, colon, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if colon and port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535:
        if host.startswith("[") and host.endswith("]") and _is_ip(host[1:-1], 6):
            return host[1:-1], int(port)
        if _is_ip(host, 4) or (_HOST_NAME.fullmatch(host) and not host.rpartition(".")[2].isdigit()):
            return host, int(port)
    raise Refused(f'address: expected "host:port" with a port in [1, 65535], got {str(address)[:80]!r}')


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _ascii(text: object) -> bytes:
    if not isinstance(text, str) or not text.isascii():
        raise Refused("enrolment: a certificate or signing request must be text in PEM form")
    return text.encode()


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None

"""The coordinator's certificate authority: who may open a TLS connection as which site, until when.

X.509 v3 (RFC 5280), ECDSA on P-256 with SHA-256 throughout. A site's certificate says its name (CN), that it is for
clients alone (extended key usage) and is short-lived; its key is the site's Flower node key too. The TLS layer checks
the chain and the dates when a connection opens; `peer_of` reads who it is, and `Revocations` says, at every call,
whether that still holds.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy.durable import write_atomically
from privacy.errors import Refused
from privacy.keys import TlsKey
from privacy.ledger import SITE_NAME

BACKDATED = timedelta(minutes=5)  # So that a site whose clock is a little behind can use its certificate at once.
AUTHORITY_DAYS = 3650
MOST_BYTES = 2**14  # Of a certificate or a signing request.
REVOCATIONS_FORMAT = "fedchorus revocations 1"
_ODD = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Peer:
    """Who a client certificate is for. `public_bytes` is its key as Flower keeps it (`TlsKey.public_bytes`)."""

    site: str
    serial: int
    not_before: datetime
    not_after: datetime
    public_bytes: bytes

    @property
    def serial_hex(self) -> str:
        return f"{self.serial:x}"


class Authority:
    """The key that signs certificates, and its own certificate (`ca.key` and `ca.pem` in one folder)."""

    def __init__(self, key: TlsKey, certificate: x509.Certificate) -> None:
        self._key, self.certificate = key, certificate

    @classmethod
    def create(cls, folder: Path, federation: str, *, now: datetime, passphrase: bytes | None = None) -> Authority:
        """Make an authority for ten years and write both files. Never overwrites one."""
        key = TlsKey.create(folder / "ca.key", passphrase)
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                x509.NameAttribute(NameOID.COMMON_NAME, "fedchorus authority"),
            ]
        )
        builder = _builder(name, name, key.private.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        certificate = builder.sign(key.private, SHA256())
        write_atomically(folder / "ca.pem", certificate.public_bytes(Encoding.PEM))
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path, passphrase: bytes | None = None) -> Authority:
        """Read an authority. Raises `LedgerError` for a key, `Refused` for a certificate that is not its own."""
        key = TlsKey.load(folder / "ca.key", passphrase)
        try:
            certificate = authority_of((folder / "ca.pem").read_bytes())
        except OSError as error:
            raise Refused(f"{folder / 'ca.pem'}: cannot be read ({error.strerror}); restore it from a backup") from None
        if public_pem(certificate.public_key()) != key.public_bytes:
            raise Refused(f"{folder}: ca.pem is not the certificate of ca.key; restore both from one backup")
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue_server(self, key: TlsKey, hosts: Sequence[str], *, days: float, now: datetime) -> bytes:
        """Certify `key` for a server that is reached as `hosts` (names and IP addresses); return PEM."""
        names = [_general_name(host) for host in hosts]
        builder = self._leaf(hosts[0][:64], key.private.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, days, now)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key.private, SHA256()).public_bytes(Encoding.PEM)

    def issue_client(self, csr_pem: bytes, *, site: str, days: float, now: datetime) -> bytes:
        """Certify the key of a signing request for `site`; return PEM.

        Of the request only the name, which must be `site`, and the key count. Raises `Refused` for any other.
        """
        key = key_of_csr(csr_pem, site)
        builder = self._leaf(site, key, ExtendedKeyUsageOID.CLIENT_AUTH, days, now)
        return builder.sign(self._key.private, SHA256()).public_bytes(Encoding.PEM)

    def renew(self, csr_pem: bytes, *, peer: Peer, days: float, now: datetime) -> bytes:
        """Certify a key, the same or a new one, for the site that asks over a connection of its own; return PEM.

        Raises `Refused` for a request in another name and for a peer whose certificate is not valid now. Whether the
        peer was revoked is the caller's to ask first.
        """
        if not peer.not_before <= now <= peer.not_after:
            raise Refused(
                f"{peer.site}: its certificate is not valid now; send the coordinator a new enrolment request"
            )
        return self.issue_client(csr_pem, site=peer.site, days=days, now=now)

    def _leaf(
        self, name: str, key: EllipticCurvePublicKey, purpose: x509.ObjectIdentifier, days: float, now: datetime
    ) -> x509.CertificateBuilder:
        until = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        if until <= now:
            raise Refused("the certificate authority has expired, or a certificate would have no day; provision anew")
        organisation = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        subject = x509.Name([*organisation, x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.private.public_key())
        return (
            _builder(subject, self.certificate.subject, key, now, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(issuer, critical=False)
        )


def make_csr(key: TlsKey, site: str) -> bytes:
    """Ask for a certificate of `key` in the name of `site` (PKCS#10, RFC 2986, in PEM)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key.private, SHA256())
        .public_bytes(Encoding.PEM)
    )


def key_of_csr(pem: bytes, site: str) -> EllipticCurvePublicKey:
    """The key of a signing request that its own private half signed, in the name of `site`; else `Refused`."""
    if len(pem) > MOST_BYTES:
        raise Refused(f"signing request of {site}: more than {MOST_BYTES} bytes")
    try:
        csr = x509.load_pem_x509_csr(pem)
        key, valid, name = csr.public_key(), csr.is_signature_valid, _common_name(csr.subject)
    except _ODD:
        raise Refused(f"signing request of {site}: not one of X.509 in PEM form") from None
    if not valid:
        raise Refused(f"signing request of {site}: it is not signed by its own key; make a new one")
    if name != site:
        raise Refused(f"signing request of {site}: it is in the name of another site")
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise Refused(f"signing request of {site}: expected a P-256 key, found another kind")
    return key


def peer_of(der: bytes) -> Peer:
    """Read who a client certificate is for. Raises `Refused` for anything that `Authority.issue_client` never makes.

    Neither the chain nor the dates are checked here: the TLS layer did when the connection opened, and whoever keeps
    connections open compares `not_after` with the clock.
    """
    if len(der) > MOST_BYTES:
        raise Refused(f"client certificate: more than {MOST_BYTES} bytes")
    try:
        return _peer(x509.load_der_x509_certificate(der))
    except _ODD:
        raise Refused("client certificate: not one of X.509 in DER form") from None


def peer_of_pem(pem: bytes, *, authority: x509.Certificate) -> Peer:
    """Read who a client certificate in a file is for, and check that `authority` issued it. Raises `Refused`."""
    certificate = _load_pem(pem, "certificate")
    _check_issued(certificate, authority, "certificate")
    try:
        return _peer(certificate)
    except _ODD:
        raise Refused("client certificate: not one of X.509 in PEM form") from None


def authority_of(pem: bytes) -> x509.Certificate:
    """Read the certificate of an authority: self-signed, P-256, marked as one. Raises `Refused`."""
    certificate = _load_pem(pem, "authority's certificate")
    _check_issued(certificate, certificate, "authority's certificate")
    try:
        extensions = certificate.extensions
        marked = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except (*_ODD, x509.ExtensionNotFound):
        marked = usage = False
    if not marked or not usage:
        raise Refused("authority's certificate: it may not sign certificates")
    return certificate


class Revocations:
    """Which sites, certificates and identity keys are no longer let in: one JSON file, read again when it changes.

    A revoked site stays out under every certificate; a revoked serial number or identity key stays so for ever, also
    when the site is admitted again. Fails closed: a missing or damaged file raises `Refused`, so nobody is let in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_at: tuple[int, int, int] | None = None
        self._lines: list[dict[str, str]] = []
        self._revoked: set[tuple[str, str]] = set()
        self._reading = threading.Lock()

    @classmethod
    def create(cls, path: Path) -> Revocations:
        """Write an empty list, where there is none."""
        revocations = cls(path)
        if not path.exists():
            revocations._write([])
        return revocations

    def is_revoked(self, peer: Peer) -> bool:
        """Whether the site or this one certificate of it is revoked, as the file says now."""
        return bool({("site", peer.site), ("serial", peer.serial_hex)} & self._now())

    def is_site_revoked(self, site: str) -> bool:
        return ("site", site) in self._now()

    def is_key_revoked(self, public_hex: str) -> bool:
        """Whether an identity key is revoked."""
        return ("key", public_hex) in self._now()

    def add(
        self,
        *,
        site: str | None = None,
        serials: Iterable[str] = (),
        key: str | None = None,
        reason: str,
        now: datetime,
    ) -> None:
        """Revoke a site, serial numbers (`Peer.serial_hex`) and an identity key (hex), durable when this returns."""
        new = [("serial", serial) for serial in serials]
        new += [(what, value) for what, value in (("site", site), ("key", key)) if value is not None]
        known, time = self._now(), now.astimezone(UTC).isoformat(timespec="seconds")
        lines = [{"what": what, "value": value, "reason": reason, "time": time} for what, value in new]
        self._write([*self._lines, *(line for line in lines if (line["what"], line["value"]) not in known)])

    def readmit(self, site: str) -> None:
        """Let a site in again, under other certificates and another identity key."""
        self._now()
        self._write([line for line in self._lines if (line["what"], line["value"]) != ("site", site)])

    def _now(self) -> set[tuple[str, str]]:
        with self._reading:
            try:
                found = self.path.stat()
                at = (found.st_mtime_ns, found.st_size, found.st_ino)
                if at != self._read_at:
                    self._lines = _revoked_lines(json.loads(self.path.read_bytes()))
                    self._revoked = {(line["what"], line["value"]) for line in self._lines}
                    self._read_at = at
            except (OSError, ValueError, RecursionError):
                self._read_at = None
                raise Refused(
                    f"{self.path}: the list of revocations is missing or damaged; nobody is let in until it is "
                    "restored from a backup"
                ) from None
            return self._revoked

    def _write(self, lines: Sequence[dict[str, str]]) -> None:
        record = {"format": REVOCATIONS_FORMAT, "revoked": list(lines)}
        write_atomically(self.path, json.dumps(record, indent=1).encode() + b"\n")


def _revoked_lines(record: Any) -> list[dict[str, str]]:
    if not isinstance(record, dict) or set(record) != {"format", "revoked"} or record["format"] != REVOCATIONS_FORMAT:
        raise ValueError("not a list of revocations")
    if not isinstance(record["revoked"], list):
        raise ValueError("not a list of revocations")
    for line in record["revoked"]:
        if not isinstance(line, dict) or set(line) != {"what", "value", "reason", "time"}:
            raise ValueError("not a revocation")
        if line["what"] not in ("site", "serial", "key") or not all(isinstance(value, str) for value in line.values()):
            raise ValueError("not a revocation")
    return record["revoked"]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - BACKDATED).astimezone(UTC).replace(microsecond=0))
        .not_valid_after(until.astimezone(UTC).replace(microsecond=0))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _load_pem(pem: bytes, what: str) -> x509.Certificate:
    if len(pem) > MOST_BYTES:
        raise Refused(f"{what}: more than {MOST_BYTES} bytes")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except _ODD:
        raise Refused(f"{what}: not one of X.509 in PEM form") from None
    if len(certificates) != 1:
        raise Refused(f"{what}: expected one certificate, found {len(certificates)}")
    return certificates[0]


def _check_issued(certificate: x509.Certificate, authority: x509.Certificate, what: str) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
        key = authority.public_key()
    except (InvalidSignature, *_ODD):
        raise Refused(f"{what}: it was not issued by this federation's authority") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise Refused(f"{what}: its authority has no P-256 key")


def _peer(certificate: x509.Certificate) -> Peer:
    def odd(why: str) -> Refused:
        return Refused(f"client certificate: {why}")

    name, key, extensions = _common_name(certificate.subject), certificate.public_key(), certificate.extensions
    if name is None or not SITE_NAME.fullmatch(name):
        raise odd("its subject is not one site's name")
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise odd("expected a P-256 key, found another kind")
    try:
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        is_authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        raise odd("it does not say what it is for") from None
    if usages != [ExtendedKeyUsageOID.CLIENT_AUTH] or is_authority:
        raise odd("it is not for a client")
    return Peer(
        site=name,
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        public_bytes=public_pem(key),
    )


def _common_name(subject: x509.Name) -> str | None:
    names = [attribute.value for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return names[0] if len(names) == 1 and isinstance(names[0], str) else None


def public_pem(key: Any) -> bytes:
    """A public key as Flower keeps it: SubjectPublicKeyInfo in PEM."""
    pem: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem

"""Certificates of any shape, self-signed, for what must be refused."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HASH = hashes.SHA256()


def certificate(
    key: EllipticCurvePrivateKey | Ed25519PrivateKey,
    *,
    names: Sequence[str] = ("north",),
    usages: Sequence[x509.ObjectIdentifier] | None = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    ca: bool | None = False,
    hash_: hashes.SHA256 | None = HASH,
) -> bytes:
    """One in PEM that `key` signed itself; without `usages` or `ca` the extension is not there."""
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(key, hash_).public_bytes(Encoding.PEM)

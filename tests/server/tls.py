"""Certificates, a server in a thread and clients over loopback, for the tests of the listeners and the guard."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.listen import App, Limits, Listeners, PublicListener

PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Issued:
    certificate: Path
    key: Path
    der: bytes
    public_bytes: bytes
    private: ec.EllipticCurvePrivateKey


class Authority:
    """A certificate authority in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.pem = folder / "ca.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        certificate = self._builder(self._name, self._key, days=30).add_extension(constraints, critical=True)
        self.pem.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(PEM))

    def issue(self, name: str, *, server: bool = False, days: int = 30) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._builder(subject, key, days=days).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if server:
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        paths = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(PEM))
        form = serialization.PrivateFormat.PKCS8
        paths[1].write_bytes(key.private_bytes(PEM, form, serialization.NoEncryption()))
        public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return Issued(*paths, certificate.public_bytes(serialization.Encoding.DER), public, key)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int) -> x509.CertificateBuilder:
        start = datetime.now(UTC) + timedelta(days=min(days, 0) - 1)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(datetime.now(UTC) + timedelta(days=days))
        )


@contextmanager
def serving(
    app: App, authority: Authority, server: Issued, *, limits: Limits | None = None, loopback: bool = True
) -> Iterator[Listeners]:
    """Serve `app` in a thread, on free ports."""
    public = PublicListener(
        certificate=server.certificate, key=server.key, client_authority=authority.pem, host="127.0.0.1", port=0
    )
    listeners = Listeners(app, public=public, loopback=loopback, limits=limits)
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            listeners.serve()
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        while not listeners.started.wait(0.05):
            assert thread.is_alive(), failures
        yield listeners
    finally:
        listeners.stop()
        thread.join(20)
        assert not thread.is_alive()


def context_of(authority: Authority, identity: Issued | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.pem))
    if identity is not None:
        context.load_cert_chain(identity.certificate, identity.key)
    return context


def client_of(listeners: Listeners, authority: Authority, identity: Issued | None = None) -> httpx.Client:
    """A client of the public listener, with `identity`'s certificate if one is given."""
    url = f"https://127.0.0.1:{listeners.ports['public']}"
    return httpx.Client(base_url=url, verify=context_of(authority, identity), timeout=10, trust_env=False)


def loopback_of(listeners: Listeners) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{listeners.ports['loopback']}", timeout=10, trust_env=False)

"""Certificates let in exactly the sites that they were issued to, in real TLS handshakes; and revocation ends that."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.authority import (
    BACKDATED,
    Authority,
    Peer,
    Revocations,
    authority_of,
    key_of_csr,
    make_csr,
    peer_of,
    peer_of_pem,
)
from privacy.errors import LedgerError, Refused
from privacy.keys import TlsKey
from tests.privacy.certificates import certificate

NOW = datetime.now(UTC).replace(microsecond=0)
KEY = TlsKey(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"), "cancer", now=NOW)


def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


class TestIssues:
    @pytest.mark.parametrize("site", ["north", "a", "St.Mary-2_b", "x" * 64])
    def test_a_client_certificate_that_names_the_site_its_key_and_its_days(
        self, authority: Authority, site: str
    ) -> None:
        peer = peer_of(der(authority.issue_client(make_csr(KEY, site), site=site, days=30, now=NOW)))
        assert (peer.site, peer.public_bytes) == (site, KEY.public_bytes)
        assert (peer.not_before, peer.not_after) == (NOW - BACKDATED, NOW + timedelta(days=30))
        assert int(peer.serial_hex, 16) == peer.serial

    def test_another_serial_number_each_time(self, authority: Authority) -> None:
        csr = make_csr(KEY, "north")
        serials = {peer_of(der(authority.issue_client(csr, site="north", days=1, now=NOW))).serial for _ in range(20)}
        assert len(serials) == 20
        assert min(serial.bit_length() for serial in serials) > 64

    def test_nothing_that_outlives_the_authority_itself(self, authority: Authority) -> None:
        pem = authority.issue_client(make_csr(KEY, "north"), site="north", days=9999, now=NOW)
        assert peer_of(der(pem)).not_after == authority.certificate.not_valid_after_utc
        with pytest.raises(Refused, match="has expired"):
            authority.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW + timedelta(days=3651))

    def test_no_certificate_without_a_day(self, authority: Authority) -> None:
        with pytest.raises(Refused, match="would have no day"):
            authority.issue_client(make_csr(KEY, "north"), site="north", days=0, now=NOW)

    def test_nothing_in_another_name_than_the_request_s(self, authority: Authority) -> None:
        with pytest.raises(Refused, match="in the name of another site"):
            authority.issue_client(make_csr(KEY, "south"), site="north", days=1, now=NOW)

    def test_what_a_request_asks_for_besides_name_and_key_is_left_out(self, authority: Authority) -> None:
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")]))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(KEY.private, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )
        pem = authority.issue_client(csr, site="north", days=1, now=NOW)
        assert peer_of(der(pem)).site == "north"  # Refuses certificates for authorities and servers.

    def test_renewals_to_the_same_site_alone_with_the_same_key_or_a_new_one(self, authority: Authority) -> None:
        peer = peer_of(der(authority.issue_client(make_csr(KEY, "north"), site="north", days=30, now=NOW)))
        later, other = NOW + timedelta(days=20), TlsKey(ec.generate_private_key(ec.SECP256R1()))
        for key in (KEY, other):
            renewed = peer_of(der(authority.renew(make_csr(key, "north"), peer=peer, days=30, now=later)))
            assert (renewed.site, renewed.public_bytes) == ("north", key.public_bytes)
            assert renewed.not_after == later + timedelta(days=30)
            assert renewed.serial != peer.serial
        with pytest.raises(Refused, match="in the name of another site"):
            authority.renew(make_csr(KEY, "south"), peer=peer, days=30, now=later)

    @pytest.mark.parametrize("days", [-1, 31])
    def test_no_renewal_outside_the_days_of_the_old_certificate(self, authority: Authority, days: int) -> None:
        peer = peer_of(der(authority.issue_client(make_csr(KEY, "north"), site="north", days=30, now=NOW)))
        with pytest.raises(Refused, match="not valid now"):
            authority.renew(make_csr(KEY, "north"), peer=peer, days=30, now=NOW + timedelta(days=days))


class TestAuthority:
    def test_is_the_same_after_a_restart_and_its_key_is_its_owner_s_alone(self, tmp_path: Path) -> None:
        made = Authority.create(tmp_path, "cancer", now=NOW, passphrase=b"secret")
        assert Authority.load(tmp_path, b"secret").pem == made.pem
        assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600
        with pytest.raises(LedgerError, match="passphrase"):
            Authority.load(tmp_path)

    def test_is_not_overwritten(self, tmp_path: Path) -> None:
        made = Authority.create(tmp_path, "cancer", now=NOW)
        with pytest.raises(FileExistsError):
            Authority.create(tmp_path, "cancer", now=NOW)
        assert Authority.load(tmp_path).pem == made.pem

    def test_is_refused_with_another_s_certificate_or_none(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            Authority.create(tmp_path / name, "cancer", now=NOW)
        os.replace(tmp_path / "two" / "ca.pem", tmp_path / "one" / "ca.pem")
        with pytest.raises(Refused, match=r"ca\.pem is not the certificate of ca\.key"):
            Authority.load(tmp_path / "one")
        with pytest.raises(Refused, match="restore it from a backup"):
            Authority.load(tmp_path / "two")

    def test_is_no_site_s_certificate_nor_a_self_made_one_without_the_mark(self, authority: Authority) -> None:
        leaf = authority.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW)
        with pytest.raises(Refused, match="not issued by"):
            authority_of(leaf)
        with pytest.raises(Refused, match="may not sign certificates"):
            authority_of(certificate(KEY.private, ca=False))
        with pytest.raises(Refused, match="expected one certificate, found 2"):
            authority_of(authority.pem * 2)
        assert authority_of(authority.pem) == authority.certificate


P384 = ec.generate_private_key(ec.SECP384R1())


class TestPeerOf:
    @pytest.mark.parametrize(
        ("pem", "expected"),
        [
            (certificate(KEY.private, names=[]), "not one site's name"),
            (certificate(KEY.private, names=["north", "south"]), "not one site's name"),
            (certificate(KEY.private, names=["../north"]), "not one site's name"),
            (certificate(KEY.private, names=["north\n"]), "not one site's name"),
            (certificate(P384), "expected a P-256 key"),
            (certificate(ed25519.Ed25519PrivateKey.generate(), hash_=None), "expected a P-256 key"),
            (certificate(KEY.private, usages=None), "does not say what it is for"),
            (certificate(KEY.private, ca=None), "does not say what it is for"),
            (certificate(KEY.private, usages=[ExtendedKeyUsageOID.SERVER_AUTH]), "not for a client"),
            (
                certificate(KEY.private, usages=[ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                "not for a client",
            ),
            (certificate(KEY.private, usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), "not for a client"),
            (certificate(KEY.private, ca=True), "not for a client"),
        ],
    )
    def test_refuses_whatever_the_authority_never_makes(self, pem: bytes, expected: str) -> None:
        assert peer_of(der(certificate(KEY.private))).site == "north"
        with pytest.raises(Refused, match=expected):
            peer_of(der(pem))

    @pytest.mark.parametrize("data", [b"", b"0", b"\x30\x82", bytes(100), b"x" * 2**14, b"x" * (2**14 + 1)])
    def test_refuses_what_is_no_certificate(self, data: bytes) -> None:
        with pytest.raises(Refused, match="client certificate"):
            peer_of(data)

    @settings(max_examples=300, deadline=None)
    @given(where=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.integers(0, 40))
    @pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
    def test_reads_or_refuses_any_damaged_certificate(self, where: int, flip: int, cut: int) -> None:
        data = bytearray(DAMAGED)
        data[where % len(data)] ^= flip
        with contextlib.suppress(Refused):
            peer_of(bytes(data[: len(data) - cut // 4]))

    def test_of_a_file_sees_who_issued_it(self, authority: Authority) -> None:
        good = authority.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW)
        assert peer_of_pem(good, authority=authority.certificate) == peer_of(der(good))
        for bad in (certificate(KEY.private), b"", b"x" * 2**15, good + good):
            with pytest.raises(Refused, match="certificate"):
                peer_of_pem(bad, authority=authority.certificate)
        server = authority.issue_server(KEY, ["localhost"], days=1, now=NOW)
        with pytest.raises(Refused, match="not for a client"):
            peer_of_pem(server, authority=authority.certificate)


DAMAGED = der(certificate(KEY.private))


class TestSigningRequest:
    def test_shows_its_key(self) -> None:
        assert key_of_csr(make_csr(KEY, "north"), "north") == KEY.private.public_key()

    @pytest.mark.parametrize(
        ("pem", "expected"),
        [
            (b"", "not one of X.509"),
            (b"x" * (2**14 + 1), "more than"),
            (make_csr(KEY, "south"), "in the name of another site"),
            (make_csr(KEY, "north")[:-60] + b"\n-----END CERTIFICATE REQUEST-----\n", "not one of X.509"),
            (make_csr(TlsKey(P384), "north"), "expected a P-256 key"),
        ],
    )
    def test_of_another_form_is_refused(self, pem: bytes, expected: str) -> None:
        with pytest.raises(Refused, match=expected):
            key_of_csr(pem, "north")

    def test_that_its_own_key_did_not_sign_is_refused(self) -> None:
        altered = x509.load_pem_x509_csr(make_csr(KEY, "north")).public_bytes(Encoding.DER).replace(b"north", b"south")
        pem = ssl.DER_cert_to_PEM_cert(altered).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
        with pytest.raises(Refused, match="not signed by its own key"):
            key_of_csr(pem, "south")


class Tls:
    """A server and one client that shake hands over loopback, as strictly as OpenSSL can."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder, self.authority = folder, authority
        (folder / "ca.pem").write_bytes(authority.pem)
        key = TlsKey.create(folder / "server.key")
        self.server = self.context(ssl.PROTOCOL_TLS_SERVER)
        (folder / "server.pem").write_bytes(authority.issue_server(key, ["localhost", "127.0.0.1"], days=1, now=NOW))
        self.server.load_cert_chain(folder / "server.pem", folder / "server.key")
        self.server.verify_mode = ssl.CERT_REQUIRED

    def context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(self.folder / "ca.pem")
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    def client(self, key: TlsKey, certificate: bytes) -> ssl.SSLContext:
        from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

        (self.folder / "client.key").write_bytes(
            key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (self.folder / "client.pem").write_bytes(certificate)
        context = self.context(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(self.folder / "client.pem", self.folder / "client.key")
        return context

    def handshake(self, client: ssl.SSLContext, host: str = "localhost") -> Peer:
        """Who the server saw; raises what the server's side of the handshake raised, else the client's."""
        ended: list[Peer | Exception] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                connection, _ = listener.accept()
                try:
                    with self.server.wrap_socket(connection, server_side=True) as secure:
                        seen = secure.getpeercert(binary_form=True)
                        secure.sendall(b"!")
                        ended.append(peer_of(seen or b""))
                except Exception as error:  # noqa: BLE001 - handed to the caller's thread.
                    ended.append(error)

            thread = threading.Thread(target=serve)
            thread.start()
            failed: Exception | None = None
            with socket.create_connection(listener.getsockname(), timeout=10) as raw:
                try:
                    with client.wrap_socket(raw, server_hostname=host) as secure:
                        secure.recv(1)
                except OSError as error:
                    failed = error
            thread.join(10)
        (end,) = ended
        if isinstance(end, Exception):
            raise failed if isinstance(failed, ssl.SSLCertVerificationError) else end
        return end


@pytest.fixture
def tls(tmp_path: Path, authority: Authority) -> Tls:
    return Tls(tmp_path, authority)


class TestMutualTls:
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
    def test_lets_a_site_in_under_its_name_and_shows_it_the_server(
        self, tls: Tls, authority: Authority, host: str
    ) -> None:
        pem = authority.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW)
        assert tls.handshake(tls.client(KEY, pem), host) == peer_of(der(pem))

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_works_in_both_versions_of_tls(self, tls: Tls, authority: Authority, version: ssl.TLSVersion) -> None:
        client = tls.client(KEY, authority.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW))
        client.maximum_version = client.minimum_version = version
        assert tls.handshake(client).site == "north"

    def test_refuses_a_certificate_of_a_foreign_authority(self, tls: Tls, tmp_path: Path) -> None:
        foreign = Authority.create(tmp_path / "foreign", "cancer", now=NOW)
        client = tls.client(KEY, foreign.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW))
        with pytest.raises(ssl.SSLError, match=r"CERTIFICATE_VERIFY_FAILED|signature failure"):
            tls.handshake(client)

    @pytest.mark.parametrize(("issued", "expected"), [(-timedelta(days=2), "expired"), (timedelta(days=2), "not yet")])
    def test_refuses_an_expired_certificate_and_one_of_the_future(
        self, tls: Tls, authority: Authority, issued: timedelta, expected: str
    ) -> None:
        client = tls.client(KEY, authority.issue_client(make_csr(KEY, "north"), site="north", days=1, now=NOW + issued))
        with pytest.raises(ssl.SSLError, match=expected):
            tls.handshake(client)

    def test_refuses_the_server_s_kind_of_certificate_from_a_client(self, tls: Tls, authority: Authority) -> None:
        client = tls.client(KEY, authority.issue_server(KEY, ["north"], days=1, now=NOW))
        with pytest.raises(ssl.SSLError, match=r"unsuitable|unsupported certificate purpose"):
            tls.handshake(client)

    def test_refuses_a_client_without_a_certificate(self, tls: Tls) -> None:
        with pytest.raises(ssl.SSLError, match=r"PEER_DID_NOT_RETURN_A_CERTIFICATE|peer did not return"):
            tls.handshake(tls.context(ssl.PROTOCOL_TLS_CLIENT))

    def test_a_site_refuses_a_server_of_another_name_or_with_a_site_s_certificate(
        self, tls: Tls, authority: Authority
    ) -> None:
        pem = authority.issue_client(make_csr(KEY, "localhost"), site="localhost", days=1, now=NOW)
        client = tls.client(KEY, pem)
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            tls.handshake(client, "elsewhere")
        tls.server.load_cert_chain(tls.folder / "client.pem", tls.folder / "client.key")
        with pytest.raises(ssl.SSLCertVerificationError, match=r"unsuitable|unsupported certificate purpose"):
            tls.handshake(client)


NORTH = Peer("north", 0xABC, NOW, NOW + timedelta(days=30), b"")
SOUTH = Peer("south", 0xDEF, NOW, NOW + timedelta(days=30), b"")


class TestRevocations:
    def test_revoke_a_site_under_every_certificate_and_no_other(self, tmp_path: Path) -> None:
        revocations = Revocations.create(tmp_path / "revoked.json")
        assert not revocations.is_revoked(NORTH)
        revocations.add(site="north", reason="left", now=NOW)
        assert revocations.is_revoked(NORTH)
        assert revocations.is_revoked(Peer("north", 1, NOW, NOW, b""))
        assert revocations.is_site_revoked("north")
        assert not revocations.is_revoked(SOUTH)

    def test_revoke_one_certificate_of_a_site(self, tmp_path: Path) -> None:
        revocations = Revocations.create(tmp_path / "revoked.json")
        revocations.add(serials=[NORTH.serial_hex], key="ab" * 32, reason="leaked", now=NOW)
        assert revocations.is_revoked(NORTH)
        assert not revocations.is_revoked(Peer("north", 1, NOW, NOW, b""))
        assert revocations.is_key_revoked("ab" * 32)
        assert not revocations.is_key_revoked("cd" * 32)

    def test_a_readmitted_site_s_old_certificates_and_key_stay_out(self, tmp_path: Path) -> None:
        revocations = Revocations.create(tmp_path / "revoked.json")
        revocations.add(site="north", serials=[NORTH.serial_hex], key="ab" * 32, reason="stolen", now=NOW)
        revocations.readmit("north")
        assert revocations.is_revoked(NORTH)
        assert revocations.is_key_revoked("ab" * 32)
        assert not revocations.is_revoked(Peer("north", 1, NOW, NOW, b""))

    def test_another_process_s_revocation_holds_at_the_next_call(self, tmp_path: Path) -> None:
        seen, other = Revocations.create(tmp_path / "revoked.json"), Revocations(tmp_path / "revoked.json")
        assert not seen.is_revoked(NORTH)
        other.add(site="north", reason="left", now=NOW)
        assert seen.is_revoked(NORTH)
        other.readmit("north")
        assert not seen.is_revoked(NORTH)

    def test_are_kept_with_their_reason_and_time_once(self, tmp_path: Path) -> None:
        for reason in ("stolen", "again"):
            Revocations.create(tmp_path / "revoked.json").add(site="north", reason=reason, now=NOW)
        (line,) = json.loads((tmp_path / "revoked.json").read_bytes())["revoked"]
        assert line == {"what": "site", "value": "north", "reason": "stolen", "time": NOW.isoformat()}

    @pytest.mark.parametrize(
        "content",
        [
            None,
            b"",
            b"{}",
            b"[]",
            b"[" * 100_000,
            b'{"format": "fedchorus revocations 2", "revoked": []}',
            b'{"format": "fedchorus revocations 1", "revoked": {"north": 1}}',
            b'{"format": "fedchorus revocations 1", "revoked": 3}',
            b'{"format": "fedchorus revocations 1", "revoked": {}}',
            b'{"format": "fedchorus revocations 1", "revoked": [{"what": "site", "value": "north"}]}',
            b'{"format": "fedchorus revocations 1", "revoked": '
            b'[{"what": "sight", "value": "north", "reason": "", "time": ""}]}',
            b'{"format": "fedchorus revocations 1", "revoked": '
            b'[{"what": "site", "value": ["north"], "reason": "", "time": ""}]}',
        ],
    )
    def test_missing_or_damaged_let_nobody_in_until_restored(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "revoked.json"
        revocations = Revocations.create(path)
        good = path.read_bytes()
        assert not revocations.is_revoked(NORTH)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for _ in range(2):
            with pytest.raises(Refused, match="nobody is let in until it is restored"):
                revocations.is_revoked(NORTH)
        with pytest.raises(Refused, match="nobody is let in"):
            revocations.add(site="south", reason="left", now=NOW)
        path.write_bytes(good)
        assert not revocations.is_revoked(NORTH)

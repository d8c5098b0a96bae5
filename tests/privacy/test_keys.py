"""Both kinds of key lie in a file for their owner alone, under a passphrase where there is one."""

from __future__ import annotations

import copy
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from privacy.errors import LedgerError, RunError
from privacy.keys import IdentityKey, TlsKey, new_private_folder, read_passphrase, write_secret

KINDS = pytest.mark.parametrize("kind", [IdentityKey, TlsKey])
Kind = type[IdentityKey] | type[TlsKey]


def public(key: IdentityKey | TlsKey) -> object:
    return key.public_hex if isinstance(key, IdentityKey) else key.public_bytes


@KINDS
class TestEitherKind:
    @pytest.mark.parametrize("passphrase", [None, b"x", b"correct horse", b"\x00\xff", b"p" * 1023])
    def test_is_the_same_after_a_restart(self, kind: Kind, passphrase: bytes | None, tmp_path: Path) -> None:
        created = kind.create(tmp_path / "site" / "key", passphrase)
        assert public(kind.load(tmp_path / "site" / "key", passphrase)) == public(created)
        assert (b"ENCRYPTED" in (tmp_path / "site" / "key").read_bytes()) == (passphrase is not None)

    def test_is_readable_by_its_owner_alone_whatever_the_umask(self, kind: Kind, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            kind.create(tmp_path / "key", b"secret")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600

    def test_is_never_overwritten(self, kind: Kind, tmp_path: Path) -> None:
        kind.create(tmp_path / "key")
        before = (tmp_path / "key").read_bytes()
        with pytest.raises(FileExistsError):
            kind.create(tmp_path / "key")
        assert (tmp_path / "key").read_bytes() == before

    def test_under_a_passphrase_is_not_read_without_it(self, kind: Kind, tmp_path: Path) -> None:
        kind.create(tmp_path / "key", b"secret")
        with pytest.raises(LedgerError, match="give its passphrase with --passphrase-file"):
            kind.load(tmp_path / "key")

    @pytest.mark.parametrize("wrong", [b"", b"Secret", b"secret ", b"x" * 2000])
    def test_says_that_a_passphrase_is_wrong_without_showing_it(self, kind: Kind, wrong: bytes, tmp_path: Path) -> None:
        kind.create(tmp_path / "key", b"secret")
        with pytest.raises(LedgerError, match="its passphrase is another one") as caught:
            kind.load(tmp_path / "key", wrong)
        assert caught.value.__suppress_context__
        assert not wrong or wrong.decode() not in str(caught.value)

    def test_in_the_clear_needs_no_passphrase_and_minds_none(self, kind: Kind, tmp_path: Path) -> None:
        created = kind.create(tmp_path / "key")
        assert public(kind.load(tmp_path / "key", b"anything")) == public(created)

    @pytest.mark.parametrize("passphrase", [b"", b"x" * 1024])
    def test_refuses_a_passphrase_that_nobody_could_read_it_with(
        self, kind: Kind, passphrase: bytes, tmp_path: Path
    ) -> None:
        with pytest.raises(LedgerError, match="1 to 1023 bytes"):
            kind.create(tmp_path / "key", passphrase)
        assert not (tmp_path / "key").exists()

    @pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_cannot_be_duplicated(
        self, kind: Kind, duplicate: Callable[[IdentityKey | TlsKey], object], tmp_path: Path
    ) -> None:
        with pytest.raises(TypeError, match="stays in its file"):
            duplicate(kind.create(tmp_path / "key"))

    def test_of_the_other_kind_is_refused(self, kind: Kind, tmp_path: Path) -> None:
        (TlsKey if kind is IdentityKey else IdentityKey).create(tmp_path / "key")
        with pytest.raises(LedgerError, match=r"expected an? (Ed25519|P-256) key, found another kind"):
            kind.load(tmp_path / "key")

    def test_that_is_missing_or_unreadable_says_so_in_one_line(self, kind: Kind, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match="is missing; restore it"):
            kind.load(tmp_path / "key")
        with pytest.raises(LedgerError, match="cannot be read"):
            kind.load(tmp_path)
        (tmp_path / "key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n")
        with pytest.raises(LedgerError, match=r"private key in PEM form$") as caught:
            kind.load(tmp_path / "key")
        assert "SECRET" not in str(caught.value)


def test_a_key_in_openssl_s_older_encrypted_form_needs_its_passphrase_too(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret"))
    (tmp_path / "key").write_bytes(pem)
    with pytest.raises(LedgerError, match="--passphrase-file"):
        TlsKey.load(tmp_path / "key")
    assert TlsKey.load(tmp_path / "key", b"secret").private.private_numbers() == key.private_numbers()


def test_a_tls_key_on_another_curve_is_refused(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "key").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(LedgerError, match="expected a P-256 key"):
        TlsKey.load(tmp_path / "key")


def test_a_tls_key_s_public_half_is_what_flower_makes_of_it(tmp_path: Path) -> None:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    key = TlsKey.create(tmp_path / "key")
    assert key.public_bytes == public_key_to_bytes(key.private.public_key())
    assert uses_nist_ec_curve(key.private.public_key())


def test_a_tls_key_shows_nothing() -> None:
    assert repr(TlsKey(ec.generate_private_key(ec.SECP256R1()))) == "TlsKey()"
    assert "private" not in repr(IdentityKey(Ed25519PrivateKey.generate()))


@pytest.mark.parametrize(
    ("content", "expected"), [(b"s3cret", b"s3cret"), (b"s3cret\n", b"s3cret"), (b" a b\r\n", b" a b")]
)
def test_a_passphrase_is_the_one_line_of_its_file(content: bytes, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_bytes(content)
    assert read_passphrase(tmp_path / "passphrase") == expected


@pytest.mark.parametrize("content", [b"", b"\n", b"one\ntwo\n", b"x" * 1024])
def test_a_file_without_one_passphrase_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_bytes(content)
    with pytest.raises(LedgerError, match="expected a passphrase in one line") as caught:
        read_passphrase(tmp_path / "passphrase")
    assert "two" not in str(caught.value)


def test_no_passphrase_file_is_no_passphrase_but_a_missing_one_is_an_error(tmp_path: Path) -> None:
    assert read_passphrase(None) is None
    with pytest.raises(LedgerError, match="cannot be read"):
        read_passphrase(tmp_path / "passphrase")


def test_a_secret_is_never_written_over_another(tmp_path: Path) -> None:
    write_secret(tmp_path / "deep" / "secret", b"first")
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "deep" / "secret", b"second")
    assert (tmp_path / "deep" / "secret").read_bytes() == b"first"


def test_a_folder_for_keys_is_its_owner_s_alone_and_must_be_empty(tmp_path: Path) -> None:
    new_private_folder(tmp_path / "site")
    assert stat.S_IMODE((tmp_path / "site").stat().st_mode) == 0o700
    new_private_folder(tmp_path / "site")
    (tmp_path / "site" / "old").touch()
    for taken in (tmp_path / "site", tmp_path / "site" / "old"):
        with pytest.raises(RunError, match="there is something already"):
            new_private_folder(taken)

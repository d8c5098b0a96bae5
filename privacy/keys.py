"""A site's two keys, made on site by the operating system's entropy: they never leave their files.

`IdentityKey` (Ed25519, RFC 8032) signs ledgers, rosters and messages. `TlsKey` (ECDSA on P-256) is the key of a TLS
certificate and of a Flower node. Each lies in one file: PKCS8 in PEM, readable by its owner alone, encrypted where
there is a passphrase.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from privacy.durable import sync_folder
from privacy.errors import LedgerError, RunError

LONGEST_PASSPHRASE = 1023  # Bytes: OpenSSL reads no more.


class IdentityKey:
    """The private half. It never leaves the site, and its bytes never enter a message, a log or an exception."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    def __repr__(self) -> str:
        return f"IdentityKey(public={self.public_hex})"

    def __reduce__(self) -> str:
        raise TypeError("an identity key stays in its file: give another process the path")

    @classmethod
    def create(cls, path: Path, passphrase: bytes | None = None) -> IdentityKey:
        """Generate a key and write it to `path` (PEM, readable by its owner alone). Never overwrites a key.

        With a passphrase (1 to 1023 bytes) the file is encrypted; `load` then needs it.
        """
        key = cls(Ed25519PrivateKey.generate())
        _write_key(path, key._private, passphrase)
        return key

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> IdentityKey:
        """Read a key. A passphrase that is given for a key in the clear is not used.

        Raises `LedgerError` for a file that is missing, no Ed25519 key or of another passphrase.
        """
        private = _read_key(path, passphrase, whose="the site's identity key", kind="an Ed25519")
        if not isinstance(private, Ed25519PrivateKey):
            raise LedgerError(f"{path}: expected an Ed25519 key, found another kind")
        return cls(private)

    @property
    def public_hex(self) -> str:
        """The public half: 32 bytes as 64 hexadecimal digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


class TlsKey:
    """The key of a TLS certificate: ECDSA on P-256, the one curve that TLS and Flower's node authentication share."""

    def __init__(self, private: EllipticCurvePrivateKey) -> None:
        self.private = private

    def __repr__(self) -> str:
        return "TlsKey()"

    def __reduce__(self) -> str:
        raise TypeError("a TLS key stays in its file: give another process the path")

    @classmethod
    def create(cls, path: Path, passphrase: bytes | None = None) -> TlsKey:
        """Generate a key and write it to `path`, as `IdentityKey.create` does."""
        key = cls(generate_private_key(SECP256R1()))
        _write_key(path, key.private, passphrase)
        return key

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> TlsKey:
        """Read a key. Raises `LedgerError`, as `IdentityKey.load` does."""
        private = _read_key(path, passphrase, whose="the TLS key", kind="a P-256")
        if not isinstance(private, EllipticCurvePrivateKey) or not isinstance(private.curve, SECP256R1):
            raise LedgerError(f"{path}: expected a P-256 key, found another kind")
        return cls(private)

    @property
    def public_bytes(self) -> bytes:
        """The public half as Flower keeps it: SubjectPublicKeyInfo in PEM."""
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def is_signed_by(public_hex: str, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` was made with the private half of `public_hex`. Malformed input: False."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_passphrase(path: Path | None) -> bytes | None:
    """Read the passphrase of keys: the one line of a text file, without its line end. Raises `LedgerError`.

    Without a file there is none.
    """
    if path is None:
        return None
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LedgerError(f"{path}: the passphrase cannot be read ({error.strerror})") from None
    if len(lines) != 1 or not 1 <= len(lines[0]) <= LONGEST_PASSPHRASE:
        raise LedgerError(f"{path}: expected a passphrase in one line of 1 to {LONGEST_PASSPHRASE} bytes")
    return lines[0]


def new_private_folder(path: Path) -> None:
    """Make a folder for keys that its owner alone can enter. Raises `RunError` for one that holds anything."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path}: there is something already, and keys are never overwritten; name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, durable when this returns. `FileExistsError` where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened with its final mode, whatever the umask: at no time can another user open it.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _write_key(path: Path, private: Ed25519PrivateKey | EllipticCurvePrivateKey, passphrase: bytes | None) -> None:
    if passphrase is not None and not 1 <= len(passphrase) <= LONGEST_PASSPHRASE:
        raise LedgerError(f"{path}: a passphrase has 1 to {LONGEST_PASSPHRASE} bytes")
    encryption: serialization.KeySerializationEncryption = (
        serialization.NoEncryption() if passphrase is None else serialization.BestAvailableEncryption(passphrase)
    )
    write_secret(path, private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def _read_key(path: Path, passphrase: bytes | None, *, whose: str, kind: str) -> PrivateKeyTypes:
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        raise LedgerError(f"{path}: {whose} is missing; restore it from the site's backup") from None
    except OSError as error:
        raise LedgerError(f"{path}: {whose} cannot be read ({error.strerror})") from None
    encrypted = b"ENCRYPTED" in pem  # In the first line of PKCS8, in the second of OpenSSL's older form.
    if encrypted and passphrase is None:
        raise LedgerError(f"{path}: not {kind} private key in the clear: give its passphrase with --passphrase-file")
    try:
        return serialization.load_pem_private_key(pem, password=passphrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: encrypted, in a form without that word.
        if encrypted:
            raise LedgerError(f"{path}: its passphrase is another one, or the file is damaged") from None
        raise LedgerError(f"{path}: not {kind} private key in PEM form") from None

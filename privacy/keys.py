"""A site's identity: one Ed25519 key pair (RFC 8032), made on site by the operating system's entropy."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.errors import LedgerError


class IdentityKey:
    """The private half. It never leaves the site, and its bytes never enter a message, a log or an exception."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    def __repr__(self) -> str:
        return f"IdentityKey(public={self.public_hex})"

    def __reduce__(self) -> str:
        raise TypeError("an identity key stays in its file: give another process the path")

    @classmethod
    def create(cls, path: Path) -> IdentityKey:
        """Generate a key and write it to `path` (PEM, readable by its owner alone). Never overwrites a key."""
        key = cls(Ed25519PrivateKey.generate())
        path.parent.mkdir(parents=True, exist_ok=True)
        pem = key._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        return key

    @classmethod
    def load(cls, path: Path) -> IdentityKey:
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except FileNotFoundError:
            raise LedgerError(
                f"{path}: the site's identity key is missing; restore it from the site's backup"
            ) from None
        except OSError as error:
            raise LedgerError(f"{path}: the site's identity key cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted.
            raise LedgerError(f"{path}: not an Ed25519 private key in unencrypted PEM form") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise LedgerError(f"{path}: expected an Ed25519 key, found another kind")
        return cls(private)

    @property
    def public_hex(self) -> str:
        """The public half: 32 bytes as 64 hexadecimal digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


def is_signed_by(public_hex: str, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` was made with the private half of `public_hex`. Malformed input: False."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True

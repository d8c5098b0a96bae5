"""What is sealed between two parties of a session: AES-256-GCM under keys that only this session's view leads to."""

from __future__ import annotations

import os
from collections.abc import Callable
from hmac import compare_digest

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from numpy import uint8
from numpy.typing import NDArray

from privacy.errors import Refused
from privacy.secagg.masks import derive
from privacy.secagg.wire import u16

NONCE, TAG = 12, 16
_CHUNK = 2**16


def box_key(shared: bytes, root: bytes, *, sender: int, receiver: int) -> bytes:
    """The key of the box that `sender` has for `receiver`; `root` is the digest of all adverts."""
    return derive(shared, salt=root, info=b"fedchorus secagg 1 box" + u16(sender) + u16(receiver))


def server_key(shared: bytes, session: bytes, slot: int) -> bytes:
    """The key between one client and the server process of a session."""
    return derive(shared, salt=session, info=b"fedchorus secagg 1 server" + u16(slot))


def seal(key: bytes, content: bytes, *, context: bytes, entropy: Callable[[int], bytes] = os.urandom) -> bytes:
    """Encrypt `content`; it opens only under the same key and `context`."""
    nonce = entropy(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, content, context)


def open_sealed(key: bytes, sealed: bytes, *, context: bytes) -> bytes:
    """Raises `Refused` when `sealed` was not made by `seal` with this key and context."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], context)
    except (InvalidTag, ValueError):
        raise Refused(
            "a sealed message does not open: it was altered, or made in another view of the session"
        ) from None


def vouch(key: bytes, words: NDArray[uint8], *, context: bytes, entropy: Callable[[int], bytes] = os.urandom) -> bytes:
    """Authenticate `words`, which travel as they are, by GMAC (SP 800-38D): `NONCE + TAG` bytes."""
    nonce = entropy(NONCE)
    return nonce + _tag(key, nonce, words, context)


def check_vouched(key: bytes, words: NDArray[uint8], proof: bytes, *, context: bytes) -> None:
    """Raises `Refused` when `proof` is not one that `vouch` made for these words, key and context."""
    if len(proof) != NONCE + TAG or not compare_digest(_tag(key, proof[:NONCE], words, context), proof[NONCE:]):
        raise Refused("the masked words are not what their site vouched for")


def _tag(key: bytes, nonce: bytes, words: NDArray[uint8], context: bytes) -> bytes:
    mac = Cipher(AES256(key), GCM(nonce)).encryptor()
    mac.authenticate_additional_data(context)
    for start in range(0, words.size, _CHUNK):
        mac.authenticate_additional_data(words[start : start + _CHUNK].data)
    mac.finalize()
    return mac.tag

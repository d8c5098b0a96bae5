"""Masks: AES-256-CTR keystreams added to vectors of a ring or taken off, and the secrets they come from.

A stream's secret is 48 bytes: an AES-256 key, then the initial counter block, counted up as one big-endian number
(NIST SP 800-38A, sec. 6.5 and app. B.1). Its keystream covers a vector's bytes in order, the body and then the tail,
and is added word by word. A secret is for one vector only: whoever sees two under one mask sees their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.errors import Refused
from privacy.secagg.ring import TAIL_DTYPE, Ring

KEY, BLOCK = 32, 16
SECRET = KEY + BLOCK
# Bytes at once, so that the vector crosses memory once for all streams: 64 to 512 KiB measure alike, 32 slower.
CHUNK = 2**17
LIVE = 64  # Cipher contexts open at once: some KiB, whatever the number of streams.
_NOTHING = memoryview(bytes(CHUNK))  # A keystream is what CTR mode makes of zeros.


def add_streams(
    words: NDArray[np.uint8], ring: Ring, streams: Sequence[tuple[bytes, int]], *, threads: int = 1
) -> None:
    """Add to `words`, in place, the keystream of each (secret, sign): sign +1 adds it, -1 takes it off.

    The result depends neither on the order of `streams` nor on `threads`, which share the vector out between them (the
    cipher and the sums run outside the interpreter's lock). Needs 128 KiB beside the vector for each thread. Without
    streams nothing changes. A mask hides its vector from whoever does not have the secret, as far as AES-256 in CTR
    mode is a pseudorandom generator; up to 2^48 bytes its keystream is within 2^-41 of uniform by the block bound.

    Raises `Refused` when `words` is not a vector of `ring`, ValueError for a secret not of 48 bytes, another sign or
    no threads; then nothing was added.
    """
    ring.check(words)
    if any(len(secret) != SECRET or sign not in (1, -1) for secret, sign in streams):
        raise ValueError(f"a stream is a secret of {SECRET} bytes and a sign of 1 or -1")
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    share = max(1, -(-ring.nbytes // (BLOCK * threads))) * BLOCK
    ranges = [(start, min(start + share, ring.nbytes)) for start in range(0, ring.nbytes, share)]
    if len(ranges) <= 1:
        for start, stop in ranges:
            _add_range(words, ring, streams, start, stop)
        return
    with ThreadPoolExecutor(len(ranges)) as pool:
        for done in [pool.submit(_add_range, words, ring, streams, *bounds) for bounds in ranges]:
            done.result()


def self_mask(b: bytes, root: bytes) -> bytes:
    """Derive the secret of the stream that a client adds by itself, from its 32 random bytes `b`.

    `root`, 32 bytes, is what all clients of the sum agree on, hashed: other sums get unrelated streams.
    """
    return _stream_secret(b, root, b"fedchorus secagg 1 self mask")


def pair_mask(shared: bytes, root: bytes, low: int, high: int) -> bytes:
    """Derive the secret of the stream that client `low` adds and client `high` takes off.

    `shared` is what `exchange` gives the two (32 bytes); their ids, 1 <= low < high < 2^16, go into the derivation as
    little-endian 16-bit numbers. Raises ValueError for other ids or lengths.
    """
    if not 1 <= low < high < 2**16:
        raise ValueError(f"the ids of a pair are 1 to 2^16 - 1, the lower first; got {low} and {high}")
    ids = low.to_bytes(2, "little") + high.to_bytes(2, "little")
    return _stream_secret(shared, root, b"fedchorus secagg 1 pair mask" + ids)


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """Agree on 32 secret bytes with the owner of `public`, 32 bytes (X25519, RFC 7748 sec. 6.1).

    Raises `Refused` for another length and for points of low order, with which every private key gives zeros.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused(
            "a peer's X25519 key must be 32 bytes and not a point of low order: no secret comes of it"
        ) from None


def derive(secret: bytes, *, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """Derive `length` <= 8160 bytes from `secret` by HKDF-SHA256 (RFC 5869).

    Unrelated for different `salt` or `info`, to whoever does not know `secret`, which need not be uniform but must be
    hard to guess. The labels in `info` begin "fedchorus secagg 1 " and none is the beginning of another.
    """
    return HKDF(SHA256(), length, salt, info).derive(secret)


def _stream_secret(secret: bytes, root: bytes, info: bytes) -> bytes:
    if len(secret) != 32 or len(root) != 32:
        raise ValueError(f"a mask's secret and root have 32 bytes each, got {len(secret)} and {len(root)}")
    return derive(secret, salt=root, info=info, length=SECRET)


def _add_range(
    words: NDArray[np.uint8], ring: Ring, streams: Sequence[tuple[bytes, int]], start: int, stop: int
) -> None:
    scratch = np.empty(min(CHUNK, stop - start), np.uint8)
    for first in range(0, len(streams), LIVE):
        group = [(_keystream(secret, start), _combine(sign)) for secret, sign in streams[first : first + LIVE]]
        position = start
        while position < stop:
            body = position < ring.body_bytes
            end = min(position + CHUNK, stop, ring.body_bytes if body else stop)
            dtype = ring.dtype if body else TAIL_DTYPE
            target, mask = words[position:end].view(dtype), scratch[: end - position]
            for keystream, combine in group:
                keystream.update_into(_NOTHING[: mask.size], mask)
                combine(target, mask.view(dtype), out=target)
            position = end


def _keystream(secret: bytes, offset: int) -> Any:
    """Open a stream at `offset` bytes, a multiple of the block: the counter says how many blocks came before."""
    counter = (int.from_bytes(secret[KEY:], "big") + offset // BLOCK) % 2**128
    return Cipher(AES(secret[:KEY]), CTR(counter.to_bytes(BLOCK, "big"))).encryptor()


def _combine(sign: int) -> Callable[..., object]:
    return np.add if sign == 1 else np.subtract

"""The protocol's arithmetic once more, in Python's integers and by the standards alone: slow, and without `privacy`.

It shares no line with what it is compared to. AES comes block by block from `cryptography`, SHA-256 from `hashlib`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

P = 2**255 - 19
BASE = (9).to_bytes(32, "little")
VALUE_BYTES = {16: 2, 20: 8, 32: 4}  # What the body is added as.


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, sec. 2."""
    key, block, output = hmac.digest(salt, secret, "sha256"), b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([i]), "sha256")
        output += block
    return output[:length]


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, sec. 5: the Montgomery ladder."""
    k = int.from_bytes(scalar, "little") & ~7 & (2**254 - 1) | 2**254
    x1 = int.from_bytes(point, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in reversed(range(255)):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a % P, c * b % P, a * a % P, b * b % P
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, (aa - bb) * (aa + 121665 * (aa - bb)) % P
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, P) % P).to_bytes(32, "little")


def keystream(secret: bytes, length: int) -> bytes:
    """SP 800-38A, sec. 6.5: AES-256 of a counter, after the key the first one."""
    block = Cipher(AES(secret[:32]), ECB()).encryptor()
    first = int.from_bytes(secret[32:], "big")
    counters = ((first + i) % 2**128 for i in range(-(-length // 16)))
    return b"".join(block.update(counter.to_bytes(16, "big")) for counter in counters)[:length]


def interpolated(shares: Mapping[int, bytes], at: int = 0) -> bytes:
    """Shamir 1979: the value at `at` of the least polynomial through `shares`, by fractions of integers."""
    total = 0
    for i, share in shares.items():
        weight = Fraction(1)
        for j in shares:
            if j != i:
                weight *= Fraction(at - j, i - j)
        total += int.from_bytes(share, "little") * weight.numerator * pow(weight.denominator, -1, P)
    return (total % P).to_bytes(32, "little")


def digest(label: str, *parts: bytes) -> bytes:
    whole = b"".join(
        len(part).to_bytes(8, "little") + part for part in (f"fedchorus secagg 1 {label}".encode(), *parts)
    )
    return hashlib.sha256(whole).digest()


class SlowSum:
    """One session as its proposal and its adverts say: whose graph, which masks, what sum."""

    def __init__(self, proposal: bytes, adverts: Mapping[int, bytes]) -> None:
        self.record: dict[str, Any] = json.loads(proposal)
        self.adverts = dict(sorted(adverts.items()))
        self.session = digest("session", proposal)
        self.root = digest("root", self.session, *self.adverts.values())
        size = VALUE_BYTES[self.record["bits"]]
        used = -(-self.record["body"] // 3) * 8 if size == 8 else self.record["body"] * size
        body = -(-used // 16) * 16
        self.nbytes = body + 8 * self.record["tail"]
        self.cuts = [*range(0, body, size), *range(body, self.nbytes, 8), self.nbytes]

    def neighbours(self, slot: int) -> set[int]:
        """Bell et al. 2020: the next ones to either side on a ring in an order that the root decides."""
        degree, count = self.record["degree"], len(self.adverts)
        if degree >= count - 1:
            return set(self.adverts) - {slot}

        def place(member: int) -> bytes:
            return hashlib.sha256(b"fedchorus secagg graph v1\0" + self.root + member.to_bytes(4, "little")).digest()

        ring = sorted(self.adverts, key=place)
        here = ring.index(slot)
        return {ring[(here + sign * i) % count] for i in range(1, degree // 2 + 1) for sign in (1, -1)}

    def mask_scalar(self, key: bytes) -> bytes:
        return hkdf(key, self.session, b"fedchorus secagg 1 mask key", 32)

    def mask_public(self, slot: int) -> bytes:
        return self.adverts[slot][36:68]

    def self_stream(self, blind: bytes) -> bytes:
        return keystream(hkdf(blind, self.root, b"fedchorus secagg 1 self mask", 48), self.nbytes)

    def pair_stream(self, slot: int, key: bytes, peer: int) -> bytes:
        shared = x25519(self.mask_scalar(key), self.mask_public(peer))
        ids = b"".join(each.to_bytes(2, "little") for each in sorted((slot, peer)))
        return keystream(hkdf(shared, self.root, b"fedchorus secagg 1 pair mask" + ids, 48), self.nbytes)

    def add(self, words: bytes, other: bytes, sign: int = 1) -> bytes:
        """`words` plus or minus `other`, each value modulo its size."""
        total = b""
        for start, stop in pairwise(self.cuts):
            left, right = (int.from_bytes(run[start:stop], "little") for run in (words, other))
            total += ((left + sign * right) % 256 ** (stop - start)).to_bytes(stop - start, "little")
        return total

    def masked(self, words: bytes, *, slot: int, key: bytes, blind: bytes, sharers: Collection[int]) -> bytes:
        """What client `slot` sends for `words`, when `sharers` shared their secrets (Bonawitz et al. 2017, sec. 4)."""
        words = self.add(words, self.self_stream(blind))
        for peer in self.neighbours(slot) & set(sharers):
            words = self.add(words, self.pair_stream(slot, key, peer), 1 if slot < peer else -1)
        return words

    def total(self, masked: Mapping[int, bytes], shares: Mapping[int, Mapping[int, tuple[bytes, bytes]]]) -> bytes:
        """The sum of `masked` words without masks; `shares` are what each sharer gave each helper: of blind and key."""
        total = bytes(self.nbytes)
        for words in masked.values():
            total = self.add(total, words)
        for slot, given in shares.items():
            few = dict(list(given.items())[-self.record["threshold"] :])
            blind, key = (interpolated({helper: pair[i] for helper, pair in few.items()}) for i in (0, 1))
            if slot in masked:
                total = self.add(total, self.self_stream(blind), -1)
                continue
            for peer in self.neighbours(slot) & set(masked):
                total = self.add(total, self.pair_stream(slot, key, peer), 1 if slot < peer else -1)
        return total

"""Vectors that are summed modulo a power of two: what a secure sum adds, masks and sends.

A vector is one run of bytes ("words"), little-endian on every machine: `body` values of `bits` each, zeros up to a
multiple of 16 bytes (a block of the masks' cipher), then `tail` values of 64 bits for what needs more precision than
the body: weights and sums of metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError, Refused

ALIGNMENT = 16
FIELD, FIELDS = 21, 3  # At 20 bits: fields of a 64-bit word, the low one first.
TAIL_DTYPE, TAIL_LIMIT = "<u8", 2**63 - 1
_CHUNK = 2**12  # Words taken apart at once: with larger ones memory sets the pace.
_DTYPES = {16: "<u2", 20: "<u8", 32: "<u4"}


@dataclass(frozen=True)
class Ring:
    """Say how `body` values of `bits` (16, 20 or 32) and `tail` values of 64 lie in a vector, and add such vectors.

    Guarantee: `pack` is linear on all integers and `add` is plain modular addition, so that packed vectors add up to
    the packed sum of their integers, however many coordinates wrapped around. A secure sum thus shows a function of
    the integers' sum alone: under distributed noise wrapping costs accuracy and never privacy.

    | a coordinate's sum           | is unpacked as                                                            |
    |------------------------------|---------------------------------------------------------------------------|
    | at most `limit` in magnitude | itself                                                                    |
    | beyond, at 16 or 32 bits     | itself modulo 2^bits, centred: in [-2^(bits-1), 2^(bits-1))               |
    | beyond, at 20 bits           | itself while it fits in 21 bits; then modulo 2^21, centred, and its carry |
    |                              | goes to the next coordinate of its word                                   |

    At 20 bits three signed fields of 21 share a word, whose spare bit takes outliers of the noise. Wrapping every
    field by itself before packing was rejected: what one client's wrap takes from the word the sum would show in the
    next field, and that depends on that client's own value and share of the noise.

    Raises `JobError` for other bits and for negative lengths.
    """

    bits: Literal[16, 20, 32]
    body: int
    tail: int

    def __post_init__(self) -> None:
        if self.bits not in _DTYPES:
            raise JobError(f"a secure sum has 16, 20 or 32 bits a coordinate, got {self.bits!r}")
        if self.body < 0 or self.tail < 0:
            raise JobError(f"a vector's lengths are 0 or more, got a body of {self.body} and a tail of {self.tail}")

    @property
    def dtype(self) -> str:
        """What the body is added as; its values themselves are signed."""
        return _DTYPES[self.bits]

    @property
    def body_bytes(self) -> int:
        """Where the tail begins: a multiple of 16."""
        used = -(-self.body // FIELDS) * 8 if self.bits == 20 else self.body * self.bits // 8
        return -(-used // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        return self.body_bytes + 8 * self.tail

    @property
    def limit(self) -> int:
        """The largest magnitude that a coordinate of the sum can have."""
        return (1 << self.bits - 1) - 1

    def bound(self, clients: int) -> int:
        """The largest magnitude that each of `clients` may add to a coordinate. Raises `JobError` if that is 0."""
        if not 1 <= clients <= self.limit:
            raise JobError(f"{self.bits} bits hold the sum of 1 to {self.limit} clients, got {clients}")
        return self.limit // clients

    def tail_bound(self, clients: int) -> int:
        """The same for a value of the tail."""
        if not 1 <= clients <= TAIL_LIMIT:
            raise JobError(f"64 bits hold the sum of 1 to 2^63 - 1 clients, got {clients}")
        return TAIL_LIMIT // clients

    def zeros(self) -> NDArray[np.uint8]:
        """Return the packed zero, to add to."""
        return np.zeros(self.nbytes, np.uint8)

    def pack(self, body: NDArray[np.int64] | NDArray[np.int32], tail: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the words of (body,) and (tail,) integers of any size. Raises `Refused` for other shapes."""
        self.check_values(body, tail)
        words = self.zeros()
        self.put(words, 0, body)
        np.copyto(self.parts(words)[1].view("<i8"), tail, casting="same_kind")
        return words

    def put(self, words: NDArray[np.uint8], start: int, values: NDArray[np.int64] | NDArray[np.int32]) -> None:
        """Write integers to the body of `words` from coordinate `start` on: a multiple of 3, at 20 bits on zeros."""
        own = self.parts(words)[0]
        if self.bits != 20:  # Casting to fewer bits is reducing modulo 2^bits.
            signed = own.view(self.dtype.replace("u", "i"))
            np.copyto(signed[start : start + values.size], values, casting="same_kind")
            return
        fields = own.view("<i8")[start // FIELDS :]
        for field in range(FIELDS):
            each = values[field::FIELDS].astype(np.int64, casting="same_kind")
            fields[: each.size] += each << field * FIELD

    def unpack(self, words: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the (body,) and (tail,) integers, int64, nearest to zero that `words` stand for."""
        self.check(words)
        own, rest = self.parts(words)
        tail = rest.astype(np.int64)
        if self.bits != 20:
            return self.signed(words)[0].astype(np.int64), tail
        body = np.empty((own.size, FIELDS), np.int64)
        for start in range(0, own.size, _CHUNK):
            left = own[start : start + _CHUNK].astype(np.int64)
            for field in range(FIELDS):
                value = left << 64 - FIELD >> 64 - FIELD  # The second shift extends the sign.
                body[start : start + _CHUNK, field] = value
                left = left - value >> FIELD
        return body.ravel()[: self.body], tail

    def add(self, into: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
        """Add `other` to `into` in place, modulo 2^bits (2^64 at 20 bits and in the tail)."""
        self.check(into)
        self.check(other)
        for left, right in zip(self.parts(into), self.parts(other), strict=True):
            np.add(left, right, out=left)

    def parts(self, words: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        """View `words` as unsigned integers that add modulo their size: the body with what fills it up, the tail."""
        return words[: self.body_bytes].view(self.dtype), words[self.body_bytes :].view(TAIL_DTYPE)

    def signed(self, words: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """View the integers of `words` where each has a place of its own: at 16 and 32 bits."""
        own, rest = self.parts(words)
        return own.view(self.dtype.replace("u", "i"))[: self.body], rest.view("<i8")

    def check(self, words: NDArray[np.uint8]) -> None:
        """Raise `Refused` unless `words` is a vector of this ring: `(nbytes,) uint8`, contiguous."""
        if words.dtype != np.uint8 or words.shape != (self.nbytes,) or not words.flags.c_contiguous:
            run = "contiguous" if words.flags.c_contiguous else "scattered"
            raise Refused(
                f"the vector must be ({self.nbytes},) uint8, contiguous; got {words.shape} {words.dtype}, {run}"
            )

    def check_values(self, body: NDArray[Any], tail: NDArray[Any]) -> None:
        """Raise `Refused` unless there are (body,) and (tail,) values: none missing, none to be repeated."""
        if body.shape != (self.body,) or tail.shape != (self.tail,):
            raise Refused(
                f"expected a body of shape ({self.body},) and a tail of ({self.tail},), got {body.shape}, {tail.shape}"
            )

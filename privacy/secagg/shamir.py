"""Shamir's secret sharing over GF(2^255 - 19): any `threshold` holders know the secret, fewer know nothing of it.

Secrets and shares are field elements as 32 little-endian bytes; holders are x-coordinates, 1 to 2^16 (Shamir 1979,
"How to share a secret", CACM 22). The field is as wide as a key, so that one element carries a whole one. A share
says nothing of who lied: what was recovered must be compared with something its owner committed to.

Python's integers do not run in constant time; do not let an adversary measure a client that splits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, combinations, islice
from math import prod
from operator import mul

from privacy.errors import JobError, Refused

PRIME = 2**255 - 19
BYTES = 32
MAX_HOLDER = 2**16
MAX_SUBSETS = 2**12  # What `recover` tries: two liars cost seconds at a threshold of 67, and no number costs hours.


def draw(entropy: Callable[[int], bytes] = os.urandom) -> bytes:
    """Draw a uniform field element: 255 bits of `entropy`, again while they are not below the prime."""
    while True:
        value = int.from_bytes(entropy(BYTES), "little") & (2**255 - 1)
        if value < PRIME:
            return value.to_bytes(BYTES, "little")


def split(
    secret: bytes, *, threshold: int, holders: Sequence[int], entropy: Callable[[int], bytes] = os.urandom
) -> dict[int, bytes]:
    """Share `secret` (32 bytes) among `holders`; return each holder's share.

    Guarantee: any `threshold` shares determine the secret; to fewer, every secret is equally likely, whatever else
    they know of it. The polynomial's coefficients are drawn in the order of their powers, the leading one may be 0.

    Raises `JobError` unless 1 < threshold <= len(holders) and the holders are distinct and in [1, 2^16], and
    `Refused` for a secret that is not a field element.
    """
    if not 1 < threshold <= len(holders):
        raise JobError(f"a threshold must lie in [2, {len(holders)}], the number of holders; got {threshold}")
    if len(set(holders)) != len(holders) or not all(1 <= holder <= MAX_HOLDER for holder in holders):
        raise JobError(f"holders of shares must be distinct numbers in [1, {MAX_HOLDER}]")
    if not _is_element(secret):
        raise Refused(f"a secret to share must be {BYTES} bytes that are below 2^255 - 19 as a little-endian number")
    coefficients = [secret, *(draw(entropy) for _ in range(threshold - 1))]
    descending = [int.from_bytes(coefficient, "little") for coefficient in reversed(coefficients)]
    return {int(holder): _value_at(int(holder), descending).to_bytes(BYTES, "little") for holder in holders}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Interpolate the secret (32 bytes) from exactly these shares, by holder.

    Any `threshold` or more true shares of one secret give it. Fewer, or one false share, give another element: no
    error can tell. Raises `Refused` for fewer than two shares, or a holder or share that is malformed.
    """
    if len(shares) < 2 or not all(_is_share(holder, share) for holder, share in shares.items()):
        raise Refused(f"expected two or more shares of {BYTES} bytes below 2^255 - 19, of holders in [1, {MAX_HOLDER}]")
    holders = tuple(sorted(int(holder) for holder in shares))  # Sorted: one entry of the cache for each set.
    values = (int.from_bytes(shares[holder], "little") for holder in holders)
    secret: int = sum(map(mul, _weights(holders), values)) % PRIME
    return secret.to_bytes(BYTES, "little")


def recover(shares: Mapping[int, bytes], *, threshold: int, is_right: Callable[[bytes], bool]) -> bytes | None:
    """Combine `threshold` of `shares` into the secret that `is_right` accepts, or return None.

    The first `threshold` holders are tried, then every set that leaves out one holder before its last, then two, ...:
    no set twice, and 2^12 sets at most. Malformed shares are left out beforehand.

    Guarantee: L liars cost only time if threshold + L well-formed shares are there and C(threshold + L, L) <= 2^12:
    two at thresholds up to 89, three up to 27, four up to 15. Raises `JobError` for a threshold below 2.
    """
    if threshold < 2:
        raise JobError(f"a threshold must be 2 or more, got {threshold}")
    usable = sorted(holder for holder, share in shares.items() if _is_share(holder, share))
    for holders in islice(_subsets(usable, threshold), MAX_SUBSETS):
        secret = combine({holder: shares[holder] for holder in holders})
        if is_right(secret):
            return secret
    return None


def _subsets(holders: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield every subset of `size` once, ordered by its last holder: the earlier ones it skips are the suspects."""
    for skipped in range(len(holders) - size + 1):
        last = size + skipped - 1
        for suspects in combinations(range(last), skipped):
            yield [holders[i] for i in range(last + 1) if i not in suspects]


def _is_element(value: object) -> bool:
    return isinstance(value, bytes) and len(value) == BYTES and int.from_bytes(value, "little") < PRIME


def _is_share(holder: int, share: object) -> bool:
    return 1 <= holder <= MAX_HOLDER and _is_element(share)


def _value_at(x: int, descending: Sequence[int]) -> int:
    value = 0
    for coefficient in descending:  # Horner's rule, reduced once: x has 17 bits, and a product costs less than that.
        value = value * x + coefficient
    return value % PRIME


@lru_cache(maxsize=512)  # The holder sets of one round's secrets; about 10 kB each at a threshold of 100.
def _weights(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0: prod_{j != i} x_j / (x_j - x_i), with one inversion (Montgomery 1987, sec. 10.3.1).

    The products run over plain integers and are reduced once: differences have 16 bits, field elements 255.
    """
    top = prod(holders) % PRIME
    bottoms = [x * prod([y - x for y in holders if y != x]) % PRIME for x in holders]
    *before, product = accumulate(bottoms, lambda a, b: a * b % PRIME, initial=1)
    rest = top * pow(product, -1, PRIME) % PRIME
    weights = []
    for bottom, partial in zip(reversed(bottoms), reversed(before), strict=True):
        weights.append(rest * partial % PRIME)
        rest = rest * bottom % PRIME
    return tuple(reversed(weights))

"""Masks on one core: AES-256-CTR streams added to a vector, against sums without any and a generator without secrecy.

A ratio is our CPU time over the other's, timed in turn: 1 is as fast, 2 takes twice as long. "float_sum" adds as many
float32 vectors in place, what a server does without secure aggregation; "sfc64" draws as many raw bytes, in blocks that
stay in the cache, from numpy's fastest generator, and adds none of them. The other rows are a client's encoding.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
from measure import finish, interleaved, parser

from privacy.noise import OsNoise
from privacy.secagg.fixed_point import FixedPoint
from privacy.secagg.masks import SECRET, add_streams
from privacy.secagg.ring import Ring

STREAMS = 20
BLOCK = 2**13  # Words that SFC64 draws at once: 64 KiB, its fastest.


def against_float_sum(ring: Ring, *, pairs: int) -> dict[str, Any]:
    words, streams = ring.zeros(), fresh_streams()
    total, vectors = np.zeros(ring.body, np.float32), np.ones((STREAMS, ring.body), np.float32)

    def mask() -> None:
        add_streams(words, ring, streams)

    def add() -> None:
        for vector in vectors:
            np.add(total, vector, out=total)

    return ratio_of(interleaved(mask, add, pairs))


def against_sfc64(ring: Ring, *, pairs: int) -> dict[str, Any]:
    words, streams = ring.zeros(), fresh_streams()
    generator = np.random.Generator(np.random.SFC64())

    def mask() -> None:
        add_streams(words, ring, streams)

    def draw() -> None:
        for _ in range(STREAMS * ring.nbytes // (8 * BLOCK)):
            generator.bit_generator.random_raw(BLOCK)

    return ratio_of(interleaved(mask, draw, pairs))


def encoding(ring: Ring, *, pairs: int) -> dict[str, Any]:
    """CPU time of encoding one float32 vector over that of decoding its words."""
    codec, source = FixedPoint(ring, STREAMS, 1.0), OsNoise()
    vector = np.random.default_rng(0).uniform(-1, 1, ring.body).astype(np.float32)
    words = codec.encode(vector, np.zeros(0), source)

    def encode() -> None:
        codec.encode(vector, np.zeros(0), source)

    def decode() -> None:
        codec.decode(words)

    return ratio_of(interleaved(encode, decode, pairs))


def fresh_streams() -> list[tuple[bytes, int]]:
    return [(os.urandom(SECRET), 1 if i % 2 else -1) for i in range(STREAMS)]


def ratio_of(ratio: dict[str, Any]) -> dict[str, Any]:
    ours_s, other_s = ratio.pop("seconds"), ratio.pop("seconds_other")
    return {"cpu_ratio": ratio, "ms": 1e3 * ours_s, "other_ms": 1e3 * other_s}


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    body, pairs = (2 * 10**5, 5) if options.quick else (10**6, 15)
    all_bits: tuple[Literal[16, 20, 32], ...] = (16, 20, 32)
    results = {
        "masks_32_over_float_sum": against_float_sum(Ring(32, body, 0), pairs=pairs),
        "masks_32_over_sfc64": against_sfc64(Ring(32, body, 0), pairs=pairs),
        "masks_20_over_float_sum": against_float_sum(Ring(20, body, 0), pairs=pairs),
        "masks_16_over_float_sum": against_float_sum(Ring(16, body, 0), pairs=pairs),
        **{f"encode_{bits}_over_decode": encoding(Ring(bits, body, 0), pairs=pairs) for bits in all_bits},
    }
    finish(
        {"coordinates": body, "streams": STREAMS, "masks": results},
        as_json=options.json,
        lines=[
            f"{name:<25} {r['ms']:7.2f} ms, other {r['other_ms']:7.2f} ms, "
            f"ratio {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}, {ratio['n']} pairs)"
            for name, r in results.items()
            for ratio in [r["cpu_ratio"]]
        ],
    )


if __name__ == "__main__":
    main()

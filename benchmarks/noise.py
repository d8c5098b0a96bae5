"""Exact integer noise against numpy's float normals: samples a second on one core, at scales from 3 to 2^20.

A ratio is our rate over that of `Generator.normal`, timed in turn: 1 is as fast, 0.5 takes twice as long. "words" is
the bare keystream, AES-256-CTR keyed from os.urandom, of which a draw consumes one word a table. "first_s" is what the
first sample of a scale costs, as its table of 256-bit cumulative probabilities is built; "cold" is the draw after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from measure import finish, interleaved, parser

from privacy.noise import NoiseSource, OsNoise, discrete_gaussian, skellam

Law = Callable[[NoiseSource, float, int], object]
CASES: list[tuple[str, Law, float]] = [
    *((f"discrete_gaussian_{scale:.0f}", discrete_gaussian, scale) for scale in (3.0, 30.0, 300.0, 3000.0, 2.0**20)),
    *((f"skellam_{scale:.0f}", skellam, scale) for scale in (3.0, 30.0, 300.0, 3000.0)),
]


def against_numpy(ours: Callable[[], object], scale: float, *, size: int, pairs: int) -> dict[str, Any]:
    rng = np.random.default_rng()

    def draw() -> None:
        ours()

    def draw_numpy() -> None:
        rng.normal(scale=scale, size=size)

    cold_s = cpu_seconds(draw)
    ratio = interleaved(draw_numpy, draw, pairs)  # Their time over ours is our rate over theirs.
    numpy_s, ours_s = ratio.pop("seconds"), ratio.pop("seconds_other")
    return {
        "rate_over_numpy": ratio,
        "million_samples_per_s": size / ours_s / 1e6,
        "numpy_million_samples_per_s": size / numpy_s / 1e6,
        "cold_million_samples_per_s": size / cold_s / 1e6,
    }


def cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    size, pairs = (2**18, 5) if options.quick else (2**21, 15)
    source, results = OsNoise(), dict[str, dict[str, Any]]()
    results["words"] = against_numpy(partial(source.words, size), 1.0, size=size, pairs=pairs)
    for name, law, scale in CASES:
        first_s = cpu_seconds(partial(law, source, scale, 1))
        results[name] = against_numpy(partial(law, source, scale, size), scale, size=size, pairs=pairs)
        results[name]["first_s"] = first_s
    finish(
        {"samples_per_call": size, "noise": results},
        as_json=options.json,
        lines=[
            f"{name:<25} {r['million_samples_per_s']:6.1f} M/s (cold {r['cold_million_samples_per_s']:5.1f}), "
            f"over numpy {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}, {ratio['n']} pairs)"
            for name, r in results.items()
            for ratio in [r["rate_over_numpy"]]
        ],
    )


if __name__ == "__main__":
    main()

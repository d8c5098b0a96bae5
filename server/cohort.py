"""Who is asked in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw_cohort(sites: Sequence[str], *, size: int | None, seed: int, round_number: int) -> list[str]:
    """`size` distinct sites, uniformly, the same for the same seed and round; None or too large means everyone.

    The draw is public: no accountant here charges less because of it.
    """
    if size is None or size >= len(sites):
        return list(sites)
    chosen = np.random.default_rng([seed, round_number]).choice(len(sites), size=size, replace=False)
    return [sites[index] for index in sorted(chosen)]

"""Cohorts that are drawn in public: whoever has the job and the list of sites knows whom a round asks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def public_cohort(sites: Sequence[str], size: int | None, *, seed: int, round_number: int) -> list[str]:
    """`size` of `sites`, drawn by the job's `seed` for a round, in their order; everyone without a size."""
    if size is None or size >= len(sites):
        return list(sites)
    drawn = np.random.default_rng([seed, round_number]).choice(len(sites), size=size, replace=False)
    return [sites[index] for index in sorted(drawn)]

"""Who is asked in a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from privacy.noise import NoiseSource, poisson_sample
from strategies.cohort import public_cohort
from strategies.job import Cohort


def draw_cohort(
    sites: Sequence[str],
    cohort: Cohort,
    *,
    seed: int,
    round_number: int,
    secret: Callable[[int], NoiseSource],
) -> list[str]:
    """Who of `sites` is asked in `round_number`, in their order.

    | `cohort`     | who                                                                        | charged       |
    |--------------|----------------------------------------------------------------------------|---------------|
    | nothing      | everyone                                                                   | as everyone   |
    | `size`       | so many, and `over` more, drawn by `seed`: the draw is public              | as everyone   |
    | `rate`       | each by its own coin from `secret` noise of the round; nobody is possible  | as a sample   |
    | `separation` | each exactly every so many rounds, in an order drawn by `seed`: public     | by its counts |
    """
    if cohort.rate is not None:
        chosen = poisson_sample(secret(round_number), len(sites), cohort.rate)
        return [sites[index] for index in chosen]
    if cohort.separation is not None:
        turn = np.random.default_rng([seed]).permutation(len(sites)) % cohort.separation
        return [site for site, due in zip(sites, turn, strict=True) if due == (round_number - 1) % cohort.separation]
    return public_cohort(sites, cohort.asked, seed=seed, round_number=round_number)


def expected_size(clients: int, cohort: Cohort) -> float:
    """How many a round asks on average: public, and what a private sum is divided by."""
    if cohort.rate is not None:
        return cohort.rate * clients
    return clients / cohort.separation if cohort.separation is not None else min(cohort.size or clients, clients)

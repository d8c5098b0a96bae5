"""Robust reductions: what stands in place of a round's sum where some sites, or groups of them, may lie.

Norm bounding: Sun et al. 2019, *Can You Really Backdoor Federated Learning?* (arXiv:1911.07963). Coordinate median and
trimmed mean: Yin et al. 2018, *Byzantine-Robust Distributed Learning* (arXiv:1803.01498). Krum and multi-Krum:
Blanchard et al. 2017, *Machine Learning with Adversaries* (NeurIPS); multi-Krum here averages the n - f - 2 best of n.
Geometric median: Pillutla et al. 2022, *Robust Aggregation for Federated Learning* (arXiv:1912.13445), by Weiszfeld's
smoothed steps.

None of them is a sum. Each is a function of n updates, an update being a sum of contributions over its weight, and all
n count alike: a weight is a claim, and a lie about it would be worth as much as one about the update. The result is
handed on as n times the median weight, so that a strategy's server half sees a `Total` like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.job import Job
from strategies.job_privacy import Robust
from strategies.parameters import Vector
from strategies.total import Layout, Total

Array = NDArray[np.float64]
BLOCK = 2**20  # Numbers that are worked on at once.
STEPS, CLOSE = 64, 1e-7  # Weiszfeld's: at most so many; over when no update's share changes by more.
SMOOTHING = 1e-6  # ... in which no update counts as closer than so much of the typical distance.


def reduced(robust: Robust, layout: Layout, contributions: Sequence[NDArray[np.floating]], *, byzantine: int) -> Array:
    """What stands for the sum of `contributions` (each (layout.size,), sums of sites with a weight above zero).

    Returns (layout.size,) float64. Guarantee, with n contributions of which f = min(`byzantine`, what n can bear) are
    anything at all, and the others within a distance d of each other: with "median" and "trimmed-mean" each number of
    the mean update is between those of honest ones; with "krum" it is within d (1 + sqrt((n - f - 2) / (n - 2 f - 1)))
    of every honest one, and so is each update that "multi-krum" averages; with "geometric-median" within
    d (1 + 2 (n - f) / (n - 2 f)). With "sum" and `robust.max_norm` its norm is at most that. The weight is n times the
    median weight; metric sums are added up, as they steer nothing.
    """
    whole = np.zeros(layout.size)
    for contribution in contributions:
        whole += contribution
    if robust.plain:
        return whole
    borne = min(byzantine, most_borne(robust.reduce, len(contributions)))
    update = REDUCTIONS[robust.reduce](Updates.of(robust, layout, contributions), borne)
    return _handed_on(whole, layout, update, [float(each[layout.parameters]) for each in contributions])


def liars(robust: Robust, asked: int) -> int:
    """How many of so many that are asked may lie: what the job says, or a fifth, rounded up."""
    return robust.byzantine or -(-asked // 5)


def most_borne(reduce: str, count: int) -> int:
    """How many of `count` may lie at most, whatever the job says, for `reduce` to mean anything."""
    return max(0, (count - _MORE.get(reduce, count)) // 2)


def fewest(reduce: str, byzantine: int) -> int:
    """Of how many `byzantine` may lie."""
    return 2 * byzantine + _MORE[reduce] if reduce in _MORE else 1


def why_too_few(robust: Robust, count: int, what: str) -> str | None:
    """Why `count` of `what` ("sites") are too few for the job's reduction, and what would do; None if they are not."""
    borne = liars(robust, count)
    if count >= (needed := fewest(robust.reduce, borne)):
        return None
    if most := most_borne(robust.reduce, count):
        instead = f"set robust.byzantine = {most}"
    else:
        instead = 'take reduce = "median"' if count >= 3 else "leave [robust] out"
    said = f'robust.reduce = "{robust.reduce}"'
    return f"{said} bears {borne} that lie of {needed} {what} or more, not of {count}: {instead}"


def check_robust(job: Job, *, sites: int, layout: Layout) -> None:
    """Raise `JobError` if a round of a federation of `sites` has too few updates, or more of them than may be kept."""
    robust, asked = job.robust, min(job.cohort.size or sites, sites)
    if robust.plain or _streams(robust) or job.secure_aggregation is not None:
        return
    if why := why_too_few(robust, asked, "sites"):
        raise JobError(why)
    taken = -(-asked * layout.size * 4 // 2**20)
    if taken > robust.memory_mib:
        raise JobError(
            f"robust.memory_mib = {robust.memory_mib}: {asked} updates of {layout.size:,} numbers take {taken:,} MiB "
            "of the server's memory in a round; raise it, set cohort.size, or use a max_norm that is a number alone, "
            "which keeps none"
        )


# -- totals that are no sums -------------------------------------------------------------------------------------------


class Gathered(Total):
    """A total that keeps each contribution as it came, 4 bytes a number, for what needs all of them at once."""

    def __init__(self, layout: Layout, robust: Robust, asked: int) -> None:
        super().__init__(Layout(0))  # Nothing is added up.
        self.layout, self._robust, self._count = layout, robust, 0
        self._rows = np.empty((asked, layout.size), dtype=np.float32)

    def add(self, contribution: Vector) -> None:
        self._rows[self._count] = contribution
        self._count += 1

    def reduced(self, byzantine: int) -> Array:
        """See `reduced`."""
        return reduced(self._robust, self.layout, list(self._rows[: self._count]), byzantine=byzantine)


class Bounded(Total):
    """The running sum of updates that are scaled down to a number, `max_norm`: O(model) memory, like a plain total."""

    def __init__(self, layout: Layout, robust: Robust) -> None:
        super().__init__(layout)
        self._robust, self._weights = robust, list[float]()

    def add(self, contribution: Vector) -> None:
        parameters = self.layout.parameters
        for where, block in Updates.of(self._robust, self.layout, [contribution]).blocks():
            self._sum[where] += block[0]
        self._sum[parameters + 1 :] += contribution[parameters + 1 :]
        self._weights.append(float(contribution[parameters]))

    def reduced(self, byzantine: int) -> Array:
        """See `reduced`, which comes to the same."""
        update = self._sum[: self.layout.parameters] / max(1, len(self._weights))
        return _handed_on(self._sum.copy(), self.layout, update, self._weights)


def gather(robust: Robust, layout: Layout, asked: int) -> Gathered | Bounded:
    """A fresh total for a round that asks so many sites, in the least memory that the reduction allows."""
    return Bounded(layout, robust) if _streams(robust) else Gathered(layout, robust, asked)


def _streams(robust: Robust) -> bool:
    return robust.reduce == "sum" and isinstance(robust.max_norm, float)


def _handed_on(whole: Array, layout: Layout, update: Array, weights: Sequence[float]) -> Array:
    """`whole`, a sum of contributions, with the mean `update` and the weight of a reduction in place of its own."""
    weight = float(np.median(weights)) * len(weights) if weights else 0.0
    whole[: layout.parameters] = update * weight
    whole[layout.parameters] = weight
    return whole


# -- the reductions: n updates, of which f may lie, to one -------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """n updates of `size` numbers: the beginnings of `rows`, each times its factor. Read in blocks."""

    rows: Sequence[NDArray[np.floating]]
    factors: Array
    size: int

    @classmethod
    def of(cls, robust: Robust, layout: Layout, contributions: Sequence[NDArray[np.floating]]) -> Updates:
        """Those of `contributions`, each over its weight, and no longer than `robust.max_norm`."""
        weights = np.array([float(each[layout.parameters]) for each in contributions])
        updates = cls(contributions, 1 / weights, layout.parameters)
        if robust.max_norm is None:
            return updates
        norms = updates.norms()
        # Of an even number the lower one: the upper may be a liar's.
        bound = robust.max_norm if isinstance(robust.max_norm, float) else np.sort(norms)[(len(norms) - 1) // 2]
        return replace(updates, factors=updates.factors * (bound / np.maximum(norms, bound) if bound else 0.0))

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Which numbers, and those of all updates: (n, b) float64."""
        wide = max(1, BLOCK // len(self.rows))
        for start in range(0, self.size, wide):
            where = slice(start, min(start + wide, self.size))
            yield where, np.array([row[where] for row in self.rows], dtype=np.float64) * self.factors[:, None]

    def mapped(self, of: Callable[[Array], Array]) -> Array:
        """(size,) float64, made by `of` of each block."""
        out = np.empty(self.size)
        for where, block in self.blocks():
            out[where] = of(block)
        return out

    def norms(self) -> Array:
        """(n,) float64: the L2 norm of each."""
        return np.sqrt(sum((np.square(block).sum(axis=1) for _, block in self.blocks()), np.zeros(len(self))))


def mean(updates: Updates, byzantine: int) -> Array:
    return updates.mapped(lambda block: block.mean(axis=0))


def median(updates: Updates, byzantine: int) -> Array:
    """Of each number by itself; of an even number of updates the mean of the two in the middle."""
    return trimmed_mean(updates, (len(updates) - 1) // 2)


def trimmed_mean(updates: Updates, byzantine: int) -> Array:
    """Of each number by itself, without the `byzantine` largest and smallest."""
    kept = slice(byzantine, len(updates) - byzantine)
    return updates.mapped(lambda block: np.sort(block, axis=0)[kept].mean(axis=0))


def krum(updates: Updates, byzantine: int) -> Array:
    """The update whose n - f - 2 nearest are nearest (their squared distances added up); of equals the first."""
    best = _ranked(updates, byzantine)[0]
    return updates.mapped(lambda block: block[best])


def multi_krum(updates: Updates, byzantine: int) -> Array:
    """The mean of the n - f - 2 updates that come first by Krum."""
    best = np.sort(_ranked(updates, byzantine)[: max(1, len(updates) - byzantine - 2)])
    return updates.mapped(lambda block: block[best].mean(axis=0))


def geometric_median(updates: Updates, byzantine: int) -> Array:
    """The point whose distances to all updates add up to the least, nearly: Weiszfeld's smoothed steps."""
    # From the median, not the mean as in the paper: one liar far enough away would use up all steps.
    start, shares = median(updates, byzantine), np.zeros(len(updates))
    squares = np.zeros(len(updates))
    for where, block in updates.blocks():
        squares += np.square(block - start[where]).sum(axis=1)
    typical = float(np.median(np.sqrt(squares)))
    if typical == 0:
        return start  # Most of them are this very point.
    for _ in range(STEPS):
        pulls = 1 / np.maximum(np.sqrt(squares), SMOOTHING * typical)
        before, shares, squares = shares, pulls / pulls.sum(), np.zeros(len(updates))
        for _, block in updates.blocks():
            squares += np.square(block - shares @ block).sum(axis=1)
        if np.abs(shares - before).max() < CLOSE:
            break
    return updates.mapped(lambda block: shares @ block)


REDUCTIONS: Mapping[str, Callable[[Updates, int], Array]] = {
    "sum": mean,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
}
# How many updates more than two for each liar: half of them honest, or also enough to be near each other.
_MORE = {"median": 1, "trimmed-mean": 1, "geometric-median": 1, "krum": 3, "multi-krum": 3}


def _ranked(updates: Updates, byzantine: int) -> NDArray[np.intp]:
    squares = _squared_distances(updates)
    nearest = np.sort(squares, axis=1)[:, 1 : len(updates) - byzantine - 1]  # The first is the update itself.
    return np.argsort(nearest.sum(axis=1), kind="stable")


def _squared_distances(updates: Updates) -> Array:
    """(n, n) float64. By products, which are fast; around the median, as what honest ones share would cost digits."""
    products = np.zeros((len(updates), len(updates)))
    for _, block in updates.blocks():
        centred = block - np.median(block, axis=0)
        products += centred @ centred.T
    own = np.diag(products)
    squares = np.maximum(own[:, None] + own[None, :] - 2 * products, 0.0)
    np.fill_diagonal(squares, 0.0)
    return squares

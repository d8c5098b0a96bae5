"""Noise correlated over rounds: the matrix mechanism (DP-FTRL), for training whose sampling nobody can vouch for.

A model is a sum of rounds, so what counts is the error of prefix sums. With X the rounds' sums, A the matrix that takes
prefix sums, C lower triangular with ones on its diagonal and Z independent noise, the model sees A (X + C^-1 Z): noise
that partly cancels over rounds, at the privacy of one Gaussian release of C X + Z. No amplification is claimed, only
that a client takes part at most k times and b rounds apart (`Participation`), which `ParticipationCounter` enforces.

| `Strategy`         | C, Toeplitz with coefficients c_0 = 1, c_1, ...             | keeps             |
|--------------------|-------------------------------------------------------------|-------------------|
| `Banded`           | c_i = 0 from the band on; `banded_coefficients` are optimal | band - 1 vectors  |
| `BufferedToeplitz` | c_i = sum_j weight_j decay_j^(i-1); `blt_coefficients`      | a vector a buffer |

Sources: Denisov et al. 2022 (arXiv:2202.08312), the mechanism on adaptive streams; Choquette-Choo et al. 2023
(arXiv:2306.08153), bands; Kalinin and Lampert 2024 (arXiv:2405.13763), the closed form and the sensitivity; Dvijotham
et al. 2024 (arXiv:2404.16706), buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from privacy.errors import RunError, UnsupportedEvent
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import MAX_SCALE, NoiseSource, discrete_gaussian, discretisation_tv

FINER = 2**8  # The noise's grid is finer than the data's, so that rounding the history of the noise costs next to none.
STEPS = STEPS_PER_CLIP * FINER
STEPS_MOVED = 2  # By which a rounded history can differ between neighbours in a coordinate: 1, and 1 for float64.
REACH = 20.0  # Noise of more scales than this has probability below 2^-290 a coordinate.
UNIT_ROUNDOFF = 2.0**-53

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Participation:
    """State that in `rounds` rounds a client takes part at most `participations` times, each `separation` rounds apart.

    Taking part in rounds s < t requires t - s >= separation; separation 1 allows every round. Raises `UnsupportedEvent`
    unless 1 <= separation <= rounds and 1 <= participations <= ceil(rounds / separation): no more would fit.
    """

    rounds: int
    participations: int
    separation: int

    def __post_init__(self) -> None:
        _require_whole("rounds", self.rounds, 2**30)
        _require_whole("separation", self.separation, self.rounds)
        _require_whole("participations", self.participations, -(-self.rounds // self.separation))


class ParticipationCounter:
    """Admits clients as long as each keeps to `participation`; what the sensitivity assumes, this enforces.

    An admitted client counts as having taken part, whether or not its update arrives. Not for use by two threads.
    """

    def __init__(self, participation: Participation) -> None:
        self.participation = participation
        self._taken: dict[str, tuple[int, int]] = {}  # How often each client took part, and in which round last.

    def admit(self, client: str, round_number: int) -> None:
        """Count `client` into round `round_number` (from 1), or raise `UnsupportedEvent` and count nothing.

        Raises for a client that took part `participations` times already, or less than `separation` rounds before
        `round_number`, or in a later round; and for a round outside 1, ..., `rounds`.
        """
        allowed = self.participation
        if not isinstance(client, str):  # JSON would make it one, and a resumed run would not know the client again.
            raise UnsupportedEvent(f"client must be a string, got {client!r}")
        _require_whole("round_number", round_number, allowed.rounds)
        count, last = self._taken.get(client, (0, round_number - allowed.separation))
        if count >= allowed.participations:
            raise UnsupportedEvent(f"client {client!r} took part {count} times; leave it out of round {round_number}")
        if round_number - last < allowed.separation:
            raise UnsupportedEvent(
                f"client {client!r} took part in round {last}, and rounds must be {allowed.separation} apart; "
                f"leave it out of round {round_number}"
            )
        self._taken[client] = (count + 1, round_number)

    def as_dict(self) -> dict[str, Any]:
        """The counter in JSON's types."""
        limits = self.participation
        return {
            "v": 1,
            "limits": [limits.rounds, limits.participations, limits.separation],
            "clients": {client: list(taken) for client, taken in sorted(self._taken.items())},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ParticipationCounter:
        """Read what `as_dict` wrote. Raises `RunError` for anything that it cannot have written."""
        try:
            rounds, participations, separation = record["limits"]
            limits = Participation(rounds=rounds, participations=participations, separation=separation)
            counter = cls(limits)
            for client, (count, last) in record["clients"].items():
                _require_whole("count", count, participations)
                _require_whole("last round", last, rounds)
                if not isinstance(client, str) or last <= (count - 1) * separation:
                    raise UnsupportedEvent(f"{count} times up to round {last} are not {separation} apart")
                counter._taken[client] = (count, last)
        except (KeyError, TypeError, ValueError, AttributeError, UnsupportedEvent) as error:
            raise RunError(f"a participation counter is malformed: {type(error).__name__}: {error}") from None
        if counter.as_dict() != record:
            raise RunError("a participation counter is malformed: it is not of version 1 or has other keys")
        return counter


@dataclass(frozen=True)
class Banded:
    """Toeplitz C with coefficients 1, c_1, ..., c_{band-1}, zero after; `Banded((1.0,))` is independent noise."""

    band: tuple[float, ...]

    def coefficients(self, rounds: int) -> Vector:
        """c_0, ..., (min(band, rounds),) float64."""
        return np.array(self.band[:rounds], np.float64)

    def memory(self, rounds: int) -> int:
        """How many vectors are `kept` between rounds; they start as zeros."""
        return min(len(self.band), rounds) - 1

    def history(self, kept: Vector) -> Vector:
        """sum_{i>=1} c_i w_{t-i} of the earlier vectors w: (memory, d) to (d,) float64."""
        return _combined(self.band[1:], kept)

    def remember(self, kept: Vector, latest: Vector) -> Vector:
        """What is kept after `latest` (d,): a new (memory, d)."""
        return np.concatenate([latest[None], kept])[: len(kept)]

    def roundoff(self, rounds: int) -> float:
        """Bound the error of `history` in float64, relative to the largest |C w|."""
        # Higham 2002, sec. 3.1: a sum of m products errs by m u sum |c_i w_i|; and |w| <= ||C^-1||_1 |C w|.
        c = self.coefficients(rounds)
        return float(1.01 * UNIT_ROUNDOFF * len(c) * np.abs(c[1:]).sum() * np.abs(_inverse(c, rounds)).sum())


@dataclass(frozen=True)
class BufferedToeplitz:
    """Toeplitz C with c_i = sum_j weights[j] decays[j]^(i-1) for i >= 1 (BLT); methods as in `Banded`.

    Positive weights of sum at most 1 and decays in (0, 1 - 2^-20], else `UnsupportedEvent`: then 1 >= c_1 >= c_2 >= ...
    """

    weights: tuple[float, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.weights) == len(self.decays):
            raise UnsupportedEvent(f"weights and decays must match, got {len(self.weights)} and {len(self.decays)}")
        if not (min(self.weights) > 0 and math.fsum(self.weights) <= 1):
            raise UnsupportedEvent(f"weights must be positive and of sum at most 1, got {self.weights}")
        # Closer to 1, powers rounded to float64 need not decrease.
        if not all(0 < decay <= 1 - 2.0**-20 for decay in self.decays):
            raise UnsupportedEvent(f"decays must lie in (0, 1 - 2^-20], got {self.decays}")

    def coefficients(self, rounds: int) -> Vector:
        return _buffered(np.array(self.weights), np.array(self.decays), rounds)[0]

    def memory(self, rounds: int) -> int:
        return len(self.weights)

    def history(self, kept: Vector) -> Vector:
        return _combined(self.weights, kept)

    def remember(self, kept: Vector, latest: Vector) -> Vector:
        return np.array(self.decays)[:, None] * kept + latest

    def roundoff(self, rounds: int) -> float:
        # A buffer is 1 / ((1 - decay x) C(x)) applied to C w. Each round rounds it twice, and forgets by the decay.
        inverse, total = _inverse(self.coefficients(rounds), rounds), 0.0
        for weight, decay in zip(self.weights, self.decays, strict=True):
            powers: Vector = decay ** np.arange(rounds, dtype=np.float64)
            largest = np.abs(_convolved(powers, inverse)[:rounds]).sum()
            total += weight * largest * (2 * powers.sum() + len(self.weights) + 1)
        return float(1.01 * UNIT_ROUNDOFF * total)


Strategy = Banded | BufferedToeplitz  # Closed: the guarantee holds if `history` is that of `coefficients`.


def bsr_coefficients(rounds: int, band: int) -> Vector:
    """Give the first `band` coefficients of the square root of A: c_i = c_{i-1} (2i - 1) / (2i), (band,) float64.

    With the separation as its band, no two of a client's columns overlap. Source: arXiv:2405.13763. Raises
    `UnsupportedEvent` for a band outside 1, ..., rounds.
    """
    _require_whole("rounds", rounds, 2**30)
    _require_whole("band", band, rounds)
    i = np.arange(1, band)
    return np.concatenate([np.ones(1), np.cumprod((2 * i - 1) / (2 * i))])


@lru_cache(maxsize=64)
def banded_coefficients(participation: Participation) -> Vector:
    """Find the coefficients of least `prefix_sum_rmse` with band = separation: (separation,) float64, read-only.

    Where the last participations are cut off by the last round, the optimum need not be non-increasing; with this
    band its sensitivity is proved nevertheless.
    """
    first = bsr_coefficients(participation.rounds, participation.separation)

    def cost(tail: Vector) -> tuple[float, Vector]:
        value, gradient = _log_cost(np.concatenate([np.ones(1), tail]), participation)
        return value, gradient[1:]

    best = np.concatenate([np.ones(1), _least(cost, first[1:], bound=1.0)]) if len(first) > 1 else first
    best.setflags(write=False)
    return best


@lru_cache(maxsize=64, typed=True)  # 1.0 is refused even after 1 was answered.
def blt_coefficients(participation: Participation, buffers: int = 4) -> tuple[BufferedToeplitz, Vector]:
    """Find `buffers` weights and decays of low `prefix_sum_rmse`, and their coefficients: (rounds,) float64, read-only.

    The cost has local minima; the better of two searches is returned, one that starts from decays spread over the
    separation and one over all rounds. Superfluous buffers come out equal. Raises `UnsupportedEvent` unless buffers is
    1, ..., 64.
    """
    _require_whole("buffers", buffers, 64)
    rounds = participation.rounds

    def parameters(free: Vector) -> tuple[Vector, Vector]:
        # Softmax beside a fixed 0, so that the weights are positive and their sum is below 1.
        exponentials = np.exp(free[:buffers])
        return exponentials / (1 + exponentials.sum()), expit(free[buffers:])

    def cost(free: Vector) -> tuple[float, Vector]:
        weights, decays = parameters(free)
        c, powers = _buffered(weights, decays, rounds)
        value, gradient = _log_cost(c, participation)
        by_weight = powers @ gradient[1:]
        by_decay = weights * (powers[:, :-1] * np.arange(1, max(rounds - 1, 1)) @ gradient[2:])
        return value, np.concatenate([weights * (by_weight - weights @ by_weight), by_decay * decays * (1 - decays)])

    searches = []
    for longest in (participation.separation / 2, rounds):
        memory = np.geomspace(1.0, max(longest, 2.0), buffers)
        weights = memory**-0.5 / (2 * (memory**-0.5).sum())
        start = np.concatenate([np.log(2 * weights), logit(np.exp(-1 / memory))])
        searches.append(_least(cost, start, bound=13.5, precision=1e-9))
    weights, decays = parameters(min(searches, key=lambda free: cost(free)[0]))
    strategy = BufferedToeplitz(tuple(weights.tolist()), tuple(decays.tolist()))
    coefficients = strategy.coefficients(rounds)
    coefficients.setflags(write=False)
    return strategy, coefficients


def sensitivity(coefficients: Vector, participation: Participation) -> float:
    """Derive the L2 sensitivity of C X per clip norm, for all that one client adds in all its rounds.

    Guarantee: if x_t and x'_t differ by one client's vectors, each of L2 norm at most 1, in rounds that keep to
    `participation`, then ||C (X - X')|| <= the value returned; attained by equal vectors in rounds 1, 1 + b, ....

    Proof. With C_t the columns and u_t the client's vectors, ||C (X - X')||^2 = sum_{s,t} <C_s, C_t> <u_s, u_t> <=
    sum_{s,t} |<C_s, C_t>|, and <C_s, C_t> = sum_i c_i c_{i+t-s} over 0 <= i < n - t for s <= t. If c is non-negative
    and non-increasing, that grows neither with t nor with t - s; if the band is at most b, different columns do not
    overlap, and ||C_t|| does not grow with t. Either way round j of the client is at least 1 + j b, and rounds i < j
    are at least (j - i) b apart, so 1, 1 + b, ..., 1 + (k - 1) b is worst: || sum_{j<k} C_{1+jb} ||, which is
    sqrt(k) ||c|| for a band of at most b that no last round cuts off.

    `coefficients`: (m,) with m <= rounds, the rest being 0, and c_0 = 1. Raises `UnsupportedEvent` for coefficients
    that are not such, or that are negative or increasing with a band beyond the separation: nothing is proved there.
    """
    c = _checked(coefficients, participation)
    return float(np.linalg.norm(_worst(c, participation)))


def rounded_sensitivity(strategy: Strategy, participation: Participation, *, dimension: int) -> float:
    """Derive the L2 sensitivity of what `CorrelatedSum` adds noise to, in clip norms: `sensitivity` and rounding.

    Only what has a history is rounded, from round 2 on: proof in `CorrelatedSum`. Errors as in `sensitivity`.
    """
    exact = sensitivity(strategy.coefficients(participation.rounds), participation)
    rounded = participation.rounds - 1 if strategy.memory(participation.rounds) else 0
    return exact + STEPS_MOVED * math.sqrt(rounded * dimension) / STEPS


def prefix_sum_rmse(coefficients: Vector, participation: Participation) -> float:
    """Give the root mean squared error of the prefix sums, over rounds, at noise multiplier 1 and clip norm 1.

    sensitivity(C) times the root of (1/n) sum_t sum_{s<=t} (A C^-1)_{ts}^2. `coefficients` and errors as in
    `sensitivity`.
    """
    c, n = _checked(coefficients, participation), participation.rounds
    sums = np.cumsum(_inverse(c, n))
    return sensitivity(c, participation) * math.sqrt(np.arange(n, 0, -1) @ sums**2 / n)


@dataclass(frozen=True, eq=False)
class CorrelatedState:
    """What a run must keep between two rounds: the next `round_number` (from 1), and of the noise what is `kept`.

    Secret: who has it and a release has that round's sum. Releasing twice from one state breaks the guarantee.
    """

    round_number: int
    kept: Vector  # (memory, d) float64.

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state as arrays that `from_arrays` reads."""
        return {"correlated/v1": np.array(self.round_number, np.int64), "kept": self.kept}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> CorrelatedState:
        """Read a state. Raises `RunError` for anything that `arrays` cannot have written."""
        if set(arrays) != {"correlated/v1", "kept"}:
            raise RunError(f"a noise state must hold correlated/v1 and kept, got {sorted(arrays)}")
        number, kept = np.asarray(arrays["correlated/v1"]), np.asarray(arrays["kept"])
        if number.dtype != np.int64 or number.shape != () or number < 1:
            raise RunError("a noise state's round number must be one int64 of 1 or more")
        if kept.dtype != np.float64 or kept.ndim != 2 or not np.isfinite(kept).all():
            raise RunError("a noise state's kept vectors must be a finite float64 matrix")
        return cls(int(number), kept.copy())


@dataclass(frozen=True, kw_only=True)
class CorrelatedSum:
    """Release `participation.rounds` sums of clipped vectors, with noise whose prefix sums partly cancel.

    Guarantee: the releases of all rounds together are one Gaussian mechanism of noise multiplier `noise_multiplier`
    (mu = 1 / noise_multiplier, no amplification) under add/remove-one client that gives `quantised` one vector a round,
    in rounds that keep to `participation`, up to the total variation `discretisation_tv`: (eps, delta) becomes
    (eps, delta + (1 + e^eps) tv). Vectors and cohorts may depend on earlier releases, and training may stop early.

    Proof, in grid steps, 2^28 a clip norm. Round t releases x^_t = x_t + w_t with w_t = z_t - G_t(w_1, ..., w_{t-1}),
    where z_t is fresh integer noise and G_t the `history` rounded to integers. As w_s = x^_s - x_s, what is released is
    z_t plus the integers q_t = x_t - G_t(x^_1 - x_1, ..., x^_{t-1} - x_{t-1}): a query of the data and of earlier
    releases. Given the same releases, neighbours' queries differ by (C (X - X'))_t, for G_t is linear up to its
    rounding, plus in each coordinate of each round but the first at most 1 for two roundings and 1 for two errors of
    float64. Over all rounds, that is in L2 at most 2^28 sensitivity(C) + 2 sqrt((rounds - 1) dimension), whatever the
    releases were, to which the noise is scaled (`rounded_sensitivity`; that float64 computes it is within the 2^-24 by
    which `GaussianSum` shrinks the clip). Gaussian queries chosen adaptively, whose squared differences sum up to
    no more than Delta^2 whatever was released, are no worse than one of sensitivity Delta (arXiv:2210.17520); rounding
    them is post-processing, and `privacy.noise.discretisation_tv` pays for the rest. Float errors stay below 1/2 as
    long as no |z| exceeds 20 scales; suppose G_t exact beyond. That it is not matters with probability 2^-290 a
    coordinate, which the slack of `discretisation_tv` holds.

    Also remembering sums x_t, to release C X + Z itself and solve for X afterwards, was rejected: twice the memory, and
    a float error that grows with the cohort. Here no float ever depends on the data.

    | what comes                                     | what is released                                       |
    |------------------------------------------------|--------------------------------------------------------|
    | a vector NaN, infinite, too long or zero; none | as in `GaussianSum`: clipped or zero, and noise        |
    | a total that leaves int64 with its noise       | wraps around: post-processing; no other round shows it |

    Raises `UnsupportedEvent` for what `GaussianSum` or `sensitivity` refuse, a dimension outside 1, ..., 2^40, noise
    wider than 2^40 steps, and a strategy under which float64 could err by half a step.
    """

    clip_norm: float
    noise_multiplier: float
    strategy: Strategy
    participation: Participation
    dimension: int

    def __post_init__(self) -> None:
        _require_whole("dimension", self.dimension, 2**40)
        GaussianSum(clip_norm=self.clip_norm, noise_multiplier=self.noise_multiplier)  # Refuses either out of range.
        if not self.scale <= MAX_SCALE:
            raise UnsupportedEvent(
                f"noise_multiplier times the strategy's sensitivity must be at most 2^12, got {self.scale / STEPS:g}"
            )
        error = self.strategy.roundoff(self.participation.rounds) * (REACH * self.scale + 1)
        if not error <= (STEPS_MOVED - 1) / 2:
            raise UnsupportedEvent(
                f"noise_multiplier {self.noise_multiplier:g} makes this strategy's float64 err by {error:g} steps, "
                "but 0.5 are accounted for; lower it or take a shorter band"
            )

    @cached_property
    def scale(self) -> float:
        """The standard deviation of the integer noise z_t, in steps; its variance is 1/12 above what is charged."""
        moved = rounded_sensitivity(self.strategy, self.participation, dimension=self.dimension)
        return math.sqrt((self.noise_multiplier * moved * STEPS) ** 2 + 1 / 12)

    @property
    def discretisation_tv(self) -> float:
        """The total variation of all rounds' integer noise from the continuous Gaussian that is charged."""
        return discretisation_tv(self.scale, self.dimension, self.participation.rounds)

    def start(self) -> CorrelatedState:
        """The state before the first round."""
        return CorrelatedState(1, np.zeros((self.strategy.memory(self.participation.rounds), self.dimension)))

    def quantised(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Clip each row of `vectors` ((n, d), float), put it on the grid and sum: (d,) int64, in 2^-28 clip norms."""
        coarse = GaussianSum(clip_norm=self.clip_norm, noise_multiplier=self.noise_multiplier)
        return coarse.quantised_sum(vectors) * FINER

    def release(
        self, state: CorrelatedState, total: NDArray[np.int64], source: NoiseSource
    ) -> tuple[Vector, CorrelatedState]:
        """Add this round's noise to `total` ((d,) int64, a sum of `quantised`): (d,) float64 in the vectors' unit.

        Returns the next round's state beside it; `state` is left as it is and must not be released from again. Raises
        `UnsupportedEvent` beyond the last round, and for a state or a total of another shape or type.
        """
        rounds, kept = self.participation.rounds, (self.strategy.memory(self.participation.rounds), self.dimension)
        if not 1 <= state.round_number <= rounds:
            raise UnsupportedEvent(f"round {state.round_number}: the noise was scaled for {rounds} rounds")
        if state.kept.shape != kept:
            raise UnsupportedEvent(f"the state must keep {kept} values, got {state.kept.shape}: it is another run's")
        if total.dtype != np.int64 or total.shape != (self.dimension,):
            raise UnsupportedEvent(f"total must be ({self.dimension},) int64, got {total.shape} {total.dtype}")
        fresh = discrete_gaussian(source, self.scale, self.dimension)
        noise = fresh - np.rint(self.strategy.history(state.kept)).astype(np.int64)
        released = (total + noise).astype(np.float64) * (self.clip_norm / STEPS)
        latest = noise.astype(np.float64)  # Exact: below 2^53.
        return released, CorrelatedState(state.round_number + 1, self.strategy.remember(state.kept, latest))


def _require_whole(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UnsupportedEvent(f"{name} must be a whole number in [1, {most}], got {value!r}")


def _checked(coefficients: Vector, participation: Participation) -> Vector:
    c = np.asarray(coefficients, np.float64)
    if c.ndim != 1 or not 1 <= len(c) <= participation.rounds or not np.abs(c).max() <= 2**16 or c[0] != 1:
        raise UnsupportedEvent(
            f"coefficients must be 1 to {participation.rounds} numbers up to 2^16 from c_0 = 1 on, "
            f"got {c.shape} from {c.ravel()[:2].tolist()} on"
        )
    if len(c) > participation.separation and not (c.min() >= 0 and np.diff(c).max(initial=0.0) <= 0):
        raise UnsupportedEvent(
            f"coefficients must be non-negative and non-increasing, or no more than the separation of "
            f"{participation.separation}, got {len(c)}: no sensitivity is proved for others"
        )
    return c


def _worst(c: Vector, participation: Participation) -> Vector:
    """sum_{j<k} C_{1+jb}: (rounds,)."""
    total = np.zeros(participation.rounds)
    for first in _firsts(participation):
        total[first : first + len(c)] += c[: participation.rounds - first]
    return total


def _firsts(participation: Participation) -> range:
    return range(0, participation.participations * participation.separation, participation.separation)


def _inverse(c: Vector, rounds: int) -> Vector:
    """The first `rounds` coefficients of 1 / sum c_i x^i, by Newton's method: each step doubles how many are right.

    Raises `UnsupportedEvent` if one exceeds 2^200: the noise of later rounds would grow like that.
    """
    inverse = np.ones(1)
    while len(inverse) < rounds:
        length = 2 * len(inverse)
        with np.errstate(over="ignore", invalid="ignore"):
            residual = -_convolved(c[:length], inverse)[:length]
            residual[0] += 2.0
            inverse = _convolved(inverse, residual)[:length]
        inverse = np.pad(inverse, (0, length - len(inverse)))
    if not np.abs(inverse[:rounds]).max() <= 2.0**200:
        raise UnsupportedEvent(
            f"coefficients must not make the noise grow over {rounds} rounds, got {c[:3].tolist()}..."
        )
    return inverse[:rounds]


def _log_cost(c: Vector, participation: Participation) -> tuple[float, Vector]:
    """2 log(prefix_sum_rmse) up to a constant, and its gradient by c; both are free of C's scale."""
    n = participation.rounds
    worst = _worst(c, participation)
    by_sensitivity = np.zeros(len(c))
    for first in _firsts(participation):
        by_sensitivity[: n - first] += 2 * worst[first : first + len(c)]
    # B(x) = 1 / ((1 - x) C(x)), so dB / dc_i = -x^i B / C.
    inverse = _inverse(c, n)
    sums = np.cumsum(inverse)
    weighted = np.arange(n, 0, -1) * sums
    by_error = -2 * _convolved(weighted, _convolved(sums, inverse)[:n][::-1])[n - 1 : n - 1 + len(c)]
    squared, error = worst @ worst, weighted @ sums
    return float(np.log(squared) + np.log(error)), by_sensitivity / squared + by_error / error


def _buffered(weights: Vector, decays: Vector, rounds: int) -> tuple[Vector, Vector]:
    """BLT coefficients (rounds,), and decays^(i-1) for i = 1, ..., rounds - 1."""
    powers = decays[:, None] ** np.arange(rounds - 1)
    return np.concatenate([np.ones(1), weights @ powers]), powers


def _least(
    cost: Callable[[Vector], tuple[float, Vector]], start: Vector, *, bound: float, precision: float = 1e-15
) -> Vector:
    # Within bounds, however wide, the first step is one gradient long; without, it is 1 long, and some noise explodes.
    found: Vector = minimize(
        cost,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-bound, bound)] * len(start),
        options={"maxiter": 2000, "maxfun": 4000, "maxcor": 30, "ftol": precision, "gtol": 1e-10},
    ).x
    return found


def _combined(coefficients: Iterable[float], vectors: Vector) -> Vector:
    total = np.zeros(vectors.shape[1:])
    # Not a dot product: the order of its sum, and so whether a resumed run goes on identically, would be up to BLAS.
    for coefficient, vector in zip(coefficients, vectors, strict=False):
        total += coefficient * vector
    return total


def _convolved(one: Vector, other: Vector) -> Vector:
    # Imported late: scipy.signal takes as long as most plans do.
    from scipy.signal import fftconvolve

    result: Vector = fftconvolve(one, other)
    return result

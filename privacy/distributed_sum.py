"""The distributed mechanism: each client rounds its update to a grid and adds its share of the noise.

Rotated by public random signs and a Walsh-Hadamard matrix, no coordinate of an update is much longer than the others:
few bits hold them all, and rounding costs the same everywhere. The steps are those of the distributed discrete
Gaussian (Kairouz, Liu, Steinke 2021, arXiv:2102.06387, Alg. 1 and 2) and Skellam mechanisms (Agarwal, Kairouz, Liu
2021, arXiv:2110.04995). What they cost is in `privacy.distributed`; hiding all but the sum is secure aggregation's job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from privacy.accountant import epsilon_pld
from privacy.distributed import BETA, DistributedNoise, Mechanism, noise_for_bits
from privacy.errors import FedchorusError, JobError, Refused
from privacy.events import LEAST_NOISE, MOST_NOISE, DistributedEvent, is_number, is_whole
from privacy.noise import MAX_SKELLAM_SCALE, Keystream, NoiseSource, discrete_gaussian, skellam

ROTATION_BYTES = 32
# Each is refused with probability at most beta, by default 0.61: all of them with 1e-55, and as a rule none is.
MOST_ROUNDINGS = 256
# Shrinks an update by 6e-8 of its length, more than float64 errs in measuring and turning one of 2^29 coordinates: that
# rounding toward zero always fits depends on it.
_ROOM = 1.0 - 2.0**-24
_LOG_FACTOR = 5  # Factors of up to 32 x 32: larger ones multiply more, smaller ones pass through memory more often.
_PIECE = 2**8  # 2^18 multiplications a piece: up to so many OpenBLAS takes one thread.
_BLOCK = 2**14  # Coordinates at a time, so that what lies between two steps stays in the cache (`privacy.noise`).
_STEP = 2**0.25


@dataclass(frozen=True)
class DistributedSum:
    """Encode updates of `parameters` coordinates for a secure sum under `noise`, and decode the sum.

    `noise.dimension` is the least power of two >= `parameters`: the rotation needs one.

    Guarantee: every vector that `encode` returns is an integer vector of L2 norm at most `noise.rounded_norm /
    noise.granularity`, compared exactly, plus a fresh share of the noise; an update of zeros is the share alone. So a
    sum of at least `noise.clients` of them, whose shares the adversary does not know, has the Rényi divergence
    `noise.rdp` when one client's update becomes zero, up to the samplers' own total variation (`event`).

    | an update that is         | is encoded as                                                                   |
    |---------------------------|---------------------------------------------------------------------------------|
    | zero                      | its share of the noise                                                          |
    | longer than clip_norm     | the update scaled down to clip_norm                                             |
    | NaN or infinite anywhere  | zero: a bounded contribution, and no error that would reveal it                 |
    | rounded to too long       | rounded again; after 256 times toward zero, which always fits                   |

    Rounding is unbiased, but that the longest are refused; and every update is first shortened by 6e-8 of its length.

    Raises `JobError` for a dimension that does not fit `parameters`, and for Skellam shares wider than 2^16 grid steps,
    which no sampler here draws.
    """

    noise: DistributedNoise
    parameters: int

    def __post_init__(self) -> None:
        if not is_whole(self.parameters):
            raise JobError(f"parameters must be a whole number > 0, got {self.parameters!r}")
        if self.noise.dimension != padded(self.parameters):
            raise JobError(
                f"{self.parameters} parameters need dimension {padded(self.parameters)}, got {self.noise.dimension}"
            )
        if self.noise.mechanism == "skellam" and self._share > MAX_SKELLAM_SCALE:
            raise JobError(
                f"a Skellam share must be at most 2^16 grid steps wide, got {self._share:.4g}; take fewer bits or "
                "discrete Gaussian shares"
            )

    @classmethod
    def plan(
        cls,
        *,
        mechanism: Mechanism,
        parameters: int,
        clients: int,
        cohort: int,
        clip_norm: float,
        noise_multiplier: float,
        bits: int,
        beta: float = BETA,
    ) -> DistributedSum:
        """Choose the finest grid that `bits` a coordinate allow (`privacy.distributed.noise_for_bits`).

        `clients` is the fewest honest survivors that a round may end with, `cohort` the most that may answer.
        """
        if not is_whole(parameters):
            raise JobError(f"parameters must be a whole number > 0, got {parameters!r}")
        noise = noise_for_bits(
            bits,
            mechanism=mechanism,
            clients=clients,
            cohort=cohort,
            dimension=padded(parameters),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            beta=beta,
        )
        return cls(noise, parameters)

    def encode(self, update: NDArray[np.float32], *, rotation: bytes, source: NoiseSource) -> NDArray[np.int64]:
        """Clip, rotate, round and add a share of the noise: `(parameters,) float32` to `(dimension,) int64`, in steps.

        `rotation`: 32 public bytes, the same for all clients of a round and fresh in each. Rounding and noise are drawn
        from `source`, which nobody else may know. Raises `Refused` for another shape, dtype or length.
        """
        _check_rotation(rotation)
        if update.shape != (self.parameters,) or update.dtype != np.float32:
            raise Refused(
                f"an update must be ({self.parameters},) float32, got {update.shape} {update.dtype}: nothing is sent"
            )
        encoded = self._rounded(self._rotated(update, rotation), source)
        draw = discrete_gaussian if self.noise.mechanism == "discrete_gaussian" else skellam
        encoded += draw(source, self._share, self.noise.dimension)
        return encoded

    def decode(self, total: NDArray[np.int64], *, rotation: bytes) -> NDArray[np.float64]:
        """Turn the sum of encoded updates back: `(dimension,) int64`, centred, to `(parameters,) float64`.

        The result is in the unit of the updates; all of it is post-processing. Raises `JobError` for another shape.
        """
        _check_rotation(rotation)
        if total.shape != (self.noise.dimension,):
            raise JobError(f"a sum of {self.noise.dimension} coordinates was expected, got {total.shape}")
        values = _walsh_hadamard(total.astype(np.float64))
        values *= self.noise.granularity / math.sqrt(self.noise.dimension)
        values *= _signs(rotation, self.noise.dimension)
        return values[: self.parameters].copy()

    def event(self, *, count: int, rng: str) -> DistributedEvent:
        """What `count` rounds cost each client; `rng` is the kind of the noise source."""
        noise = self.noise
        return DistributedEvent(
            mechanism=noise.mechanism,
            clients=noise.clients,
            dimension=noise.dimension,
            clip_norm=noise.clip_norm,
            granularity=noise.granularity,
            local_scale=noise.local_scale,
            beta=noise.beta,
            count=count,
            rng=rng,
        )

    @property
    def _share(self) -> float:
        return self.noise.local_scale / self.noise.granularity

    @property
    def _most(self) -> int:
        """The most that a rounded update's squares may add up to: the accountant's own float, squared exactly."""
        return math.floor(Fraction(self.noise.rounded_norm / self.noise.granularity) ** 2)

    def _rotated(self, update: NDArray[np.float32], rotation: bytes) -> NDArray[np.float64]:
        clip_norm, dimension = self.noise.clip_norm, self.noise.dimension
        steps = np.zeros(dimension)
        # Clipped in float64: finite float32 squares cannot overflow it, and no factor of theirs is subnormal.
        with np.errstate(invalid="ignore"):  # Converting a signalling NaN warns.
            steps[: self.parameters] = update
            norm = math.sqrt(np.einsum("i,i->", steps, steps))
        if not math.isfinite(norm):
            return np.zeros(dimension)
        steps *= _signs(rotation, dimension)
        # Scaled before it is turned: a number of steps is at most 2^40 whatever the unit of the updates.
        steps *= _ROOM * clip_norm / max(norm, clip_norm) / self.noise.granularity / math.sqrt(dimension)
        return _walsh_hadamard(steps)

    def _rounded(self, steps: NDArray[np.float64], source: NoiseSource) -> NDArray[np.int64]:
        most = self._most
        for _ in range(MOST_ROUNDINGS):
            rounded = _up_or_down(steps, source)
            if _squared_norm(rounded) <= most:
                return rounded
        # The papers draw for ever. No coordinate grows here, and the bound is above clip_norm: this one fits.
        rounded = np.trunc(steps).astype(np.int64)
        assert _squared_norm(rounded) <= most
        return rounded


@lru_cache(maxsize=64)
def calibrate(
    *,
    epsilon: float,
    delta: float,
    rounds: int,
    mechanism: Mechanism,
    parameters: int,
    clients: int,
    cohort: int,
    clip_norm: float,
    bits: int,
) -> float:
    """Find the least noise multiplier, to 0.01 %, whose `rounds` cost at most `epsilon` at `delta` on the planned grid.

    Guarantee: `DistributedSum.plan` of the result and the same settings has an event that `privacy.accountant` bounds
    by `epsilon`; it prices the integers that are drawn, not a Gaussian in their place. Raises `JobError` where so few
    `bits` reach no such epsilon, and as `plan` does.
    """
    if not (is_number(epsilon) and epsilon > 0):
        raise JobError(f"epsilon must be a finite number > 0, got {epsilon!r}")
    if not is_whole(rounds):
        raise JobError(f"rounds must be a whole number > 0, got {rounds!r}")
    epsilon_pld([], delta)  # Refuses what is no delta, before the search takes any refusal for one of its noise.
    refusal: FedchorusError | None = None
    least = math.inf

    def cost(noise_multiplier: float) -> float:
        nonlocal refusal, least
        try:
            planned = DistributedSum.plan(
                mechanism=mechanism,
                parameters=parameters,
                clients=clients,
                cohort=cohort,
                clip_norm=clip_norm,
                noise_multiplier=noise_multiplier,
                bits=bits,
            )
            spent = epsilon_pld([planned.event(count=rounds, rng="os")], delta)
        except FedchorusError as error:  # Shares too narrow for the theorem, or too wide for the bits.
            refusal = error
            return math.inf
        least = min(least, spent)
        return spent

    # Grids exist between those two ends alone, so the search climbs in small steps until one is good enough.
    climb = np.arange(math.log(LEAST_NOISE), math.log(MOST_NOISE), math.log(_STEP))
    enough = next((z for z in map(math.exp, climb) if cost(z) <= epsilon), None)
    if enough is None:
        if refusal is not None and least == math.inf:
            raise refusal
        why = f" ({refusal})" if refusal is not None else ""
        raise JobError(
            f"epsilon {epsilon:g} at delta {delta:g} is out of reach at {bits} bits a coordinate, which come to "
            f"{least:.4g}{why}; take other bits or shares, or a larger delta"
        )
    low = enough / _STEP
    while enough > low * 1.0001:
        middle = math.sqrt(low * enough)
        low, enough = (low, middle) if cost(middle) <= epsilon else (middle, enough)
    return enough


def padded(parameters: int) -> int:
    """The least power of two >= `parameters`."""
    return 1 << (parameters - 1).bit_length()


def _up_or_down(steps: NDArray[np.float64], source: NoiseSource) -> NDArray[np.int64]:
    """Round each coordinate up with the chance of its fraction; whole numbers stay."""
    rounded = np.empty(len(steps), np.int64)
    for start in range(0, len(steps), _BLOCK):
        block = steps[start : start + _BLOCK]
        below = np.floor(block)
        # So many in 2^53. The fraction of what is next to a whole number from below may be 1: up it goes, always.
        chances = ((block - below) * 2.0**53).astype(np.uint64)
        below += (source.words(len(block)) >> np.uint64(11)) < chances
        rounded[start : start + _BLOCK] = below
    return rounded


def _squared_norm(vector: NDArray[np.int64]) -> int:
    """Add the squares of `vector`, all of size below 2^42, exactly."""
    total = 0
    for start in range(0, len(vector), _BLOCK):
        block = vector[start : start + _BLOCK]
        high, low = block >> 21, block & (2**21 - 1)
        # (2^21 high + low)^2: up to 2^20 products of two numbers below 2^21 stay within int64.
        total += (int(high @ high) << 42) + (int(high @ low) << 22) + int(low @ low)
    return total


def _walsh_hadamard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply by the Walsh-Hadamard matrix of +1 and -1, whose square is `len(values)`, a power of two.

    It is the Kronecker product of small ones: each is multiplied along its own axis, by the linear algebra library, in
    pieces for which that starts no threads. Its threads wait for each other by spinning, which on a machine that is
    busy with other things took up to ten times the processor time of the work.
    """
    log_size, after = len(values).bit_length() - 1, len(values)
    count = max(1, -(-log_size // _LOG_FACTOR))
    for factor in range(count):
        size = 1 << (log_size + factor) // count
        after //= size
        turned = np.empty_like(values)
        if after > 1:
            pieces = (-1, size, -(-after // _PIECE), min(after, _PIECE))
            one, other = (vector.reshape(pieces).swapaxes(1, 2) for vector in (values, turned))
            np.matmul(_factor(size), one, out=other)
        else:
            rows = min(len(values) // size, _PIECE)
            np.matmul(values.reshape(-1, rows, size), _factor(size), out=turned.reshape(-1, rows, size))
        values = turned
    return values


@lru_cache(maxsize=8)
def _factor(size: int) -> NDArray[np.float64]:
    return np.array(hadamard(size), dtype=np.float64)


def _signs(rotation: bytes, dimension: int) -> NDArray[np.float64]:
    """Expand `rotation` to `(dimension,)` of +1 and -1: a bit each of AES-256-CTR, least significant first."""
    words = Keystream(rotation, counter=bytes(16)).words(-(-dimension // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=dimension, bitorder="little")
    return np.where(bits, -1.0, 1.0)


def _check_rotation(rotation: bytes) -> None:
    if len(rotation) != ROTATION_BYTES:
        raise Refused(f"a rotation must be {ROTATION_BYTES} bytes, got {len(rotation)}")

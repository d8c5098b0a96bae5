"""Real numbers as the whole numbers of a ring, on a grid as fine as the sum of all clients allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError, Refused
from privacy.mechanism import LEAST_CLIP_NORM, MOST_CLIP_NORM
from privacy.noise import NoiseSource
from privacy.secagg.ring import Ring

TAIL_STEP = 2.0**-20
_CHUNK = 3 * 2**12  # Coordinates at once: no copy leaves the cache or goes back to the kernel, no word of 3 is cut.


@dataclass(frozen=True)
class FixedPoint:
    """Encode vectors whose body lies within [-reach, reach], such that the sum of `clients` of them never wraps.

    The body's step is reach / bound, `bound` being the largest integer that a client may add; the tail's is 2^-20, and
    its own bound (2^63 - 1) // clients: nearly 2^43 / clients in magnitude.

    Guarantee: decoding the words of a sum of up to `clients` encoded vectors gives the sum of their roundings. At 32
    bits each is rounded to the nearest step, ties to even. At 16 and 20 bits, where one step may be more than most
    coordinates, each is rounded up with the probability of the fraction it is above the step below: unbiased to 2^-32
    of a step, within one step, and a whole number of steps stays. The tail is always rounded to the nearest step.

    | a vector with                   | is                                                                      |
    |---------------------------------|-------------------------------------------------------------------------|
    | a NaN or an infinity anywhere   | refused before anything else is looked at                               |
    | a coordinate of exactly ±reach  | encoded as ±bound                                                       |
    | a coordinate beyond, even by float32's rounding of `reach` | refused: clip to less, or reach further      |
    | a float64 total beyond 2^53 steps in the tail | decoded to float64's precision                            |

    Raises `JobError` for a reach outside [2^-100, 2^100] and for more clients than the ring can hold.
    """

    ring: Ring
    clients: int
    reach: float

    def __post_init__(self) -> None:
        if not LEAST_CLIP_NORM <= self.reach <= MOST_CLIP_NORM:
            raise JobError(f"the reach must lie in [2^-100, 2^100], got {self.reach!r}")
        self.ring.tail_bound(self.clients)
        self.ring.bound(self.clients)

    @property
    def bound(self) -> int:
        """The largest magnitude of an encoded coordinate."""
        return self.ring.bound(self.clients)

    @property
    def step(self) -> float:
        """What one unit of the body stands for."""
        return self.reach / self.bound

    def encode(
        self, body: NDArray[np.float32], tail: NDArray[np.float64], source: NoiseSource | None = None
    ) -> NDArray[np.uint8]:
        """Return the words of (body,) float32 and (tail,) float64. `source` rounds, at 16 and 20 bits only.

        The source must be one that the server cannot repeat: what is rounded at random is otherwise known better.
        Raises `Refused` for other shapes, for a value not finite or out of reach, and if a source is needed and absent.
        """
        self.ring.check_values(body, tail)
        peak, tail_peak = _peak(body), _peak(tail)
        if not (math.isfinite(peak) and math.isfinite(tail_peak)):
            raise Refused("not finite: the vector has a NaN or an infinity")
        if peak > self.reach:
            raise Refused(f"overflow: the body goes beyond its reach of {self.reach:g}; clip it to less")
        if tail_peak / TAIL_STEP > self.ring.tail_bound(self.clients):
            most = self.ring.tail_bound(self.clients) * TAIL_STEP
            raise Refused(f"overflow: the tail goes beyond its reach of {most:g}")
        if self.ring.bits == 32:
            source = None
        elif source is None:
            raise Refused(f"rounding to {self.ring.bits} bits is random and needs a noise source, got none")
        words = self.ring.zeros()
        self.ring.parts(words)[1].view("<i8")[:] = np.rint(tail / TAIL_STEP)
        scratch, scale = np.empty(min(_CHUNK, body.size)), self.bound / self.reach
        for start in range(0, body.size, _CHUNK):
            piece = body[start : start + _CHUNK]
            scaled = scratch[: piece.size]
            # In float64: a float32 product has 24 bits, and would leave out most of the steps of a fine grid.
            scaled[:] = piece  # Apart from the product: numpy converts faster than it converts and multiplies.
            scaled *= scale
            if source is None:
                np.rint(scaled, out=scaled)
            else:
                np.floor(np.add(scaled, _fractions(source, scaled.size), out=scaled), out=scaled)
            if self.ring.bits == 20:
                self.ring.put(words, start, scaled.astype(np.int32))
            else:  # Straight to its place: within the bound, so the conversion loses nothing.
                np.copyto(self.ring.signed(words)[0][start : start + piece.size], scaled, casting="unsafe")
        return words

    def decode(self, words: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the (body,) and (tail,) float64 that a vector, or the sum of up to `clients`, stands for."""
        if self.ring.bits == 20:
            body, tail = self.ring.unpack(words)
        else:  # As they lie there: a copy in int64 would take longer than the rest.
            self.ring.check(words)
            body, tail = self.ring.signed(words)
        values = body.astype(np.float64)
        values *= self.step
        return values, np.multiply(tail, TAIL_STEP)


def _peak(values: NDArray[np.floating]) -> float:
    """The largest magnitude; NaN if there is one."""
    return float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))


def _fractions(source: NoiseSource, count: int) -> NDArray[np.float64]:
    """Uniform odd multiples of 2^-33 in (0, 1), two from a word, the low half first.

    Odd, so that a whole number of steps stays one also when the scale's and the product's rounding have moved it: by at
    most 2^-34, as bounds below 2^19 have 34 binary places in float64. Neither ±reach can so pass ±bound.
    """
    words = source.words(-(-count // 2)).astype("<u8", copy=False)
    uniform = words.view("<u4")[:count] * 2.0**-32
    uniform += 2.0**-33
    return uniform

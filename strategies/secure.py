"""What a job's secure sum is: who is summed with whom, on what terms, and how a contribution becomes whole numbers.

Both halves are here, as in a strategy: a site encodes, the server decodes the sum. Each side works the plan out for
itself from the job and the roster, and the protocol refuses whatever the other side has different.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.distributed_sum import DistributedSum, calibrate
from privacy.errors import JobError
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import NoiseSource
from privacy.secagg.fixed_point import TAIL_STEP, FixedPoint
from privacy.secagg.ring import Ring
from privacy.secagg.roster import Roster
from privacy.secagg.session import Shape, Terms
from strategies.cohort import public_cohort
from strategies.composition import check_sites
from strategies.job import Job
from strategies.job_privacy import SecureAggregation
from strategies.parameters import Vector
from strategies.total import Layout

REACH = 8.0  # No number in an update of a model that trains is larger.
MOST_ROWS = 512  # ... and where updates are weighted by rows, that much larger again.
DEVIATIONS = 12.0  # Local noise is longer with a chance of 1e-32 a coordinate.


@dataclass(frozen=True)
class SecureSum:
    """The plan of one job's secure sums over cohorts of `shape.clients` sites, or over each of `cohorts`.

    Guarantee: the server learns the sum over a cohort's survivors, at least `shape.minimum` of them, and with it what
    it could compute from that; `distributed`, where there is one, bounds what the sum itself shows of a client.

    `clipped` is there where the server adds the noise: updates then travel in the whole grid steps that it is added to,
    and what is decoded are those. A client's own clip bounds its own part, so nobody else has to be trusted with that.
    """

    shape: Shape
    ring: Ring
    layout: Layout
    fixed: FixedPoint
    distributed: DistributedSum | None = None
    clipped: GaussianSum | None = None
    equal: bool = False  # Every site weighs 1, as the job says.

    @classmethod
    def make(
        cls, job: Job, *, sites: int, layout: Layout, layers: tuple[int, ...] = (), most_rows: int | None = None
    ) -> SecureSum:
        """Plan for a federation of `sites`; `layers` are the sizes of the model's arrays, for clipping each by itself.

        `most_rows` are those of the largest site, where they are known. Raises `JobError` for what cannot be protected,
        with what could.
        """
        secure = job.secure_aggregation
        assert secure is not None
        smallest, clients = _sizes(job, sites)
        try:
            shape = _shape(job, secure, smallest)
        except JobError as error:
            where = f"regions: in the smallest, of {smallest} sites, " if job.regions else "secure_aggregation: "
            raise JobError(f"{where}{error}") from None
        distributed = _distributed(job, shape, sites, clients, layout.parameters)
        body = layout.parameters if distributed is None else distributed.noise.dimension
        ring = Ring(secure.bits, body, layout.size - layout.parameters)
        clipped = _clipped(job, ring, clients, layers)
        _check_reach(job, most_rows)
        equal = job.privacy.client is not None  # Where the gate weighs; a strategy of the user's may do otherwise.
        return cls(shape, ring, layout, FixedPoint(ring, clients, _reach(job)), distributed, clipped, equal)

    def terms(self, job: Job, roster: Roster) -> Terms:
        """What a site of `roster` holds every session of `job` to."""
        secure = job.secure_aggregation
        assert secure is not None
        slots = {member.name: member.slot for member in roster.members}
        names, size = sorted(slots), job.cohort.size

        def drawn(round_number: int) -> tuple[tuple[int, ...], ...]:
            asked = public_cohort(names, size, seed=job.seed, round_number=round_number)
            return (tuple(sorted(slots[name] for name in asked)),)

        groups = tuple(tuple(sorted(slots[name] for name in group)) for group in groups_of(job, names))
        return Terms(
            federation=roster.federation,
            roster=roster.hash,
            job=job.hash,
            colluders=secure.colluders,
            dropouts=secure.dropouts,
            regular=secure.graph == "regular",
            least=job.cohort.minimum or 1,
            cohorts=groups if size is None or size >= len(names) else drawn,
            rounds=job.training.rounds,
            ring=self.ring,
            encoding=self.encoding,
        )

    @property
    def encoding(self) -> str:
        """What the numbers mean, in a form that two sites can compare. Never more digits than machines agree on."""
        noise = None if self.distributed is None else self.distributed.noise
        said: dict[str, object] = {"metrics": list(self.layout.metrics), "clients": self.fixed.clients}
        if self.clipped is not None:
            said |= {"steps": STEPS_PER_CLIP, "layers": list(self.clipped.layers)}
        elif noise is None:
            said["reach"] = f"{self.fixed.reach:.6g}"
        else:
            said |= {"shares": noise.mechanism, "of": noise.clients, "clip_norm": f"{noise.clip_norm:.6g}"}
            said |= {"granularity": f"{noise.granularity:.6g}", "local_scale": f"{noise.local_scale:.6g}"}
        return json.dumps(said, sort_keys=True)

    def encode(
        self, contribution: Vector, *, rotation: bytes, source: NoiseSource, clip_norm: float | None = None
    ) -> NDArray[np.uint8]:
        """Turn one contribution ((layout.size,) float32) into words to be masked; `clip_norm` is the round's.

        Raises `Refused` for what is not finite or does not fit.
        """
        update, rest = contribution[: self.layout.parameters], contribution[self.layout.parameters :]
        if self.distributed is not None:
            body = self.distributed.encode(update, rotation=rotation, source=source)
        elif self.clipped is not None:
            mechanism = self.clipped if clip_norm is None else replace(self.clipped, clip_norm=clip_norm)
            body = mechanism.quantised_sum(update[None])
        else:
            return self.fixed.encode(update, rest.astype(np.float64), source)
        return self.ring.pack(body, np.rint(rest.astype(np.float64) / TAIL_STEP).astype(np.int64))

    def decode(self, words: NDArray[np.uint8], *, rotation: bytes) -> NDArray[np.float64]:
        """The sum of contributions ((layout.size,) float64) that `words` stand for; with `clipped`, in steps."""
        if self.distributed is None and self.clipped is None:
            return np.concatenate(self.fixed.decode(words))
        body, tail = self.ring.unpack(words)
        values = body if self.distributed is None else self.distributed.decode(body, rotation=rotation)
        return np.concatenate([values, tail * TAIL_STEP])


def groups_of(job: Job, sites: Sequence[str]) -> list[list[str]]:
    """Who is summed with whom: everyone, the job's regions, or its groups, the same in every round and for everybody
    who asks. Raises `JobError` for regions of other sites: one might be smaller than it says."""
    secure = job.secure_aggregation
    assert secure is not None
    if job.regions:
        check_sites(job, sites)
        return [sorted(region) for region in job.regions.values()]
    order = sorted(sites, key=lambda name: hashlib.sha256(f"{job.seed} group {name}".encode()).digest())
    return [sorted(order[number :: secure.groups]) for number in range(secure.groups)]


def is_sound(layout: Layout, contributions: NDArray[np.float64], *, equal_weights: int | None) -> bool:
    """Whether a sum of contributions can be one of honest sites: a weight above zero, or theirs where all weigh 1."""
    weight = contributions[layout.parameters]
    return bool(weight > 0 if equal_weights is None else weight == equal_weights)


def rotation_of(round_number: int, model: str) -> bytes:
    """The public rotation of a round's distributed sum: 32 bytes that all who hold the same model agree on."""
    return hashlib.sha256(f"fedchorus rotation 1 {round_number} {model}".encode()).digest()


def _sizes(job: Job, sites: int) -> tuple[int, int]:
    """The fewest and the most that are asked for one sum."""
    secure = job.secure_aggregation
    assert secure is not None
    if job.regions:
        sizes = [len(region) for region in job.regions.values()]
        return min(sizes), max(sizes)
    asked = min(job.cohort.size or sites, sites)
    return asked // secure.groups, -(-asked // secure.groups)


def _shape(job: Job, secure: SecureAggregation, clients: int) -> Shape:
    return Shape.of(
        clients,
        colluders=secure.colluders,
        dropouts=secure.dropouts,
        regular=secure.graph == "regular",
        least=job.cohort.minimum or 1,
    )


def _reach(job: Job) -> float:
    secure, local = job.secure_aggregation, job.privacy.local
    assert secure is not None
    if secure.reach is not None:
        return secure.reach
    if local is not None:
        if local.noise_multiplier is None:
            raise JobError(
                "secure_aggregation.reach: give it (the largest number in an update with its noise), or "
                "privacy.client.noise_multiplier, from which it follows"
            )
        return local.clip_norm * (1 + DEVIATIONS * local.noise_multiplier)
    return REACH if job.strategy.weighting == "equal" else REACH * MOST_ROWS


def _check_reach(job: Job, most_rows: int | None) -> None:
    secure = job.secure_aggregation
    assert secure is not None
    if job.strategy.weighting == "rows" and secure.reach is None and most_rows is not None and most_rows > MOST_ROWS:
        raise JobError(
            f"secure_aggregation.reach: updates are weighted by rows, and a site has {most_rows} of them: {REACH:g} "
            f"times as many, {REACH * most_rows:g}, would leave room for numbers of up to {REACH:g}; give it, or set "
            'strategy.weighting = "equal"'
        )


def _clipped(job: Job, ring: Ring, cohort: int, layers: tuple[int, ...]) -> GaussianSum | None:
    client = job.privacy.central
    if client is None:
        return None
    if ring.bound(cohort) < STEPS_PER_CLIP:
        raise JobError(
            f"secure_aggregation: {cohort} clients on the grid of central noise overflow {ring.bits} bits; "
            f"{ring.limit // STEPS_PER_CLIP} fit"
        )
    apart = layers if client.clipping == "per-layer" else ()
    return GaussianSum(clip_norm=client.clip_norm, noise_multiplier=1.0, layers=apart)  # Its clip and grid alone.


def _distributed(job: Job, shape: Shape, sites: int, cohort: int, parameters: int) -> DistributedSum | None:
    client, secure = job.privacy.distributed, job.secure_aggregation
    if client is None:
        return None
    assert secure is not None
    if client.delta >= 1 / sites:
        raise JobError(
            f"privacy.client.delta: {client.delta:g} is not below 1/{sites}, one over the number of clients: it would "
            "allow to publish one of them outright"
        )
    # Colluders know their own shares, and so many may be missing: the rest alone must make the sum private.
    setting: dict[str, Any] = {
        "mechanism": "skellam" if client.shares == "skellam" else "discrete_gaussian",
        "parameters": parameters,
        "clients": shape.minimum - secure.colluders,
        "cohort": cohort,
        "clip_norm": client.clip_norm,
        "bits": secure.bits,
    }
    noise = client.noise_multiplier
    if noise is None:
        rounds = job.training.rounds + max(own.spare_rounds for own in job.privacy.at_sites)
        noise = _rounded_up(calibrate(epsilon=client.epsilon, delta=client.delta, rounds=rounds, **setting))
    return DistributedSum.plan(noise_multiplier=noise, **setting)


def _rounded_up(noise: float) -> float:
    """To five digits: sites whose machines differ in the last one come to the same noise."""
    step = 10.0 ** (math.floor(math.log10(noise)) - 4)
    return math.ceil(noise / step) * step

"""What a job promises of its secure sums, worked out again from the job file and from how many sites take part.

Each site works the same out before it signs (`strategies.secure`), and prices the noise of the fewest honest survivors:
a ledger that counted on more of them, on wider shares or on a larger minimum would state less than was spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from privacy.distributed import BETA, DistributedNoise, Mechanism
from privacy.distributed_sum import DistributedSum
from privacy.errors import JobError
from privacy.events import UNIT_CLIENT, ZERO_OUT, DistributedEvent, event_from_dict
from privacy.secagg.roster import Roster
from privacy.secagg.session import Shape

AGREEMENT = 1e-6  # Relative: the grid is the root of an equation, found to 1e-9, on machines that round differently.

Record = Mapping[str, Any]
Report = Callable[[str | None, int | None, str], None]


@dataclass(frozen=True)
class SecurePromise:
    """What a resolved `job` with secure aggregation promises where `sites` take part.

    `parameters` is how many numbers the model has; None takes a ledger's word for it.

    `shape` is that of the smallest sum. Everything raises `JobError` for what no site would have agreed to.
    """

    job: Record
    sites: int
    parameters: int | None = None

    @property
    def shape(self) -> Shape:
        secure = self._secure
        return Shape.of(
            self._sizes[0],
            colluders=secure["colluders"],
            dropouts=secure.get("dropouts"),
            regular=secure["graph"] == "regular",
            least=self.job.get("cohort", {}).get("minimum", 1),
        )

    @property
    def honest(self) -> int:
        """The fewest honest sites whose updates are in a sum that is shown: among so many is each one hidden."""
        return self.shape.minimum - int(self._secure["colluders"])

    @property
    def least_answers(self) -> int:
        """The fewest updates that a round can count: of groups, more than half are summed, or none is."""
        return self.shape.minimum * (self._groups // 2 + 1)

    @property
    def figures(self) -> dict[str, Any]:
        """What summary.json may say of the sums."""
        shape, secure = self.shape, self._secure
        return {
            **{key: secure[key] for key in ("colluders", "bits")},
            "groups": self._groups,
            "reduce": self.job.get("robust", {}).get("reduce", "sum"),
            "sites_in_a_sum": shape.clients,
            "fewest_in_a_sum": shape.minimum,
            "hidden_among": self.honest,
            "threshold": shape.threshold,
            "neighbours": shape.degree,
            "dropouts": shape.dropouts,
        }

    def event(self) -> dict[str, Any]:
        """What a site's event of one round says, but for the noise, which `differences` compares."""
        return {
            "mechanism": f"distributed_{self._mechanism}",
            "unit": UNIT_CLIENT,
            "adjacency": ZERO_OUT,
            "clients": self.honest,
            "clip_norm": self._client["clip_norm"],
            "beta": BETA,
            "count": 1,
        }

    def differences(self, planned: Record) -> Iterator[str]:
        """Say what of an event's noise the job's bits and noise do not give; one that is calibrated gives its own.

        How much noise meets the job's epsilon is for its limit to say. Raises `UnsupportedEvent` for a malformed event.
        """
        event = event_from_dict(planned)
        if not isinstance(event, DistributedEvent):
            return  # Another mechanism was found by its name.
        given = self._client.get("noise_multiplier")
        noise = self._noise(event.dimension, event.noise_multiplier if given is None else given)
        for key in ("dimension", "granularity", "local_scale"):
            said, worked_out = getattr(event, key), getattr(noise, key)
            if not math.isclose(said, worked_out, rel_tol=AGREEMENT):
                yield f"plans {key} {said:.6g} for a client, job.toml and {self.sites} sites make it {worked_out:.6g}"

    def _noise(self, dimension: int, noise_multiplier: float) -> DistributedNoise:
        return DistributedSum.plan(
            mechanism=self._mechanism,
            parameters=self.parameters or dimension,
            clients=self.honest,
            cohort=self._sizes[1],
            clip_norm=self._client["clip_norm"],
            noise_multiplier=noise_multiplier,
            bits=self._secure["bits"],
        ).noise

    @property
    def _secure(self) -> Record:
        secure: Record = self.job["secure_aggregation"]
        return secure

    @property
    def _client(self) -> Record:
        client: Record = self.job["privacy"]["client"]
        return client

    @property
    def _mechanism(self) -> Mechanism:
        return "skellam" if self._client["shares"] == "skellam" else "discrete_gaussian"

    @property
    def _regions(self) -> list[frozenset[str]]:
        regions = [frozenset(sites) for sites in self.job.get("regions", {}).values()]
        if regions and not sum(map(len, regions)) == len(frozenset().union(*regions)) == self.sites:
            raise JobError(f"regions do not hold each of {self.sites} sites once")
        return regions

    @property
    def _sizes(self) -> tuple[int, int]:
        """The fewest and the most sites that are asked for one sum."""
        if sizes := [len(region) for region in self._regions]:
            return min(sizes), max(sizes)
        return self._asked // self._groups, -(-self._asked // self._groups)

    @property
    def _groups(self) -> int:
        if self._regions:
            return len(self._regions)
        groups = int(self._secure["groups"])
        if groups < 1:
            raise JobError(f"secure_aggregation.groups must be 1 or more, got {groups}")
        return groups

    @property
    def _asked(self) -> int:
        return min(int(self.job.get("cohort", {}).get("size", self.sites)), self.sites)


def check_participants(report: Report, participants: Roster, ledgers: Record) -> None:
    """Everyone whose ledger the run has signed the list of participants, and nobody else is on it.

    A server that could add members of its own making would hide each site among fewer others than the job says.
    `ledgers`: the public key of each site's ledger, by name; none where the job is charged to no site. Raises `Refused`
    for a signature that is missing or wrong.
    """
    named = {member.name: member.key for member in participants.members}
    for site in sorted({*named, *ledgers} if ledgers else ()):
        if site not in named:
            report(site, None, "keeps a ledger, but participants.json leaves it out")
        elif site not in ledgers:
            report(site, None, "is in participants.json, but not in the roster")
        elif bytes.fromhex(named[site]) != bytes.fromhex(ledgers[site]):
            report(site, None, "has another key in participants.json than in the roster")
    participants.check(None)

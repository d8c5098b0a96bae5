"""Who masks with whom and holds whose shares: the complete graph, or a k-regular one above some fifty clients.

The k-regular graph is that of Bell, Bonawitz, Gascón, Lepoint and Raykova 2020 ("Secure single-server aggregation with
(poly)logarithmic overhead", CCS): a Harary graph, in which everybody sits on a ring and is joined to the k/2 next on
either side, on a random permutation of the clients. A client's neighbours hold the shares of its two secrets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy.errors import JobError

MAX_CLIENTS = 10**6
_PERMUTATION_DOMAIN = b"fedchorus secagg graph v1\0"
_ROUNDING = 1e-14  # 0.29 * 100 is 28.999...96 and means 29.
_TIE = 1e-11  # Relative: more than the rounding of a sum of probabilities, less than any two that differ.


def harary(members: Sequence[int], *, degree: int, seed: bytes) -> dict[int, tuple[int, ...]]:
    """Join every member (distinct numbers below 2^32) to `degree` others; return each one's neighbours, ascending.

    A degree of len(members) - 1 or more is the complete graph. Otherwise the ring is the members in ascending order
    of SHA-256("fedchorus secagg graph v1\\0" + seed + member as 4 little-endian bytes): one order for everybody who
    knows the seed, however they list the members.

    Guarantee: neighbours are mutual, each member has exactly `degree`, and for a seed that nobody chose the ring is a
    uniform permutation. Who can try many seeds can search for a bad ring: take the seed from what all clients signed,
    and raise `security_bits` by the logarithm of the tries to be withstood.

    Raises `JobError` for repeated members, and for a degree below 2 or odd unless the graph is complete.
    """
    if len(set(members)) != len(members) or not all(0 <= member < 2**32 for member in members):
        raise JobError("members of a graph must be distinct numbers in [0, 2^32)")
    if degree >= len(members) - 1:
        everybody = sorted(members)
        return {member: tuple(other for other in everybody if other != member) for member in everybody}
    if degree < 2 or degree % 2:
        raise JobError(f"a degree must be even and 2 or more, or {len(members) - 1}, the complete graph; got {degree}")
    domain = hashlib.sha256(_PERMUTATION_DOMAIN + seed)

    def place(member: int) -> bytes:
        digest = domain.copy()
        digest.update(int(member).to_bytes(4, "little"))
        return digest.digest()

    ring = sorted(members, key=place)
    steps = [*range(-(degree // 2), 0), *range(1, degree // 2 + 1)]
    size = len(ring)
    graph = {ring[at]: tuple(sorted(ring[(at + step) % size] for step in steps)) for at in range(size)}
    return dict(sorted(graph.items()))


@dataclass(frozen=True)
class GraphParameters:
    """How many neighbours each client has, and how many of them must answer for one of its secrets."""

    degree: int
    threshold: int


def graph_parameters(
    clients: int,
    *,
    corrupted: float,
    dropouts: float,
    adversary: Literal["semi-honest", "semi-malicious"],
    security_bits: int = 40,
    failure_bits: int = 20,
) -> GraphParameters:
    """Find the least even degree, and the least threshold for it, that keep secrets and survive dropouts.

    `corrupted` and `dropouts` are shares of the clients, in [0, 1). Guarantee, for a random `harary` graph on which at
    most that many collude with the server and at most that many (others or the same) drop out, with t the threshold:

    - except with probability 2^-security_bits, the honest survivors are connected and no client has more corrupted
      neighbours than c, where t > c; a semi-malicious server may ask different neighbours of one client for its
      different secrets, so there 2t > degree + c;
    - except with probability 2^-failure_bits, every client keeps t neighbours.

    The bounds are those of Google's federated-compute (graph_parameter_finder.cc, after Bell et al. 2020): a ring
    breaks only where k/2 in a row are missing at two places, a union over all pairs of places; neighbours are a sample
    of k of the n clients without replacement, a union over all clients. (Of the n - 1 others, to be exact: 0.15 bits
    at n = 200 or more.) A threshold is 2 or more, also for the failures; theirs is raised to 2 after that check.

    Raises `JobError` where no degree below the complete graph's does.
    """
    if not 3 <= clients <= MAX_CLIENTS:
        raise JobError(f"a graph needs 3 to {MAX_CLIENTS} clients, got {clients}")
    if not (0 <= corrupted < 1 and 0 <= dropouts < 1):
        raise JobError(f"shares of corrupted and lost clients must lie in [0, 1), got {corrupted} and {dropouts}")
    if adversary not in ("semi-honest", "semi-malicious"):
        raise JobError(f"the adversary must be semi-honest or semi-malicious, got {adversary!r}")
    if not (1 <= security_bits <= 256 and 1 <= failure_bits <= 256):
        raise JobError(f"security and failure bits must lie in [1, 256], got {security_bits} and {failure_bits}")
    colluding, lost = (math.floor((share + _ROUNDING) * clients) for share in (corrupted, dropouts))
    security = 2.0 ** -(security_bits + 1)  # Half for a broken ring, half for a captured neighbourhood.
    for degree in range(2, clients - 1, 2):
        # A bound that is met exactly is not kept, whichever way its last digit was rounded.
        if _ring_breaks(clients, degree, colluding + lost) >= math.log(security) - _TIE:
            continue
        captured, kept = (_neighbours(clients, marked, degree) for marked in (colluding, clients - lost))
        most_corrupted = int(np.count_nonzero(np.cumsum(captured[::-1]) >= (1 - _TIE) * security / clients)) - 1
        safe = most_corrupted if adversary == "semi-honest" else (degree + most_corrupted) // 2
        threshold = max(2, safe + 1)
        least_kept = int(np.count_nonzero(np.cumsum(kept) < (1 - _TIE) * 2.0**-failure_bits / clients))
        if threshold <= least_kept:
            return GraphParameters(degree, threshold)
    raise JobError(
        f"no graph keeps {clients} clients safe with {corrupted:.0%} of them corrupted ({adversary}) and "
        f"{dropouts:.0%} lost; use the complete graph, or expect fewer colluders or dropouts"
    )


def complete_threshold(clients: int, *, colluders: int, dropouts: int | None) -> int:
    """Choose how many of the other clients - 1 must answer for a secret, against a server that lies.

    Guarantee, with t the threshold and H = clients - 1 holders, none its own: 2t > H + colluders, so the server and its
    colluders cannot collect t shares of both secrets of a client while each honest holder gives one; and t <= H -
    dropouts, so that many may leave. Then t + 1 or more are left at every sum, at least colluders + 3: three honest.

    The rule is floor(2H / 3) + 1, which serves just under a third of colluders (Bonawitz et al. 2017, "Practical secure
    aggregation for privacy-preserving machine learning", CCS, the active adversary); more where the colluders need
    it. If the `dropouts` need a lower one, it is the largest that they allow; None: as many as the rule leaves.

    Raises `JobError` where no threshold does both, or clients < colluders + 3.
    """
    if colluders < 0 or (dropouts is not None and dropouts < 0):
        raise JobError(f"colluders and dropouts must be 0 or more, got {colluders} and {dropouts}")
    sites = colluders + max(3, 2 * (dropouts or 0) + 2)
    if clients < colluders + 3:
        raise JobError(
            f"{clients} sites with {colluders} colluders: a sum would be of fewer than three honest sites; "
            f"at least {sites} sites are needed"
        )
    holders = clients - 1
    least = (holders + colluders) // 2 + 1
    most = holders - (dropouts or 0)
    if least > most:
        raise JobError(
            f"{clients} sites with {colluders} colluders and {dropouts} dropouts: a threshold would have to be at "
            f"least {least} and at most {most}; allow {holders - least} dropouts, or have at least "
            f"{sites} sites"
        )
    return min(max(2 * holders // 3 + 1, least), most)


def tolerated_dropouts(clients: int, threshold: int) -> int:
    """Say how many of `clients` may leave a complete graph: clients - 1 - threshold, as nobody holds its own share."""
    if not 2 <= threshold <= clients - 1:
        raise JobError(f"the threshold for {clients} sites must lie in [2, {clients - 1}], got {threshold}")
    return clients - 1 - threshold


def _ring_breaks(clients: int, degree: int, missing: int) -> float:
    """The log of a bound on P[the ring falls apart]: pairs of gaps, times P[these `degree` places are all missing]."""
    if degree > missing:
        return -math.inf
    pairs = math.log(clients) + math.log(clients - degree - 1) - math.log(2)
    logs = _log_factorials(clients)
    return float(pairs + logs[missing] - logs[missing - degree] + logs[clients - degree] - logs[clients])


def _neighbours(clients: int, marked: int, degree: int) -> NDArray[np.float64]:
    """P[i of a client's neighbours are marked] for i = 0, ..., degree: (degree + 1,) float64, hypergeometric."""
    logs = _log_factorials(clients)
    unmarked = clients - marked
    low, high = max(0, degree - unmarked), min(degree, marked)
    i = np.arange(low, high + 1)
    law = np.zeros(degree + 1)
    law[low : high + 1] = np.exp(
        (logs[marked] - logs[i] - logs[marked - i])
        + (logs[unmarked] - logs[degree - i] - logs[unmarked - degree + i])
        - (logs[clients] - logs[degree] - logs[clients - degree])
    )
    return law


@lru_cache(maxsize=4)
def _log_factorials(most: int) -> NDArray[np.float64]:
    return np.fromiter(map(math.lgamma, range(1, most + 2)), np.float64, most + 1)

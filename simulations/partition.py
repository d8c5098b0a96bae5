"""One table becomes many sites: a named mix of sizes and case mixes, or a Dirichlet draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data import Records
from privacy.errors import JobError
from strategies.job import Partition, SiteMix

MAX_DRAWS = 1000


def partition(records: Records, how: Partition, *, seed: int) -> dict[str, Records]:
    """Disjoint sites, the same for the same seed. Raises `JobError` when the table has too few rows for them."""
    if how.mix is not None:
        return _by_mix(records, how.mix, seed)
    assert how.clients is not None
    return _by_dirichlet(records, how.clients, how.alpha, how.least_rows, seed)


def _by_mix(records: Records, mix: dict[str, SiteMix], seed: int) -> dict[str, Records]:
    rng = np.random.default_rng([seed, 1])
    left = {label: rng.permutation(np.flatnonzero(records.target == label)) for label in (0, 1)}
    if records.target.dtype != np.int64 or len(records) != sum(len(rows) for rows in left.values()):
        raise JobError("simulation.partition.mix needs a target of two classes; use clients and alpha instead")
    sites: dict[str, Records] = {}
    for name, site in mix.items():
        wanted = {1: round(site.rows * site.positive), 0: site.rows - round(site.rows * site.positive)}
        for label, count in wanted.items():
            if count > len(left[label]):
                raise JobError(
                    f"simulation.partition.mix.{name}: {count} rows of class {label} are wanted, "
                    f"{len(left[label])} are left; lower its rows or change its share of positives"
                )
        rows = np.concatenate([left[label][:count] for label, count in wanted.items()])
        left = {label: left[label][count:] for label, count in wanted.items()}
        sites[name] = records.take(np.sort(rows))
    return sites


def _by_dirichlet(records: Records, clients: int, alpha: float, least_rows: int, seed: int) -> dict[str, Records]:
    """Spread each class over the clients by a Dirichlet(alpha) draw (Hsu et al. 2019, arXiv:1909.06335, sec. 4).

    A target that is no class counts by its tenth of all targets, of a time the time; a window of text as one class.
    """
    if clients * least_rows > len(records):
        raise JobError(
            f"simulation.partition: {len(records)} rows cannot give {clients} clients {least_rows} rows each; "
            f"at most {len(records) // least_rows} clients fit"
        )
    rng = np.random.default_rng([seed, 2])
    labels = _labels(records.target)
    for _ in range(MAX_DRAWS):
        owner = _draw_owners(labels, clients, alpha, rng)
        if np.bincount(owner, minlength=clients).min() >= least_rows:
            width = len(str(clients - 1))
            return {f"client-{k:0{width}}": records.take(np.flatnonzero(owner == k)) for k in range(clients)}
    raise JobError(
        f"simulation.partition: no draw of {MAX_DRAWS} gave every one of {clients} clients {least_rows} rows at "
        f"alpha = {alpha:g}; raise alpha, lower least_rows, or use fewer clients"
    )


def _labels(target: NDArray[Any]) -> NDArray[np.int64]:
    if target.dtype != np.int64:
        value = target if target.ndim == 1 else target[:, 0]
        return np.searchsorted(np.quantile(value, np.arange(1, 10) / 10), value).astype(np.int64)
    return target if target.ndim == 1 else np.zeros(len(target), dtype=np.int64)


def _draw_owners(target: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator) -> NDArray[np.int64]:
    owner = np.empty(len(target), dtype=np.int64)
    for label in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).round().astype(int)
        for client, part in enumerate(np.split(rows, cuts)):
            owner[part] = client
    return owner

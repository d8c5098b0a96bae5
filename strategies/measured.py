"""Jobs that measure: their one exact round leaves a model that is the mean of phi(record) over the federation.

Phi is a public function of a record with an L2 norm of at most 1 (`strategies.statistics`, `strategies.evaluation`), so
that gates, ledgers, secure sums and noise are those of training: a record's gradient is phi(record).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.errors import RunError
from strategies.job import ONE_EXACT_ROUND, Job, stored_job
from strategies.job_privacy import Protection
from strategies.parameters import Parameters, Vector

SHOWN_BY = {"statistics": "statistics", "evaluation": "evaluate"}
"""By what a job measures, the command that shows it."""


def measures(job: Job) -> str | None:
    """What a job measures: "statistics" of records, or a model by an "evaluation"; None of one that trains."""
    return "evaluation" if job.evaluation is not None else job.task.name if job.task.name == "statistics" else None


def check_exact(job: Job, what: str) -> None:
    """Raise `ValueError` unless the job's model is the mean of phi: one exact step, and no clip that bites."""
    privacy, strategy = job.privacy, job.strategy
    none = dict.fromkeys(("local_epochs", "batch_size", "schedule", "work", "weak", "budget_s"))
    allowed = {**ONE_EXACT_ROUND, **none, "weight_decay": 0.0}
    asked = job.training.model_dump(include=set(allowed))
    if wrong := [key for key, value in allowed.items() if asked[key] != value]:
        exact = ", ".join(f"{key} = {value}" for key, value in ONE_EXACT_ROUND.items())
        raise ValueError(f"training.{wrong[0]}: {what} are one exact step: leave out [training], or give {exact}")
    weighting, whom = ("rows", "rows") if privacy.client is None else ("equal", "clients")
    if (strategy.name, strategy.weighting, strategy.server_learning_rate or 1.0) != ("fedavg", weighting, 1.0):
        raise ValueError(
            f'strategy: {what} are a mean over {whom}: give name = "fedavg", weighting = "{weighting}" and no '
            "server_learning_rate"
        )
    if job.cohort.size is not None:
        raise ValueError(f"cohort.size: {what} are of all sites; leave it out")
    if not job.robust.plain:
        raise ValueError(f"robust: {what} are a mean, which a robust reduction would bias; leave [robust] out")
    if any(device.trains < 1 for device in (job.simulation.devices or {}).values()):
        raise ValueError(f"simulation.devices: {what} are one exact step of the whole model: leave out trains")
    if privacy.record is not None and privacy.client is not None:
        raise ValueError(
            f"privacy: {what} take [privacy.record] or [privacy.client]: the clip of a whole client would cut the "
            "noise for its records, and bias the mean"
        )
    own: Protection | None = privacy.record or privacy.client
    if own is not None and (own.clip_norm, own.clipping) != (1.0, "flat"):
        raise ValueError(
            f"privacy: {what} of a record are scaled to a norm of at most 1: a smaller clip_norm would clip them, "
            'a larger one only adds noise; leave out clip_norm and clipping (1.0 and "flat")'
        )
    if privacy.client is not None and (privacy.client.adaptive_clip or privacy.client.noise != "independent"):
        raise ValueError(f"privacy.client: {what} are one round: leave out adaptive_clip and noise")


@dataclass(frozen=True)
class Finished:
    """A finished job that measured: its model ((size,) float32), and what its folder says beside it.

    `noise` is the standard deviation of the noise in each weight: 0 without differential privacy, None where it is not
    known here. A coordinator knows the names of its sites, a simulation their rows and noise too.
    """

    job: Job
    weights: Vector
    noise: float | None
    rows: int | None
    sites: int | None
    epsilon: Mapping[str, float]

    def said(self) -> dict[str, Any]:
        """What any report of such a job ends with."""
        weighting = self.job.strategy.weighting
        return {"rows": self.rows, "sites": self.sites, "epsilon": dict(self.epsilon), "weighting": weighting}


def finished(run: Path, *, what: str, ours: Callable[[Job], bool]) -> Finished:
    """Read a run folder, or one with the `job.toml` and `model.safetensors` of a federation's job. Raises `RunError`
    for one that is not finished or whose job is not one of `ours`, which are called `what`."""
    if not (run / "job.toml").is_file():
        raise RunError(f"{run}: no run folder and no file of {what}; run the job first")
    job = stored_job(run / "job.toml")
    if not ours(job):
        raise RunError(f"{run}: its job, of task {job.task.name}, is not one of {what}")
    if not (run / "model.safetensors").is_file():
        raise RunError(f"{run}: this run is not finished; `fedchorus resume` it")
    _, weights = Parameters.load(run / "model.safetensors")
    ran = read_json(run / "summary.json") if (run / "summary.json").is_file() else {}
    sites, spent = ran.get("sites"), ran.get("epsilon")
    known = list(sites.values()) if isinstance(sites, dict) else []
    if not all(isinstance(site, dict) and isinstance(site.get("train_rows"), int) for site in known):
        raise RunError(f"{run}: summary.json is damaged")
    return Finished(
        job,
        weights,
        noise_of(job, known, ran.get("client")),
        sum(int(site["train_rows"]) for site in known) if known else None,
        len(sites) if isinstance(sites, dict | list) else None,
        {unit: value for unit, value in (spent if isinstance(spent, dict) else {}).items() if value is not None},
    )


def noise_of(job: Job, sites: Sequence[Mapping[str, Any]], server: Mapping[str, Any] | None) -> float | None:
    """The standard deviation of the noise in a weight of the finished model, or None where it is not known.

    Phi's clip norm is 1. All sites that the job had are taken to have contributed.
    """
    privacy = job.privacy
    if privacy.record is None and privacy.client is None:
        return 0.0
    if privacy.record is not None and sites:
        # Each site's sum carries its own noise; the mean divides all of it by all rows.
        rows = sum(int(site["train_rows"]) for site in sites)
        return math.hypot(*(float(site["noise_multiplier"]) for site in sites)) / rows
    if privacy.local is not None and privacy.local.noise_multiplier is not None and sites:
        return privacy.local.noise_multiplier / math.sqrt(len(sites))
    if privacy.central is not None and server is not None:
        return float(server["noise_multiplier"]) / float(server["expected_cohort"])
    return None  # Of distributed noise at least the stated part is there, of whoever answered.


def read_json(path: Path) -> dict[str, Any]:
    """Raises `RunError` for what is no JSON object."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise RunError(f"{path}: cannot be read as JSON") from None
    if not isinstance(said, dict):
        raise RunError(f"{path}: not a JSON object")
    return said

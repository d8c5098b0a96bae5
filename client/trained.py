"""The model that a finished run left: checked against its job, and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from client.data import class_count
from client.reading import feature_count
from client.tasks import Task, initial_model, task_for
from client.training import Trainer
from privacy.errors import RunError
from strategies.job import Job, stored_job
from strategies.measured import SHOWN_BY, measures, read_json
from strategies.parameters import Parameters, vector_hash


@dataclass(frozen=True)
class Trained:
    """A finished job that trained: its `model` holds what came out, and `trainer` runs it."""

    job: Job
    task: Task
    model: nn.Module
    trainer: Trainer
    summary: dict[str, Any]


def load_trained(run: Path, *, device: Literal["auto", "cpu"]) -> Trained:
    """Read a run folder, or what `fedchorus fetch JOB --out FOLDER` wrote of a federation's job.

    Raises `RunError` for one that is not finished, that measured, or whose files are not of one job; `JobError` where
    the job's model cannot be built here, or its checkpoint is another.
    """
    if not (run / "job.toml").is_file():
        raise RunError(f"{run}: no run folder (job.toml is missing)")
    job = stored_job(run / "job.toml")
    if not (run / "summary.json").is_file() or not (run / "model.safetensors").is_file():
        raise RunError(f"{run}: this run is not finished; `fedchorus resume` it")
    if (what := measures(job)) is not None:
        raise RunError(f"{run}: it measured and has no model that predicts; see `fedchorus {SHOWN_BY[what]} {run}`")
    summary = read_json(run / "summary.json")
    if summary.get("job_hash") != job.hash:
        raise RunError(f"{run}: job.toml is not the job that was run: the hash in summary.json is another")
    parameters, vector = Parameters.load(run / "model.safetensors")
    if summary.get("model_hash") not in (None, vector_hash(vector)):
        raise RunError(f"{run}: model.safetensors is not the model of summary.json; fetch it again")
    if not np.isfinite(vector).all():
        raise RunError(f"{run}: the model has numbers that are not finite: the training diverged; lower learning_rate")
    task = task_for(job)
    model = initial_model(task, features=feature_count(job), classes=class_count(job.data), seed=job.seed)
    trainer = Trainer(task, model, job.training.model_copy(update={"device": device}))
    if trainer.parameters.digest != parameters.digest:
        raise RunError(f"{run}: model.safetensors does not have the arrays of the job's model: it is of another job")
    trainer.load(vector)
    return Trained(job, task, model.eval(), trainer, summary)

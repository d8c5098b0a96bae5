"""The model that a job starts from, built where the job is submitted: the coordinator needs no training framework."""

from __future__ import annotations

from torch import nn

from client.data import class_count
from client.reading import feature_count
from client.tasks import Task, initial_model, task_for
from client.training import Trainer
from strategies.job import Job
from strategies.parameters import Parameters, Vector


def initial_parameters(job: Job) -> tuple[Parameters, Vector]:
    """Names, shapes and the flat vector ((P,) float32) of the job's model. Raises `JobError` if it cannot be built."""
    task = task_for(job)
    trainer = Trainer(task, starting_model(job, task), job.training)
    return trainer.parameters, trainer.read().copy()


def starting_model(job: Job, task: Task, *, calibrated: bool = True) -> nn.Module:
    """The model of round 1, which travels to the sites. It alone is calibrated: a site's own copy takes what it gets.

    Raises `JobError`, and `DataError` for a file of public records that is not as the job's schema says.
    """
    model = initial_model(task, features=feature_count(job), classes=class_count(job.data), seed=job.seed)
    tuning = job.task.tuning
    if calibrated and job.evaluation is None and tuning is not None and tuning.calibration is not None:
        from client.calibration import calibrate

        calibrate(model, job)
    return model

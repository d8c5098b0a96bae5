"""The model that a job starts from, built where the job is submitted: the coordinator needs no training framework."""

from __future__ import annotations

from client.data import class_count
from client.reading import feature_count
from client.tasks import initial_model, task_for
from client.training import Trainer
from strategies.job import Job
from strategies.parameters import Parameters, Vector


def initial_parameters(job: Job) -> tuple[Parameters, Vector]:
    """Names, shapes and the flat vector ((P,) float32) of the job's model. Raises `JobError` if it cannot be built."""
    task = task_for(job)
    features, classes = feature_count(job), class_count(job.data)
    trainer = Trainer(task, initial_model(task, features=features, classes=classes, seed=job.seed), job.training)
    return trainer.parameters, trainer.read().copy()

"""The models that an evaluation finds in the folder of the run that trained them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.memory import SiteMemory, own_model
from privacy.errors import JobError
from server.checkpoint import load_checkpoint
from simulations.run_folder import RunFolder
from strategies.catalogue import strategy_for
from strategies.evaluation import reads_alike
from strategies.job import Job
from strategies.parameters import Parameters, Vector, vector_hash
from strategies.total import layout_for


def evaluated_models(job: Job) -> Callable[[str], Vector]:
    """Which model ((P,) float32) each site is evaluated with. Raises `JobError` or `RunError` for a
    run that is not there, or another than the job says."""
    choice = job.evaluation
    assert choice is not None
    if choice.run is None:
        raise JobError(f"job {job.name}: a simulation needs the run that it evaluates: give evaluation.run")
    folder = RunFolder.open(Path(choice.run))
    trained = folder.job
    if trained.hash != choice.of:
        raise JobError(f"evaluation.run: {folder.path} is another job's, {trained.hash[:12]}, not {choice.of[:12]}")
    if not reads_alike(job, trained):
        raise JobError(f"job {job.name}: data and task are not those of {folder.path}, whose model it evaluates")
    parameters, shared = Parameters.load(folder.model)
    if vector_hash(shared) != choice.model_hash:
        raise JobError(f"evaluation.model_hash: the model of {folder.path} is another")
    if choice.model == "shared":
        return lambda _name: shared
    strategy = strategy_for(trained)
    received = strategy.broadcast(load_checkpoint(folder.checkpoint, job=trained.hash))
    size = layout_for(trained, parameters, strategy.traits).memory

    def own(name: str) -> Vector:
        return own_model(strategy, received, SiteMemory.in_file(folder.files_of(name).memory, size), parameters)

    return own

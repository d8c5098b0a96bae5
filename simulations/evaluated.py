"""The models that an evaluation finds in the folder of the run that trained them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.memory import SiteMemory, named
from client.site import Files
from privacy.errors import JobError
from server.checkpoint import load_checkpoint
from simulations.run_folder import RunFolder
from strategies.catalogue import strategy_for
from strategies.job import Job
from strategies.parameters import Parameters, Vector, vector_hash
from strategies.protocol import Strategy
from strategies.total import Layout, layout_for


def evaluated_models(job: Job) -> Callable[[str], Vector]:
    """Which model ((P,) float32) each site is evaluated with. Raises `JobError` or `RunError` without
    its run."""
    choice = job.evaluation
    assert choice is not None
    if choice.run is None:
        raise JobError(f"job {job.name}: a simulation needs the run that it evaluates: give evaluation.run")
    folder = RunFolder.open(Path(choice.run))
    trained = folder.job
    if trained.hash != choice.of:
        raise JobError(f"evaluation.run: {folder.path} is another job's, {trained.hash[:12]}, not {choice.of[:12]}")
    stratify = trained.data.stratify if trained.data.stratify is not None else trained.privacy.record is None
    where = dict.fromkeys(("bundled", "folder", "path", "files", "client", "stratify"))
    read = [data.model_copy(update=where) for data in (job.data, trained.data)]
    if read[0] != read[1] or job.data.stratify != stratify or job.task != trained.task:
        raise JobError(f"job {job.name}: data and task are not those of {folder.path}, whose model it evaluates")
    parameters, shared = Parameters.load(folder.model)
    if vector_hash(shared) != choice.model_hash:
        raise JobError(f"evaluation.model_hash: the model of {folder.path} is another")
    if choice.model == "shared":
        return lambda _name: shared
    strategy = strategy_for(trained)
    received = strategy.broadcast(load_checkpoint(folder.checkpoint, job=trained.hash))
    layout = layout_for(trained, parameters.size, strategy.traits)
    return lambda name: own_model(strategy, received, folder.files_of(name), layout, parameters)


def own_model(strategy: Strategy, received: Vector, files: Files, layout: Layout, parameters: Parameters) -> Vector:
    """The model ((P,) float32) of a site that received this and keeps what is in `files`."""
    traits = strategy.traits
    memory = SiteMemory(files.memory, layout.memory).newest() if traits.remembers else None
    kept = named(memory, {**traits.kept, **traits.own}, parameters.size) if memory is not None else {}
    return strategy.own_model(received, kept, parameters)

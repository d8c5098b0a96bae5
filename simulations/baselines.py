"""What federated training is measured against: each site alone, and all records pooled in one place.

Both train the same model from the same start with the same optimiser, without noise, and see each record as often as
the federation does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.data import class_count, feature_names
from client.site import training_seed
from client.tasks import initial_model
from client.training import Trainer
from simulations.evaluation import Evaluation
from simulations.federation import Federation, pooled
from strategies.parameters import Vector


def baselines(
    federation: Federation, evaluation: Evaluation, start: Vector, *, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`{"local": {...}, "pooled": {...}}`. `local` scores each site's model on its own test rows, all rows together."""
    job, trainer = federation.job, federation.trainer
    sites: dict[str, dict[str, float]] = {}
    for name, data in federation.data.items():
        progress(f"local-only: {name}")
        trainer.load(start)
        records = trainer.place(data.train)
        for round_number in range(1, job.training.rounds + 1):
            trainer.train(records, seed=training_seed(job.seed, name, round_number))
        sites[name] = evaluation.one_site(trainer.read().copy(), name)
    rows = {name: len(data.test) for name, data in federation.data.items()}
    local = {
        metric: sum(sites[name][metric] * rows[name] for name in rows) / sum(rows.values())
        for metric in next(iter(sites.values()))
    }
    progress("pooled")
    everything = pooled(federation.data).train
    steps = sum(job.training.steps_for(len(data.train)) for data in federation.data.values())
    batch = [max(1, round(job.training.rate_for(len(d.train)) * len(d.train))) for d in federation.data.values()]
    # As many steps a round as all sites take together, on batches of their mean size.
    training = job.training.model_copy(
        update={
            "local_steps": steps,
            "local_epochs": None,
            "batch_size": max(1, round(sum(batch) / len(batch))),
            "sampling_rate": None,
        }
    )
    model = initial_model(
        federation.task, features=len(feature_names(job.data)), classes=class_count(job.data), seed=job.seed
    )
    central = Trainer(federation.task, model, training)
    central.load(start)
    records = central.place(everything)
    for round_number in range(1, job.training.rounds + 1):
        central.train(records, seed=training_seed(job.seed, "pooled", round_number))
    scores = evaluation(central.read().copy())
    return {
        "local": {**local, "sites": sites},
        "pooled": {metric: scores[metric] for metric in local} | {"sites": scores["sites"]},
    }

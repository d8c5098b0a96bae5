"""What federated training is measured against: each site alone, and all records pooled in one place.

All train the same model from the same start with the same optimiser and see each record as often as the federation
does. Alone and pooled without noise: the most that could be had. Alone under the same privacy: what a site could
have had without the others at the same epsilon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.data import class_count
from client.local import training_seed
from client.reading import feature_count
from client.site import SitePlan
from client.tasks import initial_model
from client.training import DeviceRecords, Trainer
from server.cohort import expected_size
from simulations.evaluation import Evaluation
from simulations.federation import Federation, pooled
from strategies.parameters import Vector

Train = Callable[[DeviceRecords, str, int], object]
"""Train the loaded model for one round: (records, site, round number)."""


def baselines(
    federation: Federation,
    evaluation: Evaluation,
    plans: dict[str, SitePlan],
    start: Vector,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """`{"local": {...}, "pooled": {...}}`, and `"local_private"` when the job is private.

    `local` and `local_private` score each site's model on its own test rows, all rows together.
    """
    trainer, seed = federation.trainer, federation.job.seed

    def openly(records: DeviceRecords, site: str, round_number: int) -> None:
        trainer.train(records, seed=training_seed(seed, site, round_number))

    def privately(records: DeviceRecords, site: str, round_number: int) -> None:
        sgd = plans[site].sgd
        assert sgd is not None
        trainer.train_privately(records, sgd, federation.noise(f"{site} alone", round_number))

    progress("each site alone")
    result = {"local": _alone(federation, evaluation, start, openly)}
    if federation.job.privacy.record is not None:
        progress("each site alone, under the same privacy")
        result["local_private"] = _alone(federation, evaluation, start, privately)
    progress("all records pooled")
    result["pooled"] = _pooled(federation, evaluation, start)
    return result


def _alone(federation: Federation, evaluation: Evaluation, start: Vector, train: Train) -> dict[str, Any]:
    rounds = _rounds(federation)

    def trained(name: str) -> Vector:
        federation.trainer.load(start)
        records = federation.trainer.place(federation.data[name].train)
        for round_number in range(1, rounds + 1):
            train(records, name, round_number)
        return federation.trainer.read().copy()

    return evaluation.each(trained)


def _rounds(federation: Federation) -> int:
    """In how many rounds a site takes part on average: who is asked a third of the time sees its records as often."""
    job, sites = federation.job, len(federation.data)
    return max(1, round(job.training.rounds * expected_size(sites, job.cohort) / sites))


def _pooled(federation: Federation, evaluation: Evaluation, start: Vector) -> dict[str, Any]:
    job, sizes = federation.job, [len(data.train) for data in federation.data.values()]
    batches = [max(1, round(job.training.rate_for(rows) * rows)) for rows in sizes]
    # As many steps a round as all sites take together, on batches of their mean size.
    training = job.training.model_copy(
        update={
            "local_steps": sum(job.training.steps_for(rows) for rows in sizes),
            "local_epochs": None,
            "batch_size": max(1, round(sum(batches) / len(batches))),
            "sampling_rate": None,
        }
    )
    model = initial_model(federation.task, features=feature_count(job), classes=class_count(job.data), seed=job.seed)
    trainer = Trainer(federation.task, model, training)
    trainer.load(start)
    records = trainer.place(pooled(federation.data).train)
    for round_number in range(1, _rounds(federation) + 1):
        trainer.train(records, seed=training_seed(job.seed, "pooled", round_number))
    scores = evaluation(trainer.read().copy())
    return {name: value for name, value in scores.items() if name != "worst_site"}

"""Strategies at FLamby's own settings, on its Fed-Heart-Disease, beside its published figures (five seeds).

    python benchmarks/flamby.py --data FOLDER [--quick] [--json]

FOLDER holds the four UCI files. As there: 740 rows, its split, each hospital standardised by itself and the pooled test
set by all training rows, logistic regression from a random start, batches of 4, 15 rounds of 100 steps (Ogier du
Terrail et al. 2022, arXiv:2210.04620; the figures are those of its repository's result files).
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, parser, spread
from torch import nn

from client.tasks import TabularClassification
from simulations.federation import load_sites, pooled
from simulations.simulate import Watcher, start_run
from strategies.job import load_job
from strategies.parameters import Parameters

JOB = Path(__file__).resolve().parent.parent / "examples" / "heart_disease.toml"
SEEDS = range(42, 47)
AS_THERE = [
    "privacy.record=none",
    "data.scaling=site",
    f"task.name={Path(__file__).stem}:RandomStart",
    "training.rounds=15",
    "training.local_steps=100",
    "training.local_epochs=none",
    "training.batch_size=4",
    "training.sampling_rate=none",
    "simulation.baselines=false",
]
ADAPTIVE = ["strategy.tau=1e-8", "strategy.beta_2=0.999"]
# Name: settings, published mean and deviation of the accuracy on the pooled test set.
METHODS: dict[str, tuple[list[str], float, float]] = {
    "FedAvg": (["training.learning_rate=0.001"], 0.748, 0.027),
    "FedProx": (["training.learning_rate=0.001", "strategy.name=fedprox", "strategy.mu=0.01"], 0.748, 0.027),
    "SCAFFOLD": (
        ["training.learning_rate=0.001", "strategy.name=scaffold"],
        0.748,
        0.027,
    ),
    "FedAdam": (
        [*ADAPTIVE, "training.learning_rate=0.01", "strategy.name=fedadam", "strategy.server_learning_rate=0.01"],
        0.779,
        0.015,
    ),
    "FedYogi": (
        [*ADAPTIVE, "training.learning_rate=0.0032", "strategy.name=fedyogi", "strategy.server_learning_rate=0.01"],
        0.779,
        0.015,
    ),
    "FedAdagrad": (
        [
            "training.learning_rate=0.0032",
            "strategy.name=fedadagrad",
            "strategy.server_learning_rate=0.316",
            "strategy.tau=1e-8",
            "strategy.beta_1=0.9",
        ],
        0.779,
        0.015,
    ),
}
TUNED = ["training.learning_rate=0.01"]


class RandomStart(TabularClassification):
    """Logistic regression that starts where torch's linear layer does, not at zero."""

    def model(self, features: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(features, 1 if classes == 2 else classes))


def accuracies(seed: int, settings: list[str], parent: Path) -> tuple[float, float]:
    """On the pooled test set, standardised by all training rows as there, and the mean of the four hospitals'."""
    overrides = [f"seed={seed}", *AS_THERE, *settings]
    job = load_job(JOB, overrides)
    summary: dict[str, Any] | None = start_run(job, out=None, parent=parent, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    parameters, model = Parameters.load(Path(summary["run"]) / "model.safetensors")
    weight, bias = parameters.split(model).values()
    together = pooled(load_sites(load_job(JOB, [*overrides, "data.scaling=range"])))
    mean, deviation = (getattr(together.train.features.astype(float), name)(axis=0) for name in ("mean", "std"))
    predicted = ((together.test.features - mean) / deviation) @ weight[0] + bias > 0
    sites = [site["accuracy"] for site in summary["sites"].values()]
    return float((predicted == together.test.target).mean()), float(np.mean(sites))


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--data", help="the folder of the four processed.*.data files")
    options = options_parser.parse_args()
    folder = [f"data.folder={Path(options.data).resolve()}"] if options.data else []
    seeds = list(SEEDS)[:2] if options.quick else list(SEEDS)
    methods = [*METHODS.items(), ("FedAvg, learning rate 0.01", (TUNED, None, None))]
    result: dict[str, Any] = {}
    lines = [f"{'':<30}{'pooled test':>15}{'mean of sites':>16}   published"]
    with tempfile.TemporaryDirectory() as runs:
        for name, (settings, published, deviation) in methods:
            both = np.array([accuracies(seed, [*folder, *settings], Path(runs)) for seed in seeds])
            mean, sd = both.mean(axis=0), both.std(axis=0)
            result[name] = {"pooled_test": spread(both[:, 0].tolist()), "mean": float(mean[0]), "sd": float(sd[0])}
            figures = "   ".join(f"{m:.3f} ± {d:.3f}" for m, d in zip(mean, sd, strict=True))
            if published is not None and deviation is not None:
                away = (float(mean[0]) - published) / deviation
                result[name] |= {"published": published, "published_sd": deviation, "sds_away": away}
                figures += f"   {published:.3f} ± {deviation:.3f} ({away:+.2f} of its deviations)"
            lines.append(f"{name:<30}{figures}")
    finish(result, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

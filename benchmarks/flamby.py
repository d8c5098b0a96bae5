"""Strategies at FLamby's own settings, on Fed-Heart-Disease and Fed-TCGA-BRCA, beside its published figures.

    python benchmarks/flamby.py --data FOLDER --brca FOLDER [--quick] [--json]

The first folder holds the four UCI files, the second FLamby's brca.csv and train_test_split.csv; each may be left out.
Five seeds. Hearts as there: 740 rows, its split, each hospital standardised by itself and the pooled test set by all
training rows, logistic regression from a random start, batches of 4, 15 rounds of 100 steps (Ogier du Terrail et al.
2022, arXiv:2210.04620; the figures are those of its repository's result files).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from measure import finish, parser, spread
from torch import nn

from client.tasks import TabularClassification
from simulations.federation import load_sites, pooled
from simulations.simulate import Watcher, start_run
from strategies.job import Job, check_job, load_job
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
TUNED, TUNED_NAME = ["training.learning_rate=0.01"], "FedAvg, learning rate 0.01"
_ADAPTIVE: dict[str, Any] = {"server_learning_rate": 0.1, "tau": 1e-8, "beta_2": 0.999}
# The same of the c-index on Fed-TCGA-BRCA. There FedAvg's 0.735 is that of features as they are, ages in years beside
# zeros and ones; here they are mapped onto [-1, 1].
BRCA: dict[str, tuple[dict[str, Any], float, float]] = {
    "FedAvg": ({"learning_rate": 0.1, "strategy": {"name": "fedavg"}}, 0.735, 0.175),
    "FedAdam": ({"learning_rate": 0.01, "strategy": {"name": "fedadam", **_ADAPTIVE}}, 0.842, 0.017),
    "FedYogi": ({"learning_rate": 0.01, "strategy": {"name": "fedyogi", **_ADAPTIVE}}, 0.842, 0.017),
}
BRCA_OTHERS = ["pid", "fold", "fold2", "region", "E", "T"]


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


def brca_job(folder: Path, seed: int, settings: Mapping[str, Any]) -> Job:
    """Six regions, 39 features mapped by public ranges, Cox's partial likelihood over each batch."""
    names = pd.read_csv(folder / "brca.csv", nrows=0).columns.drop(BRCA_OTHERS)
    numbers = {name: {"range": [0, 1]} for name in names}
    data = {"folder": str(folder), "path": "brca.csv", "client": "region", "target": "T", "target_type": "time"}
    columns = {**numbers, "age_at_index": {"range": [0, 100]}}
    held_out = {"column": "fold", "values": ["test"]}
    raw = {
        "name": "brca",
        "seed": seed,
        "data": {**data, "event": "E", "columns": columns, "held_out": held_out},
        "task": {"name": "survival", "model": "linear", "loss": "cox"},
        "training": {"rounds": 5, "local_steps": 100, "batch_size": 8},
        "simulation": {"baselines": False},
    }
    training = {**raw["training"], "learning_rate": settings["learning_rate"]}  # type: ignore[dict-item]
    return check_job({**raw, "training": training, "strategy": settings["strategy"]}, where="brca")


def joined(source: Path, folder: Path) -> None:
    """One table of the three files; the published fold names each patient's region."""
    table = pd.read_csv(source / "brca.csv").merge(pd.read_csv(source / "train_test_split.csv"), on="pid")
    table.assign(region="region-" + table["fold2"].str[-1]).to_csv(folder / "brca.csv", index=False)


def c_indices(folder: Path, seed: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """On the pooled test set, and the mean of the regions that have one."""
    job = brca_job(folder, seed, settings)
    summary = start_run(job, out=None, parent=folder, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    own = [site["c_index"] for site in summary["sites"].values() if site.get("c_index") is not None]
    return summary["metrics"]["c_index"], float(np.mean(own))


def heart(options: Any, seeds: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    folder = [f"data.folder={Path(options.data).resolve()}"]
    methods = {name: settings for name, (settings, *_) in METHODS.items()} | {TUNED_NAME: TUNED}
    with tempfile.TemporaryDirectory() as runs:
        return {
            name: np.array([accuracies(seed, [*folder, *settings], Path(runs)) for seed in seeds])
            for name, settings in methods.items()
        }


def brca(options: Any, seeds: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    with tempfile.TemporaryDirectory() as runs:
        joined(Path(options.brca), Path(runs))
        return {
            name: np.array([c_indices(Path(runs), seed, settings) for seed in seeds])
            for name, (settings, *_) in BRCA.items()
        }


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--data", help="the folder of the four processed.*.data files")
    options_parser.add_argument("--brca", help="the folder of brca.csv and train_test_split.csv")
    options = options_parser.parse_args()
    seeds = list(SEEDS)[:2] if options.quick else list(SEEDS)
    result: dict[str, Any] = {}
    lines: list[str] = []
    for title, run, published in (("data", heart, METHODS), ("brca", brca, BRCA)):
        if getattr(options, title) is None:
            continue
        lines.append(f"{title:<30}{'pooled test':>15}{'mean of sites':>16}   published")
        for name, both in run(options, seeds).items():
            mean, sd = both.mean(axis=0), both.std(axis=0)
            found = {"pooled_test": spread(both[:, 0].tolist()), "mean": float(mean[0]), "sd": float(sd[0])}
            figures = "   ".join(f"{m:.3f} ± {d:.3f}" for m, d in zip(mean, sd, strict=True))
            if name in published:
                _, figure, deviation = published[name]
                away = (float(mean[0]) - figure) / deviation
                found |= {"published": figure, "published_sd": deviation, "sds_away": away}
                figures += f"   {figure:.3f} ± {deviation:.3f} ({away:+.2f} of its deviations)"
            result[f"{title}: {name}"] = found
            lines.append(f"{name:<30}{figures}")
    finish(result, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

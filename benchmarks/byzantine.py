"""A Byzantine fifth: two of ten sites lie in every round. What FedAvg and each robust reduction make of it.

    python benchmarks/byzantine.py [--quick] [--json] [--data FOLDER]

Ten sites share handwritten digits (those that scikit-learn carries; with `--data` also mnist20k/mnist_20k_10k.npz
below FOLDER) by Dirichlet(10), each trains a network of one hidden layer. Figures are the accuracy of the last model on
all test rows, means over five seeds with their standard error; a run that diverges counts as a guess, 0.1. `lost` is
accuracy without an attack less accuracy under it, of the same reduction and seed: at most 0.02 is what we ask for.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import finish, parser

from client.gate import TrainingDiverged
from server.rounds import Diverged
from simulations.simulate import Watcher, start_run
from strategies.job import Job, check_job

SEEDS = range(1, 6)
GUESS, MOST_LOST = 0.1, 0.02
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sign flip, 10 times": {"attack": "sign-flip", "scale": 10.0},
    "scaled 100 times": {"attack": "scaled", "scale": 100.0},
    "label flip": {"attack": "label-flip"},
    "label flip, 10 times": {"attack": "label-flip", "scale": 10.0},
}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "median norm": {"max_norm": "median"},
    "median": {"reduce": "median"},
    "trimmed mean": {"reduce": "trimmed-mean"},
    "Krum": {"reduce": "krum"},
    "multi-Krum": {"reduce": "multi-krum"},
    "geometric median": {"reduce": "geometric-median"},
}
PIXELS = {f"pixel_{row}_{column}": {"range": [0, 16]} for row in range(8) for column in range(8)}
DIGITS: dict[str, Any] = {
    "data": {"bundled": "digits", "target": "digit", "classes": list(range(10)), "columns": PIXELS},
    "task": {"model": "mlp", "hidden": [64]},
    "training": {"rounds": 60, "local_epochs": 1, "batch_size": 32, "learning_rate": 0.3},
}
MNIST: dict[str, Any] = {
    "data": {
        "path": "mnist20k/mnist_20k_10k.npz",
        "target": "y_train",
        "classes": list(range(10)),
        "columns": {"x_train": {"type": "image", "shape": [28, 28]}},
        "held_out": {"arrays": {"x_train": "x_test", "y_train": "y_test"}},
    },
    "task": {"name": "image-classification", "model": "mlp", "hidden": [64]},
    "training": {"rounds": 12, "local_epochs": 1, "batch_size": 50, "learning_rate": 0.1},
}


def job_of(base: dict[str, Any], *, seed: int, robust: dict[str, Any], faults: dict[str, Any]) -> Job:
    simulation = {
        "baselines": False,
        "partition": {"clients": 10, "alpha": 10.0},
        "faults": {"byzantine": 0.2, **faults} if faults else {},
    }
    data = {**base["data"], "allow_one_class": True}
    raw = {**base, "data": data, "name": "byzantine", "seed": seed, "robust": robust, "simulation": simulation}
    return check_job(raw, where="benchmark")


def accuracy(job: Job, parent: Path) -> float:
    try:
        summary = start_run(job, out=None, parent=parent, watcher=Watcher(), now=datetime.now(UTC))
    except (Diverged, TrainingDiverged):
        return GUESS
    assert summary is not None
    return float(summary["metrics"]["accuracy"])


def mean(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "se": round(error, 4)}


def measure(base: dict[str, Any], seeds: list[int], lines: list[str]) -> dict[str, Any]:
    lines.append(f"{'':<18}" + "".join(f"{attack:>23}" for attack in ATTACKS) + f"{'most lost':>13}")
    result: dict[str, Any] = {}
    for name, robust in REDUCTIONS.items():
        with tempfile.TemporaryDirectory() as runs:
            found = {
                attack: [accuracy(job_of(base, seed=seed, robust=robust, faults=faults), Path(runs)) for seed in seeds]
                for attack, faults in ATTACKS.items()
            }
        lost = {
            attack: mean([a - b for a, b in zip(found["none"], values, strict=True)])
            for attack, values in found.items()
            if attack != "none"
        }
        most = max(each["mean"] for each in lost.values())
        result[name] = {"accuracy": {attack: mean(values) for attack, values in found.items()}, "lost": lost}
        result[name] |= {"most_lost": most, "holds": most <= MOST_LOST}
        cells = (f"{each['mean']:.3f} ± {each['se']:.3f}" for each in result[name]["accuracy"].values())
        lines.append(f"{name:<18}" + "".join(f"{cell:>23}" for cell in cells) + f"{most:>13.3f}")
    return result


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--data", help="the folder that mnist20k is in")
    options = options_parser.parse_args()
    seeds = list(SEEDS)[:1] if options.quick else list(SEEDS)
    lines: list[str] = ["digits (1,797 images)"]
    result: dict[str, Any] = {"seeds": seeds, "digits": measure(DIGITS, seeds, lines)}
    if options.data:
        lines.append("mnist20k")
        mnist = {**MNIST, "data": {**MNIST["data"], "folder": str(Path(options.data).resolve())}}
        result["mnist20k"] = measure(mnist, seeds, lines)
    finish(result, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

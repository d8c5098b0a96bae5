"""Strategies where each client has seen few of the classes (MNIST, ten clients, Dirichlet 0.1): five seeds.

    python benchmarks/label_skew.py --data FOLDER [--quick] [--json]

FOLDER holds the .npz of examples/real/mnist.toml. Every strategy runs on the same splits. `margin` is how much higher
its accuracy is than FedAvg's, in pairs by seed; a personal strategy's is that of each client's own model on the
client's own test rows, over FedAvg's on the same rows.
"""

from __future__ import annotations

import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, parser, spread

from simulations.simulate import Watcher, start_run
from strategies.job import load_job

JOB = Path(__file__).resolve().parent.parent / "examples" / "real" / "mnist.toml"
STRATEGIES = {
    "FedAvg": ["strategy.name=fedavg"],
    "FedProx": ["strategy.name=fedprox", "strategy.mu=0.1"],
    "SCAFFOLD": ["strategy.name=scaffold", "strategy.weighting=equal"],
    "FedDyn": ["strategy.name=feddyn", "strategy.weighting=equal", "strategy.alpha=0.05"],
    "FedPer (own models)": ["strategy.name=fedper"],
    "Ditto (own models)": ["strategy.name=ditto"],
}


def accuracy(seed: int, settings: list[str], parent: Path) -> float:
    job = load_job(JOB, [f"seed={seed}", *settings])
    summary: dict[str, Any] | None = start_run(job, out=None, parent=parent, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    scores: dict[str, float] = summary["personal"] or summary["metrics"]
    return scores["accuracy"]


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--data", help="the folder of the .npz file")
    options = options_parser.parse_args()
    common = [f"data.folder={Path(options.data).resolve()}"] if options.data else []
    seeds = range(42, 44) if options.quick else range(42, 47)
    lines = [f"{'':<22}{'accuracy':>16}{'over FedAvg':>14}{'standard error':>17}"]
    with tempfile.TemporaryDirectory() as runs:
        reached = {
            name: np.array([accuracy(seed, [*common, *settings], Path(runs)) for seed in seeds])
            for name, settings in STRATEGIES.items()
        }
    result: dict[str, Any] = {}
    for name, values in reached.items():
        margins = values - reached["FedAvg"]
        mean, error = float(margins.mean()), float(margins.std(ddof=1)) / math.sqrt(len(margins))
        result[name] = {"accuracy": spread(values.tolist()), "margin": mean, "standard_error": error}
        lines.append(f"{name:<22}{values.mean():>9.3f} ± {values.std():.3f}{mean:>+13.3f}{error:>14.3f}")
    finish(result, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

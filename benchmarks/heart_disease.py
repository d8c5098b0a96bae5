"""Fed-Heart-Disease over five seeds: accuracy without and with record-level privacy, beside FLamby's published figures.

    python benchmarks/heart_disease.py [--quick] [--json]

`--data FOLDER` says where the four UCI files are; by default where the example looks for them.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, parser, spread

from simulations.simulate import Watcher, start_run
from strategies.job import load_job

JOB = Path(__file__).resolve().parent.parent / "examples" / "heart_disease.toml"
SEEDS = range(42, 47)
# FLamby (Ogier du Terrail et al. 2022, arXiv:2210.04620), results files of its repository, five seeds, pooled test set.
PUBLISHED = {
    "FLamby pooled": 0.795,
    "FLamby FedAvg": 0.748,
    "FLamby FedAdam": 0.779,
    "FLamby FedYogi": 0.779,
    "FLamby local (best hospital)": 0.784,
}


def accuracies(seed: int, settings: list[str], parent: Path) -> dict[str, Any]:
    job = load_job(JOB, [f"seed={seed}", *settings])
    summary = start_run(job, out=None, parent=parent, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    sites = [site["accuracy"] for site in summary["sites"].values()]
    return {
        "pooled_test": summary["metrics"]["accuracy"],
        "mean_of_sites": float(np.mean(sites)),
        "local": summary["baselines"]["local"]["accuracy"],
        "pooled_training": summary["baselines"]["pooled"]["accuracy"],
        "epsilon": summary["epsilon"]["record"],
    }


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--data", help="the folder of the four processed.*.data files")
    options = options_parser.parse_args()
    folder = [f"data.folder={Path(options.data).resolve()}"] if options.data else []
    seeds = list(SEEDS)[:2] if options.quick else list(SEEDS)
    variants = {"no DP": ["privacy.record=none"], "epsilon 1, delta 1e-3": []}
    with tempfile.TemporaryDirectory() as runs:
        results = {
            name: [accuracies(seed, [*folder, *settings], Path(runs)) for seed in seeds]
            for name, settings in variants.items()
        }
    table = {
        name: {key: spread([run[key] for run in runs]) for key in ("pooled_test", "mean_of_sites")}
        for name, runs in results.items()
    }
    open_runs, private_runs = results["no DP"], results["epsilon 1, delta 1e-3"]
    cost = float(np.mean([a["pooled_test"] - b["pooled_test"] for a, b in zip(open_runs, private_runs, strict=True)]))
    result = {
        "fedchorus": table,
        "mean_accuracy": {name: float(np.mean([run["pooled_test"] for run in runs])) for name, runs in results.items()},
        "cost_of_privacy": cost,
        "epsilon": max(run["epsilon"] for run in private_runs),
        "baselines": {key: float(np.mean([run[key] for run in open_runs])) for key in ("local", "pooled_training")},
        "published": PUBLISHED,
        "seeds": seeds,
    }
    lines = [f"{'':<42}{'pooled test':>14}{'mean of sites':>16}"]
    for name, of_seeds in results.items():
        columns = (np.array([run[key] for run in of_seeds]) for key in ("pooled_test", "mean_of_sites"))
        figures = "   ".join(f"{column.mean():.3f} ± {column.std():.3f}" for column in columns)
        lines.append(f"{'fedchorus FedAvg, ' + name:<42}{figures}")
    lines += [f"{'fedchorus ' + key:<42}{value:.3f}" for key, value in result["baselines"].items()]
    lines += [f"{name:<42}{value:.3f}" for name, value in PUBLISHED.items()]
    lines.append(f"cost of privacy: {cost:+.4f} accuracy at epsilon {result['epsilon']:.4f}")
    finish(result, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

"""Real banks, a retailer and hospitals over five seeds: federated, each site alone, and all rows pooled, in one run.

    python benchmarks/real_data.py --data FOLDER [--only NAME] [--quick] [--json]

FOLDER holds a folder for each data set, named as in the job files of examples/real. A seed changes the split, the
partition, the batches and the model's start. `pooled` is the same model trained with the same optimiser on all rows in
one place; of the classifications `reference` is scikit-learn's own logistic regression on those rows. The 943 sites of
movielens100k are users: its figure is that of their own models, it has no pooled one, and a seed takes ten minutes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, parser

from client.scores import roc_auc
from simulations.federation import load_sites, pooled
from simulations.simulate import Watcher, start_run
from strategies.job import Job, load_job

JOBS = Path(__file__).resolve().parent.parent / "examples" / "real"
SEEDS = range(42, 47)


@dataclass(frozen=True)
class Case:
    """One data set: the metric, and what must hold of its mean: at most `below` pooled, or on one side of a `bound`."""

    metric: str
    below: float | None = None
    bound: tuple[str, float] | None = None
    reference: bool = False

    def holds(self, means: Mapping[str, float]) -> bool:
        if self.below is not None:
            return means["federated"] >= means["pooled"] - self.below
        assert self.bound is not None
        side, limit = self.bound
        if side == ">=":
            return means["federated"] >= limit
        return means["federated"] <= limit and not means["federated"] > means["local"]


CASES: Mapping[str, Case] = {
    "default_credit": Case("auc", below=0.01, reference=True),
    "bank_marketing": Case("auc", below=0.01, reference=True),
    "german_credit": Case("auc", below=0.01, reference=True),
    "adult": Case("auc", below=0.01, reference=True),
    "walmart": Case("wape", bound=("<=", 0.037)),
    "pneumoniamnist": Case("accuracy", bound=(">=", 0.95)),
    "movielens100k": Case("rmse", bound=("<=", 0.93)),
}


def figures(name: str, case: Case, seed: int, data: Path, runs: Path) -> dict[str, float]:
    """The metric of one seed's federation, of each site alone, and pooled."""
    settings = [f"data.folder={data / name}", f"seed={seed}", f"data.split_seed={seed}"]
    job = load_job(JOBS / f"{name}.toml", settings)
    summary = start_run(job, out=None, parent=runs, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    compared = summary["baselines"]
    result = {
        "federated": (summary["personal"] or summary["metrics"])[case.metric],
        **{side: compared.get(side, {}).get(case.metric, math.nan) for side in ("local", "pooled")},
    }
    return {**result, "reference": reference_auc(job)} if case.reference else result


def reference_auc(job: Job) -> float:
    """The AUC of scikit-learn's logistic regression on the pooled training rows, as the job encodes them."""
    from sklearn.linear_model import LogisticRegression

    rows = pooled(load_sites(job))
    model = LogisticRegression(max_iter=2000).fit(rows.train.features, rows.train.target)
    return roc_auc(model.decision_function(rows.test.features), rows.test.target)


def measured(name: str, case: Case, seeds: list[int], data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as runs:
        each = [figures(name, case, seed, data, Path(runs)) for seed in seeds]
    columns = {side: np.array([of_seed[side] for of_seed in each]) for side in each[0]}
    means = {side: float(values.mean()) for side, values in columns.items()}
    return {
        "metric": case.metric,
        "mean": means,
        "sd": {side: float(values.std(ddof=1)) if len(values) > 1 else 0.0 for side, values in columns.items()},
        "federated_less_pooled": float((columns["federated"] - columns["pooled"]).mean()),
        "required": f"within {case.below} of pooled"
        if case.below is not None
        else " ".join(map(str, case.bound or ())),
        "holds": case.holds(means),
    }


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--data", required=True, type=Path, help="the folder of the data sets' folders")
    options_parser.add_argument("--only", choices=sorted(CASES), help="one data set alone")
    options = options_parser.parse_args()
    seeds = list(SEEDS)[:2] if options.quick else list(SEEDS)
    chosen = {name: case for name, case in CASES.items() if options.only in (None, name)}
    result: dict[str, Any] = {
        name: measured(name, case, seeds, options.data.resolve()) for name, case in chosen.items()
    }
    lines = [f"{'':<18}{'metric':<10}{'federated':>18}{'local':>18}{'pooled':>18}  required"]
    for name, found in result.items():
        columns = "".join(
            f"{found['mean'][side]:>11.4f} ± {found['sd'][side]:.3f}" for side in ("federated", "local", "pooled")
        )
        verdict = "holds" if found["holds"] else "DOES NOT HOLD"
        lines.append(f"{name:<18}{found['metric']:<10}{columns}  {found['required']}: {verdict}")
    finish(
        {"sets": result, "seeds": seeds, "all_hold": all(f["holds"] for f in result.values())},
        as_json=options.json,
        lines=lines,
    )


if __name__ == "__main__":
    main()

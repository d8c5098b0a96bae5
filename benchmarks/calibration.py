"""How much of a layer's gradient adapters can see, from random directions and from those of a public file.

    python benchmarks/calibration.py                    # the messages of `banks-text`, and public ones of its own
    python benchmarks/calibration.py --data FOLDER      # the reviews of Amazon, and examples/real/public_remarks.csv

The share of the squared gradient of all adapted weights that lies in the span of A's rows, by rank: the mean over the
layers, weighted by their gradients. The head is fitted first, without privacy; the gradient is of the mean loss.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from client.calibration import calibrate
from client.initial import starting_model
from client.pretrained import Classifier
from client.tasks import task_for
from simulations.federation import load_sites
from simulations.scenarios import scenario_path
from strategies.job import Job, load_job

EXAMPLES = Path(__file__).parent.parent / "examples" / "real"
PUBLIC = """message
I would like to know when the branch in the old town opens on Saturday.
The app asks me for a code that I do not have. What now?
Thank you for the letter. I have signed it and sent it back this morning.
Can my daughter use my account when she is on holiday?
Please tell me how long it takes until money from abroad is there.
There was a queue at the counter again and I went home.
"""
ROWS = 400


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--data", type=Path)
    data: Path | None = arguments.parse_args().data
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        public = EXAMPLES / "public_remarks.csv"
        if data is None:
            public = Path(folder) / "public.csv"
            public.write_text(PUBLIC, encoding="utf-8")
        for rank in (1, 2, 8):
            file = scenario_path("banks-text") if data is None else EXAMPLES / "amazon.toml"
            settings = [f"task.tuning.rank={rank}", "task.tuning.alpha=1", "task.tuning.targets=none"]
            settings += [] if data is None else [f"data.folder={data.resolve()}"]
            job = load_job(file, settings)
            shares = compared(job, load_job(file, [*settings, f'task.tuning.calibration="{public}"']))
            print(f"rank {rank}: random {shares[0]:.3f}, calibrated {shares[1]:.3f} of the gradient", flush=True)


def compared(job: Job, calibrated: Job) -> tuple[float, float]:
    """The share of the gradient that each job's adapters see."""
    features, targets = _records(job)
    model: Any = starting_model(job, task_for(job))
    assert isinstance(model, Classifier)
    _fit_head(model, job, features, targets)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    for rows, wanted in zip(torch.split(features, 50), torch.split(targets, 50), strict=True):
        torch.autograd.backward(task_for(job).loss(model(rows), wanted).sum())
    shares = []
    for _ in range(2):
        seen = whole = 0.0
        for layer in layers.values():
            gradient = layer.base_layer.weight.grad.double()
            rows, _ = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().T)
            seen += float((gradient @ rows).square().sum())
            whole += float(gradient.square().sum())
        shares.append(seen / whole)
        if len(shares) == 1:
            calibrate(model, calibrated)
    return shares[0], shares[1]


def _records(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [data.train for data in load_sites(job).values()]
    features, targets = (np.concatenate([getattr(p, key) for p in parts]) for key in ("features", "target"))
    chosen = np.random.default_rng(1).permutation(len(features))[:ROWS]
    chosen = chosen[np.argsort((features[chosen] >= 0).sum(axis=1))]
    return torch.from_numpy(features[chosen]), torch.from_numpy(targets[chosen])


def _fit_head(model: Classifier, job: Job, features: torch.Tensor, targets: torch.Tensor) -> None:
    with torch.no_grad():
        seen = torch.cat([model.features(rows) for rows in torch.split(features, 50)])
    head = model.head
    assert isinstance(head, nn.Linear)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = task_for(job).loss(head(seen), targets).mean() + 1e-3 * head.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

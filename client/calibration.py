"""Adapters that start where a layer's inputs vary, as public records show, rather than in random directions.

The gradient of a layer's weights is a sum of products g x^T of what comes back and what goes in. Adapters with a
fixed A see of it what A's rows span. The inputs of a trained model vary in few directions: their first eight principal
components, out of hundreds, hold more than half of the gradient, eight random rows a fiftieth (docs/results.md).
Under privacy the noise is the same for either, so that the signal in it is several times as strong.

Principal directions of inputs: Paischer et al. 2024, EVA (arXiv:2410.07170), which takes them from the records
themselves. Here the file is public: nothing is spent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.encodings import PADDING
from client.prediction import unlabelled
from client.pretrained import Pretrained
from privacy.errors import JobError
from strategies.checkpoint import file_hash
from strategies.job import Job

RECORDS = 256  # Read of the file: enough for the first directions, and quickly computed.
VECTORS = 1024  # Kept of a layer's inputs.
LEAST = 1e-3  # Of the first direction's size: one that is smaller is not magnified any further.
_KEY = "task.tuning.calibration"


def calibrate(model: nn.Module, job: Job) -> None:
    """Set each A ((r, inputs) float32) of `model` to the first r principal directions of its layer's inputs.

    Each is scaled so that it answers with a mean square of 1 over the public records: a step of B then moves what the
    layer says as far along one direction as along another. The head is not needed, nor are labels.

    Raises `JobError` for a file that changed since the job was made or is too short, and `DataError` for one that is
    not as the job's schema says.
    """
    tuning = job.task.tuning
    assert tuning is not None
    assert tuning.calibration is not None
    path = Path(tuning.calibration)
    if tuning.calibration_hash not in (None, file_hash(path, key=_KEY)):
        raise JobError(f"{_KEY}: {path} is not the file that the job was made with; make the job anew")
    assert isinstance(model, Pretrained)
    records, _ = unlabelled(path, job)
    rows = torch.from_numpy(records.features[:RECORDS])
    if not len(rows):
        raise JobError(f"{_KEY}: {path} has no complete records")
    for name, inputs in _inputs(model, rows).items():
        factor: Any = model.get_submodule(name)
        if tuning.rank > len(inputs):
            raise JobError(
                f"{_KEY}: {path} gives {len(inputs)} inputs of {name}, and rank {tuning.rank} needs as many "
                "directions; give more records"
            )
        directions = principal(inputs, tuning.rank)
        with torch.no_grad():
            factor.weight.copy_(directions)


def principal(inputs: Tensor, rank: int) -> Tensor:
    """(n, d) -> (rank, d): the first right singular vectors, each over the root mean square of the inputs along it."""
    _, sizes, directions = torch.linalg.svd(inputs.double(), full_matrices=False)
    spread = sizes / len(inputs) ** 0.5
    spread = spread.clamp(min=max(float(spread[0]) * LEAST, torch.finfo(torch.float32).tiny))
    scaled: Tensor = (directions[:rank] / spread[:rank, None]).float()
    return scaled


def _inputs(model: Pretrained, rows: Tensor) -> dict[str, Tensor]:
    """(n, d) float32 for each A by its name: its inputs at evenly spaced places of each row, none of them padding."""
    found: dict[str, list[Tensor]] = {}
    each = max(1, VECTORS // len(rows))

    def keep(name: str, tokens: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            there = min(tokens, len(inputs)) if model.kind != "image" else len(inputs)
            places = torch.linspace(0, there - 1, min(each, there)).round().long()
            found.setdefault(name, []).append(inputs[places].float().cpu())

        return hook

    factors = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    with torch.no_grad():
        for row in rows:  # One at a time: what is padding is then seen by its place.
            tokens = max(1, int((row != PADDING).sum()))
            hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name, tokens)) for name in factors]
            try:
                model(row[None])
            finally:
                for hook in hooks:
                    hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}

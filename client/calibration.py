"""Adapters that start where a layer's inputs vary, as public records show, rather than in random directions.

The gradient of a layer's weights is a sum of products g x^T of what comes back and what goes in. Adapters with a
fixed A see of it what A's rows span. The inputs of a trained model vary in few directions: their first eight principal
components, out of hundreds, hold more than half of the gradient, eight random rows a fiftieth (docs/results.md).
The noise of privacy is the same for either.

Principal directions of inputs: Paischer et al. 2024, EVA (arXiv:2410.07170), which takes them from the records
themselves. Here the file is public: nothing is spent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.encodings import PADDING
from client.prediction import unlabelled
from client.pretrained import Pretrained
from privacy.errors import JobError
from strategies.checkpoint import file_hash
from strategies.job import Job

RECORDS = 256  # Spread over the file: enough for the first directions, and quickly computed.
VECTORS = 1024  # Kept of a layer's inputs.
LEAST = 1e-3  # Of the first direction's size: what is smaller is no direction in which anything varies.
_KEY = "task.tuning.calibration"


def calibrate(model: nn.Module, job: Job) -> None:
    """Set each A ((r, inputs) float32) of `model` to the first r principal directions of its layer's inputs.

    Each is scaled so that it answers with a mean square of 1 over the public records: a step of B then moves what the
    layer says as far along one direction as along another. The head is not needed, nor are labels.

    Raises `JobError` for a file that changed since the job was made or in which a layer's inputs vary in fewer
    directions, and `DataError` for one that is not as the job's schema says.
    """
    tuning = job.task.tuning
    assert tuning is not None
    assert tuning.calibration is not None
    path = Path(tuning.calibration)
    if tuning.calibration_hash not in (None, file_hash(path, key=_KEY)):
        raise JobError(f"{_KEY}: {path} is not the file that the job was made with; make the job anew")
    assert isinstance(model, Pretrained)
    if model.kind == "seq2seq":
        raise JobError(f"{_KEY}: what a {job.task.name} model writes with depends on answers, which are not public")
    records, _ = unlabelled(path, job)
    if not len(records.features):
        raise JobError(f"{_KEY}: {path} has no complete records")
    chosen = _spread(len(records.features), RECORDS)
    rows = torch.from_numpy(records.features[chosen])
    for name, inputs in _inputs(model, rows).items():
        directions = principal(inputs, tuning.rank)
        if len(directions) < tuning.rank:
            raise JobError(
                f"{_KEY}: in {path} the inputs of {name} vary in {len(directions)} directions, and rank {tuning.rank} "
                "needs as many; give more records, and other ones"
            )
        factor: Any = model.get_submodule(name)
        with torch.no_grad():
            factor.weight.copy_(directions)


def principal(inputs: Tensor, rank: int) -> Tensor:
    """(n, d) -> (rank, d): the first right singular vectors, each over the root mean square of the inputs along it.

    Fewer rows where the inputs vary in fewer directions; none where they are not finite.
    """
    if not inputs.isfinite().all():
        return inputs[:0]
    _, sizes, directions = torch.linalg.svd(inputs.double(), full_matrices=False)
    known = min(rank, int((sizes > LEAST * sizes[:1]).sum()))
    spread = sizes[:known] / len(inputs) ** 0.5
    scaled: Tensor = (directions[:known] / spread[:, None]).float()
    return scaled


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` of `count` places, each in the middle of its share, so that neither end is always among them."""
    wanted = min(count, most)
    places: NDArray[np.int64] = ((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)
    return places


def _inputs(model: Pretrained, rows: Tensor) -> dict[str, Tensor]:
    """(n, d) float32 for each A by its name: its inputs at places spread over each row, none of them padding."""
    found: dict[str, list[Tensor]] = {}
    each = max(1, VECTORS // len(rows))

    def keep(name: str, tokens: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            there = min(tokens, len(inputs)) if model.kind != "image" else len(inputs)
            found.setdefault(name, []).append(inputs[torch.from_numpy(_spread(there, each))].float().cpu())

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

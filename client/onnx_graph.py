"""A fine-tuned classifier as one ONNX graph, from token numbers or pixels to logits, checked against torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from client.pretrained import Classifier
from privacy.errors import JobError
from strategies.job_data import Column

TOLERANCE = 1e-4
LARGEST = 1_500_000_000  # Bytes of weights in one file; a graph of more has them in a second.


class Plain(nn.Module):
    """(n, t) token numbers and mask, or (n, 3, side, side) pixels -> (n, classes) logits, or (n, t, classes)."""

    def __init__(self, model: Classifier, *, pooling: str, scale: float) -> None:
        super().__init__()
        self.base, self.head, self._pooling = model.base, model.head, pooling
        self._scale = scale / model.width**0.5

    def forward(self, first: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            found = self.base(pixel_values=first)
            pooled = self._pooling == "pooler"
            return self._answer(found.pooler_output.flatten(1) if pooled else found.last_hidden_state[:, 0])
        hidden = self.base(input_ids=first, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        if self._pooling == "mean":
            return self._answer((hidden * weights).sum(dim=1) / weights.sum(dim=1))
        if self._pooling == "last":
            place = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
            last = (place == mask.sum(dim=1, keepdim=True) - 1).unsqueeze(-1).to(hidden.dtype)
            return self._answer((hidden * last).sum(dim=1))
        return self._answer(hidden)

    def _answer(self, hidden: Tensor) -> Tensor:
        answers: Tensor = self.head(functional.layer_norm(hidden, hidden.shape[-1:]) * self._scale)
        return answers


def write_graph(model: Classifier, path: Path, *, column: Column, pooling: str, scale: float) -> None:
    """Write the classifier, whose base is plain (without adapters), with batch and length dynamic.

    Inputs are `input_ids` and `attention_mask`, int64, or `pixel_values`, float32; the output is `logits`. Raises
    `JobError` where the family cannot be exported, or onnxruntime's logits differ from torch's by more than 1e-4.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise JobError(f"--onnx needs {error.name}: pip install fedchorus[onnx]") from None
    family = model.base.config.model_type
    plain = Plain(model, pooling=pooling, scale=scale).cpu().float().eval()
    names, tries = _inputs(model, column)
    sizes = ["rows", "length"] if model.kind != "image" else ["rows"]
    axes = {name: dict.fromkeys(range(len(sizes)), torch.export.Dim.DYNAMIC) for name in names}
    small = sum(p.numel() * p.element_size() for p in plain.parameters()) < LARGEST
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                plain,
                tries[0],
                str(path),
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes=tuple(axes.values()),
                dynamo=True,
                external_data=not small,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        worst = max(_difference(session, plain, dict(zip(names, each, strict=True))) for each in tries)
    except Exception as error:  # noqa: BLE001  # Whatever a graph stumbles over: the library has no one kind for it.
        raise JobError(
            f"--onnx: models of the family {family!r} cannot be exported here ({type(error).__name__}); leave it out, "
            "or use --merged with optimum's exporter"
        ) from None
    if not worst <= TOLERANCE:
        raise JobError(
            f"--onnx: the graph's logits differ from torch's by {worst:.1e} (at most {TOLERANCE:g}); not kept"
        )


def _inputs(model: Classifier, column: Column) -> tuple[tuple[str, ...], list[tuple[Tensor, ...]]]:
    """What to trace with, and further inputs of other sizes to compare on."""
    generator = torch.Generator().manual_seed(0)
    config = model.base.config
    if model.kind == "image":
        side = getattr(config, "image_size", None) or (column.shape or [1])[0]
        return ("pixel_values",), [(torch.rand(n, 3, side, side, generator=generator) * 2 - 1,) for n in (2, 3, 1)]
    found: list[tuple[Tensor, ...]] = []
    most = min(column.length or 2, 64)
    for rows, length in ((2, most), (3, max(2, most // 2)), (1, most)):
        ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
        ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
        found.append((ids, (torch.arange(length) < ends).long()))
    return ("input_ids", "attention_mask"), found


def _difference(session: Any, plain: nn.Module, inputs: dict[str, Tensor]) -> float:
    (found,) = session.run(None, {name: array.numpy() for name, array in inputs.items()})
    with torch.no_grad():
        wanted = plain(*inputs.values()).numpy()
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found - wanted).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints, warns of and logs: what counts is compared."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""Features of texts from an ONNX export of a frozen encoder: what a small device has in place of torch.

    python -m client.onnx_features CHECKPOINT FOLDER [--int8] [--depth BLOCKS]

writes `model.onnx` and `model.onnx.json` on a larger machine, where torch, onnx and onnxscript are; both are put into
the checkpoint's folder at the device. No hash of a checkpoint can cover an export: the second file states which
checkpoint the first came from, with its SHA-256, and is this site's own statement, no proof to others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.encodings import PADDING
from privacy.durable import write_atomically
from privacy.errors import FedchorusError, JobError
from strategies.checkpoint import check_hashes, configuration, hashes, locate

GRAPH, STATEMENT = "model.onnx", "model.onnx.json"
VERSION = 1
TOKENS_AT_ONCE = 1024  # Bounds the memory of the inner values: 30 MB of a model that is 384 wide.
TOLERANCE = 1e-4  # Between the features of torch and of the export, each of an L2 norm of 1.
_LENGTH = 32  # Of the random texts that an export is tried on.


@dataclass(frozen=True)
class Export:
    """An export that was checked and opened: rows of `width` numbers, in the `precision` "float32" or "int8"."""

    session: Any
    width: int
    precision: str
    sha256: str


def open_export(folder: Path, wanted: Mapping[str, str | None], *, depth: int | None) -> Export:
    """Open the export in a checkpoint's folder.

    Raises `JobError` unless the checkpoint is the one of the hashes `wanted`, and `model.onnx` what its statement says:
    made from that checkpoint, of its first `depth` blocks.
    """
    check_hashes(folder, wanted)
    path = folder / GRAPH
    again = f"make it again: python -m client.onnx_features CHECKPOINT {folder}"
    try:
        said = json.loads((folder / STATEMENT).read_text(encoding="utf-8"))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise JobError(f"{error.filename}: absent or not readable; on a machine with torch, {again}") from None
    except (ValueError, RecursionError):
        raise JobError(f"{folder / STATEMENT}: not valid JSON; {again}") from None
    if not isinstance(said, dict) or said.get("version") != VERSION or said.get("precision") not in ("float32", "int8"):
        raise JobError(f"{folder / STATEMENT}: not a statement of version {VERSION} about an export; {again}")
    if said.get("checkpoint_hash") != hashes(folder)["checkpoint_hash"]:
        raise JobError(f"{path}: exported from another checkpoint than the one beside it; {again}")
    if said.get("sha256") != digest:
        raise JobError(f"{path}: not the file that {STATEMENT} was written for; {again}")
    if said.get("depth") != depth:
        raise JobError(
            f"{path}: exported with depth {said.get('depth')!r}, and task.tuning.depth is {depth!r}; {again}"
        )
    session = _session(path)
    names, (found, *more) = {one.name for one in session.get_inputs()}, session.get_outputs()
    if names != {"input_ids", "attention_mask"} or more or len(found.shape) != 2 or type(found.shape[1]) is not int:
        raise JobError(f"{path}: its inputs and output are not those of an export of features; {again}")
    return Export(session, found.shape[1], said["precision"], digest)


def features_of(rows: NDArray[np.float32], export: Export, *, scale: float = 1.0) -> NDArray[np.float32]:
    """The numbers that a head is trained on: (n, length) tokens, as `client.tokens` makes them -> (n, width) float32.

    Pooled, normalised and scaled as `client.pretrained.Classifier` does before its head. Each row depends on its own
    text alone: an int8 graph takes one scale from all that it is given at once, and is given one text at a time, since
    else a record would change the features of its neighbours, which no clipping bounds.
    """
    lengths = lengths_of(rows)
    result = np.empty((len(rows), export.width), dtype=np.float32)
    order, start = np.argsort(lengths, kind="stable")[::-1], 0
    while start < len(order):
        longest = int(lengths[order[start]])  # The longest first: what is padded is computed in vain.
        piece = order[start : start + (1 if export.precision == "int8" else max(1, TOKENS_AT_ONCE // longest))]
        there = rows[piece, :longest] != PADDING
        there[:, 0] = True  # An empty text still is one token long: a softmax over nothing is not a number.
        ids = np.maximum(rows[piece, :longest], 0).astype(np.int64)
        (found,) = export.session.run(None, {"input_ids": ids, "attention_mask": there.astype(np.int64)})
        result[piece] = found
        start += len(piece)
    return result * np.float32(scale)


def lengths_of(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) int64: the tokens of each text, 1 of an empty one."""
    lengths: NDArray[np.int64] = np.maximum(1, (rows != PADDING).sum(axis=1))
    return lengths


def export_features(checkpoint: str, folder: Path, *, int8: bool = False, depth: int | None = None) -> str:
    """Write the export of a checkpoint's encoder, or of its first `depth` blocks, into `folder`; returns what it is, in
    one line.

    The features are compared with torch's on random texts: with int8 weights the line says how near they are, as
    cosines, otherwise they agree to 1e-4. Raises `JobError` for a model that is no encoder of texts, or that does not
    agree.
    """
    source = locate(checkpoint)
    found = hashes(source)
    rows = _rows(source)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as own:
        path = Path(own) / GRAPH
        wanted = _exported(source, rows, path, depth)
        features = features_of(rows, _opened(path, "float32", wanted.shape[1]))
        worst = float(np.linalg.norm(features - wanted, axis=1).max())
        if not worst <= TOLERANCE:
            raise JobError(f"{checkpoint}: the export's features differ from torch's by {worst:.1e} (at most 1e-4)")
        says = f"float32, within {worst:.0e} of torch"
        if int8:
            path = _quantised(path)
            features = features_of(rows, _opened(path, "int8", wanted.shape[1]))
            # The mean of each row is zero: a cosine is a correlation here.
            cosines = (
                (features * wanted).sum(axis=1) / np.linalg.norm(features, axis=1) / np.linalg.norm(wanted, axis=1)
            )
            says = f"int8, cosine to torch's features {cosines.mean():.4f} (least {cosines.min():.4f})"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        path.replace(folder / GRAPH)
    statement = {
        "version": VERSION,
        "checkpoint_hash": found["checkpoint_hash"],
        "sha256": digest,
        "precision": "int8" if int8 else "float32",
        "depth": depth,
    }
    write_atomically(folder / STATEMENT, json.dumps(statement, indent=1).encode())
    return f"{folder / GRAPH}: {size / 1e6:.0f} MB, {says}"


def _rows(source: Path) -> NDArray[np.float32]:
    """Random texts of all lengths."""
    config = configuration(source)
    length = min(_LENGTH, config.get("max_position_embeddings") or config.get("n_positions") or _LENGTH)
    rows = np.random.default_rng(0).integers(config.get("vocab_size", 2), size=(length, length)).astype(np.float32)
    rows[np.triu_indices(length, k=1)] = PADDING
    return rows


def _exported(source: Path, rows: NDArray[np.float32], path: Path, depth: int | None) -> NDArray[np.float32]:
    """Write the graph as float32, and return torch's own features of `rows`."""
    try:
        import torch

        from client.onnx_graph import write_graph
        from client.pretrained import Classifier
    except ImportError as error:
        raise JobError(f"an export needs {error.name}: pip install fedchorus[llm,onnx]") from None
    from strategies.job_data import Column, Data
    from strategies.job_task import TaskChoice, Tuning

    tuning = Tuning(method="head", depth=depth)
    choice = TaskChoice(name="text-classification", model="pretrained", checkpoint=str(source), tuning=tuning)
    column = Column(type="tokens", length=rows.shape[1], tokenizer=str(source))
    model = Classifier(choice, Data(target="class", columns={"text": column}), 1).eval()
    if model.kind != "encoder":
        raise JobError(
            f"{source}: a model of the kind {model.kind!r}; small devices take encoders of texts (BERT, ...)"
        )
    model.head = torch.nn.Identity()  # The graph's outputs are what the head would be given.
    write_graph(model, path, column=column, pooling="mean", scale=1.0)
    if len(list(path.parent.iterdir())) > 1:
        raise JobError(f"{source}: too large for one ONNX file, and so for a small device")
    with torch.no_grad():
        wanted: NDArray[np.float32] = model(torch.from_numpy(rows)).numpy()
    return wanted


def _quantised(path: Path) -> Path:
    """Quantise the weights to 8 bits, beside the file."""
    import logging

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    graph = onnx.load(path)
    del graph.graph.value_info[:]  # The shapes that the exporter wrote down contradict those of the new nodes.
    onnx.save(graph, path)
    small = path.with_name(f"small-{path.name}")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # It recommends a step of its own for images.
    try:
        # A scale for each channel: cosines of 0.99 instead of 0.95. With 7 bits products of 8-bit numbers cannot
        # overflow on processors without VNNI.
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        logging.disable(before)
    return small


def _opened(path: Path, precision: str, width: int) -> Export:
    return Export(_session(path), width, precision, "")


def _session(path: Path) -> Any:
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError:
        raise JobError('trainer.engine = "edge" needs the extra: pip install fedchorus[edge]') from None
    options = onnxruntime.SessionOptions()
    # Memory before speed: no arena that keeps what it once held, and no second copy of the weights in another order.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1  # Threads that wait for so little work burn as much as those that do it.
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # The library has no one kind for what it raises.
        raise JobError(f"{path}: onnxruntime cannot read it ({type(error).__name__}); export it again") from None


def main(arguments: list[str] | None = None) -> int:
    """Export from the command line; 1, with one line on stderr, for what cannot be exported."""
    parser = argparse.ArgumentParser("python -m client.onnx_features", description="Export an encoder for the edge.")
    parser.add_argument("checkpoint", help="a folder, package:NAME/FOLDER, models:NAME or ORG/NAME")
    parser.add_argument("folder", type=Path, help="where model.onnx and model.onnx.json are written")
    parser.add_argument("--int8", action="store_true", help="8-bit weights: a quarter of the memory, nearly as good")
    parser.add_argument("--depth", type=int, help="the job's task.tuning.depth, where it has one")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(export_features(given.checkpoint, given.folder, int8=given.int8, depth=given.depth) + "\n")
    except FedchorusError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

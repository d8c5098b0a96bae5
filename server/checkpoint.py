"""The server's state on disk: one safetensors file, replaced atomically after every round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privacy.durable import write_atomically
from privacy.errors import RunError
from strategies.protocol import ServerState

VERSION = "1"


def save_checkpoint(state: ServerState, path: Path, *, job: str) -> None:
    """Durable when this returns; a crash leaves the checkpoint before it or this one, never half of it."""
    parts = {"memory": state.memory, "release": state.release}
    arrays = {"model": state.model, **{f"{part}.{n}": a for part, kept in parts.items() for n, a in kept.items()}}
    # safetensors writes the memory that a view begins in, not the view.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = {"v": VERSION, "job": job, "round": str(state.round_number)}
    write_atomically(path, save(arrays, metadata))


def load_checkpoint(path: Path, *, job: str) -> ServerState:
    """Raises `RunError` when the file is missing, damaged or another job's."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata["v"] != VERSION or metadata["job"] != job:
            raise RunError(f"{path}: a checkpoint of another job or version")
        memory, release = (
            {name.removeprefix(part): array for name, array in arrays.items() if name.startswith(part)}
            for part in ("memory.", "release.")
        )
        return ServerState(arrays["model"].astype(np.float32), int(metadata["round"]), memory, release)
    except FileNotFoundError:
        raise RunError(f"{path}: no checkpoint, the run stopped before its first round ended") from None
    except (SafetensorError, KeyError, ValueError, OSError):
        raise RunError(f"{path}: not a checkpoint of fedchorus") from None

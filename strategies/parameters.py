"""Names and shapes of a model's trainable parameters, and the flat float32 vector that travels instead of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privacy.errors import RunError

Vector = NDArray[np.float32]
"""(P,) float32: all trainable parameters, one after the other in the order of their `Parameters`."""


@dataclass(frozen=True)
class Parameters:
    """The order in which named arrays become one vector. Model classes stay where they are trained.

    Those that are `received_only`, the last, travel to the sites and are not trained there: the fixed factors of
    adapters, say. No contribution holds them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    received_only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.received_only and tuple(self.shapes)[-len(self.received_only) :] != self.received_only:
            raise ValueError("what is received only comes last")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of scalars in each array, in order."""
        return tuple(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def size(self) -> int:
        """P: the number of scalars."""
        return sum(self.sizes)

    @property
    def trained(self) -> int:
        """How many of the scalars are trained: the first."""
        return sum(self.trained_sizes)

    @property
    def trained_sizes(self) -> tuple[int, ...]:
        """The number of scalars in each array that is trained, in order."""
        return self.sizes[: len(self.shapes) - len(self.received_only)]

    @property
    def digest(self) -> str:
        """SHA-256 of names and shapes in order, hexadecimal: what two sides compare."""
        record: list[list[object]] = [[name, list(shape)] for name, shape in self.shapes.items()]
        record += [[name] for name in self.received_only]
        return hashlib.sha256(json.dumps(record, separators=(",", ":")).encode()).hexdigest()

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Named views into `vector`, in its own memory."""
        arrays, offset = {}, 0
        for name, shape in self.shapes.items():
            count = int(np.prod(shape))
            arrays[name] = vector[offset : offset + count].reshape(shape)
            offset += count
        return arrays

    def save(self, vector: Vector, path: Path, metadata: Mapping[str, str]) -> None:
        """Write named arrays as safetensors; the order stands in the file's metadata."""
        arrays = self.split(np.ascontiguousarray(vector))
        record: dict[str, object] = {**metadata, "order": list(self.shapes)}
        if self.received_only:
            record["received_only"] = list(self.received_only)
        # One key: the library writes several in an arbitrary order, and equal models should be equal files.
        path.write_bytes(save(arrays, {"fedchorus": json.dumps(record, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> tuple[Parameters, Vector]:
        """Read what `save` wrote. Raises `RunError` when the file is missing or something else."""
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {})["fedchorus"])
                order, last = record["order"], tuple(record.get("received_only", ()))
                arrays = {name: file.get_tensor(name) for name in order}
            vector = np.concatenate([array.astype(np.float32).ravel() for array in arrays.values()])
            return cls({name: tuple(array.shape) for name, array in arrays.items()}, last), vector
        except FileNotFoundError:
            raise RunError(f"{path}: no such model file") from None
        except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError):
            raise RunError(f"{path}: not a model file of fedchorus (safetensors with an order)") from None


def vector_hash(vector: NDArray[np.float32]) -> str:
    """SHA-256 of the vector's little-endian bytes, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").view(np.uint8).data).hexdigest()

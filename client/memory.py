"""What a strategy lets a site keep between rounds: control variates, layers of its own, a personal model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from privacy.durable import write_atomically
from privacy.errors import RunError
from strategies.parameters import Parameters, Vector
from strategies.protocol import Kept, Strategy

_MARK = b"fedchorus memory 1\n"
_ROUNDS = 2  # What a round began with must outlive it: a round that fails is run again.


@dataclass(frozen=True)
class SiteMemory:
    """A site's memory on disk: the flat vector ((`size`,) float32) that each of its last two rounds ended with.

    A round that is run again, after a crash or a round that failed, begins with what it began with the first time.
    """

    path: Path
    size: int

    def before(self, round_number: int) -> Vector | None:
        """What the site kept in its last round before this one; None if there was none. Raises `RunError`."""
        earlier = [kept for kept in self._read() if kept[0] < round_number]
        return max(earlier, key=lambda kept: kept[0])[1] if earlier else None

    def newest(self) -> Vector | None:
        """What the site kept last."""
        return self.before(2**63)

    @classmethod
    def in_file(cls, path: Path, size: int) -> Vector | None:
        """What a site kept last; None of a strategy that keeps nothing (`size` is 0), or before its first round."""
        return cls(path, size).newest() if size else None

    def keep(self, round_number: int, memory: Vector) -> None:
        """Keep what a round ended with; durable when this returns."""
        assert memory.shape == (self.size,)
        earlier = sorted((kept for kept in self._read() if kept[0] < round_number), key=lambda kept: kept[0])
        kept = [*earlier[1 - _ROUNDS :], (round_number, memory)]
        body = b"".join(
            number.to_bytes(8, "little") + np.ascontiguousarray(vector, dtype="<f4").tobytes()
            for number, vector in kept
        )
        write_atomically(self.path, _MARK + hashlib.sha256(body).digest() + body)

    def _read(self) -> list[tuple[int, Vector]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        head, step = len(_MARK) + 32, 8 + 4 * self.size
        body = content[head:]
        whole = content.startswith(_MARK) and content[len(_MARK) : head] == hashlib.sha256(body).digest()
        if not whole or len(body) % step:
            raise RunError(f"{self.path}: not a memory of this job; it is damaged, or another strategy's")
        return [
            (int.from_bytes(body[at : at + 8], "little"), np.frombuffer(body, "<f4", self.size, at + 8).copy())
            for at in range(0, len(body), step)
        ]


def flat(memory: Mapping[str, Vector], kept: Mapping[str, Kept], parameters: int) -> Vector:
    """One vector of all that `kept` names, in its order; zeros for what is not there."""
    parts = [np.zeros(0, np.float32)]
    for name, what in kept.items():
        size = parameters if what == "vector" else 1
        parts.append(np.asarray(memory.get(name, np.zeros(size)), dtype=np.float32).reshape(size))
    return np.concatenate(parts)


def named(memory: Vector, kept: Mapping[str, Kept], parameters: int) -> dict[str, Vector]:
    """What `flat` made one vector of."""
    sizes = [parameters if what == "vector" else 1 for what in kept.values()]
    starts = np.cumsum([0, *sizes])
    return {name: memory[start : start + size] for name, start, size in zip(kept, starts, sizes, strict=False)}


def own_model(strategy: Strategy, received: Vector, memory: Vector | None, parameters: Parameters) -> Vector:
    """The model ((P,) float32) of a site that received this and keeps that."""
    every = {**strategy.traits.kept, **strategy.traits.own}
    kept = named(memory, every, parameters.size) if memory is not None else {}
    return strategy.own_model(received, kept, parameters)

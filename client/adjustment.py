"""What a strategy adds to each gradient of a site's training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.parameters import Vector


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What a strategy adds to each gradient g at the model w: g + `pull` (w - `towards`) + `drift`, and zero where
    `frozen`. Arrays are (P,): float32, `frozen` bool."""

    pull: float = 0.0
    towards: Vector | None = None
    drift: Vector | None = None
    frozen: NDArray[np.bool_] | None = None

"""Adaptive server optimisers: Reddi et al. 2021, *Adaptive Federated Optimization* (arXiv:2003.00295), Algorithm 2.

The cohort's average update d stands for a gradient's negative:

    m <- beta_1 m + (1 - beta_1) d
    v <- v + d^2                                (FedAdagrad)
    v <- beta_2 v + (1 - beta_2) d^2            (FedAdam)
    v <- v - (1 - beta_2) d^2 sign(v - d^2)     (FedYogi)
    x <- x + server_learning_rate m / (sqrt(v) + tau)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from strategies.fedavg import FedAvg, stepped
from strategies.protocol import ServerState
from strategies.sections import NotNegative, Positive, Share


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAvg):
    """`tau` bounds how far one coordinate is stretched; `initial` is what every v starts from."""

    server_learning_rate: Positive = 0.1
    beta_1: Share = 0.0
    tau: Positive = 1e-3
    initial: NotNegative = 0.0

    def move(self, state: ServerState, average: NDArray[np.float64]) -> ServerState:
        mean = state.memory.get("mean", np.zeros(len(average)))
        mean = self.beta_1 * mean + (1 - self.beta_1) * average
        squares = self.squares(state.memory.get("squares", np.full(len(average), self.initial)), np.square(average))
        step = self.rate(state.round_number + 1) * mean / (np.sqrt(squares) + self.tau)
        memory = {**state.memory, "mean": mean, "squares": squares}
        return replace(state, model=stepped(state.model, step), memory=memory)

    def squares(self, before: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
        """v after a round whose average has this square."""
        return before + square

    def rate(self, round_number: int) -> float:
        """The step size of a round, counted from 1."""
        return self.server_learning_rate


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedAdagrad):
    """With `bias_correction` the first rounds' steps are those of Adam (Kingma and Ba 2015, section 2) with one round
    more counted, as in Flower's FedAdam; the paper has none."""

    beta_1: Share = 0.9
    beta_2: Share = 0.99
    bias_correction: bool = False

    def squares(self, before: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.beta_2 * before + (1 - self.beta_2) * square

    def rate(self, round_number: int) -> float:
        if not self.bias_correction:
            return self.server_learning_rate
        count = round_number + 1
        correction: float = np.sqrt(1 - self.beta_2**count) / (1 - self.beta_1**count)
        return self.server_learning_rate * correction


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdagrad):
    """Like FedAdam, but v moves by no more than the last square, however large it is."""

    beta_1: Share = 0.9
    beta_2: Share = 0.99

    def squares(self, before: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
        return before - (1 - self.beta_2) * square * np.sign(before - square)

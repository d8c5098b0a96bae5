"""Server optimisers equal Flower's on the same replies, and the papers' algorithms by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from strategies.parameters import Vector
from strategies.protocol import Strategy
from tests.strategies.contract import StrategyContract
from tests.strategies.lent import Lent, float32, run_round


class TestFedAvgM(StrategyContract):
    def make(self) -> Strategy:
        return FedAvgM(momentum=0.5)


class TestFedAdagrad(StrategyContract):
    def make(self) -> Strategy:
        return FedAdagrad()


class TestFedAdam(StrategyContract):
    def make(self) -> Strategy:
        return FedAdam(server_learning_rate=0.02)


class TestFedYogi(StrategyContract):
    def make(self) -> Strategy:
        return FedYogi(server_learning_rate=0.02)


class TestByHand:
    """One coordinate, two rounds whose average updates are 2 and -1."""

    @staticmethod
    def after(strategy: Strategy) -> list[float]:
        state, models = strategy.start(float32(1), sites=1), []
        for update in (2.0, -1.0):
            state = run_round(strategy, state, [Lent(goal=float32(0), arrives=state.model + float32(update))])
            models.append(float(state.model[0]))
        return models

    def test_momentum_carries_half_of_the_first_step_into_the_second(self) -> None:
        # v = 2, then 0.5 * 2 - 1 = 0.
        assert self.after(FedAvgM(momentum=0.5)) == pytest.approx([3, 3])

    def test_adagrad_divides_by_the_root_of_all_squares(self) -> None:
        # 1 + 2 / (2 + 1), then - 1 / (sqrt(5) + 1).
        first = 1 + 2 / 3
        assert self.after(FedAdagrad(server_learning_rate=1, tau=1)) == pytest.approx([first, first - 1 / (5**0.5 + 1)])

    def test_adam_averages_the_squares(self) -> None:
        # m = 1, v = 2; then m = 0.
        strategy = FedAdam(server_learning_rate=1, beta_1=0.5, beta_2=0.5, tau=1)
        first = 1 + 1 / (2**0.5 + 1)
        assert self.after(strategy) == pytest.approx([first, first])

    def test_yogi_moves_its_squares_by_a_step_towards_each(self) -> None:
        # v = 0 + 2 = 2, then the square 1 is less than 2: v = 2 - 0.5; m = 1, then 0.
        strategy = FedYogi(server_learning_rate=1, beta_1=0.5, beta_2=0.5, tau=1, initial=0.0)
        first = 1 + 1 / (2**0.5 + 1)
        assert self.after(strategy) == pytest.approx([first, first])
        strategy = FedYogi(server_learning_rate=1, beta_1=0.0, beta_2=0.5, tau=1)
        assert self.after(strategy)[1] == pytest.approx(1 + 2 / (2**0.5 + 1) - 1 / (1.5**0.5 + 1))

    def test_the_first_squares_may_start_elsewhere(self) -> None:
        assert self.after(FedAdagrad(server_learning_rate=1, tau=1, initial=5.0))[0] == pytest.approx(1 + 2 / 4)


def flowers(strategy: Any, start: Vector, rounds: Sequence[Sequence[tuple[Vector, int]]]) -> list[Vector]:
    """What Flower's strategy makes of the same replies, round by round."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    class Reply:
        def __init__(self, model: Vector, rows: int) -> None:
            arrays = ArrayRecord({"w": Array(model)})
            self.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": rows})})

        def has_error(self) -> bool:
            return False

        def has_content(self) -> bool:
            return True

    strategy.current_arrays = ArrayRecord({"w": Array(start)})
    if not type(strategy).__name__.startswith("FedAvg"):
        strategy.current_arrays = {"w": start.astype(np.float64)}
    models = []
    for number, replies in enumerate(rounds, start=1):
        arrays, _ = strategy.aggregate_train(number, [Reply(model, rows) for model, rows in replies])
        model = arrays["w"].numpy()
        models.append(model)
        if isinstance(strategy.current_arrays, dict):
            strategy.current_arrays = {"w": model.astype(np.float64)}
    return models


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_the_same_replies_make_the_same_models_as_in_flower(name: str) -> None:
    import flwr.serverapp.strategy as theirs

    setting = {"eta": 0.05, "tau": 1e-2}
    pairs: dict[str, tuple[Strategy, Any]] = {
        "FedAvg": (FedAvg(), theirs.FedAvg()),
        "FedAvgM": (
            FedAvgM(momentum=0.7, server_learning_rate=0.5),
            theirs.FedAvgM(server_learning_rate=0.5, server_momentum=0.7),
        ),
        "FedAdagrad": (FedAdagrad(server_learning_rate=0.05, tau=1e-2), theirs.FedAdagrad(**setting)),
        "FedAdam": (
            FedAdam(server_learning_rate=0.05, tau=1e-2, beta_1=0.8, beta_2=0.95, bias_correction=True),
            theirs.FedAdam(**setting, beta_1=0.8, beta_2=0.95),
        ),
        "FedYogi": (
            FedYogi(server_learning_rate=0.05, tau=1e-2, beta_1=0.8, beta_2=0.95),
            theirs.FedYogi(**setting, beta_1=0.8, beta_2=0.95),
        ),
    }
    ours, flower = pairs[name]
    random = np.random.default_rng(1)
    start = random.normal(size=50).astype(np.float32)
    rounds = [[(random.normal(size=50).astype(np.float32), int(n)) for n in (3, 10, 40)] for _ in range(5)]
    state, models = ours.start(start, sites=3), []
    for replies in rounds:
        state = run_round(ours, state, [Lent(goal=start, arrives=model, rows=rows) for model, rows in replies])
        models.append(state.model)
    for mine, flowers_own in zip(models, flowers(flower, start, rounds), strict=True):
        np.testing.assert_allclose(mine, flowers_own, rtol=0, atol=1e-6)

"""Federated averaging is the weighted mean of the clients' models, checked by hand and by its symmetries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.fedavg import FedAvg
from strategies.parameters import Vector
from strategies.protocol import ServerState, Strategy
from strategies.total import Layout, Total
from tests.strategies.contract import StrategyContract
from tests.strategies.lent import Lent, run_round

FLOATS = st.floats(-1e3, 1e3, width=32)
MODELS = st.lists(FLOATS, min_size=3, max_size=3).map(lambda values: np.array(values, np.float32))


def one_round(strategy: Strategy, start: Vector, clients: list[tuple[Vector, int]]) -> ServerState:
    """One round in which each client arrived at a model on so many rows."""
    return run_round(strategy, ServerState(start), [Lent(goal=start, arrives=m, rows=n) for m, n in clients])


def some_models(count: int) -> list[Vector]:
    return list(np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32))


class TestFedAvgByRows(StrategyContract):
    def make(self) -> Strategy:
        return FedAvg()


class TestFedAvgEqual(StrategyContract):
    def make(self) -> Strategy:
        return FedAvg(weighting="equal", server_learning_rate=0.5)


class TestByHand:
    """Two clients, three points, y = w x, half the mean squared error, one step of gradient descent at rate 0.1.

    From w = 1, client A has (1, 2) and (3, 4): its residuals w x - y are -1 and -1, its gradient is
    (1 * -1 + 3 * -1) / 2 = -2, so it arrives at 1.2. Client B has (2, 1): residual 1, gradient 2, so it arrives at 0.8.
    """

    START = np.array([1.0], np.float32)

    @staticmethod
    def trained(points: list[tuple[float, float]]) -> tuple[Vector, int]:
        gradient = sum(x * (1.0 * x - y) for x, y in points) / len(points)
        return np.array([1.0 - 0.1 * gradient], np.float32), len(points)

    @pytest.fixture
    def clients(self) -> list[tuple[Vector, int]]:
        clients = [self.trained([(1, 2), (3, 4)]), self.trained([(2, 1)])]
        assert [(round(float(model[0]), 6), rows) for model, rows in clients] == [(1.2, 2), (0.8, 1)]
        return clients

    def test_rows_weigh_the_clients(self, clients: list[tuple[Vector, int]]) -> None:
        # 1 + (2 * 0.2 - 1 * 0.2) / 3 = 1.0666...
        assert one_round(FedAvg(), self.START, clients).model == pytest.approx([16 / 15], abs=1e-6)

    def test_equal_weights_ignore_the_rows(self, clients: list[tuple[Vector, int]]) -> None:
        # 1 + (0.2 - 0.2) / 2 = 1
        assert one_round(FedAvg(weighting="equal"), self.START, clients).model == pytest.approx([1], abs=1e-6)

    def test_the_server_takes_its_own_share_of_the_step(self, clients: list[tuple[Vector, int]]) -> None:
        # 1 + 0.5 * 0.0666... = 1.0333...
        strategy = FedAvg(server_learning_rate=0.5)
        assert one_round(strategy, self.START, clients).model == pytest.approx([31 / 30], abs=1e-6)

    def test_the_next_round_starts_where_this_one_ended(self, clients: list[tuple[Vector, int]]) -> None:
        strategy = FedAvg()
        first = one_round(strategy, self.START, clients)
        total = Total(Layout(1))
        total.add(np.array([0.5, 1.0], np.float32))
        second = strategy.step(first, total)
        assert second.model == pytest.approx([16 / 15 + 0.5], abs=1e-6)
        assert second.round_number == 2


class TestSymmetries:
    @settings(max_examples=40)
    @given(start=MODELS, model=MODELS, rows=st.lists(st.integers(1, 1000), min_size=1, max_size=6))
    def test_a_cohort_of_one_mind_gives_that_model(self, start: Vector, model: Vector, rows: list[int]) -> None:
        for strategy in (FedAvg(), FedAvg(weighting="equal")):
            after = one_round(strategy, start, [(model, n) for n in rows]).model
            np.testing.assert_allclose(after, model, rtol=1e-6, atol=1e-3)

    @settings(max_examples=40)
    @given(start=MODELS, models=st.lists(MODELS, min_size=1, max_size=6), data=st.data())
    def test_neither_the_order_of_the_clients_nor_their_regions_matter(
        self, start: Vector, models: list[Vector], data: st.DataObject
    ) -> None:
        clients = [(model, data.draw(st.integers(1, 1000))) for model in models]
        whole = one_round(FedAvg(), start, clients).model
        shuffled = one_round(FedAvg(), start, data.draw(st.permutations(clients))).model
        np.testing.assert_allclose(shuffled, whole, rtol=1e-6, atol=1e-6)

    @settings(max_examples=40)
    @given(start=MODELS, models=st.lists(MODELS, min_size=1, max_size=6), data=st.data())
    def test_the_mean_lies_among_the_clients_models(
        self, start: Vector, models: list[Vector], data: st.DataObject
    ) -> None:
        after = one_round(FedAvg(), start, [(model, data.draw(st.integers(1, 1000))) for model in models]).model
        assert np.all(after >= np.min(models, axis=0) - 1e-2)
        assert np.all(after <= np.max(models, axis=0) + 1e-2)

    @settings(max_examples=40)
    @given(start=MODELS, model=MODELS, times=st.integers(1, 20))
    def test_a_row_counted_by_two_clients_weighs_as_in_one(self, start: Vector, model: Vector, times: int) -> None:
        other = (start + 1, 5)
        one = one_round(FedAvg(), start, [(model, 3 * times), other]).model
        many = one_round(FedAvg(), start, [*[(model, 3)] * times, other]).model
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-3)

"""Strategies against client drift: sites whose bowls differ agree on the bottom of their sum, where FedAvg does not.

Site k minimises c_k/2 |w - b_k|^2, so the federation's optimum is sum(c_k b_k) / sum(c_k).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.fednova import FedNova
from strategies.fedprox import FedProx
from strategies.parameters import Vector
from strategies.protocol import Strategy
from strategies.qffl import QFfl
from strategies.scaffold import Scaffold
from tests.strategies.contract import StrategyContract
from tests.strategies.lent import Lent, contribute, float32, run_round, run_rounds, total_of

START = float32(0, 0, 0)


def sites(**changes: Any) -> list[Lent]:
    """A flat bowl and a steep one: many local steps bring a site to its own bottom, whatever its curvature."""
    flat = Lent(goal=float32(0, 4, 1), curvature=1.0, **changes)
    return [flat, Lent(goal=float32(2, 0, 1), curvature=4.0, **changes)]


def optimum(clients: list[Lent]) -> Vector:
    summed: Vector = sum((site.curvature * site.goal for site in clients), start=START)
    return summed / np.float32(sum(site.curvature for site in clients))


class TestFedProx(StrategyContract):
    def make(self) -> Strategy:
        return FedProx(mu=0.5)

    def test_a_stronger_pull_keeps_a_site_closer_to_the_model_it_received(self) -> None:
        moved = [
            float(np.linalg.norm(run_round(FedProx(mu=mu), FedAvg().start(START, sites=1), [Lent()]).model))
            for mu in (0.0, 0.5, 5.0)
        ]
        assert moved[0] > 1.05 * moved[1] > 1.05 * moved[2]

    def test_without_a_pull_it_is_federated_averaging(self) -> None:
        ours, theirs = (run_rounds(s, START, sites(), 3).model for s in (FedProx(mu=0), FedAvg()))
        np.testing.assert_array_equal(ours, theirs)


class TestScaffold(StrategyContract):
    def make(self) -> Strategy:
        return Scaffold(weighting="equal")

    def test_it_comes_to_the_optimum_that_federated_averaging_misses(self) -> None:
        wanted = optimum(sites())
        averaged = run_rounds(FedAvg(weighting="equal"), START, sites(steps=20), 100).model
        corrected = run_rounds(self.make(), START, sites(steps=20), 100).model
        assert np.abs(averaged - wanted).max() > 0.3
        np.testing.assert_allclose(corrected, wanted, atol=1e-3)

    def test_it_comes_to_the_optimum_also_when_updates_are_bounded(self) -> None:
        # A site that is protected as a whole remembers what left, not what it would have sent.
        clients = sites(clip_norm=0.5)
        end = run_rounds(self.make(), START, clients, 1500)
        np.testing.assert_allclose(end.model, optimum(clients), atol=0.01)

    def test_the_servers_control_variate_is_the_mean_of_the_sites(self) -> None:
        # That is what lets it be worked out from the average update; here some sites miss some rounds.
        clients, strategy = [*sites(), Lent(goal=float32(1, 1, 1), curvature=2.0)], self.make()
        state = strategy.start(START, sites=3)
        for asked in ([0, 1, 2], [0, 1], [2], [0, 2], [0, 1, 2]):
            state = run_round(strategy, state, [clients[k] for k in asked])
            own = [client.memory.get("control", START) for client in clients]
            np.testing.assert_allclose(state.memory["control"], np.mean(own, axis=0), atol=1e-5)

    def test_weights_by_rows_move_the_optimum_to_theirs(self) -> None:
        flat, steep = sites(steps=20)
        flat.rows = 30  # Three times the weight of the steep one.
        wanted = (3 * flat.curvature * flat.goal + steep.curvature * steep.goal) / np.float32(7)
        np.testing.assert_allclose(run_rounds(Scaffold(), START, [flat, steep], 150).model, wanted, atol=1e-3)

    def test_control_variates_are_the_papers_option_two(self) -> None:
        # c_k' = c_k - c + (x - y_k) / (K eta), kept times K eta; in round 1 both are zero.
        site, strategy = Lent(steps=4, learning_rate=0.1), self.make()
        sent = contribute(strategy, strategy.broadcast(strategy.start(START, sites=1)), site)
        np.testing.assert_allclose(site.memory["control"], -sent[:3], atol=1e-7)


class TestScaffoldByRows(StrategyContract):
    def make(self) -> Strategy:
        return Scaffold()


class TestFedDyn(StrategyContract):
    def make(self) -> Strategy:
        return FedDyn(alpha=0.5, weighting="equal")

    def test_it_comes_to_the_optimum_that_federated_averaging_misses(self) -> None:
        wanted = optimum(sites())
        dynamic = run_rounds(self.make(), START, sites(steps=40), 150).model
        np.testing.assert_allclose(dynamic, wanted, atol=1e-2)

    def test_it_comes_to_the_optimum_also_when_updates_are_bounded(self) -> None:
        clients = sites(clip_norm=0.5)
        end = run_rounds(self.make(), START, clients, 1500)
        np.testing.assert_allclose(end.model, optimum(clients), atol=0.01)


class TestFedNova(StrategyContract):
    def make(self) -> Strategy:
        return FedNova()

    def test_a_site_that_takes_more_steps_pulls_no_harder(self) -> None:
        # Bowls alike but for where they are: the optimum lies halfway.
        def pair() -> list[Lent]:
            return [Lent(goal=float32(1, 0, 0), steps=2), Lent(goal=float32(-1, 0, 0), steps=12)]

        settings = {"learning_rate": 0.005}
        clients = [Lent(**{**vars(site), **settings}) for site in pair()]
        averaged = run_rounds(FedAvg(), START, clients, 400).model[0]
        normalised = run_rounds(self.make(), START, clients, 400).model[0]
        assert averaged < -0.5
        assert abs(normalised) < 0.05

    def test_equal_steps_make_it_federated_averaging(self) -> None:
        ours, theirs = (run_rounds(s, START, sites(), 3).model for s in (FedNova(), FedAvg()))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    def test_the_update_is_equation_twelve(self) -> None:
        clients = [Lent(goal=START, arrives=float32(4, 0, 0), rows=1, steps=2),
                   Lent(goal=START, arrives=float32(0, 9, 0), rows=3, steps=3)]  # fmt: skip
        # T = 1/4 * 2 + 3/4 * 3 = 2.75; x = T (1/4 * 4 / 2, 3/4 * 9 / 3).
        state = run_round(FedNova(), FedNova().start(START, sites=2), clients)
        np.testing.assert_allclose(state.model, [2.75 * 0.5, 2.75 * 2.25, 0], rtol=1e-6)


class TestQFfl(StrategyContract):
    def make(self) -> Strategy:
        return QFfl(q=1.0, weighting="equal")

    def test_q_zero_is_federated_averaging_with_equal_weights(self) -> None:
        strategies = (QFfl(q=0, weighting="equal"), FedAvg(weighting="equal"))
        ours, theirs = (run_rounds(strategy, START, sites(), 3).model for strategy in strategies)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    def test_a_larger_q_brings_the_losses_closer_together(self) -> None:
        gaps = []
        for q in (0.0, 1.0, 4.0):
            clients = sites()
            model = run_rounds(QFfl(q=q, weighting="equal"), START, clients, 400).model
            losses = [client.loss(model) for client in clients]
            gaps.append(max(losses) - min(losses))
        assert gaps[0] > 1.3 * gaps[1] > 1.3 * gaps[2]

    @pytest.mark.parametrize("q", [200.0, 1e30])
    def test_a_pull_beyond_all_numbers_is_left_to_the_gate_which_refuses_what_is_not_finite(self, q: float) -> None:
        sent = contribute(QFfl(q=q, weighting="equal"), START, Lent(goal=float32(10, 20, 30)))
        assert not np.isfinite(sent).all()

    @pytest.mark.parametrize("q", [0.5, 2.0])
    def test_the_quotient_is_the_papers(self, q: float) -> None:
        clients, eta = sites(), 0.1
        received = float32(1, 1, 1)
        numerator, denominator = np.zeros(3), 0.0
        for site in clients:
            loss, delta = site.loss(received), (received - site.fit(received)).astype(float) / eta
            numerator += loss**q * delta
            denominator += q * loss ** (q - 1) * float(delta @ delta) + loss**q / eta
        strategy = QFfl(q=q, weighting="equal")
        state = strategy.start(received, sites=2)
        total = total_of(strategy, 3, [contribute(strategy, received, site) for site in clients])
        np.testing.assert_allclose(strategy.step(state, total).model, received - numerator / denominator, rtol=1e-5)

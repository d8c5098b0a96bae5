"""Strategies that leave each site with a model of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from privacy.errors import JobError
from strategies.catalogue import strategy_for
from strategies.ditto import Ditto
from strategies.fedavg import FedAvg
from strategies.fedper import FedBn, FedPer, FedPerAdam, FedRep
from strategies.ifca import Ifca
from strategies.parameters import Parameters, Vector
from strategies.pfedme import PFedMe
from strategies.protocol import Strategy
from tests.strategies.contract import StrategyContract
from tests.strategies.jobs import make_job
from tests.strategies.lent import Lent, contribute, float32, run_rounds

START = float32(0, 0, 0)
LAYERS = {"body.weight": (2,), "head.weight": (1,)}


class Layered(StrategyContract):
    rounds = 60

    def site(self, **changes: Any) -> Lent:
        return Lent(**{"shapes": LAYERS, **changes})

    def test_what_stays_is_sent_as_zeros(self) -> None:
        strategy, received, local = self.begin()
        sent = contribute(strategy, received, local)
        assert sent[2] == 0
        assert np.abs(sent[:2]).min() > 0

    def test_sites_that_differ_in_what_stays_agree_on_the_rest(self) -> None:
        strategy = self.make()
        clients = [self.site(goal=float32(1, 2, head)) for head in (-5, 5)]
        end = run_rounds(strategy, START, clients, self.rounds)
        models = [strategy.own_model(end.model, site.memory, site.parameters) for site in clients]
        np.testing.assert_allclose(models, [[1, 2, -5], [1, 2, 5]], atol=0.01)
        assert end.model[2] == 0


class TestFedPer(Layered):
    def make(self) -> Strategy:
        return FedPer()

    @pytest.mark.parametrize(
        ("keep", "stays"),
        [((), [0, 0, 1, 1]), (("body.*",), [1, 1, 0, 0]), (("*.bias", "body.w?"), [1, 0, 0, 1])],
    )
    def test_what_stays_is_named_by_patterns_or_the_last_layer(self, keep: tuple[str, ...], stays: list[int]) -> None:
        parameters = Parameters({"body.w1": (1,), "body.v1": (1,), "head.weight": (1,), "head.bias": (1,)})
        assert FedPer(keep=keep).kept(parameters).tolist() == [bool(flag) for flag in stays]

    @pytest.mark.parametrize(("keep", "said"), [(("nose.*",), "none of"), (("*",), "all of")])
    def test_patterns_that_name_nothing_or_everything_are_refused(self, keep: tuple[str, ...], said: str) -> None:
        with pytest.raises(JobError, match=f"strategy.keep: .* names {said} the model's arrays \\(body.weight"):
            FedPer(keep=keep).kept(Parameters(LAYERS))


class TestFedPerAdam(Layered):
    rounds = 600

    def make(self) -> Strategy:
        return FedPerAdam(server_learning_rate=0.01)

    def test_what_few_sites_move_moves_as_far_as_what_all_do(self) -> None:
        # Nine sites of ten know nothing of the second number: its average update is a tenth.
        clients = [self.site(goal=float32(1, 1 if n == 0 else 0, 0)) for n in range(10)]
        first = run_rounds(FedPerAdam(server_learning_rate=0.01, tau=1e-9), START, clients, 1).model
        assert first[1] == pytest.approx(first[0], rel=1e-3)
        plain = run_rounds(FedPer(), START, clients, 1).model
        assert plain[1] == pytest.approx(plain[0] / 10, rel=1e-3)


class TestFedRep(Layered):
    def make(self) -> Strategy:
        return FedRep(own_share=0.25)

    @pytest.mark.parametrize(("share", "steps", "first"), [(0.0, 5, 1), (0.5, 2, 1), (0.5, 3, 2), (0.99, 9, 8)])
    def test_each_part_is_trained_for_a_step_at_least(self, share: float, steps: int, first: int) -> None:
        local = Parted(goal=float32(1, 2, 3), steps=steps, shapes={**LAYERS})
        FedRep(own_share=share).contribution(START, local, np.zeros(3, np.float32))
        assert local.parts == [([2], first), ([0, 1], steps - first)]

    def test_a_site_of_one_step_takes_it_with_both_parts_at_once(self) -> None:
        local = self.site(steps=1)
        sent = contribute(FedRep(), START, local)
        assert local.taken == 1
        assert sent[:2].all()
        assert local.memory["own"][2] != 0


@dataclass
class Parted(Lent):
    """Keeps which parameters each training moved, and for how many steps."""

    parts: list[tuple[list[int], int]] = field(default_factory=list)

    def fit(self, start: Vector, **given: Any) -> Vector:
        self.parts.append((np.flatnonzero(~given["frozen"]).tolist(), given["steps"]))
        return super().fit(start, **given)


class TestFedBn(Layered):
    def make(self) -> Strategy:
        return FedBn()

    def site(self, **changes: Any) -> Lent:
        return Lent(**{"shapes": {"0.weight": (2, 1), "1.weight": (1,)}, **changes})

    def test_the_layers_whose_weight_is_a_vector_stay(self) -> None:
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 2))
        parameters = Parameters({name: tuple(p.shape) for name, p in network.named_parameters()})
        stays = Parameters(parameters.shapes).split(FedBn().kept(parameters).astype(np.float32))
        assert {name for name, flags in stays.items() if flags.all()} == {"1.weight", "1.bias"}
        assert {name for name, flags in stays.items() if flags.any()} == {"1.weight", "1.bias"}

    def test_a_model_without_such_layers_is_refused(self) -> None:
        with pytest.raises(JobError, match=r"strategy\.keep: its default names none of the model's arrays"):
            FedBn().kept(Parameters({"0.weight": (2, 2), "0.bias": (2,)}))


class TestDitto(StrategyContract):
    def make(self) -> Strategy:
        return Ditto(lam=0.5)

    def test_the_shared_model_is_that_of_federated_averaging(self) -> None:
        def clients() -> list[Lent]:
            return [Lent(goal=float32(1, 0, 0)), Lent(goal=float32(0, 3, 0), curvature=3.0)]

        ours, theirs = (run_rounds(strategy, START, clients(), 5).model for strategy in (self.make(), FedAvg()))
        np.testing.assert_array_equal(ours, theirs)

    def test_the_own_model_lies_between_the_shared_one_and_what_the_site_wants(self) -> None:
        # At rest: gradient (v - b) + lam (v - x) = 0, so v = (b + lam x) / (1 + lam).
        clients = [Lent(goal=float32(1, 0, 0)), Lent(goal=float32(-1, 0, 0))]
        end = run_rounds(self.make(), START, clients, 200)
        for site in clients:
            np.testing.assert_allclose(site.memory["model"], (site.goal + 0.5 * end.model) / 1.5, atol=1e-3)


class TestPFedMe(StrategyContract):
    def make(self) -> Strategy:
        return PFedMe(lam=0.5, inner_steps=3)

    def test_own_models_differ_where_sites_do(self) -> None:
        clients = [Lent(goal=float32(1, 0, 0), steps=12), Lent(goal=float32(-1, 0, 0), steps=12)]
        strategy = PFedMe(lam=0.5, inner_steps=6)
        end = run_rounds(strategy, START, clients, 60)
        own = [strategy.own_model(end.model, site.memory, site.parameters)[0] for site in clients]
        assert abs(end.model[0]) < 0.01
        assert own[0] > 0.3
        assert own[1] < -0.3


class TestIfca(StrategyContract):
    def make(self) -> Strategy:
        return Ifca(clusters=2, spread=0.3)

    def test_two_kinds_of_sites_find_a_model_each(self) -> None:
        goals = [float32(3, 0, 0), float32(-3, 0, 0)]
        clients = [Lent(goal=goals[k % 2]) for k in range(6)]
        strategy = self.make()
        end = run_rounds(strategy, START, clients, 40)
        received = strategy.broadcast(end)
        for site in clients:
            np.testing.assert_allclose(strategy.own_model(received, site.memory, site.parameters), site.goal, atol=0.01)
        assert {float(site.memory["cluster"][0]) for site in clients} == {0.0, 1.0}

    def test_a_contribution_holds_zeros_in_the_other_clusters_places(self) -> None:
        strategy, received, local = self.begin()
        sent = contribute(strategy, received, local)
        chosen = int(local.memory["cluster"][0])
        other = sent[:6].reshape(2, 3)[1 - chosen]
        assert other.tolist() == [0, 0, 0]
        assert sent[7:].tolist() == [10.0 * (k == chosen) for k in range(2)]

    def test_a_cluster_that_nobody_chose_stays_where_it_is(self) -> None:
        strategy, clients = self.make(), [Lent(goal=START)]
        state = strategy.start(START, sites=1)
        before = state.memory["models"].reshape(2, 3)[1].copy()
        end = run_rounds(strategy, START, clients, 3)
        np.testing.assert_array_equal(end.memory["models"].reshape(2, 3)[1], before)

    def test_more_models_than_a_message_should_carry_are_refused(self) -> None:
        with pytest.raises(JobError, match=r"strategy\.clusters: should be less than or equal to 64, got 65"):
            make_job(strategy={"name": "ifca", "clusters": 65})
        assert strategy_for(make_job(strategy={"name": "ifca", "clusters": 64})) == Ifca(clusters=64)

    def test_the_same_model_starts_the_same_clusters(self) -> None:
        first, second = (self.make().start(float32(1, 2, 3), sites=2).memory["models"] for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert np.abs(first[:3] - [1, 2, 3]).max() == 0

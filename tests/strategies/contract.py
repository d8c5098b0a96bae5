"""What the server and the clients may rely on, whatever the strategy: every strategy's tests inherit this."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from strategies.parameters import Vector
from strategies.protocol import Strategy
from tests.strategies.lent import Lent, contribute, float32, run_round, run_rounds, total_of


class StrategyContract:
    def make(self) -> Strategy:
        raise NotImplementedError

    @pytest.mark.parametrize("rows", [1, 7, 10**6])
    def test_a_client_adds_finite_numbers_with_a_positive_weight(self, rows: int) -> None:
        strategy, received, local = self.begin()
        sent = contribute(strategy, received, Lent(**{**vars(local), "rows": rows}))
        assert np.isfinite(sent).all()
        assert sent[strategy.traits.sent * 3] > 0

    def test_what_was_received_is_left_as_it_is(self) -> None:
        strategy, received, local = self.begin()
        before = received.copy()
        contribute(strategy, received, local)
        np.testing.assert_array_equal(received, before)

    def test_a_site_trains_the_steps_that_it_is_charged_for_and_no_more(self) -> None:
        strategy, received, local = self.begin()
        out = np.zeros(strategy.traits.sent * 3, np.float32)
        strategy.contribution(received, local, out)
        assert local.taken == local.steps

    def test_a_strategy_that_does_not_say_so_reads_no_records_but_by_training(self) -> None:
        strategy, received, local = self.begin()
        strategy.contribution(received, local, np.zeros(strategy.traits.sent * 3, np.float32))
        assert strategy.traits.reads_records or not local.reads

    def test_a_site_keeps_what_the_traits_name_and_nothing_else(self) -> None:
        strategy, received, local = self.begin()
        contribute(strategy, received, local)
        kept = {**strategy.traits.kept, **strategy.traits.own}
        assert set(local.memory) == set(kept)
        for name, array in local.memory.items():
            assert np.asarray(array).size == (3 if kept[name] == "vector" else 1)

    def test_what_a_site_keeps_for_itself_alone_changes_nothing_that_it_sends(self) -> None:
        strategy = self.make()
        ours, others = (self.site(goal=float32(5, 1, -2)) for _ in range(2))
        state = strategy.start(float32(0.5, -1, 2), sites=2)
        for _ in range(3):
            for name in strategy.traits.own:
                if name in others.memory:
                    others.memory[name] = others.memory[name] + np.float32(7)
            received = strategy.broadcast(state)
            sent = [contribute(strategy, received, local) for local in (ours, others)]
            np.testing.assert_array_equal(sent[0], sent[1])
            state = strategy.step(state, total_of(strategy, 3, sent))

    def test_the_sizes_are_those_that_the_traits_name(self) -> None:
        strategy, received, local = self.begin()
        assert received.shape == (strategy.traits.received * 3,)
        assert received.dtype == np.float32
        contribute(strategy, received, local)
        own = strategy.own_model(received, local.memory, local.parameters)
        assert own.shape == (3,)
        assert own.dtype == np.float32
        assert strategy.own_model(received, {}, local.parameters).shape == (3,)

    def test_a_step_ends_one_round_and_leaves_its_inputs_alone(self) -> None:
        strategy, _, local = self.begin()
        state = run_round(strategy, strategy.start(float32(0.5, -1, 2), sites=2), [local])
        total = total_of(strategy, 3, [contribute(strategy, strategy.broadcast(state), local)])
        model, memory = state.model.copy(), {name: array.copy() for name, array in state.memory.items()}
        update = total.update.copy()
        after = strategy.step(state, total)
        assert after.round_number == 2
        assert after.model.dtype == np.float32
        assert after.model.shape == (3,)
        np.testing.assert_array_equal(state.model, model)
        np.testing.assert_array_equal(total.update, update)
        assert set(state.memory) == set(memory)
        for name, array in memory.items():
            np.testing.assert_array_equal(state.memory[name], array)

    def test_a_diverged_model_shows_as_one_that_is_not_finite(self) -> None:
        # Not as a warning on the way: the round loop looks at the model and says what to do.
        strategy = self.make()
        state = strategy.start(np.zeros(1, np.float32), sites=1)
        largest = float(np.finfo(np.float32).max)
        sent = np.zeros(strategy.traits.sent + 1 + len(strategy.traits.scalars), np.float32)
        sent[:], sent[strategy.traits.sent] = largest, 1e-30
        state = strategy.step(state, total_of(strategy, 1, [sent]))
        for _ in range(3):
            if np.isfinite(state.model).all():
                state = strategy.step(state, total_of(strategy, 1, [sent]))

    def test_a_cohort_of_one_mind_comes_to_what_it_wants(self) -> None:
        strategy, clients = self.make(), [self.site() for _ in range(3)]
        end = run_rounds(strategy, float32(0.9, 2.1, 3), clients, rounds=150)
        model = end.model
        if strategy.traits.personal:
            model = strategy.own_model(strategy.broadcast(end), clients[0].memory, clients[0].parameters)
        np.testing.assert_allclose(model, [1, 2, 3], atol=0.05)

    def site(self, **changes: Any) -> Lent:
        """A site whose model the strategy can train."""
        return Lent(**changes)

    def begin(self) -> tuple[Strategy, Vector, Lent]:
        strategy = self.make()
        return strategy, strategy.broadcast(strategy.start(float32(0.5, -1, 2), sites=2)), self.site()

"""What sites train of adapters adds up exactly, and turning the factors changes none of what they make together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import JobError
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdam
from strategies.fedper import FedPer
from strategies.job import Job, check_job
from strategies.lora import Adapters, columns_from, refactored, resting
from strategies.parameters import Parameters, Vector
from strategies.protocol import ServerState, Traits
from strategies.total import Layout, Total, layout_for

OUT, RANK, INTO = 5, 3, 7
FIRST, SECOND = "base.q.lora_A.default.weight", "base.q.lora_B.default.weight"
PARAMETERS = Parameters({SECOND: (OUT, RANK), "head.weight": (1, 4), FIRST: (RANK, INTO)}, (FIRST,))


def model(seed: int) -> Vector:
    numbers = np.random.default_rng(seed)
    first = np.linalg.qr(numbers.normal(size=(INTO, RANK)))[0].T
    second = numbers.normal(size=(OUT, RANK))
    return np.concatenate([second.ravel(), numbers.normal(size=4), first.ravel()]).astype(np.float32)


def product(vector: Vector) -> Vector:
    arrays = PARAMETERS.split(vector)
    made: Vector = arrays[SECOND] @ arrays[FIRST]
    return made


def job(tuning: Mapping[str, object], strategy: str = "fedavg") -> Job:
    checkpoint = {"name": "text-classification", "model": "pretrained", "checkpoint": "models:tiny", "tuning": tuning}
    columns = {"text": {"type": "tokens", "length": 8}}
    training = {"rounds": 2, "local_steps": 1, "batch_size": 2, "learning_rate": 0.1}
    raw = {"name": "x", "data": {"target": "y", "columns": columns}, "task": checkpoint, "training": training}
    return check_job({**raw, "strategy": {"name": strategy}}, where="the job")


class TestRefactored:
    @given(st.integers(0, 2**32))
    def test_makes_the_same_product_of_orthogonal_factors_the_largest_first(self, seed: int) -> None:
        before = model(seed)
        after = refactored(before, PARAMETERS)
        np.testing.assert_allclose(product(after), product(before), atol=1e-5)
        arrays = PARAMETERS.split(after)
        np.testing.assert_allclose(arrays[FIRST] @ arrays[FIRST].T, np.eye(RANK), atol=1e-6)
        gram = arrays[SECOND].T @ arrays[SECOND]
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4)
        assert (np.diff(np.diag(gram)) <= 1e-5).all()
        assert PARAMETERS.split(after)["head.weight"].tolist() == PARAMETERS.split(before)["head.weight"].tolist()

    def test_leaves_a_model_that_diverged_for_the_round_loop_to_refuse(self) -> None:
        broken = model(1)
        broken[0] = np.nan
        assert np.isnan(refactored(broken, PARAMETERS)[0])

    @given(st.integers(0, 2**32))
    def test_changes_no_step_of_plain_sgd(self, seed: int) -> None:
        """From orthonormal rows, as adapters start with: a claim of the module, and why it is off by default."""
        gradient = np.random.default_rng(seed + 1).normal(size=(OUT, INTO))
        before = model(seed).astype(np.float64)
        after = refactored(before.astype(np.float32), PARAMETERS).astype(np.float64)
        moved = []
        for vector in (before, after):
            arrays = PARAMETERS.split(vector)  # type: ignore[arg-type]
            step = gradient @ arrays[FIRST].T
            moved.append((arrays[SECOND] - 0.3 * step) @ arrays[FIRST])
        np.testing.assert_allclose(moved[0], moved[1], atol=1e-5)

    def test_happens_every_so_many_rounds(self) -> None:
        strategy = Adapters(FedAvg(), {}, 2).fitted(PARAMETERS)
        layout = layout_for(job({"refactor_every": 2}), PARAMETERS, strategy.traits)
        state = strategy.start(model(3), sites=1)
        turned = []
        for _ in range(4):
            before = state.model
            state = strategy.step(state, Total.of(layout, np.zeros(PARAMETERS.size), 1.0))
            turned.append(not np.array_equal(before, state.model))
        assert turned[:3] == [False, True, False]

    @pytest.mark.parametrize("inner", [FedAdam(), FedPer(keep=("head.*",))])
    def test_is_refused_with_a_strategy_that_remembers_in_the_old_coordinates(self, inner: FedAvg) -> None:
        with pytest.raises(JobError, match="refactor_every with a strategy that remembers"):
            Adapters(inner, {}, 2).fitted(PARAMETERS).start(model(1), sites=2)

    def test_is_refused_for_a_model_without_such_factors(self) -> None:
        with pytest.raises(JobError, match="no adapters of which A travels"):
            Adapters(FedAvg(), {}, 2).fitted(Parameters({"head.weight": (1, 4)}))


class TestRanks:
    def test_average_each_column_over_those_who_train_it(self) -> None:
        strategy = Adapters(FedAvg(), {"weak": 1, "weaker": 1, "middle": 2}, None).fitted(PARAMETERS)
        layout = layout_for(job({"rank": RANK, "ranks": {"weak": 1}}), PARAMETERS, strategy.traits)
        assert layout.parameters == OUT * RANK + 4
        total = Total(layout)
        sites = {"strong": (None, 1.0), "middle": (2, 2.0), "weak": (1, 3.0)}
        for rank, weight in sites.values():
            update = np.full(PARAMETERS.size, 1.0)
            if rank is not None:
                update[columns_from(PARAMETERS, rank)] = 0
            contribution = np.zeros(layout.size, dtype=np.float32)
            contribution[: layout.parameters] = weight * weight * update[: layout.parameters]
            contribution[layout.parameters] = weight
            for at, name in enumerate(layout.metrics[:2], start=layout.parameters + 1):
                contribution[at] = weight if name == f"weight_of_rank_{rank}" else 0
            total.add(contribution)
        after = strategy.step(ServerState(np.zeros(PARAMETERS.size, np.float32)), total)
        columns = PARAMETERS.split(after.model)[SECOND]
        # Each site's update is its weight: an average weighted by itself.
        assert columns[:, 0].tolist() == pytest.approx([(1 + 4 + 9) / 6] * OUT)
        assert columns[:, 1].tolist() == pytest.approx([(1 + 4) / 3] * OUT)
        assert columns[:, 2].tolist() == pytest.approx([1.0] * OUT)
        assert PARAMETERS.split(after.model)["head.weight"].ravel().tolist() == pytest.approx([14 / 6] * 4)

    def test_a_weak_site_rests_the_columns_behind_its_own(self) -> None:
        one = job({"rank": RANK, "ranks": {"weak": 1}})
        mask = resting(one, PARAMETERS, site="weak", round_number=1)
        assert mask is not None
        assert PARAMETERS.split(mask)[SECOND].tolist() == [[False, True, True]] * OUT  # type: ignore[arg-type]
        assert mask.sum() == 2 * OUT
        assert resting(one, PARAMETERS, site="strong", round_number=1) is None

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                {"privacy": {"client": {"epsilon": 1.0, "delta": 1e-3, "clip_norm": 1.0}}},
                "task.tuning.ranks with privacy",
            ),
            ({"strategy": {"name": "scaffold"}}, "task.tuning.ranks with strategy.name"),
            ({"training": {"weak": {"weaker": 0.3}}}, r"task.tuning.ranks with training\.weak"),
            ({"robust": {"reduce": "median"}}, r"task.tuning.ranks with \[robust\]"),
        ],
    )
    def test_are_refused_where_not_all_weigh_alike(self, change: dict[str, object], says: str) -> None:
        from strategies.catalogue import strategy_for

        raw = job({"rank": RANK, "ranks": {"weak": 1}}).model_dump(exclude_none=True, mode="json")
        raw["strategy"]["weighting"] = "equal"
        raw |= {key: {**raw.get(key, {}), **value} for key, value in change.items()}  # type: ignore[dict-item]
        with pytest.raises(JobError, match=says):
            strategy_for(check_job(raw, where="the job"))


def test_a_head_that_went_first_leaves_the_turn_to_b() -> None:
    both = Parameters({SECOND: (OUT, RANK), FIRST: (RANK, INTO), "head.weight": (1, 4)})
    mask = resting(job({"factors": "alternate", "head_rounds": 1}), both, site="any", round_number=2)
    assert mask is not None
    assert both.split(mask)[FIRST].all()  # type: ignore[arg-type]
    assert mask.sum() == both.split(mask)[FIRST].size  # type: ignore[arg-type]


def test_factors_in_turn_rest_the_other_one_and_b_goes_first() -> None:
    both = Parameters({SECOND: (OUT, RANK), FIRST: (RANK, INTO), "head.weight": (1, 4)})
    for number, name in ((1, FIRST), (2, SECOND), (3, FIRST)):
        mask = resting(job({"factors": "alternate"}), both, site="any", round_number=number)
        assert mask is not None
        assert both.split(mask)[name].all()  # type: ignore[arg-type]
        assert mask.sum() == both.split(mask)[name].size  # type: ignore[arg-type]


def test_the_head_is_trained_alone_in_the_first_rounds() -> None:
    one = job({"head_rounds": 2})
    for number in (1, 2):
        mask = resting(one, PARAMETERS, site="any", round_number=number)
        assert mask is not None
        assert (~mask).sum() == 4
        assert not PARAMETERS.split(mask)["head.weight"].any()  # type: ignore[arg-type]
    assert resting(one, PARAMETERS, site="any", round_number=3) is None


class TestReceivedOnly:
    def test_is_in_no_contribution_and_moves_by_no_total(self) -> None:
        layout = layout_for(job({}), PARAMETERS, Traits())
        assert layout == Layout(OUT * RANK + 4, ("loss", "examples"), PARAMETERS.size, 0, RANK * INTO)
        total = Total(layout)
        total.add(np.ones(layout.size, np.float32))
        assert total.update.tolist() == [1.0] * layout.parameters + [0.0] * layout.received_only
        state = FedAvg().step(ServerState(model(4)), total)
        assert PARAMETERS.split(state.model)[FIRST].tolist() == PARAMETERS.split(model(4))[FIRST].tolist()

    def test_is_told_by_the_model_file_and_by_the_digest(self, tmp_path: object) -> None:
        from pathlib import Path

        path = Path(str(tmp_path)) / "model.safetensors"
        PARAMETERS.save(model(1), path, {})
        loaded, vector = Parameters.load(path)
        assert loaded == PARAMETERS
        assert vector.tolist() == model(1).tolist()
        assert Parameters(PARAMETERS.shapes).digest != PARAMETERS.digest

    def test_is_refused_with_strategies_that_send_more_than_one_model(self) -> None:
        with pytest.raises(JobError, match="tuning with strategy"):
            layout_for(job({}, "scaffold"), PARAMETERS, Traits(sent=2, received=2))

    def test_has_to_come_last(self) -> None:
        with pytest.raises(ValueError, match="comes last"):
            Parameters({FIRST: (RANK, INTO), SECOND: (OUT, RANK)}, (FIRST,))

"""Robust reductions: what a mean is when nobody lies, and what a few liars cannot do to them."""

import math
import tracemalloc
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.catalogue import strategy_for
from strategies.job_privacy import Robust
from strategies.protocol import ServerState
from strategies.robust import (
    REDUCTIONS,
    Bounded,
    Gathered,
    check_robust,
    fewest,
    gather,
    liars,
    most_borne,
    reduced,
    why_too_few,
)
from strategies.total import Layout, Total
from tests.strategies.jobs import make_job

LAYOUT = Layout(6, ("loss",))
ROBUST = [name for name in REDUCTIONS if name != "sum"]
Rows = NDArray[np.float64]


def contributions(means: Rows, weights: Rows | None = None) -> list[NDArray[np.float32]]:
    """Updates with these means and weights, each with a loss of 1."""
    own = np.ones(len(means)) if weights is None else weights
    return [np.array([*(mean * weight), weight, 1.0], np.float32) for mean, weight in zip(means, own, strict=True)]


def reduce_to_mean(robust: Robust, means: Rows, *, byzantine: int = 0, weights: Rows | None = None) -> Rows:
    layout = Layout(means.shape[1], ("loss",))
    got = reduced(robust, layout, contributions(means, weights), byzantine=byzantine)
    mean: Rows = got[: layout.parameters] / got[layout.parameters]
    return mean


def draw(seed: int, count: int, size: int = 6) -> Rows:
    return np.random.default_rng(seed).normal(size=(count, size))


def by(name: str, **more: Any) -> Robust:
    return Robust.model_validate({"reduce": name, **more})


seeds = st.integers(0, 10**6)
borne = st.integers(1, 3)
named = st.sampled_from(ROBUST)


class TestEveryReduction:
    @given(seed=seeds, name=named, byzantine=borne, more=st.integers(0, 4))
    def test_does_not_depend_on_the_order(self, seed: int, name: str, byzantine: int, more: int) -> None:
        means = draw(seed, fewest(name, byzantine) + more)
        order = np.random.default_rng(seed + 1).permutation(len(means))
        robust = by(name)
        one, other = (reduce_to_mean(robust, rows, byzantine=byzantine) for rows in (means, means[order]))
        np.testing.assert_allclose(one, other, atol=1e-6)

    @given(seed=seeds, name=named, byzantine=borne, shift=st.floats(-100, 100))
    def test_moves_along_when_all_updates_move(self, seed: int, name: str, byzantine: int, shift: float) -> None:
        means, robust = draw(seed, fewest(name, byzantine) + 2), by(name)
        moved = reduce_to_mean(robust, means + shift, byzantine=byzantine)
        np.testing.assert_allclose(moved, reduce_to_mean(robust, means, byzantine=byzantine) + shift, atol=1e-3)

    @given(value=st.floats(-(2**20), 2**20, width=32), name=st.sampled_from(list(REDUCTIONS)), count=st.integers(5, 12))
    def test_is_what_all_agree_on(self, value: float, name: str, count: int) -> None:
        got = reduce_to_mean(by(name), np.full((count, 6), value), byzantine=1)
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-30)

    @settings(max_examples=300)
    @given(
        seed=seeds,
        name=named,
        byzantine=borne,
        lie=st.sampled_from([1e-3, 1.0, 3.0, 1e3, 1e30]),
        kind=st.sampled_from(["one point", "spread", "far and weightless"]),
    )
    def test_is_bounded_by_the_honest_whatever_the_liars_send(
        self, seed: int, name: str, byzantine: int, lie: float, kind: str
    ) -> None:
        count = fewest(name, byzantine) + seed % 3
        honest = draw(seed, count - byzantine)
        lies = lie * (draw(seed + 1, 1) if kind == "one point" else draw(seed + 1, byzantine))
        means = np.concatenate([np.broadcast_to(lies, (byzantine, 6)), honest])
        weights = np.ones(count)
        weights[:byzantine] = 1e-30 if kind == "far and weightless" else 1e6
        got = reduce_to_mean(by(name), means, byzantine=byzantine, weights=weights)
        if name in ("median", "trimmed-mean"):
            assert (got >= honest.min(axis=0) - 1e-5).all()
            assert (got <= honest.max(axis=0) + 1e-5).all()
            return
        apart = max(float(np.linalg.norm(one - other)) for one in honest for other in honest)
        if name == "geometric-median":
            bound = apart * (1 + 2 * (count - byzantine) / (count - 2 * byzantine))
        else:
            bound = apart * (1 + math.sqrt((count - byzantine - 2) / (count - 2 * byzantine - 1)))
        assert max(np.linalg.norm(got - one) for one in honest) <= bound + 1e-4

    @given(lie=st.floats(1e-9, 1e9), name=named)
    def test_a_weight_that_lies_counts_as_any_other(self, lie: float, name: str) -> None:
        means, weights = draw(1, 7), np.full(7, 10.0)
        honest = reduced(by(name), LAYOUT, contributions(means, weights), byzantine=1)
        weights[3] = np.float32(lie)
        got = reduced(by(name), LAYOUT, contributions(means, weights), byzantine=1)
        np.testing.assert_allclose(got, honest, rtol=1e-4, atol=1e-4)
        assert got[6] == 70
        assert got[7] == 7

    @given(seed=seeds, name=named)
    def test_how_far_away_a_liar_is_does_not_matter(self, seed: int, name: str) -> None:
        near, far = draw(seed, 9), draw(seed, 9)
        near[4], far[4] = 1e3, 1e25
        one, other = (reduce_to_mean(by(name), means, byzantine=1) for means in (near, far))
        np.testing.assert_allclose(one, other, atol=2e-2 if name == "geometric-median" else 1e-6)

    @pytest.mark.parametrize("name", ROBUST)
    def test_sums_of_groups_keep_the_digits_that_one_update_does_not_have(self, name: str) -> None:
        sums = [np.array([*np.full(6, 1 + 1e-12), 1.0, 1.0]) for _ in range(5)]
        got = reduced(by(name), LAYOUT, sums, byzantine=1)
        np.testing.assert_allclose(got[:6] / 5 - 1, 1e-12, rtol=1e-3)

    @pytest.mark.parametrize("name", ROBUST)
    def test_blocks_do_not_show(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        means, robust = draw(3, 9, size=100), by(name)
        whole = reduce_to_mean(robust, means, byzantine=2)
        monkeypatch.setattr("strategies.robust.BLOCK", 9 * 7)
        np.testing.assert_allclose(reduce_to_mean(robust, means, byzantine=2), whole, rtol=1e-6, atol=1e-9)

    def test_every_one_that_a_job_may_name_is_there(self) -> None:
        assert set(get_args(Robust.model_fields["reduce"].annotation)) == set(REDUCTIONS)


class TestByHand:
    def test_a_plain_sum_adds_up(self) -> None:
        got = reduced(
            Robust(), LAYOUT, contributions(np.array([[1.0] * 6, [4.0] * 6]), np.array([1.0, 2.0])), byzantine=0
        )
        assert got.tolist() == [9.0] * 6 + [3.0, 2.0]

    @pytest.mark.parametrize(
        ("name", "means", "byzantine", "expected"),
        [
            ("median", [1, 2, 900], 1, 2),
            ("median", [1, 2, 4, 900], 1, 3),
            ("trimmed-mean", [-900, 1, 2, 6, 900], 1, 3),
            ("trimmed-mean", [-900, 1, 2, 6, 900], 2, 2),
            # Squared distances to the two nearest: 0 -> 1 + 9, 1 -> 1 + 4, 3 -> 1 + 4, 4 -> 1 + 9.
            ("krum", [0, 1, 3, 4, 900], 1, 1),
            ("multi-krum", [0, 1, 3, 4, 900], 1, 2),
            ("geometric-median", [1, 2, 900], 1, 2),
        ],
    )
    def test_one_number_each(self, name: str, means: list[float], byzantine: int, expected: float) -> None:
        rows = np.array(means, float)[:, None]
        got = reduce_to_mean(by(name), rows, byzantine=byzantine)
        np.testing.assert_allclose(got, expected, atol=1e-3)

    def test_the_geometric_median_of_a_triangle_is_its_fermat_point(self) -> None:
        # Equilateral, so its centre; and one corner of 120 degrees or more is the point itself.
        triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
        got = reduce_to_mean(Robust(reduce="geometric-median"), triangle)
        np.testing.assert_allclose(got, triangle.mean(axis=0), atol=1e-5)
        blunt = np.array([[0.0, 0.0], [3.0, 0.1], [-3.0, 0.1]])
        np.testing.assert_allclose(reduce_to_mean(Robust(reduce="geometric-median"), blunt), 0, atol=1e-2)


class TestFlower:
    """The same replies to Flower's own functions: the same result, whatever the numbers of examples."""

    @given(seed=seeds, count=st.integers(7, 15), byzantine=st.integers(1, 2))
    def test_agrees_to_a_millionth(self, seed: int, count: int, byzantine: int) -> None:
        means = draw(seed, count, size=12).astype(np.float32).astype(float)
        examples = np.random.default_rng(seed).integers(1, 50, count)
        replies = [([row[:8].reshape(2, 4), row[8:]], int(n)) for row, n in zip(means, examples, strict=True)]
        alike = [(arrays, 1) for arrays, _ in replies]
        kept = count - byzantine - 2
        theirs: Mapping[str, list[Any]] = {
            "median": aggregate_median(replies),
            "trimmed-mean": aggregate_trimmed_avg(replies, byzantine / count + 1e-9),
            "krum": aggregate_krum(replies, byzantine, 0),
            "multi-krum": aggregate_krum(alike, byzantine, kept),
        }
        for name, arrays in theirs.items():
            got = reduce_to_mean(by(name), means, byzantine=byzantine)
            np.testing.assert_allclose(got, np.concatenate([array.ravel() for array in arrays]), atol=1e-6)


class TestNormBounding:
    @given(seed=seeds, name=st.sampled_from(list(REDUCTIONS)), lie=st.sampled_from([1.0, 1e3, 1e30]))
    def test_the_result_is_no_longer_than_the_bound(self, seed: int, name: str, lie: float) -> None:
        means = draw(seed, 7)
        means[0] *= lie
        got = reduce_to_mean(by(name, max_norm=0.5), means, byzantine=1)
        # Each number of a median may be another site's: it is bounded number by number.
        assert np.linalg.norm(got) <= 0.5 * (math.sqrt(6) if name in ("median", "trimmed-mean") else 1) + 1e-6

    def test_what_is_shorter_is_left_alone(self) -> None:
        means = draw(2, 5)
        got = reduce_to_mean(Robust(max_norm=1e3), means)
        np.testing.assert_allclose(got, means.mean(axis=0), rtol=1e-5)

    def test_the_median_norm_of_the_round_bounds_the_others(self) -> None:
        means = np.diag([1.0, 2.0, 3.0, 4.0, 5.0])
        got = reduce_to_mean(Robust(max_norm="median"), means)
        np.testing.assert_allclose(got, np.array([1, 2, 3, 3, 3]) / 5, rtol=1e-6)

    def test_of_an_even_number_the_lower_norm_in_the_middle_counts(self) -> None:
        got = reduce_to_mean(Robust(max_norm="median"), np.diag([1.0, 1e30]))
        np.testing.assert_allclose(got, [0.5, 0.5], rtol=1e-6)

    def test_where_the_median_norm_is_zero_nobody_moves_anything(self) -> None:
        assert not reduce_to_mean(Robust(max_norm="median"), np.array([[0.0], [0.0], [9.0]])).any()

    def test_a_weight_counts_for_no_more_than_another(self) -> None:
        got = reduce_to_mean(Robust(max_norm=1.0), np.array([[5.0], [-5.0], [-5.0]]), weights=np.array([1e9, 1.0, 1.0]))
        np.testing.assert_allclose(got, -1 / 3, rtol=1e-6)


class TestTotals:
    @given(seed=seeds, count=st.integers(1, 9), bound=st.floats(0.1, 10))
    def test_a_running_bound_comes_to_what_all_at_once_come_to(self, seed: int, count: int, bound: float) -> None:
        robust, sent = Robust(max_norm=bound), contributions(draw(seed, count), np.arange(1.0, count + 1))
        running = gather(robust, LAYOUT, count)
        assert isinstance(running, Bounded)
        for each in sent:
            running.add(each)
        np.testing.assert_allclose(running.reduced(1), reduced(robust, LAYOUT, sent, byzantine=1), rtol=1e-9)

    @pytest.mark.parametrize("robust", [Robust(reduce="median"), Robust(max_norm="median")])
    def test_what_needs_all_at_once_keeps_copies(self, robust: Robust) -> None:
        sent = contributions(draw(4, 5))
        total, buffer = gather(robust, LAYOUT, 7), np.empty(8, np.float32)
        assert isinstance(total, Gathered)
        for each in sent:
            buffer[:] = each
            total.add(buffer)
        np.testing.assert_allclose(total.reduced(1), reduced(robust, LAYOUT, sent, byzantine=1))

    def test_nobody_bounded_is_nothing(self) -> None:
        assert not gather(Robust(max_norm=1.0), LAYOUT, 5).reduced(1).any()

    def test_a_running_bound_takes_the_memory_of_a_model_or_two(self) -> None:
        size = 200_000
        update = np.ones(size + 1, np.float32)
        tracemalloc.start()
        try:
            total = gather(Robust(max_norm=1.0), Layout(size), 1000)
            for _ in range(50):
                total.add(update)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 * 8 * size

    def test_a_servers_half_moves_by_what_is_handed_on(self) -> None:
        strategy = strategy_for(make_job(strategy={"name": "fedadam"}, robust={"reduce": "median"}))
        state: ServerState = strategy.start(np.zeros(6, np.float32), sites=3)
        ours, mean = Total(Layout(6)), Total(Layout(6))
        rows = np.array([[1.0] * 6, [1.0] * 6, [-900.0] * 6])
        ours.add_sum(reduced(Robust(reduce="median"), LAYOUT, contributions(rows), byzantine=1)[:7])
        mean.add_sum(np.array([1.0] * 6 + [1.0]))
        np.testing.assert_array_equal(strategy.step(state, ours).model, strategy.step(state, mean).model)


class TestHowMany:
    @pytest.mark.parametrize(
        ("name", "byzantine", "needed"),
        [("median", 1, 3), ("median", 4, 9), ("trimmed-mean", 2, 5), ("geometric-median", 2, 5), ("krum", 1, 5),
         ("multi-krum", 3, 9), ("sum", 3, 1)],
    )  # fmt: skip
    def test_are_needed(self, name: str, byzantine: int, needed: int) -> None:
        assert fewest(name, byzantine) == needed
        assert most_borne(name, needed) == (byzantine if name != "sum" else 0)

    @pytest.mark.parametrize(("asked", "may_lie"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
    def test_may_lie_by_default_is_a_fifth_rounded_up(self, asked: int, may_lie: int) -> None:
        assert liars(Robust(reduce="median"), asked) == may_lie
        assert liars(Robust(reduce="median", byzantine=7), asked) == 7

    @pytest.mark.parametrize(
        ("name", "byzantine", "count", "said"),
        [
            ("krum", None, 4, 'bears 1 that lie of 5 sites or more, not of 4: take reduce = "median"'),
            ("krum", 3, 8, "bears 3 that lie of 9 sites or more, not of 8: set robust.byzantine = 2"),
            ("median", None, 2, "bears 1 that lie of 3 sites or more, not of 2: leave [robust] out"),
            ("trimmed-mean", 5, 10, "not of 10: set robust.byzantine = 4"),
        ],
    )
    def test_too_few_are_told_what_would_do(self, name: Any, byzantine: int | None, count: int, said: str) -> None:
        why = why_too_few(Robust(reduce=name, byzantine=byzantine), count, "sites")
        assert why is not None
        assert said in why

    @given(name=named, count=st.integers(3, 60))
    def test_what_is_named_instead_works(self, name: Any, count: int) -> None:
        if most := most_borne(name, count):
            assert why_too_few(Robust(reduce=name, byzantine=most), count, "sites") is None
        assert why_too_few(Robust(reduce="median"), count, "sites") is None

    def test_a_federation_too_small_is_refused_at_the_start(self) -> None:
        job = make_job(robust={"reduce": "krum"})
        check_robust(job, sites=5, layout=LAYOUT)
        with pytest.raises(JobError, match="not of 4"):
            check_robust(job, sites=4, layout=LAYOUT)

    def test_more_updates_than_may_be_kept_are_refused_with_their_size(self) -> None:
        job, wide = make_job(robust={"reduce": "median", "memory_mib": 100}), Layout(2**20 - 1)
        check_robust(job, sites=25, layout=wide)
        with pytest.raises(JobError, match=r"26 updates of 1,048,576 numbers take 104 MiB .* cohort\.size") as caught:
            check_robust(job, sites=26, layout=wide)
        assert "\n" not in str(caught.value)
        check_robust(make_job(robust={"max_norm": 1.0, "memory_mib": 1}), sites=10**6, layout=wide)
        check_robust(
            make_job(robust={"reduce": "median", "memory_mib": 100}, cohort={"size": 25}), sites=99, layout=wide
        )


PRIVATE = {"delta": 1e-5, "epsilon": 1.0}
EQUAL = {"weighting": "equal"}


class TestJobs:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"robust": {"reduce": "mean"}}, "did you mean 'median'?"),
            ({"robust": {"byzantine": 2}}, "byzantine is for a reduce that bears lies"),
            ({"robust": {"reduce": "median", "byzantine": 0}}, "robust.byzantine: should be greater than 0"),
            ({"robust": {"max_norm": 0}}, 'robust.max_norm: should be a number greater than 0, or "median", got 0'),
            ({"robust": {"max_norm": "mean"}}, "got 'mean'"),
            ({"robust": {"max_norm": True}}, "got True"),
            ({"robust": {"max_norm": math.inf}}, "got inf"),
            ({"robust": {"reduce": "krum"}, "cohort": {"size": 4}}, "of 5 sites or more, not of 4"),
            (
                {"robust": {"reduce": "krum"}, "secure_aggregation": {"groups": 4}},
                'of 5 groups or more, not of 4: take reduce = "median"',
            ),
            ({"robust": {"reduce": "median"}, "secure_aggregation": {}}, "set secure_aggregation.groups = 5"),
            ({"robust": {"max_norm": 1.0}, "secure_aggregation": {}}, "robust.max_norm with secure_aggregation"),
            ({"secure_aggregation": {"groups": 3}}, 'set robust.reduce = "median", or leave groups out'),
            (
                {"robust": {"reduce": "median"}, "privacy": {"client": PRIVATE}, "strategy": EQUAL},
                'set privacy.client.placement = "local"',
            ),
            (
                {"robust": {"max_norm": 1.0}, "privacy": {"client": PRIVATE}, "strategy": EQUAL},
                "clip_norm bounds each update already; leave robust.max_norm out",
            ),
            ({"robust": {"reduce": "median"}, "strategy": {"name": "fednova"}}, 'strategy.name = "fednova"'),
            ({"robust": {"max_norm": 2.0}, "strategy": {"name": "q-ffl", **EQUAL}}, 'strategy.name = "q-ffl"'),
            (
                {"robust": {"max_norm": 1.0}, "strategy": {"name": "feddyn", "weighting": "equal"}},
                "what its sites remember has to match what the server added up",
            ),
            (
                {"robust": {"reduce": "median"}, "strategy": {"name": "scaffold"}},
                'take "fedavg", "fedadam" or "fedprox"',
            ),
            (
                {
                    "data": {"target_type": "number", "target_range": [0, 1]},
                    "task": {"name": "tabular-regression"},
                    "simulation": {"faults": {"byzantine": 0.2, "attack": "label-flip"}},
                },
                "is for classes",
            ),
            (
                {
                    "robust": {"reduce": "median"},
                    "cohort": {"size": 9, "over": 0.5},
                    "simulation": {"devices": {"phone": {"share": 1.0}}},
                },
                "liars may be the quickest; leave cohort.over out",
            ),
            ({"simulation": {"faults": {"byzantine": 1.0}}}, "simulation.faults.byzantine"),
            ({"simulation": {"faults": {"attack": "sign"}}}, "did you mean 'sign-flip'?"),
        ],
    )
    def test_what_cannot_work_is_refused_with_what_does(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(JobError) as caught:
            make_job(**changes)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "changes",
        [
            {"privacy": {"record": PRIVATE}},
            {"privacy": {"client": {**PRIVATE, "placement": "local"}}, "strategy": EQUAL},
            {"strategy": {"name": "fedadam"}},
            {"cohort": {"size": 5}},
            {"secure_aggregation": {"groups": 5}},
            {
                "secure_aggregation": {"groups": 5},
                "privacy": {"client": {**PRIVATE, "placement": "distributed"}},
                "strategy": EQUAL,
            },
        ],
    )
    @pytest.mark.parametrize(
        "robust", [{"reduce": "multi-krum"}, {"max_norm": 2}, {"reduce": "median", "max_norm": "median"}]
    )
    def test_what_works_together_is_taken(self, changes: dict[str, Any], robust: dict[str, Any]) -> None:
        job = make_job(**changes, robust=robust)
        assert not job.robust.plain
        assert make_job().robust.plain

    def test_sites_are_sent_the_reduction_and_not_the_lies(self) -> None:
        job = make_job(robust={"reduce": "median"}, simulation={"faults": {"byzantine": 0.2}})
        assert job.portable.robust == job.robust
        assert job.portable.simulation.faults.byzantine == 0

"""A total is the sum of what was added, in whatever order and by way of whatever regions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.parameters import Vector
from strategies.total import Layout, Total, training_loss

LAYOUT = Layout(3, ("loss", "examples"))
INTEGERS = st.lists(st.integers(-(2**18), 2**18), min_size=LAYOUT.size, max_size=LAYOUT.size)
FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=LAYOUT.size, max_size=LAYOUT.size)


def add_all(contributions: list[Vector]) -> Total:
    total = Total(LAYOUT)
    for contribution in contributions:
        total.add(contribution)
    return total


def whole(total: Total) -> Vector:
    """A total as the contribution of a region. Small integers pass through float32 unchanged."""
    return np.array([*total.update, total.weight, *total.metrics.values()], np.float32)


@pytest.mark.parametrize(("examples", "loss"), [(4.0, 1.5), (0.0, None), (-3.0, None)])
def test_a_training_loss_is_none_where_what_sites_claim_is_nothing_to_divide_by(
    examples: float, loss: float | None
) -> None:
    assert training_loss({"loss": 6.0, "examples": examples}) == loss
    assert training_loss({"examples": examples}) is None


def test_a_contribution_is_the_update_then_the_weight_then_the_metric_sums() -> None:
    assert LAYOUT.size == 6
    assert Layout(3).size == 4
    total = add_all([np.array([1, 2, 3, 10, 0.5, 40], np.float32), np.array([1, 1, 1, 5, 0.25, 20], np.float32)])
    assert total.update.tolist() == [2, 3, 4]
    assert total.weight == 15
    assert total.metrics == {"loss": 0.75, "examples": 60}


def test_an_empty_total_is_zero() -> None:
    total = Total(LAYOUT)
    assert total.update.tolist() == [0, 0, 0]
    assert total.weight == 0
    assert total.metrics == {"loss": 0, "examples": 0}
    assert Total(Layout(3)).metrics == {}


@settings(max_examples=40)
@given(rows=st.lists(INTEGERS, max_size=12), data=st.data())
def test_sums_of_regional_sums_are_the_sum_in_any_order_and_grouping(
    rows: list[list[int]], data: st.DataObject
) -> None:
    contributions = [np.array(row, np.float32) for row in rows]
    shuffled = data.draw(st.permutations(contributions))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    regions = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    by_region = add_all([whole(add_all(region)) for region in regions])
    np.testing.assert_array_equal(whole(by_region), whole(add_all(contributions)))
    np.testing.assert_array_equal(whole(by_region), np.array([[0] * LAYOUT.size, *rows]).sum(axis=0))


@settings(max_examples=40)
@given(rows=st.lists(FLOATS, min_size=1, max_size=12), data=st.data())
def test_the_order_moves_a_total_by_less_than_float64_can_hold(rows: list[list[float]], data: st.DataObject) -> None:
    contributions = [np.array(row, np.float32) for row in rows]
    first, second = add_all(contributions), add_all(data.draw(st.permutations(contributions)))
    bound = np.finfo(np.float64).eps * len(rows) * np.abs(np.array(rows)).sum(axis=0)
    assert np.all(np.abs(first.update - second.update) <= bound[:3])
    assert abs(first.weight - second.weight) <= bound[3]


def test_small_contributions_are_not_lost_beside_a_large_one() -> None:
    large, small = np.full(LAYOUT.size, 2.0**24, np.float32), np.ones(LAYOUT.size, np.float32)
    assert np.float32(2.0**24) + np.float32(1) == 2.0**24  # float32 would lose every one of them.
    assert add_all([large, *[small] * 1000]).weight == 2**24 + 1000


def test_the_memory_of_a_contribution_may_be_reused() -> None:
    buffer, total = np.ones(LAYOUT.size, np.float32), Total(LAYOUT)
    for value in (1, 2, 3):
        buffer[:] = value
        total.add(buffer)
    buffer[:] = 99
    assert total.update.tolist() == [6, 6, 6]
    assert buffer.tolist() == [99] * LAYOUT.size


@pytest.mark.parametrize("size", [0, LAYOUT.size - 1, LAYOUT.size + 1])
def test_a_contribution_of_another_length_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        Total(LAYOUT).add(np.zeros(size, np.float32))

"""Figures over all rows at once equal their definitions, counted pair by pair or as scikit-learn has them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, r2_score, roc_auc_score, root_mean_squared_error

from client import scores

# Few distinct values, so that ties are common.
VALUES = st.integers(-3, 3).map(float)
ROWS = st.lists(st.tuples(VALUES, st.booleans()), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_auc_is_scikit_learns_with_ties_and_undefined_for_one_class(rows: list[tuple[float, bool]]) -> None:
    said, positive = [score for score, _ in rows], [is_positive for _, is_positive in rows]
    auc = scores.roc_auc(said, positive)
    if len(set(positive)) == 1:
        assert math.isnan(auc)
    else:
        assert auc == pytest.approx(roc_auc_score(positive, said))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_f1_is_scikit_learns_and_undefined_where_nothing_is_positive(rows: list[tuple[bool, bool]]) -> None:
    said, positive = [a for a, _ in rows], [b for _, b in rows]
    if not any(said) and not any(positive):
        assert math.isnan(scores.f1(said, positive))
    else:
        assert scores.f1(said, positive) == pytest.approx(f1_score(positive, said, zero_division=0.0))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=30))
def test_errors_are_as_defined(rows: list[tuple[float, float]]) -> None:
    said, wanted = np.array(rows).T
    assert scores.rmse(said, wanted) == pytest.approx(root_mean_squared_error(wanted, said))
    if len(set(wanted)) > 1:
        assert scores.r2(said, wanted) == pytest.approx(r2_score(wanted, said))
    else:
        assert math.isnan(scores.r2(said, wanted))
    if wanted.any():
        assert scores.wape(said, wanted) == pytest.approx(sum(abs(a - b) for a, b in rows) / np.abs(wanted).sum())
    else:
        assert math.isnan(scores.wape(said, wanted))


def concordance_by_hand(risk: list[float], time: list[float], event: list[bool]) -> float:
    """Harrell's index from its definition, a pair at a time."""
    right, pairs = 0.0, 0
    for i in range(len(risk)):
        for j in range(len(risk)):
            first = event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))
            if i == j or not first:
                continue
            pairs += 1
            right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return right / pairs if pairs else math.nan


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, st.integers(0, 4).map(float), st.booleans()), min_size=1, max_size=25),
    at_once=st.sampled_from([1, 7, 2**22]),
)
def test_the_c_index_counts_every_pair(rows: list[tuple[float, float, bool]], at_once: int) -> None:
    risk, time, event = (list(column) for column in zip(*rows, strict=True))
    expected = concordance_by_hand(risk, time, event)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_PAIRS_AT_ONCE", at_once)
        found = scores.c_index(risk, time, event)
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("risk", "index"),
    [([4, 3, 2, 1], 1.0), ([1, 2, 3, 4], 0.0), ([1, 1, 1, 1], 0.5)],
)
def test_a_c_index_is_one_for_the_right_order_and_a_half_for_none(risk: list[float], index: float) -> None:
    assert scores.c_index(risk, [1, 2, 3, 4], [1, 1, 0, 1]) == index


@pytest.mark.parametrize(("time", "event"), [([1, 2], [0, 0]), ([], []), ([3], [1])])
def test_a_c_index_without_a_pair_is_undefined(time: list[float], event: list[int]) -> None:
    assert math.isnan(scores.c_index(time, time, event))


def test_figures_of_no_rows_are_undefined() -> None:
    for figure in (scores.rmse, scores.r2, scores.wape, scores.roc_auc, scores.f1):
        assert math.isnan(figure([], []))

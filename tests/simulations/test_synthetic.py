"""The synthetic sets are the same everywhere, and what a model that knew the formula scores is what their pages say."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from client import scores
from simulations.scenarios import scenario_path
from simulations.synthetic import (
    BRANCHES,
    SETS,
    Synthetic,
    banks,
    hospitals_survival,
    retailers_forecast,
    retailers_recommend,
)
from strategies.job import load_job


@pytest.mark.parametrize("name", SETS)
class TestEverySet:
    def test_is_drawn_alike_each_time_and_has_a_truth_for_each_row(self, name: str) -> None:
        first, second = SETS[name](), SETS[name]()
        pd.testing.assert_frame_equal(first.table, second.table)
        np.testing.assert_array_equal(first.best, second.best)
        assert first.best.shape == (len(first.table),)
        assert np.isfinite(first.best).all()
        assert not first.table.isna().any().any()

    def test_has_a_scenario_of_its_name_whose_columns_it_has(self, name: str) -> None:
        data, table = load_job(scenario_path(name)).data, SETS[name]().table
        assert data.bundled == name
        columns = {part for name, column in data.columns.items() for part in column.join or [name]}
        assert {data.client, data.target, *columns} <= set(table.columns)
        assert set(table.columns) - columns - {data.client, data.target} <= {
            data.event,
            data.forecast.time if data.forecast else None,
            data.held_out.column if data.held_out else None,
        }


def best_of_banks(found: Synthetic) -> float:
    return scores.roc_auc(found.best, found.table["default"])


def best_of_survival(found: Synthetic) -> float:
    return scores.c_index(found.best, found.table["months"], found.table["died"])


def best_of_forecast(found: Synthetic) -> float:
    last = found.table.groupby("shop").tail(12).index
    return scores.wape(found.best[last], found.table["sales"].iloc[last])


def best_of_recommend(found: Synthetic) -> float:
    return scores.rmse(found.best, found.table["rating"])


@pytest.mark.parametrize(
    ("make", "score", "stated"),
    [
        (banks, best_of_banks, 0.804),
        (hospitals_survival, best_of_survival, 0.707),
        (retailers_forecast, best_of_forecast, 0.041),
        (retailers_recommend, best_of_recommend, 0.38),
    ],
)
def test_the_truth_scores_what_the_pages_state(
    make: Callable[[], Synthetic], score: Callable[[Synthetic], float], stated: float
) -> None:
    assert score(make()) == pytest.approx(stated, rel=0.01)


def test_loans_default_as_often_as_their_probability_says() -> None:
    found = banks()
    assert found.table["default"].mean() == pytest.approx(found.best.mean(), abs=0.01)
    assert found.table.groupby("branch").size().to_dict() == {name: rows for name, (rows, *_) in BRANCHES.items()}
    shares = found.table.groupby("branch")["default"].mean()
    assert shares.max() > 3 * shares.min()  # The customers differ, not the rule.


def test_deaths_have_the_stated_hazard() -> None:
    found = hospitals_survival()
    months, died = found.table["months"].to_numpy(), found.table["died"].to_numpy()
    # The cumulative hazard at the end of each life has mean one where it is exponential: as many deaths as hazard.
    hazard = (0.012 * months) ** 1.3 * np.exp(found.best)
    assert died.sum() == pytest.approx(hazard.sum(), abs=4 * np.sqrt(died.sum()))


def test_the_forecasts_errors_are_noise() -> None:
    found = retailers_forecast()
    errors = np.log(found.table["sales"]) - np.log(found.best)
    assert errors.std() == pytest.approx(np.hypot(0.04, 0.03), rel=0.05)
    assert abs(errors.mean()) < 0.005


def test_each_customer_rates_an_article_once() -> None:
    table = retailers_recommend().table
    assert not table.duplicated(["customer", "article"]).any()
    assert table["article"].between(1, 80).all()
    assert table["rating"].between(1, 5).all()

"""A model is scored on every row once, whether site by site or on all rows together."""

from dataclasses import dataclass

import numpy as np
import pytest

from client.data import Records, SiteData
from client.tasks import TabularClassification
from client.training import Trainer
from simulations.evaluation import Evaluation, _worst
from strategies.job_task import TaskChoice
from strategies.parameters import Vector
from tests.strategies.jobs import make_job

NOTHING = Records(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Scored:
    evaluation: Evaluation
    trainer: Trainer


def scored(**tests: list[tuple[float, int]]) -> Scored:
    """Logistic regression on one feature; each site's test rows are (feature, target)."""
    data = {
        name: SiteData(
            NOTHING,
            Records(np.array([x for x, _ in rows], np.float32)[:, None], np.array([y for _, y in rows], np.int64)),
        )
        for name, rows in tests.items()
    }
    task = TabularClassification(TaskChoice())
    trainer = Trainer(task, task.model(1, 2), make_job().training)
    return Scored(Evaluation(trainer, data), trainer)


# Predicts class 1 where x > 0.
MODEL: Vector = np.array([1.0, 0.0], np.float32)


def test_means_are_over_rows_not_over_sites() -> None:
    # North has one right of four, south its only one: two of five, not the mean of 1/4 and 1.
    scores = scored(north=[(1, 1), (1, 0), (-1, 1), (2, 0)], south=[(-3, 0)]).evaluation(MODEL)
    assert scores["accuracy"] == pytest.approx(2 / 5)
    assert scores["sites"]["north"]["accuracy"] == pytest.approx(1 / 4)
    assert scores["sites"]["south"]["accuracy"] == 1
    assert (scores["sites"]["north"]["rows"], scores["sites"]["south"]["rows"]) == (4, 1)
    losses = [np.log1p(np.exp(-1)), np.log1p(np.exp(1)), np.log1p(np.exp(1)), np.log1p(np.exp(2)), np.log1p(np.exp(-3))]
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["sites"]["north"]["loss"] == pytest.approx(np.mean(losses[:4]), rel=1e-6)
    assert scores["sites"]["south"]["loss"] == pytest.approx(losses[4], rel=1e-6)


@pytest.mark.parametrize(
    ("tests", "worst"),
    [
        ({"a": [(1, 1)], "b": [(1, 0)], "c": [(1, 1), (1, 0)]}, "b"),
        # Of equally bad sites the larger one.
        ({"a": [(1, 0)], "b": [(1, 0), (1, 0)], "c": [(1, 1)]}, "b"),
        ({"a": [(1, 1)]}, "a"),
    ],
)
def test_names_the_worst_site(tests: dict[str, list[tuple[float, int]]], worst: str) -> None:
    assert scored(**tests).evaluation(MODEL)["worst_site"] == worst


def test_a_site_that_does_not_define_the_headline_is_not_the_worst() -> None:
    figures = {"a": (0.3, 0.1), "b": (None, 9.0), "c": (0.9, 0.1)}
    assert _worst({name: {"c_index": c, "loss": loss, "rows": 2} for name, (c, loss) in figures.items()}) == "a"


def test_one_site_alone_scores_as_it_does_among_all() -> None:
    setting = scored(north=[(1, 1), (1, 0), (-1, 1)], south=[(-3, 0), (2, 1)], west=[(0.5, 0)])
    whole = setting.evaluation(MODEL)
    for site in ("north", "south", "west"):
        alone = setting.evaluation.one_site(MODEL, site)
        assert alone == pytest.approx({name: whole["sites"][site][name] for name in alone})


def test_the_area_under_the_curve_is_of_all_rows_at_once_and_undefined_for_one_class() -> None:
    setting = scored(north=[(1, 1), (2, 0), (-1, 0)], south=[(3, 1)])
    scores = setting.evaluation(MODEL)
    # Of four pairs of a positive and a negative row, all but (1, 2) are in order.
    assert scores["auc"] == pytest.approx(3 / 4)
    assert scores["sites"]["north"]["auc"] == pytest.approx(1 / 2)
    assert scores["sites"]["south"]["auc"] is None
    assert setting.evaluation.one_site(MODEL, "south")["auc"] is None


def test_figures_that_no_row_defines_are_left_out_over_all_rows() -> None:
    scores = scored(north=[(1, 1), (2, 1)]).evaluation(MODEL)
    assert "auc" not in scores
    assert scores["sites"]["north"]["auc"] is None


def test_a_site_without_test_rows_has_no_figures_and_changes_no_others() -> None:
    with_it = scored(empty=[], north=[(1, 1), (1, 0), (-1, 1)]).evaluation(MODEL)
    without = scored(north=[(1, 1), (1, 0), (-1, 1)]).evaluation(MODEL)
    assert with_it["sites"]["empty"] == {"loss": None, "accuracy": None, "rows": 0}
    assert {key: with_it[key] for key in without if key != "sites"} == {
        k: v for k, v in without.items() if k != "sites"
    }
    assert with_it["worst_site"] == "north"


def test_each_sites_own_model_is_scored_with_the_others_on_all_rows() -> None:
    setting = scored(north=[(1, 1), (-1, 0)], south=[(1, 0), (-2, 1), (3, 1)])
    own = setting.evaluation.each({"north": MODEL, "south": -MODEL}.__getitem__)
    assert own["accuracy"] == pytest.approx(4 / 5)
    # Positive rows score 1, 2 and -3, negative ones -1 and -1.
    assert own["auc"] == pytest.approx(4 / 6)
    assert own["sites"]["south"]["accuracy"] == pytest.approx(2 / 3)
    assert own["sites"]["north"]["auc"] == 1


def test_scores_the_model_it_is_given_whatever_the_trainer_held() -> None:
    setting = scored(north=[(1, 1), (1, 0), (-1, 1)])
    before = setting.evaluation(MODEL)
    setting.trainer.load(-MODEL)
    assert setting.evaluation(MODEL) == before
    assert setting.evaluation(-MODEL)["accuracy"] == pytest.approx(1 - before["accuracy"])

"""The synthetic chests hold what they state, and it takes shapes to read them: single pixels say little."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from client.scores import roc_auc
from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, start_run
from simulations.synthetic_images import HOSPITALS, SIDE, chests
from strategies.job import load_job


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return chests()


@pytest.fixture(scope="module")
def images(table: pd.DataFrame) -> NDArray[np.float64]:
    return np.stack(list(table["image"])) / 255


def test_each_hospital_has_the_images_and_the_share_of_pneumonia_that_is_stated(table: pd.DataFrame) -> None:
    found = table.groupby("hospital")["pneumonia"].agg(["size", "sum"])
    assert {name: (row["size"], row["sum"]) for name, row in found.iterrows()} == HOSPITALS
    shares = found["sum"] / found["size"]
    assert shares.max() >= 3 * shares.min()


def test_images_are_bytes_of_one_shape_and_no_two_are_alike(table: pd.DataFrame, images: NDArray[np.float64]) -> None:
    assert {(image.dtype.name, image.shape) for image in table["image"]} == {("uint8", (SIDE, SIDE))}
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert ((images == 0) | (images == 1)).mean() < 0.005  # Little light is lost at the ends of the scale.


def test_a_hospitals_rows_do_not_come_in_order_of_their_class(table: pd.DataFrame) -> None:
    for _, own in table.groupby("hospital"):
        changes = int((own["pneumonia"].diff().abs() == 1).sum())
        share = own["pneumonia"].mean()
        assert changes > share * (1 - share) * len(own)  # Half of what a random order has.


def test_brightness_tells_nothing(table: pd.DataFrame, images: NDArray[np.float64]) -> None:
    sick = table["pneumonia"].to_numpy() == 1
    assert roc_auc(images.mean(axis=(1, 2)), sick) == pytest.approx(0.5, abs=0.04)
    means = images[sick].mean(axis=0) - images[~sick].mean(axis=0)
    assert np.abs(means).max() < 0.03  # Nor does the place.


def test_shapes_tell_what_single_pixels_do_not(table: pd.DataFrame, images: NDArray[np.float64]) -> None:
    sick = table["pneumonia"].to_numpy() == 1
    order = np.random.default_rng(1).permutation(len(images))
    train, test = order[:1500], order[1500:]
    flat = images.reshape(len(images), -1)
    pixels = LogisticRegression(C=0.01, max_iter=200).fit(flat[train], sick[train]).decision_function(flat[test])
    assert roc_auc(pixels, sick[test]) < 0.65
    # The largest answer of one 3 x 3 filter in each image, and where it comes from does not matter: lines are sharp.
    inner = images[:, 1:-1, 1:-1]
    edges = 4 * inner - images[:, :-2, 1:-1] - images[:, 2:, 1:-1] - images[:, 1:-1, :-2] - images[:, 1:-1, 2:]
    assert roc_auc(-np.sort(edges.reshape(len(images), -1))[:, -20:].mean(axis=1), sick) > 0.9


def run(out: Path, *settings: str) -> dict[str, Any]:
    job = load_job(scenario_path("hospitals-image"), settings)
    summary = start_run(job, out=out, parent=out.parent, watcher=Watcher(), now=datetime(2026, 1, 1, tzinfo=UTC))
    assert summary is not None
    return summary


def test_the_hospitals_train_in_secure_sums_within_their_epsilon(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", "training.rounds=2")
    assert 7.9 < summary["epsilon"]["record"] <= 8
    assert set(summary["sites"]) == set(HOSPITALS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(4 * 2081 < line["secure"]["upload_bytes"] < 4 * 2081 + 12_000 for line in lines)


@pytest.mark.slow
def test_the_scenario_reaches_the_figure_of_its_page_and_a_model_of_pixels_does_not(tmp_path: Path) -> None:
    assert run(tmp_path / "shapes")["metrics"]["accuracy"] >= 0.93
    assert run(tmp_path / "pixels", "task.model=logistic-regression")["metrics"]["accuracy"] < 0.7

"""Data sets with a known truth, for scenarios that need no download: each a table, and what the best model would say.

Every set is drawn anew from its own fixed seed, the same on every machine. `best` is the truth behind each row's target
(a probability, a log-hazard, an expected value), so that the best attainable score is known, and not only what some
model reached. The people in them do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simulations.synthetic_images import chests
from simulations.synthetic_texts import WANTED, messages, reviews


@dataclass(frozen=True)
class Synthetic:
    """A table, and for each row what a model that knew the formula would predict."""

    table: pd.DataFrame
    best: NDArray[np.float64]


# Loans, mean age, log of the median income, mean share of the credit line in use.
BRANCHES = {
    "city-centre": (2400, 38, 10.9, 0.45),
    "airport": (1600, 42, 11.2, 0.35),
    "university": (1200, 26, 10.0, 0.60),
    "suburb": (1800, 46, 10.8, 0.40),
    "harbour": (900, 40, 10.3, 0.65),
    "village": (500, 52, 10.2, 0.30),
}


def banks() -> Synthetic:
    """Loans of six branches that differ in size and customers; column `default` is 1 with probability sigmoid(z), where

    z = -2.2 + 2.4 (used - 0.5) + 1.6 (debt - 0.35) - 0.9 (log income - 10.6) - 0.02 (age - 40) + 0.8 late
        + 0.5 [purpose = business] - 0.4 [purpose = car] - 0.3 [owns its home],

    the same at every branch: what differs is who comes.
    """
    rng = np.random.default_rng(20_001)
    parts = []
    for branch, (rows, age, income, used) in BRANCHES.items():
        part = pd.DataFrame({"branch": [branch] * rows})
        part["age"] = np.clip(rng.normal(age, 9, rows), 18, 85).round()
        part["income"] = np.exp(rng.normal(income, 0.45, rows)).round(-2)
        part["debt_ratio"] = rng.beta(3, 5.5, rows).round(3)
        part["used"] = np.clip(rng.normal(used, 0.25, rows), 0, 1).round(3)
        part["late_payments"] = rng.poisson(0.25 + used / 2, rows)
        part["purpose"] = rng.choice(["household", "car", "education", "business"], rows, p=[0.4, 0.3, 0.1, 0.2])
        part["housing"] = rng.choice(["rents", "owns"], rows, p=[0.55, 0.45])
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    z = (
        -2.2
        + 2.4 * (table["used"] - 0.5)
        + 1.6 * (table["debt_ratio"] - 0.35)
        - 0.9 * (np.log(table["income"]) - 10.6)
        - 0.02 * (table["age"] - 40)
        + 0.8 * table["late_payments"]
        + 0.5 * (table["purpose"] == "business")
        - 0.4 * (table["purpose"] == "car")
        - 0.3 * (table["housing"] == "owns")
    ).to_numpy()
    chance = 1 / (1 + np.exp(-z))
    return Synthetic(table.assign(default=(rng.random(len(table)) < chance).astype(int)), chance)


# Patients, mean age, mean log of the marker, share in the late stages.
REGIONS = {
    "north": (420, 66, 0.4, 0.45),
    "east": (300, 61, 0.1, 0.35),
    "south": (360, 58, -0.2, 0.25),
    "west": (240, 63, 0.0, 0.30),
    "islands": (90, 70, 0.5, 0.55),
    "capital": (540, 56, -0.1, 0.20),
}


def hospitals_survival() -> Synthetic:
    """Patients of six regions under proportional hazards: the cumulative hazard after t months is

    (0.012 t)^1.3 exp(0.045 (age - 60) + 0.5 marker + 0.7 [late stage] - 0.5 treated).

    Half are treated, at random; they are seen for 12 to 120 months, evenly. Column `died` is 1 where death was seen.
    """
    rng = np.random.default_rng(20_002)
    parts = []
    for region, (rows, age, marker, late) in REGIONS.items():
        part = pd.DataFrame({"region": [region] * rows})
        part["age"] = np.clip(rng.normal(age, 9, rows), 25, 95).round()
        part["marker"] = rng.normal(marker, 1.0, rows).round(2)
        part["stage"] = np.where(rng.random(rows) < late, "late", "early")
        part["treated"] = rng.integers(0, 2, rows)
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    log_hazard = (
        0.045 * (table["age"] - 60) + 0.5 * table["marker"] + 0.7 * (table["stage"] == "late") - 0.5 * table["treated"]
    ).to_numpy()
    death = (rng.exponential(size=len(table)) / np.exp(log_hazard)) ** (1 / 1.3) / 0.012
    censored = rng.uniform(12, 120, len(table))
    months = np.maximum(np.minimum(death, censored).round(1), 0.1)
    return Synthetic(table.assign(months=months, died=(death <= censored).astype(int)), log_hazard)


def retailers_forecast() -> Synthetic:
    """Weekly sales of 20 shops over 112 weeks: a shop's own size times

    exp(0.25 cos(2 pi (week - peak) / 52.18) + 0.0015 week + 0.18 promotion + 0.12 holiday + AR(1) + noise),

    where the AR(1) has coefficient 0.7 and deviation 0.04 a step, and the noise, which no model foresees, 0.03. The
    best prediction knows all but this week's step and noise.
    """
    rng = np.random.default_rng(20_003)
    weeks = np.arange(112)
    dates = pd.date_range("2020-01-06", periods=len(weeks), freq="7D")
    parts, best = [], []
    for shop in range(20):
        size, peak = np.exp(rng.normal(11, 0.8)), rng.normal(50, 2)
        promotion = (rng.random(len(weeks)) < 0.15).astype(int)
        holiday = np.isin(dates.isocalendar().week, [14, 27, 51]).astype(int)
        steps, drift = rng.normal(0, 0.04, len(weeks)), np.zeros(len(weeks))
        for week in weeks[1:]:
            drift[week] = 0.7 * drift[week - 1] + steps[week]
        season = 0.25 * np.cos(2 * np.pi * (weeks - peak) / 52.18)
        foreseen = season + 0.0015 * weeks + 0.18 * promotion + 0.12 * holiday + 0.7 * np.roll(drift, 1)
        best.append(size * np.exp(foreseen))
        sales = size * np.exp(foreseen - 0.7 * np.roll(drift, 1) + drift + rng.normal(0, 0.03, len(weeks)))
        columns = {
            "week": dates.strftime("%Y-%m-%d"),
            "promotion": promotion,
            "holiday": holiday,
            "sales": sales.round(2),
        }
        parts.append(pd.DataFrame({"shop": f"shop-{shop:02}", **columns}))
    return Synthetic(pd.concat(parts, ignore_index=True), np.concatenate(best))


def retailers_recommend() -> Synthetic:
    """Ratings from 1 to 5 of 60 customers, 40 each of 80 articles, of rank 3: 3 + customer + article + inner product,

    with deviations 0.4, 0.5 and 0.8, rounded to a tenth after noise of 0.4, and kept within 1 and 5.
    """
    rng = np.random.default_rng(20_004)
    customers, articles, rank, each = 60, 80, 3, 40
    taste = rng.normal(size=(customers, rank)) * np.sqrt(0.8 / np.sqrt(rank))
    kind = rng.normal(size=(articles, rank)) * np.sqrt(0.8 / np.sqrt(rank))
    bias, popular = rng.normal(0, 0.4, customers), rng.normal(0, 0.5, articles)
    chosen = np.stack([rng.permutation(articles)[:each] for _ in range(customers)])
    expected = 3 + bias[:, None] + popular[chosen] + np.einsum("ur,unr->un", taste, kind[chosen])
    ratings = np.clip(expected + rng.normal(0, 0.4, expected.shape), 1, 5).round(1)
    names = [f"customer-{customer:02}" for customer in range(customers)]
    columns = {"customer": np.repeat(names, each), "article": chosen.ravel() + 1, "rating": ratings.ravel()}
    return Synthetic(pd.DataFrame(columns), np.clip(expected, 1, 5).ravel())


def banks_text() -> Synthetic:
    """Messages to four offices of a bank (`simulations.synthetic_texts`); `best` is what is wanted, as its number among
    `WANTED`: it follows from each message with certainty."""
    table = messages()
    return Synthetic(table, np.array([list(WANTED).index(wish) for wish in table["wish"]], dtype=np.float64))


def hospitals_image() -> Synthetic:
    """Chest images of five hospitals (`simulations.synthetic_images`); `best` is 1 where there is pneumonia, which the
    shape of the marks shows."""
    table = chests()
    return Synthetic(table, table["pneumonia"].to_numpy(dtype=np.float64))


def retailers_text() -> Synthetic:
    """Reviews of what four departments sell (`simulations.synthetic_texts`); `best` is what they mean."""
    table = reviews()
    return Synthetic(table, table["liked"].to_numpy(dtype=np.float64))


SETS: Mapping[str, Callable[[], Synthetic]] = {
    "banks": banks,
    "banks-text": banks_text,
    "hospitals-image": hospitals_image,
    "hospitals-survival": hospitals_survival,
    "retailers-forecast": retailers_forecast,
    "retailers-recommend": retailers_recommend,
    "retailers-text": retailers_text,
}

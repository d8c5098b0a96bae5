"""Chest images of 28 x 28 with a known truth: pneumonia is soft clouds in the lungs, where healthy lungs show vessels.

No image is anybody's. Clouds and vessels lie anywhere in the lungs and are alike bright in all, so that a model of
single pixels learns little, and one that sees shapes learns what tells them apart.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SIDE = 28
# Hospital -> images, and how many of them show pneumonia.
HOSPITALS = {
    "childrens-hospital": (640, 480),
    "city-hospital": (520, 312),
    "county-hospital": (440, 220),
    "district-clinic": (280, 98),
    "country-practice": (120, 30),
}
HIGH, WIDE = 10.0, 4.2  # The half axes of a lung, in pixels.
MARKS = (3, 6)  # In one image, at least and at most.
LIGHT = (4.0, 8.0)  # What one mark adds to all pixels together, where a pixel is from 0 to 1.
CLOUD = 2.0  # The deviation of a cloud, in pixels.
VESSEL = (8.0, 0.6)  # The length of a vessel, and its deviation across.
Array = NDArray[np.float64]


def chests() -> pd.DataFrame:
    """Columns `hospital`, `image` ((28, 28) uint8 in each cell) and `pneumonia` (0 or 1)."""
    rng = np.random.default_rng(20_006)
    parts = []
    for hospital, (count, sick) in HOSPITALS.items():
        images = [*_images(rng, count - sick, sick=False), *_images(rng, sick, sick=True)]
        pneumonia = (np.arange(count) >= count - sick).astype(int)
        part = pd.DataFrame({"hospital": hospital, "image": images, "pneumonia": pneumonia})
        parts.append(part.iloc[rng.permutation(count)])
    return pd.concat(parts, ignore_index=True)


def _images(rng: np.random.Generator, count: int, *, sick: bool) -> NDArray[np.uint8]:
    """(count, 28, 28): body, lungs, ribs and marks, in the exposure of the day."""
    one = (count, 1, 1)  # A number for each image.
    rows, columns = np.ogrid[:SIDE, :SIDE]
    down, across = rows - rng.normal(13.5, 0.7, one), columns - rng.normal(13.5, 0.7, one)
    apart = rng.uniform(5, 6, one)
    # The body is symmetric: the nearer lung is the one that a pixel may be in.
    lungs = 1 / (1 + np.exp(8 * (np.hypot(down / HIGH, (np.abs(across) - apart) / WIDE) - 1)))
    ribs = 0.05 * np.cos(2 * np.pi * ((down - 0.06 * across**2) / 4.5 + rng.random(one)))
    images = 0.55 - 0.3 * lungs + ribs
    marks = rng.integers(MARKS[0], MARKS[1], one, endpoint=True)
    for mark in range(MARKS[1]):
        side = rng.choice([-1, 1], one)
        # Even in the ellipse of a lung, not too near its edge.
        turn, far = rng.uniform(0, 2 * np.pi, one), 0.85 * np.sqrt(rng.random(one))
        y, x = down - HIGH * far * np.sin(turn), across - side * apart - WIDE * far * np.cos(turn)
        shape = _cloud(y, x) if sick else _vessel(y, x, rng.uniform(0, np.pi, one))
        light = rng.uniform(*LIGHT, one) * (mark < marks)
        # Clouds and vessels are alike bright: each adds its light, however it is spread.
        images += light / shape.sum(axis=(1, 2), keepdims=True) * shape
    images = rng.normal(1, 0.08, one) * images + rng.normal(0, 0.05, one) + rng.normal(0, 0.04, images.shape)
    eight_bits: NDArray[np.uint8] = (255 * np.clip(images, 0, 1)).round().astype(np.uint8)
    return eight_bits


def _cloud(down: Array, across: Array) -> Array:
    return np.exp(-(down**2) / (2 * CLOUD**2)) * np.exp(-(across**2) / (2 * CLOUD**2))


def _vessel(down: Array, across: Array, angle: Array) -> Array:
    length, width = VESSEL
    along, beside = down * np.cos(angle) + across * np.sin(angle), across * np.cos(angle) - down * np.sin(angle)
    return np.exp(-(np.maximum(np.abs(along) - length / 2, 0) ** 2 + beside**2) / (2 * width**2))

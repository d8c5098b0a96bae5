"""How the sites of a simulation differ from the job's schema, and in their units from one another.

Comparing units takes every site's own mean: a simulation has them, a federation does not (docs/statistics.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.schema import differences, numbers_of
from client.tables import read_table, site_frames
from privacy.errors import DataError, JobError
from strategies.job import Job

FACTORS = (10.0, 100.0, 1000.0, 2.2046, 2.54)  # Powers of ten, pounds in a kilogram, centimetres in an inch.
CLOSE = math.log(1.12)  # 2.2 and 2.54 are a factor of 1.15 apart.
LEAST_ROWS = 10


def schema_differences(job: Job) -> dict[str, list[str]]:
    """Each site's differences, one line each. Raises `DataError` for a table that cannot be read at all."""
    tables = _tables(job)
    found = {site: differences(table, job.data) for site, table in tables.items()}
    for name, column in job.data.columns.items():
        if column.type != "number":
            continue
        numbers = {site: numbers_of(table[name]) for site, table in tables.items() if name in table.columns}
        for site, what in unit_suspicions(numbers).items():
            found[site].append(f"column {name!r} {what}")
    return found


def unit_suspicions(numbers: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
    """Sites whose numbers in one column look like the others' in another unit, and by which factor.

    A unit scales all of a distribution: mean, median and spread must all be off by the same factor, so that a site with
    other patients is not taken for one with other units. Of two sites both are named: which is right cannot be seen.
    """
    shapes = {site: _shape(own) for site, own in numbers.items() if len(own) >= LEAST_ROWS}
    shapes = {site: shape for site, shape in shapes.items() if (shape > 0).all()}
    found = {}
    for site, own in shapes.items():
        others = [shape for name, shape in shapes.items() if name != site]
        if not others:
            continue
        ratios = np.log(own / np.median(others, axis=0))
        for factor in FACTORS:
            for sign, word in ((1, "larger"), (-1, "smaller")):
                if np.abs(ratios - sign * math.log(factor)).max() <= CLOSE:
                    found[site] = f"is about {factor:.3g} times {word} than at the other sites; is it in another unit?"
    return found


def _shape(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([numbers.mean(), np.median(numbers), numbers.std()])


def _tables(job: Job) -> dict[str, pd.DataFrame]:
    data = job.data
    if data.files is not None:
        return {name: read_table(Path(data.folder) / file, data) for name, file in data.files.items()}
    if data.path is None:
        raise JobError(f"job {job.name}: name the sites' tables: give data.files, or data.path")
    table = read_table(Path(data.folder) / data.path, data)
    if data.client is None:
        return {"the table": table}
    if data.client not in table.columns:
        raise DataError(f"{data.path}: column {data.client!r} (the client key) is absent")
    return site_frames(table, data.client, where=data.path)

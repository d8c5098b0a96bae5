"""Where a table is not as the job says, one line names the column and how; no line repeats a record's value."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.schema import differences
from strategies.job_data import Data
from tests.strategies.jobs import make_job

COLUMNS = {"age": {"range": [0, 100]}, "blood": {"type": "category", "values": ["A", "B"]}}


def schema(**changes: Any) -> Data:
    return make_job(data={"path": None, "client": None, "columns": COLUMNS, **changes}).data


def table(**changes: Any) -> pd.DataFrame:
    columns = {"age": ["30", "40", "50", "60"], "blood": ["A", "B", "A", "B"], "y": ["0", "1", "0", "1"], **changes}
    return pd.DataFrame({name: values for name, values in columns.items() if values is not None}, dtype=object)


def test_a_table_that_fits_has_none() -> None:
    assert differences(table(age=["30", None, "50", "60"]), schema()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"age": None, "Age": ["1"] * 4}, ["column 'age' is absent; did you mean 'Age'?"]),
        ({"age": None, "AGE ": ["1"] * 4}, ["column 'age' is absent; did you mean 'AGE '?"]),
        ({"age": None}, ["column 'age' is absent, and no name in the table is like it"]),
        ({"y": None, "yy": ["1"] * 4}, ["the target column 'y' is absent; did you mean 'yy'?"]),
        ({"age": [None] * 4}, ["column 'age' has no value in any row; is it called otherwise here?"]),
        (
            {"age": ["30,5", "40,25", "x", "60"]},
            ["column 'age' is text, where the job has a number, in 3 of 4 rows; 2 of them are numbers with a decimal "
             "comma"],
        ),
        (
            {"age": ["30", "40", "x", "60"]},
            ["column 'age' is text, where the job has a number, in 1 of 4 rows; does data.missing list what is none?"],
        ),
        (
            {"blood": ["A", "a ", "C", "C"]},
            ["column 'blood' has 2 different values, in 3 of 4 rows, that are not among the 2 values of the job; 1 of "
             "them are, but for capitals or spaces"],
        ),
        (
            {"y": ["0", "1", "2", "3"]},
            ["the target column 'y' has 2 different values, in 2 of 4 rows, that are not among the 2 classes of the "
             "job"],
        ),
        (
            {"age": ["300", "400", "50", "60"]},
            ["column 'age' has 50.0% of its numbers outside [0, 100], above it; is it in another unit?"],
        ),
        (
            {"age": ["-1", "400", "50", "60"]},
            ["column 'age' has 50.0% of its numbers outside [0, 100], 25.0% above it; is it in another unit?"],
        ),
        (
            {"age": None, "blood": ["C"] * 4},
            ["column 'age' is absent, and no name in the table is like it",
             "column 'blood' has 1 different values, in 4 of 4 rows, that are not among the 2 values of the job"],
        ),
    ],
)  # fmt: skip
def test_each_difference_is_one_line(changes: dict[str, Any], said: list[str]) -> None:
    assert differences(table(**changes), schema()) == said


def test_one_number_in_a_hundred_may_lie_outside() -> None:
    ages = np.full(200, 50.0)
    for outside, found in ((2, 0), (3, 1)):
        ages[:outside] = 1e6
        frame = pd.DataFrame({"age": ages, "blood": "A", "y": 1})
        assert len(differences(frame, schema())) == found


def test_a_number_as_target_is_held_to_be_one() -> None:
    number = schema(target_type="number", target_range=[0, 10])
    (line,) = differences(table(y=["1.5", "2", "x", "3"]), number)
    assert line.startswith(
        "the target column 'y' is text, where the job has a number, in 1 of 4 rows; does data.missing"
    )
    assert differences(table(y=["1.5", "2", "x", "3"]), schema(positive=["x"])) == []


@given(st.text(min_size=6, alphabet="qxz,.-789 "), st.sampled_from(["age", "blood", "y"]))
@settings(max_examples=60, deadline=None)
def test_no_line_repeats_a_cell(cell: str, column: str) -> None:
    for line in differences(table(**{column: [f"q{cell}", "1", "1", "1"]}), schema()):
        assert f"q{cell.strip()}" not in line

"""Sites with other units than the rest are found by the factor; sites with other patients are left alone."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedchorus import app
from privacy.errors import JobError
from simulations.schemas import FACTORS, schema_differences, unit_suspicions
from strategies.job import check_job, load_job
from tests.strategies.jobs import make_job, raw_job

RNG = np.random.default_rng(3)
SITES = {name: RNG.lognormal(4, 0.25, 300) for name in ("north", "south", "east", "west")}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_site_in_another_unit_is_named_with_the_factor(factor: float, sign: int) -> None:
    found = unit_suspicions({**SITES, "west": SITES["west"] * factor**sign})
    word = "larger" if sign > 0 else "smaller"
    assert found == {"west": f"is about {factor:.3g} times {word} than at the other sites; is it in another unit?"}


@given(st.floats(0.6, 1.7), st.floats(0.5, 2))
@settings(max_examples=60, deadline=None)
def test_a_site_with_other_patients_is_not_taken_for_one(shift: float, spread: float) -> None:
    own = SITES["west"]
    other = own.mean() * shift + (own - own.mean()) * spread
    assert unit_suspicions({**SITES, "west": other}) == {}


def test_a_mean_alone_off_by_a_factor_says_nothing() -> None:
    shifted = SITES["west"] + 9 * SITES["west"].mean()  # Ten times the mean, the same spread.
    assert unit_suspicions({**SITES, "west": shifted}) == {}


def test_of_two_sites_both_are_named_and_few_rows_no_spread_or_signs_say_nothing() -> None:
    two = unit_suspicions({"north": SITES["north"], "south": SITES["south"] * 1000})
    assert set(two) == {"north", "south"}
    for other in (SITES["west"][:9] * 10, np.full(50, 500.0), -SITES["west"] * 10, np.empty(0)):
        assert unit_suspicions({**SITES, "west": other}) == {}


def job_over(folder: Path, tables: dict[str, pd.DataFrame], **data: Any) -> Path:
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    raw = raw_job(
        data={
            "path": None, "client": None, "columns": {"weight": {"range": [0, 300]}},
            "files": {name: f"{name}.csv" for name in tables}, **data,
        }
    )  # fmt: skip
    (folder / "job.toml").write_text(tomli_w.dumps(raw))
    return folder / "job.toml"


def tables() -> dict[str, pd.DataFrame]:
    sites = {name: pd.DataFrame({"weight": own, "y": 0}) for name, own in SITES.items()}
    sites["west"]["weight"] *= 2.2046
    sites["east"] = sites["east"].rename(columns={"weight": "Weight"})
    return sites


EXPECTED = {
    "north": [], "south": [], "east": ["column 'weight' is absent; did you mean 'Weight'?"],
    "west": ["column 'weight' is about 2.2 times larger than at the other sites; is it in another unit?"],
}  # fmt: skip


def test_the_command_names_every_difference_and_fails(tmp_path: Path) -> None:
    job = job_over(tmp_path, tables())
    shown = CliRunner().invoke(app, ["schema", str(job)])
    assert shown.exit_code == 1
    assert "north: as the schema says\n" in shown.stdout
    assert f"west: {EXPECTED['west'][0]}\n" in shown.stdout
    told = CliRunner().invoke(app, ["schema", str(job), "--json"])
    assert json.loads(told.stdout) == {"sites": EXPECTED}
    fitting = {name: pd.DataFrame({"weight": own, "y": 0}) for name, own in SITES.items()}
    assert CliRunner().invoke(app, ["schema", str(job_over(tmp_path, fitting))]).exit_code == 0


def test_one_table_is_compared_by_its_client_key_or_as_a_whole(tmp_path: Path) -> None:
    whole = pd.concat([own.assign(site=name) for name, own in tables().items() if name != "east"])
    whole.to_csv(tmp_path / "all.csv", index=False)
    data = {"folder": str(tmp_path), "path": "all.csv", "columns": {"weight": {"range": [0, 300]}}}
    found = schema_differences(make_job(data={**data, "client": "site"}))
    assert found == {name: EXPECTED[name] for name in ("north", "south", "west")}
    split = {"partition": {"clients": 3}}
    found = schema_differences(check_job(raw_job(data={**data, "client": None}, simulation=split), where="a test"))
    assert found == {"the table": []}


@pytest.mark.skipif("FEDCHORUS_DATA" not in os.environ, reason="FEDCHORUS_DATA names no folder of real data")
def test_the_cholesterol_that_a_real_hospital_records_as_zero_is_found() -> None:
    folder = f"{os.environ['FEDCHORUS_DATA']}/fed_heart_disease"
    job = load_job(Path(__file__).parents[2] / "examples" / "heart_disease.toml", [f'data.folder="{folder}"'])
    found = schema_differences(job)
    assert found["cleveland"] == found["hungarian"] == []
    assert found["switzerland"] == [
        "column 'chol' has 100.0% of its numbers outside [100, 600], below it; is it in another unit?"
    ]


def test_a_job_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"give data\.files, or data\.path"):
        schema_differences(make_job(data={"path": None, "client": None}))

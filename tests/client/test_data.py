"""Records are read whole or refused; what is encoded follows from public constants; no error repeats a cell."""

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from client.data import Records, class_count, encode, feature_names, split
from client.tables import read_frame, site_frames
from privacy.errors import DataError
from strategies.job_data import Data
from tests.strategies.jobs import make_job

COLUMNS = {"age": {"range": [0, 100]}, "blood": {"type": "category", "values": ["A", "B", "O"]}}
CSV = """hospital,age,blood,ill
north,50,A,0
north,100,B,1
south,0,O,1
south,25,A,0
"""


def schema(**changes: Any) -> Data:
    """Columns `age` (0 to 100) and `blood` (A, B, O), target `ill`, client key `hospital`, with changes."""
    defaults: dict[str, Any] = {"client": "hospital", "target": "ill", "columns": COLUMNS}
    return make_job(data={**defaults, **changes}).data


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write one file of records, CSV from text or bytes and Parquet from columns, and return its path."""

    def write(content: str | bytes | dict[str, Any], name: str = "records") -> Path:
        if isinstance(content, dict):
            path = tmp_path / f"{name}.parquet"
            pd.DataFrame(content).to_parquet(path)
        else:
            path = tmp_path / f"{name}.csv"
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def load(path: Path, data: Data) -> dict[str, Records]:
    """Read, divide and encode, as a simulation does."""
    frame = read_frame(path, data)
    if data.client is None:
        return {"all": encode(frame, data, where=str(path))}
    return {
        name: encode(rows, data, where=name) for name, rows in site_frames(frame, data.client, where="a test").items()
    }


def refusal(path: Path, data: Data) -> str:
    with pytest.raises(DataError) as caught:
        load(path, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFiles:
    def test_csv_becomes_sites_features_and_classes(self, written: Callable[..., Path]) -> None:
        sites = load(written(CSV), schema())
        assert list(sites) == ["north", "south"]
        assert sites["north"].features.tolist() == [[0, 0, 0], [1, 1, 0]]
        assert sites["south"].features.tolist() == [[-1, 0, 1], [-0.5, 0, 0]]
        assert sites["north"].target.tolist() == [0, 1]
        assert sites["south"].target.tolist() == [1, 0]
        assert sites["north"].features.dtype == np.float32
        assert sites["north"].target.dtype == np.int64
        assert feature_names(schema()) == ["age", "blood=B", "blood=O"]

    @pytest.mark.parametrize("key", [["north", "north", "south", "south"], [1, 1, 2, 2]])
    @pytest.mark.parametrize(
        ("target", "choice"),
        [
            ([0, 1, 1, 0], {}),
            ([0.0, 1.0, 1.0, 0.0], {}),
            ([False, True, True, False], {}),
            (["0", "1", "1", "0"], {}),
            ([2, 7, 9, 3], {"positive": [7, 9]}),
            (["no", "yes", "yes", "no"], {"positive": ["yes"]}),
            (["no", "yes", "yes", "no"], {"classes": ["no", "yes"]}),
            (pd.Categorical(["no", "yes", "yes", "no"]), {"positive": ["yes"]}),
        ],
    )
    def test_parquet_says_the_same_with_numbers_or_text(
        self, written: Callable[..., Path], target: Any, choice: dict[str, Any], key: list[Any]
    ) -> None:
        path = written({"hospital": key, "age": [50, 100, 0, 25], "blood": ["A", "B", "O", "A"], "ill": target})
        first, second = load(path, schema(**choice)).values()
        assert [*first.features.tolist(), *second.features.tolist()] == [[0, 0, 0], [1, 1, 0], [-1, 0, 1], [-0.5, 0, 0]]
        assert [*first.target.tolist(), *second.target.tolist()] == [0, 1, 1, 0]

    def test_a_file_without_a_header_takes_the_names_of_the_job(self, written: Callable[..., Path]) -> None:
        path = written("50,A,0\n100,B,1\n")
        data = schema(header=False, names=["age", "blood", "ill"], path=None, client=None, files={"north": "n.csv"})
        records = load(path, data)["all"]
        assert records.features.tolist() == [[0, 0, 0], [1, 1, 0]]
        assert records.target.tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            ("north,50,A,0\nnorth,100,B,1\n", ["age", "blood", "ill"]),
            ("hospital,age,blood,ill\nnorth,50,A,0,\nnorth,100,B,1,\n", None),
        ],
    )
    def test_rows_with_more_fields_than_names_are_refused_and_never_shifted(
        self, written: Callable[..., Path], content: str, names: list[str] | None
    ) -> None:
        one_site = {"path": None, "client": None, "files": {"north": "n.csv"}}
        data = schema(**one_site, **({"header": False, "names": names} if names else {}))
        assert "more fields than" in refusal(written(content), data)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "cannot be read as .csv (EmptyDataError)"),
            ('hospital,age,blood,ill\nnorth,"50,A,0\n', "cannot be read as .csv (ParserError)"),
            ("hospital,age,blood,ill\nnorth,50,A,0\nnorth,50,A,0,7,8\n", "cannot be read as .csv (ParserError)"),
            ("hospital,age,blood,ill\nnörth,50,A,0\n".encode("latin-1"), "cannot be read as .csv (UnicodeDecodeError)"),
            (b"\x00\x00\x00", "column 'age' is absent"),
        ],
    )
    def test_a_file_that_is_no_table_is_refused(
        self, written: Callable[..., Path], content: str | bytes, said: str
    ) -> None:
        path = written(content)
        message = refusal(path, schema())
        assert message.startswith(f"{path}: ")
        assert said in message

    @pytest.mark.parametrize("content", [b"", b"text", b"PAR1" + bytes(50) + b"PAR1"])
    @pytest.mark.parametrize("suffix", ["parquet", "pq"])
    def test_a_corrupt_parquet_file_is_refused(self, tmp_path: Path, content: bytes, suffix: str) -> None:
        path = tmp_path / f"records.{suffix}"
        path.write_bytes(content)
        assert refusal(path, schema()).startswith(f"{path}: cannot be read as .{suffix} (")

    def test_a_truncated_parquet_file_is_refused(self, tmp_path: Path, written: Callable[..., Path]) -> None:
        path = written({"hospital": ["a"], "age": [1], "blood": ["A"], "ill": [0]})
        path.write_bytes(path.read_bytes()[:-20])
        assert "cannot be read as .parquet" in refusal(path, schema())

    @pytest.mark.parametrize("name", ["records.csv", "records.parquet"])
    def test_a_missing_file_and_a_folder_are_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        assert refusal(path, schema()) == f"{path}: no such data file (data.folder says where relative names start)"
        path.mkdir()
        assert refusal(path, schema()).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"target": "il"}, "target column 'il' is absent; did you mean 'ill'?"),
            ({"client": "hospitals"}, "column 'hospitals' is absent; did you mean 'hospital'?"),
            ({"columns": {"ages": {"range": [0, 1]}}}, "column 'ages' is absent; did you mean 'age'?"),
            ({"target": "zzz"}, "target column 'zzz' is absent"),
        ],
    )
    def test_an_absent_column_is_answered_with_the_nearest_name(
        self, written: Callable[..., Path], changes: dict[str, Any], said: str
    ) -> None:
        for path in (
            written(CSV),
            written({"hospital": ["north"], "age": [1], "blood": ["A"], "ill": [0]}),
        ):
            message = refusal(path, schema(**changes))
            assert message.startswith(f"{path}: ")
            assert said in message


class TestSites:
    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("Tech-support", "Tech-support"),
            ("a/b", "a-b"),
            ("../../etc", "etc"),
            ("Zürich Nord", "Z-rich-Nord"),
            ("  padded", "padded"),
            ("_hidden", "hidden"),
            ("7", "7"),
            ("x" * 80, "x" * 64),
        ],
    )
    def test_a_key_becomes_a_name_that_is_safe_in_a_path(
        self, written: Callable[..., Path], key: str, name: str
    ) -> None:
        path = written(CSV.replace("south", key))
        assert set(load(path, schema())) == {"north", name}

    @settings(max_examples=60, deadline=None)
    @given(keys=st.lists(st.text(max_size=70), min_size=1, max_size=4, unique=True))
    def test_every_row_goes_to_one_site_with_a_safe_name_or_the_table_is_refused(self, keys: list[str]) -> None:
        frame = pd.DataFrame({"key": [*keys, *keys], "row": range(2 * len(keys))})
        try:
            sites = site_frames(frame, "key", where="a test")
        except DataError:
            assert any(not re.search("[A-Za-z0-9]", key) for key in keys) or len(keys) > 1
        else:
            assert sorted(row for rows in sites.values() for row in rows["row"]) == list(range(2 * len(keys)))
            assert all(rows["key"].nunique() == 1 for rows in sites.values())
            assert all(name not in (".", "..") and "/" not in name and name.isascii() for name in sites)

    @pytest.mark.parametrize(
        ("key", "said"),
        [
            ("ü", "has no letter or digit to make a site's name of"),
            ("..", "has no letter or digit to make a site's name of"),
            ("north!", "two values of 'hospital' both become the site name 'north'"),
            ("", "column 'hospital' (the client key) is missing in 2 rows"),
        ],
    )
    def test_a_key_that_names_no_site_of_its_own_is_refused(
        self, written: Callable[..., Path], key: str, said: str
    ) -> None:
        assert said in refusal(written(CSV.replace("south", key)), schema())


SPOILT: list[tuple[str, str, dict[str, Any], str]] = [
    # column, cell, changes to the schema, said
    ("age", "old", {}, "column 'age': 1 rows are not a number (the first is data row 3)"),
    ("age", "12,5", {}, "column 'age': 1 rows are not a number"),
    ("age", "0x1f", {}, "column 'age': 1 rows are not a number"),
    ("age", "1_0", {}, "column 'age': 1 rows are not a number"),
    ("age", "True", {}, "column 'age': 1 rows are not a number"),
    ("age", "?", {}, "column 'age': 1 rows are not a number"),
    ("age", "inf", {}, "column 'age': 1 rows are not finite"),
    ("age", "-inf", {}, "column 'age': 1 rows are not finite"),
    ("age", "1e400", {}, "column 'age': 1 rows are not finite"),
    ("age", "1e39", {"scaling": "site", "columns": {"age": {}}}, "column 'age': 1 rows are not finite"),
    ("age", "nan", {"missing": ["?"]}, "column 'age': 1 rows are not a number"),
    ("age", "", {}, "1 of 4 rows have missing values (most in column 'age'); mend them"),
    ("age", "nan", {}, "1 of 4 rows have missing values (most in column 'age')"),
    ("age", "NA", {}, "1 of 4 rows have missing values (most in column 'age')"),
    ("age", "?", {"missing": ["?"]}, "1 of 4 rows have missing values (most in column 'age')"),
    ("blood", "AB", {}, "column 'blood': 1 rows are not among the schema's 3 values (the first is data row 3)"),
    ("blood", "a", {}, "column 'blood': 1 rows are not among the schema's 3 values"),
    ("blood", "", {}, "1 of 4 rows have missing values (most in column 'blood')"),
    ("ill", "2", {}, "column 'ill': 1 rows are neither 0 nor 1 (give data.positive or data.classes)"),
    ("ill", "yes", {}, "column 'ill': 1 rows are not a number (data.target)"),
    ("ill", "inf", {}, "column 'ill': 1 rows are neither 0 nor 1"),
    ("ill", "", {}, "1 of 4 rows have missing values (most in column 'ill')"),
    ("ill", "2", {"classes": [0, 1]}, "column 'ill': 1 rows are not among data.classes (2)"),
    ("ill", "2", {"classes": ["0", "1", "x"]}, "column 'ill': 1 rows are not among data.classes (3)"),
]


def spoilt(column: str, cell: str) -> str:
    """The CSV above, of one site, with one cell of its third row replaced."""
    lines = [line.split(",") for line in CSV.replace("south", "north").splitlines()]
    lines[3][lines[0].index(column)] = f'"{cell}"' if "," in cell else cell
    return "\n".join(",".join(line) for line in lines) + "\n"


class TestEncode:
    @pytest.mark.parametrize(("column", "cell", "changes", "said"), SPOILT)
    def test_a_cell_that_breaks_the_schema_is_refused_by_column_and_row(
        self, written: Callable[..., Path], column: str, cell: str, changes: dict[str, Any], said: str
    ) -> None:
        message = refusal(written(spoilt(column, cell)), schema(**changes))
        assert message.startswith("north: ")
        assert said in message

    def test_rows_with_missing_values_are_dropped_on_request(self, written: Callable[..., Path]) -> None:
        data = schema(on_missing="drop", client=None, path=None, files={"north": "n.csv"})
        for column in ("age", "blood", "ill"):
            records = load(written(spoilt(column, "")), data)["all"]
            assert records.target.tolist() == [0, 1, 0]
            assert records.features.tolist() == [[0, 0, 0], [1, 1, 0], [-0.5, 0, 0]]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("age,blood,ill\n", "no rows"),
            ("age,blood,ill\n,A,0\n5,,1\n5,A,\n", "no rows left without missing values"),
        ],
    )
    def test_a_table_without_a_usable_row_is_refused(
        self, written: Callable[..., Path], content: str, said: str
    ) -> None:
        data = schema(on_missing="drop", client=None, path=None, files={"north": "n.csv"})
        assert refusal(written(content), data).endswith(said)

    def test_parquet_nulls_are_missing_values(self, written: Callable[..., Path]) -> None:
        path = written(
            {
                "hospital": ["north"] * 4,
                "age": pd.array([50, None, 0, 25], dtype="Int64"),
                "blood": pd.Categorical(["A", "B", None, "A"]),
                "ill": [0, 1, 1, 0],
            }
        )
        assert "2 of 4 rows have missing values" in refusal(path, schema())
        assert load(path, schema(on_missing="drop"))["north"].target.tolist() == [0, 0]

    @settings(max_examples=50, deadline=None)
    @given(
        ends=st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2).filter(lambda e: abs(e[1] - e[0]) > 1e-6),
        values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    )
    def test_a_range_becomes_minus_one_to_one_and_what_lies_outside_is_clipped(
        self, ends: list[float], values: list[float]
    ) -> None:
        low, high = sorted(ends)
        data = schema(columns={"x": {"range": [low, high]}})
        cells = [*values, low, high, (low + high) / 2]
        features = encode(pd.DataFrame({"x": cells, "ill": 0}), data, where="a test").features[:, 0]
        assert features.dtype == np.float32
        assert np.all(np.abs(features) <= 1)
        assert features[-3:].tolist() == pytest.approx([-1, 1, 0], abs=1e-6)
        inside = np.array([low <= value <= high for value in cells])
        back = features.astype(float) * (high - low) / 2 + (low + high) / 2
        assert np.all(np.abs(back - cells)[inside] <= 1e-6 * (high - low))
        order = np.argsort(cells, kind="stable")
        assert np.all(np.diff(features[order]) >= 0)

    @pytest.mark.parametrize("values", [["A", "B", "O"], [1, 2, 3], [0.5, 1.5, 2.5], ["1", "2", "x"], [1, "x", 2]])
    @pytest.mark.parametrize("parquet", [False, True])
    def test_a_category_becomes_one_indicator_for_each_value_but_the_first(
        self, written: Callable[..., Path], values: list[Any], parquet: bool
    ) -> None:
        data = schema(columns={"c": {"type": "category", "values": values}}, client=None, path=None, files={"a": "a"})
        mixed = len({type(value) for value in values}) > 1
        cells = [str(value) if mixed else value for value in values]
        table = {"c": cells, "ill": [0, 1, 0]}
        path = written(table if parquet else pd.DataFrame(table).to_csv(index=False))
        assert load(path, data)["all"].features.tolist() == [[0, 0], [1, 0], [0, 1]]
        assert feature_names(data) == [f"c={value}" for value in values[1:]]

    def test_the_order_of_the_columns_is_that_of_the_schema(self, written: Callable[..., Path]) -> None:
        turned = dict(reversed(COLUMNS.items()))
        path = written(CSV)
        assert load(path, schema(columns=turned))["north"].features.tolist() == [[0, 0, 0], [1, 0, 1]]
        assert feature_names(schema(columns=turned)) == ["blood=B", "blood=O", "age"]

    @pytest.mark.parametrize(
        ("choice", "numbers"),
        [
            ({"positive": ["c"]}, [0, 0, 1, 0]),
            ({"positive": ["a", "b"]}, [1, 1, 0, 1]),
            ({"classes": ["a", "b", "c"]}, [0, 1, 2, 0]),
            ({"classes": ["c", "b", "a"]}, [2, 1, 0, 2]),
        ],
    )
    def test_a_target_is_numbered_by_its_classes_or_by_being_positive(
        self, choice: dict[str, Any], numbers: list[int]
    ) -> None:
        data = schema(columns={"x": {"range": [0, 1]}}, **choice)
        frame = pd.DataFrame({"x": 0.0, "ill": ["a", "b", "c", "a"]})
        assert encode(frame, data, where="a test").target.tolist() == numbers
        assert class_count(data) == len(choice.get("classes", [0, 1]))

    @pytest.mark.parametrize("missing", [["age"], ["blood"], ["ill"], ["age", "blood", "ill"]])
    def test_a_table_that_is_missing_all_over_is_refused(
        self, written: Callable[..., Path], missing: list[str]
    ) -> None:
        frame = pd.DataFrame([line.split(",") for line in CSV.splitlines()[1:]], columns=CSV.splitlines()[0].split(","))
        frame[missing] = ""
        path = written(frame.to_csv(index=False))
        assert "2 of 2 rows have missing values" in refusal(path, schema())
        assert "no rows left" in refusal(path, schema(on_missing="drop"))


MARKER = "S3CRET"
CELLS = st.sampled_from(
    [
        MARKER,
        f'"{MARKER}',
        f"{MARKER},{MARKER}",
        f"1{MARKER}",
        f"1e{MARKER}",
        f'"{MARKER}\n{MARKER}"',
        f"north/{MARKER}",
    ]
)
DIGITS = "48151623"


class TestNoErrorRepeatsACell:
    @settings(max_examples=80, deadline=None)
    @given(
        cell=CELLS,
        row=st.integers(0, 3),
        column=st.sampled_from(["age", "blood", "ill"]),
        changes=st.sampled_from(
            [
                {},
                {"positive": ["1"]},
                {"classes": ["0", "1"]},
                {"scaling": "site"},
                {"on_missing": "drop"},
                {"columns": {"age": {"type": "category", "values": [50, 100, 0, 25]}}},
                {"target": "absent"},
                {"header": False, "names": ["age", "blood", "ill"]},
                {"header": False, "names": ["hospital", "age", "blood", "ill", "more"]},
            ]
        ),
    )
    def test_in_csv(self, cell: str, row: int, column: str, changes: dict[str, Any]) -> None:
        lines = [line.split(",") for line in CSV.splitlines()]
        lines[row + 1][lines[0].index(column)] = cell
        one_site = {"path": None, "client": None, "files": {"north": "n.csv"}}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "records.csv")
            path.write_text("\n".join(",".join(line) for line in lines))
            for source in ({}, one_site):
                said = ""
                try:
                    for name, records in load(path, schema(**{**source, **changes} if source else changes)).items():
                        split(records, schema(), site=name)
                except DataError as error:
                    said = str(error)
                assert MARKER not in said

    @pytest.mark.parametrize("header", [f"{MARKER},50,A,0", f"north,{MARKER},A,0", f"north,50,A,{MARKER}"])
    def test_in_the_first_row_of_a_file_without_the_header_it_should_have(
        self, written: Callable[..., Path], header: str
    ) -> None:
        message = refusal(written(f"{header}\nnorth,50,A,0\n"), schema())
        assert MARKER not in message
        assert "data.header = false" in message

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("age", MARKER),
            ("age", math.inf),
            ("blood", MARKER),
            ("ill", MARKER),
            ("ill", float(DIGITS)),
            ("age", [MARKER]),
            ("ill", {"key": MARKER}),
            ("blood", MARKER.encode()),
        ],
    )
    def test_in_parquet(self, written: Callable[..., Path], column: str, value: Any) -> None:
        table = {"hospital": ["north"], "age": [50], "blood": ["A"], "ill": [0], column: [value]}
        message = refusal(written(table), schema())
        assert MARKER not in message
        assert DIGITS not in message


def numbered(rows: int, classes: int = 2) -> Records:
    """Records that carry their own number as the only feature, their classes taking turns."""
    return Records(np.arange(rows, dtype=np.float32)[:, None], np.arange(rows, dtype=np.int64) % classes)


class TestSplit:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(2, 200),
        classes=st.integers(2, 5),
        fraction=st.floats(0.001, 0.999),
        seed=st.integers(0, 2**32 - 1),
        stratify=st.booleans(),
    )
    def test_divides_the_rows_into_two_the_same_way_for_the_same_seed_or_says_that_they_are_too_few(
        self, rows: int, classes: int, fraction: float, seed: int, stratify: bool
    ) -> None:
        data = schema(
            test_fraction=fraction, split_seed=seed, stratify=stratify, classes=list(range(classes)), columns=COLUMNS
        )
        records = numbered(rows, classes)
        try:
            parts = split(records, data, site="north")
        except DataError:
            assert math.ceil(fraction * rows) >= rows
            return
        assert math.ceil(fraction * rows) < rows
        train, test = (part.features[:, 0].astype(int).tolist() for part in (parts.train, parts.test))
        assert sorted([*train, *test]) == list(range(rows))
        assert (train, test) == (sorted(train), sorted(test))
        assert len(test) == math.ceil(fraction * rows)
        assert parts.train.target.tolist() == [row % classes for row in train]
        assert parts.test.target.tolist() == [row % classes for row in test]
        again = split(records, data, site="south")
        np.testing.assert_array_equal(again.train.features, parts.train.features)

    @settings(max_examples=50, deadline=None)
    @given(rows=st.integers(12, 200), share=st.floats(0.3, 0.7), seed=st.integers(0, 2**32 - 1))
    def test_a_stratified_split_keeps_the_share_of_each_class(self, rows: int, share: float, seed: int) -> None:
        target = (np.arange(rows) < share * rows).astype(np.int64)
        parts = split(Records(np.zeros((rows, 1), np.float32), target), schema(split_seed=seed), site="north")
        for part in (parts.train, parts.test):
            assert abs(part.target.sum() - target.mean() * len(part)) < 1

    @pytest.mark.parametrize(("rows", "fraction", "seed"), [(303, 0.33, 0), (294, 0.25, 42), (46, 0.35, 7)])
    def test_reproduces_the_split_of_scikit_learn(self, rows: int, fraction: float, seed: int) -> None:
        target = (np.random.default_rng(seed).random(rows) < 0.4).astype(np.int64)
        train, test = train_test_split(np.arange(rows), test_size=fraction, random_state=seed, stratify=target)
        records = Records(np.arange(rows, dtype=np.float32)[:, None], target)
        parts = split(records, schema(test_fraction=fraction, split_seed=seed), site="north")
        assert set(parts.train.features[:, 0].astype(int).tolist()) == set(train.tolist())
        assert set(parts.test.features[:, 0].astype(int).tolist()) == set(test.tolist())

    def test_another_seed_splits_otherwise(self) -> None:
        first, second = (split(numbered(100), schema(split_seed=seed), site="north") for seed in (0, 1))
        assert first.test.features.tolist() != second.test.features.tolist()

    def test_one_row_is_too_few(self) -> None:
        with pytest.raises(DataError, match="site north: 1 row is too few to train and test on"):
            split(numbered(1), schema(), site="north")

    def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"site north: 3 rows leave none to train on at data\.test_fraction = 0\.9"):
            split(numbered(3), schema(test_fraction=0.9), site="north")

    def test_one_class_is_refused_unless_allowed(self) -> None:
        records = Records(np.zeros((8, 1), np.float32), np.ones(8, np.int64))
        with pytest.raises(DataError, match=r"site north: all its rows are of one class.*data\.allow_one_class = true"):
            split(records, schema(), site="north")
        parts = split(records, schema(allow_one_class=True), site="north")
        assert (len(parts.train), len(parts.test)) == (6, 2)


class TestSiteScaling:
    def test_standardises_by_the_training_rows_alone(self) -> None:
        data = schema(scaling="site", columns={"x": {}})
        rng = np.random.default_rng(0)
        records = Records(rng.normal(50, 9, (400, 1)).astype(np.float32), np.arange(400, dtype=np.int64) % 2)
        parts = split(records, data, site="north")
        assert parts.train.features.dtype == np.float32
        assert parts.test.features.dtype == np.float32
        assert float(parts.train.features.mean()) == pytest.approx(0, abs=1e-5)
        assert float(parts.train.features.std()) == pytest.approx(1, abs=1e-5)
        raw = split(records, schema(columns={"x": {"range": [0, 1]}}), site="north")
        mean, spread = raw.train.features.mean(), raw.train.features.std()
        np.testing.assert_allclose(parts.test.features, (raw.test.features - mean) / spread, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1.7, 123.456, -3e7])
    @pytest.mark.parametrize("rows", [13, 100, 1000])
    def test_a_column_that_is_constant_in_training_stays_harmless_in_the_test_rows(
        self, value: float, rows: int
    ) -> None:
        # In float32 the mean of 0.1s is not 0.1: the spread would be their rounding error, and a test value of 0.101
        # would become 134,217.
        records = Records(np.full((rows, 1), value, np.float32), np.arange(rows, dtype=np.int64) % 2)
        data = schema(scaling="site", columns={"x": {}})
        test_rows = split(numbered(rows), data.model_copy(update={"scaling": "range"}), site="north").test.features[
            :, 0
        ]
        records.features[test_rows.astype(int)] += np.float32(1)
        parts = split(records, data, site="north")
        assert parts.train.features.tolist() == [[0.0]] * len(parts.train)
        np.testing.assert_allclose(parts.test.features, 1, rtol=0.01, atol=2)


def test_records_are_taken_by_number_in_the_order_given() -> None:
    taken = numbered(10).take(np.array([7, 0, 7]))
    assert taken.features[:, 0].tolist() == [7, 0, 7]
    assert taken.target.tolist() == [1, 0, 1]
    assert len(taken) == 3


def test_without_labels_no_record_decides_whether_another_is_trained_on(tmp_path: Path) -> None:
    """Flip one record's label and empty another's cell: everyone else stays on their side of the split."""

    def sides(rows: list[str]) -> dict[str, str]:
        path = tmp_path / "rows.csv"
        path.write_text("x,y\n" + "".join(f"{row}\n" for row in rows))
        data = make_job(data={"on_missing": "drop", "client": None, "files": {"a": "x.csv"}, "path": None}).data
        parts = split(encode(read_frame(path, data), data, where="a"), data, site="a", stratify=False)
        return {
            **{f"{x[0]:.4f}": "train" for x in parts.train.features},
            **{f"{x[0]:.4f}": "test" for x in parts.test.features},
        }

    rows = [f"{k / 100},{k % 2}" for k in range(100)]
    before = sides(rows)
    rows[17] = "0.17,0"
    rows[42] = ",1"
    after = sides(rows)
    emptied = "-0.1600"
    assert set(before) - set(after) == {emptied}
    assert {x: side for x, side in before.items() if x != emptied} == after

"""Texts, images, ids, times and series become numbers by public constants; what is wrong is named without its value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data import Records, class_count, encode, feature_names, split
from client.encodings import PADDING, bags, windows
from client.tables import read_frame, site_frames
from privacy.errors import DataError
from strategies.job_data import Column, Data
from tests.strategies.jobs import make_job

SECRET = "Zaphod"
NUMBER = {"x": {"range": [0, 1]}}


def schema(**changes: Any) -> Data:
    return make_job(data={"columns": NUMBER, **changes}).data


def encoded(table: dict[str, Any], data: Data) -> Records:
    return encode(pd.DataFrame(table), data, where="a test")


TEXT = Column(type="text", buckets=16, ngrams=(1, 2))


class TestTexts:
    @settings(max_examples=50, deadline=None)
    @given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=5))
    def test_a_row_has_norm_one_or_nothing_and_depends_on_its_text_alone(self, texts: list[str]) -> None:
        rows = bags(texts, TEXT)
        assert rows.shape == (len(texts), 16)
        assert rows.dtype == np.float32
        for row, text in zip(rows, texts, strict=True):
            assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5) or not row.any()
            np.testing.assert_array_equal(bags([text], TEXT)[0], row)

    def test_counts_words_and_their_pairs(self) -> None:
        wide = Column(type="text", buckets=2**16, ngrams=(1, 2))
        (row,) = bags(["red red blue"], wide)
        # red twice, blue, red red, red blue.
        assert sorted(np.round(row[row > 0] ** 2 * 7).tolist()) == [1, 1, 1, 4]
        assert np.array_equal(bags(["Blue"], wide), bags(["blue!"], wide))
        letters = Column(type="text", buckets=2**16, ngrams=(2, 2), analyzer="letters")
        assert (bags(["ab"], letters) > 0).sum() == 3  # " a", "ab", "b ".

    def test_a_text_column_is_as_many_features_as_buckets(self) -> None:
        data = schema(columns={"note": {"type": "text", "buckets": 8}, **NUMBER})
        records = encoded({"note": ["one two", "three"], "x": [0.5, 1], "y": [0, 1]}, data)
        assert records.features.shape == (2, len(feature_names(data))) == (2, 9)
        assert records.features[:, 8].tolist() == [0, 1]


class TestCharacters:
    COLUMN = Column(type="characters", alphabet="abc", window=4)

    def test_a_window_is_followed_by_itself_one_later(self) -> None:
        before, after = windows(["abcab", "abcabca", "ca", "x?a", "a", ""], self.COLUMN)
        assert before.tolist() == [[1, 2, 3, 1], [1, 2, 3, 1], [3, 0, 0, 0], [0, 0, 0, 0], [0] * 4, [0] * 4]
        none = [PADDING] * 4
        assert after.tolist() == [[2, 3, 1, 2], [2, 3, 1, 2], [1, *none[1:]], [0, 1, *none[2:]], none, none]

    def test_is_a_record_by_itself(self) -> None:
        data = schema(columns={"line": self.COLUMN.model_dump(exclude_none=True)}, target="line", target_type="next")
        records = encoded({"line": ["abca", "bb"]}, data)
        assert records.features.tolist() == [[1, 2, 3, 0], [2, 0, 0, 0]]
        assert records.target.tolist() == [[2, 3, 1, PADDING], [2, PADDING, PADDING, PADDING]]
        assert class_count(data) == 4
        assert len(feature_names(data)) == 4
        dropped = encoded({"line": ["abca", None]}, data.model_copy(update={"on_missing": "drop"}))
        assert len(dropped) == 1


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    arrays = {
        "pictures": rng.integers(0, 256, (6, 4, 4), dtype=np.uint8),
        "labels": np.array([0, 1, 1, 0, 1, 0], np.uint8),
        "owner": np.array(["b", "a", "a", "b", "a", "b"]),
        "later": np.full((2, 4, 4), 255, np.uint8),
        "later_labels": np.array([1, 1]),
        "later_owner": np.array(["a", "b"]),
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


PICTURES = {"columns": {"pictures": {"type": "image", "shape": [4, 4]}}, "target": "labels"}


class TestImages:
    def test_are_read_from_arrays_and_mapped_onto_minus_one_to_one(self, archive: Path) -> None:
        data = schema(**PICTURES, client="owner")
        frames = site_frames(read_frame(archive, data), "owner", where="a test")
        pictures = np.load(archive)["pictures"]
        for name, rows in (("a", [1, 2, 4]), ("b", [0, 3, 5])):
            records = encode(frames[name], data, where="a test")
            expected = pictures[rows].reshape(3, 16) / 127.5 - 1
            np.testing.assert_allclose(records.features, expected, atol=1e-6)
            assert records.target.tolist() == ([1, 1, 1] if name == "a" else [0, 0, 0])

    def test_test_rows_come_from_arrays_of_their_own(self, archive: Path) -> None:
        arrays = {"pictures": "later", "labels": "later_labels", "owner": "later_owner"}
        data = schema(**PICTURES, client="owner", held_out={"arrays": arrays}, allow_one_class=True)
        frames = site_frames(read_frame(archive, data), "owner", where="a test")
        parts = split(encode(frames["a"], data, where="a test"), data, site="a")
        assert len(parts.train) == 3
        assert parts.test.features.tolist() == [[1.0] * 16]

    def test_of_another_shape_or_kind_are_refused(self, archive: Path) -> None:
        wrong = schema(columns={"pictures": {"type": "image", "shape": [5, 5]}}, target="labels", client="owner")
        with pytest.raises(DataError, match="6 rows are not an image of 5 x 5 8-bit numbers"):
            encode(read_frame(archive, wrong), wrong, where="a test")
        floats = {"pictures": [np.zeros((4, 4)), np.zeros((4, 4), np.uint8)], "labels": [0, 1]}
        with pytest.raises(DataError, match="1 rows are not an image"):
            encoded(floats, schema(**PICTURES))

    @pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 cut short"])
    def test_a_file_that_is_none_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "images.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as \.npz"):
            read_frame(path, schema(**PICTURES))

    def test_no_object_is_unpickled(self, tmp_path: Path) -> None:
        path = tmp_path / "images.npz"
        np.savez(path, pictures=np.array([{1: 2}], dtype=object), labels=np.array([1]))
        with pytest.raises(DataError, match=r"cannot be read as \.npz \(ValueError\)"):
            read_frame(path, schema(**PICTURES))


class TestTargets:
    def test_a_number(self) -> None:
        records = encoded({"x": [0, 1], "y": ["1.5", "-2"]}, schema(target_type="number"))
        assert records.target.dtype == np.float32
        assert records.target.tolist() == [1.5, -2]

    def test_a_time_and_an_event(self) -> None:
        data = schema(target_type="time", event="died", on_missing="drop")
        records = encoded({"x": [0, 1, 1, 0], "y": [3, 4.5, None, 1], "died": [1, 0, 1, None]}, data)
        assert records.target.tolist() == [[3, 1], [4.5, 0]]

    @pytest.mark.parametrize(
        ("table", "changes", "said"),
        [
            ({"y": [1, SECRET]}, {"target_type": "number"}, "column 'y': 1 rows are not a number (data.target)"),
            ({"y": [1, math.inf]}, {"target_type": "number"}, "column 'y': 1 rows are not finite"),
            ({"y": [1, 0]}, {"target_type": "number", "target_log": True}, "not above zero, as data.target_log needs"),
            ({"y": [1, -3], "e": [0, 1]}, {"target_type": "time", "event": "e"}, "times below zero"),
            (
                {"y": [1, 3], "e": [0, 2]},
                {"target_type": "time", "event": "e"},
                "column 'e': 1 rows are neither 0 nor 1",
            ),
            (
                {"y": [1, 3], "e": [0, SECRET]},
                {"target_type": "time", "event": "e"},
                "column 'e': 1 rows are not a number",
            ),
            ({"y": [1, 3], "e": [0, None]}, {"target_type": "time", "event": "e"}, "most in column 'e'"),
            (
                {"y": [0, 1], "x": [1, 4]},
                {"columns": {"x": {"type": "id", "count": 3}}},
                "not a whole number from 1 to 3",
            ),
            ({"y": [0, 1], "x": [1.5, 1]}, {"columns": {"x": {"type": "id", "count": 3}}}, "not a whole number from 1"),
        ],
    )
    def test_what_is_wrong_is_named_without_its_value(
        self, table: dict[str, Any], changes: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(DataError) as caught:
            encoded({"x": [0, 1], **table}, schema(**changes))
        assert said in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_ids_count_from_one_and_features_from_zero(self) -> None:
        data = schema(columns={"item": {"type": "id", "count": 9}}, target_type="number", target_range=[1, 5])
        assert encoded({"item": ["1", "9"], "y": [3, 4]}, data).features.tolist() == [[0], [8]]


class TestHeldOut:
    def test_rows_are_those_with_the_values_of_a_column(self) -> None:
        data = schema(held_out={"column": "fold", "values": [2, "x"]})
        records = encoded({"x": [0, 0.5, 1, 0.25], "y": [0, 1, 0, 1], "fold": ["1", "2", "x", "1"]}, data)
        parts = split(records, data, site="north")
        assert parts.train.features.ravel().tolist() == [-1, -0.5]
        assert parts.test.features.ravel().tolist() == [0, 1]

    def test_rows_are_those_of_a_second_file_of_any_separator(self, tmp_path: Path) -> None:
        (tmp_path / "first.data").write_text("north  0 1\nsouth 1 0 \n")
        (tmp_path / "second.data").write_text("north 0.5 0\n")
        data = schema(
            client="hospital",
            header=False,
            separator=" ",
            names=["hospital", "x", "y"],
            held_out={"path": "second.data"},
        )
        frames = site_frames(read_frame(tmp_path / "first.data", data), "hospital", where="a test")
        parts = {n: split(encode(f, data, where="a test"), data, site=n) for n, f in frames.items()}
        assert (len(parts["north"].train), len(parts["north"].test)) == (1, 1)
        assert (len(parts["south"].train), len(parts["south"].test)) == (1, 0)

    def test_a_site_that_has_nothing_to_train_on_is_refused(self) -> None:
        data = schema(held_out={"column": "fold", "values": ["test"]})
        with pytest.raises(DataError, match="site north: all its rows are held out"):
            split(encoded({"x": [0], "y": [1], "fold": ["test"]}, data), data, site="north")

    def test_a_row_that_is_dropped_takes_its_mark_along(self) -> None:
        data = schema(held_out={"column": "fold", "values": ["test"]}, on_missing="drop")
        records = encoded({"x": [None, 0.5, 1], "y": [0, 1, 0], "fold": ["test", "train", "test"]}, data)
        assert records.held_out is not None
        assert records.held_out.tolist() == [False, True]


def weeks(count: int, *, start: str = "2021-01-04") -> list[str]:
    return [str(day.date()) for day in pd.date_range(start, periods=count, freq="7D")]


def series(values: list[float], **more: Any) -> dict[str, Any]:
    return {"week": weeks(len(values)), "sales": values, "x": [0.0] * len(values), **more}


def forecast(**changes: Any) -> Data:
    how = {"time": "week", "lags": [1, 3], "horizon": 2, "harmonics": 0, **changes.pop("forecast", {})}
    return schema(target="sales", **{"target_type": "number", "target_range": [0, 20], **changes}, forecast=how)


class TestForecast:
    def test_features_are_lags_less_the_level_and_the_target_comes_with_it(self) -> None:
        records = encoded(series([1, 2, 3, 5, 4, 6]), forecast())
        # At the fourth week: lag 1 is 3, lag 3 is 1, the level 2; a unit is half the range.
        assert records.features[0].tolist() == pytest.approx([(3 - 2) / 10, (1 - 2) / 10, -1])
        assert records.target.tolist() == pytest.approx(np.array([[5, 2], [4, 10 / 3], [6, 4]]))
        parts = split(records, forecast(), site="shop")
        assert parts.train.target.tolist() == [[5, 2]]
        assert len(parts.test) == 2
        assert feature_names(forecast()) == ["sales 1 ago", "sales 3 ago", "x"]

    def test_logarithms_make_features_of_ratios_alone(self) -> None:
        data = forecast(target_log=True, target_range=None, forecast={"spread": 0.5})
        small, large = (encoded(series([s * v for v in [1, 2, 4, 3, 5, 4]]), data) for s in (1, 1000))
        np.testing.assert_allclose(small.features, large.features, atol=1e-6)
        np.testing.assert_allclose(small.target * 1000, large.target, rtol=1e-5)
        level = (math.log(1) + math.log(2) + math.log(4)) / 3
        assert small.features[0, 0] == pytest.approx((math.log(4) - level) / 0.5)
        assert small.target[0].tolist() == pytest.approx([3, math.exp(level)])

    @settings(max_examples=25, deadline=None)
    @given(values=st.lists(st.floats(1, 9), min_size=8, max_size=14), later=st.floats(1, 9), seed=st.integers(0, 9))
    def test_a_row_knows_nothing_of_its_own_period_or_later_ones(
        self, values: list[float], later: float, seed: int
    ) -> None:
        before = encoded(series(values), forecast())
        changed = encoded(series([*values[:-2], later, later]), forecast())
        np.testing.assert_array_equal(before.features[:-1], changed.features[:-1])
        order = np.random.default_rng(seed).permutation(len(values))  # Nor does the order in the file matter.
        mixed = pd.DataFrame(series(values)).iloc[order]
        np.testing.assert_array_equal(encode(mixed, forecast(), where="a test").target, before.target)

    def test_series_of_one_site_are_kept_apart(self) -> None:
        values = [1.0, 2, 3, 5, 4, 6]
        both = {
            "week": weeks(6) * 2,
            "sales": values + [10 * v for v in values],
            "x": [0.0] * 12,
            "shelf": ["a"] * 6 + ["b"] * 6,
        }
        records = encoded(both, forecast(forecast={"series": "shelf"}))
        alone = encoded(series(values), forecast())
        np.testing.assert_allclose(records.target, np.concatenate([alone.target, 10 * alone.target]), rtol=1e-6)
        assert records.held_out is not None
        assert records.held_out.tolist() == [False, True, True] * 2

    def test_seasons_come_back_after_a_year(self) -> None:
        data = forecast(forecast={"lags": [1], "harmonics": 2})
        records = encoded(series([5.0] * 120), data)
        assert len(feature_names(data)) == records.features.shape[1] == 6
        np.testing.assert_allclose(records.features[:60, 1:5], records.features[52 : 52 + 60, 1:5], atol=0.05)
        assert np.abs(records.features[:60, 1:5] - records.features[26 : 26 + 60, 1:5]).max() > 1

    def test_times_may_be_written_in_several_ways(self) -> None:
        table = series([1, 2, 3, 5, 4, 6])
        table["week"] = ["04-01-2021", "11-01-2021", "18/1/21", "25/1/21", "01-02-2021", "8/2/21"]
        data = forecast(forecast={"formats": ["%d-%m-%Y", "%d/%m/%y"]})
        np.testing.assert_array_equal(
            encoded(table, data).target, encoded(series([1, 2, 3, 5, 4, 6]), forecast()).target
        )

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"week": [*weeks(5), SECRET]}, "column 'week': 1 rows are not a time in one of data.forecast.formats"),
            ({"week": [*weeks(5), weeks(5)[0]]}, "repeat a time of 'week'"),
            ({"week": [*weeks(5), weeks(7)[6]]}, "1 gaps in a series: a period of 'week' is missing"),
            ({"sales": [1, 2, 3, None, 5, 6]}, "column 'sales': 1 rows are missing"),
            ({"sales": [1, 2, 3, SECRET, 5, 6]}, "column 'sales': 1 rows are not a number"),
        ],
    )
    def test_a_series_that_is_none_is_refused(self, change: dict[str, Any], said: str) -> None:
        with pytest.raises(DataError) as caught:
            encoded({**series([1, 2, 3, 5, 4, 6]), **change}, forecast())
        assert said in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_a_series_that_is_too_short_is_told_how_long_it_must_be(self) -> None:
        with pytest.raises(DataError, match=r"a series of 5 periods is too short .* it needs 6"):
            encoded(series([1, 2, 3, 4, 5]), forecast())


def test_rows_without_a_client_key_are_refused_or_dropped() -> None:
    frame = pd.DataFrame({"who": ["a", None, "b"], "x": [1, 2, 3]})
    with pytest.raises(DataError, match="missing in 1 rows"):
        site_frames(frame, "who", where="a test")
    assert list(site_frames(frame, "who", where="a test", drop=True)) == ["a", "b"]

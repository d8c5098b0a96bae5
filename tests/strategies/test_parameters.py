"""Named arrays become one vector and come back, in memory and on disk."""

import hashlib
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from privacy.errors import RunError
from strategies.parameters import Parameters, vector_hash

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=12), st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5
)

MODEL = Parameters({"weight": (2, 3), "bias": (2,), "scale": ()})


def test_splits_a_vector_in_the_order_of_the_names() -> None:
    assert MODEL.size == 9
    arrays = MODEL.split(np.arange(9, dtype=np.float32))
    assert list(arrays) == ["weight", "bias", "scale"]
    assert arrays["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["bias"].tolist() == [6, 7]
    assert arrays["scale"].tolist() == 8


def test_the_parts_are_views_of_the_vector() -> None:
    vector = np.zeros(9, np.float32)
    MODEL.split(vector)["bias"][:] = 5
    assert vector.tolist() == [0, 0, 0, 0, 0, 0, 5, 5, 0]


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 2**32))
def test_a_model_file_reads_back_names_order_shapes_and_every_bit(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    parameters = Parameters(shapes)
    bits = np.random.default_rng(seed).integers(0, 2**32, parameters.size, dtype=np.uint32)
    vector = bits.view(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        parameters.save(vector, path, {"job": "ab"})
        loaded, again = Parameters.load(path)
    assert list(loaded.shapes.items()) == list(shapes.items())
    assert again.dtype == np.float32
    assert again.tobytes() == vector.tobytes()


def test_a_model_file_is_safetensors_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    MODEL.save(np.zeros(9, np.float32), path, {"job": "ab", "round": "3"})
    data = path.read_bytes()
    described = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    metadata = described.pop("__metadata__")
    assert json.loads(metadata["fedchorus"]) == {"job": "ab", "round": "3", "order": ["weight", "bias", "scale"]}
    assert {name: entry["shape"] for name, entry in described.items()} == {"weight": [2, 3], "bias": [2], "scale": []}


ZEROS = {"a": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a model file of fedchorus"),
        (b"text", "not a model file of fedchorus"),
        (b"\xff" * 16, "not a model file of fedchorus"),
        (save(ZEROS), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": "a"}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": "3"}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": '["a"]'}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": "{}"}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": '{"order": 3}'}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": '{"order": []}'}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": '{"order": ["b"]}'}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": '{"order": [[]]}'}), "not a model file of fedchorus"),
        (save(ZEROS, {"fedchorus": '{"order": ["a"]}'})[:-1], "not a model file of fedchorus"),
    ],
)
def test_what_is_not_a_model_file_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=said) as caught:
        Parameters.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    for path in (tmp_path / "a", tmp_path / "b"):
        MODEL.save(np.arange(9, dtype=np.float32), path, {"job": "ab", "round": "3", "note": "c"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_missing_model_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such model file"):
        Parameters.load(tmp_path / "absent")
    with pytest.raises(RunError, match="not a model file of fedchorus"):
        Parameters.load(tmp_path)


class TestVectorHash:
    def test_is_the_sha256_of_the_little_endian_bytes(self) -> None:
        # 1.0 is 3f800000 and -2.0 is c0000000 (IEEE 754).
        expected = hashlib.sha256(bytes.fromhex("0000803f000000c0")).hexdigest()
        assert vector_hash(np.array([1.0, -2.0], np.float32)) == expected
        assert vector_hash(np.array([1.0, -2.0], ">f4")) == expected
        assert vector_hash(np.zeros(0, np.float32)) == hashlib.sha256(b"").hexdigest()

    def test_reads_the_values_in_order_wherever_they_lie(self) -> None:
        wide = np.arange(20, dtype=np.float32)
        assert vector_hash(wide[::2]) == vector_hash(wide[::2].copy())

    @given(values=st.lists(st.floats(width=32), min_size=1, max_size=8), data=st.data())
    def test_changes_with_every_bit(self, values: list[float], data: st.DataObject) -> None:
        vector = np.array(values, np.float32)
        bit = data.draw(st.integers(0, 32 * len(values) - 1))
        changed = vector.copy()
        changed.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert vector_hash(changed) != vector_hash(vector)

"""A sealed message is its sender's, for its recipient, in answer to one request, and unchanged; or it is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import Refused
from privacy.keys import IdentityKey
from strategies.envelope import COORDINATOR, Seal, array_digest
from strategies.messages import Words
from strategies.parameters import Vector

HEADER = '{"kind": "ask"}'
ARRAY = np.array([0.5, -2.0, 4.0], np.float32)
NONCE = "ab" * 32
BLANK = Seal(kind="answer", sender="north", recipient=COORDINATOR, nonce=NONCE, time=1.0, until=9.0)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> IdentityKey:
    return IdentityKey.create(tmp_path_factory.mktemp("keys") / "identity.pem")


def sealed(key: IdentityKey) -> Seal:
    return BLANK.signed(key, HEADER, array_digest(ARRAY))


def expected() -> dict[str, str]:
    return {"kind": "answer", "sender": "north", "recipient": COORDINATOR, "nonce": NONCE}


def test_what_was_sealed_is_accepted_after_the_wire(key: IdentityKey) -> None:
    seal = Seal.parse(sealed(key).text)
    assert seal == sealed(key)
    seal.check(key.public_hex, HEADER, array_digest(ARRAY.copy()), **expected())


@pytest.mark.parametrize(("name", "value"), [*expected().items()])
def test_a_seal_for_another_purpose_sender_recipient_or_request_is_refused(
    key: IdentityKey, name: str, value: str
) -> None:
    other = {"kind": "request", "sender": "south", "recipient": "south", "nonce": "cd" * 32}[name]
    with pytest.raises(Refused, match=f"{name} is not the expected one"):
        sealed(key).check(key.public_hex, HEADER, array_digest(ARRAY), **{**expected(), name: other})


@pytest.mark.parametrize("name", ["kind", "sender", "recipient", "nonce", "time", "until"])
def test_every_field_is_under_the_signature(key: IdentityKey, name: str) -> None:
    other: Any = {"kind": "request", "sender": "south", "recipient": "south", "nonce": "cd" * 32}.get(name, 2.0)
    with pytest.raises(Refused, match="signature"):
        replace(sealed(key), **{name: other}).check(key.public_hex, HEADER, array_digest(ARRAY))


@given(position=st.integers(0, 11), bit=st.integers(0, 7))
def test_one_flipped_bit_of_the_array_is_refused(position: int, bit: int, key: IdentityKey) -> None:
    data = bytearray(ARRAY.tobytes())
    data[position] ^= 1 << bit
    with pytest.raises(Refused, match="altered"):
        sealed(key).check(key.public_hex, HEADER, array_digest(np.frombuffer(bytes(data), np.float32)))


def test_another_header_key_or_array_type_is_refused(key: IdentityKey, tmp_path: Path) -> None:
    stranger = IdentityKey.create(tmp_path / "identity.pem")
    cases: list[tuple[str, str, Vector | Words]] = [
        (key.public_hex, HEADER + " ", ARRAY),
        (stranger.public_hex, HEADER, ARRAY),
        (key.public_hex, HEADER, ARRAY.view(np.uint8)),
        (key.public_hex, HEADER, ARRAY[:2]),
        ("not a key", HEADER, ARRAY),
    ]
    for public, header, array in cases:
        with pytest.raises(Refused, match="signature"):
            sealed(key).check(public, header, array_digest(array))


def test_an_empty_array_has_a_digest_of_its_type() -> None:
    assert array_digest(np.zeros(0, np.float32)) != array_digest(np.zeros(0, np.uint8))


GOOD = json.loads(BLANK.text) | {"signature": "12" * 64}


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": None},
        {"kind": "hint"},
        {"nonce": "AB" * 32},
        {"nonce": "ab"},
        {"nonce": None},
        {"signature": ""},
        {"signature": "12" * 63},
        {"time": 1},
        {"time": "1.0"},
        {"time": float("nan")},
        {"until": float("inf")},
        {"until": -1.0},
        {"until": None},
        {"sender": 3},
        {"recipient": None},
        {"more": 1},
    ],
    ids=str,
)
def test_text_that_is_no_seal_is_refused(change: dict[str, Any]) -> None:
    Seal.parse(json.dumps(GOOD, sort_keys=True))
    with pytest.raises(Refused, match="seal is not one"):
        Seal.parse(json.dumps({**GOOD, **change}, sort_keys=True))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 1000, "1" * 1024, "x" * 2000, None, 3, b"{}"])
def test_what_is_not_even_json_is_refused(text: object) -> None:
    with pytest.raises(Refused, match="seal is not one"):
        Seal.parse(text)


def test_a_seal_without_one_of_its_fields_is_refused() -> None:
    for name in GOOD:
        with pytest.raises(Refused):
            Seal.parse(json.dumps({key: value for key, value in GOOD.items() if key != name}, sort_keys=True))

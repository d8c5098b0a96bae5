"""Events are read strictly: what is not understood to the last key is refused, never approximated."""

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import UnsupportedEvent
from privacy.events import GaussianEvent, event_from_dict

FORM: dict[str, Any] = {
    "mechanism": "gaussian",
    "unit": "record",
    "adjacency": "add_or_remove_one",
    "noise_multiplier": 1.5,
    "clip_norm": 0.5,
    "sampling": {"scheme": "poisson", "rate": 0.01},
    "count": 20,
    "rng": "os",
    "discretisation_tv": 1e-28,
}
EVENT = GaussianEvent(
    noise_multiplier=1.5, clip_norm=0.5, sampling_rate=0.01, count=20, rng="os", discretisation_tv=1e-28
)

events = st.builds(
    GaussianEvent,
    noise_multiplier=st.floats(0.0625, 2**20),
    clip_norm=st.floats(0, exclude_min=True, allow_infinity=False),
    sampling_rate=st.floats(0, 1, exclude_min=True),
    count=st.integers(1, 2**40),
    rng=st.sampled_from(["os", "seeded-simulation"]),
    discretisation_tv=st.floats(0, 1, exclude_max=True),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([*FORM, "sampling.scheme", "sampling.rate"])


def changed(key: str, value: object) -> dict[str, Any]:
    """`FORM` with one value replaced; a dot leads into the inner dictionary."""
    form = copy.deepcopy(FORM)
    outer, _, inner = key.partition(".")
    if inner:
        form[outer][inner] = value
    else:
        form[outer] = value
    return form


@given(events)
def test_every_event_survives_the_way_through_json(event: GaussianEvent) -> None:
    assert event_from_dict(json.loads(json.dumps(event.as_dict()))) == event


def test_the_written_form_never_changes() -> None:
    # Ledgers hold this form: a key renamed here makes every ledger unreadable.
    assert EVENT.as_dict() == FORM
    assert event_from_dict(FORM) == EVENT


@given(key=keys, value=json_values)
def test_whatever_is_put_in_the_place_of_a_value_is_either_read_as_it_stands_or_refused(
    key: str, value: object
) -> None:
    form = changed(key, value)
    try:
        event = event_from_dict(form)
    except UnsupportedEvent:
        return
    assert event.as_dict() == form
    assert not any(isinstance(part, bool) for part in [*form.values(), *form["sampling"].values()])


@given(json_values)
def test_anything_else_is_refused_with_one_kind_of_error(record: Any) -> None:
    with pytest.raises(UnsupportedEvent):
        event_from_dict(record)


@pytest.mark.parametrize("key", [*FORM, "sampling.scheme", "sampling.rate"])
def test_a_missing_key_is_refused(key: str) -> None:
    outer, _, inner = key.partition(".")
    form = copy.deepcopy(FORM)
    del (form[outer] if inner else form)[inner or outer]
    with pytest.raises(UnsupportedEvent, match=outer if key == "sampling.scheme" else inner or outer):
        event_from_dict(form)


@pytest.mark.parametrize("key", ["centre", "sampling.seed", "sampling.replacement", "version"])
@pytest.mark.parametrize("value", [None, False, 0, "", 1.0])
def test_an_unknown_key_is_refused_whatever_its_value(key: str, value: object) -> None:
    # It may have been charged for something that this program cannot bound.
    with pytest.raises(UnsupportedEvent, match=key.partition(".")[0]):
        event_from_dict(changed(key, value))


REFUSED: list[tuple[str, Any]] = [
    ("mechanism", "laplace"),
    ("mechanism", "Gaussian"),
    ("mechanism", None),
    ("unit", "client"),
    ("unit", "user"),
    ("unit", ["record"]),
    ("adjacency", "replace_one"),
    ("adjacency", "zero_out"),
    ("adjacency", ""),
    ("sampling.scheme", "shuffle"),
    ("sampling.scheme", "without_replacement"),
    ("sampling.scheme", None),
    ("sampling", None),
    ("sampling", "poisson"),
    ("sampling", ["poisson", 0.01]),
    ("sampling.rate", 0),
    ("sampling.rate", -0.01),
    ("sampling.rate", 1.0000001),
    ("sampling.rate", math.nan),
    ("sampling.rate", "0.01"),
    ("sampling.rate", True),
    ("sampling.rate", [0.01]),
    ("noise_multiplier", 0),
    ("noise_multiplier", -1.5),
    ("noise_multiplier", 0.06),
    ("noise_multiplier", 2.0**21),
    ("noise_multiplier", 10**400),
    ("noise_multiplier", math.nan),
    ("noise_multiplier", math.inf),
    ("noise_multiplier", True),
    ("noise_multiplier", "1.5"),
    ("noise_multiplier", None),
    ("clip_norm", 0.0),
    ("clip_norm", -1.0),
    ("clip_norm", math.nan),
    ("clip_norm", math.inf),
    ("clip_norm", 10**400),
    ("clip_norm", True),
    ("clip_norm", {}),
    ("count", 0),
    ("count", -1),
    ("count", 20.0),
    ("count", 20.5),
    ("count", 10**400),
    ("count", True),
    ("count", "20"),
    ("count", math.inf),
    ("rng", "test"),
    ("rng", "OS"),
    ("rng", None),
    ("rng", True),
    ("discretisation_tv", -1e-30),
    ("discretisation_tv", 1),
    ("discretisation_tv", math.nan),
    ("discretisation_tv", False),
    ("discretisation_tv", "0"),
    ("discretisation_tv", None),
]


def names(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{key}={value!r:.12}" for key, value in cases]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=names(REFUSED))
def test_a_value_that_means_something_else_or_nothing_is_refused(key: str, value: object) -> None:
    with pytest.raises(UnsupportedEvent):
        event_from_dict(changed(key, value))


SETTINGS: dict[str, Any] = {
    "noise_multiplier": 1.5,
    "clip_norm": 0.5,
    "sampling_rate": 0.01,
    "count": 20,
    "rng": "os",
}
ARGUMENTS = {"sampling.rate": "sampling_rate", **{key: key for key in ("unit", "discretisation_tv", *SETTINGS)}}
REFUSED_ARGUMENTS = [(key, value) for key, value in REFUSED if key in ARGUMENTS]


@pytest.mark.parametrize(("key", "value"), REFUSED_ARGUMENTS, ids=names(REFUSED_ARGUMENTS))
def test_an_event_that_cannot_be_read_cannot_be_made_either(key: str, value: object) -> None:
    with pytest.raises(UnsupportedEvent, match=f"event: {key.rpartition('.')[2]} must be"):
        GaussianEvent(**{**SETTINGS, ARGUMENTS[key]: value})


def test_the_refusal_names_the_key_and_what_came() -> None:
    form: Mapping[str, Any] = {**FORM, "adjacency": "replace_one", "centre": "noon"}
    with pytest.raises(UnsupportedEvent, match=r"adjacency = 'replace_one', centre = 'noon'"):
        event_from_dict(form)

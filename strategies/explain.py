"""What is wrong with a TOML file, in one line: the key, what was expected, what came, and the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

NAME = "a name (letters, digits, dot, dash, underscore; at most 64)"


def explain(
    error: ValidationError, model: type[BaseModel], *, whole: str, patterns: Mapping[str, str] | None = None
) -> str:
    """Say the first thing that is wrong with a file for `model`, and how many more there are.

    `whole` is what the file is called; `patterns` says of a regular expression what a person is told was expected.
    """
    # A misspelt key first: it is why another one is missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return one_line(f"{_explained(problems[0], model, whole, patterns or {})}{more}")


def one_line(text: str) -> str:
    """Keys come from the file, and TOML lets a quoted key hold a newline."""
    return " ".join(text.splitlines())


def known_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key of the file, as (table, key); tables named by the user appear as `*`."""
    for name, field in model.model_fields.items():
        yield prefix, name
        for nested, by_name in _sections(field.annotation):
            yield from known_keys(nested, (*prefix, name, "*") if by_name else (*prefix, name))


def _explained(problem: Any, model: type[BaseModel], whole: str, patterns: Mapping[str, str]) -> str:
    location = [str(part) for part in problem["loc"]]
    key, got = ".".join(location) or whole, problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key}{_nearest(location, model)}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            said = str(problem["ctx"]["error"])
            return said if said.startswith("unknown key ") else f"{key}: {said}"
        case "model_type" | "dict_type":
            return f"{key}: should be a table, got {got!r}"
        case "string_pattern_mismatch":
            expected = patterns.get(problem["ctx"]["pattern"], NAME)
            return f"{key.removesuffix('.[key]')}: {got!r} is not {expected}"
        case _:
            shown = f"a table ({', '.join(got)})" if isinstance(got, dict) else repr(got)
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{key}: {message.removeprefix('input ')}, got {shown}{_nearest_value(problem)}"


def _nearest(location: list[str], model: type[BaseModel]) -> str:
    known = list(known_keys(model))
    *parent, unknown = location
    # A table named by a person appears as `*`.
    here = [name for table, name in known if len(table) == len(parent) and all(map(_fits, table, parent))]
    near = {name: ".".join([*parent, name]) for name in here}
    # Of several of one name the last is kept: one of the same top-level table, else the first of the job.
    places = sorted(range(len(known)), key=lambda at: (known[at][0][:1] == tuple(parent[:1]), -at))
    elsewhere = {name: ".".join([*table, name]) for table, name in (known[at] for at in places) if "*" not in table}
    # The very key elsewhere, then one like it here, then one much like it elsewhere.
    for names, cutoff in ((elsewhere, 1.0), (near, 0.6), (elsewhere, 0.75)):
        if close := difflib.get_close_matches(unknown, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[close[0]]}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _fits(known: str, given: str) -> bool:
    return known in ("*", given)


def _nearest_value(problem: Any) -> str:
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return ""
    allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    close = difflib.get_close_matches(problem["input"], allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _sections(member)
    elif get_origin(annotation) is dict:
        for nested, _ in _sections(get_args(annotation)[1]):
            yield nested, True

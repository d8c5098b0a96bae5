"""Settings files: TOML, checked whole; a mistake is one line that names the file, the key and the nearest known one."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from privacy.enrolment import split_address
from privacy.errors import Refused, RunError
from strategies.job import _explain, _one_line, known_keys

Model = TypeVar("Model", bound=BaseModel)


def _host_and_port(text: str) -> str:
    try:
        split_address(text)
    except Refused as error:
        raise ValueError(str(error).removeprefix("address: ")) from None
    return text


def _public_key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("expected a key or hash of 64 hexadecimal digits, lower case")
    return text


Address = Annotated[str, AfterValidator(_host_and_port)]
Hex32 = Annotated[str, AfterValidator(_public_key)]


def read_settings(path: Path, model: type[Model], *, what: str, version: int | None = None) -> Model:
    """Read the settings file `path` (`what`, in errors) as `model`. Raises `RunError`, one line, for any mistake.

    Where there is a `version`, the file must have that one: a file of a newer program is refused with what to do.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such {what}") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path}: not valid TOML: {_one_line(str(error))}") from None
    if version is not None:
        found = raw.get("version")
        if type(found) is int and found > version:
            raise RunError(
                f"{path}: version {found} is newer than this program reads ({version}); install the newer fedchorus"
            )
        if type(found) is not int or found != version:
            raise RunError(f"{path}: its first line must be `version = {version}`")
    return checked(raw, model, where=str(path))


def checked(raw: Mapping[str, Any], model: type[Model], *, where: str) -> Model:
    """Validate settings that were already parsed; `where` names their origin in errors."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        problems = [
            _unknown([str(part) for part in problem["loc"]], model)
            if problem["type"] == "extra_forbidden"
            else _explain(problem).replace("the job:", "the file:")
            # A misspelt key first: it is why another one is missing.
            for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        ]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(_one_line(f"{where}: {problems[0]}{more}")) from None


def _unknown(location: list[str], model: type[BaseModel]) -> str:
    known = list(known_keys(model))
    *parent, unknown = location
    # A table named by a person appears as `*`.
    fits = [name for prefix, name in known if len(prefix) == len(parent) and all(map(_same, prefix, parent))]
    near = {name: ".".join([*parent, name]) for name in fits}
    elsewhere = {name: ".".join([*prefix, name]) for prefix, name in reversed(known) if "*" not in prefix}
    for names, cutoff in ((near, 0.6), (elsewhere, 0.75)):
        if close := difflib.get_close_matches(unknown, names, n=1, cutoff=cutoff):
            return f"unknown key {'.'.join(location)}; did you mean {names[close[0]]}?"
    return f"unknown key {'.'.join(location)}; known here: {', '.join(fits)}"


def _same(known: str, given: str) -> bool:
    return known in ("*", given)

"""Settings files: TOML, checked whole; a mistake is one line that names the file, the key and the nearest known one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from privacy.enrolment import split_address
from privacy.errors import Refused, RunError
from strategies.explain import explain, one_line

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
        raise RunError(f"{path}: not valid TOML: {one_line(str(error))}") from None
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
        raise RunError(f"{where}: {explain(error, model, whole='the file')}") from None

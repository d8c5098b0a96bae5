"""Scenarios: job files that ship with fedchorus, to run as they are or to start from."""

from __future__ import annotations

import difflib
from pathlib import Path

from privacy.errors import JobError

_FOLDER = Path(__file__).parent / "scenarios"


def scenario_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def describe(name: str) -> str:
    """The first comment line of a scenario's file."""
    return scenario_path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def scenario_path(name: str) -> Path:
    """The job file of a scenario. Raises `JobError` with the nearest known name."""
    if name not in scenario_names():
        close = difflib.get_close_matches(name, scenario_names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(scenario_names())}"
        raise JobError(f"no scenario and no job file is called {name!r}; {hint}")
    return _FOLDER / f"{name}.toml"


def job_path(name: str) -> Path:
    """A job file by path, or a scenario by name: what looks like a path is one."""
    path = Path(name)
    return path if path.suffix == ".toml" or path.is_file() or "/" in name else scenario_path(name)

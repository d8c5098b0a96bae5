"""What a job would run at this site: the SHA-256 of the installed source that its task and strategy name.

A site's policy allows a data scientist's own `package.module:Name` by this hash and no other way. It is computed from
files alone: a module is found, never imported, because importing it would already run it. A hash is

    "sha256:" + SHA-256("fedchorus content v1\\0" + for each file, in order of name:
                        length of name (8 bytes, little-endian) + name + length of content (8 bytes) + content)

over all *.py files of the top-level package, named from its parent folder on (`mypackage/tasks.py`), or over the one
file of a top-level module. It stands for that source and not for the packages that it imports in turn.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES
from pathlib import Path

import tomli_w

from privacy.errors import JobError
from strategies.job import Job

PACKAGE = "fedchorus"
OWN = ("client", "privacy", "strategies")  # What of fedchorus runs at a site.
_DOMAIN = b"fedchorus content v1\0"


def content_of(job: Job) -> dict[str, str]:
    """Hash what `job` names: by the task's and the strategy's name, and the installed fedchorus under `PACKAGE`.

    What ships with fedchorus has fedchorus's own hash. Raises `JobError`, one line, for a module that is missing, has
    no one place (a namespace package), or holds code other than source files within its own folder.
    """
    own = package_hash()
    names = {"task.name": job.task.name, "strategy.name": job.strategy.name}
    return {PACKAGE: own} | {name: source_hash(name, key=key) if ":" in name else own for key, name in names.items()}


def describe(job: Job) -> str:
    """What a policy file has to say to allow the job's task and strategy as they are installed here (TOML)."""
    code = content_of(job)
    tables: dict[str, object] = {"package": code[PACKAGE]}
    for table, name in (("tasks", job.task.name), ("strategies", job.strategy.name)):
        tables[table] = {"code": {name: code[name]}} if ":" in name else {"allow": [name]}
    return tomli_w.dumps(tables)


def package_hash() -> str:
    """The hash of all of the installed fedchorus that runs at a site (`OWN`), taken as one."""
    return _hash(file for name in OWN for file in _sources(name, key=PACKAGE))


def source_hash(name: str, *, key: str) -> str:
    """The hash of the installed source that `package.module:Name` is part of; `key` names the job's key in errors."""
    module, _, attribute = name.partition(":")
    parts = module.split(".")
    if not all(part.isidentifier() for part in [*parts, attribute]):
        raise JobError(f"{key}: {_shown(name)} is not package.module:Name")
    files = dict(_sources(parts[0], key=key))
    path = "/".join(parts)
    if not {f"{path}.py", f"{path}/__init__.py"} & files.keys():
        raise JobError(f"{key}: the installed {parts[0]!r} has no source file for the module {_shown(module)}")
    return _hash(files.items())


def _hash(files: Iterable[tuple[str, bytes]]) -> str:
    hashed = hashlib.sha256(_DOMAIN)
    for name, content in sorted(files):
        for part in (os.fsencode(name), content):
            hashed.update(len(part).to_bytes(8, "little") + part)
    return f"sha256:{hashed.hexdigest()}"


def _sources(top: str, *, key: str) -> Iterator[tuple[str, bytes]]:
    """Each source file of a top-level module or package: its name from the parent folder on, and its bytes."""
    try:
        spec = importlib.util.find_spec(top)  # Of a dotted name it would import the parents.
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.name != top:  # `__main__` is another in each process.
        raise JobError(f"{key}: no module {_shown(top)} is installed in this environment")
    if spec.origin is None:
        raise JobError(f"{key}: {top!r} is a namespace package, which has no one source; give it an __init__.py")
    origin = Path(spec.origin)
    if origin.suffix != ".py" or not origin.is_file():
        raise JobError(f"{key}: {top!r} is compiled, built in or in an archive; only plain source files can be hashed")
    try:
        if spec.submodule_search_locations is None:
            yield f"{top}.py", origin.read_bytes()
            return
        root = origin.parent.resolve()
        if [Path(place).resolve() for place in spec.submodule_search_locations] != [root]:
            raise JobError(f"{key}: the package {top!r} is spread over several folders; install it in one")
        for path in _files(root, key=key):
            yield f"{top}/{path.relative_to(root).as_posix()}", path.read_bytes()
    except OSError as error:
        raise JobError(f"{key}: the source of {top!r} cannot be read ({error.strerror})") from None


def _files(root: Path, *, key: str) -> Iterator[Path]:
    """The source files below `root`. Raises `JobError` for what could be imported from there and is not hashed."""

    def stop(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=stop):
        for path in (Path(folder, name) for name in [*folders, *names]):
            here = path.relative_to(root.parent).as_posix()
            if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
                raise JobError(f"{key}: {_shown(here)} is a link to a folder or out of the package; put a copy there")
            if path.name in folders:
                continue
            compiled = path.name.endswith(tuple(EXTENSION_SUFFIXES))
            if compiled or (path.name.endswith(tuple(BYTECODE_SUFFIXES)) and path.parent.name != "__pycache__"):
                raise JobError(f"{key}: {_shown(here)} is compiled; only plain source files can be hashed")
            if path.suffix == ".py":
                yield path


def _shown(text: str) -> str:
    """Names come from the job: quoted, on one line, and not longer than a name is."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

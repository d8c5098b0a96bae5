"""A pre-trained checkpoint: where it lies and what it is, by hash. It is data: safetensors and JSON, never code.

| a reference             | is                                                                                       |
|-------------------------|------------------------------------------------------------------------------------------|
| `package:NAME/FOLDER`   | a folder of an installed package                                                         |
| `models:NAME`           | a folder of this machine's models (`FEDCHORUS_MODELS`, or `models` in a site's settings) |
| `./FOLDER`, `/FOLDER`   | a folder; a relative one starts at the job file                                          |
| `ORG/NAME[@REVISION]`   | a model of the Hugging Face hub, from its cache here; not offline it is fetched once     |
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from privacy.errors import JobError

MODELS = "FEDCHORUS_MODELS"
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model")  # Of a hub's repository: nothing that could be run.
_DOMAIN = b"fedchorus checkpoint v1\0"
_WEIGHTS = ("config.json", "*.safetensors", "*.index.json", "preprocessor_config.json")
_TOKENS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def locate(reference: str, *, key: str = "task.checkpoint") -> Path:
    """The folder that a reference names on this machine. Raises `JobError`, which says how to get what is absent."""
    kind, separator, rest = reference.partition(":")
    if separator and kind == "package":
        return _folder(_package(rest, key), reference, key)
    if separator and kind == "models":
        return _folder(_of_models(rest, key), reference, key)
    if reference.startswith((".", "/", "~")):
        return _folder(Path(reference).expanduser(), reference, key)
    if reference.count("/") == 1 and not separator:
        return _from_hub(reference, key)
    raise JobError(
        f"{key}: {reference!r} names no checkpoint; write package:NAME/FOLDER, models:NAME, ./FOLDER or ORG/NAME"
    )


def portable(reference: str) -> str:
    """What stands for `reference` at other machines: of a folder here its name among their models."""
    return f"models:{Path(reference).name}" if reference.startswith((".", "/", "~")) else reference


def absolute(reference: str, folder: Path) -> str:
    """`reference`, where it is a relative path from `folder` on."""
    return str((folder / reference).resolve()) if reference.startswith(".") else reference


def hashes(folder: Path, *, key: str = "task.checkpoint") -> dict[str, str]:
    """SHA-256 of a checkpoint's weights with their configuration, and of its tokenizer: what all sites must have alike.

    Raises `JobError` for a checkpoint that is not safe to read (`configuration`).
    """
    configuration(folder, key=key)
    return {"checkpoint_hash": _hash(folder, _WEIGHTS), "tokenizer_hash": _hash(folder, _TOKENS)}


def check_hashes(folder: Path, wanted: Mapping[str, str | None], *, key: str = "task.checkpoint") -> None:
    """Raise `JobError` unless the checkpoint here is the one that the job was made with."""
    found = hashes(folder, key=key)
    for name, what in (("checkpoint_hash", "weights"), ("tokenizer_hash", "tokenizer")):
        if wanted.get(name) not in (None, found[name]):
            raise JobError(
                f"task.{name}: the {what} in {folder} are not those that the job was made with (here "
                f"{found[name][:16]}..., the job has {(wanted[name] or '')[:16]}...); install the same checkpoint"
            )


def configuration(folder: Path, *, key: str = "task.checkpoint") -> dict[str, Any]:
    """A checkpoint's config.json. Raises `JobError` for one that is malformed, has code of its own or pickled weights
    alone."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise JobError(f"{key}: {folder} has no config.json: it is no checkpoint") from None
    except (ValueError, RecursionError):
        raise JobError(f"{key}: {folder}/config.json is not valid JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise JobError(f"{key}: {folder}/config.json names no model_type")
    if (folder / "adapter_config.json").exists():
        raise JobError(f"{key}: {folder} holds adapters (adapter_config.json); merge them into their base first")
    _check_index(folder, key)
    if "auto_map" in found:
        raise JobError(
            f"{key}: {folder} brings code of its own (auto_map), which is never run here; use a model of a family that "
            "transformers carries"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = next((path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pkl")), None)
        why = f"only pickled weights ({pickled}), which could run anything" if pickled else "no weights"
        raise JobError(f"{key}: {folder} has {why}; save it as safetensors (save_pretrained) and check what it is")
    return found


def _check_index(folder: Path, key: str) -> None:
    """Raise `JobError` for an index of weights that leads to anything but safetensors of this very folder."""
    for path in sorted(folder.glob("*.index.json")):
        try:
            named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise JobError(f"{key}: {path} is not an index of weights") from None
        here = {own.name for own in folder.glob("*.safetensors")}
        if not named <= here:
            raise JobError(f"{key}: {path} names weights that are no .safetensors file of that folder; save it anew")


def resolved_file(folder: Path, name: str, *, key: str) -> Path:
    """The path of a file that a job in `folder` names under `key`. Raises `JobError` for what is no path."""
    try:
        return (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise JobError(f"{key}: not the path of a file") from None


def file_hash(path: Path, *, key: str) -> str:
    """SHA-256 of one file that a job names under `key`. Raises `JobError`."""
    if path.is_dir():
        raise JobError(f"{key}: {path} is a folder; name one file: a table, JSON lines or .npz")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise JobError(f"{key}: {path} cannot be read ({error.strerror})") from None


def _hash(folder: Path, patterns: Iterable[str]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    seen = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _hashed(seen)


@lru_cache(maxsize=64)
def _hashed(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of files of this size and time: gigabytes are read once in a process."""
    total = hashlib.sha256(_DOMAIN)
    for name, *_ in files:
        with open(name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        total.update(len(os.path.basename(name)).to_bytes(8, "little") + os.path.basename(name).encode() + digest)
    return total.hexdigest()


def _package(rest: str, key: str) -> Path:
    top, _, within = rest.partition("/")
    try:
        spec = importlib.util.find_spec(top) if top.isidentifier() else None  # Found, not imported.
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"{key}: no package {top!r} is installed in this environment")
    return _within(Path(next(iter(spec.submodule_search_locations))), within, key)


def _of_models(name: str, key: str) -> Path:
    folder = os.environ.get(MODELS)
    if not folder:
        raise JobError(f'{key}: "models:{name}" needs the folder of this machine\'s models: set {MODELS}=FOLDER')
    return _within(Path(folder), name, key)


def _within(folder: Path, name: str, key: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise JobError(f"{key}: {name!r} leads out of its folder")
    return path


def _folder(path: Path, reference: str, key: str) -> Path:
    if not path.is_dir():
        raise JobError(f"{key}: {reference}: no folder {path}; put the checkpoint there (config.json, *.safetensors)")
    return path.resolve()


def _from_hub(reference: str, key: str) -> Path:
    name, _, revision = reference.partition("@")
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise JobError(f"{key}: {reference}: install fedchorus[llm] to use models of the hub") from None
    patterns = list(FETCHED)
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=patterns, local_files_only=True)
        return Path(found)
    except (LocalEntryNotFoundError, ValueError, OSError):
        if constants.HF_HUB_OFFLINE:
            raise JobError(
                f"{key}: {reference} is not in the cache of this machine, which is offline; fetch it on a machine "
                "with a network, put it into a folder and name that: ./FOLDER"
            ) from None
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise JobError(f"{key}: {reference} cannot be fetched ({type(error).__name__}); is the name right?") from None

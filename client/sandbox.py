"""How a child process is shut in: without a network, without the site's keys, with its data read-only.

| wrapper      | needs                                             | network | site's keys | data      |
|--------------|---------------------------------------------------|---------|-------------|-----------|
| bubblewrap   | the program `bwrap`, leave to make namespaces     | none    | hidden      | read-only |
| namespaces   | Linux 5.12, leave to make namespaces, or root     | none    | hidden      | read-only |
| limits       | nothing                                           | in reach | in reach   | as the site's user |

Under each of them: no core file, no capability, no new privilege, a clean environment, dead with its parent. Linux
alone. Only what is tried counts: a wrapper is available if a trial of it works, and the child proves it once more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client.shut_in import MASKED, gpu_nodes
from privacy.errors import RunError
from strategies.checkpoint import MODELS

Isolation = Literal["auto", "required", "none"]
Wrapper = Literal["bubblewrap", "namespaces", "limits"]

ROOT = Path(__file__).resolve().parent.parent  # Where this package is: the child runs the same copy.
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "HF_HUB_CACHE")
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "MKL_")
_TRIAL_S = 20.0


@dataclass(frozen=True)
class Sandbox:
    """One way to shut a child in."""

    wrapper: Wrapper

    @classmethod
    def available(cls) -> list[Sandbox]:
        """What works here, the strongest first; found by trying. The last, resource limits, always does."""
        return [sandbox for sandbox in (cls("bubblewrap"), cls("namespaces")) if sandbox._works()] + [cls("limits")]

    @classmethod
    def choose(cls, isolation: Isolation) -> Sandbox:
        """The best there is; for `none` resource limits. Raises `RunError` where `required` cannot be had."""
        best = cls("limits") if isolation == "none" else cls.available()[0]
        if isolation == "required" and not best.cuts_network:
            raise RunError(
                "isolation is required, but neither bubblewrap nor namespaces work here, so the trainer would have a "
                'network: install bubblewrap (apt install bubblewrap), allow user namespaces, or set isolation = "auto"'
            )
        return best

    @property
    def cuts_network(self) -> bool:
        return self.wrapper != "limits"

    def command(
        self,
        argv: Sequence[str],
        *,
        readable: Sequence[Path] = (),
        hidden: Sequence[Path] = (),
        memory_bytes: int | None = None,
    ) -> list[str]:
        """`argv` (its first an absolute path), wrapped. Run it with `environment`, and with descriptors 0 to 2 alone.

        Nothing can be written but a fresh /tmp. `readable` files and folders stay where they are even below /tmp;
        `hidden` folders are empty, also within a readable one. `memory_bytes` limits the address space: leave it
        out with CUDA, which reserves more than it uses. Raises `RunError` for a path that is not there.
        """
        own = [Path(sys.prefix), Path(sys.base_prefix), ROOT]
        shown = sorted({_existing(path, "shown to") for path in (*own, *readable)})
        masks = sorted({_existing(path, "hidden from") for path in hidden})
        masks = [
            path for path in masks if not any(Path(path).is_relative_to(other) for other in masks if other != path)
        ]
        settings = {
            "namespaces": self.wrapper == "namespaces",
            "readable": shown,
            "hidden": masks,
            "memory_bytes": memory_bytes,
        }
        inner = [sys.executable, "-P", "-m", "client.shut_in", json.dumps(settings), *argv]
        if self.wrapper != "bubblewrap":
            return inner
        program = shutil.which("bwrap")
        if program is None:
            raise RunError("bubblewrap is not installed here (apt install bubblewrap)")
        arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/", "/"]
        arguments += ["--proc", "/proc", "--dev", "/dev"]
        for node in gpu_nodes():
            arguments += ["--dev-bind-try", node, node]
        for folder in MASKED:
            arguments += ["--tmpfs", folder] if os.path.isdir(folder) else []
        for path in shown:
            arguments += ["--ro-bind", path, path]
        for path in masks:
            arguments += ["--tmpfs", path, "--remount-ro", path]
        return [program, *arguments, "--chdir", "/", "--", *inner]

    def _works(self) -> bool:
        # Not /bin/true: it has to be this interpreter that starts.
        try:
            command = self.command([sys.executable, "-S", "-c", "pass"])
            trial = subprocess.run(
                command, env=environment(), cwd="/", stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_S
            )
        except (RunError, OSError, subprocess.TimeoutExpired):
            return False
        return trial.returncode == 0


def environment(
    code: Path | None = None, *, models: Path | None = None, parent: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The child's whole environment: of the parent's what finds programs, languages and GPUs, none of its secrets.

    `code` is the folder of a task of the site's own, `models` that of its pre-trained checkpoints.
    """
    kept = {key: value for key, value in parent.items() if key in _KEPT or key.startswith(_KEPT_PREFIXES)}
    # An installed package is found anyway; named here it would come before the standard library.
    folders = [] if ROOT.name in ("site-packages", "dist-packages") else [str(ROOT)]
    folders += [] if code is None else [str(code.resolve())]
    # Unbuffered: the last words of a child that dies would be lost.
    python = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    # No library should look for a network that is not there.
    offline = {"HF_HUB_OFFLINE": "1"} | ({MODELS: str(models.resolve())} if models is not None else {})
    return {**kept, "HOME": "/tmp", **offline, **python}


def _existing(path: Path, what: str) -> str:
    # A folder that is made later would not be covered.
    if not path.exists():
        raise RunError(f"{path}: no such file or folder, but it is to be {what} the trainer; check the site's folder")
    return str(path.resolve())

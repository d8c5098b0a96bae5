"""What this machine offers a site: facts for `client.doctor`, each measured when it is asked for. No judgement here."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from client.sandbox import Sandbox, Wrapper, environment
from client.shut_in import gpu_nodes
from privacy.errors import DataError, RunError

_CGROUP = Path("/sys/fs/cgroup")
# In a process of its own: torch and pandas stay out of this one, and what breaks there breaks nothing here.
_GPUS = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps([torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else []))
"""
_SHAPE = """
import json, sys
path = sys.argv[1]
rows = columns = 0
try:
    if path.endswith((".parquet", ".pq")):
        import pyarrow.parquet
        with pyarrow.parquet.ParquetFile(path) as file:
            rows, columns = file.metadata.num_rows, len(file.schema_arrow.names)
    else:
        import pandas
        with pandas.read_csv(path, dtype=str, chunksize=100_000, skipinitialspace=True) as chunks:
            for chunk in chunks:
                rows, columns = rows + len(chunk), len(chunk.columns)
    print(json.dumps([rows, columns]))
except ModuleNotFoundError:
    raise
except (ValueError, OSError) as error:
    # Never its words: the parser's quote the line that it stumbled over.
    print(json.dumps(type(error).__name__))
"""


class Machine:
    """The machine that this process runs on."""

    def free_bytes(self, folder: Path) -> int:
        """Free disk space for this user where `folder` is."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def is_writable(self, path: Path) -> bool:
        """Whether this user may write there; nothing is written to find out."""
        return os.access(path, os.W_OK)

    def is_readable(self, path: Path) -> bool:
        return os.access(path, os.R_OK)

    def memory_bytes(self) -> int:
        """Memory that a new program could take: the machine's, or less where a container or service has a limit."""
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        available = [kib["MemAvailable"] * 1024]
        try:
            most, used = ((_CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
            available.append(int(most) - int(used))
        except (OSError, ValueError):  # No cgroup of the second version here, or no limit ("max").
            pass
        return max(0, min(available))

    def open_files(self) -> int:
        """How many files and connections a process may have open."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def gpu_nodes(self) -> list[str]:
        return gpu_nodes()

    def gpus(self) -> list[str]:
        """The names of the GPUs that torch can use. Raises `RunError` where torch does not start."""
        found = _printed(_GPUS, timeout_s=120)
        if not isinstance(found, list):
            raise RunError("torch cannot be imported by this Python")
        return [str(name) for name in found]

    def wrapper(self) -> Wrapper:
        """The strongest isolation that works for the trainer, found by trying."""
        return Sandbox.available()[0].wrapper

    def table_shape(self, path: Path) -> tuple[int, int]:
        """Rows and columns of a CSV or Parquet file, read whole in a process of its own. Raises `DataError`."""
        found = _printed(_SHAPE, str(path), timeout_s=120)
        match found:
            case [int(rows), int(columns)]:
                return rows, columns
            case str(kind):
                raise DataError(f"{path}: cannot be read as {path.suffix or 'CSV'} ({kind})")
        raise DataError(f"{path}: could not be read within two minutes, or pandas does not start here")

    def nodes_of(self, folder: Path) -> list[int]:
        """The processes that serve this site's folder now, as far as this user may see them."""
        return sorted(_nodes_of(folder.resolve()))


def _printed(program: str, *arguments: str, timeout_s: float) -> object:
    """What a Python program prints as its last line, parsed; None where it does not get so far."""
    command = [sys.executable, "-P", "-c", program, *arguments]
    try:
        done = subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
        found: object = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    return found


def _nodes_of(folder: Path) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            # `python -m client.node FOLDER`, a relative one as seen from where it was started.
            if (
                words[1:3] == ["-m", "client.node"]
                and (Path(os.readlink(entry / "cwd")) / words[3]).resolve() == folder
            ):
                yield int(entry.name)
        except (OSError, UnicodeDecodeError, IndexError):
            continue  # It has ended, or is another user's.

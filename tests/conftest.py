"""Tests write to memory where there is enough of it: most of the wait for a disk is over files that are synced to it.

What is synced there survives `kill -9` as it does on a disk, and no test takes the power away. Set TMPDIR to choose
another folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

MEMORY, ENOUGH = Path("/dev/shm"), 2**31


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Generator[None, object, object]:
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < ENOUGH:
        return (yield)
    with tempfile.TemporaryDirectory(prefix="fedchorus-tests-", dir=MEMORY) as folder:
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
        return (yield)

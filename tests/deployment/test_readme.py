"""The README's section "Deploy" works as it stands, from a folder with nothing but the examples."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def commands() -> str:
    section = re.search(r"^## Deploy\n(.*?)^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    return "\n".join(line[4:] for line in section.group(1).splitlines() if line.startswith("    "))


def test_the_section_has_the_whole_way_from_two_kits_to_a_model() -> None:
    for step in ("provision", "enrol", "sign", "accept", "server", "client", "doctor", "submit", "fetch", "budget"):
        assert f"fedchorus {step}" in commands()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_commands_train_a_model_on_three_sites(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    federation = tmp_path / "examples" / "deploy" / "federation.toml"
    federation.write_text(federation.read_text().replace("9443", str(port)))
    # Its last line ends what it started by name: here by folder, so that no other federation is touched.
    script = (
        commands().replace("site/", f"{tmp_path}/site/").replace("pkill -f 'fedchorus (server|client) ", "pkill -f '")
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
    finally:
        subprocess.run(["pkill", "-f", f"{tmp_path}/site/"], check=False)
    assert (tmp_path / "model.safetensors").stat().st_size > 0, done.stdout[-3000:]
    assert "state finished" in done.stdout
    for name in ("north", "south", "west"):
        assert list((tmp_path / "site" / name / "state" / "jobs").glob("*/report.json"))

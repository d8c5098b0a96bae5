"""What the images hold and how they are run, read from the files; what each role's code can do, by running it.

The images themselves are built by hand: no registry and no Docker engine is there for tests.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from client import shut_in

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
CODE = {"privacy", "strategies", "server", "client", "simulations"}
ROLES = {"auditor": {"privacy"}, "server": CODE - {"client", "simulations"}, "client": CODE - {"server", "simulations"}}
COMMANDS = {"auditor": "audit", "server": "submit", "client": "enrol"}


def stages() -> dict[str, tuple[str, list[str]]]:
    """Each stage of the Dockerfile: what it begins from, and its instructions, each in one line."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    found: dict[str, tuple[str, list[str]]] = {}
    name = ""
    for line in (line for line in text.splitlines() if line and not line.startswith("#")):
        if line.startswith("FROM"):
            _, base, _, name = line.split()
            found[name] = (base, [])
        elif name:
            found[name][1].append(line)
    return found


def lineage(name: str) -> list[str]:
    """All instructions that are in the layers of the image `name`."""
    base, own = stages()[name]
    return [*(lineage(base) if base in stages() else []), *own]


def copied(instructions: list[str]) -> set[str]:
    return {line.split()[1] for line in instructions if line.startswith("COPY") and "--from" not in line}


COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SITES = ("north", "south", "west")


@pytest.mark.parametrize("role", ROLES)
def test_an_image_holds_the_code_of_its_role_alone(role: str) -> None:
    assert copied(stages()[f"{role}-code"][1]) & CODE == ROLES[role]
    sources = {line.split("=")[1].split()[0] for line in lineage(role) if line.startswith("COPY --from")}
    assert f"{role}-code" in sources
    assert sources <= {"core-packages", "torch-packages", f"{role}-code"}
    assert ("torch-packages" in sources) == (role == "client")
    assert not copied(lineage(role)) & CODE


@pytest.mark.parametrize("image", ["auditor", "server", "client", "researcher", "example"])
def test_what_is_shipped_runs_as_nobody_and_has_no_build_argument_in_its_layers(image: str) -> None:
    instructions = lineage(image)
    assert [line for line in instructions if line.startswith("USER")][-1] == "USER 10001:10001"
    # An argument of a stage is written into the history of its layers.
    assert not [line for line in instructions if line.startswith("ARG")]
    assert not [line for line in instructions if "pip" in line.split() or "apt-get" in line]


def test_nothing_reaches_the_builder_that_was_not_named() -> None:
    first, *rest = (ROOT / ".dockerignore").read_text().splitlines()
    assert first == "*"
    needed = set().union(*(copied(own) for _, own in stages().values())) | {"README.md", "LICENSE", "fedchorus.py"}
    assert needed <= {line.removeprefix("!").rstrip("/") for line in rest}


@pytest.mark.parametrize("role", ROLES)
def test_the_code_of_a_role_is_enough_for_its_commands_and_offers_no_others(role: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "fedchorus.py", tmp_path)
    for package in ROLES[role]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    # The development installation must not lend what is missing.
    start = (
        f"import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in repr(one)]; "
        f"sys.path = [{str(tmp_path)!r}, *(one for one in sys.path if one not in ('', {str(ROOT)!r}))]; "
        "sys.argv[0] = 'fedchorus'; import fedchorus; fedchorus.main()"
    )

    def fedchorus(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", start, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    offered = set(re.findall(r"^  ([a-z]+)  ", fedchorus("--help").stdout, flags=re.MULTILINE))
    assert {COMMANDS[role], "audit"} <= offered
    assert not offered & {command for other, command in COMMANDS.items() if other not in (role, "auditor")}
    assert not offered & {"simulate", "plan"}
    shown = fedchorus(COMMANDS[role], "--help")
    assert shown.returncode == 0, shown.stderr
    if role == "server":
        refused = fedchorus("submit", str(ROOT / "examples" / "deploy" / "job.toml"), "--operator", "none.json")
        assert refused.returncode == 1
        assert "--model" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_every_service_is_shut_in() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not {"privileged", "cap_add", "devices", "pid", "user", "ports"} & set(service), name


def test_sites_share_no_network_with_each_other_and_no_volume_with_anybody_who_stays() -> None:
    assert all(network["internal"] for network in COMPOSE["networks"].values())
    staying = [name for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"]
    assert set(staying) == {"server", *SITES}
    for site in SITES:
        assert SERVICES[site]["networks"] == [site]
        volumes = {volume.split(":")[0] for volume in SERVICES[site]["volumes"]}
        assert volumes == {site, f"{site}-data"}
        for other in (name for name in SERVICES if name not in (site, "setup")):
            assert not volumes & {volume.split(":")[0] for volume in SERVICES[other]["volumes"]}
        assert f"{site}-data:/srv/data:ro" in SERVICES[site]["volumes"]
    assert set(SERVICES["server"]["networks"]) == {*SITES, "operator"}
    assert SERVICES["job"]["networks"] == ["operator"]


def test_the_setup_writes_where_the_volumes_are_and_the_image_has_their_folders() -> None:
    made = " ".join(stages()["example"][1]) + " ".join(stages()["plain"][1])
    for volume in SERVICES["setup"]["volumes"]:
        name, target = volume.split(":")
        assert target == f"/srv/{name}"
        assert re.search(rf"(/srv/| ){name}\b", made), name
    script = (DOCKER / "example.sh").read_text()
    assert f"for site in {' '.join(SITES)}; do" in script
    assert subprocess.run(["sh", "-n", str(DOCKER / "example.sh")], check=False).returncode == 0


PROFILE: dict[str, Any] = json.loads((DOCKER / "seccomp-client.json").read_text())


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for rule in PROFILE["syscalls"] if name in rule["names"] and rule["action"] == "SCMP_ACT_ALLOW"]


def test_the_profile_allows_the_one_unshare_that_shutting_in_makes() -> None:
    kinds = 0
    for kind in ("NEWNS", "NEWUTS", "NEWIPC", "NEWUSER", "NEWPID", "NEWNET"):
        kinds |= getattr(shut_in, f"_{kind}")
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"
    assert [rule["args"] for rule in rules("unshare")] == [[{"index": 0, "value": kinds, "op": "SCMP_CMP_EQ"}]]
    (clone,) = rules("clone")
    (argument,) = clone["args"]
    assert argument["op"] == "SCMP_CMP_MASKED_EQ"
    assert argument["valueTwo"] == 0
    assert argument["value"] & kinds == kinds
    assert rules("mount")
    assert rules("mount_setattr")


FORBIDDEN = """
    bpf clone3 delete_module finit_module fsmount init_module io_uring_setup ioperm kexec_load keyctl move_mount
    open_by_handle_at perf_event_open pidfd_getfd pivot_root process_vm_readv process_vm_writev ptrace reboot setns
    swapon syslog umount2 userfaultfd
"""


@pytest.mark.parametrize("call", FORBIDDEN.split())
def test_the_profile_forbids_what_reaches_into_others_or_the_kernel(call: str) -> None:
    assert not rules(call)


def test_the_client_service_has_what_isolation_needs_and_nobody_else_has() -> None:
    for name, service in SERVICES.items():
        more = set(service["security_opt"]) - {"no-new-privileges:true"}
        expected = {"seccomp=seccomp-client.json", "apparmor=unconfined", "systempaths=unconfined"}
        assert more == (expected if name in SITES else set()), name


@contextmanager
def answering(status: int) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(b"waiting for the coordinator")

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def health(role: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", str(DOCKER / "health.py"), role, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(("status", "code", "said"), [(200, 0, ""), (503, 1, "503: waiting for the coordinator")])
def test_a_client_is_well_when_its_health_endpoint_says_so(status: int, code: int, said: str, tmp_path: Path) -> None:
    with answering(status) as port:
        (tmp_path / "site.toml").write_text(f'[health]\nlisten = "0.0.0.0:{port}"\n')
        found = health("client", tmp_path)
    assert found.returncode == code
    assert found.stderr.strip() == said


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("site.toml", "[health]\n", "write listen ="),
        ("site.toml", '[health]\nlisten = "127.0.0.1:1"\n', "no answer:"),
        ("site.toml", "[health", "no answer:"),
        ("other.toml", "", "no answer:"),
    ],
)
def test_a_check_that_cannot_be_made_fails_in_one_line(file: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    found = health("client", tmp_path)
    assert found.returncode == 1
    assert said in found.stderr
    assert len(found.stderr.splitlines()) == 1

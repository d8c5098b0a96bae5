"""What operators install fits what the programs do: systemd's units, Prometheus' configuration, Grafana's dashboard."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import fedchorus
from client.health import Status
from privacy.supervisor import NEEDS_A_PERSON
from server.metrics import render

DOCKER = Path(__file__).resolve().parents[2] / "docker"
UNITS = {name: DOCKER / "systemd" / name for name in ("fedchorus-server.service", "fedchorus-client@.service")}
DASHBOARD = json.loads((DOCKER / "grafana" / "fedchorus.json").read_text())
PROMETHEUS = (DOCKER / "prometheus" / "fedchorus.yml").read_text()
METRIC = re.compile(r"\bfedchorus_\w+")
# Each would keep the client from shutting its trainer in, or the trainer from its GPU.
NOT_AT_THE_CLIENT = {
    "RestrictNamespaces", "ProtectProc", "ProcSubset", "ProtectHostname", "ProtectKernelTunables",
    "ProtectKernelLogs", "PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute",
    "SystemCallFilter", "PrivateUsers", "PrivateNetwork",
}  # fmt: skip


def service(name: str) -> dict[str, str]:
    unit = configparser.RawConfigParser()  # Strict: a key that is given twice would be an error.
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNITS[name])
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    return dict(unit["Service"])


def rendered() -> dict[str, set[str]]:
    """The labels of each metric that the server and a client show."""
    sites = {"north": {"online": True, "activations": 2}}
    last = {"contributors": ["north"], "failures": {"south": "late"}, "training_loss": None, "seconds": 1.5}
    job = {"id": "job-1", "state": "running", "rounds": 1, "of": 5, "last": last}
    status = Status("north")
    status.certificate_until = 0.0
    text = render(sites, [job], restarts=1, started=0.0) + status.metrics().decode()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(fedchorus_\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def queries() -> list[tuple[str, str]]:
    """Every query of the dashboard, with the legend that shows its labels."""
    panels = [(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [(str(v["definition"]), "") for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return panels + variables


class TestUnits:
    @pytest.mark.parametrize("name", UNITS)
    def test_restart_whatever_ends_but_what_a_person_has_to_mend(self, name: str) -> None:
        found = service(name)
        assert found["Restart"] == "always"
        assert found["RestartPreventExitStatus"] == str(NEEDS_A_PERSON)
        assert found["KillMode"] == "mixed"

    @pytest.mark.parametrize("name", UNITS)
    def test_give_no_more_than_a_user_s_own_folder(self, name: str) -> None:
        found = service(name)
        assert found["User"] == found["Group"] == "fedchorus"
        assert found["ProtectSystem"] == "strict"
        assert found["ReadWritePaths"].startswith("/var/lib/fedchorus")
        assert found["UMask"] == "0077"
        assert found["CapabilityBoundingSet"] == ""
        for wall in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "LockPersonality", "RestrictSUIDSGID"):
            assert found[wall] == "yes"

    def test_of_the_client_let_it_make_namespaces_and_use_a_gpu(self) -> None:
        found = service("fedchorus-client@.service")
        assert NOT_AT_THE_CLIENT & set(found) == set()
        assert "AF_NETLINK" in found["RestrictAddressFamilies"]  # bubblewrap's own loopback needs it.
        assert found["ReadWritePaths"] == "/var/lib/fedchorus/%i"

    def test_of_the_server_has_the_walls_that_it_can_do_with(self) -> None:
        found = service("fedchorus-server.service")
        for wall in ("RestrictNamespaces", "PrivateDevices", "ProtectKernelTunables", "ProtectClock"):
            assert found[wall] == "yes"
        assert found["SystemCallFilter"] == "@system-service"

    @pytest.mark.parametrize("name", UNITS)
    def test_call_a_command_that_there_is_with_the_options_that_it_has(self, name: str) -> None:
        words = service(name)["ExecStart"].split()
        assert Path(words[0]).name == "fedchorus"
        commands = typer.main.get_command(fedchorus.app)
        command = commands.commands[words[1]]  # type: ignore[attr-defined]
        with command.make_context(words[1], words[2:]) as context:
            assert context.params["folder"] == words[2]
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--passphrase-file" in options
        assert "--passphrase-file %d/passphrase" in UNITS[name].read_text()
        assert isinstance(command, click.Command)

    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
    def test_are_units_to_systemd_itself(self, tmp_path: Path) -> None:
        for name, path in UNITS.items():
            text = path.read_text().replace("/opt/fedchorus/bin/fedchorus", "/bin/true")
            (tmp_path / name).write_text(text)
        found = subprocess.run(
            ["systemd-analyze", "verify", *(str(tmp_path / name) for name in UNITS)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (found.returncode, found.stderr) == (0, "")


class TestDashboard:
    def test_asks_only_for_metrics_and_labels_that_there_are(self) -> None:
        known = rendered()
        for query, legend in queries():
            asked = set(METRIC.findall(query))
            assert asked, query
            assert asked <= set(known), query
            labels = set(re.findall(r"(\w+)=~?\"\$", query)) | set(re.findall(r"\{\{(\w+)\}\}", legend))
            labels |= set(re.findall(r"by \((\w+)\)", query)) | set(re.findall(r"label_values\(.*, (\w+)\)", query))
            for metric in asked:
                assert labels <= known[metric], query

    def test_shows_every_metric_that_there_is(self) -> None:
        assert {metric for query, _ in queries() for metric in METRIC.findall(query)} == set(rendered())

    @pytest.mark.parametrize(
        "metric",
        [
            "site_online", "job_rounds_planned", "job_round_seconds", "job_round_failures", "serverapp_restarts",
            "client_certificate_seconds", "client_rounds_answered", "client_refusals",
        ],
    )  # fmt: skip
    def test_has_a_panel_for_what_an_operator_watches(self, metric: str) -> None:
        asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
        assert any(f"fedchorus_{metric}" in METRIC.findall(query) for query in asked)

    def test_can_be_imported_with_whatever_data_source_there_is(self) -> None:
        variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
        assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
        chosen = {"type": "prometheus", "uid": "${datasource}"}
        for panel in DASHBOARD["panels"]:
            assert panel["datasource"] == chosen
            assert all(target["datasource"] == chosen for target in panel["targets"])
            used = {name for target in panel["targets"] for name in re.findall(r'"\$(\w+)"', target["expr"])}
            assert used <= set(variables)
        assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])

    def test_s_panels_stand_side_by_side(self) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in DASHBOARD["panels"]:
            grid: dict[str, Any] = panel["gridPos"]
            cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
            assert not cells & taken, panel["title"]
            assert grid["x"] + grid["w"] <= 24
            taken |= cells


class TestPrometheus:
    def test_keeps_the_label_job_of_the_server_s_own_series(self) -> None:
        server, client = PROMETHEUS.split("  - job_name: ")[1:]
        assert any("job" in labels for metric, labels in rendered().items() if "_client_" not in metric)
        assert "honor_labels: true" in server
        assert "scheme: https" in server
        assert not any("job" in labels for metric, labels in rendered().items() if "_client_" in metric)
        assert "honor_labels" not in client

    def test_names_settings_that_there_are(self) -> None:
        from client.settings import Health
        from server.provision import ServerSettings

        assert "public_metrics = true" in PROMETHEUS
        assert "public_metrics" in ServerSettings.model_fields
        assert "`[health] listen`" in PROMETHEUS
        assert "listen" in Health.model_fields

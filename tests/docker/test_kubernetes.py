"""The Kubernetes files: what they promise of isolation, and their form where tools are there to check it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

KUSTOMIZE = Path(__file__).parents[2] / "docker" / "kustomize"
ROLES = ("server", "client")
PORT = 9443


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def one(role: str, kind: str) -> dict[str, Any]:
    found = [item for path in (KUSTOMIZE / role).glob("*.yaml") for item in documents(path) if item["kind"] == kind]
    assert len(found) == 1
    return found[0]


def pod(role: str) -> dict[str, Any]:
    spec: dict[str, Any] = one(role, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def containers(role: str) -> list[dict[str, Any]]:
    return [*pod(role)["initContainers"], *pod(role)["containers"]]


@pytest.mark.parametrize("role", ROLES)
def test_pods_meet_the_restricted_standard(role: str) -> None:
    spec = pod(role)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in containers(role):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["image"] == f"fedchorus-{role}"


@pytest.mark.parametrize("role", ROLES)
def test_keys_keep_their_mode_and_state_is_on_a_volume_of_its_own(role: str) -> None:
    assert pod(role)["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    (claim,) = one(role, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert one(role, "StatefulSet")["spec"]["replicas"] == 1
    for container in containers(role):
        named = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert named[claim["metadata"]["name"]]["mountPath"] == container["workingDir"] == "/srv/volume"
        writable = {name for name, mount in named.items() if not mount.get("readOnly")}
        assert writable == {claim["metadata"]["name"], "tmp"}


@pytest.mark.parametrize("role", ROLES)
def test_a_network_policy_covers_the_pods_in_both_directions(role: str) -> None:
    policy, template = one(role, "NetworkPolicy")["spec"], one(role, "StatefulSet")["spec"]["template"]
    assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_the_server_is_called_on_one_port_and_calls_nobody() -> None:
    policy = one("server", "NetworkPolicy")["spec"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"port": PORT, "protocol": "TCP"}]}]


def dns() -> dict[str, Any]:
    return {
        "to": [
            {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
                "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
            }
        ],
        "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
    }


def check_client_policy(policy: dict[str, Any], cidr: str) -> None:
    assert policy["ingress"] == []
    server, names = policy["egress"]
    assert server == {"to": [{"ipBlock": {"cidr": cidr}}], "ports": [{"port": PORT, "protocol": "TCP"}]}
    assert names == dns()


def test_a_site_calls_the_coordinator_and_dns_and_is_called_by_nobody() -> None:
    check_client_policy(one("client", "NetworkPolicy")["spec"], "192.0.2.1/32")


@pytest.mark.parametrize("role", ROLES)
def test_probes_ask_ports_that_are_there_and_losing_the_coordinator_restarts_nobody(role: str) -> None:
    (container,) = pod(role)["containers"]
    ports = {port["name"] for port in container["ports"]}
    for name in ("readinessProbe", "livenessProbe"):
        kind = "httpGet" if "httpGet" in container[name] else "tcpSocket"
        assert container[name][kind]["port"] in ports
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    # A site's /health answers 503 while it waits for the coordinator.
    assert ("tcpSocket" in container["livenessProbe"]) == (role == "client")


def test_no_file_holds_a_secret() -> None:
    for path in KUSTOMIZE.glob("**/*.yaml"):
        assert not [item for item in documents(path) if item["kind"] == "Secret"], path
        assert "secretGenerator" not in path.read_text(), path


def built(overlay: str) -> str:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [program, "kustomize", str(KUSTOMIZE / "example" / overlay)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_build_and_keep_the_policies_as_they_are() -> None:
    assert "LoadBalancer" in built("coordinator")
    north = {item["kind"]: item for item in yaml.safe_load_all(built("north"))}
    check_client_policy(north["NetworkPolicy"]["spec"], "203.0.113.10/32")
    spec = north["StatefulSet"]["spec"]["template"]["spec"]
    assert spec["hostUsers"] is False
    assert spec["containers"][0]["securityContext"]["seccompProfile"]["localhostProfile"] == "fedchorus-client.json"
    assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("overlay", ["coordinator", "north"])
@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_kubernetes_own_schemas_accept_the_examples(overlay: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for item in yaml.safe_load_all(built(overlay)):
        validator.validate(item, version, strict=True)

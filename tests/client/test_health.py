"""A site's health endpoint says whether it works, to its own monitoring, and nothing about records."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from client.health import CONTENT_TYPE, HealthServer, Status
from privacy.errors import RunError


def free_port(family: socket.AddressFamily = socket.AF_INET, host: str = "127.0.0.1") -> int:
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def status() -> Status:
    return Status("north")


@pytest.fixture
def health(status: Status) -> Iterator[HealthServer]:
    server = HealthServer(f"127.0.0.1:{free_port()}", status)
    yield server
    server.close()


def get(health: HealthServer, path: str, *, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(host, health.port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("content-type", ""), answer.read()
    finally:
        connection.close()


def value(status: Status, metric: str) -> float:
    found = re.search(rf'^fedchorus_client_{metric}\{{site="north"\}} (\S+)$', status.metrics().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


class TestStatus:
    def test_is_well_only_while_connected(self, status: Status, health: HealthServer) -> None:
        for state, code in (("starting", 503), ("waiting", 503), ("connected", 200), ("waiting", 503)):
            if state != "starting":
                status.say(state, "because")
            found, kind, body = get(health, "/health")
            assert (found, kind) == (code, "application/json")
            assert json.loads(body)["state"] == state
            assert value(status, "connected") == (code == 200)

    def test_says_since_when_and_why(self, status: Status) -> None:
        status.since -= 100
        status.say("waiting", "the server is away")
        status.since -= 50
        status.say("waiting", "for south to accept the roster")
        found = status.health()
        assert (found["site"], found["why"]) == ("north", "for south to accept the roster")
        assert 50 <= float(str(found["seconds"])) < 60  # The same state since then, whatever the reason.

    def test_counts_a_message_while_and_after_it_is_worked_on(self, status: Status) -> None:
        with status.busy(answered=lambda: 3, refused=lambda: 2):
            assert (value(status, "working"), value(status, "messages")) == (1, 1)
            assert value(status, "rounds_answered") == 0
        assert (value(status, "working"), value(status, "messages")) == (0, 1)
        assert (value(status, "rounds_answered"), value(status, "refusals")) == (3, 2)

    def test_is_not_at_work_after_an_error(self, status: Status) -> None:
        with pytest.raises(ZeroDivisionError), status.busy(answered=lambda: 1, refused=lambda: 0):
            raise ZeroDivisionError
        assert (value(status, "working"), value(status, "rounds_answered")) == (0, 1)

    def test_says_how_long_the_certificate_lasts_once_it_was_read(self, status: Status) -> None:
        assert "fedchorus_client_certificate_seconds{" not in status.metrics().decode()
        status.certificate_until = time.time() + 1000
        assert 990 < value(status, "certificate_seconds") <= 1000
        status.certificate_until = time.time() - 5
        assert value(status, "certificate_seconds") < 0

    def test_shows_fixed_names_and_the_site_alone(self, status: Status) -> None:
        status.certificate_until = time.time()
        lines = status.metrics().decode().splitlines()
        samples = [line for line in lines if not line.startswith("#")]
        assert all(re.fullmatch(r'fedchorus_client_\w+\{site="north"\} \S+', line) for line in samples)
        assert len(samples) == 6


class TestServer:
    def test_shows_metrics_in_prometheus_text_form(self, status: Status, health: HealthServer) -> None:
        code, kind, body = get(health, "/metrics")
        assert (code, kind) == (200, CONTENT_TYPE)
        assert b'fedchorus_client_connected{site="north"} 0.0\n' in body

    @pytest.mark.parametrize(
        ("method", "path", "code"), [("GET", "/", 404), ("GET", "/health/../keys", 404), ("POST", "/health", 501)]
    )
    def test_has_nothing_else(self, health: HealthServer, method: str, path: str, code: int) -> None:
        found, _, body = get(health, path, method=method)
        assert found == code
        assert b"north" not in body

    def test_answers_others_while_one_says_nothing(self, health: HealthServer) -> None:
        with socket.create_connection(("127.0.0.1", health.port)) as idle:
            assert get(health, "/health")[0] == 503
            idle.sendall(b"GET")

    def test_frees_its_port_and_its_thread_when_closed(self, status: Status) -> None:
        before = threading.active_count()
        server = HealthServer(f"127.0.0.1:{free_port()}", status)
        server.close()
        assert threading.active_count() == before
        with pytest.raises(ConnectionRefusedError):
            get(server, "/health")
        HealthServer(f"127.0.0.1:{server.port}", status).close()

    @pytest.mark.parametrize("host", ["192.0.2.1", "127.0.0.1", "no-such-host.invalid"])
    def test_that_cannot_listen_says_where_and_what_to_do(self, status: Status, host: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"{host}:{taken.getsockname()[1]}"
            with pytest.raises(RunError, match=rf"cannot listen on {listen} \(.+\); give \[health\] listen"):
                HealthServer(listen, status)

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
    def test_listens_on_ipv6_too(self, status: Status) -> None:
        try:
            port = free_port(socket.AF_INET6, "::1")
        except OSError:
            pytest.skip("no IPv6 here")
        server = HealthServer(f"[::1]:{port}", status)
        try:
            assert get(server, "/health", host="::1")[0] == 503
        finally:
            server.close()

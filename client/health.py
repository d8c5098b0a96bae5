"""A site's health endpoint and metrics, for its own monitoring: /health and /metrics (Prometheus' text format).

It says whether the node is connected, how much it answered and refused and until when its certificate lasts: nothing
about records, losses or updates.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from privacy.enrolment import split_address
from privacy.errors import RunError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Status:
    """What the node does now; written by its loop, read by the endpoint."""

    def __init__(self, site: str) -> None:
        self.site, self.state, self.why, self.since = site, "starting", "", time.time()
        self.certificate_until: float | None = None  # Until it was read.
        self.no_renewal_before = 0.0
        self.answered = self.refused = self.messages = 0
        self.working = False

    def say(self, state: str, why: str = "") -> None:
        if state != self.state:
            self.since = time.time()
        self.state, self.why = state, why

    @contextmanager
    def busy(self, *, answered: Callable[[], int], refused: Callable[[], int]) -> Iterator[None]:
        """Mark one message's work; afterwards ask how many rounds were answered and refused."""
        self.working, self.messages = True, self.messages + 1
        try:
            yield
        finally:
            self.working, self.answered, self.refused = False, answered(), refused()

    def health(self) -> dict[str, object]:
        return {"site": self.site, "state": self.state, "why": self.why, "seconds": round(time.time() - self.since, 1)}

    def metrics(self) -> bytes:
        registry, until = CollectorRegistry(), self.certificate_until
        left = None if until is None else until - time.time()
        for name, text, value in (
            ("connected", "1 while the node is connected to the coordinator", self.state == "connected"),
            ("working", "1 while a message is being answered", self.working),
            ("messages", "Messages received since the start", self.messages),
            ("rounds_answered", "Rounds answered since the start", self.answered),
            ("refusals", "Offers and rounds refused since the start", self.refused),
            ("certificate_seconds", "Seconds until the site's certificate ends", left),
        ):
            gauge = Gauge(f"fedchorus_client_{name}", text, ["site"], registry=registry)
            if value is not None:
                gauge.labels(self.site).set(float(value))
        rendered: bytes = generate_latest(registry)
        return rendered


class HealthServer:
    """Serves `status` on `listen` ("host:port") in a thread of its own, until `close`.

    Raises `RunError` where nothing can listen there.
    """

    def __init__(self, listen: str, status: Status) -> None:
        host, port = split_address(listen)

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path == "/health":
                    code = 200 if status.state == "connected" else 503
                    self._send(code, "application/json", json.dumps(status.health()).encode())
                elif self.path == "/metrics":
                    self._send(200, CONTENT_TYPE, status.metrics())
                else:
                    self._send(404, "text/plain", b"/health or /metrics\n")

            def _send(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: who looks at the health is no event."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise RunError(
                f"health endpoint: cannot listen on {listen} ({error.strerror}); give [health] listen in site.toml "
                "another address of this machine or another port"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

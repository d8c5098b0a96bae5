"""The server as a Flower ServerApp: hands the round loop a transport over Flower's grid."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.transport import FlowerTransport


def make_server_app(run: Callable[[FlowerTransport], None], *, timeout_s: float) -> ServerApp:
    """A ServerApp that calls `run` once with a transport; `run` finds the sites and drives the rounds."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(FlowerTransport(grid, timeout_s=timeout_s))

    return app

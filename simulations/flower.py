"""The flower engine: the same server and clients as a ServerApp and a ClientApp in Flower's simulation runtime.

Flower's runtime is Ray actors, each a process of its own that loads the federation once. It takes ten seconds or so
to start; it is here because it is the road to a Ray cluster, and the proof that nothing depends on the inline engine.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from client.secure import InFile, Stopwatch
from client.site import Seat, SitePlan
from privacy.errors import FedchorusError, RunError
from privacy.secagg.roster import Roster
from simulations.faults import Handler
from simulations.federation import Federation
from simulations.run_folder import RunFolder

if TYPE_CHECKING:
    from flwr.app import Context

    from server.transport import FlowerTransport

TIMEOUT_S = 600.0


def run_on_flower(run: Path, sites: int, drive: Callable[[FlowerTransport], None], *, timeout_s: float) -> None:
    """Start Flower's simulation runtime with one node per site, call `drive` as its ServerApp, and shut it down.

    `timeout_s` ends the wait for a round's answers. What `drive` raises is raised here: Flower would only log it.
    """
    # Read by flwr and ray when they are imported: nothing leaves this machine.
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    import ray  # noqa: F401 (named first: Flower's own message about its absence is less kind)
    from flwr.simulation import run_simulation

    from client.app import make_client_app
    from server.app import make_server_app

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    outcome: list[FedchorusError | None] = []

    def guarded(transport: FlowerTransport) -> None:
        try:
            drive(transport)
            outcome.append(None)
        except FedchorusError as error:
            outcome.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=make_server_app(guarded, timeout_s=timeout_s),
            client_app=make_client_app(partial(_client_of, str(run.resolve()))),
            num_supernodes=sites,
            backend_config={
                "init_args": {"logging_level": "error", "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    if not outcome:
        raise RunError("Flower's runtime ended before the rounds did")
    if outcome[0] is not None:
        raise outcome[0]


def _client_of(run: str, context: Context) -> Handler:
    return _open_client(run, int(context.node_config["partition-id"]))


@cache
def _open_client(run: str, number: int) -> Handler:
    folder, federation, plans = _open_federation(run)
    name = federation.names[number]
    files, seat = folder.files_of(name), None
    if federation.secure is not None:
        roster = Roster.load(folder.participants)
        roster.check(None)
        # Each message may find another process: a session's secrets lie in the site's own folder meanwhile.
        seat = Seat(federation.secure, roster, InFile(files.session), Stopwatch())
    return federation.client(name, plans[name], files, seat)


@lru_cache(maxsize=1)
def _open_federation(run: str) -> tuple[RunFolder, Federation, dict[str, SitePlan]]:
    """Once per actor process: data, model and calibrated plans stay loaded."""
    folder = RunFolder.open(Path(run))
    federation = Federation.load(folder.job, begun=True)
    return folder, federation, federation.plans(folder.known_plans())

"""The running deployment against stock Flower: round trip, bytes on the wire, the server's memory.

round trip   A whole round of ours with a tiny model and 3 sites over TLS (ask, check, train in no time, seal, answer,
             add, checkpoint), as the seconds between the ends of two rounds; against one `grid.send_and_receive` of
             Flower's, which carries an empty message to 3 SuperNodes and back: its defaults, TLS and node
             authentication (SuperLink, SuperNodes and what they start). Both federations are up all the time and are
             asked in turn, so that what else the machine does meets both. The ratio is Flower's seconds over ours.
wire         A plain job of 10M parameters at 3 sites: all bytes through a TCP relay in front of the server, both ways,
             from the offer to the delivery, over the bytes of the models and updates in them. Seconds a round.
memory       The largest resident memory of the server's process, in jobs with 1M parameters at 3 and at 12 sites.

Our sites are real nodes, each a process of its own, with a trainer that takes no time (`tests.deployment.light`).
Flower's run is the same on both sides but for what is measured: no network, no telemetry, no updates.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from measure import finish, parser, spread

sys.path.insert(0, str(Path(__file__).parents[1]))  # The federation that the tests start is not installed.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}

from client.initial import initial_parameters
from server.jobs import JobFolder
from strategies.parameters import Parameters
from tests.deployment.federation import deployed_job
from tests.deployment.light import spawn
from tests.deployment.live import Live, free_port, peak_bytes, wait_until

SITES = 3
APP = """\
import json, pathlib, time
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()

@client.query()
def echo(message, context):
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    seconds = []
    for _ in range(int(context.run_config["exchanges"])):
        began = time.perf_counter()
        replies = list(grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes]))
        assert len(replies) == 3 and all(reply.has_content() for reply in replies)
        seconds.append(time.perf_counter() - began)
    out = pathlib.Path(context.run_config["out"])
    out.with_suffix(".part").write_text(json.dumps(seconds))
    out.with_suffix(".part").rename(out)
"""
PYPROJECT = """\
[project]
name = "echo"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "echo.app:server"
clientapp = "echo.app:client"
[tool.flwr.app.config]
exchanges = 1
out = ""
"""


class Ours:
    """A federation of light sites, and jobs at them."""

    def __init__(self, folder: Path, *, sites: int, parameters: int | None, relay: Relay | None = None) -> None:
        folder.mkdir()
        own = f"127.0.0.1:{free_port()}"
        address = own if relay is None else f"127.0.0.1:{relay.listen(int(own.rpartition(':')[2]))}"
        names = [f"site-{number:02}" for number in range(sites)]
        self.live = Live(folder, address, names=names, listen=own)
        self.live.enrol_here()
        self.model = folder / "start.safetensors"
        shapes, vector = initial_parameters(deployed_job())
        if parameters is not None:
            # Random: Flower sends equal parts of a message once.
            vector = np.random.default_rng(0).standard_normal(parameters).astype(np.float32)
            shapes = Parameters({"all": (parameters,)})
        shapes.save(vector, self.model, {})
        self._jobs = 0

    @contextlib.contextmanager
    def up(self) -> Iterator[Ours]:
        self.live.start("coordinator")
        sites = spawn(self.model, [self.live.folder / name for name in self.live.names])
        try:
            yield self
        finally:
            sites.terminate()
            sites.wait(timeout=60)
            self.live.stop()

    def submit(self, rounds: int) -> JobFolder:
        self._jobs += 1
        job = deployed_job(name=f"job-{self._jobs}", training={"rounds": rounds})
        return self.live.submit(job, model=self.model)

    def run(self, rounds: int) -> list[float]:
        """Seconds from the end of one round to the end of the next."""
        folder = self.submit(rounds)
        if self.live.wait_for(folder, timeout_s=600)["state"] != "finished":
            raise SystemExit(self.live.said(folder))
        ends = [datetime.fromisoformat(one["time"]) for one in folder.events() if one["event"] == "round"]
        return [(after - before).total_seconds() for before, after in itertools.pairwise(ends)]


@dataclass
class Flower:
    """Stock Flower in `folder`: its own commands, with the certificates that our server has."""

    folder: Path
    certificates: Path
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _runs: int = 0

    @contextlib.contextmanager
    def up(self) -> Iterator[Flower]:
        self.folder.mkdir()
        host, _, port = self.address.rpartition(":")
        tls, ca = self.certificates / "tls", str(self.certificates / "authority" / "ca.pem")
        try:
            self._start(
                "flower-superlink", "--host", host, "--port", port, "--ssl-ca-certfile", ca, "--enable-supernode-auth",
                "--ssl-certfile", str(tls / "server.pem"), "--ssl-keyfile", str(tls / "server.key"),
                "--database", str(self.folder / "flower.db"),
            )  # fmt: skip
            with contextlib.closing(self._control(ca)) as control:
                for number in range(SITES):
                    key = self._registered(control, number)
                    self._start(
                        "flower-supernode", "--superlink", self.address, "--root-certificates", ca,
                        "--auth-supernode-private-key", str(key), "--port", str(free_port()),
                    )  # fmt: skip
            yield self
        finally:
            for process in reversed(self._processes):
                process.terminate()
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)  # What it started and did not end.
                process.wait()

    def run(self, exchanges: int) -> list[float]:
        """Seconds of each `send_and_receive`."""
        from flwr.cli.build import build_fab_from_files
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        self._runs += 1
        out = self.folder / f"run-{self._runs}.json"
        files = {"pyproject.toml": PYPROJECT.encode(), "echo/__init__.py": b"", "echo/app.py": APP.encode()}
        content, _ = build_fab_from_files(files)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        config = user_config_to_proto({"exchanges": exchanges, "out": str(out)})
        with contextlib.closing(self._control(str(self.certificates / "authority" / "ca.pem"))) as control:
            control.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=config))
        wait_until(out.exists, 600, lambda: (self.folder / "out").read_text()[-3000:])
        seconds: list[float] = json.loads(out.read_text())
        return seconds

    def _start(self, *command: str) -> None:
        home, path = self.folder / "home", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open(self.folder / "out", "ab") as out:
            environment = {**os.environ, "FLWR_HOME": str(home), "PATH": path}
            program = shutil.which(command[0], path=path)
            if program is None:
                raise SystemExit(f"{command[0]} is not installed")
            self._processes.append(
                subprocess.Popen(
                    [program, *command[1:]], stdout=out, stderr=out, env=environment, start_new_session=True
                )
            )

    def _control(self, ca: str) -> Any:
        from flwr.cli.typing import SuperLinkConnection
        from flwr.cli.utils import init_http_client_from_connection

        host, _, port = self.address.rpartition(":")
        wait_until(lambda: socket.socket().connect_ex((host, int(port))) == 0, 120)
        with contextlib.redirect_stdout(sys.stderr):
            return init_http_client_from_connection(SuperLinkConnection("benchmark", self.address, ca))

    def _registered(self, control: Any, number: int) -> Path:
        from flwr.proto.control_pb2 import RegisterNodeRequest

        key, path = ec.generate_private_key(ec.SECP256R1()), self.folder / f"node-{number}"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        control.RegisterNode(RegisterNodeRequest(public_key=public))
        return path


class Relay:
    """Passes TCP connections on to a port of this machine, and counts the bytes of both directions."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock, self.bytes = threading.Lock(), 0

    def listen(self, target: int) -> int:
        threading.Thread(target=self._accept, args=(target,), daemon=True).start()
        port: int = self._server.getsockname()[1]
        return port

    def close(self) -> None:
        self._server.close()

    def _accept(self, target: int) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", target))
            except OSError:
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(2**18):
                sink.sendall(piece)
                with self._lock:
                    self.bytes += len(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def round_trip(folder: Path, *, turns: int, exchanges: int) -> dict[str, Any]:
    ours = Ours(folder / "ours", sites=SITES, parameters=None)
    flower = Flower(folder / "flower", ours.live.coordinator)
    mine, theirs, ratios = list[float](), list[float](), list[float]()
    with ours.up(), flower.up():
        ours.run(3)
        flower.run(1)
        for turn in range(turns):
            taken: dict[str, list[float]] = {}
            for name in ("ours", "flower") if turn % 2 else ("flower", "ours"):
                taken[name] = ours.run(4 * exchanges) if name == "ours" else flower.run(exchanges)
            mine, theirs = mine + taken["ours"], theirs + taken["flower"]
            ratios.append(float(np.median(taken["flower"]) / np.median(taken["ours"])))
    return {"flower_over_ours": spread(ratios), "seconds": spread(mine), "flower_seconds": spread(theirs)}


def wire(folder: Path, *, parameters: int, rounds: int) -> dict[str, Any]:
    with contextlib.closing(Relay()) as relay:
        ours = Ours(folder / "wire", sites=SITES, parameters=parameters, relay=relay)
        with ours.up():
            ours.run(1)  # The sites are there, and everything is loaded.
            before = relay.bytes
            submitted = ours.model.stat().st_size  # The operator hands the model in through the relay as well.
            seconds = ours.run(rounds)
            carried = relay.bytes - before - submitted
    payload = 4 * parameters * SITES * (2 * rounds + 1)  # Down and up in each round, and the delivery.
    return {
        "parameters": parameters,
        "rounds": rounds,
        "bytes": carried,
        "payload": payload,
        "bytes_over_payload": carried / payload,
        "seconds_per_round": spread(seconds),
    }


def memory(folder: Path, *, sites: int, parameters: int, rounds: int) -> int:
    ours = Ours(folder / f"memory-{sites}", sites=sites, parameters=parameters)
    with ours.up():
        ours.run(rounds)
        [server] = ours.live.pids("coordinator", "process")
        return peak_bytes(server)


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    quick = options.quick
    with TemporaryDirectory() as name:
        folder = Path(name)
        trip = round_trip(folder, turns=2 if quick else 5, exchanges=2 if quick else 4)
        bytes_ = wire(folder, parameters=10**6 if quick else 10**7, rounds=3 if quick else 5)
        few, many = (memory(folder, sites=sites, parameters=10**6, rounds=3) for sites in (3, 6 if quick else 12))
    peak = {"few_sites": 3, "many_sites": 6 if quick else 12, "few_bytes": few, "many_bytes": many}
    ratio, took = trip["flower_over_ours"], bytes_["seconds_per_round"]
    lines = [
        f"round trip, 3 sites, TLS: ours {trip['seconds']['median']:.3f} s, Flower's "
        f"{trip['flower_seconds']['median']:.2f} s, ratio {ratio['median']:.1f} ({ratio['min']:.1f} to "
        f"{ratio['max']:.1f}, {ratio['n']} turns)",
        f"wire, {bytes_['parameters']:,} parameters, 3 sites: {bytes_['bytes_over_payload']:.4f} of the payload, "
        f"{took['median']:.2f} s a round ({took['min']:.2f} to {took['max']:.2f})",
        f"memory, 1M parameters: server {few / 2**20:.0f} MiB with 3 sites, {many / 2**20:.0f} MiB with "
        f"{peak['many_sites']}",
    ]
    finish({"deployment": {"round_trip": trip, "wire": bytes_, "memory": peak}}, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

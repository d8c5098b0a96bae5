"""Our ServerApp in a process of its own: `python -m server.serverapp FOLDER JOB`, started by `server.coordinator`.

What is secret (the task's token, the passphrase) comes in one line of JSON on standard input. When that closes, the
SuperLink's process is gone, and this one ends too: the job goes on when both are there again.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import httpx

from privacy.errors import FedchorusError
from privacy.keys import IdentityKey
from privacy.secagg.roster import Roster
from privacy.supervisor import end_with_parent
from server.deployment import Deployment, reason
from server.jobs import JobFolder
from server.sealed import SealedTransport

ENDED, NEEDS_A_PERSON = 0, 3


class HttpDoor:
    """`server.sealed.Door` over the loopback listener of the SuperLink's process."""

    def __init__(self, port: int, secret: str) -> None:
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}/v1/fedchorus/internal",
            headers={"authorization": f"Bearer {secret}"},
            timeout=60.0,
            trust_env=False,  # A proxy of the environment is not for loopback.
        )

    def wait(self, since: int, timeout_s: float) -> tuple[int, dict[str, dict[str, Any]]]:
        found = self._post("wait", {"since": since, "timeout_s": timeout_s})
        return found["version"], found["sites"]

    def ring(self, sites: list[str]) -> None:
        self._post("ring", {"sites": sites})

    def _post(self, name: str, body: dict[str, Any]) -> Any:
        answer = self._client.post(f"/{name}", json=body)
        answer.raise_for_status()
        return answer.json()


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    told = json.loads(sys.stdin.buffer.readline())
    end_with_parent()
    sys.exit(_run(folder, JobFolder.open(folder / "jobs", name), told))


def _run(folder: Path, job: JobFolder, told: dict[str, Any]) -> int:
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = told["run"], told["task"], SUPERLINK_NODE_ID
    grid = HttpGrid(f"127.0.0.1:{told['port']}", insecure=True, token=told["token"])
    grid.set_run(Run.create_empty(told["run"]))
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heartbeat.start()
    try:
        passphrase = told["passphrase"]
        key = IdentityKey.load(folder / "identity.pem", passphrase.encode() if passphrase is not None else None)
        roster = Roster.load(folder / "roster.json")
        roster.check(None)
        transport = SealedTransport(
            grid,
            HttpDoor(told["port"], told["secret"]),
            key,
            {member.name: member.key for member in roster.members},
            deadline_s=job.job.cohort.deadline_s or told["deadline_s"],
        )
        Deployment(job, roster, transport, key, folder / "server.jsonl", patience_s=told["patience_s"]).run()
        return ENDED
    except FedchorusError as error:
        job.note("stopped by an error", why=reason(error))
        job.move("paused", f"{reason(error)}; mend it, then `fedchorus resume {job.id}`")
        return NEEDS_A_PERSON
    finally:
        heartbeat.stop()
        grid.close()


if __name__ == "__main__":
    main()

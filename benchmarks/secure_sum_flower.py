"""Our secure sum against Flower's SecAgg+ (the installed flwr): CPU time of a client and of the server, in one run.

Both sum the same float32 vectors on a complete graph, Flower's with its own `SecAggPlusWorkflow` and `secaggplus_mod`
and its own defaults, through a grid that hands messages over in memory. Ours has the larger part to do: identities,
signatures, a round of agreement, journals. Flower's threshold is ours plus one, as its clients keep a share themselves.

Counted for a client: everything but training, from its float32 vector to its last message. For the server: everything
to the float sum; Flower's is its workflow less the time inside the grid, with a strategy that sends an empty model and
takes the result as it is. Not counted: turning a client's vector into Flower's Parameters, copying messages, transport.
A ratio is Flower's CPU time over ours: 10 is ten times less for us. The lost send no words.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from measure import finish, parser, spread
from numpy.typing import NDArray
from secure_sum import Federation

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # Read when flwr is imported.
WEIGHT = 1000  # Flower's default `max_weight`: its clients send the vector itself.


class Flower:
    """One round of Flower's secure sum after another, over `vectors`; nodes are numbered from 2."""

    def __init__(self, vectors: Iterable[NDArray[np.float32]], *, threshold: int) -> None:
        from flwr.app import RecordDict
        from flwr.server.workflow import SecAggPlusWorkflow
        from flwr.supercore.task_identity import TaskIdentity

        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # What makes messages possible.
        self._vectors = dict(enumerate(vectors, start=2))
        self._states = {node: RecordDict() for node in self._vectors}
        self.threshold = threshold
        self._workflow = SecAggPlusWorkflow(len(self._vectors), threshold)

    def run(self, *, lost: int) -> dict[str, float]:
        """CPU milliseconds of one client (the mean by stage, added up) and of the server."""
        from flwr.app import ArrayRecord, ConfigRecord
        from flwr.server.compat.legacy_context import LegacyContext
        from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

        grid = _Grid(self._vectors, self._states, lost)
        strategy = _Strategy(self._vectors)
        context = LegacyContext(_context(1, None), strategy=strategy)
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
        context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
        began = time.process_time()
        self._workflow(grid, context)
        server_s = time.process_time() - began - grid.inside_s
        self._check(strategy.aggregate, len(self._vectors) - lost)
        return {"client_ms": 1e3 * sum(grid.client_s), "server_ms": 1e3 * server_s}

    def _check(self, aggregate: NDArray[np.floating] | None, survivors: int) -> None:
        mean = np.mean([vector[:1000] for vector in list(self._vectors.values())[:survivors]], axis=0)
        if aggregate is None or np.abs(aggregate[:1000] - mean).max() > 1e-4:
            raise SystemExit("Flower's secure sum is not the mean of the vectors")


class _Grid:
    """Calls the mod of each node. `client_s`: the mean CPU seconds of a client, by stage; `inside_s`: all in here."""

    def __init__(self, vectors: dict[int, NDArray[np.float32]], states: dict[int, Any], lost: int) -> None:
        self._vectors, self._states = vectors, states
        self._lost = set(sorted(vectors)[len(vectors) - lost :])
        self.client_s: list[float] = []
        self.inside_s = 0.0

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        from flwr.app import Error, Message
        from flwr.client.mod import secaggplus_mod

        entered, replies, taken = time.process_time(), [], []
        for message in messages:
            node = message.metadata.dst_node_id
            if len(self.client_s) == 2 and node in self._lost:
                replies.append(Message(Error(0), reply_to=message))
                continue
            own = Message(_copy(message.content), dst_node_id=node, message_type="train")
            context, trained = _context(node, self._states[node]), self._trained(node, own)
            began = time.process_time()
            reply = secaggplus_mod(own, context, trained)
            taken.append(time.process_time() - began)
            replies.append(reply)
        self.client_s.append(float(np.mean(taken)))
        self.inside_s += time.process_time() - entered
        return replies

    def _trained(self, node: int, message: Any) -> Callable[[Any, Any], Any]:
        """What the app would answer; made beforehand, as far as the stage with the vectors needs it."""
        from flwr.app import Message
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
        from flwr.compat.common.recorddict_compat import fitres_to_recorddict

        vectors = [self._vectors[node]] if len(self.client_s) == 2 else []
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(vectors), WEIGHT, {})
        answer = Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)
        return lambda *_: answer


class _Strategy:
    """Asks every node with an empty model, and keeps the result that the workflow gives in each one's name."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = list(nodes)
        self.aggregate: NDArray[np.floating] | None = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, Any]]:
        from flwr.common import FitIns

        return [(SimpleNamespace(node_id=node), FitIns(parameters, {})) for node in self._nodes]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        from flwr.common import parameters_to_ndarrays

        if results:
            [self.aggregate] = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


def _context(node: int, state: Any) -> Any:
    from flwr.app import Context, RecordDict

    state = RecordDict() if state is None else state
    return Context(run_id=1, node_id=node, node_config={}, state=state, run_config={})


def _copy(content: Any) -> Any:
    """The mod takes what it reads out of its message: clients must not share it, as over a network they would not."""
    from flwr.app import ConfigRecord, RecordDict

    records = {
        name: ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
        for name, record in content.items()
    }
    return RecordDict(records)


def compare(federation: Federation, flower: Flower, *, lost: int, rounds: int) -> dict[str, Any]:
    """`rounds` rounds of each, in turn, after one warm-up."""
    ours, theirs = [], []

    def run_ours() -> None:
        costs = federation.run(lost=lost)
        ours.append({"client_ms": costs.client_ms()["all"], "server_ms": costs.server_ms()["with_decode"]})

    def run_theirs() -> None:
        theirs.append(flower.run(lost=lost))

    for number in range(rounds + 1):
        for run in (run_ours, run_theirs) if number % 2 else (run_theirs, run_ours):
            run()
    del ours[0], theirs[0]
    result: dict[str, Any] = {
        "clients": len(federation.clients),
        "parameters": federation.codec.ring.body,
        "lost": lost,
        "threshold": federation.shape.threshold,
        "flower_threshold": flower.threshold,
    }
    for side in ("client", "server"):
        name = f"{side}_ms"
        result[f"{side}_flower_over_ours"] = spread([b[name] / a[name] for a, b in zip(ours, theirs, strict=True)])
        result[name] = spread([a[name] for a in ours])
        result[f"flower_{name}"] = spread([b[name] for b in theirs])
    return result


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    parameters, rounds = (10**5, 3) if options.quick else (10**6, 5)
    results, lines = dict[str, Any](), list[str]()
    with TemporaryDirectory() as folder:
        for clients in (5, 10) if options.quick else (10, 20):
            federation = Federation(Path(folder), clients=clients, parameters=parameters, dropouts=None)
            flower = Flower(federation.vectors.values(), threshold=federation.shape.threshold + 1)
            for lost in sorted({0, clients // 10}):
                case = compare(federation, flower, lost=lost, rounds=rounds)
                results[f"{clients}_clients_{lost}_lost"] = case
                lines.append(f"{clients} clients, {parameters:,} parameters, {lost} lost, {rounds} rounds:")
                for side in ("client", "server"):
                    ratio = case[f"{side}_flower_over_ours"]
                    lines.append(
                        f"  {side}: ours {case[f'{side}_ms']['median']:.1f} ms, "
                        f"Flower's {case[f'flower_{side}_ms']['median']:.1f} ms, "
                        f"ratio {ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f})"
                    )
    finish({"secure_sum_flower": results}, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

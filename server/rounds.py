"""The round loop, in the order of the papers. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from privacy.errors import RunError
from privacy.ledger import Head, digest_of
from server.collect import Collected, Collector
from server.release import Release
from strategies.job import Job
from strategies.messages import ask_for
from strategies.parameters import Vector
from strategies.protocol import ServerState, Strategy


class Diverged(RunError):
    """The model is not finite: the same round again would end in the same way."""


@dataclass(frozen=True)
class RoundResult:
    """What one round leaves behind; `heads` are the newest ledger heads of all sites heard so far."""

    round_number: int
    collected: Collected
    heads: Mapping[str, Head]
    server_head: Head | None
    evaluation: Mapping[str, Any]
    model: Vector = field(repr=False)


def heads_line(round_number: int, heads: Mapping[str, Head], server: Head | None = None) -> dict[str, Any]:
    """The public record of all heads after a round; its digest is what each site signs in the next one."""
    line = {"round": round_number, "heads": {site: list(heads[site]) for site in sorted(heads)}}
    return line if server is None else {**line, "server": list(server)}


def newest_heads(lines: Sequence[Mapping[str, Any]], *, where: str) -> tuple[dict[str, Head], Head | None]:
    """Read the last of the lines that `heads_line` made: the sites' heads, and the server's own. Raises `RunError`."""
    if not lines:
        return {}, None
    try:
        own = lines[-1].get("server")
        heads = {site: Head(int(seq), str(digest)) for site, (seq, digest) in lines[-1]["heads"].items()}
        return heads, Head(int(own[0]), str(own[1])) if own is not None else None
    except (LookupError, TypeError, ValueError, AttributeError):
        raise RunError(f"{where}: heads.jsonl is damaged") from None


def run_rounds(
    state: ServerState,
    *,
    job: Job,
    strategy: Strategy,
    collector: Collector,
    release: Release,
    cohort: Callable[[int], list[str]],
    evaluate: Callable[[ServerState], Mapping[str, Any]],
    record: Callable[[RoundResult], None],
    checkpoint: Callable[[ServerState], None],
    heads: Mapping[str, Head],
    server_head: Head | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ServerState:
    """Run the rounds that `state` still lacks; return the state after the last, or after the one `stop` ended.

    `cohort` draws whom a round asks; `release` charges the round, and is all that a strategy sees the sum through.

    `record` is called before `checkpoint`: after a crash a round may have been recorded and not kept, never kept
    and not recorded. Raises `RunError` when a round has fewer answers than `job.least_answers` or the model diverges.
    """
    witnessed = dict(heads)
    while state.round_number < job.training.rounds and not stop():
        number = state.round_number + 1
        witness = digest_of(heads_line(number - 1, witnessed, server_head)) if witnessed or server_head else None
        asked = cohort(number)
        clip_norm = release.reserve(state, asked, witness)
        # Each site reserves the round in its own ledger before it touches data, and commits before it answers.
        ask = ask_for(job.hash, number, strategy.broadcast(state), witness, clip_norm)
        collected = collector.collect(ask, asked, release.total())
        if len(collected.contributors) < job.least_answers:
            raise RunError(
                f"round {number}: {len(collected.contributors)} of {len(asked)} sites answered, the minimum is "
                f"{job.least_answers} ({_reasons(collected)}); mend them and resume; a site that crashed "
                "within a round has spent it, and takes part to the end only with privacy.record.spare_rounds"
            )
        released, total = release.release(state, collected.total)
        if not total.weight > 0:
            raise RunError(f"round {number}: the weights of all contributions add up to nothing to divide by")
        # What the noise remembers would show the sum behind it: no strategy is given it, and none can lose it.
        state = replace(strategy.step(replace(state, release={}), total), release=released.release)
        if not np.isfinite(state.model).all():
            raise Diverged(f"round {number}: the model diverged; lower training.learning_rate")
        witnessed.update(collected.heads)
        server_head = release.head
        record(RoundResult(number, collected, dict(witnessed), server_head, evaluate(state), state.model))
        checkpoint(state)
    return state


def _reasons(collected: Collected) -> str:
    return ", ".join(f"{site}: {why}" for site, why in list(collected.failures.items())[:5]) or "no failures"

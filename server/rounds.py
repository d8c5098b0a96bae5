"""The round loop, in the order of the papers. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from privacy.errors import RunError
from privacy.ledger import Head, digest_of
from server.cohort import draw_cohort
from server.collect import Collected, Collector
from strategies.job import Job
from strategies.messages import ask_for
from strategies.parameters import Vector
from strategies.protocol import ServerState, Strategy


@dataclass(frozen=True)
class RoundResult:
    """What one round leaves behind; `heads` are the newest ledger heads of all sites heard so far."""

    round_number: int
    collected: Collected
    heads: Mapping[str, Head]
    evaluation: Mapping[str, Any]
    model: Vector = field(repr=False)


def heads_line(round_number: int, heads: Mapping[str, Head]) -> dict[str, Any]:
    """The public record of all heads after a round; its digest is what each site signs in the next one."""
    return {"round": round_number, "heads": {site: list(heads[site]) for site in sorted(heads)}}


def run_rounds(
    state: ServerState,
    *,
    job: Job,
    sites: list[str],
    strategy: Strategy,
    collector: Collector,
    evaluate: Callable[[Vector], Mapping[str, Any]],
    record: Callable[[RoundResult], None],
    checkpoint: Callable[[ServerState], None],
    heads: Mapping[str, Head],
    stop: Callable[[], bool] = lambda: False,
) -> ServerState:
    """Run the rounds that `state` still lacks; return the state after the last, or after the one `stop` ended.

    `record` is called before `checkpoint`: after a crash a round may have been recorded and not kept, never kept
    and not recorded. Raises `RunError` when a round has fewer answers than `cohort.minimum` or the model diverges.
    """
    witnessed = dict(heads)
    while state.round_number < job.training.rounds and not stop():
        number = state.round_number + 1
        cohort = draw_cohort(sites, size=job.cohort.size, seed=job.seed, round_number=number)
        witness = digest_of(heads_line(number - 1, witnessed)) if witnessed else None
        # Each site reserves the round in its own ledger before it touches data, and commits before it answers.
        collected = collector.collect(ask_for(job.hash, number, state.model, witness), cohort)
        if len(collected.contributors) < job.cohort.minimum:
            raise RunError(
                f"round {number}: {len(collected.contributors)} of {len(cohort)} sites answered, the minimum is "
                f"{job.cohort.minimum} ({_reasons(collected)}); mend them and resume; a site that crashed "
                "within a round has spent it, and takes part to the end only with privacy.record.spare_rounds"
            )
        state = strategy.step(state, collected.total)
        if not np.isfinite(state.model).all():
            raise RunError(f"round {number}: the model diverged; lower training.learning_rate")
        witnessed.update(collected.heads)
        record(RoundResult(number, collected, dict(witnessed), evaluate(state.model), state.model))
        checkpoint(state)
    return state


def _reasons(collected: Collected) -> str:
    return ", ".join(f"{site}: {why}" for site, why in list(collected.failures.items())[:5]) or "no failures"

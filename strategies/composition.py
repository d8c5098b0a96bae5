"""What goes together: strategies, units of privacy, secure sums. A refusal names both settings and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from privacy.errors import JobError
from strategies.fedbuff import FedBuff
from strategies.job import Job, check_job
from strategies.partial import shares_of
from strategies.protocol import Strategy, Traits
from strategies.robust import why_too_few


def check_composition(job: Job, strategy: Strategy) -> None:
    """Raise `JobError` for a job whose strategy cannot work with the rest of it."""
    if why := _buffer_refusal(job, strategy) or refusal(job, strategy.traits):
        raise JobError(why)


def refusal(job: Job, traits: Traits) -> str | None:
    """Why a strategy that needs `traits` cannot work in `job`, and the nearest that can; None if it can."""
    name, client = job.strategy.name, job.privacy.client
    if traits.equal_weights and job.strategy.weighting != "equal":
        return f'strategy.name = "{name}" counts every site alike: set strategy.weighting = "equal"'
    if traits.equal_steps and job.training.local_steps is None:
        return (
            f'strategy.name = "{name}" needs the same number of steps at every site: give training.local_steps in '
            "place of local_epochs"
        )
    if (traits.in_step or traits.scalars) and job.training.optimizer == "adam":
        return (
            f'strategy.name = "{name}" measures its corrections in steps of plain SGD: set training.optimizer = "sgd", '
            'or take "fedavg" or "fedprox"'
        )
    if traits.equal_steps and job.training.schedule is not None:
        return (
            f'strategy.name = "{name}" measures its corrections in steps of one size: leave out training.schedule, or '
            'take "feddyn"'
        )
    covered = not (traits.scalars or traits.sent > 1 or traits.own_weights)
    if traits.reads_records and job.privacy.record is not None:
        other = "privacy.client" if covered else "[secure_aggregation] alone"
        return (
            f'strategy.name = "{name}" with privacy.record: what a site adds depends on its loss, which no mechanism '
            f'covers here; take "fedavg", "fedprox" or "scaffold", or {other}'
        )
    if client is not None and not covered:
        other = "[secure_aggregation] alone" if traits.reads_records else "privacy.record"
        return (
            f'strategy.name = "{name}" with privacy.client: it sends more than one update of weight 1, and the noise '
            f'covers no more; take "fedavg", "fedprox" or "scaffold", or {other}'
        )
    return _edge_refusal(job, traits) or _asynchronous_refusal(job, traits) or _robust_refusal(job, traits)


def check_sites(job: Job, sites: Sequence[str], strategy: Strategy | None = None) -> None:
    """Raise `JobError` where the job names a site that is none of `sites`, a region leaves one out, or a buffer of
    `strategy` takes more than there are."""
    training, regions = job.training, job.regions or {}
    named: dict[str, Iterable[str]] = {"training.work": training.work or (), "training.weak": training.weak or ()}
    if job.task.tuning is not None:
        named["task.tuning.ranks"] = job.task.tuning.ranks or ()
    named |= {f"regions.{region}": members for region, members in regions.items()}
    for key, names in named.items():
        if strange := sorted(set(names).difference(sites)):
            close = difflib.get_close_matches(strange[0], sites, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise JobError(f"{key}: the federation has no site {strange[0]!r}{hint}")
    members = [site for region in regions.values() for site in region]
    if regions and (left := sorted(set(sites).difference(members))):
        raise JobError(f"regions: site {left[0]!r} is in none of them; every site has to be in one")
    if (size := job.cohort.size) is not None and job.cohort.over is not None and size >= len(sites):
        raise JobError(
            f"cohort.over: a cohort.size of {size} is everyone in a federation of {len(sites)}; lower it, or leave "
            "cohort.over out"
        )
    if isinstance(strategy, FedBuff) and strategy.buffer > len(sites):
        raise JobError(
            f"strategy.buffer: a step takes {strategy.buffer} contributions, each of another site, and the federation "
            f"has {len(sites)}; lower it to {len(sites)} or less"
        )


def _edge_refusal(job: Job, traits: Traits) -> str | None:
    """Why sites that differ in what they can do, or regions of them, cannot go with the rest of `job`."""
    training, cohort, secure, said = job.training, job.cohort, job.secure_aggregation, job.strategy.name
    differ = next((key for key in ("budget_s", "work") if getattr(training, key) is not None), None)
    if traits.equal_steps and differ is not None:
        return (
            f'training.{differ} with strategy.name = "{said}": it measures its corrections in steps, as many at every '
            f'site; take "feddyn" or "fednova", or leave training.{differ} out'
        )
    if training.budget_s is not None and job.privacy.record is not None:
        return (
            "training.budget_s with privacy.record: how many steps fit into it depends on how large the secret batches "
            "were, which no noise covers; take training.work = {SITE = STEPS}, which depends on nothing"
        )
    ranks = job.task.tuning.ranks if job.task.tuning is not None else None
    if shares_of(job) and ranks:
        return (
            "task.tuning.ranks with training.weak (or a device that trains less): each counts who trained what alone, "
            "and not both; leave one of the two out"
        )
    if shares_of(job) or ranks:
        weak = "training.weak" if training.weak else "simulation.devices with trains below 1"
        weak = "task.tuning.ranks" if ranks else weak
        if job.privacy.client is not None:
            return (
                f"{weak} with privacy.client: each parameter is averaged over those who trained it, and the noise is "
                "sized for an average over the whole cohort; take privacy.record, or let all train everything"
            )
        if not job.robust.plain:
            return (
                f"{weak} with [robust]: the weights behind each parameter are claims, in which a site could lie; leave "
                "[robust] out, or let all train everything"
            )
        if traits.scalars or traits.own_weights or traits.sent > 1 or (traits.kept and not traits.personal):
            return (
                f'{weak} with strategy.name = "{said}": its step needs the whole model from each site; take "fedavg", '
                '"fedprox" or "fedadam", or let all train everything'
            )
    if cohort.over is not None:
        why = None
        if secure is not None:
            why = "secure_aggregation", "a secure sum is over all that answer, and who is left out must be known before"
        elif job.regions:
            why = "regions", "each region sums all of its own"
        elif job.simulation.devices is None:
            why = "no [simulation.devices]", "who answers first goes by their virtual clock; a deployment has none"
        elif traits.in_step:
            why = f'strategy.name = "{said}"', "what its sites remember has to match what the server added up"
        if why is not None:
            return f"cohort.over with {why[0]}: {why[1]}; leave cohort.over out, and set cohort.deadline_s if need be"
    return _regions_refusal(job) if job.regions else None


def _regions_refusal(job: Job) -> str | None:
    secure, members = job.secure_aggregation, [site for region in (job.regions or {}).values() for site in region]
    if twice := next((site for place, site in enumerate(members) if site in members[:place]), None):
        return f"regions: site {twice!r} is listed twice; every site has to be in one region"
    if not job.robust.plain:
        return (
            "regions with [robust]: a region hands on its sum, not the updates that a reduction compares; leave one "
            "of the two out"
        )
    if secure is not None and secure.groups > 1:
        return "regions with secure_aggregation.groups: each region is a group already; leave groups out"
    if secure is not None and job.cohort.size is not None:
        return (
            "regions with secure_aggregation and cohort.size: a region's secure sum is over all of its sites in every "
            "round; leave cohort.size out"
        )
    if secure is not None and job.privacy.central is not None:
        return (
            'regions with secure_aggregation and privacy.client.placement = "central": the sum of each region would be '
            'seen before the noise is added to all; set placement = "distributed" or "local"'
        )
    return None


def _asynchronous_refusal(job: Job, traits: Traits) -> str | None:
    """Why what has no rounds cannot go with what needs them."""
    if not traits.asynchronous:
        return None
    said, cohort = f'strategy.name = "{job.strategy.name}"', job.cohort
    other = 'take "fedavg" with cohort.deadline_s'
    if job.simulation.devices is None:
        return (
            f"{said} without [simulation.devices]: who answers when goes by their virtual clock, and a deployment has "
            f"rounds; {other}"
        )
    if job.secure_aggregation is not None:
        return (
            f"{said} with secure_aggregation: a secure sum needs a cohort that is fixed before it trains, and a buffer "
            f"has none; {other}, or privacy.record alone"
        )
    if job.privacy.client is not None:
        return (
            f"{said} with privacy.client: what a client adds counts by its age, which no accounting here covers; "
            f"{other}, or privacy.record"
        )
    keys = {
        "cohort.over": cohort.over,
        "cohort.rate": cohort.rate,
        "cohort.separation": cohort.separation,
        "cohort.deadline_s": cohort.deadline_s,
        "regions": job.regions,
        "training.weak or a device that trains less": shares_of(job) or None,
        "task.tuning.ranks": job.task.tuning.ranks if job.task.tuning is not None else None,
        "[robust]": None if job.robust.plain else job.robust,
    }
    if given := next((key for key, value in keys.items() if value is not None), None):
        return f"{said} with {given}: that is for a round's cohort, and a buffer has none; leave it out, or {other}"
    return None


def _buffer_refusal(job: Job, strategy: Strategy) -> str | None:
    """Why a strategy without rounds cannot be run as it says."""
    said, least = f'strategy.name = "{job.strategy.name}"', job.cohort.minimum
    if strategy.traits.asynchronous and not isinstance(strategy, FedBuff):
        return (
            f"{said}: its traits say asynchronous, but only a strategies.fedbuff:FedBuff, or what is derived from it, "
            "runs without rounds; derive it from that, or leave asynchronous out of its traits"
        )
    if isinstance(strategy, FedBuff) and least is not None and least > strategy.buffer:
        return (
            f"{said} with cohort.minimum = {least}: a step is taken on strategy.buffer = {strategy.buffer} "
            f"contributions, so that {least} never come; set strategy.buffer = {least} or more, or lower cohort.minimum"
        )
    return None


def _robust_refusal(job: Job, traits: Traits) -> str | None:
    """Why what is to bear sites that lie cannot, in `job`."""
    robust, secure = job.robust, job.secure_aggregation
    if robust.plain and secure is not None and secure.groups > 1:
        return (
            "secure_aggregation.groups and robust.reduce go together: groups whose sums are only added up would hide "
            'each site among fewer others for nothing; set robust.reduce = "median", or leave groups out'
        )
    if robust.plain:
        return None
    said = f'robust.reduce = "{robust.reduce}"' if robust.reduce != "sum" else "robust.max_norm"
    if traits.scalars or traits.own_weights:
        return (
            f'{said} with strategy.name = "{job.strategy.name}": the step depends on numbers that a site sends beside '
            'its update, in which it could still lie; take "fedavg", "fedadam" or "fedprox", or leave [robust] out'
        )
    if traits.in_step:
        return (
            f'{said} with strategy.name = "{job.strategy.name}": what its sites remember has to match what the server '
            'added up, and a robust reduction adds up something else; take "fedavg", "fedadam" or "fedprox", or leave '
            "[robust] out"
        )
    if job.privacy.central is not None and robust.reduce != "sum":
        return (
            f'{said} with privacy.client.placement = "central": that noise is sized for a sum, which each site moves '
            'by its clip at most; set privacy.client.placement = "local", or leave [robust] out: clip_norm bounds each '
            "site already"
        )
    if job.privacy.central is not None:
        return f"{said} with privacy.client: its clip_norm bounds each update already; leave robust.max_norm out"
    if secure is not None and secure.groups == 1:
        return (
            f"{said} with secure_aggregation: nobody sees one update; set secure_aggregation.groups = 5, say, to "
            "reduce the sums of groups, or leave one of the two out"
        )
    if job.cohort.over is not None:
        return f"{said} with cohort.over: the first answers count, and liars may be the quickest; leave cohort.over out"
    known, what = (job.cohort.size, "sites") if secure is None else (secure.groups, "groups")
    return why_too_few(robust, known, what) if known is not None else None


_CLIENT = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}
_RECORD = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}
PROTECTIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "secure aggregation": {"secure_aggregation": {}},
    "record-level": {"privacy": {"record": _RECORD}},
    "record-level, secure": {"privacy": {"record": _RECORD}, "secure_aggregation": {}},
    "client-level, central": {"privacy": {"client": _CLIENT}},
    "client-level, local": {"privacy": {"client": {**_CLIENT, "placement": "local"}}},
    "client-level, distributed": {
        "privacy": {"client": {**_CLIENT, "placement": "distributed"}},
        "secure_aggregation": {"bits": 20},
    },
    "both, secure": {"privacy": {"record": _RECORD, "client": _CLIENT}, "secure_aggregation": {}},
}
"""What a job may be protected by, by name: the tables of a job that say so."""


def matrix(strategies: Iterable[str]) -> dict[str, dict[str, str | None]]:
    """For each strategy and protection: why a job cannot have both, or None if it can.

    Each strategy has the settings that it asks for whatever the protection: equal weights, say.
    """
    return {name: {kind: _why(name, tables) for kind, tables in PROTECTIONS.items()} for name in strategies}


def protected(raw: Mapping[str, Any], strategy: str, protection: Mapping[str, Any]) -> dict[str, Any]:
    """The job `raw`, with that strategy and what it asks for, under that protection."""
    from strategies.catalogue import STRATEGIES, resolve  # It checks what it builds here.

    traits: Traits = resolve(strategy, STRATEGIES, key="strategy.name")().traits
    equal = "client" in protection.get("privacy", {}) or traits.equal_weights
    clock = {"simulation": {**raw.get("simulation", {}), "devices": {"all": {"share": 1.0}}}}
    chosen = {"strategy": {"name": strategy, "weighting": "equal" if equal else "rows"}}
    return {**raw, **protection, **chosen, **(clock if traits.asynchronous else {})}


def _why(strategy: str, protection: Mapping[str, Any]) -> str | None:
    columns = {"x": {"range": [0, 1]}, "y": {"range": [0, 1]}}
    training = {"rounds": 2, "local_steps": 2, "batch_size": 8, "learning_rate": 0.1}
    raw = {"name": "matrix", "data": {"target": "z", "columns": columns}, "training": training}
    try:
        check_job(protected(raw, strategy, protection), where="")
    except JobError as error:
        return str(error).removeprefix(": the job: ")
    return None

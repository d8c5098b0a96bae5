"""Names to things: what ships with fedchorus, or `package.module:Name` for what users bring."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from privacy.errors import JobError
from strategies.composition import check_composition
from strategies.explain import one_line
from strategies.job import Job, StrategyChoice
from strategies.lora import Adapters
from strategies.parameters import Parameters
from strategies.partial import PartialAverage, shares_of
from strategies.protocol import Strategy, Traits

STRATEGIES: Mapping[str, str] = {
    "fedavg": "strategies.fedavg:FedAvg",
    "fedavgm": "strategies.fedavgm:FedAvgM",
    "fedadagrad": "strategies.fedopt:FedAdagrad",
    "fedadam": "strategies.fedopt:FedAdam",
    "fedyogi": "strategies.fedopt:FedYogi",
    "fedprox": "strategies.fedprox:FedProx",
    "scaffold": "strategies.scaffold:Scaffold",
    "fednova": "strategies.fednova:FedNova",
    "feddyn": "strategies.feddyn:FedDyn",
    "q-ffl": "strategies.qffl:QFfl",
    "fedbn": "strategies.fedper:FedBn",
    "fedper": "strategies.fedper:FedPer",
    "fedper-adam": "strategies.fedper:FedPerAdam",
    "fedrep": "strategies.fedper:FedRep",
    "ditto": "strategies.ditto:Ditto",
    "pfedme": "strategies.pfedme:PFedMe",
    "ifca": "strategies.ifca:Ifca",
    "fedbuff": "strategies.fedbuff:FedBuff",
}
METHODS = ("start", "broadcast", "contribution", "personalise", "own_model", "step")


def resolve(name: str, known: Mapping[str, str], *, key: str) -> Any:
    """The object called `name` in `known`, or imported from `package.module:Name`; `key` names the job's key.

    Only ever called on a name from the local job file: nothing that a server sends is imported.
    Raises `JobError` with the nearest known name.
    """
    target = known.get(name, name)
    module, separator, attribute = target.partition(":")
    if not separator:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}, or package.module:Name"
        raise JobError(f"{key}: unknown name {name!r}{hint}")
    if not module or module.startswith(".") or not attribute:
        raise JobError(f"{key}: {target!r} is not package.module:Name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise JobError(f"{key}: cannot import {module!r} ({error}); is it installed in this environment?") from None
    except AttributeError:
        raise JobError(f"{key}: module {module!r} has no {attribute!r}") from None
    except Exception as error:
        raise JobError(f"{key}: importing {module!r} failed with {type(error).__name__}: {_line(error)}") from error


def build(kind: Any, methods: Sequence[str], *arguments: Any, key: str, **settings: Any) -> Any:
    """`kind(*arguments, **settings)`, which must have `methods`. Raises `JobError`."""
    try:
        thing = kind(*arguments, **settings)
    except Exception as error:
        raise JobError(f"{key}: it cannot be built ({type(error).__name__}: {_line(error)})") from error
    missing = [name for name in methods if not callable(getattr(thing, name, None))]
    if missing:
        raise JobError(f"{key}: it has no method {', '.join(missing)} (docs/extending.md)")
    return thing


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def strategy_for(job: Job) -> Strategy:
    """The job's strategy; both the server and the clients build it from the same job.

    Raises `JobError` for settings that it does not have, and for a job that it cannot work in.
    """
    kind = resolve(job.strategy.name, STRATEGIES, key="strategy.name")
    strategy: Strategy = build(kind, METHODS, key="strategy.name", **_settings(kind, job.strategy))
    if not isinstance(getattr(strategy, "traits", None), Traits):
        raise JobError(
            f"strategy.name: {job.strategy.name} has no `traits`, a strategies.protocol:Traits that says what it needs "
            "(docs/extending.md)"
        )
    check_composition(job, strategy)
    shares, tuning = shares_of(job), job.task.tuning
    if shares:
        strategy = PartialAverage(strategy, shares)
    if tuning is not None and (tuning.ranks or tuning.refactor_every):
        strategy = Adapters(strategy, tuning.ranks or {}, tuning.refactor_every)
    return strategy


def fitted(strategy: Strategy, parameters: Parameters) -> Strategy:
    """The strategy for a model of these arrays: what steps on the server. Raises `JobError`."""
    return strategy.fitted(parameters) if isinstance(strategy, Adapters) else strategy


def _settings(kind: Any, choice: StrategyChoice) -> dict[str, Any]:
    """What the job says of the strategy's own settings, each held to the type that its class declares."""
    given = {"weighting": choice.weighting, **(choice.model_extra or {})}
    if choice.server_learning_rate is not None:
        given["server_learning_rate"] = choice.server_learning_rate
    if not is_dataclass(kind) or not isinstance(kind, type):
        return given
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # A user's class that imports its types for a type checker alone.
        hints = {}
    known = [field.name for field in fields(kind) if field.init]
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, ["name", *known], n=1)
            hint = f"did you mean strategy.{close[0]}?" if close else f"{choice.name} has {', '.join(known)}"
            raise JobError(f"unknown key strategy.{name}; {hint}")
        try:
            given[name] = TypeAdapter(hints.get(name, Any)).validate_python(value, strict=not isinstance(value, list))
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            said = message[0].lower() + message[1:]
            raise JobError(f"strategy.{name}: {said.removeprefix('input ')}, got {one_line(repr(value))}") from None
    return given

"""Names to things: what ships with fedchorus, or `package.module:Name` for what users bring."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from privacy.errors import JobError
from strategies.job import Job
from strategies.protocol import Strategy

STRATEGIES: Mapping[str, str] = {"fedavg": "strategies.fedavg:FedAvg"}


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
    """The job's strategy; both the server and the clients build it from the same job."""
    kind = resolve(job.strategy.name, STRATEGIES, key="strategy.name")
    choice = job.strategy
    settings = {"weighting": choice.weighting, "server_learning_rate": choice.server_learning_rate}
    strategy: Strategy = build(kind, ("contribution", "step"), key="strategy.name", **settings)
    return strategy

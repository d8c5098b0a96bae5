"""The calculator of `fedchorus plan`: what noise costs, or what noise an epsilon takes, with no job around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from privacy.accountant import Epsilon, bounds, epsilon, noise_multiplier_for
from privacy.errors import UnsupportedEvent
from privacy.events import (
    ADD_OR_REMOVE_ONE,
    LEAST_NOISE,
    MOST_NOISE,
    MOST_RELEASES,
    REPLACE_ONE,
    GaussianEvent,
    Scheme,
)
from privacy.prv import Bounds

if TYPE_CHECKING:
    from rich.console import Console

Phase = tuple[float, float, int]  # Noise multiplier, sampling rate, steps.


def calculate(
    *,
    delta: float | None,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    sampling_rate: str | None = None,
    steps: int | None = None,
    phases: Sequence[str] = (),
    replace_one: bool = False,
    scheme: str | None = None,
    rows: int | None = None,
) -> dict[str, Any]:
    """Answer what noise costs, or what noise a target epsilon takes.

    Arguments are the options of `fedchorus plan`; a rate may be written 256/60000. Returns `epsilon` (`pld`, `rdp`,
    `exact` or None), `bounds` (`lower`, `estimate`, `upper`, or None) and, for a target, the `noise_multiplier`. The
    noise is taken to be continuous. Raises `UnsupportedEvent`, one line that names the option.
    """
    _require(delta is not None and 0 < delta < 1, "--delta", "lie strictly between 0 and 1", delta)
    assert delta is not None
    _require(rows is None or rows >= 1, "--rows", "be 1 or more", rows)
    _require(
        rows is None or delta < 1 / rows,
        "--delta",
        f"be below 1/{rows}, one over --rows, or it would allow to publish one of them outright",
        delta,
    )
    if phases:
        single = {"noise-multiplier": noise_multiplier, "epsilon": target_epsilon, "sampling-rate": sampling_rate}
        for name, value in {**single, "steps": steps}.items():
            if value is not None:
                raise UnsupportedEvent(f"--{name}: cannot go with --phase, which states noise, rate and steps itself")
        plan = [_parsed(phase) for phase in phases]
    else:
        rate = 1.0 if sampling_rate is None else _rate(sampling_rate, "--sampling-rate")
        plan = [_single(noise_multiplier, target_epsilon, rate, steps, delta, replace_one)]
    sampling = _scheme(scheme, replace_one, sampled=any(rate < 1 for _, rate, _ in plan))
    events = [
        GaussianEvent(
            noise_multiplier=noise,
            clip_norm=1.0,
            sampling_rate=rate,
            count=count,
            scheme=sampling,
            adjacency=REPLACE_ONE if replace_one else ADD_OR_REMOVE_ONE,
            rng="os",
        )
        for noise, rate, count in plan
    ]
    answer: dict[str, Any] = {} if target_epsilon is None else {"noise_multiplier": plan[0][0]}
    return {**answer, **figures(epsilon(events, delta), bounds(events, delta))}


def figures(cost: Epsilon, within: Bounds | None) -> dict[str, Any]:
    """`epsilon` and `bounds` in JSON's types."""
    methods = {"pld": cost.pld, "rdp": cost.rdp, "exact": cost.exact}
    return {"epsilon": methods, "bounds": None if within is None else asdict(within)}


def print_answer(console: Console, answer: Mapping[str, Any], *, delta: float) -> None:
    cost, within = answer["epsilon"], answer["bounds"]
    if "noise_multiplier" in answer:
        console.print(f"noise multiplier {answer['noise_multiplier']:.4f}, which costs")
    exact = "" if cost["exact"] is None else ", exactly"
    console.print(
        f"epsilon {cost['pld']:.4f} at delta {delta:g}{exact} (by Rényi DP {cost['rdp']:.4f})", soft_wrap=True
    )
    if within is not None and cost["exact"] is None:
        console.print(f"proven to lie between {within['lower']:.4f} and {within['upper']:.4f}")


def _single(
    noise: float | None, target: float | None, rate: float, steps: int | None, delta: float, replace_one: bool
) -> Phase:
    if (noise is None) == (target is None):
        raise UnsupportedEvent(
            "--noise-multiplier, --epsilon: give one, the noise to learn its cost or the cost to learn its noise; "
            f"got {'neither' if noise is None else 'both'}"
        )
    count = _count(steps, "--steps")
    if target is not None:
        _require(0 < target < math.inf, "--epsilon", "be a finite number > 0", target)
        noise = noise_multiplier_for(target_epsilon=target, delta=delta, sampling_rate=rate, count=count)
        noise *= 2 if replace_one else 1  # What is replaced moves twice as far.
    return _noise(noise, "--noise-multiplier"), rate, count


def _parsed(phase: str) -> Phase:
    parts = phase.split(",")
    _require(len(parts) == 3, "--phase", "be noise,rate,steps, for example 1.1,256/60000,3515", phase)
    try:
        noise, count = float(parts[0]), int(parts[2])
    except ValueError:
        raise UnsupportedEvent(f"--phase: the noise must be a number and the steps a whole one, got {phase}") from None
    return _noise(noise, f"--phase {phase}"), _rate(parts[1], f"--phase {phase}"), _count(count, f"--phase {phase}")


def _rate(text: str, option: str) -> float:
    above, slash, below = text.partition("/")
    try:
        rate = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        rate = math.nan
    _require(0 < rate <= 1, option, "have a sampling rate in (0, 1], as 0.01 or 256/60000", text)
    return rate


def _noise(noise: float | None, option: str) -> float:
    _require(noise is not None and LEAST_NOISE <= noise <= MOST_NOISE, option, "have noise in [1/16, 2^20]", noise)
    assert noise is not None
    return noise


def _count(count: int | None, option: str) -> int:
    _require(count is not None and 1 <= count <= MOST_RELEASES, option, "have a whole number in [1, 2^40]", count)
    assert count is not None
    return count


def _scheme(named: str | None, replace_one: bool, *, sampled: bool) -> Scheme:
    known: dict[str, Scheme] = {scheme.replace("_", "-"): scheme for scheme in get_args(Scheme)}
    _require(named is None or named in known, "--scheme", f"be one of {', '.join(known)}", named)
    scheme = known[named] if named is not None else "none" if replace_one and not sampled else "poisson"
    if scheme == "poisson" and replace_one:
        raise UnsupportedEvent(
            "--replace-one: nothing here speaks for Poisson samples under it; add --scheme without-replacement"
        )
    if scheme == "without_replacement" and not replace_one:
        raise UnsupportedEvent(
            "--scheme: without-replacement needs --replace-one; one unit more has no meaning for samples of fixed size"
        )
    if scheme == "none" and sampled:
        raise UnsupportedEvent(
            "--scheme: none has no sampling rate; leave it out, and let the steps be epochs where batches are shuffled"
        )
    return scheme


def _require(holds: bool, option: str, expected: str, got: object) -> None:
    if not holds:
        raise UnsupportedEvent(f"{option}: must {expected}; got {'nothing' if got is None else got}")

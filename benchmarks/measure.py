"""What every benchmark shares: interleaved pairs, a ratio with its spread, one JSON object at the end."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true", help="print the JSON object alone")
    options.add_argument("--quick", action="store_true", help="fewer and smaller repetitions: for a first look")
    return options


def interleaved(one: Callable[[], None], other: Callable[[], None], pairs: int) -> dict[str, Any]:
    """CPU seconds of `one` over those of `other`, in turn (A B, B A, ...), after one warm-up of each.

    CPU time and not wall time: neighbours on the machine move the wall clock.
    """
    one()
    other()
    ratios, first, second = [], [], []
    for pair in range(pairs):
        order = (one, other) if pair % 2 == 0 else (other, one)
        seconds = {side: _cpu_seconds(side) for side in order}
        first.append(seconds[one])
        second.append(seconds[other])
        ratios.append(seconds[one] / seconds[other])
    return {**spread(ratios), "seconds": statistics.median(first), "seconds_other": statistics.median(second)}


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def finish(result: Mapping[str, Any], *, as_json: bool, lines: list[str]) -> None:
    """Print the readable lines (unless --json), then the object as the last line."""
    if not as_json:
        print(f"{platform.platform()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
        print("\n".join(lines))
    print(json.dumps(result))


def _cpu_seconds(side: Callable[[], None]) -> float:
    began = time.process_time()
    side()
    return time.process_time() - began

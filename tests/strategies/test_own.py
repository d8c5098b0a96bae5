"""The strategy that docs/extending.md writes out is one, as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from strategies.catalogue import strategy_for
from strategies.protocol import Strategy
from tests.strategies.contract import StrategyContract
from tests.strategies.jobs import make_job

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = next(
    block for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S) if "SparseAvg(FedAvg)" in block
)


@pytest.fixture(autouse=True)
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("documented_strategy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(BLOCK, "extending.md", "exec"), module.__dict__)


class TestSparseAvg(StrategyContract):
    def make(self) -> Strategy:
        return strategy_for(make_job(strategy={"name": "documented_strategy:SparseAvg", "shrink": 0.0005}))


def test_it_is_no_longer_than_forty_lines() -> None:
    assert len(BLOCK.strip().splitlines()) <= 40

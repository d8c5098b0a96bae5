"""A name is what ships with fedchorus or what the user brings; a wrong one is answered with what to write."""

from dataclasses import dataclass

import pytest

from privacy.errors import JobError
from strategies.catalogue import STRATEGIES, resolve, strategy_for
from strategies.fedavg import FedAvg
from strategies.parameters import Vector
from strategies.protocol import Added, Local, ServerState
from strategies.total import Total
from tests.strategies.jobs import make_job

KNOWN = {"fedavg": "strategies.fedavg:FedAvg", "absent": "strategies.nowhere:Absent"}


@dataclass(frozen=True, kw_only=True)
class LastWins(FedAvg):
    """A strategy of the user's own."""

    patience: int = 3

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        out[:] = local.fit(received)
        return Added(1.0)

    def step(self, state: ServerState, total: Total) -> ServerState:
        return ServerState(total.update.astype("float32"), state.round_number + 1)


def test_a_job_gets_the_strategy_it_names_with_its_settings() -> None:
    assert strategy_for(make_job()) == FedAvg(weighting="rows", server_learning_rate=1.0)
    job = make_job(strategy={"weighting": "equal", "server_learning_rate": 0.25})
    assert strategy_for(job) == FedAvg(weighting="equal", server_learning_rate=0.25)


def test_a_strategy_of_the_users_own_is_named_by_package_module_and_name() -> None:
    job = make_job(strategy={"name": f"{__name__}:LastWins", "server_learning_rate": 0.5, "patience": 7})
    assert strategy_for(job) == LastWins(weighting="rows", server_learning_rate=0.5, patience=7)


class Speechless:
    """A strategy of a user's own that does not say what it needs."""

    def __init__(self, **settings: object) -> None: ...

    def nothing(self, *anything: object) -> None: ...

    start = broadcast = contribution = personalise = own_model = step = nothing


def test_a_strategy_that_does_not_say_what_it_needs_is_refused() -> None:
    with pytest.raises(
        JobError, match=r"strategy\.name: .*:Speechless has no `traits`, .*docs/extending\.md"
    ) as caught:
        strategy_for(make_job(strategy={"name": f"{__name__}:Speechless"}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_name_in_the_catalogue_resolves(name: str) -> None:
    assert callable(resolve(name, STRATEGIES, key="strategy.name"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fedavgg", "unknown name 'fedavgg'; did you mean 'fedavg'?"),
        ("FedAvg", "unknown name 'FedAvg'; did you mean 'fedavg'?"),
        ("scaffold", "unknown name 'scaffold'; known: fedavg, absent, or package.module:Name"),
        ("", "unknown name ''; known: fedavg"),
        ("absent", "cannot import 'strategies.nowhere'"),
        ("no.such.package:Name", "cannot import 'no.such.package' (No module named 'no'); is it installed"),
        ("strategies.fedavg:FedSgd", "module 'strategies.fedavg' has no 'FedSgd'"),
        ("strategies.fedavg:FedAvg:x", "module 'strategies.fedavg' has no 'FedAvg:x'"),
        (":FedAvg", "':FedAvg' is not package.module:Name"),
        ("strategies.fedavg:", "'strategies.fedavg:' is not package.module:Name"),
        (":", "':' is not package.module:Name"),
        (".fedavg:FedAvg", "'.fedavg:FedAvg' is not package.module:Name"),
        ("..strategies.fedavg:FedAvg", "'..strategies.fedavg:FedAvg' is not package.module:Name"),
    ],
)
def test_a_wrong_name_is_answered_with_the_key_and_what_to_write(name: str, said: str) -> None:
    with pytest.raises(JobError) as caught:
        resolve(name, KNOWN, key="strategy.name")
    assert str(caught.value).startswith("strategy.name: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)

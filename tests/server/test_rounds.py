"""The round loop adds up its cohort, keeps what it recorded, and goes on where it stopped as if it never had."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from privacy.errors import RunError
from privacy.ledger import Head, digest_of
from privacy.noise import SeededNoise
from server.cohort import draw_cohort
from server.collect import Failure, PlainCollector
from server.release import PlainRelease
from server.rounds import RoundResult, heads_line, run_rounds
from strategies.fedavg import FedAvg
from strategies.job import Job
from strategies.messages import Answer, Ask, Reply, Request
from strategies.protocol import ServerState
from strategies.total import Layout
from tests.strategies.jobs import make_job

TARGETS = {"a": 1.0, "b": 3.0, "c": -2.0}
ROWS = {"a": 10, "b": 20, "c": 30}
START = ServerState(np.array([5.0, -5.0], np.float32))


@dataclass
class Clinics:
    """A transport to sites that each move half way to their own target: whole federations in closed form."""

    heads: bool = False
    silent: Mapping[int, set[str]] = field(default_factory=dict)  # By round: who does not answer.
    asked: list[tuple[Ask, list[str]]] = field(default_factory=list)

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        for ask in list(requests.values())[:1]:
            assert isinstance(ask, Ask)
            self.asked.append((ask, list(requests)))
        for site, ask in requests.items():
            assert isinstance(ask, Ask)
            if site in self.silent.get(ask.round_number, set()):
                yield site, Failure(site, "dropped out")
                continue
            update = (np.float32(TARGETS[site]) - ask.model) / 2
            head = Head(2 * ask.round_number, f"{site}-{ask.round_number}") if self.heads else None
            contribution = np.append(ROWS[site] * update, np.float32(ROWS[site])).astype(np.float32)
            yield site, Reply(site, ask.job, ask.round_number, contribution, head)


@dataclass
class Run:
    """Drives `run_rounds` and keeps what it did, in order."""

    job: Job
    transport: Clinics = field(default_factory=Clinics)
    results: list[RoundResult] = field(default_factory=list)
    kept: list[ServerState] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def go(
        self,
        state: ServerState = START,
        *,
        heads: Mapping[str, Head] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> ServerState:
        return run_rounds(
            state,
            job=self.job,
            strategy=FedAvg(),
            collector=PlainCollector(self.transport),
            release=PlainRelease(Layout(2)),
            cohort=lambda number: cohort_of(self.job, number),
            evaluate=self.evaluate,
            record=self.record,
            checkpoint=self.checkpoint,
            heads=heads or {},
            stop=stop,
        )

    def evaluate(self, state: ServerState) -> Mapping[str, Any]:
        self.events.append("evaluate")
        return {"norm": float(np.linalg.norm(state.model.astype(float)))}

    def record(self, result: RoundResult) -> None:
        self.events.append(f"record {result.round_number}")
        self.results.append(result)

    def checkpoint(self, state: ServerState) -> None:
        self.events.append(f"checkpoint {state.round_number}")
        self.kept.append(state)


def job(rounds: int = 4, **cohort: int) -> Job:
    return make_job(training={"rounds": rounds}, cohort=cohort)


def cohort_of(job: Job, number: int) -> list[str]:
    return draw_cohort(
        sorted(TARGETS), job.cohort, seed=job.seed, round_number=number, secret=lambda n: SeededNoise(1, n)
    )


def after_rounds(count: int, sites: str = "abc") -> float:
    """The first coordinate by hand: the weighted mean target is approached by half each round."""
    mean = sum(ROWS[s] * TARGETS[s] for s in sites) / sum(ROWS[s] for s in sites)
    return mean + (5.0 - mean) / 2.0**count


class TestRounds:
    def test_each_round_takes_the_weighted_mean_step(self) -> None:
        run = Run(job())
        state = run.go()
        assert state.round_number == 4
        assert state.model[0] == pytest.approx(after_rounds(4))
        assert [float(r.model[0]) for r in run.results] == pytest.approx([after_rounds(n) for n in (1, 2, 3, 4)])
        assert [r.evaluation["norm"] for r in run.results] == pytest.approx(
            [np.linalg.norm(s.model.astype(float)) for s in run.kept]
        )
        assert [r.collected.contributors for r in run.results] == [("a", "b", "c")] * 4

    def test_each_request_carries_the_job_the_round_and_the_model_before_it(self) -> None:
        run = Run(job())
        run.go()
        asks = [ask for ask, _ in run.transport.asked]
        assert [(ask.job, ask.round_number) for ask in asks] == [(run.job.hash, n) for n in (1, 2, 3, 4)]
        for ask, before in zip(asks, [START, *run.kept], strict=False):
            np.testing.assert_array_equal(ask.model, before.model)

    def test_records_before_it_keeps_so_that_nothing_is_kept_unrecorded(self) -> None:
        run = Run(job(2))
        run.go()
        assert run.events == ["evaluate", "record 1", "checkpoint 1", "evaluate", "record 2", "checkpoint 2"]

    def test_a_finished_run_asks_no_one(self) -> None:
        run, finished = Run(job(2)), ServerState(START.model, 2)
        assert run.go(finished) is finished
        assert run.transport.asked == []
        assert run.events == []

    def test_asks_the_cohort_of_each_round(self) -> None:
        run = Run(job(6, size=2))
        run.go()
        expected = [cohort_of(run.job, n) for n in range(1, 7)]
        assert [sites for _, sites in run.transport.asked] == expected
        assert len({tuple(sites) for sites in expected}) > 1

    def test_goes_on_without_those_that_do_not_answer(self) -> None:
        run = Run(job(1, minimum=2), Clinics(silent={1: {"c"}}))
        assert run.go().model[0] == pytest.approx(after_rounds(1, "ab"))
        assert run.results[0].collected.failures == {"c": "dropped out"}


class TestResume:
    @pytest.mark.parametrize("finished", [1, 2, 3])
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, finished: int) -> None:
        whole, first, second = (Run(job(4, size=2), Clinics(heads=True)) for _ in range(3))
        expected = whole.go()
        first.go(stop=lambda: len(first.kept) == finished)
        assert first.kept[-1].round_number == finished
        state = second.go(first.kept[-1], heads=first.results[-1].heads)
        assert state.model.tobytes() == expected.model.tobytes()
        assert [r.round_number for r in second.results] == list(range(finished + 1, 5))
        assert second.results[-1].heads == whole.results[-1].heads
        asked = [*first.transport.asked, *second.transport.asked]
        for (ask, sites), (expected_ask, expected_sites) in zip(asked, whole.transport.asked, strict=True):
            assert (ask.model_hash, ask.witness, sites) == (
                expected_ask.model_hash,
                expected_ask.witness,
                expected_sites,
            )

    def test_stop_ends_the_run_after_the_round_it_came_in(self) -> None:
        run = Run(job())
        answers = iter([False, False, True])
        state = run.go(stop=lambda: next(answers))
        assert state.round_number == 2
        assert run.events[-1] == "checkpoint 2"

    def test_a_stop_before_the_first_round_asks_no_one(self) -> None:
        run = Run(job())
        assert run.go(stop=lambda: True) is START
        assert run.transport.asked == []


class TestWitness:
    def test_each_round_carries_the_digest_of_all_heads_after_the_one_before(self) -> None:
        run = Run(job(3), Clinics(heads=True))
        run.go()
        asks = [ask for ask, _ in run.transport.asked]
        assert asks[0].witness is None
        for ask, result in zip(asks[1:], run.results, strict=False):
            assert ask.witness == digest_of(heads_line(result.round_number, result.heads))
        line = {"round": 1, "heads": {site: [2, f"{site}-1"] for site in "abc"}}
        assert heads_line(1, run.results[0].heads) == line
        assert asks[1].witness == digest_of(line)

    def test_the_newest_head_of_a_silent_site_stays_witnessed(self) -> None:
        run = Run(job(3), Clinics(heads=True, silent={2: {"b"}}))
        run.go()
        assert run.results[1].heads == {"a": Head(4, "a-2"), "b": Head(2, "b-1"), "c": Head(4, "c-2")}
        assert run.transport.asked[2][0].witness == digest_of(heads_line(2, run.results[1].heads))

    def test_the_heads_of_a_round_do_not_change_afterwards(self) -> None:
        run = Run(job(3), Clinics(heads=True))
        run.go()
        assert [result.heads["a"] for result in run.results] == [Head(2 * n, f"a-{n}") for n in (1, 2, 3)]

    def test_without_ledgers_there_is_no_witness(self) -> None:
        run = Run(job(3))
        run.go()
        assert {ask.witness for ask, _ in run.transport.asked} == {None}
        assert run.results[-1].heads == {}

    def test_the_order_in_which_sites_answer_does_not_matter(self) -> None:
        heads = {"b": Head(1, "y"), "a": Head(2, "x")}
        assert digest_of(heads_line(3, heads)) == digest_of(heads_line(3, dict(reversed(heads.items()))))
        assert digest_of(heads_line(3, heads)) != digest_of(heads_line(4, heads))


class TestFailures:
    def test_too_few_answers_end_the_run_before_the_step(self) -> None:
        run = Run(job(4, minimum=2), Clinics(silent={2: {"a", "c"}}))
        with pytest.raises(RunError) as caught:
            run.go()
        message = str(caught.value)
        assert message.startswith("round 2: 1 of 3 sites answered, the minimum is 2 (a: dropped out, c: dropped out)")
        assert "mend them and resume" in message
        assert run.events == ["evaluate", "record 1", "checkpoint 1"]

    def test_nobody_ends_the_run_whatever_the_minimum(self) -> None:
        run = Run(job(1), Clinics(silent={1: set(TARGETS)}))
        with pytest.raises(RunError, match="round 1: 0 of 3 sites answered, the minimum is 1"):
            run.go()
        assert run.events == []

    def test_the_run_that_was_ended_can_be_resumed(self) -> None:
        run = Run(job(2, minimum=3), Clinics(silent={2: {"a"}}))
        with pytest.raises(RunError):
            run.go()
        again = Run(job(2, minimum=3))
        assert again.go(run.kept[-1]).model[0] == pytest.approx(after_rounds(2))

    def test_a_diverged_model_is_neither_recorded_nor_kept(self) -> None:
        class Exploding(Clinics):
            def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
                for site, answer in super().exchange(requests):
                    if isinstance(answer, Reply) and answer.round_number == 3:
                        # Sound by itself: the mean of such updates is what leaves float32.
                        answer.contribution[:] = [1e38, 1e38, 1e-10]
                    yield site, answer

        run = Run(job(), Exploding())
        with pytest.raises(RunError, match=r"round 3: the model diverged; lower training\.learning_rate"):
            run.go()
        assert run.events[-1] == "checkpoint 2"
        assert all(np.isfinite(state.model).all() for state in run.kept)

    def test_an_error_while_recording_keeps_nothing(self) -> None:
        class Full(Run):
            def record(self, result: RoundResult) -> None:
                raise OSError("no space left")

        run = Full(job())
        with pytest.raises(OSError, match="no space left"):
            run.go()
        assert run.kept == []

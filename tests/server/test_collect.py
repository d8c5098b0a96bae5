"""Whatever a cohort answers, the total is the sum of its sound contributions, and every other site is named."""

import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import RunError
from privacy.ledger import Head
from server.collect import Collected, Collector, Failure, PlainCollector, RobustCollector, collector_for
from strategies.job_privacy import Robust
from strategies.messages import Refusal, Reply, Request, Stepped, ask_for
from strategies.total import Layout, Total
from tests.strategies.jobs import make_job

JOB = "ab" * 32
LAYOUT = Layout(3, ("loss",))
ASK = ask_for(JOB, 4, np.zeros(3, np.float32), None)
Answer = Reply | Refusal | Stepped | Failure


@dataclass(frozen=True)
class Scripted:
    """A transport that gives the answers it was given, in their order."""

    answers: Sequence[tuple[str, Answer]]

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer]]:
        yield from self.answers


def reply(site: str, value: float = 1.0, *, head: Head | None = None) -> Reply:
    """`value` for each parameter, ten times that for the weight, half of it for the loss."""
    return Reply(site, JOB, 4, np.array([value, value, value, 10 * value, value / 2], np.float32), head)


def collect(sites: Sequence[str], *answers: tuple[str, Answer]) -> Collected:
    return PlainCollector(Scripted(answers)).collect(ASK, sites, Total(LAYOUT))


def assert_total(collected: Collected, value: float) -> None:
    assert collected.total.update.tolist() == [value] * 3
    assert collected.total.weight == 10 * value
    assert collected.total.metrics == {"loss": value / 2}


def test_sums_the_contributions_in_whatever_order_they_come() -> None:
    collected = collect(["a", "b", "c"], ("c", reply("c", 4)), ("a", reply("a", 1)), ("b", reply("b", 2)))
    assert_total(collected, 7)
    assert collected.contributors == ("a", "b", "c")
    assert collected.failures == {}
    assert collected.heads == {}


BAD: list[tuple[Answer, str]] = [
    (Refusal("a", JOB, 4), "refused"),
    (Stepped("a", JOB, 4, "mask", b""), "malformed reply: it belongs to a secure sum"),
    (Refusal("somebody", "no job", -1), "refused"),
    (Failure("a", "dropped out"), "dropped out"),
    (replace(reply("a"), site="b"), "malformed reply: the reply carries another site's name"),
    (replace(reply("a"), job="0" * 64), "malformed reply: the reply is for another job or round"),
    (replace(reply("a"), round_number=3), "malformed reply: the reply is for another job or round"),
    (
        replace(reply("a"), contribution=np.zeros(4, np.float32)),
        "malformed reply: the contribution must be float32 (5,)",
    ),
    (
        replace(reply("a"), contribution=np.ones(5)),  # type: ignore[arg-type]
        "malformed reply: the contribution must be float32 (5,), got float64 (5,)",
    ),
    (reply("a", float("nan")), "malformed reply: the contribution is not finite"),
    (reply("a", float("inf")), "malformed reply: the contribution is not finite"),
    (reply("a", -1.0), "malformed reply: the weight is not positive"),
    (reply("a", 0.0), "malformed reply: the weight is not positive"),
]


@pytest.mark.parametrize(("answer", "why"), BAD)
class TestAnUnsoundAnswer:
    def test_is_survived_and_named(self, answer: Answer, why: str) -> None:
        collected = collect(["a", "b"], ("a", answer), ("b", reply("b", 2)))
        assert_total(collected, 2)
        assert collected.contributors == ("b",)
        assert list(collected.failures) == ["a"]
        assert collected.failures["a"].startswith(why)

    def test_cannot_be_mended_by_a_second_one(self, answer: Answer, why: str) -> None:
        collected = collect(["a"], ("a", answer), ("a", reply("a", 5)))
        assert_total(collected, 0)
        assert collected.contributors == ()
        assert collected.failures["a"].startswith(why)

    def test_leaves_no_ledger_head(self, answer: Answer, why: str) -> None:
        if isinstance(answer, Reply):
            answer = replace(answer, head=Head(3, "cd" * 32))
        assert collect(["a"], ("a", answer)).heads == {}


class TestAttendance:
    def test_who_does_not_answer_is_named(self) -> None:
        collected = collect(["c", "a", "b"], ("b", reply("b")))
        assert collected.failures == {"a": "no answer", "c": "no answer"}
        assert list(collected.failures) == ["a", "c"]

    def test_a_site_counts_once(self) -> None:
        answers: list[tuple[str, Answer]] = [("a", reply("a", 1)), ("a", reply("a", 50)), ("a", Refusal("a", JOB, 4))]
        collected = collect(["a"], *answers)
        assert_total(collected, 1)
        assert collected.contributors == ("a",)
        assert collected.failures == {}

    def test_who_was_not_asked_does_not_count(self) -> None:
        collected = collect(["a"], ("z", reply("z", 50)), ("a", reply("a", 1)), ("y", Failure("y", "broken")))
        assert_total(collected, 1)
        assert collected.contributors == ("a",)
        assert collected.failures == {}

    def test_nobody_gives_an_empty_total(self) -> None:
        collected = collect(["a", "b"])
        assert_total(collected, 0)
        assert collected.contributors == ()
        assert set(collected.failures) == {"a", "b"}

    def test_heads_come_from_those_that_sent_one(self) -> None:
        collected = collect(["a", "b"], ("a", reply("a", head=Head(3, "cd" * 32))), ("b", reply("b")))
        assert collected.heads == {"a": Head(3, "cd" * 32)}

    def test_a_transport_that_breaks_is_not_hidden(self) -> None:
        class Broken:
            def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer]]:
                yield "a", reply("a")
                raise ConnectionError("gone")

        with pytest.raises(ConnectionError):
            PlainCollector(Broken()).collect(ASK, ["a", "b"], Total(LAYOUT))


KINDS: dict[str, Answer] = {"refuses": Refusal("x", JOB, 4), "fails": Failure("x", "broken"), "lies": reply("x")}


@settings(max_examples=100, deadline=None)
@given(
    asked=st.lists(st.sampled_from("abcdefgh"), unique=True),
    answers=st.lists(
        st.tuples(st.sampled_from("abcdefghij"), st.sampled_from([*KINDS, "answers"]), st.integers(1, 1000)),
        max_size=20,
    ),
)
def test_every_site_asked_is_a_contributor_or_a_failure_by_its_first_answer(
    asked: list[str], answers: list[tuple[str, str, int]]
) -> None:
    script = [(site, reply(site, value) if kind == "answers" else KINDS[kind]) for site, kind, value in answers]
    collected = collect(asked, *script)
    first: dict[str, tuple[str, int]] = {}
    for site, kind, value in answers:
        first.setdefault(site, (kind, value))
    sound = {site: first[site][1] for site in asked if site in first and first[site][0] == "answers"}
    assert collected.contributors == tuple(sorted(sound))
    assert set(collected.failures) == set(asked) - set(sound)
    assert_total(collected, sum(sound.values()))


@dataclass(frozen=True)
class OneBuffer:
    """A transport that writes every contribution into the same memory, as the protocol allows."""

    parameters: int

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer]]:
        buffer = np.empty(self.parameters + 1, np.float32)
        for number, (site, ask) in enumerate(requests.items()):
            buffer.fill(number % 7 + 1)
            yield site, Reply(site, ask.job, ask.round_number, buffer, None)


@pytest.mark.parametrize("bounded", [False, True], ids=["plain", "norm bounding"])
def test_memory_is_that_of_a_model_or_two_whatever_the_cohort(bounded: bool) -> None:
    parameters, count = 100_000, 200 if bounded else 2000
    sites = [str(number) for number in range(count)]
    ask = ask_for(JOB, 1, np.zeros(parameters, np.float32), None)
    model_bytes = 4 * parameters
    transport = OneBuffer(parameters)
    collector: Collector = RobustCollector(transport, Robust(max_norm=1e9)) if bounded else PlainCollector(transport)
    tracemalloc.start()
    try:
        collected = collector.collect(ask, sites, Total(Layout(parameters)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The transport's buffer is one model, the total in float64 two; the names of the sites are 0.5 MB at most. What
    # bounds a norm works on one update in float64 at a time, and keeps a total of its own.
    assert peak < (14 if bounded else 4) * model_bytes + 500_000
    assert collected.total.update[0] == collected.total.update[-1]
    if bounded:  # Every update is 1 over its weight; they count alike, and the median weight is 4.
        assert collected.total.update[0] == pytest.approx(collected.total.weight) == 4 * count
    else:
        assert collected.total.update[0] == collected.total.weight == sum(number % 7 + 1 for number in range(count))


SITES = ["a", "b", "c", "d", "e"]
MEDIAN = Robust(reduce="median")


def collect_robustly(robust: Robust, *answers: tuple[str, Answer]) -> Collected:
    return RobustCollector(Scripted(answers), robust).collect(ASK, SITES, Total(LAYOUT))


def saying(site: str, mean: float, weight: float = 1.0) -> tuple[str, Reply]:
    return site, replace(reply(site), contribution=np.array([mean * weight] * 3 + [weight, 1.0], np.float32))


class TestRobustCollection:
    @pytest.mark.parametrize("robust", [MEDIAN, Robust(reduce="trimmed-mean"), Robust(reduce="krum")])
    def test_one_liar_does_not_move_a_robust_reduction(self, robust: Robust) -> None:
        collected = collect_robustly(robust, *(saying(site, 2.0) for site in "abcd"), saying("e", -1e9, 1e9))
        np.testing.assert_allclose(collected.total.update / collected.total.weight, 2.0)
        assert collected.total.weight == 5
        assert collected.total.metrics == {"loss": 5.0}
        assert collected.contributors == ("a", "b", "c", "d", "e")

    @pytest.mark.parametrize("robust", [MEDIAN, Robust(reduce="trimmed-mean"), Robust(max_norm=9.0)])
    @pytest.mark.parametrize(("answer", "why"), BAD)
    def test_unsound_late_and_double_answers_are_as_in_a_plain_round(
        self, answer: Answer, why: str, robust: Robust
    ) -> None:
        sound = [saying(site, 2.0) for site in "bcd"]
        collected = collect_robustly(
            robust, ("a", answer), *sound, saying("a", 50.0), saying("b", 50.0), saying("z", 50.0)
        )
        np.testing.assert_allclose(collected.total.update / collected.total.weight, 2.0)
        assert collected.contributors == ("b", "c", "d")
        assert list(collected.failures) == ["a", "e"]
        assert collected.failures["a"].startswith(why)
        assert collected.failures["e"] == "no answer"

    def test_a_round_with_too_few_answers_for_those_that_may_lie_ends(self) -> None:
        robust = Robust(reduce="krum", byzantine=1)
        collect_robustly(robust, *(saying(site, 2.0) for site in SITES))
        with pytest.raises(RunError) as caught:
            collect_robustly(robust, *(saying(site, 2.0) for site in "abcd"), ("e", Failure("e", "broken")))
        said = str(caught.value)
        assert said.startswith(
            'round 4: 4 of 5 sites answered, and robust.reduce = "krum" needs 5 where 1 may lie (e: '
        )
        assert "\n" not in said

    def test_norm_bounding_alone_takes_as_few_as_a_plain_round(self) -> None:
        collected = collect_robustly(Robust(max_norm=1.0), saying("a", 50.0, 2.0))
        np.testing.assert_allclose(np.linalg.norm(collected.total.update / collected.total.weight), 1.0)
        assert collected.total.weight == 2

    def test_heads_come_along(self) -> None:
        head, (site, own) = Head(3, "cd" * 32), saying("a", 2.0)
        collected = collect_robustly(MEDIAN, (site, replace(own, head=head)), *(saying(site, 2.0) for site in "bcd"))
        assert collected.heads == {"a": head}

    def test_a_job_gets_the_collector_that_it_asks_for(self) -> None:
        assert isinstance(collector_for(make_job(), Scripted([])), PlainCollector)
        assert collector_for(make_job(robust={"reduce": "median"}), Scripted([])) == RobustCollector(
            Scripted([]), MEDIAN
        )
        assert isinstance(collector_for(make_job(robust={"max_norm": 1.0}), Scripted([])), RobustCollector)

"""Sites fail as often as the job asks, the same way for the same seed, and nothing malformed passes the server."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy import stats

from privacy.ledger import Head
from server.collect import PlainCollector
from simulations.faults import MALFORMATIONS, DroppedOut, FaultySite
from simulations.inline import InlineTransport
from strategies.job import Faults
from strategies.messages import (
    Answer,
    Ask,
    MalformedMessage,
    Refusal,
    Reply,
    Request,
    Stage,
    Step,
    Stepped,
    ask_for,
    check_reply,
)
from strategies.total import Layout, Total

JOB = "ab" * 32
LAYOUT = Layout(3, ("loss",))
MODEL = np.zeros(3, np.float32)


@dataclass
class Sound:
    """A site that answers every request and counts them."""

    name: str = "north"
    refuses: bool = False
    trained: list[int] = field(default_factory=list)
    stepped: list[tuple[int, str]] = field(default_factory=list)

    def handle(self, ask: Request) -> Answer:
        if isinstance(ask, Step):
            self.stepped.append((ask.round_number, ask.stage))
            return Stepped(self.name, ask.job, ask.round_number, ask.stage, b"body")
        self.trained.append(ask.round_number)
        if self.refuses:
            return Refusal(self.name, ask.job, ask.round_number)
        return Reply(self.name, ask.job, ask.round_number, np.arange(1, 6, dtype=np.float32), Head(3, "cd" * 32))


def ask(round_number: int) -> Ask:
    return ask_for(JOB, round_number, MODEL, None)


def fate(site: FaultySite, round_number: int) -> str:
    """What becomes of one request: "sound", "malformed" and how, or "dropped out" before or after training."""
    inner = site.site
    assert isinstance(inner, Sound)
    before = len(inner.trained)
    try:
        answer = site.handle(ask(round_number))
    except DroppedOut:
        return "dropped out after training" if len(inner.trained) > before else "dropped out before training"
    assert isinstance(answer, Reply)
    try:
        check_reply(answer, ask=ask(round_number), site=inner.name, layout=LAYOUT)
    except MalformedMessage as error:
        return f"malformed: {error}"
    return "sound"


def fates(faults: Faults, *, seed: int = 1, number: int = 0, rounds: int = 200) -> list[str]:
    site = FaultySite(Sound(), number, faults, seed)
    return [fate(site, n) for n in range(1, rounds + 1)]


class TestRates:
    def test_are_those_of_the_job_and_one_a_third_off_is_rejected_either_way(self) -> None:
        drawn = [each for number in range(20) for each in fates(Faults(dropout=0.15, malformed=0.1), number=number)]
        for kind, rate in (("dropped out", 0.15), ("malformed", 0.1)):
            count = sum(each.startswith(kind) for each in drawn)
            p_value = {ratio: stats.binomtest(count, len(drawn), ratio * rate).pvalue for ratio in (2 / 3, 1.0, 4 / 3)}
            assert p_value[1.0] > 1e-3
            assert max(p_value[2 / 3], p_value[4 / 3]) < 1e-6

    def test_half_of_those_that_drop_out_have_trained(self) -> None:
        drawn = Counter(fates(Faults(dropout=0.99), rounds=1000))
        after, before = drawn["dropped out after training"], drawn["dropped out before training"]
        assert after + before > 950
        assert stats.binomtest(after, after + before, 0.5).pvalue > 1e-3

    def test_every_malformation_happens(self) -> None:
        drawn = Counter(fates(Faults(malformed=0.99), rounds=500))
        del drawn["sound"]
        # Several malformations share a complaint: shape, type, finiteness (two), job or round (two), name.
        assert len(drawn) == 5
        assert all(complaint.startswith("malformed: ") for complaint in drawn)

    def test_without_faults_every_answer_is_the_sites_own(self) -> None:
        assert set(fates(Faults())) == {"sound"}

    def test_faults_of_one_always_fail(self) -> None:
        assert "sound" not in fates(Faults(dropout=0.5, malformed=0.5))


class TestDeterminism:
    FAULTS = Faults(dropout=0.3, malformed=0.3)

    def test_the_same_seed_site_and_round_fail_the_same_way_in_any_order(self) -> None:
        forwards = fates(self.FAULTS)
        site = FaultySite(Sound(), 0, self.FAULTS, 1)
        backwards = {n: fate(site, n) for n in range(200, 0, -1)}
        assert [backwards[n] for n in range(1, 201)] == forwards

    def test_another_seed_or_site_fails_otherwise(self) -> None:
        assert len({tuple(fates(self.FAULTS, seed=seed, number=number)) for seed in (1, 2) for number in (0, 1)}) == 4


STAGES: tuple[Stage, ...] = ("advertise", "share", "mask", "agree", "reveal")


def answers_of(site: FaultySite, round_number: int) -> list[str]:
    """What becomes of each stage of one secure round: "sound", "malformed" or "gone"."""
    seen = []
    for stage in STAGES:
        asked = ask(round_number) if stage == "mask" else None
        try:
            answer = site.handle(Step(JOB, round_number, stage, b"", asked))
        except DroppedOut:
            seen.append("gone")
            continue
        assert isinstance(answer, Stepped)
        seen.append("sound" if answer.body == b"body" else "malformed")
    return seen


class TestSecureRounds:
    def test_a_site_drops_out_at_every_stage_and_stays_away_for_the_round(self) -> None:
        site = FaultySite(Sound(), 0, Faults(dropout=0.99), 1)
        drawn = [answers_of(site, n) for n in range(1, 300)]
        assert {each.index("gone") for each in drawn if "gone" in each} == set(range(5))
        assert all("sound" not in each[each.index("gone") :] for each in drawn if "gone" in each)

    def test_some_that_drop_out_have_done_their_work(self) -> None:
        inner = Sound()
        site = FaultySite(inner, 0, Faults(dropout=0.99), 1)
        gone = [(n, STAGES[each.index("gone")]) for n in range(1, 200) if "gone" in (each := answers_of(site, n))]
        assert {(n, stage) in inner.stepped for n, stage in gone} == {True, False}

    def test_what_is_malformed_is_so_at_one_stage(self) -> None:
        site = FaultySite(Sound(), 0, Faults(malformed=0.99), 1)
        drawn = [answers_of(site, n) for n in range(1, 200)]
        assert {tuple(each).index("malformed") for each in drawn if "malformed" in each} == set(range(5))
        assert all(each.count("malformed") <= 1 and "gone" not in each for each in drawn)

    def test_every_site_hears_that_a_session_is_over(self) -> None:
        inner = Sound()
        site = FaultySite(inner, 0, Faults(dropout=0.99), 1)
        for n in range(1, 50):
            site.handle(Step(JOB, n, "forget", b""))
        assert len(inner.stepped) == 49


class TestMalformations:
    @pytest.mark.parametrize("spoil", MALFORMATIONS)
    @pytest.mark.parametrize("layout", [LAYOUT, Layout(1), Layout(1000, ("loss", "examples"))])
    def test_each_is_refused_by_the_server_and_leaves_the_original_alone(
        self, spoil: Callable[[Reply], Reply], layout: Layout
    ) -> None:
        reply = Reply("north", JOB, 5, np.ones(layout.size, np.float32), None)
        check_reply(reply, ask=ask(5), site="north", layout=layout)
        with pytest.raises(MalformedMessage):
            check_reply(spoil(reply), ask=ask(5), site="north", layout=layout)
        check_reply(reply, ask=ask(5), site="north", layout=layout)

    def test_a_refusal_stays_a_refusal(self) -> None:
        site = FaultySite(Sound(refuses=True), 0, Faults(malformed=0.99), 1)
        assert [site.handle(ask(n)) for n in range(1, 50)] == [Refusal("north", JOB, n) for n in range(1, 50)]


def test_a_faulty_site_keeps_its_name_and_its_failures_are_named_by_the_collector() -> None:
    sites = {f"site-{k}": FaultySite(Sound(f"site-{k}"), k, Faults(dropout=0.3, malformed=0.3), 1) for k in range(50)}
    assert all(site.name == name for name, site in sites.items())
    collected = PlainCollector(InlineTransport(sites.__getitem__)).collect(ask(1), list(sites), Total(LAYOUT))
    kinds = Counter(why.partition(":")[0] for why in collected.failures.values())
    assert set(kinds) == {"dropped out", "malformed reply"}
    assert len(collected.contributors) == 50 - sum(kinds.values())
    np.testing.assert_array_equal(collected.total.update, np.array([1, 2, 3]) * len(collected.contributors))
    assert set(collected.heads) == set(collected.contributors)

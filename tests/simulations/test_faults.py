"""Sites fail and lie as the job asks, the same way for the same seed, and nothing malformed passes the server."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from client.data import Records
from privacy.ledger import Head
from privacy.noise import SeededNoise
from server.collect import PlainCollector
from simulations.faults import MALFORMATIONS, DroppedOut, FaultySite, Lie, LyingSum, liars
from simulations.federation import Federation
from simulations.inline import InlineTransport
from simulations.simulate import Watcher, start_run
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
from strategies.secure import SecureSum, rotation_of
from strategies.total import Layout, Total
from tests.strategies.jobs import make_job

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


NAMES = [f"site-{number}" for number in range(20)]
HONEST = np.array([3.0, -4.0, 0.0, 7.0, 0.5], np.float32)  # An update of norm 5, a weight, a loss.


def lie(number: int = 0, **faults: Any) -> Lie:
    return Lie(Faults.model_validate({"byzantine": 0.2, **faults}), number, 1, 3)


class TestLiars:
    @given(share=st.floats(0, 0.99), count=st.integers(1, 60), seed=st.integers(0, 99))
    def test_are_the_share_that_the_job_says_and_sites_of_it(self, share: float, count: int, seed: int) -> None:
        names = [str(number) for number in range(count)]
        drawn = liars(names, Faults(byzantine=share), seed=seed)
        assert len(drawn) == round(share * count)
        assert drawn <= set(names)
        assert drawn == liars(names, Faults(byzantine=share), seed=seed)

    def test_are_others_for_another_seed(self) -> None:
        assert len({liars(NAMES, Faults(byzantine=0.2), seed=seed) for seed in range(5)}) > 1

    def test_lie_in_every_round_and_the_others_never_do(self) -> None:
        job = make_job(simulation={"faults": {"byzantine": 0.2}})
        drawn = liars(NAMES, job.simulation.faults, seed=1)
        for number in range(1, 6):
            for index, name in enumerate(NAMES):
                own = Lie(job.simulation.faults, index, 1, 3) if name in drawn else None
                answer = FaultySite(Sound(name), index, job.simulation.faults, 1, own).handle(ask(number))
                assert isinstance(answer, Reply)
                assert (answer.contribution[0] != 1) == (name in drawn)


class TestLies:
    @pytest.mark.parametrize(
        ("faults", "update"),
        [
            ({"attack": "sign-flip"}, [-30, 40, 0]),
            ({"attack": "sign-flip", "scale": 1.0}, [-3, 4, 0]),
            ({"attack": "scaled"}, [30, -40, 0]),
            ({"attack": "scaled", "scale": 0.5}, [1.5, -2, 0]),
            ({"attack": "label-flip"}, [3, -4, 0]),
            ({"attack": "label-flip", "scale": 3.0}, [9, -12, 0]),
        ],
    )
    def test_keep_weight_and_metrics_and_alter_the_update_alone(
        self, faults: dict[str, Any], update: list[float]
    ) -> None:
        before = HONEST.copy()
        assert lie(**faults)(HONEST, 1).tolist() == [*update, 7.0, 0.5]
        np.testing.assert_array_equal(HONEST, before)

    @given(scale=st.floats(0.01, 100), salt=st.integers(0, 2**64 - 1))
    def test_noise_is_so_many_times_as_long_as_the_update(self, scale: float, salt: int) -> None:
        lied = lie(attack="noise", scale=scale)(HONEST, salt)
        assert np.linalg.norm(lied[:3]) == pytest.approx(5 * scale, rel=1e-5)
        assert lied[3:].tolist() == [7.0, 0.5]

    def test_noise_is_another_in_another_round_or_at_another_site(self) -> None:
        drawn = {tuple(lie(number, attack="noise")(HONEST, salt)) for number in (0, 1) for salt in (1, 2)}
        assert len(drawn) == 4

    def test_are_finite_however_large(self) -> None:
        lied = lie(attack="scaled", scale=3e38)(HONEST, 1)
        assert np.isfinite(lied).all()
        reply = Reply("north", JOB, 5, lied, None)
        check_reply(reply, ask=ask(5), site="north", layout=LAYOUT)

    def test_labels_are_flipped_by_label_flips_alone(self) -> None:
        records = Records(np.zeros((4, 1), np.float32), np.array([0, 1, 8, 9]))
        assert lie(attack="label-flip").told(records, 10).target.tolist() == [9, 8, 1, 0]
        assert records.target.tolist() == [0, 1, 8, 9]
        assert lie(attack="noise").told(records, 10) is records

    def test_a_refusal_and_what_is_malformed_stay_what_they_are(self) -> None:
        refusing = FaultySite(Sound(refuses=True), 0, Faults(byzantine=0.2), 1, lie())
        assert refusing.handle(ask(1)) == Refusal("north", JOB, 1)

    @pytest.mark.parametrize("scale", [2.0, 1e6])
    def test_a_secure_sum_is_told_the_lie_within_what_its_words_can_hold(self, scale: float) -> None:
        plan = SecureSum.make(make_job(secure_aggregation={"reach": 10.0}), sites=5, layout=LAYOUT)
        lying = LyingSum.by(lie(attack="sign-flip", scale=scale), plan)
        assert lying.encoding == plan.encoding
        words = lying.encode(HONEST, rotation=rotation_of(1, JOB), source=SeededNoise(0, "a test"))
        told = plan.decode(words, rotation=rotation_of(1, JOB))
        np.testing.assert_allclose(told, [*np.clip([-3 * scale, 4 * scale, 0], -10, 10), 7, 0.5], atol=1e-5)


PIXELS = {f"pixel_{row}_{column}": {"range": [0, 16]} for row in range(8) for column in range(8)}


def digits(**changes: Any) -> Any:
    faults = {"faults": changes.pop("faults", {})}
    return make_job(
        seed=1,
        data={"path": None, "client": None, "bundled": "digits", "target": "digit", "classes": list(range(10)),
              "columns": PIXELS, "allow_one_class": True},
        training={"rounds": 6, "learning_rate": 0.3, "local_steps": 4, "batch_size": 32},
        simulation={"baselines": False, "partition": {"clients": 10, "alpha": 100.0}, **faults},
        **changes,
    )  # fmt: skip


def accuracy(out: Path, **changes: Any) -> float:
    summary = start_run(digits(**changes), out=out, parent=out.parent, watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    return float(summary["metrics"]["accuracy"])


class TestRuns:
    FLIP: Mapping[str, Any] = {"byzantine": 0.2, "attack": "sign-flip"}

    def test_a_fifth_that_lies_breaks_the_mean_and_not_a_robust_reduction(self, tmp_path: Path) -> None:
        honest = accuracy(tmp_path / "honest")
        assert accuracy(tmp_path / "mean", faults=self.FLIP) < honest - 0.3
        assert accuracy(tmp_path / "krum", faults=self.FLIP, robust={"reduce": "multi-krum"}) > honest - 0.05

    def test_liars_lie_in_secure_sums_too(self, tmp_path: Path) -> None:
        groups = {"groups": 3, "colluders": 0, "dropouts": 0, "reach": 1e5}
        honest = accuracy(tmp_path / "honest")
        lied = accuracy(tmp_path / "sum", faults=self.FLIP, secure_aggregation={"reach": 1e5})
        assert lied < honest - 0.3
        # One site of ten spoils one group of three.
        one = {**self.FLIP, "byzantine": 0.1}
        got = accuracy(tmp_path / "groups", faults=one, secure_aggregation=groups, robust={"reduce": "median"})
        assert got > honest - 0.05

    def test_liars_alone_train_on_labels_that_are_flipped(self, tmp_path: Path) -> None:
        job = digits(faults={"byzantine": 0.2, "attack": "label-flip"})
        lying, sound = Federation.load(job), Federation.load(digits())
        ask_all = ask_for(job.hash, 1, lying.trainer.read().copy(), None)
        differ = set()
        for name in lying.names:
            plan = lying.plans()[name]
            answers = [
                own.client(name, plan, None).handle(ask_for(own.job.hash, 1, ask_all.model, None))
                for own in (lying, sound)
            ]
            sent = [answer.contribution for answer in answers if isinstance(answer, Reply)]
            if not np.allclose(sent[0], sent[1], atol=1e-6):
                differ.add(name)
        assert differ == liars(lying.names, job.simulation.faults, seed=job.seed)

"""A round of secure sums over real sites' gates: what arrives is the survivors' sum, and nothing of a session stays."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.gate import Gate, TrainingDiverged
from client.secure import InFile, SecureGate
from privacy.errors import Refused, RoundAborted
from privacy.ledger import Head
from privacy.noise import SeededNoise
from privacy.secagg.client import SecureClient
from privacy.secagg.journal import Journal
from server.collect import Collected, Failure
from server.secure import SecureCollector
from strategies.job import Job
from strategies.messages import Answer, Ask, Reply, Request, Stage, Step, Stepped, ask_for
from strategies.secure import SecureSum, groups_of
from strategies.total import Layout, Total
from tests.privacy.secagg.federation import identity, name, roster_of
from tests.strategies.jobs import make_job

LAYOUT = Layout(40, ("loss", "examples"))
STAGES: tuple[Stage, ...] = ("advertise", "share", "mask", "agree", "reveal")
Spoil = Callable[[str, Request, Callable[[], Answer]], Answer]


@dataclass(frozen=True)
class Watched(InFile):
    """A session file that also remembers every secret it ever held."""

    seen: list[bytes] = field(default_factory=list)

    def save(self, content: bytes) -> None:
        record = json.loads(content)
        for key in ("key", "blind", "channel"):
            self.seen.append(bytes.fromhex(record[key]))
        for shares in record["held"].values():
            self.seen.extend([bytes.fromhex(shares)[:32], bytes.fromhex(shares)[32:]])
        super().save(content)


@dataclass
class Sites:
    """So many sites, each with its own gate, and a transport to them that can be told to spoil what they answer."""

    folder: Path
    count: int
    job: Job = field(default_factory=lambda: make_job(secure_aggregation={}))
    spoil: Spoil = lambda site, request, answer: answer()
    asked: list[tuple[str, str]] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)  # Of those that lie about theirs.

    def __post_init__(self) -> None:
        self.roster = roster_of(tuple(range(1, self.count + 1)))
        self.plan = SecureSum.make(self.job, sites=self.count, layout=LAYOUT)
        self.names = [name(slot) for slot in range(1, self.count + 1)]
        self.stores = {site: Watched(self.folder / site / "session") for site in self.names}
        self.gates = {site: self.gate(site, slot) for slot, site in enumerate(self.names, start=1)}
        self.values = {site: float(slot) for slot, site in enumerate(self.names, start=1)}

    def gate(self, site: str, slot: int) -> SecureGate:
        (self.folder / site).mkdir(parents=True, exist_ok=True)
        secure = self.job.secure_aggregation
        assert secure is not None
        member = SecureClient(
            site,
            identity=identity(slot),
            roster=self.roster,
            terms=self.plan.terms(self.job, self.roster),
            journal=Journal(self.folder / site / "journal"),
            store=self.stores[site],
            per_round=1 + secure.retries,
        )
        gate = Gate(site, self.job.hash, LAYOUT, None)
        return SecureGate(gate, self.plan, member, lambda number: SeededNoise(0, site, number))

    def contribution(self, site: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        value = self.values[site]
        update = np.linspace(-1, 1, LAYOUT.parameters) * value
        weight = self.weights.get(site, value)
        return np.concatenate([update, [weight, value / 2, 10 * value]]).astype(np.float32)

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
        for site, request in requests.items():
            assert isinstance(request, Step)
            self.asked.append((site, request.stage))
            try:
                yield site, self.spoil(site, request, lambda s=site, r=request: self.answer(s, r))  # type: ignore[misc]
            except (ConnectionError, Refused) as error:
                yield site, Failure(site, str(error))

    def answer(self, site: str, step: Step) -> Answer:
        return self.gates[site].answer(step, lambda: self.contribution(site))

    def collect(self, *, round_number: int = 1, ask: Ask | None = None) -> Collected:
        secure = self.job.secure_aggregation
        assert secure is not None
        groups = groups_of(self.job, self.names) if secure.groups > 1 else None
        collector = SecureCollector(
            self, self.plan, self.plan.terms(self.job, self.roster), self.roster, self.job.robust, groups
        )
        model = np.full(LAYOUT.parameters, round_number, np.float32)
        return collector.collect(ask or ask_for(self.job.hash, round_number, model, None), self.names, Total(LAYOUT))

    def assert_sum(self, collected: Collected, sites: set[str]) -> None:
        expected = np.sum([self.contribution(site).astype(np.float64) for site in sites], axis=0)
        step = self.plan.fixed.step * len(sites)
        np.testing.assert_allclose(collected.total.update, expected[: LAYOUT.parameters], atol=step, rtol=0)
        assert collected.total.weight == pytest.approx(expected[LAYOUT.parameters], abs=1e-4)
        assert list(collected.total.metrics.values()) == pytest.approx(expected[-2:].tolist(), abs=1e-4)


def altered(body: bytes) -> bytes:
    """With another last byte, whatever it was."""
    return body[:-1] + bytes([body[-1] ^ 1])


def silent_from(stages: Mapping[str, str]) -> Spoil:
    """Each named site goes away at its stage, without an answer."""

    def spoil(site: str, request: Request, answer: Callable[[], Answer]) -> Answer:
        assert isinstance(request, Step)
        if request.stage != "forget" and site in stages and STAGES.index(request.stage) >= STAGES.index(stages[site]):
            raise ConnectionError("gone")
        return answer()

    return spoil


def leftovers(sites: Sites) -> set[str]:
    return {str(path.relative_to(sites.folder)) for path in sites.folder.rglob("*") if path.is_file()}


class TestSums:
    def test_the_total_is_the_sum_of_all_to_the_resolution_of_the_grid(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        collected = sites.collect()
        assert collected.contributors == tuple(sites.names)
        assert collected.failures == {}
        sites.assert_sum(collected, set(sites.names))

    @settings(max_examples=25, deadline=None)
    @given(stages=st.lists(st.sampled_from(STAGES), min_size=0, max_size=2), seed=st.integers(0, 5))
    def test_sites_may_drop_out_at_every_stage(self, stages: list[str], seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            sites = Sites(Path(folder), 8)
            gone = {sites.names[(seed + 3 * number) % 8]: stage for number, stage in enumerate(stages)}
            sites.spoil = silent_from(gone)
            collected = sites.collect()
            missing = {site for site, stage in gone.items() if STAGES.index(stage) <= STAGES.index("mask")}
            sites.assert_sum(collected, set(sites.names) - missing)
            assert set(collected.failures) == missing
            assert all(collected.failures[site].startswith(f"{gone[site]}: ") for site in missing)

    @pytest.mark.parametrize("stage", STAGES)
    def test_too_many_drops_end_the_round_with_stage_count_and_threshold(self, stage: str, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        sites.spoil = silent_from(dict.fromkeys(sites.names[:3], stage))
        with pytest.raises(RoundAborted, match=rf"round 1: secure sum, stage {stage}: 2 of 5 .* at least 4 are needed"):
            sites.collect()

    def test_every_answer_that_is_spoilt_counts_as_none(self, tmp_path: Path) -> None:
        for number, stage in enumerate(STAGES, start=1):
            sites = Sites(tmp_path, 6, job=make_job(seed=number, secure_aggregation={}))

            def spoil(site: str, request: Request, answer: Callable[[], Answer], at: str = stage) -> Answer:
                given = answer()
                assert isinstance(request, Step)
                if site != "site-2" or request.stage != at:
                    return given
                assert isinstance(given, Stepped)
                return Stepped(site, given.job, given.round_number, given.stage, altered(given.body), given.words)

            sites.spoil = spoil
            collected = sites.collect()
            left = set(sites.names) - ({"site-2"} if STAGES.index(stage) <= 2 else set())
            sites.assert_sum(collected, left)

    def test_altered_words_are_left_out_and_named(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)

        def spoil(site: str, request: Request, answer: Callable[[], Answer]) -> Answer:
            given = answer()
            if site == "site-3" and isinstance(given, Stepped) and given.words.size:
                given.words[7] ^= 1
            return given

        sites.spoil = spoil
        collected = sites.collect()
        sites.assert_sum(collected, set(sites.names) - {"site-3"})
        assert collected.failures == {"site-3": "mask: the masked words are not what their site vouched for"}

    def test_an_answer_in_anothers_name_twice_or_unasked_counts_for_nobody(self, tmp_path: Path) -> None:
        class Noisy(Sites):
            def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Answer | Failure]]:
                for site, answer in super().exchange(requests):
                    yield site, answer
                    yield site, answer
                    yield "somebody-else", answer

        sites = Noisy(tmp_path, 5)
        sites.assert_sum(sites.collect(), set(sites.names))

    def test_a_plain_reply_in_a_secure_round_is_refused(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        plain = Reply("site-1", sites.job.hash, 1, np.zeros(LAYOUT.size, np.float32), None)
        sites.spoil = lambda site, request, answer: plain if site == "site-1" else answer()
        collected = sites.collect()
        assert collected.failures["site-1"] == "advertise: malformed reply: it does not belong to a secure sum"

    def test_heads_come_with_the_masked_words(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)

        def spoil(site: str, request: Request, answer: Callable[[], Answer]) -> Answer:
            given = answer()
            if isinstance(given, Stepped) and given.stage == "mask":
                return Stepped(site, given.job, 1, "mask", given.body, given.words, Head(3, "ab" * 32))
            return given

        sites.spoil = spoil
        assert sites.collect().heads == dict.fromkeys(sites.names, Head(3, "ab" * 32))

    def test_says_what_it_cost(self, tmp_path: Path) -> None:
        cost = Sites(tmp_path, 5).collect().cost
        assert cost is not None
        words = 4 * LAYOUT.parameters + 8 * 3
        assert words < cost["upload_bytes"] < words + 1200
        assert 0 < cost["download_bytes"] < 4000
        assert 0 < cost["seconds"] < 60


class TestRefusals:
    def test_a_round_whose_update_left_is_not_run_again(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        sites.spoil = silent_from(dict.fromkeys(sites.names[:3], "agree"))
        with pytest.raises(RoundAborted):
            sites.collect()
        sites.spoil = silent_from({})
        with pytest.raises(RoundAborted, match=r"advertise: 0 of 5 .*this round has left already.*start the job anew"):
            sites.collect()
        sites.assert_sum(sites.collect(round_number=2), set(sites.names))

    def test_it_is_as_often_as_the_job_allows(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5, job=make_job(secure_aggregation={"retries": 1}))
        sites.spoil = silent_from(dict.fromkeys(sites.names[:3], "agree"))
        with pytest.raises(RoundAborted):
            sites.collect()
        sites.spoil = silent_from({})
        sites.assert_sum(sites.collect(), set(sites.names))
        with pytest.raises(RoundAborted, match="left already"):
            sites.collect()

    def test_a_round_that_ended_before_anything_left_may_be_run_again(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        sites.spoil = silent_from(dict.fromkeys(sites.names[:3], "share"))
        with pytest.raises(RoundAborted):
            sites.collect()
        sites.spoil = silent_from({})
        sites.assert_sum(sites.collect(), set(sites.names))

    @pytest.mark.parametrize(("value", "said"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e9, "overflow")])
    def test_what_cannot_be_encoded_leaves_no_site(self, value: float, said: str, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        sites.values["site-4"] = value

        def spoil(site: str, request: Request, answer: Callable[[], Answer]) -> Answer:
            try:
                return answer()
            except TrainingDiverged as error:
                raise Refused(str(error)) from None

        sites.spoil = spoil
        collected = sites.collect()
        assert said in collected.failures["site-4"]
        assert str(value) not in collected.failures["site-4"]
        sites.assert_sum(collected, set(sites.names) - {"site-4"})

    def test_a_model_that_is_not_the_sessions_is_not_trained_on(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 5)
        other = ask_for(sites.job.hash, 1, np.full(LAYOUT.parameters, 9, np.float32), None)

        def spoil(site: str, request: Request, answer: Callable[[], Answer]) -> Answer:
            assert isinstance(request, Step)
            if request.stage == "mask":
                return sites.answer(site, Step(request.job, 1, "mask", request.body, other))
            return answer()

        sites.spoil = spoil
        with pytest.raises(RoundAborted, match=r"stage mask: 0 of 5 .*the model is not the one of the session"):
            sites.collect()


class TestNothingStays:
    """After a round, whatever its end: no key, share or mask in any file, log, or error."""

    @pytest.mark.parametrize("stage", [None, *STAGES])
    def test_after_success_and_after_an_end_at_any_stage(
        self, stage: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(temporary))
        tempfile.tempdir = None
        caplog.set_level(logging.DEBUG)
        sites = Sites(tmp_path, 5)
        sites.spoil = silent_from({} if stage is None else dict.fromkeys(sites.names[:3], stage))
        said = ""
        try:
            sites.collect()
        except RoundAborted as error:
            said = repr(error)
        assert (stage is None) == (not said)
        tempfile.tempdir = None
        secrets = {secret for store in sites.stores.values() for secret in store.seen}
        keys, shares = 3 * (2 if stage == "advertise" else 5), 2 * 4 * 5
        assert len(secrets) >= (keys if stage in ("advertise", "share") else keys + (shares if stage != "mask" else 16))
        found = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        written = b"\n".join([*found, said.encode(), caplog.text.encode()])
        for secret in secrets:
            assert secret not in written
            assert secret.hex().encode() not in written
        assert {path.rpartition("/")[2] for path in leftovers(sites)} <= {"journal"}

    def test_a_session_file_is_its_owners_alone_and_overwritten(self, tmp_path: Path) -> None:
        store = InFile(tmp_path / "session")
        assert store.load() is None
        store.save(b"a long secret")
        assert (tmp_path / "session").stat().st_mode & 0o777 == 0o600
        store.save(b"short")
        assert store.load() == b"short"
        linked = tmp_path / "same file"
        linked.hardlink_to(tmp_path / "session")
        store.wipe()
        store.wipe()
        assert not (tmp_path / "session").exists()
        assert linked.read_bytes() == bytes(5)

    def test_a_session_file_is_never_somebody_else_s(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").write_bytes(b"")
        (tmp_path / "session").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic"):
            InFile(tmp_path / "session").save(b"a secret")
        (tmp_path / "session").unlink()
        (tmp_path / "session").touch(mode=0o644)
        InFile(tmp_path / "session").save(b"a secret")
        assert (tmp_path / "session").stat().st_mode & 0o777 == 0o600

    def test_a_damaged_session_file_is_refused_and_wiped(self, tmp_path: Path) -> None:
        for content in (b"", b"{", b"{}", b"[]", b'{"key": 3}', b"\xff"):
            sites = Sites(tmp_path, 5)
            sites.spoil = silent_from(dict.fromkeys(sites.names, "share"))
            with pytest.raises(RoundAborted):
                sites.collect()
            sites.stores["site-1"].path.write_bytes(content)
            with pytest.raises(Refused):
                sites.gates["site-1"].member.share(b"")
            assert not sites.stores["site-1"].path.exists()


def test_weights_that_no_honest_sites_have_end_a_round_without_groups(tmp_path: Path) -> None:
    sites = Sites(tmp_path, 5)
    sites.weights = {"site-1": -1000.0}
    with pytest.raises(RoundAborted, match="round 1: secure sum: its weights are not those of honest sites"):
        sites.collect()


class TestGroups:
    JOB = make_job(secure_aggregation={"groups": 5, "colluders": 0}, robust={"reduce": "median"})

    def test_one_group_that_lies_does_not_move_the_median(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 20, job=self.JOB)
        sites.values = dict.fromkeys(sites.names, 1.0)
        honest = sites.collect()
        sites.values |= dict.fromkeys(groups_of(self.JOB, sites.names)[2], 1000.0)
        lied = sites.collect(round_number=2)
        mean = honest.total.update / honest.total.weight
        np.testing.assert_allclose(lied.total.update / lied.total.weight, mean, atol=1e-3)

    @pytest.mark.parametrize(
        "robust",
        [
            {"reduce": "trimmed-mean"},
            {"reduce": "krum"},
            {"reduce": "multi-krum"},
            {"reduce": "geometric-median"},
            {"reduce": "median", "max_norm": "median"},
        ],
        ids=str,
    )
    def test_nor_does_it_move_another_reduction(self, robust: dict[str, Any], tmp_path: Path) -> None:
        job = make_job(secure_aggregation={"groups": 5, "colluders": 0}, robust=robust)
        sites = Sites(tmp_path, 15, job=job)
        sites.values = dict.fromkeys(sites.names, 1.0)
        sites.values |= dict.fromkeys(groups_of(job, sites.names)[2], 1000.0)
        sites.weights = dict.fromkeys(sites.names, 1.0)
        lied = sites.collect()
        mean = np.linspace(-1, 1, LAYOUT.parameters)
        np.testing.assert_allclose(lied.total.update / lied.total.weight, mean, atol=1e-3)

    def test_a_bound_on_the_norm_bounds_a_lying_group(self, tmp_path: Path) -> None:
        job = make_job(secure_aggregation={"groups": 5, "colluders": 0}, robust={"max_norm": 1.0})
        sites = Sites(tmp_path, 15, job=job)
        sites.values = dict.fromkeys(sites.names, 0.01)
        sites.values |= dict.fromkeys(groups_of(job, sites.names)[2], 1000.0)
        sites.weights = dict.fromkeys(sites.names, 1.0)
        lied = sites.collect()
        assert np.linalg.norm(lied.total.update / lied.total.weight) <= (1 + 4 * 0.04) / 5

    def test_each_site_is_summed_with_its_own_group_alone(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 20, job=self.JOB)
        sites.collect()
        groups = groups_of(self.JOB, sites.names)
        assert sorted(site for group in groups for site in group) == sorted(sites.names)
        assert {len(group) for group in groups} == {4}

    def test_a_site_whose_weight_is_a_lie_costs_its_group_and_nobody_else(self, tmp_path: Path) -> None:
        for number, weight in enumerate((-1000.0, -17.0), start=1):
            sites = Sites(tmp_path / str(number), 20, job=self.JOB)
            sites.weights = {"site-7": weight}
            collected = sites.collect()
            lying = next(group for group in groups_of(self.JOB, sites.names) if "site-7" in group)
            assert set(collected.contributors) == set(sites.names) - set(lying)
            assert np.isfinite(collected.total.update).all()
            assert collected.total.weight > 0

    def test_a_lost_group_is_left_out_while_most_remain(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 20, job=self.JOB)
        groups = groups_of(self.JOB, sites.names)
        sites.spoil = silent_from(dict.fromkeys(groups[0], "mask") | dict.fromkeys(groups[1], "reveal"))
        collected = sites.collect()
        assert set(collected.contributors) == set(sites.names) - set(groups[0]) - set(groups[1])
        assert set(collected.failures) == {*groups[0], *groups[1]}

    def test_a_round_ends_whose_groups_left_are_too_few_for_the_liars_that_it_bears(self, tmp_path: Path) -> None:
        # Of three sums the median bears one that is anything; of two it would be their mean.
        job = make_job(secure_aggregation={"groups": 3, "colluders": 0}, robust={"reduce": "median", "byzantine": 1})
        sites = Sites(tmp_path, 12, job=job)
        sites.spoil = silent_from(dict.fromkeys(groups_of(job, sites.names)[0], "mask"))
        with pytest.raises(RoundAborted, match=r'2 of 3 groups have a sum, and robust.reduce = "median" bears 1'):
            sites.collect()

    def test_the_round_ends_when_half_are_lost(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, 20, job=self.JOB)
        groups = groups_of(self.JOB, sites.names)
        sites.spoil = silent_from(dict.fromkeys([*groups[0], *groups[1], *groups[2]], "mask"))
        with pytest.raises(RoundAborted, match="3 of 5 groups are lost"):
            sites.collect()


def test_every_stage_that_a_site_hears_is_one_of_the_protocol(tmp_path: Path) -> None:
    sites = Sites(tmp_path, 5)
    sites.collect()
    assert {stage for _, stage in sites.asked} == set(STAGES) < set(get_args(Stage))

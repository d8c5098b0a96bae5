"""A plan says what a job will be charged, before it is; a calculator answers the same for a few numbers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedchorus import main
from privacy.accountant import bounds, epsilon
from privacy.errors import DataError, FedchorusError, JobError, UnsupportedEvent
from privacy.events import GaussianEvent
from privacy.secagg.client import InMemory, SecureClient
from privacy.secagg.roster import Member, Roster
from privacy.secagg.server import SecureServer
from simulations.calculator import calculate
from simulations.cautions import cautions
from simulations.plan_view import as_record, print_plan
from simulations.planning import JobPlan, Setting, parameter_count, training_rows
from simulations.scenarios import scenario_path
from simulations.secure_sums import lying_groups
from strategies.cohort import public_cohort
from strategies.job import Job, check_job, load_job
from strategies.secure import SecureSum, groups_of
from tests.privacy.secagg.federation import Remembered, identity

MIX = {f"s{number}": {"rows": 400 + 4 * number, "positive": 0.5} for number in range(3)}
RECORD = {"noise_multiplier": 4.0, "delta": 1e-5}
CLIENT = {"noise_multiplier": 4.0, "delta": 1e-5}


def make_job(**changes: Any) -> Job:
    """Three sites of 400 to 408 rows, three parameters, ten rounds of one step; keys as `training__rounds=3`."""
    raw: dict[str, Any] = {
        "name": "planned",
        "data": {"path": "absent.csv", "target": "y", "columns": {"a": {"range": [0, 1]}, "b": {"range": [0, 1]}}},
        "strategy": {"weighting": "equal"},
        "training": {"rounds": 10, "learning_rate": 0.5, "local_steps": 1, "sampling_rate": 0.2},
        "simulation": {"partition": {"mix": deepcopy(MIX)}},
    }
    for path, value in changes.items():
        *tables, key = path.split("__")
        place = raw
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = deepcopy(value)
        if value is None:
            del place[key]
    return check_job(raw, where="a test")


def clients(number: int) -> dict[str, Any]:
    return {f"c{index:04}": {"rows": 40, "positive": 0.5} for index in range(number)}


def only(job: Job) -> Setting:
    (setting,) = JobPlan.of(job).settings
    return setting


EIGHT = {"simulation__partition__mix": clients(8)}
SHARES = {**CLIENT, "placement": "distributed"}
SECURELY: dict[str, Any] = {"secure_aggregation": {}}


def codes(**changes: Any) -> set[str]:
    return {caution.code for caution in cautions(JobPlan.of(make_job(**changes)))}


def fedchorus(*arguments: str) -> subprocess.CompletedProcess[str]:
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["fedchorus", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, int(str(code or 0)), out.getvalue(), err.getvalue())


def answer(*arguments: str) -> Any:
    done = fedchorus("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def noise_at(noise: float, rate: float, count: int) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=noise, clip_norm=1.0, sampling_rate=rate, count=count, rng="os")


class TestCalculator:
    @pytest.mark.parametrize(
        ("arguments", "pld", "tolerance"),
        [
            # dp-accounting 0.6 (PLD), add or remove one; the second is one Gaussian of mu = 1, exact by mpmath.
            (["--noise-multiplier", "1", "--sampling-rate", "0.01", "--steps", "1000"], 1.8282, 2e-4),
            (["--noise-multiplier", "10", "--steps", "100"], 4.3772, 1e-4),
            # Two runs of one data set, and five of them as one phase of 5,000 steps.
            (["--phase", "1,0.01,1000", "--phase", "1.1,256/60000,3515"], 2.1736, 2e-4),
            (["--phase", "1,0.01,5000"], 4.2019, 2e-4),
            # Shuffled batches, sigma 1, ten epochs: mu = sqrt(10); charged as Poisson it would be 7.899.
            (["--noise-multiplier", "1", "--scheme", "none", "--steps", "10"], 17.857, 1e-3),
            # Replace-one is twice the shift: sigma 2 is as sigma 1 above, and sigma 1 as sigma 0.5 (9.9973).
            (["--noise-multiplier", "2", "--steps", "1", "--replace-one"], 4.3772, 1e-4),
            (["--noise-multiplier", "1", "--steps", "1", "--replace-one"], 9.9973, 1e-4),
            # N = 60000, m = 600: no less than 13.361, as a realisable pair shows.
            (
                ["--phase", "1,0.01,1000", "--replace-one", "--scheme", "without-replacement"],
                13.361,
                2e-3,
            ),
        ],
    )
    def test_golden_values_at_delta_1e_5(self, arguments: list[str], pld: float, tolerance: float) -> None:
        given = answer(*arguments, "--delta", "1e-5")
        assert set(given) == {"epsilon", "bounds"}
        assert set(given["epsilon"]) == {"pld", "rdp", "exact"}
        assert set(given["bounds"]) == {"lower", "estimate", "upper"}
        assert given["epsilon"]["pld"] == pytest.approx(pld, abs=tolerance)
        assert (given["epsilon"]["exact"] is None) == (
            "--sampling-rate" in arguments or any("," in argument for argument in arguments)
        )
        assert given["bounds"]["lower"] <= given["epsilon"]["pld"] <= given["epsilon"]["rdp"]

    def test_its_figures_are_the_accountants(self) -> None:
        events = [noise_at(1.0, 0.01, 100), noise_at(2.0, 1.0, 5)]
        given = calculate(delta=1e-6, phases=["1,0.01,100", "2,1,5"])
        expected, within = epsilon(events, 1e-6), bounds(events, 1e-6)
        assert within is not None
        assert given["epsilon"] == {"pld": expected.pld, "rdp": expected.rdp, "exact": None}
        assert given["bounds"] == {"lower": within.lower, "estimate": within.estimate, "upper": within.upper}

    @settings(max_examples=4, deadline=None)
    @given(
        target=st.floats(0.3, 10),
        rate=st.sampled_from(["1/4", "1"]),
        steps=st.integers(1, 100),
        replace_one=st.booleans(),
    )
    def test_the_noise_for_an_epsilon_costs_at_most_it_and_hardly_less(
        self, target: float, rate: str, steps: int, replace_one: bool
    ) -> None:
        scheme = "none" if rate == "1" else "without-replacement" if replace_one else "poisson"
        asked: Any = {
            "delta": 1e-5,
            "sampling_rate": rate,
            "steps": steps,
            "replace_one": replace_one,
            "scheme": scheme,
        }
        found = calculate(target_epsilon=target, **asked)
        assert 0.9 * target < found["epsilon"]["pld"] <= target or found["noise_multiplier"] < 0.126
        checked = calculate(noise_multiplier=found["noise_multiplier"], **asked)
        assert checked["epsilon"] == found["epsilon"]

    def test_replacing_one_needs_twice_the_noise(self) -> None:
        one, two = (
            calculate(target_epsilon=2.0, steps=10, delta=1e-5, replace_one=replace_one)
            for replace_one in (False, True)
        )
        assert two["noise_multiplier"] == 2 * one["noise_multiplier"]

    def test_a_person_reads_a_few_lines(self) -> None:
        arguments = ["--sampling-rate", "0.01", "--steps", "1000", "--delta", "1e-5"]
        told = fedchorus("plan", "--noise-multiplier", "1", *arguments).stdout
        assert "epsilon 1.8282 at delta 1e-05 (by Rényi DP 2.1014)" in told
        assert "proven to lie between 1.8181 and 1.8384" in told
        assert "noise multiplier 1.4" in fedchorus("plan", "--epsilon", "1", *arguments).stdout
        assert ", exactly" in fedchorus("plan", "--noise-multiplier", "1", "--steps", "9", "--delta", "1e-5").stdout

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"delta": 0.0}, ["--delta", "between 0 and 1"]),
            ({"delta": 1.0}, ["--delta", "between 0 and 1"]),
            ({"delta": math.nan}, ["--delta", "between 0 and 1"]),
            ({"delta": None}, ["--delta", "got nothing"]),
            ({"delta": 1e-3, "rows": 1000}, ["--delta", "1/1000", "--rows"]),
            ({"rows": 0}, ["--rows", "1 or more"]),
            ({"noise_multiplier": -1.0}, ["--noise-multiplier", "-1"]),
            ({"noise_multiplier": 0.0}, ["--noise-multiplier", "1/16"]),
            ({"noise_multiplier": math.nan}, ["--noise-multiplier"]),
            ({"noise_multiplier": None}, ["--noise-multiplier", "--epsilon", "neither"]),
            ({"target_epsilon": 1.0}, ["--noise-multiplier", "--epsilon", "both"]),
            ({"noise_multiplier": None, "target_epsilon": 0.0}, ["--epsilon", "> 0"]),
            ({"noise_multiplier": None, "target_epsilon": math.inf}, ["--epsilon", "finite"]),
            ({"sampling_rate": "0"}, ["--sampling-rate", "(0, 1]"]),
            ({"sampling_rate": "1.5"}, ["--sampling-rate", "(0, 1]"]),
            ({"sampling_rate": "1/0"}, ["--sampling-rate", "1/0"]),
            ({"sampling_rate": "often"}, ["--sampling-rate", "often"]),
            ({"steps": 0}, ["--steps", "whole number"]),
            ({"steps": None}, ["--steps", "got nothing"]),
            ({"steps": 2**41}, ["--steps", "2^40"]),
            ({"scheme": "shuffled"}, ["--scheme", "poisson, none, without-replacement"]),
            ({"scheme": "none", "sampling_rate": "0.1"}, ["--scheme", "none", "epochs"]),
            ({"scheme": "poisson", "replace_one": True}, ["--replace-one", "Poisson"]),
            ({"sampling_rate": "0.1", "replace_one": True}, ["--replace-one", "Poisson"]),
            ({"scheme": "without-replacement"}, ["--scheme", "--replace-one"]),
            ({"phases": ["1,0.1,10"]}, ["--noise-multiplier", "--phase"]),
        ],
    )  # fmt: skip
    def test_refuses_in_one_line_that_names_the_option(self, options: dict[str, Any], words: list[str]) -> None:
        valid: dict[str, Any] = {"noise_multiplier": 1.0, "steps": 10, "delta": 1e-5}
        with pytest.raises(UnsupportedEvent) as refusal:
            calculate(**{**valid, **options})
        assert "\n" not in str(refusal.value)
        for word in words:
            assert word in str(refusal.value)

    @pytest.mark.parametrize(
        "phase", ["", "1", "1,0.1", "1,0.1,10,3", "x,0.1,10", "1,x,10", "1,0.1,x", "1,0.1,1.5", "-1,0.1,10", "1,2,10",
                  "1,0,10", "1,0.1,0", "nan,0.1,10", "1,nan,10"],
    )  # fmt: skip
    def test_refuses_a_malformed_phase_by_name(self, phase: str) -> None:
        with pytest.raises(UnsupportedEvent, match=r"^--phase") as refusal:
            calculate(delta=1e-5, phases=["1,0.1,10", phase])
        assert phase in str(refusal.value)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], ["give a job"]),
            (["--set", "training.rounds=3"], ["give a job"]),
            (["hospitals", "--delta", "1e-5"], ["--delta", "cannot go with a job"]),
            (["hospitals", "--replace-one"], ["--replace-one", "cannot go with a job"]),
            (["hospital"], ["hospital", "did you mean 'hospitals'?"]),
            (["--phase", "1,.1,9", "--delta", "2"], ["--delta", "got 2"]),
        ],
    )
    def test_the_command_refuses_in_one_line(self, arguments: list[str], words: list[str]) -> None:
        done = fedchorus("plan", *arguments)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
        for word in words:
            assert word in done.stderr


class TestWhatAJobWouldCost:
    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            ["privacy.record.spare_rounds=5", "training.local_steps=none", "training.local_epochs=2"],
            ["training.sampling_rate=none", "training.batch_size=16", "privacy.record.epsilon=none",
             "privacy.record.noise_multiplier=3.0"],
            ["privacy.record=none", 'strategy.weighting="equal"', "privacy.client.delta=1e-3",
             'privacy.client.placement="local"', "privacy.client.epsilon=5.0", "privacy.client.spare_rounds=2"],
            ["privacy.record=none", 'strategy.weighting="equal"', "privacy.client.delta=1e-3", "cohort.rate=0.4",
             "privacy.client.epsilon=5.0", "privacy.client.adaptive_clip.bit_noise=2.0",
             "privacy.client.spare_rounds=2"],
            ["privacy.record=none", 'strategy.weighting="equal"', "privacy.client.delta=1e-3", "cohort.separation=3",
             "privacy.client.epsilon=5.0", 'privacy.client.noise="banded"'],
            ["secure_aggregation={}"],
            ["privacy.record=none", 'strategy.weighting="equal"', "privacy.client.delta=1e-3",
             "secure_aggregation={dropouts=0,bits=20}", 'privacy.client.placement="distributed"',
             "privacy.client.epsilon=5.0", "privacy.client.spare_rounds=2", "cohort.size=4"],
        ],
        ids=["target", "epochs", "batches", "local", "central", "banded", "securely", "shares"],
    )  # fmt: skip
    def test_the_plan_is_what_the_run_will_charge(self, overrides: list[str]) -> None:
        from simulations.federation import Federation

        job = load_job(scenario_path("hospitals"), overrides)
        federation = Federation.load(job)
        plan = JobPlan.of(job)
        sites, release = federation.plans(), federation.release_plan()
        assert plan.rows == {name: site.rows for name, site in sites.items()}
        assert plan.parameters == federation.trainer.parameters.size
        at_sites = [setting for setting in plan.settings if setting.placement != "central"]
        assert sorted(name for setting in at_sites for name in setting.who) == sorted(
            name for name, site in sites.items() if site.events
        )
        for setting in at_sites:
            for name in setting.who:
                assert (setting.each,) == sites[name].events
                assert setting.rounds == sites[name].rounds
        central = [setting for setting in plan.settings if setting.placement == "central"]
        assert len(central) == (0 if release is None else 1)
        if release is not None:
            assert (central[0].each, central[0].rounds) == (release.event, release.rounds)
            assert central[0].size == pytest.approx(release.cohort)

    @pytest.mark.parametrize("model", ["logistic-regression", "mlp"])
    @pytest.mark.parametrize("classes", [None, ["no", "yes"], ["a", "b", "c"]])
    def test_parameters_are_those_of_the_real_model(self, model: str, classes: list[str] | None) -> None:
        from client.data import class_count, feature_names
        from client.tasks import initial_model, task_for

        categories = {"type": "category", "values": ["x", "y", "z"]}
        job = make_job(task={"model": model, "hidden": [5, 4]}, data__columns__c=categories, data__classes=classes)
        real = initial_model(
            task_for(job), features=len(feature_names(job.data)), classes=class_count(job.data), seed=0
        )
        assert parameter_count(job) == sum(parameter.numel() for parameter in real.parameters())

    def test_a_task_of_ones_own_is_built_to_count_what_it_trains(self) -> None:
        assert parameter_count(make_job(task__name="tests.simulations.test_planning:HalfFrozen")) == 3

    def test_rows_are_counted_from_the_data_where_the_job_does_not_say(self, tmp_path: Path) -> None:
        rows = [
            f"{hospital},{number % 2},0.5,0.5" for hospital in "ab" for number in range(10 if hospital == "a" else 13)
        ]
        (tmp_path / "records.csv").write_text("\n".join(["site,y,a,b", *rows]))
        source = {"data__path": "records.csv", "data__client": "site", "data__folder": str(tmp_path)}
        assert training_rows(make_job(**source, simulation=None)) == {"a": 7, "b": 9}

    def test_a_site_with_nothing_to_train_on_is_refused_by_name(self) -> None:
        with pytest.raises(DataError, match="site tiny: 1 rows leave none to train on"):
            training_rows(make_job(simulation__partition__mix__tiny={"rows": 1, "positive": 0.5}))

    def test_sites_that_train_alike_are_one_setting(self) -> None:
        setting = only(make_job(privacy__record=RECORD))
        assert setting.who == tuple(f"s{number}" for number in range(3))
        assert setting.units == (300, 306)
        assert setting.size == pytest.approx(60)

    def test_of_many_sizes_of_sites_the_ends_are_kept_and_the_rest_counted(self) -> None:
        mix = {f"s{number}": {"rows": 400 + 4 * number, "positive": 0.5} for number in range(8)}
        plan = JobPlan.of(
            make_job(
                privacy__record=RECORD,
                training__sampling_rate=None,
                training__batch_size=30,
                simulation__partition__mix=mix,
            )
        )
        assert len(plan.settings) == 6
        assert plan.left_out == 2
        assert (plan.settings[0].units[0], plan.settings[-1].units[1]) == (300, 321)

    def test_all_planned_rounds_are_charged_with_what_is_spared(self) -> None:
        event = only(make_job(privacy__record={**RECORD, "spare_rounds": 4}, training__local_steps=3)).event
        assert event.count == (10 + 4) * 3

    def test_figures_are_the_accountants_and_renyi_orders_are_hardly_looser(self) -> None:
        setting = only(make_job(privacy__record={**RECORD, "noise_multiplier": 1.0}))
        expected = epsilon([setting.event], 1e-5)
        assert (setting.cost.pld, setting.cost.exact, setting.within) == (
            expected.pld, None, bounds([setting.event], 1e-5)
        )  # fmt: skip
        assert expected.rdp <= setting.cost.rdp <= 1.05 * expected.rdp
        everyone = only(make_job(privacy__client=CLIENT))
        assert everyone.cost.exact == epsilon([everyone.event], 1e-5).exact

    def test_a_target_is_met_and_nearly_used_up(self) -> None:
        for changes in (
            {"privacy__record": {"epsilon": 2.0, "delta": 1e-5}},
            {"privacy__client": {"epsilon": 2.0, "delta": 1e-5}},
        ):
            assert 1.97 < only(make_job(**changes)).cost.pld <= 2.0

    @pytest.mark.parametrize(
        ("changes", "per_coordinate", "sampling"),
        [
            # Noise 4 on a sum of 0.2 * 300 rows; 8 clients; 4 of 8 clients; four clients' own noises.
            ({"privacy__record": RECORD}, 4 / 60, 1 / math.sqrt(60)),
            ({"privacy__client": CLIENT, **EIGHT}, 4 / 8, 1 / math.sqrt(8)),
            ({"privacy__client": CLIENT, "cohort__rate": 0.5, **EIGHT}, 4 / 4, 1 / 2),
            ({"privacy__client": {**CLIENT, "placement": "local"}, "cohort__size": 4, **EIGHT}, 4 * 2 / 4, 1 / 2),
            # Noise 4 of five honest survivors (8, of whom two may fail and one colludes), with the shares of all eight.
            ({"privacy__client": SHARES, **SECURELY, **EIGHT}, 4 * math.sqrt(8 / 5) / 8, 1 / math.sqrt(8)),
        ],
    )
    def test_the_error_of_the_mean_by_hand(
        self, changes: dict[str, Any], per_coordinate: float, sampling: float
    ) -> None:
        plan = JobPlan.of(make_job(**changes))
        (setting,) = as_record(plan, [])["settings"]
        error = setting["error_of_the_mean"]
        # Rounding to a grid of 32 bits makes an update longer by less than a millionth.
        assert error["noise_per_coordinate"] == pytest.approx(per_coordinate)
        assert error["noise_l2"] == pytest.approx(per_coordinate * math.sqrt(3))
        assert error["sampling_l2_bound"] == pytest.approx(sampling)

    def test_a_clip_norm_that_is_learnt_leaves_the_updates_more_noise_than_is_charged(self) -> None:
        # Andrew et al. 2021, Thm. 1: (4^-2 - (2 * 4)^-2)^(-1/2).
        setting = only(make_job(privacy__client={**CLIENT, "adaptive_clip": {"bit_noise": 4.0}}))
        assert setting.noise_multiplier == 4.0
        assert setting.noise_in_sum == pytest.approx((4**-2 - 8**-2) ** -0.5)

    def test_correlated_noise_counts_as_it_disturbs_the_sums_over_rounds(self) -> None:
        # 1,000 rounds, ten participations 100 apart: 70.75 / 11.57 of independent noise (arXiv:2306.08153's setting,
        # recomputed for this project's reference); without amplification both have the noise of one release, times
        # sqrt(10) where it is independent.
        changes = {"training__rounds": 1000, "cohort__separation": 100, "simulation__partition__mix": clients(100)}
        banded = only(make_job(privacy__client={**CLIENT, "noise": "banded"}, **changes))
        assert banded.noise_in_sum == pytest.approx(4 * math.sqrt(10) * 11.57 / 70.75, rel=1e-3)


class HalfFrozen:
    """A task with two parameters that are not trained beside three that are."""

    def __init__(self, choice: object) -> None:
        pass

    def model(self, features: int, classes: int) -> Any:
        from torch import nn

        frozen = nn.Linear(1, 1)
        frozen.requires_grad_(False)
        return nn.Sequential(nn.Linear(features, 1), frozen)

    def loss(self, outputs: Any, targets: Any) -> Any:
        return outputs.squeeze(-1)

    def metrics(self, outputs: Any, targets: Any) -> Any:
        return {}


class TestWhatCouldBeChanged:
    @settings(max_examples=6, deadline=None)
    @given(
        noise=st.floats(2.0, 20.0),  # With less no epsilon is stated for the most rounds here.
        rounds=st.integers(1, 60),
        rate=st.sampled_from([0.05, 0.3, 0.8, 1.0]),
        unit=st.sampled_from(["record", "client"]),
    )
    def test_more_noise_costs_less_and_more_rounds_or_units_cost_more(
        self, noise: float, rounds: int, rate: float, unit: str
    ) -> None:
        protection = {"noise_multiplier": noise, "delta": 1e-5}
        chosen = {"privacy__record": protection, "training__sampling_rate": rate}
        if unit == "client":
            chosen = {"privacy__client": protection, "cohort__rate": rate, **EIGHT}
        plan = JobPlan.of(make_job(training__rounds=rounds, **chosen))
        table = plan.tables[unit]
        drawn = "batch" if unit == "record" else "cohort"
        assert list(table) == ["noise_multiplier", "rounds", drawn]
        for knob, variants in table.items():
            assert [variant.value for variant in variants] == sorted({variant.value for variant in variants})
            costs = [variant.epsilon for variant in variants]
            dear = costs[::-1] if knob == "noise_multiplier" else costs
            # Two cohorts of one cost may differ in its last digits.
            assert all(a <= b * (1 + 1e-12) for a, b in pairwise(dear))
            (planned,) = [variant for variant in variants if variant.planned]
            assert planned.epsilon == plan.settings[0].cost.pld
            assert planned.noise_l2 == pytest.approx(plan.noise_l2(plan.settings[0]))
        noises = [variant.noise_l2 for variant in table["noise_multiplier"]]
        assert noises == sorted(noises)
        assert [v.noise_l2 for v in table[drawn]] == sorted((v.noise_l2 for v in table[drawn]), reverse=True)
        assert table[drawn][-1].value <= (300 if unit == "record" else 8)

    @pytest.mark.parametrize(
        ("knob", "changes", "value"),
        [
            ("noise_multiplier", {"privacy__record__noise_multiplier": 8.0}, 8.0),
            ("rounds", {"training__rounds": 40}, 40),
            ("batch", {"training__sampling_rate": 0.05}, 15.0),
        ],
    )
    def test_a_changed_value_costs_what_a_job_with_it_would(
        self, knob: str, changes: dict[str, Any], value: float
    ) -> None:
        table = JobPlan.of(make_job(privacy__record=RECORD)).tables["record"]
        (variant,) = [one for one in table[knob] if one.value == pytest.approx(value)]
        job = make_job(privacy__record=dict(RECORD), **changes)
        assert variant.epsilon == pytest.approx(only(job).cost.pld, rel=2e-3)
        assert variant.noise_l2 == pytest.approx(JobPlan.of(job).noise_l2(only(job)))

    @pytest.mark.parametrize("changes", [{"placement": "central"}, {"placement": "local"}])
    def test_a_cohort_that_others_see_costs_the_same_at_any_size(self, changes: dict[str, Any]) -> None:
        plan = JobPlan.of(make_job(privacy__client={**CLIENT, **changes}, cohort__size=2, **EIGHT))
        cohorts = plan.tables["client"]["cohort"]
        assert [variant.value for variant in cohorts] == [0.5, 1, 2, 4, 8]
        assert len({variant.epsilon for variant in cohorts}) == 1
        gain = cohorts[0].noise_l2 / cohorts[-1].noise_l2
        assert gain == pytest.approx(16 if changes["placement"] == "central" else 4)

    def test_of_correlated_noise_the_noise_alone_is_varied(self) -> None:
        plan = JobPlan.of(make_job(privacy__client={**CLIENT, "noise": "banded"}, cohort__separation=2))
        assert list(plan.tables["client"]) == ["noise_multiplier"]

    def test_of_noise_in_shares_noise_and_rounds_are_varied_as_the_accountant_prices_them(self) -> None:
        plan = JobPlan.of(make_job(privacy__client=SHARES, **SECURELY, **EIGHT))
        table = plan.tables["client"]
        assert list(table) == ["noise_multiplier", "rounds"]
        assert (plan.settings[0].cost.exact, plan.settings[0].within) == (None, None)
        for knob, changes in (
            ("noise_multiplier", {"privacy__client__noise_multiplier": 8.0}),
            ("rounds", {"training__rounds": 20}),
        ):
            other = only(make_job(**{"privacy__client": SHARES, **SECURELY, **EIGHT, **changes}))
            (found,) = [v for v in table[knob] if v.value == pytest.approx(changes[next(iter(changes))])]
            assert found.epsilon == pytest.approx(other.cost.pld, rel=1e-6)

    def test_noise_that_no_mechanism_takes_is_not_offered(self) -> None:
        protection = {**RECORD, "noise_multiplier": 0.2}
        table = JobPlan.of(
            make_job(privacy__record=protection, training__sampling_rate=1.0, training__rounds=1)
        ).tables["record"]
        assert [variant.value for variant in table["noise_multiplier"]] == [0.1, 0.2, 0.4, 0.8]


QUIET: dict[str, Any] = {"privacy__record": {**RECORD, "noise_multiplier": 8.0}}
QUIET_CLIENTS: dict[str, Any] = {
    "privacy__client": {"noise_multiplier": 1.5, "delta": 1e-5},
    "cohort__rate": 0.5,
    "simulation__partition__mix": clients(100),
}


QUIET_SHARES: dict[str, Any] = {
    "privacy__client": {**SHARES, "delta": 1e-3},
    "secure_aggregation": {},
    "simulation__partition__mix": clients(20),
}


class TestWarnings:
    """A job that deserves a warning gets it; its neighbour, one value away, does not."""

    @pytest.mark.parametrize(
        ("code", "bad", "good"),
        [
            ("over_budget", {**QUIET, "privacy__record__epsilon": 0.2}, {**QUIET, "privacy__record__epsilon": 2.0}),
            ("delta_refused", {**QUIET, "privacy__record__delta": 1 / 300},
             {**QUIET, "privacy__record__delta": 1 / 301}),
            ("delta_large", {**QUIET, "privacy__record__delta": 1 / 2999},
             {**QUIET, "privacy__record__delta": 1 / 3001}),
            ("delta_refused", {**QUIET_CLIENTS, "privacy__client__delta": 0.01},
             {**QUIET_CLIENTS, "privacy__client__delta": 0.0099}),
            ("delta_large", {**QUIET_CLIENTS, "privacy__client__delta": 0.0011},
             {**QUIET_CLIENTS, "privacy__client__delta": 0.001}),
            ("epsilon_large", {**QUIET, "privacy__record__noise_multiplier": 0.5}, QUIET),
            # Noise 1.5 * sqrt(3) clip norms in L2 needs three clients a round, and two are asked.
            ("cohort_too_small", {**QUIET_CLIENTS, "cohort__rate": 0.02}, {**QUIET_CLIENTS, "cohort__rate": 0.03}),
            ("no_amplification", {**QUIET_CLIENTS, "cohort__rate": None, "cohort__size": 50}, QUIET_CLIENTS),
            ("no_amplification", {**QUIET_CLIENTS, "cohort__rate": None}, QUIET_CLIENTS),
            ("no_amplification", {**QUIET_CLIENTS, "cohort__rate": None, "privacy__client__placement": "local"},
             QUIET_CLIENTS),
            ("no_amplification", QUIET_SHARES, QUIET_CLIENTS),
            ("delta_large", {**QUIET_SHARES, "privacy__client__delta": 0.0051},
             {**QUIET_SHARES, "privacy__client__delta": 0.0049}),
            ("epsilon_large", {**QUIET_SHARES, "privacy__client__noise_multiplier": 0.5}, QUIET_SHARES),
            # Noise 4 * sqrt(3) of 12 honest survivors or more; with all shares a little above it.
            ("cohort_too_small", {**QUIET_SHARES, **EIGHT}, QUIET_SHARES),
            ("over_budget", {**QUIET_SHARES, "privacy__client__epsilon": 1.0},
             {**QUIET_SHARES, "privacy__client__epsilon": 9.0}),
            ("correlated_better", {**QUIET_CLIENTS, "cohort__rate": None, "cohort__size": 20},
             {**QUIET_CLIENTS, "cohort__rate": None, "cohort__separation": 5, "privacy__client__noise": "banded"}),
            ("correlated_better", {**QUIET_CLIENTS, "cohort__rate": None, "cohort__size": 20},
             {**QUIET_CLIENTS, "cohort__rate": None}),
            ("few_rows", {**QUIET, "simulation__partition__mix__s0__rows": 4}, QUIET),
            # (1 - 0.2)^20 is 1.2 %, (1 - 0.2)^21 is 0.9 %.
            ("batches_empty", {**QUIET, "simulation__partition__mix__s0__rows": 27},
             {**QUIET, "simulation__partition__mix__s0__rows": 28}),
            ("batch_over_rows", {**QUIET, "training__sampling_rate": None, "training__batch_size": 301},
             {**QUIET, "training__sampling_rate": None, "training__batch_size": 300}),
        ],
    )  # fmt: skip
    def test_each_comes_where_it_is_deserved_and_nowhere_else(
        self, code: str, bad: dict[str, Any], good: dict[str, Any]
    ) -> None:
        assert code in codes(**bad)
        assert code not in codes(**good)

    def test_a_sound_job_has_none(self) -> None:
        assert codes(**QUIET) == set()
        assert codes(**QUIET_CLIENTS) <= {"correlated_better"}

    def test_why_nothing_is_amplified_in_a_secure_sum(self) -> None:
        plan = JobPlan.of(make_job(**QUIET_SHARES))
        (caution,) = [c for c in cautions(plan) if c.code == "no_amplification"]
        assert "the sites of a secure sum see each other" in caution.text
        assert 'placement = "central" (a trusted server) with cohort.rate = 0.5' in caution.text
        sampled = {**CLIENT, "noise_multiplier": only(make_job(**QUIET_SHARES)).noise_multiplier, "delta": 1e-3}
        central = only(make_job(privacy__client=sampled, cohort__rate=0.5, simulation__partition__mix=clients(20)))
        assert caution.limit == pytest.approx(central.cost.pld, rel=2e-3)

    def test_a_refused_delta_is_not_also_called_large(self) -> None:
        assert codes(**{**QUIET, "privacy__record__delta": 0.01}) == {"delta_refused"}

    def test_what_is_warned_of_as_refused_is_refused_by_the_run(self) -> None:
        from client.site import SitePlan
        from server.release import ReleasePlan

        for bad in ({"epsilon": 0.2}, {"delta": 1 / 300}):
            job = make_job(privacy__record={**RECORD, **bad})
            assert {"over_budget", "delta_refused"} & {caution.code for caution in cautions(JobPlan.of(job))}
            with pytest.raises(JobError):
                SitePlan.make(job, rows=300, parameters=3, rng="os", site="s0")
        for bad in ({"epsilon": 0.2}, {"delta": 1 / 8}):
            job = make_job(privacy__client={**CLIENT, **bad}, **EIGHT)
            assert {"over_budget", "delta_refused"} & {caution.code for caution in cautions(JobPlan.of(job))}
            with pytest.raises(JobError):
                ReleasePlan.make(job, clients=8, parameters=3, rng="os")

    def test_a_cohort_as_large_as_advised_is_large_enough(self) -> None:
        for placement, needed in (("central", 3), ("local", 7)):  # 1.5 sqrt(3) = 2.6, and its square 6.75.
            changes: dict[str, Any] = {**QUIET_CLIENTS, "cohort__rate": None, "privacy__client__placement": placement}
            (small,) = [
                c for c in cautions(JobPlan.of(make_job(**changes, cohort__size=1))) if c.code == "cohort_too_small"
            ]
            assert f"ask {needed} clients" in small.text
            assert small.value == pytest.approx(1.5 * math.sqrt(3))
            assert "cohort_too_small" not in codes(**changes, cohort__size=needed)

    def test_the_gain_of_secret_cohorts_is_what_such_a_job_costs(self) -> None:
        changes = {**QUIET_CLIENTS, "cohort__rate": None}
        (warned,) = [
            c for c in cautions(JobPlan.of(make_job(**changes, cohort__size=10))) if c.code == "no_amplification"
        ]
        secret = only(make_job(**{**QUIET_CLIENTS, "cohort__rate": 0.1}))
        assert warned.limit == pytest.approx(secret.cost.pld, rel=2e-3)
        assert warned.limit < warned.value / 3

    def test_the_gain_of_correlated_noise_at_an_equal_epsilon(self) -> None:
        # 70.75 / 11.57 = 6.1: see test_correlated_noise_counts_as_it_disturbs_the_sums_over_rounds.
        private = {"noise_multiplier": None, "epsilon": 8.0, "delta": 1e-6}
        changes = {"privacy__client": {k: v for k, v in private.items() if v}, "training__rounds": 1000,
                   "simulation__partition__mix": clients(100)}  # fmt: skip
        job = make_job(**changes, cohort__size=1)
        # Charged as everyone, independent noise is that of 1,000 rounds and not of ten participations.
        (warned,) = [c for c in cautions(JobPlan.of(job)) if c.code == "correlated_better"]
        assert warned.value == pytest.approx(70.75 / 11.57 * math.sqrt(1000 / 10), rel=5e-3)
        # Eps 8: even ideal amplification at 1 % is 13.8 where banded noise is 7.6 (relative to the same unit).
        (warned,) = [
            c for c in cautions(JobPlan.of(make_job(**changes, cohort__rate=0.01))) if c.code == "correlated_better"
        ]
        assert warned.value == pytest.approx(13.8 / 7.6, rel=0.02)

    def test_each_says_its_number_and_what_to_do(self) -> None:
        (warned,) = cautions(JobPlan.of(make_job(**{**QUIET, "privacy__record__delta": 0.001})))
        assert (warned.code, warned.unit, warned.value) == ("delta_large", "record", 0.001)
        assert warned.limit == pytest.approx(1 / 3000)
        assert "0.001" in warned.text
        assert "take 0.0003 or less" in warned.text


class TestWhatIsShown:
    def test_json_holds_what_a_program_needs(self) -> None:
        given = answer("hospitals", "--set", "privacy.record.epsilon=none",
                       "--set", "privacy.record.noise_multiplier=1.0")  # fmt: skip
        assert set(given) == {
            "job", "rounds", "sites", "rows", "parameters", "settings", "settings_left_out", "secure_aggregation",
            "tables", "warnings", "seconds",
        }  # fmt: skip
        assert given["secure_aggregation"] is None
        assert (given["job"], given["rounds"], given["sites"], given["parameters"]) == ("hospitals", 30, 5, 31)
        assert given["rows"]["country-practice"] == 33
        (setting,) = given["settings"]
        assert set(setting) == {
            "unit", "placement", "who", "units", "noise_multiplier", "sampling_rate", "rounds", "releases",
            "expected_size", "delta", "target", "epsilon", "bounds", "error_of_the_mean",
        }  # fmt: skip
        assert setting["bounds"]["lower"] <= setting["epsilon"]["pld"] <= setting["epsilon"]["rdp"]
        assert set(setting["epsilon"]) == {"pld", "rdp", "exact"}
        assert set(setting["bounds"]) == {"lower", "estimate", "upper"}
        assert set(given["tables"]["record"]["rounds"][0]) == {"value", "epsilon", "noise_l2", "planned"}
        assert {"code", "unit", "value", "limit", "text"} == set(given["warnings"][0])
        assert given["seconds"] > 0

    def test_a_person_sees_the_jobs_own_row_marked_in_each_plot(self) -> None:
        done = fedchorus("plan", "hospitals", "--set", "privacy.record.epsilon=none",
                         "--set", "privacy.record.noise_multiplier=4.0")  # fmt: skip
        marked = [line.split() for line in done.stdout.splitlines() if "◄ this job" in line]
        assert [float(line[0]) for line in marked] == [4.0, 30.0, 16.5]
        assert all("●" in line[3] and "○" not in line[3] for line in marked)
        assert "warning: privacy.record.delta" not in done.stdout
        assert "nothing was spent" in done.stdout

    def test_a_terminal_without_unicode_gets_plain_marks(self) -> None:
        plan, out = JobPlan.of(make_job(**QUIET)), io.BytesIO()
        file = io.TextIOWrapper(out, encoding="ascii")
        print_plan(Console(file=file, width=140), plan, cautions(plan), seconds=0.1)
        file.flush()
        assert "<- this job" in out.getvalue().decode("ascii")

    def test_a_job_without_privacy_is_told_so(self) -> None:
        plan, out = JobPlan.of(make_job()), io.StringIO()
        print_plan(Console(file=out, width=140), plan, cautions(plan), seconds=0.1)
        assert "Not private" in out.getvalue()
        assert as_record(plan, [])["settings"] == []

    def test_noise_too_small_to_be_accounted_for_is_refused_by_the_unit(self) -> None:
        with pytest.raises(UnsupportedEvent, match=r"^privacy\.record: no epsilon .* raise the noise"):
            cautions(JobPlan.of(make_job(privacy__record={**RECORD, "noise_multiplier": 0.0625})))

    def test_errors_of_the_job_are_one_line(self) -> None:
        with pytest.raises(FedchorusError, match="no such data file"):
            JobPlan.of(make_job(simulation__partition={"clients": 3}))


class TestSecureSums:
    """What is planned of them is what the sites agree on and what a run then counts."""

    def test_the_figures_by_hand(self) -> None:
        # n = 8, one colludes: t = floor(2 * 7 / 3) + 1 = 5 of 7 holders, 2 may fail. Up: 3 parameters, 32 bits each, in
        # a block of 16 bytes, and the weight; an advert of 196, shares of 32 + 94 * 7, a proof of 30, a signature of
        # 66, a reveal of 32 + 34 * 7.
        figures = JobPlan.of(make_job(privacy__client=SHARES, **SECURELY, **EIGHT)).secure
        assert figures is not None
        expected = {"groups": 1, "reduce": "sum", "sites_in_a_sum": 8, "fewest_in_a_sum": 6, "colluders": 1,
                    "hidden_among": 5, "threshold": 5, "neighbours": 7, "dropouts": 2, "bits": 32,
                    "upload_bytes": 16 + 8 + 356 + 128 * 7}  # fmt: skip
        assert {key: figures[key] for key in expected} == expected
        assert set(figures) == {*expected, "download_bytes"}

    @pytest.mark.parametrize(
        "changes",
        [
            {"privacy__client": SHARES, "secure_aggregation": {}},
            {"secure_aggregation": {"bits": 20, "reach": 100.0}},
            {"secure_aggregation": {"groups": 3, "colluders": 0}, "robust": {"reduce": "median"}},
            {"secure_aggregation": {"colluders": 0, "dropouts": 0}, "cohort__size": 5},
        ],
        ids=["shares", "no privacy", "groups", "cohorts"],
    )
    def test_the_bytes_are_those_that_a_first_round_moves(self, changes: dict[str, Any]) -> None:
        from strategies.protocol import Traits
        from strategies.total import layout_for

        job = make_job(**changes, simulation__partition__mix=clients(11))
        planned = JobPlan.of(job).secure
        assert planned is not None
        sums = SecureSum.make(job, sites=11, layout=layout_for(job, 3, Traits()))
        assert planned["sites_in_a_sum"] == sums.shape.clients
        assert (planned["upload_bytes"], planned["download_bytes"]) == first_round(job, sums, sorted(clients(11)))

    def test_a_sum_that_cannot_be_is_refused_in_the_words_of_the_run(self) -> None:
        from simulations.federation import Federation

        job = load_job(scenario_path("hospitals"), ["secure_aggregation={colluders=3}"])
        with pytest.raises(JobError, match="at least 6 sites are needed") as run:
            Federation.load(job)
        with pytest.raises(JobError) as plan:
            JobPlan.of(job)
        assert str(plan.value) == str(run.value)

    def test_a_variant_of_which_no_epsilon_can_be_stated_is_left_out(self) -> None:
        loud = {**SHARES, "noise_multiplier": 0.6}
        plan = JobPlan.of(make_job(privacy__client=loud, **SECURELY, **EIGHT))
        shown = plan.tables["client"]["noise_multiplier"]
        assert any(variant.planned for variant in shown)
        assert len(shown) < 5

    def test_a_person_reads_who_is_hidden_among_whom_and_what_it_takes(self) -> None:
        told = shown(make_job(privacy__client=SHARES, **SECURELY, **EIGHT))
        assert "the server sees one sum of 8 sites a round and no update by itself" in told
        assert "hidden among at least 5 honest ones, itself included, even with 1 of them in league" in told
        assert "2 of 8 sites may fail in a round; any 5 of a site's 7 neighbours together" in told
        assert "32 bits a number, 1.3 KB up" in told
        assert "shares are sized for 5 honest survivors and charged for theirs alone" in told
        assert "zero-out" in told
        assert "groups" not in told

    def test_groups_say_that_a_site_is_hidden_in_its_group_and_how_many_may_lie(self) -> None:
        told = shown(make_job(secure_aggregation={"groups": 3, "colluders": 0}, robust={"reduce": "median"},
                              simulation__partition__mix=clients(11)))  # fmt: skip
        assert "a sum for each of 3 groups of 3 sites or one more" in told
        assert "at least 3 honest ones of its group, not of all, itself included" in told
        assert "in league" not in told
        assert "the median of the groups' means bears up to 1 of 3 that lie or are lost" in told
        assert "Not private" in told

    @pytest.mark.parametrize(
        ("groups", "reduce", "lying"),
        # A median of 2 k + 1 is between honest values while k lie; a quarter, at least one, is cut off at each end.
        [(1, "sum", 0), (3, "median", 1), (4, "median", 1), (9, "median", 4), (3, "trimmed-mean", 1),
         (8, "trimmed-mean", 2), (12, "trimmed-mean", 3), (None, "median", 0), (3, None, 0)],
    )  # fmt: skip
    def test_how_many_groups_may_lie(self, groups: Any, reduce: Any, lying: int) -> None:
        assert lying_groups({"groups": groups, "reduce": reduce}) == lying


def first_round(job: Job, sums: SecureSum, names: list[str]) -> tuple[float, float]:
    """Let everyone who is asked sum zeros, and count the mean bytes of a site's answers and of what it was sent."""
    roster = Roster(job.name, 1, tuple(Member(s, name, identity(s).public_hex) for s, name in enumerate(names, 1)))
    terms, up, down = sums.terms(job, roster), 0, 0
    asked = public_cohort(names, job.cohort.size, seed=job.seed, round_number=1)
    for group in groups_of(job, asked):
        slots = [roster.member(name).slot for name in group]
        server = SecureServer(terms, roster, members=slots, round_number=1, model="cd" * 32)
        each = {
            slot: SecureClient(
                roster.slot(slot).name,
                identity=identity(slot),
                roster=roster,
                terms=terms,
                journal=Remembered(),
                store=InMemory(),
            )
            for slot in slots
        }
        messages = dict.fromkeys(slots, server.proposal)
        for stage, ended in (("advertise", server.cohort), ("share", server.boxes), ("mask", server.survivors),
                             ("agree", server.evidence), ("reveal", dict)):  # fmt: skip
            for slot, message in messages.items():
                if stage == "mask":
                    each[slot].admit(message, round_number=1, model="cd" * 32)
                    words = sums.ring.zeros()
                    answer = each[slot].mask(words)
                    server.add_masked(slot, answer, words)
                    up += words.nbytes
                else:
                    answer = getattr(each[slot], stage)(message)
                    add = {"advertise": "advert", "share": "shares", "agree": "agreement", "reveal": "reveal"}[stage]
                    getattr(server, f"add_{add}")(slot, answer)
                up, down = up + len(answer), down + len(message)
            messages = ended()
    return up / len(asked), down / len(asked)


def shown(job: Job) -> str:
    plan, out = JobPlan.of(job), io.StringIO()
    print_plan(Console(file=out, width=140), plan, cautions(plan), seconds=0.1)
    return out.getvalue()


def test_a_plan_needs_neither_torch_nor_pandas_where_the_job_says_its_rows(tmp_path: Path) -> None:
    code = (
        "import sys, fedchorus\n"
        "sys.argv = ['fedchorus', 'plan', 'hospitals', '--set', 'training.rounds=1000']\n"
        "try: fedchorus.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'flwr', 'pandas', 'sklearn', 'dp_accounting'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())

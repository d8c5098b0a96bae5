"""Secure aggregation over whole runs: the same model as without, drops survived, ends explained, nothing left."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.audit import audit_run
from privacy.errors import RoundAborted, RunError
from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, resume_run, start_run
from strategies.job import load_job
from strategies.parameters import Parameters

SHORT = ["training.rounds=4", "simulation.baselines=false"]
SEEDED = [
    *SHORT,
    'simulation.noise="seeded"',
    "privacy.record.epsilon=none",
    "privacy.record.noise_multiplier=3.0",
]
SECURE = "secure_aggregation={}"
OPEN = [*SHORT, "privacy.record=none", SECURE]
SHARES = ["privacy.record=none", "strategy.weighting=equal"]


def run(out: Path, *settings: str, scenario: str = "hospitals", after: Path | None = None) -> dict[str, Any] | None:
    job = load_job(scenario_path(scenario), settings)
    return start_run(job, out=out, parent=out.parent, watcher=Watcher(), now=datetime.now(UTC), after=after)


def model_of(out: Path) -> Any:
    return Parameters.load(out / "model.safetensors")[1]


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "secure",
    [
        SECURE,
        "secure_aggregation={colluders=0, dropouts=1}",
        "secure_aggregation={bits=20, reach=400.0}",
    ],
)
def test_the_model_is_that_of_plain_collection(secure: str, tmp_path: Path) -> None:
    run(tmp_path / "plain", *SEEDED)
    summary = run(tmp_path / "secure", *SEEDED, secure)
    assert summary is not None
    tolerance = 2e-2 if "bits" in secure else 1e-5
    np.testing.assert_allclose(model_of(tmp_path / "secure"), model_of(tmp_path / "plain"), atol=tolerance)
    assert audit_run(tmp_path / "secure").ok


def test_each_round_says_what_it_cost_and_the_summary_who_is_hidden(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", *OPEN)
    assert summary is not None
    for line in lines_of(tmp_path / "run"):
        assert set(line["secure"]) == {"upload_bytes", "download_bytes", "seconds"}
        assert line["secure"]["upload_bytes"] < 4 * 31 + 8 * 3 + 2000
    told = summary["secure_aggregation"]
    assert (told["sites_in_a_sum"], told["fewest_in_a_sum"], told["hidden_among"]) == (5, 4, 3)


def test_training_metrics_are_in_the_sum(tmp_path: Path) -> None:
    run(tmp_path / "plain", *SHORT, "privacy.record=none")
    run(tmp_path / "secure", *OPEN)
    losses = [[line["training_loss"] for line in lines_of(tmp_path / name)] for name in ("plain", "secure")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_dropouts_and_malformed_answers_at_any_stage_are_survived(tmp_path: Path) -> None:
    run(tmp_path / "run", *OPEN, "training.rounds=12", "simulation.faults.dropout=0.1", "seed=2")
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 12
    assert any(line["failures"] for line in lines)
    assert all(len(line["contributors"]) >= 4 for line in lines)


@pytest.mark.parametrize(
    "more", [[], ["privacy.client.adaptive_clip={bit_noise=1.0}"], ['privacy.client.clipping="per-layer"']]
)
def test_central_noise_falls_on_the_same_sum_that_the_server_no_longer_sees_the_parts_of(
    more: list[str], tmp_path: Path
) -> None:
    settings = [
        *SHORT,
        *SHARES,
        'simulation.noise="seeded"',
        "privacy.client={noise_multiplier=1.0, delta=1e-3, clip_norm=0.5}",
        *more,
    ]
    run(tmp_path / "plain", *settings)
    summary = run(tmp_path / "secure", *settings, SECURE)
    assert summary is not None
    np.testing.assert_array_equal(model_of(tmp_path / "secure"), model_of(tmp_path / "plain"))
    audit = audit_run(tmp_path / "secure")
    assert audit.ok, audit.findings
    assert "it saw each update" not in (tmp_path / "secure" / "MODEL_CARD.md").read_text()
    assert "it saw each update" in (tmp_path / "plain" / "MODEL_CARD.md").read_text()


class TestLostRounds:
    FAULTY = ("simulation.faults.dropout=0.6", "seed=1")

    def test_the_end_names_stage_count_and_threshold_and_leaves_no_secret(self, tmp_path: Path) -> None:
        with pytest.raises(
            RoundAborted, match=r"round \d+: secure sum, stage \w+: \d of \d sites answered, at least 4"
        ):
            run(tmp_path / "run", *OPEN, *self.FAULTY)
        files = {path.name for path in (tmp_path / "run" / "private").rglob("*") if path.is_file()}
        assert files <= {"identity.pem", "journal", "checkpoint.safetensors"}

    def test_without_privacy_a_round_whose_updates_left_is_not_run_again(self, tmp_path: Path) -> None:
        with pytest.raises(RoundAborted):
            run(tmp_path / "run", *OPEN, *self.FAULTY)
        with pytest.raises(RoundAborted) as caught:
            resume_run(tmp_path / "run", watcher=Watcher())
        assert "stage advertise" in str(caught.value)
        assert "this site's vector for this round has left already" in str(caught.value)

    def test_with_privacy_a_retry_is_paid_for(self, tmp_path: Path) -> None:
        settings = [*SEEDED, SECURE, *self.FAULTY, "privacy.record.spare_rounds=1"]
        with pytest.raises(RoundAborted):
            run(tmp_path / "run", *settings)
        for _ in range(4):
            with pytest.raises(RoundAborted) as caught:
                resume_run(tmp_path / "run", watcher=Watcher())
            assert "left already" not in str(caught.value)
        assert "mask: refused" in str(caught.value)


class TestDistributedNoise:
    SETTINGS = (
        *SHORT,
        *SHARES,
        SECURE,
        'privacy.client={placement="distributed", epsilon=4.0, delta=1e-3, clip_norm=0.5}',
    )

    def test_every_site_is_charged_and_the_audit_agrees(self, tmp_path: Path) -> None:
        summary = run(tmp_path / "run", *self.SETTINGS)
        assert summary is not None
        assert summary["adjacency"] == "zero_out"
        assert 3.9 < summary["epsilon"]["client"] <= 4.0
        for site in summary["sites"].values():
            assert site["client"]["epsilon"] == summary["epsilon"]["client"]
        audit = audit_run(tmp_path / "run")
        assert audit.ok, audit.findings

    def test_skellam_shares_and_records_beside_them(self, tmp_path: Path) -> None:
        summary = run(
            tmp_path / "run",
            *SHORT,
            "strategy.weighting=equal",
            "secure_aggregation={bits=16}",
            'privacy.client={placement="distributed", shares="skellam", noise_multiplier=2.0, delta=1e-3}',
        )
        assert summary is not None
        assert summary["epsilon"]["record"] is not None
        assert summary["epsilon"]["client"] is not None
        audit = audit_run(tmp_path / "run")
        assert audit.ok, audit.findings

    def test_a_further_job_is_refused_where_its_epsilon_could_not_be_stated_or_would_leave_something_out(
        self, tmp_path: Path
    ) -> None:
        run(tmp_path / "shares", *self.SETTINGS)
        with pytest.raises(RunError, match="bounds nothing for a record"):
            run(tmp_path / "records", *SHORT, after=tmp_path / "shares")
        central = "privacy.client={noise_multiplier=1.0, delta=1e-3}"
        with pytest.raises(RunError, match="the ledger of cancer-centre would stay behind"):
            run(tmp_path / "central", *SHORT, *SHARES, central, after=tmp_path / "shares")
        summary = run(tmp_path / "again", *self.SETTINGS, "seed=8", after=tmp_path / "shares")
        assert summary is not None
        assert 4.5 < summary["epsilon"]["client"] < 8.0  # Composed: the sum of the two would be 8.
        assert audit_run(tmp_path / "again").ok

    def test_noise_is_calibrated_for_all_rounds_that_are_planned(self, tmp_path: Path) -> None:
        spare = "privacy.record={epsilon=2.0, delta=1e-3, spare_rounds=3, clip_norm=0.5}"
        summary = run(tmp_path / "run", *self.SETTINGS, spare)
        assert summary is not None
        assert summary["epsilon"]["client"] < 4.0

    def test_the_audit_wants_the_run_to_say_who_was_hidden(self, tmp_path: Path) -> None:
        run(tmp_path / "run", *self.SETTINGS)
        path = tmp_path / "run" / "summary.json"
        for claim in (None, {"threshold": 2}):
            summary = json.loads(path.read_text())
            summary["secure_aggregation"] = claim
            path.write_text(json.dumps(summary))
            audit = audit_run(tmp_path / "run")
            assert not audit.ok
            assert any("of its secure sums, job.toml makes it" in finding.why for finding in audit.findings)

    def test_the_audit_holds_the_dimension_that_was_priced_to_the_model(self, tmp_path: Path) -> None:
        run(tmp_path / "run", *self.SETTINGS)
        parameters, model = Parameters.load(tmp_path / "run" / "model.safetensors")
        longer = Parameters({**parameters.shapes, "more": (40,)})
        longer.save(np.append(model, np.zeros(40, np.float32)), tmp_path / "run" / "model.safetensors", {})
        audit = audit_run(tmp_path / "run")
        assert any("plans dimension 32 for a client" in finding.why for finding in audit.findings)

    def test_seeded_noise_repeats_the_run_though_keys_never_do(self, tmp_path: Path) -> None:
        for name in ("one", "other"):
            run(tmp_path / name, *self.SETTINGS, 'simulation.noise="seeded"')
        np.testing.assert_array_equal(model_of(tmp_path / "one"), model_of(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([*SEEDED, SECURE], id="records"),
        pytest.param([*OPEN, "training.rounds=6", "simulation.faults.dropout=0.1", "seed=2"], id="dropouts"),
        pytest.param([*TestDistributedNoise.SETTINGS, 'simulation.noise="seeded"'], id="shares"),
    ],
)
def test_flower_messages_give_the_same_model_and_leave_no_secret(settings: list[str], tmp_path: Path) -> None:
    for engine in ("inline", "flower"):
        run(tmp_path / engine, *settings, f'simulation.engine="{engine}"')
    np.testing.assert_allclose(model_of(tmp_path / "flower"), model_of(tmp_path / "inline"), rtol=1e-5, atol=1e-6)
    told = [[line["contributors"] for line in lines_of(tmp_path / engine)] for engine in ("inline", "flower")]
    assert told[0] == told[1]
    assert not list((tmp_path / "flower").rglob("session"))


@pytest.mark.slow
def test_the_clinics_scenario_comes_to_what_its_page_says(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", "simulation.baselines=false", scenario="clinics")
    assert summary is not None
    assert summary["metrics"]["accuracy"] > 0.85
    assert summary["epsilon"]["client"] <= 6.0
    audit = audit_run(tmp_path / "run")
    assert audit.ok, audit.findings

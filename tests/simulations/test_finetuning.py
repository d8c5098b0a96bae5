"""Sites fine-tune one pre-trained model: what they send is small, what comes out predicts, and what rests stays."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from client.tables import read_frame
from privacy.audit import audit_run
from privacy.errors import DataError, JobError
from simulations.progress import RoundTable
from simulations.simulate import Watcher, resume_run, start_run
from strategies.figures import read_evaluation
from strategies.job import Job, check_job, evaluation_job, load_job
from strategies.parameters import Parameters, Vector
from tests.client.checkpoints import checkpoint, job_of

pytest.importorskip("transformers")
ROWS = 96
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    rng = np.random.default_rng(4)
    filler = ["the", "a", "is", "it", "film", "book"]
    rows = []
    for number in range(ROWS):
        words = [*rng.choice(filler, rng.integers(2, 5)), "good" if number % 2 else "bad"]
        rows.append({"text": " ".join(rng.permutation(words)), "label": number % 2, "site": "abc"[number % 3]})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "rows.csv", index=False)
    table.to_json(folder / "rows.jsonl", orient="records", lines=True)
    return folder


def run(job: Job, out: Path) -> dict[str, Any]:
    summary = start_run(job, out=out, parent=out.parent, watcher=Watcher(), now=datetime(2026, 1, 1, tzinfo=UTC))
    assert summary is not None
    return summary


def weights(out: Path, name: str = "model") -> dict[str, Vector]:
    parameters, vector = Parameters.load(out / f"{name}.safetensors")
    return parameters.split(vector)


LEARN = ("training.rounds=10", "training.local_steps=4", "training.learning_rate=0.5", "task.tuning.scale=2.0")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("secure_aggregation={reach=4000.0, colluders=0}",),
        pytest.param(("task.tuning.refactor_every=2",), marks=SLOW),
        pytest.param(("task.tuning.factors=both",), marks=SLOW),
        pytest.param(("task.tuning.factors=alternate",), marks=SLOW),
        ("task.tuning={rank=3, scale=2.0, ranks={client-1=1, client-2=2}}",),
        pytest.param(("task.tuning={method='norms', scale=2.0}",), marks=SLOW),
        ("task.tuning={method='full', scale=2.0}", "training.learning_rate=0.05"),
        ("task.precision=bfloat16",),
        pytest.param(("task.checkpointing=true",), marks=SLOW),
        pytest.param(("training.physical_batch=3",), marks=SLOW),
        pytest.param(("strategy.name=fedadam", "strategy.server_learning_rate=0.2"), marks=SLOW),
        pytest.param(("training.weak={client-1=0.5}",), marks=SLOW),
    ],
    ids=lambda more: " ".join(more) or "plain",
)
def test_a_federation_learns_by_each_way_of_tuning(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    settings = (*(one for one in LEARN if "scale" not in one or not any("tuning={" in each for each in more)), *more)
    job = job_of(folder / "rows.csv", "bert", *settings, folder=folder)
    summary = run(job, tmp_path / "run")
    assert summary["metrics"]["accuracy"] >= 0.8, summary["metrics"]
    before, after = weights(tmp_path / "run", "initial"), weights(tmp_path / "run")
    fixed = job.task.tuning is not None and job.task.tuning.factors == "b" and job.task.tuning.refactor_every is None
    for name in before:
        if ".lora_A." in name and fixed:
            assert before[name].tolist() == after[name].tolist(), "A stays as it was sent"
        elif "word_embeddings" not in name and "position" not in name and "token_type" not in name:
            assert not np.array_equal(before[name], after[name]), f"{name} was trained"


PRIVATE = "privacy.record={epsilon=8.0, delta=1e-3, clip_norm=1.0}"


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("secure_aggregation={reach=4000.0, colluders=0}",), marks=SLOW),
        pytest.param(("training.physical_batch=3",), marks=SLOW),
        pytest.param(("task.tuning.factors=alternate",), marks=SLOW),
        ("task.tuning={method='norms', scale=2.0}",),
        pytest.param(("task.tuning={method='head', scale=2.0}",), marks=SLOW),
        ("task.tuning={method='full', scale=2.0}",),
        ("task.precision=bfloat16",),
        pytest.param(("task.checkpointing=true",), marks=SLOW),
        ("privacy.record.clipping=per-layer",),
        pytest.param(("task.tuning={rank=3, scale=2.0, ranks={client-1=1}}",), marks=SLOW),
        pytest.param(("training.weak={client-1=0.5}",), marks=SLOW),
    ],
    ids=lambda more: " ".join(more) or "plain",
)
@pytest.mark.parametrize("family", ["bert"])
def test_record_level_privacy_goes_with_each_way_of_tuning_and_is_charged(
    folder: Path, tmp_path: Path, more: tuple[str, ...], family: str
) -> None:
    own = any("tuning={" in one for one in more)
    settings = (*(one for one in LEARN if "scale" not in one or not own), PRIVATE, *more)
    job = job_of(folder / "rows.csv", family, *settings, "training.rounds=2", folder=folder)
    summary = run(job, tmp_path / "run")
    assert 6 < summary["epsilon"]["record"] <= 8
    report = audit_run(tmp_path / "run")
    assert report.ok, report.findings
    before, after = weights(tmp_path / "run", "initial"), weights(tmp_path / "run")
    for name in before:
        moved = not np.array_equal(before[name], after[name])
        fixed = ".lora_A." in name and (job.task.tuning is None or job.task.tuning.factors == "b")
        assert moved != fixed, f"{name}: noise reaches all that is trained, and nothing else"


def test_what_a_site_uploads_is_its_trained_parameters_and_little_more(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder / "rows.csv", "bert", "secure_aggregation={reach=4000.0, colluders=0}", folder=folder)
    run(job, tmp_path / "run")
    parameters, _ = Parameters.load(tmp_path / "run" / "model.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert parameters.trained < parameters.size
    for line in lines:
        assert 4 * parameters.trained < line["secure"]["upload_bytes"] <= 4 * parameters.trained + 12_000


def test_the_same_job_gives_the_same_model_to_the_bit(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder / "rows.csv", "bert", folder=folder)
    found = []
    for name in ("one", "other"):
        run(job, tmp_path / name)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_the_model_is_scored_only_as_often_as_the_job_says_and_after_the_last_round(
    folder: Path, tmp_path: Path
) -> None:
    job = job_of(folder / "rows.csv", "bert", "training.rounds=5", "simulation.evaluate_every=3", folder=folder)
    summary, console = run(job, tmp_path / "run"), Console(file=io.StringIO(), width=200)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["accuracy" in line for line in lines] == [False, False, True, False, True]
    assert summary["metrics"]["accuracy"] == pytest.approx(lines[-1]["accuracy"])
    texts = pd.read_csv(folder / "rows.csv")["text"]
    assert summary["texts"] == {"texts": ROWS, "full": 0, "length": 8}
    assert max(len(text.split()) for text in texts) + 2 < 8
    assert "How it learnt" in (tmp_path / "run" / "report.html").read_text()
    with RoundTable(console, title="x", rounds=5) as shown:
        for line in lines:
            shown.add(line)


def test_json_lines_are_read_as_csv_is(folder: Path, tmp_path: Path) -> None:
    models = []
    for name in ("rows.csv", "rows.jsonl"):
        job = job_of(folder / name, "bert", folder=folder)
        run(job, tmp_path / name)
        models.append((tmp_path / name / "model.safetensors").read_bytes()[-200:])
    assert models[0] == models[1]


def test_texts_of_several_columns_become_one(folder: Path, tmp_path: Path) -> None:
    table = pd.read_csv(folder / "rows.csv")
    words = table["text"].str.split(n=1, expand=True)
    table.assign(title=words[0], rest=words[1]).drop(columns="text").to_csv(folder / "parts.csv", index=False)
    job = job_of(folder / "parts.csv", "bert", "data.columns.text.join=['title', 'rest']", folder=folder)
    frame = read_frame(folder / "parts.csv", job.data)
    assert frame["text"][0] == f"{words[0][0]}. {words[1][0]}"
    assert run(job, tmp_path / "run")["metrics"]["loss"] > 0
    job = job_of(folder / "parts.csv", "bert", "data.columns.text.join=['titel', 'rest']", folder=folder)
    with pytest.raises(DataError, match="column 'titel' is absent; did you mean 'title'"):
        run(job, tmp_path / "other")


class TestImageFolders:
    def images(self, folder: Path) -> Path:
        image = pytest.importorskip("PIL.Image")
        rng = np.random.default_rng(1)
        for number in range(48):
            bright = number % 2
            cells = np.clip(rng.normal(60 + 140 * bright, 20, (10, 12)), 0, 255).astype(np.uint8)
            path = folder / f"site{number % 2 if number % 4 < 2 else 1 - number % 2}" / ("bright" if bright else "dark")
            path.mkdir(parents=True, exist_ok=True)
            image.fromarray(cells).save(path / f"{number}.png")
        return folder

    def job(self, folder: Path, family: str, path: Path, *settings: str) -> Job:
        raw = job_of(path, family, *settings, folder=folder).model_dump(exclude_none=True, mode="json")
        raw["data"] |= {"client": "hospital", "classes": ["dark", "bright"]}
        del raw["simulation"]["partition"]
        return check_job(raw, where="the job")

    @pytest.mark.parametrize(("family", "method"), [("vit", "lora"), ("resnet", "head")])
    def test_of_site_and_class_are_learnt_from(self, folder: Path, tmp_path: Path, family: str, method: str) -> None:
        job = self.job(folder, family, self.images(tmp_path / "images"), *LEARN[:-1])
        raw = job.model_dump(exclude_none=True, mode="json")
        raw["task"]["tuning"] = {"method": method, "scale": 2.0}
        job = check_job(raw, where="the job")
        summary = run(job, tmp_path / "run")
        assert set(summary["sites"]) == {"site0", "site1"}
        assert summary["metrics"]["accuracy"] >= 0.8

    def test_with_a_file_that_is_no_image_are_refused_without_its_name(self, folder: Path, tmp_path: Path) -> None:
        images = self.images(tmp_path / "images")
        (images / "site0" / "dark" / "mueller-anna.png").write_bytes(b"no image")
        with pytest.raises(DataError, match="1 of 49 files are no images") as error:
            run(self.job(folder, "vit", images), tmp_path / "run")
        assert "mueller" not in str(error.value)

    def test_of_more_than_eight_bits_are_refused_before_they_are_cut(self, folder: Path, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        images = self.images(tmp_path / "images")
        deep = (np.arange(64, dtype=np.uint16) * 900).reshape(8, 8)
        image.fromarray(deep).save(images / "site0" / "dark" / "deep.png")
        with pytest.raises(DataError, match="1 of 49 images have more than 8 bits"):
            run(self.job(folder, "vit", images), tmp_path / "run")

    def test_that_are_empty_say_what_they_should_hold(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        with pytest.raises(DataError, match="no images; the job reads SITE/CLASS/FILE"):
            run(self.job(folder, "vit", tmp_path / "images"), tmp_path / "run")


def test_a_strategy_that_sends_two_models_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder / "rows.csv", "bert", "strategy.name=scaffold", "strategy.weighting=equal", folder=folder)
    with pytest.raises(JobError, match=r"task\.tuning with strategy\.name"):
        run(job, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_job_of_a_run_names_its_checkpoint_by_hash(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder / "rows.csv", "bert", folder=folder)
    run(job, tmp_path / "run")
    again = load_job(tmp_path / "run" / "job.toml")
    assert again.hash == job.hash
    assert len(again.task.checkpoint_hash or "") == len(again.task.tokenizer_hash or "") == 64
    other = checkpoint("bert", tmp_path)
    assert other != checkpoint("bert", folder)


def written(folder: Path, family: str) -> tuple[Path, dict[str, Any]]:
    """A run in which the tiny `family` learns to write; of a T5 the word behind a text."""
    answers = ["data.target=answer", "data.target_type=text", "data.target_length=4", "task.name=seq2seq"]
    texts = ["data.target=text", "data.target_type=next", "task.name=causal-lm"]
    pd.read_csv(folder / "rows.csv").assign(answer=lambda rows: rows["text"].str.split().str[-1]).to_csv(
        folder / "answers.csv", index=False
    )
    own = [*(answers if family == "t5" else texts), "data.stratify=false"]
    out = folder / f"written-{family}-{len(list(folder.glob('written-*')))}"
    return out, run(job_of(folder / "answers.csv", family, *own, folder=folder), out)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
class TestEvaluationsOfWhatIsWritten:
    def test_say_what_the_simulator_sees_on_all_rows(self, folder: Path, family: str) -> None:
        path, summary = written(folder, family)
        where = folder / f"evaluated-{family}"
        run(evaluation_job(path, ["secure_aggregation={colluders=0, reach=100.0}"]), where)
        figures = read_evaluation(where)["figures"]
        assert figures["accuracy"]["value"] == pytest.approx(summary["metrics"]["accuracy"], abs=2e-4)
        assert figures["loss"]["value"] == pytest.approx(summary["metrics"]["loss"], rel=2e-3)
        assert figures["perplexity"]["value"] == pytest.approx(np.exp(figures["loss"]["value"]))
        assert 0 <= figures["mostly"]["value"] <= 1

    def test_under_privacy_are_off_by_their_stated_noise(self, folder: Path, family: str) -> None:
        path, summary = written(folder, family)
        where = folder / f"private-{family}"
        run(evaluation_job(path, ["privacy.record={epsilon=8.0, delta=1e-3}", "evaluation.bins=10"]), where)
        figures = read_evaluation(where)["figures"]
        for name in ("accuracy", "loss"):
            assert figures[name]["se"] > 0
            assert abs(figures[name]["value"] - summary["metrics"][name]) < 6 * figures[name]["se"]
        assert audit_run(where).ok


class TestOfACalibratedRun:
    @pytest.fixture(scope="class")
    def finished(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        (folder / "public.csv").write_text("text\ngood film\nthe book is not very good\nit is a bad bad book\n")
        public = f"task.tuning.calibration='{folder / 'public.csv'}'"
        out = folder / "calibrated"
        return out, run(job_of(folder / "rows.csv", "bert", "data.stratify=false", public, folder=folder), out)

    def test_the_sites_train_with_the_directions_that_they_received(self, finished: tuple[Path, Any]) -> None:
        out, _ = finished
        before, after = weights(out, "initial"), weights(out)
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moved == {name for name in before if "lora_A" not in name}
        assert {name for name in before if "lora_A" in name}

    def test_an_evaluation_needs_no_calibration(self, finished: tuple[Path, Any], folder: Path) -> None:
        out, summary = finished
        run(evaluation_job(out), folder / "evaluated-calibrated")
        said = read_evaluation(folder / "evaluated-calibrated")["figures"]["accuracy"]["value"]
        assert said == pytest.approx(summary["metrics"]["accuracy"], abs=1e-4)

    def test_it_is_resumed_without_the_file(self, finished: tuple[Path, Any], folder: Path) -> None:
        out, summary = finished
        (folder / "public.csv").unlink()
        (out / "summary.json").unlink()
        again = resume_run(out, watcher=Watcher())
        assert again is not None
        assert again["metrics"] == summary["metrics"]

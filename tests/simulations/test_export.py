"""`fedchorus export` and `fedchorus predict`, as a person types them, on what a run or a fetched job left."""

from __future__ import annotations

import json
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, start_run
from strategies.job import check_job, load_job
from tests.client.checkpoints import checkpoint, job_of
from tests.client.test_artifacts import finished, writer
from tests.simulations.test_command_line import fedchorus

transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # Of PEFT itself.

STATISTICS = ("task={name='statistics'}", "training=none", "strategy=none", "privacy=none")
TEXTS = [f"{'very ' * (row % 4)}{'good' if row % 2 else 'bad'} film" for row in range(48)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    table = pd.DataFrame({"text": TEXTS, "label": [row % 2 for row in range(48)]})
    table.to_csv(folder / "rows.csv", index=False)
    unlabelled = table[["text"]]
    unlabelled.to_csv(folder / "new.csv", index=False)
    unlabelled.to_parquet(folder / "new.parquet")
    unlabelled.to_json(folder / "new.jsonl", orient="records", lines=True)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    settings = ("training.rounds=10", "training.local_steps=4", "training.learning_rate=0.5", "task.tuning.scale=2.0")
    job = job_of(folder / "rows.csv", "bert", *settings, "simulation.baselines=false", folder=folder)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert start_run(job, out=folder / "run", parent=folder, watcher=Watcher(), now=now) is not None
    return folder / "run"


def predicted(run: Path, file: Path, tmp_path: Path) -> pd.DataFrame:
    """All of the predictions, as their file has them."""
    out = tmp_path / f"{file.name}-predictions.csv"
    done = fedchorus("predict", str(run), str(file), "--out", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out, keep_default_na=False)


class TestExport:
    def test_of_a_run_is_read_by_transformers_and_peft_alone(self, run: Path, folder: Path, tmp_path: Path) -> None:
        done = fedchorus("export", str(run), "--out", "out", "--merged", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert "adapter_config.json" in said["files"]
        assert "merged/model.safetensors" in said["files"]
        ours = predicted(run, folder / "new.csv", tmp_path)

        torch, out = pytest.importorskip("torch"), tmp_path / "out"
        safetensors = pytest.importorskip("safetensors.torch")
        head, arrays = json.loads((out / "head.json").read_text()), safetensors.load_file(out / "head.safetensors")
        base = transformers.AutoModel.from_pretrained(checkpoint("bert", folder))
        model = peft.PeftModel.from_pretrained(base, out).eval()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"), pad_token="[PAD]")
        inputs = tokenizer(
            TEXTS, truncation=True, max_length=head["max_length"], padding=True, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        with torch.no_grad():
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        h = (hidden * mask).sum(1) / mask.sum(1)
        u = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        logits = (u * head["scale"] / head["width"] ** 0.5) @ arrays["weight"].T + arrays["bias"]
        np.testing.assert_allclose(ours["p(1)"], torch.sigmoid(logits)[:, 0], atol=1e-5)
        assert ours["p(1)"].std() > 0.05, "it learnt something to compare"

    def test_has_the_runs_card_with_its_privacy_statement(self, run: Path, tmp_path: Path) -> None:
        assert fedchorus("export", str(run), "--out", "out", cwd=tmp_path).returncode == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.startswith((run / "MODEL_CARD.md").read_text().rstrip())
        assert "## Privacy statement" in card
        assert "started from the pre-trained `models:bert`" in card

    def test_of_a_fetched_job_says_what_its_coordinator_knows(
        self, run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = ("privacy.record={epsilon=8.0, delta=1e-3}", "secure_aggregation={reach=4000.0}")
        job = job_of(folder / "rows.csv", "bert", *settings, folder=folder).portable
        monkeypatch.setenv("FEDCHORUS_MODELS", str(folder))
        fetched = finished(job, tmp_path / "fetched", sites=["a", "b", "c"], epsilon_client=None)
        monkeypatch.delenv("FEDCHORUS_MODELS")
        done = fedchorus("export", str(fetched), "--out", "out", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "set FEDCHORUS_MODELS" in done.stderr
        monkeypatch.setenv("FEDCHORUS_MODELS", str(folder))
        done = fedchorus("export", str(fetched), "--out", "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        card = (tmp_path / "out" / "README.md").read_text()
        assert "at 3 sites" in card
        assert "Record-level (epsilon, delta)-differential privacy of at most epsilon 8 at delta 0.001" in card
        assert "the server saw no site's update" in card

    def test_refuses_in_one_line(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").touch()
        for arguments, says in (
            (("export", str(run), "--out", "mine"), "exists and is not an empty folder"),
            (("export", "nowhere", "--out", "out"), "no run folder"),
        ):
            done = fedchorus(*arguments, cwd=tmp_path)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert says in done.stderr
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]

    def test_of_a_model_that_was_not_pretrained_is_refused_by_name(self, tmp_path: Path) -> None:
        tabular = finished(load_job(scenario_path("hospitals"), ["privacy.record=none"]), tmp_path / "run")
        done = fedchorus("export", str(tabular), "--out", "out", cwd=tmp_path)
        assert done.returncode == 1
        assert 'task.model = "logistic-regression" is no pre-trained model' in done.stderr


class TestPredict:
    def test_reads_every_kind_of_table_without_a_target(self, run: Path, folder: Path, tmp_path: Path) -> None:
        tables = [predicted(run, folder / f"new.{kind}", tmp_path) for kind in ("csv", "parquet", "jsonl")]
        for table in tables[1:]:
            pd.testing.assert_frame_equal(table, tables[0])
        assert list(tables[0].columns) == ["row", "prediction", "probability", "p(0)", "p(1)"]
        assert tables[0]["row"].tolist() == list(range(1, 49))
        np.testing.assert_allclose(tables[0]["p(0)"] + tables[0]["p(1)"], 1.0)

    def test_never_looks_at_the_target(self, run: Path, folder: Path, tmp_path: Path) -> None:
        pd.DataFrame({"text": TEXTS, "label": "unknown"}).to_csv(tmp_path / "odd.csv", index=False)
        odd, plain = predicted(run, tmp_path / "odd.csv", tmp_path), predicted(run, folder / "new.csv", tmp_path)
        pd.testing.assert_frame_equal(odd, plain)

    def test_agrees_with_what_the_run_measured(self, run: Path, folder: Path, tmp_path: Path) -> None:
        found = predicted(run, folder / "rows.csv", tmp_path)
        accuracy = (found["prediction"].astype(int) == [row % 2 for row in range(48)]).mean()
        assert accuracy >= 0.8 <= json.loads((run / "summary.json").read_text())["metrics"]["accuracy"]

    def test_prints_ten_at_most_and_writes_a_file_that_is_the_persons_own(
        self, run: Path, folder: Path, tmp_path: Path
    ) -> None:
        done = fedchorus("predict", str(run), str(folder / "new.csv"), "--out", "all.csv", cwd=tmp_path)
        assert "48 predictions in all.csv" in done.stdout
        assert len([line for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]) == 11
        assert stat.S_IMODE((tmp_path / "all.csv").stat().st_mode) == 0o600
        again = fedchorus("predict", str(run), str(folder / "new.csv"), "--out", "all.csv", cwd=tmp_path)
        assert again.returncode == 1
        assert "is there already" in again.stderr
        said = json.loads(fedchorus("predict", str(run), str(folder / "new.csv"), "--json", cwd=tmp_path).stdout)
        assert (said["records"], len(said["predictions"]), said["cut"]) == (48, 10, 0)

    def test_puts_a_text_together_as_the_job_does(self, folder: Path, tmp_path: Path) -> None:
        column = "data.columns={text={type='tokens', length=8, join=['title', 'body']}}"
        joined = finished(job_of(folder / "rows.csv", "bert", column, folder=folder), tmp_path / "run")
        (tmp_path / "new.csv").write_text("title,body\nfilm,good\nfilm,bad\n")
        assert predicted(joined, tmp_path / "new.csv", tmp_path)["probability"].nunique() == 2

    def test_says_how_many_texts_it_cut(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "long.csv").write_text("text\ngood film\n" + "very " * 20 + "bad\n")
        done = fedchorus("predict", str(run), "long.csv", cwd=tmp_path)
        assert "1 texts are longer than the job reads, and were cut" in done.stdout

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("words\nsecret-value\n", "column 'text' is absent"),
            ("text\n", "no rows"),
            ('text,x\n"secret-value\n', "cannot be read as .csv"),
            ("text,x\n,1\nsecret-value,2\n", "1 of 2 rows have missing values"),
        ],
        ids=["column", "empty", "quotes", "missing"],
    )
    def test_refuses_a_file_in_one_line_without_a_value(self, text: str, says: str, run: Path, tmp_path: Path) -> None:
        (tmp_path / "new.csv").write_text(text)
        done = fedchorus("predict", str(run), "new.csv", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert says in done.stderr
        assert "secret" not in done.stderr

    def test_tags_each_word(self, folder: Path, tmp_path: Path) -> None:
        settings = ("task.name=token-classification", "data.target_type=tags", "data.classes=['x','y','z']")
        job = job_of(folder / "rows.csv", "bert", *settings, folder=folder)
        found = predicted(finished(job, tmp_path / "run"), folder / "new.csv", tmp_path)
        assert [len(tags.split()) for tags in found["prediction"]] == [len(text.split()) for text in TEXTS]
        assert set(" ".join(found["prediction"]).split()) <= {"x", "y", "z"}

    @pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
    def test_writes_an_answer(self, family: str, folder: Path, tmp_path: Path) -> None:
        job = writer(family, folder)
        found = predicted(finished(job, tmp_path / "run"), folder / "new.csv", tmp_path)
        assert len(found) == 48
        assert max(len(text.split()) for text in found["prediction"]) <= 6
        assert any(found["prediction"]) or family == "llama", "that tiny model ends every answer at once"

    def test_goes_on_with_a_text_as_far_as_the_model_has_places(self, folder: Path, tmp_path: Path) -> None:
        settings = ("task.name=causal-lm", "data.target_type=next", "data.target=text")
        job = job_of(folder / "rows.csv", "gpt2", *settings, folder=folder)
        found = predicted(finished(job, tmp_path / "run"), folder / "new.csv", tmp_path)
        for text, more in zip(TEXTS, found["prediction"], strict=True):
            assert len(text.split()) + len(more.split()) <= 20, "the tiny model has 20 places"

    def test_goes_on_with_a_text_that_its_tokenizer_closed(self, folder: Path, tmp_path: Path) -> None:
        settings = ("task.name=causal-lm", "data.target_type=next", "data.target=text")
        job = job_of(folder / "rows.csv", "gpt2", *settings, folder=folder)
        (tmp_path / "new.csv").write_text("text\ngood film\ngood film </s>\n")
        first, second = predicted(finished(job, tmp_path / "run"), tmp_path / "new.csv", tmp_path)["prediction"]
        assert first == second != ""

    def test_reads_a_folder_of_images(self, folder: Path, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        (tmp_path / "images" / "any").mkdir(parents=True)
        for number in range(3):
            cells = np.full((9, 9), 80 * number, np.uint8)
            image.fromarray(cells).save(tmp_path / "images" / "any" / f"{number}.png")
        raw = job_of(folder / "rows.csv", "vit", folder=folder).model_dump(exclude_none=True, mode="json")
        raw["data"]["classes"] = ["dark", "bright"]
        found = predicted(finished(check_job(raw, where="the job"), tmp_path / "run"), tmp_path / "images", tmp_path)
        assert set(found["prediction"]) <= {"dark", "bright"}
        assert found["probability"].nunique() == 3

    @pytest.mark.parametrize(
        ("settings", "inside"),
        [
            (("task.name=tabular-regression", "task.model=linear", "data.target_type=number"), lambda v: True),
            (("data.target_type=class", "data.classes=['a','b','c']"), lambda v: v in "abc"),
        ],
        ids=["number", "classes"],
    )
    def test_predicts_rows_of_a_table(self, settings: tuple[str, ...], inside: Any, tmp_path: Path) -> None:
        raw = {
            "name": "table",
            "data": {"path": "x.csv", "target": "y", "client": "c", "columns": {"a": {"range": [0, 1]}}},
            "training": {"rounds": 1, "learning_rate": 0.1, "local_steps": 1, "batch_size": 4},
        }
        path = tmp_path / "job.toml"
        path.write_bytes(check_job(raw, where="the job").toml)
        (tmp_path / "new.csv").write_text("a\n0.1\n0.9\n0.5\n")
        found = predicted(finished(load_job(path, settings), tmp_path / "run"), tmp_path / "new.csv", tmp_path)
        assert len(found) == 3
        assert all(inside(value) for value in found["prediction"])
        assert found["prediction" if "probability" not in found else "probability"].nunique() == 3

    def test_ranks_by_risk(self, tmp_path: Path) -> None:
        job = load_job(scenario_path("hospitals-survival"), ["privacy.record=none", "simulation.baselines=false"])
        frame = pd.DataFrame(
            {name: [_some(column, at) for at in range(3)] for name, column in job.data.columns.items()}
        )
        frame.to_csv(tmp_path / "new.csv", index=False)
        found = predicted(finished(job, tmp_path / "run"), tmp_path / "new.csv", tmp_path)
        assert found["prediction"].nunique() == 3

    @pytest.mark.parametrize(
        ("scenario", "settings", "says"),
        [
            ("retailers-forecast", (), "it predicts the next period of a series"),
            ("retailers-recommend", (), "a rating needs its user's own parameters"),
            ("hospitals", STATISTICS, "it measured and has no model that predicts; see `fedchorus statistics"),
        ],
    )
    def test_refuses_by_name_what_has_no_prediction(
        self, scenario: str, settings: tuple[str, ...], says: str, tmp_path: Path
    ) -> None:
        finished(load_job(scenario_path(scenario), settings), tmp_path / "run")
        done = fedchorus("predict", str(tmp_path / "run"), "new.csv", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert says in done.stderr


def _some(column: Any, at: int) -> object:
    if column.type == "category":
        return column.values[at % len(column.values)]
    low, high = column.range
    return low + (high - low) * (at + 1) / 4


def test_a_copy_of_a_run_is_a_run(run: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    pd.testing.assert_frame_equal(
        predicted(run, folder / "new.csv", tmp_path),
        predicted(tmp_path / "copy", folder / "new.csv", tmp_path / "copy"),
    )


def test_the_commands_have_an_example(tmp_path: Path) -> None:
    for command in ("export", "predict"):
        assert f"Example: fedchorus {command} runs/" in " ".join(
            fedchorus(command, "--help", cwd=tmp_path).stdout.split()
        )

"""What a run's model becomes as files: transformers and PEFT make the same of them, by themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from client.artifacts import export
from client.data import Records
from client.initial import initial_parameters
from client.prediction import generate, places_left
from client.pretrained import Pretrained, Writer
from client.trained import Trained, load_trained
from privacy.errors import JobError, RunError
from strategies.job import Job
from strategies.parameters import Parameters, vector_hash
from tests.client.checkpoints import FAMILIES, WORDS, checkpoint, job_of

transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # Of PEFT itself.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


NAMES = ("input_ids", "attention_mask")


def finished(job: Job, run: Path, **summary: object) -> Path:
    """A run folder whose model is not the one that it began with: every array is random."""
    run.mkdir(parents=True)
    (run / "job.toml").write_bytes(job.toml)
    parameters, start = initial_parameters(job)
    vector = start + np.random.default_rng(2).normal(0, 0.1, start.shape).astype(np.float32)
    parameters.save(vector, run / "model.safetensors", {"job": job.hash})
    said = {"job_hash": job.hash, "rounds": 2, "sites": ["a", "b"], "model_hash": vector_hash(vector), **summary}
    (run / "summary.json").write_text(json.dumps(said))
    return run


def classifier(family: str, folder: Path, *settings: str) -> Job:
    own = () if family != "resnet" or settings else ("task.tuning={method='full'}",)
    return job_of(folder / "rows.csv", family, "task.tuning.scale=2.0", *own, *settings, folder=folder)


def writer(family: str, folder: Path, *settings: str) -> Job:
    name = {"t5": "seq2seq"}.get(family, "causal-lm")
    asked = (f"task.name={name}", "data.target_type=text", "data.target_length=6", *settings)
    return job_of(folder / "rows.csv", family, *asked, folder=folder)


def rows(job: Job) -> Tensor:
    """Random texts of several lengths, or images, as the job encodes them."""
    generator = torch.Generator().manual_seed(1)
    (column,) = job.data.columns.values()
    if column.type == "image":
        return torch.rand(5, 64, generator=generator) * 2 - 1
    ids = torch.randint(2, len(WORDS), (5, 8), generator=generator).float()
    for row, length in enumerate((8, 3, 1, 5, 8)):
        ids[row, length:] = -1
    if job.data.target_length is not None:
        answers = torch.randint(2, len(WORDS), (5, job.data.target_length), generator=generator).float()
        ids = torch.cat([ids, answers], dim=1)
    return ids


def exported(job: Job, tmp_path: Path, **options: bool) -> tuple[Path, Tensor, Trained]:
    """The folder, and what the run's own model made of `rows` before."""
    trained = load_trained(finished(job, tmp_path / "run"), device="cpu")
    placed = trained.trainer.place(Records(rows(job).numpy(), np.zeros(5, np.int64)))
    wanted = trained.trainer.outputs(placed.features)
    export(trained, tmp_path / "out", card="# A card", **options)
    return tmp_path / "out", wanted, trained


def loaded(out: Path, base: Path, kind: str, method: str) -> Any:
    """With transformers and PEFT alone."""
    if method in ("full", "norms", "bias", "merged"):
        return getattr(transformers, kind).from_pretrained(out, dtype=torch.float32).eval()
    cut = {"num_hidden_layers": 1} if method == "depth" else {}
    model = getattr(transformers, kind).from_pretrained(base, **cut).eval()
    return peft.PeftModel.from_pretrained(model, out).eval() if method in ("lora", "depth") else model


def logits_of(model: Any, out: Path, ids: Tensor) -> Tensor:
    """The formula of head.json in plain torch, for texts or for pixels."""
    head, arrays = json.loads((out / "head.json").read_text()), load_file(out / "head.safetensors")
    if "image" in head:
        side, size = head["image"]["side"], head["image"]["resized_to"]
        pixels = ids.view(len(ids), 1, side, side).expand(-1, 3, -1, -1)
        if size != side:
            pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        found = model(pixel_values=pixels)
        h = found.pooler_output.flatten(1) if head["pooling"] == "pooler" else found.last_hidden_state[:, 0]
    else:
        mask = (ids != -1).long()
        hidden = model(input_ids=ids.long().clamp(min=0), attention_mask=mask).last_hidden_state.float()
        if head["pooling"] == "each":
            h = hidden
        elif head["pooling"] == "last":
            h = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
        else:
            h = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    spread = h.var(-1, unbiased=False, keepdim=True)
    u = (h - h.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * head["scale"] / head["width"] ** 0.5
    logits: Tensor = u @ arrays["weight"].T + arrays["bias"]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "depth", "merged", "full", "norms", "bias", "head"])
def test_a_classifier_answers_as_the_runs_model_did(family: str, method: str, folder: Path, tmp_path: Path) -> None:
    if family == "resnet" and method in ("lora", "depth", "merged", "norms", "bias"):
        pytest.skip("it has no linear layers, and its norms rest")
    if (family, method) == ("llama", "bias") or (family, method) == ("t5", "bias"):
        pytest.skip("it has no biases")
    own = {"lora": ("alpha=3.5",), "merged": ("alpha=3.5", "depth=1"), "depth": ("depth=1",)}
    tuning = [f"task.tuning.{each}" for each in own.get(method, ())] or [f"task.tuning={{method='{method}'}}"]
    job = job_of(folder / "rows.csv", family, *tuning, folder=folder)
    out, wanted, _ = exported(job, tmp_path, merged=method == "merged")
    out = out / "merged" if method == "merged" else out
    kind = json.loads((out / "head.json").read_text())["base_class"]
    with torch.no_grad():
        found = logits_of(loaded(out, checkpoint(family, folder), kind, method), out, rows(job))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float(wanted.std()) > 1e-4, "the rows differ, and so do their answers"


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["lora", "merged", "full"])
def test_a_writer_foresees_as_the_runs_model_did(family: str, method: str, folder: Path, tmp_path: Path) -> None:
    more = ("task.tuning={method='full'}",) if method == "full" else ("task.tuning.factors=both",)
    job = writer(family, folder, *more)
    out, wanted, _ = exported(job, tmp_path, merged=method == "merged")
    out = out / "merged" if method == "merged" else out
    kind = "AutoModelForSeq2SeqLM" if family == "t5" else "AutoModelForCausalLM"
    model = loaded(out, checkpoint(family, folder), kind, method)
    if method == "lora":
        assert type(model).__name__ == ("PeftModelForSeq2SeqLM" if family == "t5" else "PeftModelForCausalLM")
    asked = rows(job).long()
    with torch.no_grad():
        for row, losses in zip(asked, wanted[..., 0], strict=True):
            prompt, answer = row[:8][row[:8] != -1][None], row[8:][None]
            if family == "t5":
                logits = model(input_ids=prompt, labels=answer).logits
            else:
                logits = model(input_ids=torch.cat([prompt, answer], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
            found = functional.cross_entropy(logits[0], answer[0], reduction="none")
            torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)


def test_a_class_for_each_word_is_exported_too(folder: Path, tmp_path: Path) -> None:
    settings = ("task.name=token-classification", "data.target_type=tags", "data.classes=['x','y','z']")
    out, wanted, _ = exported(job := classifier("bert", folder, *settings), tmp_path)
    with torch.no_grad():
        found = logits_of(loaded(out, checkpoint("bert", folder), "BertModel", "lora"), out, rows(job))
    there = rows(job) != -1
    torch.testing.assert_close(found[there], wanted[there], rtol=1e-5, atol=1e-5)
    assert json.loads((out / "head.json").read_text())["classes"] == ["x", "y", "z"]


@pytest.mark.parametrize("method", ["lora", "head"])
def test_adapters_of_a_bfloat16_job_answer_alike_in_bfloat16(method: str, folder: Path, tmp_path: Path) -> None:
    more = () if method == "lora" else ("task.tuning={method='head'}",)
    job = job_of(folder / "rows.csv", "bert", "task.precision=bfloat16", *more, folder=folder)
    out, wanted, _ = exported(job, tmp_path)
    base = transformers.AutoModel.from_pretrained(checkpoint("bert", folder), dtype=torch.bfloat16).eval()
    model = peft.PeftModel.from_pretrained(base, out).eval() if method == "lora" else base
    ids = rows(job)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model(input_ids=ids.long().clamp(min=0), attention_mask=(ids != -1).long()).last_hidden_state.float()
    found = logits_of(_Given(hidden), out, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert "autocast" in (out / "README.md").read_text()


def test_a_bfloat16_job_is_merged_in_float32(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder / "rows.csv", "bert", "task.precision=bfloat16", folder=folder)
    out, wanted, _ = exported(job, tmp_path, merged=True)
    arrays = load_file(out / "merged" / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {torch.float32}
    with torch.no_grad():
        found = logits_of(loaded(out / "merged", out, "BertModel", "merged"), out / "merged", rows(job))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)  # The run itself rounds to 8 bits.


class _Given:
    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def __call__(self, **inputs: object) -> Any:
        return type("Found", (), {"last_hidden_state": self._hidden})


class TestTheFiles:
    def test_are_pefts_layout_with_the_head_the_tokenizer_and_the_card(self, folder: Path, tmp_path: Path) -> None:
        out, _, _ = exported(classifier("bert", folder, "task.tuning.rank=3"), tmp_path)
        assert {path.name for path in out.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "head.safetensors",
            "head.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        }
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 6, False)
        assert len(config["target_modules"]) == 4
        assert (out / "README.md").read_text().startswith("# A card\n\n## How to load it")

    @pytest.mark.parametrize(
        "settings",
        [
            ("task.tuning.depth=1",),
            ("task.precision=bfloat16",),
            ("task.tuning={method='full', depth=1}",),
            ("task.tuning={method='head'}",),
        ],
        ids=["lora", "bfloat16", "full", "head"],
    )
    def test_are_loaded_by_the_lines_of_their_own_readme(
        self, settings: tuple[str, ...], folder: Path, tmp_path: Path
    ) -> None:
        out, wanted, _ = exported(job := job_of(folder / "rows.csv", "bert", *settings, folder=folder), tmp_path)
        code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
        lines = [line for line in code.splitlines() if "okenizer" not in line or "import" in line]
        found: dict[str, Any] = {}
        exec("\n".join(lines).replace("FOLDER", str(out)).replace("BASE", str(checkpoint("bert", folder))), found)
        low = "task.precision=bfloat16" in settings
        assert ("autocast" in (out / "README.md").read_text()) is low
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = logits_of(found["model"], out, rows(job))
        torch.testing.assert_close(logits.float(), wanted, rtol=1e-5, atol=0.01 if low else 1e-5)

    def test_never_name_a_folder_of_this_machine(self, folder: Path, tmp_path: Path) -> None:
        out, _, _ = exported(classifier("gpt2", folder), tmp_path, merged=True)
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "models:gpt2"
        for path in out.rglob("*"):
            assert path.is_dir() or str(folder).encode() not in path.read_bytes(), path.name

    def test_keep_the_dropout_that_the_checkpoint_is_trained_with(self, folder: Path, tmp_path: Path) -> None:
        out, _, _ = exported(classifier("bert", folder), tmp_path, merged=True)
        config = json.loads((out / "merged" / "config.json").read_text())
        assert config["hidden_dropout_prob"] == 0.1

    def test_of_adapters_alone_are_small(self, folder: Path, tmp_path: Path) -> None:
        out, _, trained = exported(classifier("bert", folder), tmp_path)
        arrays = load_file(out / "adapter_model.safetensors")
        head = sum(array.numel() for array in load_file(out / "head.safetensors").values())
        assert sum(array.numel() for array in arrays.values()) + head == trained.trainer.parameters.size

    def test_are_whole_or_not_there(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trained = load_trained(finished(classifier("bert", folder), tmp_path / "run"), device="cpu")
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            export(trained, tmp_path / "out", card="")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


class TestAGraph:
    # The exporter takes seconds, whatever the model's size.
    @pytest.mark.parametrize(
        "family", ["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "bert")]
    )
    def test_answers_as_the_run_for_any_number_of_rows_and_tokens(
        self, family: str, folder: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        job = classifier(family, folder)
        out, wanted, _ = exported(job, tmp_path, onnx=True)
        session = runtime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
        asked, found = rows(job), []
        for row in asked:
            if family in ("vit", "resnet"):
                side = json.loads((out / "head.json").read_text())["image"]["resized_to"]
                pixels = row.view(1, 1, 8, 8).expand(-1, 3, -1, -1)
                pixels = functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
                inputs = {"pixel_values": pixels.numpy()}
            else:
                ids = row[row != -1].long()[None].numpy()
                inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            found.append(session.run(None, inputs)[0])
        np.testing.assert_allclose(np.concatenate(found), wanted.numpy(), rtol=1e-4, atol=1e-4)

    def test_that_differs_from_torch_is_not_kept(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")

        def wrong(module: object, inputs: object, path: str, **options: object) -> None:
            """A graph of the right inputs and output, whose logit is the text's first token."""
            kinds = onnx.TensorProto
            both = [onnx.helper.make_tensor_value_info(f"{name}", kinds.INT64, ["n", "t"]) for name in NAMES]
            first = onnx.helper.make_tensor("first", kinds.INT64, [1], [0])
            nodes = [
                onnx.helper.make_node("Gather", ["input_ids", "first"], ["token"], axis=1),
                onnx.helper.make_node("Cast", ["token"], ["logits"], to=kinds.FLOAT),
            ]
            answer = [onnx.helper.make_tensor_value_info("logits", kinds.FLOAT, ["n", 1])]
            graph = onnx.helper.make_graph(nodes, "wrong", both, answer, [first])
            opset = onnx.helper.make_opsetid("", 18)
            onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)

        monkeypatch.setattr(torch.onnx, "export", wrong)
        trained = load_trained(finished(classifier("bert", folder), tmp_path / "run"), device="cpu")
        with pytest.raises(JobError, match="differ from torch's by"):
            export(trained, tmp_path / "out", card="", onnx=True)
        assert not (tmp_path / "out").exists()

    def test_of_a_family_that_has_none_is_refused_by_name(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("onnxscript")

        def fails(*arguments: object, **options: object) -> None:
            raise RuntimeError("an operator that nobody knows")

        monkeypatch.setattr(torch.onnx, "export", fails)
        trained = load_trained(finished(classifier("bert", folder), tmp_path / "run"), device="cpu")
        with pytest.raises(JobError, match=r"family 'bert' cannot be exported here \(RuntimeError\)"):
            export(trained, tmp_path / "out", card="", onnx=True)


class TestGreedyWriting:
    @pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_takes_the_likeliest_token_again_and_again(
        self, family: str, precision: str, folder: Path, tmp_path: Path
    ) -> None:
        job = writer(family, folder, f"task.precision={precision}")
        model = load_trained(finished(job, tmp_path / "run"), device="cpu").model
        assert isinstance(model, Writer)
        nn.init.normal_(model.base.get_input_embeddings().weight.data, std=0.5)
        ids = torch.tensor([[4, 7, 9], [5, 5, 6]])
        found = generate(model, ids, most=5, end=None)
        assert [len(row) for row in found] == [5, 5]
        for prompt, new in zip(ids, found, strict=True):
            asked, written = prompt[None], torch.zeros((1, 1), dtype=torch.long)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                for token in new:
                    if family == "t5":
                        logits = model.base(input_ids=asked, decoder_input_ids=written).logits
                        written = torch.cat([written, torch.tensor([[token]])], dim=1)
                    else:
                        logits = model.base(input_ids=asked).logits
                        asked = torch.cat([asked, torch.tensor([[token]])], dim=1)
                    last = logits[0, -1].float()
                    assert float(last.max() - last[token]) <= (0.05 if precision == "bfloat16" else 1e-5)

    def test_ends_where_the_model_says(self, folder: Path, tmp_path: Path) -> None:
        model = load_trained(finished(writer("gpt2", folder), tmp_path / "run"), device="cpu").model
        assert isinstance(model, Writer)
        ids = torch.tensor([[4, 7, 9]])
        ((first, *_),) = generate(model, ids, most=4, end=None)
        assert generate(model, ids, most=4, end=first) == [[]]
        assert places_left(model, 18) == 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "job.toml").unlink(), "no run folder"),
        (lambda run: (run / "summary.json").unlink(), "not finished"),
        (lambda run: (run / "model.safetensors").unlink(), "not finished"),
        (lambda run: (run / "summary.json").write_text("[]"), "not a JSON object"),
        (lambda run: _edit(run, job_hash="0" * 64), "not the job that was run"),
        (lambda run: _edit(run, model_hash="0" * 64), "not the model of summary.json"),
        (lambda run: _replace(run, lambda p, v: (p, np.full_like(v, np.nan))), "not finite"),
        (lambda run: _replace(run, lambda p, v: (Parameters({"w": v.shape}), v)), "of another job"),
    ],
    ids=["job", "summary", "model", "json", "hash", "model-hash", "nan", "arrays"],
)
def test_a_run_that_is_not_whole_is_refused(
    spoil: Callable[[Path], object], says: str, folder: Path, tmp_path: Path
) -> None:
    run = finished(classifier("bert", folder), tmp_path / "run")
    spoil(run)
    with pytest.raises(RunError, match=says):
        load_trained(run, device="cpu")


def _edit(run: Path, **changes: object) -> None:
    said = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**said, **changes}))


def _replace(run: Path, change: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    parameters, vector = change(*Parameters.load(run / "model.safetensors"))
    parameters.save(vector, run / "model.safetensors", {})
    _edit(run, model_hash=None)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("head", {"merged": True}, '--merged is for adapters, and method = "head" has none'),
        ("writer", {"onnx": True}, "--onnx is for classifiers, and causal-lm writes texts"),
        ("full", {}, "exists and is not an empty folder"),
        ("cut off", {}, "an export was cut off"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    kind: str, options: dict[str, bool], says: str, folder: Path, tmp_path: Path
) -> None:
    job = writer("gpt2", folder) if kind == "writer" else classifier("bert", folder)
    if kind == "head":
        job = classifier("bert", folder, "task.tuning={method='head'}")
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    if kind == "cut off":
        (tmp_path / "out.partial").mkdir()
    trained = load_trained(finished(job, tmp_path / "run"), device="cpu")
    with pytest.raises((JobError, RunError), match=says):
        export(trained, out, card="", **options)
    assert [path.name for path in out.iterdir()] == ["mine.txt"] if kind == "full" else not out.exists()


def test_another_checkpoint_than_the_jobs_is_refused(folder: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(checkpoint("bert", folder), here / "bert")
    run = finished(classifier("bert", here), tmp_path / "run")
    (here / "bert" / "config.json").write_text((here / "bert" / "config.json").read_text() + "\n")
    with pytest.raises(JobError, match=r"task\.checkpoint_hash: the weights in"):
        load_trained(run, device="cpu")


def test_the_exported_base_has_no_adapter_left_in_it(folder: Path, tmp_path: Path) -> None:
    out, _, trained = exported(classifier("bert", folder), tmp_path, merged=True)
    assert isinstance(trained.model, Pretrained)
    assert not [
        name for name in load_file(out / "merged" / "model.safetensors") if "lora" in name or "base_layer" in name
    ]

"""A pre-trained model is what its checkpoint says, the same at every site, and reads each record by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data import Records, class_count, encode, feature_names
from client.encodings import PADDING
from client.pretrained import FixedNorm, Pretrained
from client.tasks import initial_model, task_for
from client.tokens import answers, tagged, tokens, too_long
from client.training import Trainer
from privacy.errors import DataError, JobError
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from strategies.checkpoint import check_hashes, hashes, locate, portable
from strategies.job import Job, load_job, parse_job
from tests.client.checkpoints import FAMILIES, TEXTS, WORDS, checkpoint, job_of

pd = pytest.importorskip("pandas")
transformers = pytest.importorskip("transformers")

SENTENCES = ["the film is good", "a bad book", "it is not very good", "bad", "the very very bad film", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def model_of(job: Job) -> Pretrained:
    features, classes = len(feature_names(job.data)), class_count(job.data)
    model = initial_model(task_for(job), features=features, classes=classes, seed=job.seed)
    assert isinstance(model, Pretrained)
    return model


def rows_of(job: Job, texts: list[str] = SENTENCES) -> Tensor:
    (column,) = job.data.columns.values()
    if column.type == "image":
        return torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert column.tokenizer is not None
    assert column.length is not None
    return torch.from_numpy(tokens(texts, column.tokenizer, column.length))


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def job(self, family: str, folder: Path, *settings: str) -> Job:
        head = ("task.tuning={method='head'}",) if family == "resnet" else ()
        return job_of(folder / "rows.csv", family, *head, *settings, folder=folder)

    def test_reads_each_record_by_itself_whatever_is_beside_it(self, family: str, folder: Path) -> None:
        job = self.job(family, folder)
        model, rows = model_of(job), rows_of(job)
        nn.init.normal_(model.get_parameter("head.weight"))
        together = model(rows)
        alone = torch.cat([model(row[None]) for row in rows])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert together.shape == (6, 1)
        assert len(set(together.flatten().tolist())) > 3, "the rows differ, and so do their answers"

    def test_answers_the_same_in_training_and_in_evaluation(self, family: str, folder: Path) -> None:
        job = self.job(family, folder)
        model, rows = model_of(job), rows_of(job)
        nn.init.normal_(model.get_parameter("head.weight"))
        trained = model.train()(rows)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(rows), trained)

    def test_is_the_same_at_every_site_for_the_same_seed(self, family: str, folder: Path) -> None:
        job = self.job(family, folder)
        one, other = (Trainer(task_for(job), model_of(job), job.training) for _ in range(2))
        assert one.parameters.digest == other.parameters.digest
        assert one.read().tobytes() == other.read().tobytes()


@pytest.mark.parametrize("family", TEXTS)
class TestAdapters:
    def test_train_b_and_the_head_alone_and_hand_a_on(self, family: str, folder: Path) -> None:
        job = job_of(folder / "rows.csv", family, folder=folder)
        trainer = Trainer(task_for(job), model_of(job), job.training)
        trained = list(trainer.parameters.shapes)[: len(trainer.parameters.trained_sizes)]
        assert all(".lora_B." in name or name.startswith("head.") for name in trained)
        assert all(".lora_A." in name for name in trainer.parameters.received_only)
        assert len(trainer.parameters.received_only) == len(trained) - 2 > 0

    def test_the_rows_of_a_are_orthonormal_and_b_starts_at_zero(self, family: str, folder: Path) -> None:
        model = model_of(job_of(folder / "rows.csv", family, folder=folder))
        for name, array in model.named_parameters():
            if ".lora_A." in name:
                torch.testing.assert_close(array @ array.T, torch.eye(2), atol=1e-5, rtol=0)
            if ".lora_B." in name:
                assert not array.any()

    def test_of_the_last_layers_alone_leave_the_first(self, family: str, folder: Path) -> None:
        model = model_of(job_of(folder / "rows.csv", family, "task.tuning.layers=1", folder=folder))
        adapted = [name for name, _ in model.named_parameters() if ".lora_B." in name]
        assert adapted
        first = {"bert": ".layer.0.", "gpt2": ".h.0.", "llama": ".layers.0.", "t5": ".block.0."}[family]
        assert not [name for name in adapted if first in name]

    @pytest.mark.parametrize("method", ["bias", "norms", "head", "full"])
    def test_other_methods_train_what_they_say(self, family: str, folder: Path, method: str) -> None:
        settings = f"task.tuning={{method='{method}'}}"
        if family in ("t5", "llama") and method == "bias":  # They have none.
            with pytest.raises(JobError, match="no such arrays"):
                model_of(job_of(folder / "rows.csv", family, settings, folder=folder))
            return
        model = model_of(job_of(folder / "rows.csv", family, settings, folder=folder))
        trained = {name for name, array in model.named_parameters() if array.requires_grad}
        base = {name for name in trained if not name.startswith("head.")}
        assert {"head.weight", "head.bias"} <= trained
        assert not model.received_only
        match method:
            case "head":
                assert not base
            case "full":
                own = {name for name, _ in model.named_parameters() if "relative_attention_bias" not in name}
                assert base == own - {"head.weight", "head.bias"}
            case "bias":
                assert all(name.endswith("bias") for name in base)
            case "norms":
                assert all("norm" in name.lower() or "ln_" in name for name in base)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_model_of_some_depth_is_its_first_blocks(family: str, folder: Path) -> None:
    job = job_of(folder / "rows.csv", family, "task.tuning.depth=1", folder=folder)
    whole, cut = (model_of(one) for one in (job_of(folder / "rows.csv", family, folder=folder), job))
    names = {name for name, _ in cut.named_parameters()}
    assert len(names) < len(dict(whole.named_parameters()))
    nn.init.normal_(cut.get_parameter("head.weight"))
    assert cut(rows_of(job)).isfinite().all()
    for block in ("layer.1.", "h.1.", "layers.1.", "block.1."):
        assert not [name for name in names if f".{block}" in name and "block.0." not in name]


class TestWriting:
    """The losses of texts that are written are those of transformers, one record at a time."""

    def job(self, folder: Path, family: str, task: str, **data: Any) -> Job:
        job = job_of(folder / "rows.csv", family, folder=folder)
        raw = job.model_dump(exclude_none=True, mode="json")
        raw["data"] |= data
        raw["task"]["name"] = task
        return Job.model_validate(raw)

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_of_next_tokens_is_the_library_s_own(self, folder: Path, family: str) -> None:
        job = self.job(folder, family, "causal-lm", target="text", target_type="next")
        frame = pd.DataFrame({"text": SENTENCES[:5]})
        records = encode(frame, job.data, where="rows")
        task, model = task_for(job), model_of(job)
        losses = task.loss(model(torch.from_numpy(records.features)), torch.from_numpy(records.target))
        library = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family, folder))
        for text, loss in zip(SENTENCES[:5], losses, strict=True):
            ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
            wanted = library(input_ids=ids, labels=ids).loss if ids.shape[1] > 1 else torch.tensor(0.0)
            torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_of_an_answer_counts_its_tokens_alone(self, folder: Path, family: str) -> None:
        job = self.job(folder, family, "causal-lm", target="answer", target_type="text", target_length=4)
        asked, said = ["the film is", "a very very bad book", "it"], ["good", "bad", "not very good it is"]
        records = encode(pd.DataFrame({"text": asked, "answer": said}), job.data, where="rows")
        task, model = task_for(job), model_of(job)
        losses = task.loss(model(torch.from_numpy(records.features)), torch.from_numpy(records.target))
        library = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family, folder))
        for text, answer, loss in zip(asked, said, losses, strict=True):
            prompt = [WORDS.index(word) for word in text.split()][:8]
            own = [*[WORDS.index(word) for word in answer.split()], WORDS.index("</s>")][:4]
            labels = torch.tensor([[-100] * len(prompt) + own])
            wanted = library(input_ids=torch.tensor([prompt + own]), labels=labels).loss
            torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)

    def test_of_a_sequence_from_a_sequence_is_the_library_s_own(self, folder: Path) -> None:
        job = self.job(folder, "t5", "seq2seq", target="answer", target_type="text", target_length=4)
        asked, said = ["the film is", "a very very bad book", "it"], ["good", "bad", "not very good it is"]
        records = encode(pd.DataFrame({"text": asked, "answer": said}), job.data, where="rows")
        task, model = task_for(job), model_of(job)
        losses = task.loss(model(torch.from_numpy(records.features)), torch.from_numpy(records.target))
        library = transformers.T5ForConditionalGeneration.from_pretrained(checkpoint("t5", folder))
        for text, answer, loss in zip(asked, said, losses, strict=True):
            source = torch.tensor([[WORDS.index(word) for word in text.split()]])
            own = [*[WORDS.index(word) for word in answer.split()], WORDS.index("</s>")][:4]
            wanted = library.eval()(input_ids=source, labels=torch.tensor([own])).loss
            torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)

    def test_tags_stand_at_the_first_token_of_each_word(self, folder: Path) -> None:
        job = self.job(folder, "bert", "token-classification", target="tags", target_type="tags", classes=["o", "x"])
        frame = pd.DataFrame({"text": ["the good film", "bad"], "tags": ["o x o", "x"]})
        records = encode(frame, job.data, where="rows")
        assert records.target[0].tolist() == [PADDING, 0, 1, 0, PADDING, PADDING, PADDING, PADDING]
        assert records.target[1].tolist()[:3] == [PADDING, 1, PADDING]
        task, model = task_for(job), model_of(job)
        outputs = model(torch.from_numpy(records.features))
        assert outputs.shape == (2, 8, 2)
        assert task.loss(outputs, torch.from_numpy(records.target)).tolist() == pytest.approx([np.log(2)] * 2)

    @pytest.mark.parametrize(("tags", "says"), [("o", "one tag for each word"), ("o y o", "not among data.classes")])
    def test_tags_that_do_not_fit_are_refused_without_showing_one(self, folder: Path, tags: str, says: str) -> None:
        job = self.job(folder, "bert", "token-classification", target="tags", target_type="tags", classes=["o", "x"])
        with pytest.raises(DataError, match=says):
            encode(pd.DataFrame({"text": ["the good film"], "tags": [tags]}), job.data, where="rows")


class TestTokens:
    def test_are_those_of_the_library_cut_and_padded(self, folder: Path) -> None:
        path = checkpoint("bert", folder)
        found = tokens(SENTENCES, str(path), 5)
        library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        for text, row in zip(SENTENCES, found, strict=True):
            ids = library(text, truncation=True, max_length=5)["input_ids"]
            assert row[row != PADDING].tolist() == ids
        assert too_long(SENTENCES, str(path), 5) == 3

    def test_a_tokenizer_that_pads_by_itself_is_told_not_to(self, tmp_path: Path) -> None:
        path = checkpoint("bert", tmp_path)
        plain = tokens(SENTENCES, str(path), 5).tolist()
        padding: dict[str, Any] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
        padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
        settings = json.loads((path / "tokenizer.json").read_text()) | {"padding": padding}
        (tmp_path / "padding").mkdir()
        (tmp_path / "padding" / "tokenizer.json").write_text(json.dumps(settings))
        assert too_long(SENTENCES, str(tmp_path / "padding"), 5) == 3
        assert tokens(SENTENCES, str(tmp_path / "padding"), 5).tolist() == plain

    def test_an_answer_ends_with_the_end_token_where_there_is_room(self, folder: Path) -> None:
        found = answers(["good", "not very good"], str(checkpoint("gpt2", folder)), 3)
        assert found[0].tolist() == [WORDS.index("good"), WORDS.index("</s>"), PADDING]
        assert found[1].tolist() == [WORDS.index(word) for word in ("not", "very", "good")]

    def test_of_tagged_texts_and_of_plain_ones_are_the_same(self, folder: Path) -> None:
        path = str(checkpoint("bert", folder))
        rows, _ = tagged(["the good film"], [[0, 0, 0]], path, 8)
        assert rows.tolist() == tokens(["the good film"], path, 8).tolist()


def test_a_batch_norm_becomes_the_map_that_it_is_in_evaluation() -> None:
    norm = nn.BatchNorm2d(3).eval()
    for array in (norm.weight, norm.bias, norm.running_mean):
        assert array is not None
        nn.init.normal_(array)
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_var, 0.5, 2)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(FixedNorm(norm)(images), norm(images))


class TestCheckpoints:
    def test_another_model_of_the_same_shape_is_refused(self, folder: Path, tmp_path: Path) -> None:
        job = job_of(folder / "rows.csv", "bert", folder=folder)
        other = checkpoint("bert", tmp_path)
        model = transformers.AutoModel.from_pretrained(other)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        model.save_pretrained(other)
        raw = job.model_dump(exclude_none=True, mode="json")
        raw["task"]["checkpoint"] = raw["data"]["columns"]["text"]["tokenizer"] = str(other)
        with pytest.raises(JobError, match=r"task.checkpoint_hash: the weights in .* install the same checkpoint"):
            model_of(Job.model_validate(raw))

    def test_another_tokenizer_is_refused_by_name(self, folder: Path, tmp_path: Path) -> None:
        path = checkpoint("bert", tmp_path)
        wanted = hashes(path)
        text = (path / "tokenizer.json").read_text()
        (path / "tokenizer.json").write_text(text.replace('"good"', '"GOOD"'))
        with pytest.raises(JobError, match=r"task\.tokenizer_hash: the tokenizer"):
            check_hashes(path, wanted)

    def test_pickled_weights_alone_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(JobError, match=r"only pickled weights \(pytorch_model.bin\), which could run anything"):
            hashes(tmp_path)

    def test_code_of_its_own_is_refused(self, folder: Path, tmp_path: Path) -> None:
        path = checkpoint("bert", tmp_path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Own"}}))
        with pytest.raises(JobError, match="brings code of its own"):
            hashes(path)

    @pytest.mark.parametrize(
        ("reference", "says"),
        [
            ("package:no_such_package/model", "no package 'no_such_package' is installed"),
            ("package:transformers/../../secret", "leads out of its folder"),
            ("models:bert", "set FEDCHORUS_MODELS=FOLDER"),
            ("./absent", "no folder"),
            ("bert", "names no checkpoint; write package:NAME"),
            ("nobody/nothing-of-this-name", "not in the cache of this machine, which is offline"),
        ],
    )
    def test_what_is_not_there_is_refused_with_the_way_out(
        self, reference: str, says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.delenv("FEDCHORUS_MODELS", raising=False)
        with pytest.raises(JobError, match=says):
            locate(reference)

    def test_a_folder_travels_by_its_name_and_is_found_among_a_site_s_models(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = checkpoint("bert", folder)
        monkeypatch.setenv("FEDCHORUS_MODELS", str(folder))
        assert portable(str(path)) == "models:bert"
        assert locate("models:bert") == path.resolve()
        job = job_of(folder / "rows.csv", "bert", folder=folder).portable
        assert job.task.checkpoint == "models:bert"
        assert job.data.columns["text"].tokenizer == "models:bert"
        model_of(job)


def test_a_job_from_a_server_says_which_checkpoint_it_means_by_hash(folder: Path) -> None:
    raw = job_of(folder / "rows.csv", "bert", folder=folder).portable.model_dump(exclude_none=True, mode="json")
    assert parse_job(tomli_w.dumps(raw), where="the job").task.checkpoint == "models:bert"
    del raw["task"]["tokenizer_hash"]
    with pytest.raises(JobError, match="without its hashes"):
        parse_job(tomli_w.dumps(raw), where="the job")


@pytest.mark.parametrize("checkpoint", ["/etc", "./models/bert", "~/bert"])
def test_a_job_from_a_server_names_no_folder_of_a_site(folder: Path, checkpoint: str) -> None:
    raw = job_of(folder / "rows.csv", "bert", folder=folder).model_dump(exclude_none=True, mode="json")
    raw["task"]["checkpoint"] = raw["data"]["columns"]["text"]["tokenizer"] = checkpoint
    with pytest.raises(JobError, match=r"task\.checkpoint is a folder of another machine"):
        parse_job(tomli_w.dumps(raw), where="the job")


@pytest.mark.parametrize(
    ("family", "setting", "says"),
    [
        ("bert", "task.tuning.targets=['quary']", "no linear layer 'quary'; it has .*query"),
        ("bert", "task.tuning.rank=17", "rank: 17 is more than .* has \\(16\\)"),
        ("bert", "task.tuning.layers=3", "layers: the model has 2 blocks, not 3"),
        ("bert", "task.tuning.depth=3", "depth: the model has 2 blocks, not 3"),
        ("resnet", "task.tuning={method='head', depth=1}", "depth is for models of blocks"),
        ("bert", "data.columns.text.length=30", "texts of 30 tokens are longer than the 20"),
        ("bert", "task.name=causal-lm", "needs data.target_type"),
        ("resnet", "task.tuning.targets=['convolution']", "no linear layer 'convolution'"),
        ("vit", "data.columns.pixels.shape=[8,8,3]", ""),
    ],
)
def test_what_a_model_does_not_have_is_refused_by_name(family: str, setting: str, says: str, folder: Path) -> None:
    if not says:
        model_of(job_of(folder / "rows.csv", family, setting, folder=folder))
        return
    with pytest.raises(JobError, match=says):
        model_of(job_of(folder / "rows.csv", family, setting, folder=folder))


def test_a_model_that_reads_images_is_refused_for_texts(folder: Path) -> None:
    with pytest.raises(JobError, match="reads images, and the data have texts"):
        model_of(job_of(folder / "rows.csv", "bert", f"task.checkpoint={checkpoint('vit', folder)}", folder=folder))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("task.model=mlp", 'model = "pretrained" and checkpoint'),
        ("task.tuning.method=dora", "method"),
        ("data.columns.text.join=['title', 'label']", "join names 'label', which is something else"),
        ("data.columns.text.tokenizer=models:other", "tokenizer is that of task.checkpoint"),
        ("task.tuning={method='head', rank=3}", 'rank is for method = "lora"'),
        ("task.tuning={factors='both', refactor_every=2}", 'refactor_every is for factors = "b"'),
        ("task.tuning={rank=2, ranks={a=2}}", "ranks are below the rank of 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(setting: str, says: str, folder: Path) -> None:
    with pytest.raises(JobError, match=says):
        job_of(folder / "rows.csv", "bert", setting, folder=folder)


def test_shorter_texts_come_first_in_training_and_none_is_lost(folder: Path) -> None:
    job = job_of(folder / "rows.csv", "bert", folder=folder)
    trainer = Trainer(task_for(job), model_of(job), job.training)
    rows = rows_of(job).numpy()
    ordered = trainer.by_length(Records(rows, np.arange(6)))
    lengths = (ordered.features != PADDING).sum(axis=1)
    assert (np.diff(lengths) >= 0).all()
    assert sorted(ordered.target.tolist()) == list(range(6))
    for place, row in zip(ordered.target, ordered.features, strict=True):
        assert row.tolist() == rows[place].tolist()


def test_load_job_reads_a_checkpoint_relative_to_the_job_file(folder: Path, tmp_path: Path) -> None:
    checkpoint("bert", tmp_path)
    job_of(folder / "rows.csv", "bert", folder=folder)
    text = (folder / "job.toml").read_text().replace(str(folder / "bert"), "./bert")
    (tmp_path / "job.toml").write_text(text)
    assert load_job(tmp_path / "job.toml").task.checkpoint == str((tmp_path / "bert").resolve())


class TestSensitivity:
    """What a record adds to a batch is its own contribution, whoever is beside it."""

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("method", ["lora", "full"])
    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_a_record_less_moves_the_sum_by_what_it_added_and_by_nothing_else(
        self, folder: Path, family: str, method: str, precision: str
    ) -> None:
        private = "privacy.record={noise_multiplier=1.0, delta=1e-3, clip_norm=1.0}"
        settings = (private, f"task.tuning={{method='{method}'}}", f"task.precision={precision}")
        long = "data.columns.text.length=20"
        job = job_of(folder / "rows.csv", family, *settings, long, "training.physical_batch=4", folder=folder)
        trainer = Trainer(task_for(job), model_of(job), job.training)
        words = np.random.default_rng(7)
        texts = sorted((" ".join(words.choice(WORDS[4:], n)) for n in words.integers(1, 20, 30)), key=len)
        rows, targets = rows_of(job, texts), torch.arange(30) % 2
        start = trainer._trained + 0.1 * torch.randn(trainer._trained.shape, generator=torch.Generator().manual_seed(1))
        mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0)

        def total(chosen: list[int]) -> NDArray[np.int64]:
            return trainer._clipped.clipped_sum(start, rows, targets, torch.tensor(chosen), mechanism).copy()

        everyone = list(range(30))
        for gone in (0, 11, 29):
            moved = total(everyone) - total([one for one in everyone if one != gone])
            own = total([gone])
            assert 0.01 < np.linalg.norm(own) / STEPS_PER_CLIP <= 1
            # Book-keeping rounds a sum once: a grid step a coordinate.
            allowed = np.sqrt(len(own)) * (method == "full") + 1e-4 * STEPS_PER_CLIP * (method == "full")
            assert np.linalg.norm(moved - own) <= allowed + 2


class TestMalformed:
    """A checkpoint that is not what it should be is refused in one line, whatever is wrong with it."""

    def refused(self, path: Path, says: str) -> None:
        with pytest.raises(JobError, match=says) as error:
            model_of(job_of(path.parent / "rows.csv", "bert", folder=path.parent))
        assert "\n" not in str(error.value)

    def test_an_index_that_leads_elsewhere(self, tmp_path: Path) -> None:
        path = checkpoint("bert", tmp_path)
        for named in ("w.bin", "../outside.safetensors", "absent.safetensors"):
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
            self.refused(path, "names weights that are no .safetensors file of that folder")
        (path / "model.safetensors.index.json").write_text("[]")
        self.refused(path, "not an index of weights")

    def test_adapters_in_its_folder(self, tmp_path: Path) -> None:
        path = checkpoint("bert", tmp_path)
        (path / "adapter_config.json").write_text("{}")
        self.refused(path, "holds adapters")

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.json", {"model_type": "no-such-family"}),
            ("config.json", {"hidden_size": "abc"}),
            ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
            ("model.safetensors", None),
            ("tokenizer_config.json", []),
        ],
    )
    def test_files_that_are_none(self, tmp_path: Path, file: str, content: object) -> None:
        path = checkpoint("bert", tmp_path)
        if content is None:
            (path / file).write_bytes(b"garbage")
        elif isinstance(content, dict):
            (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | content))
        else:
            (path / file).write_text(json.dumps(content))
            with pytest.raises(JobError, match="is not valid"):
                answers(["good"], str(path), 3)
            return
        self.refused(path, "cannot be loaded for text-classification")

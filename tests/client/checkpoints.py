"""Tiny checkpoints of each family with random weights, as `save_pretrained` writes them; and jobs that read them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from strategies.job import Job, load_job

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS += ["good", "bad", "very", "film", "book", "is", "the", "a", "not", "it", "</s>"]
FAMILIES = ("bert", "gpt2", "llama", "t5", "vit", "resnet")
TEXTS = ("bert", "gpt2", "llama", "t5")


def checkpoint(family: str, folder: Path) -> Path:
    """A folder with the family's tiny model, made once; of a family of texts with a tokenizer of `WORDS`."""
    path = folder / family
    if path.exists():
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = _model(family)
        for name, buffer in model.named_buffers():  # As if it had been trained.
            if "running_mean" in name:
                buffer.normal_()
            if "running_var" in name:
                buffer.uniform_(0.5, 2.0)
    model.save_pretrained(path)
    if family in TEXTS:
        _tokenizer(bert=family == "bert").save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


def _model(family: str) -> Any:
    import transformers

    t: Any = transformers

    common: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    vocab = len(WORDS)
    match family:
        case "bert":
            return t.BertModel(t.BertConfig(vocab_size=vocab, max_position_embeddings=20, **common))
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=vocab, n_positions=20, n_embd=16, n_layer=2, n_head=2))
        case "llama":
            return t.LlamaForCausalLM(
                t.LlamaConfig(vocab_size=vocab, max_position_embeddings=20, num_key_value_heads=1, **common)
            )
        case "t5":
            config = t.T5Config(
                vocab_size=vocab, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
            return t.T5ForConditionalGeneration(config)
        case "vit":
            return t.ViTModel(t.ViTConfig(image_size=12, patch_size=4, **common))
        case "resnet":
            config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
            return t.ResNetModel(config)
    raise AssertionError(family)


@functools.cache
def _tokenizer(*, bert: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bert:
        ends = [("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def job_of(path: Path, family: str, *settings: str, folder: Path) -> Job:
    """A job that fine-tunes the tiny `family` on the file `path`: texts, or 8 x 8 images, of two classes."""
    column, task = "text = { type = 'tokens', length = 8 }", "text-classification"
    if family not in TEXTS:
        column, task = "pixels = { type = 'image', shape = [8, 8] }", "image-classification"
    file = folder / "job.toml"
    file.write_text(
        f"""
        name = "tiny"
        seed = 5
        [data]
        path = "{path}"
        target = "label"
        [data.columns]
        {column}
        [task]
        name = "{task}"
        model = "pretrained"
        checkpoint = "{checkpoint(family, folder)}"
        [task.tuning]
        rank = 2
        [training]
        rounds = 2
        local_steps = 2
        batch_size = 4
        learning_rate = 0.1
        [simulation.partition]
        clients = 3
        """
    )
    return load_job(file, settings)

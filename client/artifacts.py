"""A fine-tuned model as files that transformers and PEFT read by themselves.

adapter_model.safetensors, adapter_config.json   of method "lora": the adapters, in PEFT's layout
model.safetensors, config.json                   of "full", "norms" and "bias": the whole base, as `save_pretrained`
head.safetensors, head.json                      of a classifier: its last layer, and how it is computed
tokenizer.json, ...                              the checkpoint's own, of a model of texts
README.md                                        the run's model card with its privacy statement, and how to load this
merged/                                          with `merged`: the base with the adapters multiplied out, and a copy
                                                 of the rest. Beside an adapter_config.json transformers would add the
                                                 adapters once more
model.onnx                                       with `onnx`: classifiers as one graph (`client.onnx_graph`)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from client.adapters import alpha_of
from client.pretrained import POOLED, Classifier, FixedNorm, Pretrained, quiet
from client.trained import Trained
from privacy.errors import JobError, RunError
from strategies.checkpoint import locate, portable
from strategies.job import Job
from strategies.job_task import Tuning
from strategies.statistics import class_names

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
POOLING = {
    "mean": "h is the mean of last_hidden_state over the text's tokens (attention_mask = 1)",
    "last": "h is last_hidden_state at the text's last token (attention_mask = 1)",
    "each": "h is last_hidden_state at each token; the answer for a word is that of its first token",
    "first": "h is last_hidden_state at the first place",
    "pooler": "h is pooler_output, flattened",
}
NORMED = "u = (h - mean(h)) / sqrt(var(h) + 1e-5) * scale / sqrt(width), both over the width, the variance biased"


def export(trained: Trained, folder: Path, *, card: str, merged: bool = False, onnx: bool = False) -> list[str]:
    """Write the model of a finished run into a new `folder`; returns the files' names, sorted.

    The run's model is used up: its adapters are multiplied out in place where a whole model is asked for. `card` is
    Markdown, to which README.md adds how to load the files. Raises `JobError` for a model that is not pre-trained or
    has no such form, `RunError` for a folder that holds something; then nothing is left behind.
    """
    job, model, tuning = trained.job, trained.model, trained.job.task.tuning or Tuning()
    if not isinstance(model, Pretrained):
        raise JobError(
            f'task.model = "{job.task.model}" is no pre-trained model: model.safetensors of the run is all of it, and '
            "job.toml says how it is built; `fedchorus predict` uses it"
        )
    if merged and tuning.method != "lora":
        raise JobError(f'--merged is for adapters, and method = "{tuning.method}" has none: leave it out')
    if onnx and not isinstance(model, Classifier):
        raise JobError(f"--onnx is for classifiers, and {job.task.name} writes texts: export it without")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists and is not an empty folder; choose another --out")
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise RunError(f"{partial}: is there: an export was cut off, or runs now; remove it or wait") from None
    try:
        _write(model, job, tuning, partial, card, merged=merged, onnx=onnx)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def head_record(model: Classifier, job: Job) -> dict[str, Any]:
    """What head.json says: enough to compute the classes from the base's outputs and head.safetensors alone."""
    (column,) = job.data.columns.values()
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    pooling = pooling_of(model, job)
    scores = "p(class 1) = sigmoid(logit)" if head.out_features == 1 else "p = softmax(logits)"
    record: dict[str, Any] = {
        "v": 1,
        "task": job.task.name,
        "base_model": portable(job.task.checkpoint or ""),
        "base_hash": job.task.checkpoint_hash,
        "base_class": type(model.base).__name__,
        "base_layers": (job.task.tuning or Tuning()).depth or "all",
        "precision": job.task.precision or "float32",
        "classes": class_names(job.data),
        "pooling": pooling,
        "width": model.width,
        "scale": (job.task.tuning or Tuning()).scale,
        "formula": f"{POOLING[pooling]}; {NORMED}; logits = weight u + bias; {scores}",
    }
    if column.type == "image":
        side, _, colours = [*(column.shape or []), 1][:3]
        size = getattr(model.base.config, "image_size", None) or side
        record["image"] = {"side": side, "channels": colours, "resized_to": size, "pixels": "value / 127.5 - 1"}
        if colours == 1:
            record["image"]["grey"] = "repeated to 3 channels"
    else:
        record["max_length"] = column.length
    return record


def pooling_of(model: Classifier, job: Job) -> str:
    """By which of `POOLING` a classifier makes one vector of a record."""
    if model.kind == "image":
        return "pooler" if model.base.config.model_type in POOLED else "first"
    if job.task.name == "token-classification":
        return "each"
    return "last" if model.kind == "causal" else "mean"


def _write(model: Pretrained, job: Job, tuning: Tuning, folder: Path, card: str, *, merged: bool, onnx: bool) -> None:
    _beside(model, job, folder)
    (folder / "README.md").write_text(f"{card.rstrip()}\n\n{_usage(model, job, tuning)}", encoding="utf-8")
    if tuning.method == "lora":
        _write_adapters(model, job, tuning, folder)
    if tuning.method in ("full", "norms", "bias") or merged or onnx:
        _make_plain(model, job)
    if tuning.method in ("full", "norms", "bias"):
        _save_base(model, folder)
    if merged:
        whole = folder / "merged"
        whole.mkdir()
        _beside(model, job, whole)
        _save_base(model, whole)
    if onnx:
        from client.onnx_graph import write_graph

        assert isinstance(model, Classifier)
        (column,) = job.data.columns.values()
        path, pooling = folder / "model.onnx", pooling_of(model, job)
        write_graph(model, path, column=column, pooling=pooling, scale=tuning.scale)


def _beside(model: Pretrained, job: Job, folder: Path) -> None:
    """The head, and the tokenizer that its texts are read by."""
    if isinstance(model, Classifier):
        arrays = {name: array.detach().float().cpu().contiguous() for name, array in model.head.named_parameters()}
        save_file(arrays, folder / "head.safetensors", {"format": "pt"})
        said = json.dumps(head_record(model, job), indent=2, ensure_ascii=False)
        (folder / "head.json").write_text(f"{said}\n", encoding="utf-8")
    (column,) = job.data.columns.values()
    if column.tokenizer is not None:
        place = locate(column.tokenizer, key="data.columns.tokenizer")
        for name in TOKENIZER:
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)


def _write_adapters(model: Pretrained, job: Job, tuning: Tuning, folder: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model_state_dict

    own = model.base.peft_config["default"]
    name, _, revision = portable(job.task.checkpoint or "").partition("@")
    alpha = alpha_of(tuning)
    config = LoraConfig(
        task_type={"causal-lm": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}.get(job.task.name),
        base_model_name_or_path=name,
        revision=revision or None,
        r=tuning.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        target_modules=sorted(_adapted(model)),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=own.fan_in_fan_out,
        inference_mode=True,
    )
    config.auto_mapping = {
        "base_model_class": type(model.base).__name__,
        "parent_library": type(model.base).__module__,
    }
    config.save_pretrained(str(folder))
    arrays = get_peft_model_state_dict(model.base, adapter_name="default", save_embedding_layers=False)
    named = {f"base_model.model.{key}": array.float().cpu().contiguous() for key, array in arrays.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


def _adapted(model: Pretrained) -> list[str]:
    return [name for name, module in model.base.named_modules() if hasattr(module, "lora_A")]


def _make_plain(model: Pretrained, job: Job) -> None:
    """Turn the base, in place, into what transformers made of the checkpoint, with what was learnt in its own arrays.

    In float32 whatever the base was: W + s B A is exact there, and would lose most of B A in bfloat16.
    """
    import transformers

    base = model.base.float()
    for name in _adapted(model):
        layer = base.get_submodule(name)
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    for parent in list(base.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, FixedNorm):
                setattr(parent, name, _batch_norm(module))
    # The run's own has no dropout and no cache; who trains or writes on takes the checkpoint's.
    folder, depth = locate(job.task.checkpoint or ""), (job.task.tuning or Tuning()).depth
    base.config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if depth is not None:
        base.config.num_hidden_layers = depth


def _batch_norm(fixed: FixedNorm) -> nn.BatchNorm2d:
    """A BatchNorm whose statistics and weights make the same map."""
    norm = nn.BatchNorm2d(len(fixed.scale)).to(fixed.scale.device)
    with torch.no_grad():
        norm.weight.copy_(fixed.scale)
        norm.bias.copy_(fixed.shift)
    assert norm.running_var is not None
    norm.running_var.fill_(1.0 - norm.eps)
    return norm.eval()


def _save_base(model: Pretrained, folder: Path) -> None:
    with quiet():
        model.base.save_pretrained(folder)


def _usage(model: Pretrained, job: Job, tuning: Tuning) -> str:
    """The section of the card that says how to load the files."""
    kind, whole = type(model.base).__name__, tuning.method in ("full", "norms", "bias")
    low = job.task.precision == "bfloat16" and not whole  # A whole model is written in float32.
    texts, adapters = model.kind != "image", tuning.method == "lora"
    options = ", dtype=torch.bfloat16" if low else ""
    if tuning.depth is not None and not whole:
        options += f", num_hidden_layers={tuning.depth}"
    code = [
        "import torch" if low else "",
        "from peft import PeftModel" if adapters else "",
        f"from transformers import {'AutoTokenizer, ' if texts else ''}{kind}",
        f'model = {kind}.from_pretrained("{"FOLDER" if whole else "BASE"}"{options})',
        'model = PeftModel.from_pretrained(model, "FOLDER")' if adapters else "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")' if texts else "",
        "model.eval()",
    ]
    base = f"checkpoint `{portable(job.task.checkpoint or '')}` (SHA-256 `{job.task.checkpoint_hash}`)"
    text = ["## How to load it\n", "```python", *filter(None, code), "```\n"]
    text.append(f"`FOLDER` is this folder, {'made from the' if whole else '`BASE` the'} {base}.")
    if low:
        text.append("It was trained in bfloat16: run it within `torch.autocast(device, torch.bfloat16)`.")
    if isinstance(model, Classifier):
        text.append(f"A class is computed so, as head.json says too: {head_record(model, job)['formula']}.")
    return "\n".join(text) + "\n"

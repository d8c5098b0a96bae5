"""What of a pre-trained model is trained: adapters by PEFT, or some of its own arrays; everything else rests.

B-only adapters: Sun et al. 2024, FFA-LoRA (arXiv:2403.12313). Sum(B_i) A is exactly the sum of the B_i A, which
averages of both factors are not; and A's orthonormal rows bound the gradient of B (Lee et al. 2025, FedSVD,
arXiv:2505.12805).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from privacy.errors import JobError
from strategies.job_task import Tuning

NORMS = re.compile(r"norm|ln_\d|ln_f|\.ln\b", re.IGNORECASE)
ATTENTION = (["query", "value"], ["q_proj", "v_proj"], ["q", "v"], ["c_attn"], ["query_key_value"], ["qkv_proj"])
"""What is adapted where the job does not say: what queries and values are made by, as a family calls it."""
BLOCK = re.compile(r"\.(?:layer|layers|h|block|blocks|stages)\.(\d+)\.")


def tune(base: Any, tuning: Tuning, *, key: str) -> list[str]:
    """Let the gradients of what `tuning` names flow in `base`, in place, and of nothing else.

    Returns the names of arrays that are fixed and yet part of what is learnt: the factors A where only B is trained.
    Raises `JobError` where the model has nothing of that kind.
    """
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if tuning.method == "head":
        return []
    if tuning.method == "lora":
        return _lora(base, tuning, key)
    first = _first_block(base, tuning, key)
    chosen = 0
    for name, parameter in base.named_parameters():
        place = BLOCK.search(f".{name}")
        within = int(place.group(1)) >= first if place else tuning.layers is None
        wanted = {"bias": name.endswith("bias"), "norms": bool(NORMS.search(name)), "full": True}[tuning.method]
        # A table of T5's that belongs to no record: its gradient is of all of them.
        wanted = wanted and "relative_attention_bias" not in name
        parameter.requires_grad_(within and wanted)
        chosen += within and wanted
    if not chosen:
        raise JobError(f'{key}.method = "{tuning.method}": the model has no such arrays; take another method')
    return []


def _lora(base: Any, tuning: Tuning, key: str) -> list[str]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise JobError(f"{key}: adapters need the extra: pip install fedchorus[llm]") from None
    family = base.config.model_type
    linear = _linear_layers(base)
    own = {name.rsplit(".", 1)[-1] for name in linear}
    targets = tuning.targets or next((names for names in ATTENTION if own.issuperset(names)), None)
    if targets is None:
        raise JobError(f"{key}.targets: give the layers to adapt in a {family!r}, for example {_some(linear)}")
    wanted = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown:
        raise JobError(f"{key}.targets: the model has no linear layer {unknown[0]!r}; it has {_some(linear)}")
    first = _first_block(base, tuning, key)
    wanted = [name for name in wanted if first == 0 or _block(name) >= first]
    for name in wanted:
        module = base.get_submodule(name)
        if tuning.rank > min(_sizes(module)):
            raise JobError(f"{key}.rank: {tuning.rank} is more than {name} has ({min(_sizes(module))}); lower it")
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=1,  # Its type is a whole number; the scaling is set below.
        target_modules=wanted,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(type(base.get_submodule(name)).__name__ == "Conv1D" for name in wanted),
    )
    inject_adapter_in_model(config, base)
    fixed = []
    for name in wanted:
        layer = base.get_submodule(name)
        layer.scaling["default"] = alpha_of(tuning) / tuning.rank
        first_factor, second_factor = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # In float32 whatever the base: what is learnt, and what it multiplies, are exact at every site.
        first_factor.data = nn.init.orthogonal_(torch.empty(first_factor.shape))
        second_factor.data = torch.zeros(second_factor.shape)
        if tuning.factors == "b":
            first_factor.requires_grad_(False)
            fixed.append(f"{name}.lora_A.default.weight")
    return fixed


def alpha_of(tuning: Tuning) -> float:
    """The numerator of the scaling of B A: twice the rank where the job does not say."""
    return tuning.alpha if tuning.alpha is not None else 2.0 * tuning.rank


def _linear_layers(base: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _sizes(module: Any) -> tuple[int, int]:
    return tuple(module.weight.shape)


def _block(name: str) -> int:
    found = BLOCK.search(f".{name}.")
    return int(found.group(1)) if found else -1


def _first_block(base: Any, tuning: Tuning, key: str) -> int:
    """The first block that is tuned, of those that the names of the model's arrays count."""
    if tuning.layers is None:
        return 0
    count = 1 + max((_block(name) for name, _ in base.named_parameters()), default=-1)
    if tuning.layers > count:
        raise JobError(f"{key}.layers: the model has {count} blocks, not {tuning.layers}")
    return count - tuning.layers


def _some(names: list[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})[:8])

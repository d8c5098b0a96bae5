"""Tiny models of the families that are fine-tuned, with random weights: (B, T) token numbers or pixels -> logits.

Token numbers are padded with -1, as a task's rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES, ROWS, LENGTH, WORDS = 3, 7, 10, 60
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Texts(nn.Module):
    """A text model with a head on the mean over its tokens, or one that writes: then a logit of each word for each."""

    def __init__(self, base: Any, width: int, *, writes: bool = False, seq2seq: bool = False) -> None:
        super().__init__()
        self.base, self.seq2seq = base, seq2seq
        self.head = nn.Identity() if writes else nn.Linear(width, CLASSES)
        self.writes = writes

    def forward(self, rows: Tensor) -> Tensor:
        ids, there = rows.clamp(min=0), rows >= 0
        more = {"decoder_input_ids": ids} if self.seq2seq else {}
        out = self.base(input_ids=ids, attention_mask=there.long(), **more)
        if self.writes:
            return out.logits * there[..., None]  # type: ignore[no-any-return]
        weights = there[..., None].float()
        result: Tensor = self.head((out.last_hidden_state.float() * weights).sum(1) / weights.sum(1))
        return result


class Images(nn.Module):
    def __init__(self, base: Any, width: int) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(width, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.base(rows).last_hidden_state
        result: Tensor = self.head(hidden.flatten(2).mean(-1) if hidden.ndim == 4 else hidden[:, 0])
        return result


def bert(attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **NO_DROPOUT
    )
    config._attn_implementation = attention
    return Texts(BertModel(config, add_pooling_layer=False), 16)


def gpt2(attention: str = "sdpa", *, writes: bool = False) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=24,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config._attn_implementation = attention
    return Texts(GPT2LMHeadModel(config) if writes else GPT2Model(config), 16, writes=writes)


def llama(attention: str = "sdpa", *, writes: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    config._attn_implementation = attention
    return Texts(LlamaForCausalLM(config) if writes else LlamaModel(config), 16, writes=writes)


def t5(attention: str = "sdpa", *, writes: bool = False) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration, T5Model

    config = T5Config(
        vocab_size=WORDS,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    config._attn_implementation = attention
    return Texts((T5ForConditionalGeneration if writes else T5Model)(config), 16, writes=writes, seq2seq=True)


def vit(attention: str = "sdpa") -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        qkv_bias=True,
    )
    config._attn_implementation = attention
    return Images(ViTModel(config, add_pooling_layer=False), 16)


def resnet(attention: str = "sdpa") -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = Images(ResNetModel(config), 12)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.GroupNorm(2, module.num_features))
    return model


def tabular(attention: str = "sdpa") -> nn.Module:
    from client.networks import FtTransformer

    return FtTransformer(6, 8, 2, CLASSES, heads=2)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "tabular": tabular,
}
LORA = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "fc1"],
}


def made(build: Callable[..., nn.Module], *arguments: Any, seed: int = 0, **more: Any) -> nn.Module:
    """The model in the mode that trains, its parameters moved a little so that none has a gradient of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(*arguments, **more)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def with_lora(model: Any, family: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=LORA[family], fan_in_fan_out=family == "gpt2")
        model.base = get_peft_model(model.base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # It starts at zero, where A has no gradient.
                parameter.data.normal_(std=0.1)
    for parameter in model.head.parameters():
        parameter.requires_grad_(True)
    return model  # type: ignore[no-any-return]


def tune(model: nn.Module, how: str, family: str) -> nn.Module:
    """Let what `how` names require a gradient: "lora", "bias and norm", "head" or "full"."""
    if how == "lora":
        return with_lora(model, family)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m._parameters.values()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            # A bias between positions that all rows share has no rows to tell apart.
            (how == "full" and "relative_attention_bias" not in name)
            or (how == "bias and norm" and (name.endswith("bias") or id(parameter) in norms) and "relative" not in name)
            or (how == "head" and name.startswith(("head", "last")))
        )
    return model


def rows_for(family: str, count: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    if family in ("vit", "resnet"):
        return torch.randn(count, 3, 8, 8, generator=generator), targets
    if family == "tabular":
        return torch.randn(count, 6, generator=generator), targets
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (count,), generator=generator)
    return ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -1), targets


def one_loss_a_row(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy; of a model that writes, the mean over the row's own tokens of how well each predicts itself."""
    if outputs.ndim == 3:
        outputs = outputs.float().logsumexp(-1) - outputs[..., 0] * (1 + targets[:, None])
        return outputs.mean(1)
    return functional.cross_entropy(outputs.float(), targets, reduction="none")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def by_hand(model: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each row by autograd, one row at a time: (B, P)."""
    rows = []
    for i in range(len(features)):
        loss = one_loss_a_row(model(features[i : i + 1]), targets[i : i + 1]).sum()
        found: Any = torch.autograd.grad(loss, trained(model), allow_unused=True)
        rows.append(flat([torch.zeros_like(p) if g is None else g for p, g in zip(trained(model), found, strict=True)]))
    return torch.stack(rows)

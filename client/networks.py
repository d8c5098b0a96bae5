"""The networks that tasks choose from. None mixes the records of a batch: LayerNorm and GroupNorm, no BatchNorm.

Every layer works under vmap, which is how per-record gradients are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from privacy.errors import JobError
from strategies.job_task import TaskChoice

HEADS = 4


def tabular(choice: TaskChoice, features: int, outputs: int) -> nn.Module:
    """The job's `task.model` for rows of `features` numbers: (B, features) -> (B, outputs). Raises `JobError`."""
    if choice.model == "resnet":
        return TabularResNet(features, *one_width(choice), outputs)
    if choice.model == "ft-transformer":
        return FtTransformer(features, *one_width(choice), outputs, heads=choice.heads or HEADS)
    return perceptron(features, choice.hidden if choice.model == "mlp" else [], outputs)


def perceptron(features: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them; without hidden ones a linear model that starts at zero."""
    layers: list[nn.Module] = []
    width = features
    for wide in hidden:
        layers += [nn.Linear(width, wide), nn.ReLU()]
        width = wide
    last = nn.Linear(width, outputs)
    if not layers:
        # A linear model is convex: it starts at zero, where no noise is spent on unlearning a random start.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class TabularResNet(nn.Module):
    """A ResNet for rows (Gorishniy et al. 2021, arXiv:2106.11959, sec. 3.2), with LayerNorm in place of BatchNorm."""

    def __init__(self, features: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        hidden: Tensor = self.first(rows)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.last(hidden)
        return result


class FtTransformer(nn.Module):
    """A transformer over the features of a record (arXiv:2106.11959, sec. 3.3): each is a token, and one more answers.

    Attention is between the features of a record, never between records.
    """

    def __init__(self, features: int, width: int, blocks: int, outputs: int, *, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise JobError(f"task.hidden: a width of {width} does not divide into {heads} heads (task.heads)")
        bound = 1 / math.sqrt(width)
        self.scale = nn.Parameter(torch.empty(features, width).uniform_(-bound, bound))
        self.shift = nn.Parameter(torch.empty(features, width).uniform_(-bound, bound))
        self.answer = nn.Parameter(torch.empty(1, width).uniform_(-bound, bound))
        self.blocks = nn.ModuleList(_AttentionBlock(width, heads) for _ in range(blocks))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        tokens = rows.unsqueeze(-1) * self.scale + self.shift
        tokens = torch.cat([self.answer.expand(len(rows), 1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.last(tokens[:, 0])
        return result


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        rows, count, width = tokens.shape
        split = self.query_key_value(self.norm(tokens)).view(rows, count, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(rows, count, width)
        tokens = tokens + self.mix(mixed)
        result: Tensor = tokens + self.inner(self.norm_inner(tokens))
        return result


class ImageNet(nn.Module):
    """Convolutions of 3 x 3 with GroupNorm and pooling, one for each of `channels`, and a linear layer.

    Rows are flat, in the order side, side, channel, as images are stored.
    """

    def __init__(self, side: int, colours: int, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.shape = (side, side, colours)
        if side < 2 ** len(channels):
            raise JobError(f"task.hidden: {len(channels)} halvings leave nothing of an image of {side} x {side}")
        layers: list[nn.Module] = []
        before = colours
        for wide in channels:
            groups = math.gcd(wide, 8)
            layers += [nn.Conv2d(before, wide, 3, padding=1), nn.GroupNorm(groups, wide), nn.ReLU(), nn.MaxPool2d(2)]
            before, side = wide, side // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side * side, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        images = rows.view(len(rows), *self.shape).permute(0, 3, 1, 2)
        result: Tensor = self.layers(images)
        return result


class CausalConvolution(nn.Module):
    """For each position of a window what comes next, from what came before: (B, window) -> (B, window, symbols).

    Block i looks back 2^i more positions at each of its two steps (van den Oord et al. 2016, arXiv:1609.03499).
    """

    def __init__(self, symbols: int, width: int, blocks: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        # LayerNorm at each position: a norm over positions would let the past see the future.
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.looks = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**i) for i in range(blocks))
        self.last = nn.Linear(width, symbols)

    def forward(self, rows: Tensor) -> Tensor:
        hidden: Tensor = self.symbols(rows.long())
        for i, (norm, look) in enumerate(zip(self.norms, self.looks, strict=True)):
            before = functional.pad(norm(hidden).transpose(1, 2), (2 * 2**i, 0))
            hidden = hidden + functional.relu(look(before)).transpose(1, 2)
        result: Tensor = self.last(hidden)
        return result


class MatrixFactorisation(nn.Module):
    """A rating as user bias + item bias + inner product (Koren et al. 2009); rows are the ids of items from 0.

    Answers (B, 2): the rating, and the squared length of all that made it. One site is one user: the parameters named
    `user.*` are its own, and a strategy that keeps them at the site leaves the server the items alone.
    """

    def __init__(self, items: int, factors: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, factors)
        self.item_bias = nn.Embedding(items, 1)
        self.user = nn.Linear(factors, 1)
        # Small: what few users rate stays near its start, and should say little.
        nn.init.normal_(self.items.weight, std=0.1)
        nn.init.zeros_(self.item_bias.weight)
        nn.init.normal_(self.user.weight, std=0.1)
        nn.init.zeros_(self.user.bias)

    def forward(self, rows: Tensor) -> Tensor:
        places = rows.squeeze(-1).long()
        factors, bias = self.items(places), self.item_bias(places)
        own = (self.user.weight**2).sum() + (self.user.bias**2).sum()
        length = (factors**2).sum(dim=-1, keepdim=True) + bias**2 + own
        return torch.cat([self.user(factors) + bias, length], dim=-1)


def one_width(choice: TaskChoice) -> tuple[int, int]:
    """The width and the number of equal blocks that `task.hidden` says. Raises `JobError`."""
    if len(set(choice.hidden)) != 1:
        raise JobError(f"task.hidden: the blocks of {choice.model!r} are of one width, for example [32, 32]")
    return choice.hidden[0], len(choice.hidden)

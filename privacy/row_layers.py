"""The layers whose gradient can be had for each row apart: what they do with their input, and what a row's part is.

In place of a parameter W of shape S a layer uses a leaf of shape (B, *S): B times the same values, so that the model
computes what it always does, while autograd, asked for the leaves' gradients, keeps rows apart. For the matrices the
copies are never made: one product serves all rows, and the backward pass alone treats them row by row. It may also
keep a matrix's gradient as two factors instead (`Pass.factors`), which take less memory than the gradients of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from privacy.errors import JobError

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Product:
    """The gradient of row b of a matrix is left[b]^T right[b]: (B, T, m) and (B, T, n) for a matrix of (m, n)."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Lookup:
    """The gradient of row b of a table is `gradient[b, t]` ((B, T, n)) at each of its rows `ids[b, t]` ((B, T))."""

    ids: Tensor
    gradient: Tensor


Factors = Product | Lookup


@dataclass
class Pass:
    """One forward and backward pass of `rows` rows.

    `values` are the parameters by name, as the model holds them, and `leaves` one a row of those that train, float32.
    With `factored` a matrix's gradient is left in `factors` where that is smaller than one gradient a row. `half`
    says afterwards whether anything was computed in 16 bits.
    """

    rows: int
    values: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]
    factored: bool = False
    factors: dict[str, list[Factors]] = field(default_factory=dict)
    half: bool = False


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters which train: `names` says under which name of the model it has which."""

    path: str
    module: nn.Module
    names: Mapping[str, str]

    def forward(self, run: Pass) -> Callable[..., Any]:
        """What stands in for the module's own forward during `run`. Raises `JobError` for rows it cannot tell apart."""
        compute: Callable[..., Any] = _KINDS.get(_kind(self.module), _swapped)

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if rows is None:
                raise JobError(self.refusal("is called without a tensor of rows"))
            run.half |= rows.dtype in HALF or torch.is_autocast_enabled(rows.device.type)
            if rows.ndim == 2 and rows.shape[0] == 1 and isinstance(self.module, nn.Embedding):
                args, kwargs = (rows.expand(run.rows, -1),), {}  # Position ids: the same for every row.
            elif rows.ndim == 0 or rows.shape[0] != run.rows:
                raise JobError(self.refusal(f"gets a tensor of shape {tuple(rows.shape)} for {run.rows} records"))
            if compute is _swapped:
                return _swapped(self, run, *args, **kwargs)
            return compute(self, run, *args, *kwargs.values())

        return forward

    @property
    def guessed(self) -> bool:
        """Whether the layer is of no known kind: its own forward gets leaves, and the first rows show if rightly."""
        return _kind(self.module) not in _KINDS

    def value(self, run: Pass, key: str) -> Tensor | None:
        """The parameter as all rows share it, without a gradient."""
        if key in self.names:
            return run.values[self.names[key]]
        own = self.module._parameters.get(key)
        return None if own is None else own.detach()

    def leaf(self, run: Pass, key: str) -> Tensor | None:
        return run.leaves.get(self.names.get(key, ""))

    def spread(self, run: Pass, key: str, like: Tensor, after: int = 0) -> Tensor | None:
        """The leaf, or the value if it rests, in the dtype of `like` (B, ..., *shape, + `after` dimensions) and so
        shaped that the two broadcast."""
        leaf = self.leaf(run, key)
        tensor = self.value(run, key) if leaf is None else leaf
        if tensor is None:
            return None
        shape = tensor.shape if leaf is None else tensor.shape[1:]
        between = () if leaf is None else (len(tensor), *[1] * (like.ndim - 1 - len(shape) - after))
        return tensor.view(*between, *shape, *[1] * after).to(like.dtype)

    def refusal(self, why: str) -> str:
        tensor = next(iter(self.names.values()))
        return (
            f"layer {self.path!r} ({type(self.module).__name__}) {why}, so {tensor!r} has no gradient for each record "
            'apart; freeze it, or use the gradient method "vmap"'
        )


def covered(path: str, module: nn.Module, names: Mapping[str, str]) -> Layer:
    """Check that `module` can keep the gradients of its own parameters apart. Raises `JobError`."""
    layer = Layer(path, module, names)
    kind = _kind(module)
    if "forward" in vars(module):
        raise JobError(layer.refusal("has had its forward replaced by another library"))
    if kind in _KINDS:
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            raise JobError(layer.refusal("has max_norm, scale_grad_by_freq or sparse set"))
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            raise JobError(layer.refusal("pads by other means than a number of zeros"))
    # Libraries' own layers hand their parameters to functions that know no leaves. What is left are the models'
    # modules, with parameters that they add or multiply with; that it is so, the check of the first rows shows.
    elif type(module).__module__.partition(".")[0] in {"torch", "peft"}:
        raise JobError(layer.refusal("is of a kind that is not covered"))
    return layer


def _kind(module: nn.Module) -> Any:
    """What tells the kind of a layer: its forward, which a subclass may have changed."""
    kind = type(module)
    # transformers' own, told by its name: this folder does not import transformers.
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "Conv1D"
    return kind.forward


# What each kind of matrix is: (forward, gradient of the input, factors of the gradient of the matrix).


def _flat(tensor: Tensor) -> Tensor:
    """(B, ..., n) -> (B, T, n)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


@dataclass(frozen=True)
class _Dense:
    transposed: bool  # Linear holds (out, in), transformers' Conv1D holds (in, out).
    channels: int = -1

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight.t() if self.transposed else weight, bias)

    def backward(self, gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        return functional.linear(gradient, weight if self.transposed else weight.t())

    def product(self, x: Tensor, gradient: Tensor) -> Product | None:
        return Product(_flat(x), _flat(gradient)) if self.transposed else Product(_flat(gradient), _flat(x))

    def each(self, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
        product = self.product(x, gradient)
        assert product is not None
        return torch.bmm(product.left.transpose(1, 2), product.right)


@dataclass(frozen=True)
class _Convolution:
    module: nn.Conv2d
    channels: int = 1

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = self.module
        return functional.conv2d(x, weight, bias, own.stride, own.padding, own.dilation, own.groups)

    def backward(self, gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        own = self.module
        place = (own.stride, own.padding, own.dilation, own.groups)
        result: Tensor = conv2d_input(shape, weight, gradient, *place)  # type: ignore[no-untyped-call]
        return result

    def product(self, x: Tensor, gradient: Tensor) -> Product | None:
        if self.module.groups > 1:
            return None
        return Product(gradient.flatten(2).transpose(1, 2), self._patches(x).transpose(1, 2))

    def each(self, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
        rows, groups = len(x), self.module.groups
        patches = self._patches(x).view(rows, groups, -1, gradient[0, 0].numel())
        return gradient.reshape(rows, groups, shape[0] // groups, -1) @ patches.transpose(2, 3)

    def _patches(self, x: Tensor) -> Tensor:
        own = self.module
        return functional.unfold(x, own.kernel_size, own.dilation, own.padding, own.stride)  # type: ignore[arg-type]


class _Matrix(torch.autograd.Function):
    """One product for all rows; backward, the gradient of each row's leaf."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Any, bias_leaf: Any, how: Any
    ) -> Tensor:
        kind, *_ = how
        if torch.is_autocast_enabled(x.device.type):  # Here and not inside: what is saved is then what was used.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.how, ctx.shapes = how, (x.shape, weight.shape)
        ctx.save_for_backward(x if leaf is not None else None, weight)
        result: Tensor = kind.output(x, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kind, run, name), (x, weight) = ctx.how, ctx.saved_tensors
        to_input = kind.backward(gradient, ctx.shapes[0], weight) if ctx.needs_input_grad[0] else None
        to_leaf = to_bias = None
        if ctx.needs_input_grad[4]:
            positions = gradient.movedim(kind.channels, -1)
            to_bias = _flat(positions).sum(dim=1, dtype=torch.float32)
        if ctx.needs_input_grad[3]:
            x = x.detach()
            product = kind.product(x, gradient) if run.factored else None
            if product is not None and _smaller(product):
                run.factors.setdefault(name, []).append(product)
            else:
                to_leaf = kind.each(x, gradient, ctx.shapes[1]).view(len(x), *ctx.shapes[1]).float()
        return to_input, None, None, to_leaf, to_bias, None


def _smaller(product: Product) -> bool:
    """Whether the factors hold fewer numbers than the gradients: then their norms cost fewer operations, too."""
    (_, positions, left), right = product.left.shape, product.right.shape[2]
    return positions * (left + right) < left * right


def _matrix(kind: Any, layer: Layer, run: Pass, x: Tensor) -> Tensor:
    leaf, bias_leaf = layer.leaf(run, "weight"), layer.leaf(run, "bias")
    how = (kind, run, layer.names.get("weight"))
    result: Tensor = _Matrix.apply(  # type: ignore[no-untyped-call]
        x, layer.value(run, "weight"), layer.value(run, "bias"), leaf, bias_leaf, how
    )
    return result


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, leaf: Tensor | None, padding: int | None, how: Any) -> Tensor:
        ctx.how, ctx.shape, ctx.padding = how, weight.shape, padding
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (run, name), (ids,) = ctx.how, ctx.saved_tensors
        ids, gradient = ids.flatten(1), gradient.reshape(len(ids), -1, gradient.shape[-1]).float()
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0.0)
        if run.factored and ids.shape[1] < ctx.shape[0]:
            run.factors.setdefault(name, []).append(Lookup(ids, gradient))
            return None, None, None, None, None
        return None, None, each_looked_up(Lookup(ids, gradient), ctx.shape[0]), None, None


def each_looked_up(lookup: Lookup, count: int) -> Tensor:
    """The gradient of each row of a table of `count` rows: (B, count, n)."""
    rows, _, width = lookup.gradient.shape
    places = lookup.ids + count * torch.arange(rows, device=lookup.ids.device)[:, None]
    table = lookup.gradient.new_zeros(rows * count, width)
    return table.index_add_(0, places.flatten(), lookup.gradient.flatten(0, 1)).view(rows, count, width)


def _embedding(layer: Layer, run: Pass, ids: Tensor) -> Tensor:
    weight, leaf = layer.value(run, "weight"), layer.leaf(run, "weight")
    how = (run, layer.names["weight"])
    result: Tensor = _Table.apply(ids, weight, leaf, layer.module.padding_idx, how)  # type: ignore[no-untyped-call]
    return result


def _affine(layer: Layer, run: Pass, normal: Tensor, after: int = 0) -> Tensor:
    weight, bias = layer.spread(run, "weight", normal, after), layer.spread(run, "bias", normal, after)
    if weight is None:
        return normal
    return normal * weight if bias is None else torch.addcmul(bias, normal, weight)


def _layer_norm(layer: Layer, run: Pass, x: Tensor) -> Tensor:
    own: Any = layer.module
    return _affine(layer, run, functional.layer_norm(x, own.normalized_shape, eps=own.eps))


def _rms_norm(layer: Layer, run: Pass, x: Tensor) -> Tensor:
    own: Any = layer.module
    return _affine(layer, run, functional.rms_norm(x, own.normalized_shape, eps=own.eps))


def _group_norm(layer: Layer, run: Pass, x: Tensor) -> Tensor:
    own: Any = layer.module
    return _affine(layer, run, functional.group_norm(x, own.num_groups, eps=own.eps), after=x.ndim - 2)


def _swapped(layer: Layer, run: Pass, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with leaves in the place of its parameters: right where it adds or multiplies them with
    rows, as transformers' RMSNorms, class tokens and position embeddings of images do."""
    module, first = layer.module, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    own = {key: module._parameters[key] for key in layer.names}
    try:
        for key, parameter in own.items():
            assert parameter is not None
            leaf, value = layer.leaf(run, key), layer.value(run, key)
            if leaf is None:
                leaf = value
            elif parameter.ndim > 2 and len(parameter) == 1:
                leaf = leaf.flatten(0, 1)  # (1, T, n), one for all rows, becomes (B, T, n).
            else:
                leaf = leaf.view(len(leaf), *[1] * (first.ndim - 1 - parameter.ndim), *parameter.shape)
            assert leaf is not None
            module._parameters[key] = leaf.to(parameter.dtype)  # type: ignore[assignment]
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(own)


_KINDS: dict[Any, Callable[[Layer, Pass, Tensor], Any]] = {
    nn.Linear.forward: lambda layer, run, x: _matrix(_Dense(transposed=False), layer, run, x),
    "Conv1D": lambda layer, run, x: _matrix(_Dense(transposed=True), layer, run, x),
    nn.Conv2d.forward: lambda layer, run, x: _matrix(_Convolution(layer.module), layer, run, x),  # type: ignore[arg-type]
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _rms_norm,
    nn.GroupNorm.forward: _group_norm,
}

"""The custom ops of the tail, ``BN -> SE -> + residual -> ReLU``: forward, backward, and the autograd around them."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import composite
from .batch_statistics import gradient_shares, merge_statistics, move_statistics
from .kernels.layout import as_dense, packed_shape
from .ops import INTERPRET, refuse_transforms, wants_composite_gradients

if TYPE_CHECKING:
    from .kernels.forward import BatchNorm, Excitation

_DEVICES = ("cuda", "cpu") if INTERPRET else ("cuda",)
Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@custom_op("setriton::bn_squeeze_excite", mutates_args=(), device_types=_DEVICES, tags=(torch.Tag.flexible_layout,))
def _forward(
    x: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    training: bool, momentum: float, eps: float, bn_act: str, act: str, gate: str, out_act: str, group: str,
    wants_bits: bool,
) -> Nine:  # fmt: skip
    """y, a bit for each y > 0, mean, var, squeezed, z1, e, new running_mean and running_var; what is absent is empty.

    The bits are wanted for out_act relu, where there will be a backward pass.
    """
    from .kernels.forward import BatchNorm, Excitation, forward

    def merge(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, total = merge_statistics(mean, var, count, group)
        if running_mean is None or running_var is None:
            return mean, var, mean.new_empty(0), mean.new_empty(0)
        moved = move_statistics(running_mean, running_var, mean, var, total, momentum)
        return mean, var, *moved

    found = forward(
        x, Excitation(w1, b1, w2, b2, act, gate),
        BatchNorm(bn_weight, bn_bias, running_mean, running_var, eps, bn_act),
        residual, out_act, wants_bits, training, momentum, merge if group else None,
    )  # fmt: skip
    return (
        found.y, found.bits, found.mean, found.var, found.squeezed, found.z1, found.e,
        found.new_running_mean, found.new_running_var,
    )  # fmt: skip


@_forward.register_fake
def _(
    x: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    training: bool, momentum: float, eps: float, bn_act: str, act: str, gate: str, out_act: str, group: str,
    wants_bits: bool,
) -> Nine:  # fmt: skip
    x = as_dense(x)
    (n, c), r = x.shape[:2], w1.shape[0]
    bits = x.new_empty(packed_shape(x) if wants_bits else (0,), dtype=torch.uint8)
    vectors = functools.partial(x.new_empty, dtype=torch.float32)
    mean, var = (vectors((c if training else 0,)) for _ in range(2))
    squeezed, z1, e = vectors((n, c)), vectors((n, r)), vectors((n, c))
    running = [vectors((0,)) if t is None or not training else t.new_empty(c) for t in (running_mean, running_var)]
    return torch.empty_like(x), bits, mean, var, squeezed, z1, e, running[0], running[1]


@custom_op(
    "setriton::bn_squeeze_excite_backward", mutates_args=(), device_types=_DEVICES, tags=(torch.Tag.flexible_layout,)
)
def _backward(
    dy: Tensor, dy_skip: Tensor | None, x: Tensor, bits: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    mean: Tensor, var: Tensor, w1: Tensor, w2: Tensor, squeezed: Tensor, z1: Tensor, e: Tensor, has_residual: bool,
    training: bool, eps: float, bn_act: str, act: str, gate: str, group: str,
) -> Eight:  # fmt: skip
    """dx, dresidual, dweight and dbias of BN, dw1, db1, dw2, db2; dresidual, in the dtype of x, may be empty.

    Gradients of BN and of biases are in float32 and cost nothing: they come whether wanted or not.
    """
    from .kernels.backward import Saved, backward

    found = backward(
        dy, Saved(x, bits if bits.numel() else None, mean, var, squeezed, z1, e),
        *_arguments(bn_weight, bn_bias, w1, w2, eps, bn_act, act, gate),
        dy_skip, has_residual, training,
        functools.partial(gradient_shares, group=group) if group else None,
    )  # fmt: skip
    dresidual = x.new_empty(0) if found.g is None else found.g
    dw1, dw2 = found.dw1.view(w1.shape), found.dw2.view(w2.shape)
    return found.dx, dresidual, found.dweight, found.dbias, dw1, found.db1, dw2, found.db2


@_backward.register_fake
def _(
    dy: Tensor, dy_skip: Tensor | None, x: Tensor, bits: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    mean: Tensor, var: Tensor, w1: Tensor, w2: Tensor, squeezed: Tensor, z1: Tensor, e: Tensor, has_residual: bool,
    training: bool, eps: float, bn_act: str, act: str, gate: str, group: str,
) -> Eight:  # fmt: skip
    x = as_dense(x)
    c, r = x.shape[1], w1.shape[0]
    dresidual = torch.empty_like(x) if has_residual else x.new_empty(0)
    dweight, dbias, db1, db2 = (e.new_empty(size) for size in (c, c, r, c))
    return torch.empty_like(x), dresidual, dweight, dbias, w1.new_empty(w1.shape), db1, w2.new_empty(w2.shape), db2


def _arguments(
    bn_weight: Tensor | None, bn_bias: Tensor | None, w1: Tensor, w2: Tensor, eps: float, bn_act: str, act: str,
    gate: str,
) -> "tuple[Excitation, BatchNorm]":  # fmt: skip
    """What the backward pass reads of the forward pass's arguments."""
    from .kernels.forward import BatchNorm, Excitation

    return Excitation(w1, None, w2, None, act, gate), BatchNorm(bn_weight, bn_bias, None, None, eps, bn_act)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Nine) -> None:
    x, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, residual, *options = inputs
    training, _, eps, bn_act, act, gate, _, group, _ = options
    _, bits, mean, var, *kept, _, _ = output
    statistics = (mean, var) if training else (running_mean, running_var)
    ctx.save_for_backward(x, bits, bn_weight, bn_bias, *statistics, w1, b1, w2, b2, *kept)
    ctx.options = residual is not None, training, eps, bn_act, act, gate, group
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:10]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dy_skip: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the forward op's 19 arguments."""
    if dy is None:
        dy, dy_skip = dy_skip, None
    if dy is None:
        return (None,) * 19
    x, bits, bn_weight, bn_bias, mean, var, w1, b1, w2, b2, *kept = ctx.saved_tensors
    gradients: tuple[Tensor | None, ...]
    if wants_composite_gradients():
        stopped = _unset(bits, x) if bits.numel() else None
        tensors = (x, bn_weight, bn_bias, mean, var, w1, b1, w2, b2)
        gradients = composite.bn_squeeze_excite_gradients(dy, dy_skip, stopped, tensors, *ctx.options)
    else:
        found = _backward(dy, dy_skip, x, bits, bn_weight, bn_bias, mean, var, w1, w2, *kept, *ctx.options)
        dx, dresidual, dweight, dbias, dw1, db1, dw2, db2 = found
        gradients = (dx, dweight, dbias, None, None, dw1, db1, dw2, db2, dresidual)
    pairs = zip(gradients, ctx.dtypes, strict=True)
    return *(None if dtype is None or gradient is None else gradient.to(dtype) for gradient, dtype in pairs), *(
        None,
    ) * 9


def _unset(bits: Tensor, x: Tensor) -> Tensor:
    """Where, in the shape of x, the bits are 0 that the kernels packed as `kernels.layout.packed_shape` says."""
    n, channels, height, width = x.shape
    of_byte = torch.arange(8, device=x.device, dtype=torch.uint8)[:, None]
    zeros = (bits[:, :, None] >> of_byte & 1) == 0
    return zeros.flatten(1, 2)[:, :channels, : height * width].view(n, channels, height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Nine) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


_forward.register_autograd(lambda ctx, dy, *_: _gradients(ctx, dy, None), setup_context=_setup_context)
for _op in (_forward, _backward):
    refuse_transforms(_op)


class _Fork(torch.autograd.Function):
    """The forward op with y given twice; each of the two has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[7:])
        # detach: a view that autograd does not know as one, so that y's two uses stay two edges.
        return output[0], output[0].detach(), output[7], output[8]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_skip: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, dy_skip)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _forked(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One call in Dynamo's graph: Dynamo would trace the backward pass as if no second derivative could follow it."""
    return _Fork.apply(*inputs)


def bn_squeeze_excite(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference_tail.bn_squeeze_excite`: y, with `fork` an alias of y, and the new running statistics.

    An exported program calls the op alone, whose one y then has both uses.
    """
    inputs, fork = list(arguments[:-1]), arguments[-1]
    is_differentiated = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    inputs.append(inputs[16] == "relu" and is_differentiated)
    if fork and is_differentiated and not composite.is_exporting():
        y, y_skip, new_mean, new_var = _forked(*inputs)
    else:
        y, *_, new_mean, new_var = _forward(*inputs)
        y_skip = y if fork else None
    has_moved = inputs[3] is not None and inputs[10]
    return y, y_skip, new_mean if has_moved else None, new_var if has_moved else None


@register_flop_formula(torch.ops.setriton.bn_squeeze_excite)
def _(x_shape: torch.Size, *shapes: Any, **__: Any) -> int:
    """Two products of N x C x R multiply-adds; the counter's unit is one operation, two a multiply-add."""
    return 4 * x_shape[0] * shapes[4][0] * shapes[4][1]


@register_flop_formula(torch.ops.setriton.bn_squeeze_excite_backward)
def _(dy_shape: torch.Size, *shapes: Any, **__: Any) -> int:
    """Gradients of inputs and of weights: twice the forward products."""
    return 8 * dy_shape[0] * shapes[7][0] * shapes[7][1]

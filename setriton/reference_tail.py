"""The tail of a block, ``BN -> SE -> + residual -> ReLU``, in plain PyTorch that Inductor can fuse.

With a residual, 4 passes over the map; 6 backward, and 8 where the output is forked. The booleans of the ReLU, a byte
each, are half a bfloat16 pass: once forward, twice backward.

Notation: u = (x - mean) * rstd * weight + bias is BN's output (arXiv 1502.03167), v = bn_act(u), q = mean_hw(v);
z1 and e as in `reference`; y = out_act(v * e + residual). `squeezed` (N, C) is mean_hw(x) where bn_act is identity,
for then q follows from it; else it is q.

BN stays (x - mean) * scale + bias: x * scale + (bias - mean * scale) loses the digits of |mean| / std.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import composite
from .batch_statistics import batch_statistics, gradient_shares, move_statistics
from .reference import ACTS, BN_ACTS, GATES, accumulate_dtype, autocast_disabled


def bn_squeeze_excite(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    bn_act: str,
    act: str,
    gate: str,
    out_act: str,
    group: str,
    fork: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, with `fork` an alias of y whose gradient stays apart until the first sweep, and the new running statistics."""
    tensors = (x, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, residual)
    options = (training, momentum, eps, bn_act, act, gate, out_act, group)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _differentiable(*tensors, *options, fork)
    y, *_, new_mean, new_var = bn_squeeze_excite_forward(*tensors, *options)
    return y, y if fork else None, new_mean, new_var


def bn_squeeze_excite_forward(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    bn_act: str,
    act: str,
    gate: str,
    out_act: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, mean, var, squeezed, z1, e, new running_mean and running_var.

    The new statistics are None unless they change. mean and var are the ones BN used.
    `group` names the process group over which they are taken; "" is none.
    """
    dtype = accumulate_dtype(x.dtype)
    new_mean = new_var = None
    with torch.no_grad(), autocast_disabled(x):
        if training:
            mean, var, squeezed, count = batch_statistics(x.to(dtype), group)
            if running_mean is not None and running_var is not None:
                new_mean, new_var = move_statistics(running_mean, running_var, mean, var, count, momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, var = running_mean.to(dtype), running_var.to(dtype)
            squeezed = x.mean((2, 3), dtype=dtype) if bn_act == "identity" else mean
        _, scale, bias = _affine(bn_weight, bn_bias, mean, var, eps)
        v = BN_ACTS[bn_act].function((x.to(dtype) - _map(mean)) * _map(scale) + _map(bias))
        if bn_act == "identity":
            q = (squeezed - mean) * scale + bias
        else:
            q = squeezed = v.mean((2, 3))
        z1 = F.linear(q, w1.flatten(1).to(dtype), None if b1 is None else b1.to(dtype))
        z2 = F.linear(ACTS[act].function(z1), w2.flatten(1).to(dtype), None if b2 is None else b2.to(dtype))
        e = GATES[gate].function(z2)
        y = v * _map(e)
        if residual is not None:
            y = y + residual.to(dtype)
        if out_act == "relu":
            y = torch.relu(y)
        if (
            y.dtype != x.dtype
        ):  # torch 2.11 loses the gradient of a compiled Function's result whose last step is no step
            y = y.to(x.dtype)
    return y, mean, var, squeezed, z1, e, new_mean, new_var


def bn_squeeze_excite_backward(
    dy: Tensor,
    dy_skip: Tensor | None,
    x: Tensor,
    stopped: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    w1: Tensor,
    w2: Tensor,
    squeezed: Tensor,
    z1: Tensor,
    e: Tensor,
    has_residual: bool,
    training: bool,
    eps: float,
    bn_act: str,
    act: str,
    gate: str,
    group: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias of BN, dw1, db1, dw2, db2, from two sweeps over the maps.

    The first reads (dy, dy_skip, stopped, x) and sums; what follows to the second's dx is of size (N, C). dresidual
    has dy's dtype, db1 and db2 that of the sums. Under a group, parameters' gradients are this rank's share.
    """
    dtype = mean.dtype
    n, _, height, width = x.shape
    hw = height * width
    m1, m2 = w1.flatten(1).to(dtype), w2.flatten(1).to(dtype)
    with torch.no_grad(), autocast_disabled(x):
        rstd, scale, bias = _affine(bn_weight, bn_bias, mean, var, eps)
        g, centred = dy.to(dtype), x.to(dtype) - _map(mean)
        if dy_skip is not None:
            g = g + dy_skip.to(dtype)
        if stopped is not None:
            g = torch.where(stopped, 0, g)
        # dresidual; and the second sweep reads this map instead of the two, or three, that it is made of.
        joined = g.to(dy.dtype)
        if bn_act == "identity":
            q = (squeezed - mean) * scale + bias
            slope = None
            g1, g2 = g.sum((2, 3)), (g * centred).sum((2, 3))
            g0 = scale * g2 + bias * g1
            f1, f2 = torch.full_like(g1, hw), hw * (squeezed - mean)
        else:
            q = squeezed
            u = centred * _map(scale) + _map(bias)
            slope = BN_ACTS[bn_act].derivative(u)
            g0 = (g * BN_ACTS[bn_act].function(u)).sum((2, 3))
            g1, g2 = (g * slope).sum((2, 3)), (g * (slope * centred)).sum((2, 3))
            f1, f2 = slope.sum((2, 3)), (slope * centred).sum((2, 3))

        dz2 = g0 * GATES[gate].derivative(e)
        dz1 = (dz2 @ m2) * ACTS[act].derivative(z1)
        dw2, dw1 = dz2.t() @ ACTS[act].function(z1), dz1.t() @ q
        dpixel = (dz1 @ m1) / max(hw, 1)
        dbias, dweight = (e * g1 + dpixel * f1).sum(0), (e * g2 + dpixel * f2).sum(0) * rstd

        dx = joined.to(dtype) * _map(e) + _map(dpixel)
        if slope is not None:
            dx = dx * slope
        if training:
            through_mean, through_var = gradient_shares(dbias, dweight, n * hw, group)
            dx = dx - _map(through_mean) - centred * _map(through_var * rstd)
        dx = dx * _map(scale)
    return (
        dx.to(x.dtype),
        joined if has_residual else None,
        None if bn_weight is None else dweight.to(bn_weight.dtype),
        None if bn_bias is None else dbias.to(bn_bias.dtype),
        dw1.view(w1.shape).to(w1.dtype),
        dz1.sum(0),
        dw2.view(w2.shape).to(w2.dtype),
        dz2.sum(0),
    )


def _map(v: Tensor) -> Tensor:
    """(C) or (N, C) as a map of one pixel."""
    return v[..., None, None]


def _affine(
    bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rstd, scale and bias of BN(x) = (x - mean) * scale + bias."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd.clone() if bn_weight is None else bn_weight.to(mean.dtype) * rstd
    bias = torch.zeros_like(mean) if bn_bias is None else bn_bias.to(mean.dtype)
    # as_strided makes Inductor keep `scale`. Else u reads more than 4 tensors, and config.realize_reads_threshold has
    # it written to memory, in float32, wherever it is used twice: 9 passes instead of 4 with SiLU.
    return rstd, scale.as_strided(mean.shape, (1,)), bias


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        *arguments, fork = inputs
        x, bn_weight, bn_bias, _, _, w1, b1, w2, b2, residual, training, _, eps, bn_act, act, gate, out_act, group = (
            arguments
        )
        y, mean, var, squeezed, z1, e, new_mean, new_var = bn_squeeze_excite_forward(*arguments)
        stopped = y <= 0 if out_act == "relu" else None
        ctx.save_for_backward(x, stopped, bn_weight, bn_bias, mean, var, w1, b1, w2, b2, squeezed, z1, e)
        ctx.options = residual is not None, training, eps, bn_act, act, gate, group
        ctx.dtypes = [None if t is None else t.dtype for t in arguments[:10]]
        ctx.mark_non_differentiable(*(t for t in (new_mean, new_var) if t is not None))
        ctx.set_materialize_grads(False)
        # detach: a view that autograd does not know as one, so that y's two uses stay two edges.
        return y, y.detach() if fork else None, new_mean, new_var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_skip: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            dy, dy_skip = dy_skip, None
        if dy is None:
            return (None,) * 19
        x, stopped, bn_weight, bn_bias, mean, var, w1, b1, w2, b2, *kept = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():  # a second derivative may follow
            tensors = (x, bn_weight, bn_bias, mean, var, w1, b1, w2, b2)
            gradients = composite.bn_squeeze_excite_gradients(dy, dy_skip, stopped, tensors, *ctx.options)
        else:
            found = bn_squeeze_excite_backward(
                dy, dy_skip, x, stopped, bn_weight, bn_bias, mean, var, w1, w2, *kept, *ctx.options
            )
            dx, dresidual, dweight, dbias, dw1, db1, dw2, db2 = found
            gradients = (dx, dweight, dbias, None, None, dw1, db1, dw2, db2, dresidual)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return *(None if dtype is None or grad is None else grad.to(dtype) for grad, dtype in pairs), *(None,) * 9


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One call in Dynamo's graph: Dynamo would trace the backward pass as if no second derivative could follow it."""
    return _Tail.apply(*arguments)

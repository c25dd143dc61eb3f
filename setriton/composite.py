"""The library's functions as PyTorch's own operations, one after the other.

What torch.func transforms, forward-mode differentiation, second derivatives and tracers are given: each operation can
be batched, differentiated any number of times in both modes, and exported. They keep more maps than the fused forms and
take more passes over them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .reference import BN_ACTS, accumulate_dtype, autocast_disabled, squeeze_excite


def transform() -> str:
    """The active transform that kernels cannot pass through, of torch.func or of forward mode; else ""."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo of torch 2.11 takes it for True
def is_exporting() -> bool:
    """Whether torch.export runs."""
    return torch.compiler.is_exporting()


def tracer() -> str:
    """The active tracer that knows aten's operations alone: torch.jit.trace or an ONNX exporter; else ""."""
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if (is_traced or is_exporting()) and torch.onnx.is_in_onnx_export():  # in this order: 15 times faster
        return "ONNX export"
    return "torch.jit.trace" if is_traced else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # under torch.compile, at trace time
def report(reason: str) -> None:
    """Say, once for each reason, that what would run on Triton kernels runs on PyTorch's operations."""
    if reason not in _reported:
        _reported.add(reason)
        warnings.warn(f"setriton: {reason} is given PyTorch's own operations instead of Triton kernels", stacklevel=4)


_reported: set[str] = set()


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
) -> Tensor:
    """``out_act(SE(bn_act(BN(x))) + residual)``, in the dtype of x; F.batch_norm moves the running statistics.

    Raises:
        NotImplementedError: statistics are those of a process group.
    """
    if group:
        raise NotImplementedError(
            "setriton.bn_squeeze_excite with statistics of a process_group is differentiated once, in reverse mode; "
            "a second derivative, forward mode, torch.func, torch.jit.trace and export need process_group=None"
        )
    dtype = accumulate_dtype(x.dtype)
    bn_weight, bn_bias, mean, var = (
        None if t is None else t.to(dtype) for t in (bn_weight, bn_bias, running_mean, running_var)
    )
    with autocast_disabled(x):
        if training and running_mean is not None and running_mean.dtype != dtype:
            # Only F.batch_norm may write to what torch.func.grad does not differentiate; the result is of no use.
            F.batch_norm(x.detach().to(running_mean.dtype), running_mean, running_var, None, None, True, momentum, eps)
            mean = var = None
        u = F.batch_norm(x.to(dtype), mean, var, bn_weight, bn_bias, training, momentum, eps)
        y = squeeze_excite(BN_ACTS[bn_act].function(u), w1, b1, w2, b2, act, gate)
        if residual is not None:
            y = y + residual.to(dtype)
        if out_act == "relu":
            y = torch.relu(y)
        y = y.to(x.dtype)
    return y


def squeeze_excite_gradients(
    dy: Tensor, tensors: tuple[Tensor | None, ...], act: str, gate: str
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2, made of operations that can be differentiated in their turn."""

    def function(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        return squeeze_excite(x, w1, b1, w2, b2, act, gate)

    return _gradients(function, tensors, dy)


def bn_squeeze_excite_gradients(
    dy: Tensor,
    dy_skip: Tensor | None,
    stopped: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    has_residual: bool,
    training: bool,
    eps: float,
    bn_act: str,
    act: str,
    gate: str,
    group: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of the ten tensors of `bn_squeeze_excite`, made of operations that can be differentiated in their turn.

    Args:
        dy, dy_skip: gradients of the result's two uses.
        stopped: where out_act relu lets no gradient through; NaN is let through, as by torch.relu.
        tensors: the first nine; where `training`, the running statistics are not read.
    """

    def before_residual(*leaves: Any) -> Tensor:
        x, bn_weight, bn_bias, mean, var, *layers = leaves
        statistics = (None, None) if training else (mean, var)
        options: tuple[Any, ...] = (None, training, 0.0, eps, bn_act, act, gate, "identity", group)
        return bn_squeeze_excite(x, bn_weight, bn_bias, *statistics, *layers, *options)

    g = dy if dy_skip is None else dy + dy_skip
    if stopped is not None:
        g = torch.where(stopped, 0, g)
    return *_gradients(before_residual, tensors, g), g if has_residual else None


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)``, computed anew; None for inputs that require none."""
    with torch.enable_grad(), autocast_disabled(dy):
        # Views: where one input is computed from another, the gradient must not run on from the one to the other.
        leaves = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        # With a graph in any case: aten has forward derivatives of some functions' gradients only as it makes one.
        gradients = torch.autograd.grad(function(*leaves), wanted, dy, create_graph=True) if wanted else ()
    if not torch.is_grad_enabled():  # copies leave the graph, as `detach` would, and keep forward derivatives
        gradients = tuple(g.clone() for g in gradients)
    found = iter(gradients)
    return tuple(next(found) if t is not None and t.requires_grad else None for t in leaves)

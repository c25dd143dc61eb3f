"""The torch.library custom ops: one opaque boundary per SE block and direction.

Forward and backward are an op each, with a fake of its own, so that torch.compile, export and selective checkpointing
see two nodes. Custom ops rather than `triton_op`: the latter cannot run in Triton's interpreter under torch.compile,
writes a fusible producer once per kernel that reads it, and pins the layout of its inputs.

Autocast: the ops take mixed dtypes, compute in float32 whatever the ambient mode, and return the dtype of x, as eager
SE does; so the dispatcher's default for autocast, falling through, is the right rule.
"""

import functools
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.library import Library, custom_op
from torch.utils.flop_counter import register_flop_formula

from . import composite, reference
from .kernels.layout import as_dense

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Additions to what `custom_op` registers; they last as long as this object.
_LIBRARY = Library("setriton", "FRAGMENT")
# The interpreter runs kernels on CPU tensors; Triton reads the variable once, when a kernel is decorated.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile asks once, at trace time
def has_kernels(device_type: str) -> bool:
    """Whether Triton kernels run on this kind of device; warns, once, where only Triton itself is missing."""
    return (device_type == "cuda" or (device_type == "cpu" and INTERPRET)) and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    if importlib.util.find_spec("triton") is None:
        warnings.warn("setriton: Triton is not installed; running the slower PyTorch reference path", stacklevel=3)
        return False
    return True


def refuse_transforms(op: CustomOpDef) -> None:
    """Have an op raise, by its name, where it would be differentiated in forward mode or by torch.func.

    The library's functions do not call ops there; exported programs may. Without this, ops lose tangents silently.
    """
    differentiate = make_autograd_impl(op._opoverload, op)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        tensors = [t for t in arguments if isinstance(t, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{op._qualname} has no forward-mode derivative; setriton's functions have one")
        is_transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if is_transformed and any(t.requires_grad for t in tensors):
            raise NotImplementedError(f"{op._qualname} is not differentiated by torch.func; setriton's functions are")
        return differentiate(keyset, *arguments)

    for key in ("AutogradCPU", "AutogradCUDA"):
        _LIBRARY.impl(op._opoverload, kernel, key, with_keyset=True)


@custom_op("setriton::squeeze_excite", mutates_args=(), device_types="cuda", tags=(torch.Tag.flexible_layout,))
def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and q (N, C), z1 (N, R), e (N, C) in float32, kept for the backward pass."""
    from .kernels.forward import Excitation, forward

    found = forward(x, Excitation(w1, b1, w2, b2, act, gate))
    return found.y, found.squeezed, found.z1, found.e


@squeeze_excite.register_kernel("cpu")
def _(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if INTERPRET and x.dtype in KERNEL_DTYPES:
        return squeeze_excite._init_fn(x, w1, b1, w2, b2, act, gate)
    return reference.squeeze_excite_with_saved(as_dense(x), w1, b1, w2, b2, act, gate)


@squeeze_excite.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, c), r = x.shape[:2], w1.shape[0]
    dtype = reference.accumulate_dtype(x.dtype)
    z1, (q, e) = x.new_empty((n, r), dtype=dtype), (x.new_empty((n, c), dtype=dtype) for _ in range(2))
    return torch.empty_like(as_dense(x)), q, z1, e


@custom_op("setriton::squeeze_excite_backward", mutates_args=(), device_types="cuda", tags=(torch.Tag.flexible_layout,))
def squeeze_excite_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, q: Tensor, z1: Tensor, e: Tensor, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2; bias gradients, in float32, cost an addition a row and come whether wanted or not."""
    from .kernels.backward import Saved, backward
    from .kernels.forward import Excitation

    found = backward(dy, Saved(x, None, None, None, q, z1, e), Excitation(w1, None, w2, None, act, gate))
    return found.dx, found.dw1.view(w1.shape), found.db1, found.dw2.view(w2.shape), found.db2


@squeeze_excite_backward.register_kernel("cpu")
def _(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, q: Tensor, z1: Tensor, e: Tensor, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if INTERPRET and x.dtype in KERNEL_DTYPES:
        return squeeze_excite_backward._init_fn(dy, x, w1, w2, q, z1, e, act, gate)
    x = as_dense(x)
    dx, dw1, db1, dw2, db2 = reference.squeeze_excite_backward(dy, x, w1, w2, q, z1, e, act, gate)
    return torch.empty_like(x).copy_(dx), dw1, db1, dw2, db2


@squeeze_excite_backward.register_fake
def _(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, q: Tensor, z1: Tensor, e: Tensor, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(w: Tensor) -> Tensor:
        return w.new_empty(w.shape)

    db1, db2 = q.new_empty(w1.shape[0]), q.new_empty(w2.shape[0])
    return torch.empty_like(as_dense(x)), like(w1), db1, like(w2), db2


def wants_composite_gradients() -> bool:
    """Whether what runs the backward pass differentiates or batches it, which kernels cannot; says so, once."""
    reason = "a second derivative" if torch.is_grad_enabled() else composite.transform()
    if reason:
        composite.report(reason)
    return bool(reason)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.act, ctx.gate = inputs
    _, q, z1, e = output
    ctx.save_for_backward(*tensors, q, z1, e)
    ctx.mark_non_differentiable(q, z1, e)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, w1, b1, w2, b2, *kept = ctx.saved_tensors
    if wants_composite_gradients():
        found = composite.squeeze_excite_gradients(dy, (x, w1, b1, w2, b2), ctx.act, ctx.gate)
        return *found, None, None
    dx, dw1, db1, dw2, db2 = squeeze_excite_backward(dy, x, w1, w2, *kept, ctx.act, ctx.gate)
    db1 = None if b1 is None else db1.to(b1.dtype)
    db2 = None if b2 is None else db2.to(b2.dtype)
    return dx, dw1, db1, dw2, db2, None, None


squeeze_excite.register_autograd(_backward, setup_context=_setup_context)
for _op in (squeeze_excite, squeeze_excite_backward):
    refuse_transforms(_op)


@register_flop_formula(torch.ops.setriton.squeeze_excite)
def _(x_shape: torch.Size, w1_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Two products of N x C x R multiply-adds; the counter's unit is one operation, two a multiply-add."""
    return 4 * x_shape[0] * w1_shape[0] * w1_shape[1]


@register_flop_formula(torch.ops.setriton.squeeze_excite_backward)
def _(dy_shape: torch.Size, x_shape: torch.Size, w1_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Gradients of inputs and of weights: twice the forward products."""
    return 8 * x_shape[0] * w1_shape[0] * w1_shape[1]

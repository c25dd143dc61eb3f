"""The public functions: arguments checked, then the Triton op or the reference path, by device."""

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import composite, ops, ops_tail, reference, reference_tail
from .checks import (
    check_batch_norm,
    check_choice,
    check_excitation,
    check_process_group,
    check_residual,
    check_tensors,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TAIL_TENSORS = ("x", "bn_weight", "bn_bias", "running_mean", "running_var", "w1", "b1", "w2", "b2", "residual")


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    act: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Squeeze-and-Excitation: ``x * gate(w2 @ act(w1 @ mean(x) + b1) + b2)``.

    Equations 2 to 4 of Squeeze-and-Excitation Networks (arXiv 1709.01507). Sums and the excitation are computed in
    float32 (float64 for a float64 `x`), whatever the dtypes of `x` and of the weights and under autocast too.
    On CUDA and ROCm devices, Triton kernels in 3 passes over the map (4 backward); elsewhere, plain PyTorch.

    Args:
        x: feature map (N, C, H, W), float16, bfloat16, float32 or float64. Contiguous and channels_last are read as
            they are, parts of such maps are copied once; where its axes are in another order, plain PyTorch runs.
        w1: reducing weight (R, C), or (R, C, 1, 1) as a 1x1 convolution holds it.
        b1: bias (R), or None.
        w2: expanding weight (C, R) or (C, R, 1, 1).
        b2: bias (C), or None.
        act: what stands between the two products: relu, silu, gelu, hardswish or identity.
        gate: what maps the result to channel weights: sigmoid or hardsigmoid.

    Returns:
        (N, C, H, W) in the dtype of `x`, and in the layout that PyTorch's operations give it. Second derivatives,
        forward mode and torch.func's transforms run PyTorch's own operations, said once where kernels would have run.

    Raises:
        TypeError: an argument is no dense floating-point tensor.
        ValueError: shapes or devices do not fit together, or `act` or `gate` is unknown.
    """
    with _no_tracer_warnings():
        check_tensors(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
        check_excitation(x, w1, b1, w2, b2)
    check_choice("act", act, reference.ACTS)
    check_choice("gate", gate, reference.GATES)
    if _is_composite(x):
        return reference.squeeze_excite(x, w1, b1, w2, b2, act, gate)
    layout = _layout_as_written(x)
    if layout is None or not _has_kernels(x):
        return reference.squeeze_excite(x, w1, b1, w2, b2, act, gate)
    return ops.squeeze_excite(x.contiguous(memory_format=layout), w1, b1, w2, b2, act, gate)[0]


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
    *,
    residual: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    bn_act: str = "identity",
    act: str = "relu",
    gate: str = "sigmoid",
    out_act: str = "identity",
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """The tail of a block at once: ``out_act(SE(bn_act(BN(x))) + residual)``.

    Batch Normalization (arXiv 1502.03167), then Squeeze-and-Excitation (arXiv 1709.01507, equations 2 to 4), then the
    residual's sum. Statistics, sums and the excitation are computed in float32 (float64 for a float64 `x`), whatever
    the dtypes of the tensors and under autocast too. With a residual and `bn_act` identity, 4 passes over the map
    and 7 backward; written as separate modules they are 26 and more.

    Args:
        x: feature map (N, C, H, W), float16, bfloat16, float32 or float64, the input of BN. Contiguous and
            channels_last are read as they are, other strides are copied once.
        bn_weight: gamma (C), or None for 1.
        bn_bias: beta (C), or None for 0.
        running_mean: (C), or None as is `running_var`. Used where `training` is False, else updated in place.
        running_var: (C) or None.
        w1: reducing weight (R, C) or (R, C, 1, 1).
        b1: bias (R), or None.
        w2: expanding weight (C, R) or (C, R, 1, 1).
        b2: bias (C), or None.
        residual: what is added to the result of SE, (N, C, H, W) of any of these dtypes, or None.
        training: whether to normalize with the statistics of the batch rather than the running ones.
        momentum: the weight of the batch in the running statistics.
        eps: what is added to the variance.
        bn_act: what stands between BN and SE: identity, relu, silu or hardswish.
        act: what stands between the two products: relu, silu, gelu, hardswish or identity.
        gate: what maps the excitation to channel weights: sigmoid or hardsigmoid.
        out_act: the last step: identity or relu.
        process_group: take the batch's statistics over all its ranks, as nn.SyncBatchNorm does; ranks may hold batches
            of different sizes. The gradients of the parameters are each rank's own share.

    Returns:
        (N, C, H, W) in the dtype of `x`, and in the layout that PyTorch's operations give it. Second derivatives,
        forward mode and torch.func's transforms run PyTorch's own operations, said once where kernels would have run;
        with a process group there are none.

    Raises:
        TypeError: an argument is no dense floating-point tensor, or one of the options has another type.
        NotImplementedError: a transform or second derivative over the statistics of a process group.
        ValueError: shapes or devices do not fit together, an option is unknown, there are no running statistics where
            `training` is False, or only one value per channel where it is True.
    """
    return _tail(
        (x, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, residual),
        (training, momentum, eps, bn_act, act, gate, out_act),
        process_group,
        fork=False,
    )[0]


def bn_squeeze_excite_forked(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    bn_act: str = "identity",
    act: str = "relu",
    gate: str = "sigmoid",
    out_act: str = "identity",
    process_group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """`bn_squeeze_excite` with its result given twice, for the two readers of a residual block's output.

    One tensor read twice makes autograd sum the two gradients in a kernel of its own, 3 passes over the map. The
    backward pass of these two sums them as it reads them, for 1. Arguments and errors are `bn_squeeze_excite`'s.

    Returns:
        Two tensors (N, C, H, W) over the same memory: change neither in place.
    """
    y, y_skip = _tail(
        (x, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, residual),
        (training, momentum, eps, bn_act, act, gate, out_act),
        process_group,
        fork=True,
    )
    assert y_skip is not None
    return y, y_skip


def _tail(
    tensors: tuple[Any, ...], options: tuple[Any, ...], process_group: "ProcessGroup | None", fork: bool
) -> tuple[Tensor, Tensor | None]:
    x, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, residual = tensors
    training, momentum, eps, bn_act, act, gate, out_act = options
    with _no_tracer_warnings():
        check_tensors(**dict(zip(_TAIL_TENSORS, tensors, strict=True)))
        check_excitation(x, w1, b1, w2, b2)
        check_batch_norm(x, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
        check_residual(residual, x)
        group = check_process_group(process_group, x, training)
    check_choice("bn_act", bn_act, reference.BN_ACTS)
    check_choice("act", act, reference.ACTS)
    check_choice("gate", gate, reference.GATES)
    check_choice("out_act", out_act, reference.OUT_ACTS)
    if bn_weight is None and bn_bias is not None:
        bn_weight = torch.ones_like(bn_bias)
    elif bn_bias is None and bn_weight is not None:
        bn_bias = torch.zeros_like(bn_weight)
    others = (bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, residual)
    options = (training, float(momentum), float(eps), bn_act, act, gate, out_act, group)
    # Maps without pixels have gradients that are NaN or 0 as each operation has it.
    if _is_composite(x) or (not group and not _has_kernels(x) and 0 in x.shape[2:]):
        y = composite.bn_squeeze_excite(x, *others, *options)
        return y, y
    function = ops_tail.bn_squeeze_excite if _has_kernels(x) else reference_tail.bn_squeeze_excite
    x = x.contiguous(memory_format=_layout_as_written(x) or torch.contiguous_format)  # as nn.BatchNorm2d gives it
    y, y_skip, new_mean, new_var = function(x, *others, *options, fork)
    if new_mean is not None and new_var is not None:
        with torch.no_grad():
            torch._foreach_copy_([running_mean, running_var], [new_mean, new_var])
    return y, y_skip


def _layout_as_written(x: Tensor) -> torch.memory_format | None:
    """The layout that PyTorch gives the result of an element-wise operation on x; None if it is neither of the two.

    What reads the result may depend on it: a view of the product of a chunk of channels, for one.
    """
    for found in (x, torch.empty_like(x, device="meta")):
        if found.is_contiguous():
            return torch.contiguous_format
        if found.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return None


def _no_tracer_warnings() -> contextlib.AbstractContextManager[object]:
    """torch.jit.trace warns of each size that is compared, as if the result depended on it."""
    if not composite.tracer():
        return contextlib.nullcontext()
    return warnings.catch_warnings(action="ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined,call-overload]


def _is_composite(x: Tensor) -> bool:
    """Whether a transform or tracer is active that wants PyTorch's own operations; said once where kernels would run.

    torch.export knows the library's ops; where there are no kernels, an exported tail is as trainable as the module.
    """
    reason = composite.transform() or composite.tracer()
    if reason and _has_kernels(x):
        composite.report(reason)
    return bool(reason) or (composite.is_exporting() and not _has_kernels(x))


def _has_kernels(x: Tensor) -> bool:
    return ops.has_kernels(x.device.type) and x.dtype in ops.KERNEL_DTYPES

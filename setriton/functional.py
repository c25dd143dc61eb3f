"""The public functions: arguments checked, then the Triton op or the reference path, by device."""

from collections.abc import Collection

import torch
from torch import Tensor

from . import ops, reference
from .kernels.layout import as_dense


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
        x: feature map (N, C, H, W) of any floating dtype. Contiguous and channels_last are read as they are, other
            strides are copied to channels_last once.
        w1: reducing weight (R, C), or (R, C, 1, 1) as a 1x1 convolution holds it.
        b1: bias (R), or None.
        w2: expanding weight (C, R) or (C, R, 1, 1).
        b2: bias (C), or None.
        act: what stands between the two products: relu, silu, gelu or identity.
        gate: what maps the result to channel weights: sigmoid or hardsigmoid.

    Returns:
        (N, C, H, W) in the dtype and layout of `x`. Differentiable once: the kernels have no second derivative.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or `act` or `gate` is unknown.
    """
    _check_tensors(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_shapes(x, w1, b1, w2, b2)
    check_choice("act", act, reference.ACTS)
    check_choice("gate", gate, reference.GATES)
    x = as_dense(x)
    if ops.has_kernels(x.device.type) and x.dtype in ops.KERNEL_DTYPES:
        return ops.squeeze_excite(x, w1, b1, w2, b2, act, gate)[0]
    return reference.squeeze_excite(x, w1, b1, w2, b2, act, gate)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """ValueError unless value is one of choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_size(name: str, value: object) -> None:
    """TypeError or ValueError unless value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _check_tensors(**tensors: Tensor | None) -> None:
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor is None and name in ("b1", "b2"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype; got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense; got layout {tensor.layout}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like x; got {tensor.device}")


def _check_shapes(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (N, C, H, W) with C at least 1; got {tuple(x.shape)}")
    channels = x.shape[1]
    _check_weight("w1", w1, "R", "C", None, channels)
    reduced = w1.shape[0]
    _check_weight("w2", w2, "C", "R", channels, reduced)
    for name, bias, symbol, size in (("b1", b1, "R", reduced), ("b2", b2, "C", channels)):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{name} must have shape ({symbol},) = ({size},); got {tuple(bias.shape)}")


def _check_weight(name: str, w: Tensor, rows: str, columns: str, n_rows: int | None, n_columns: int) -> None:
    is_matrix = w.dim() == 2 or (w.dim() == 4 and tuple(w.shape[2:]) == (1, 1))
    if not is_matrix or w.shape[1] != n_columns or w.shape[0] < 1 or n_rows not in (None, w.shape[0]):
        wanted = f"({rows}, {columns}) or ({rows}, {columns}, 1, 1) with {columns} = {n_columns}"
        wanted += f" and {rows} = {n_rows}" if n_rows is not None else ""
        raise ValueError(f"{name} must have shape {wanted}; got {tuple(w.shape)}")

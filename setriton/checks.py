"""Checks of arguments, each with a message that names the argument, what it got and what it wanted."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPTIONAL = ("b1", "b2", "bn_weight", "bn_bias", "running_mean", "running_var", "residual")


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


def check_rate(name: str, value: object) -> None:
    """TypeError or ValueError unless value is a number in [0, 1)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1); got {value}")


def check_ratio(name: str, value: object) -> None:
    """TypeError or ValueError unless value is a number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive; got {value}")


def check_tensors(**tensors: Tensor | None) -> None:
    """TypeError unless all are dense tensors of one of DTYPES, ValueError unless all are where x, the first, is."""
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor is None and name in _OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must have a floating-point dtype of 16, 32 or 64 bits; got {tensor.dtype}")
        if tensor.is_nested:
            raise TypeError(f"{name} must be dense; got a nested tensor")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense; got layout {tensor.layout}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like x; got {tensor.device}")


def check_excitation(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    """ValueError unless the shapes are those of an SE block's map and layers."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (N, C, H, W) with C at least 1; got {tuple(x.shape)}")
    channels = x.shape[1]
    _check_weight("w1", w1, "R", "C", None, channels)
    reduced = w1.shape[0]
    _check_weight("w2", w2, "C", "R", channels, reduced)
    _check_vector("b1", b1, "R", reduced)
    _check_vector("b2", b2, "C", channels)


def check_batch_norm(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: object,
    momentum: object,
    eps: object,
) -> None:
    """TypeError or ValueError unless shapes and numbers are those of F.batch_norm; x has passed its own check."""
    named = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in named.items():
        _check_vector(name, vector, "C", x.shape[1])
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool; got {training!r}")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise TypeError(f"{name} must be a number; got {number!r}")
        if not number >= 0:
            raise ValueError(f"{name} must be at least 0; got {number}")
    if training and not eps:
        raise ValueError("eps must be above 0 where training is True; got 0")  # as F.batch_norm of newer torch has it
    for name in ("running_mean", "running_var"):
        statistic = named[name]
        if statistic is not None and statistic.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient: statistics are given none; pass it detached")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be tensors or both be None; got one of each")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be tensors where training is False; got None")


def check_process_group(process_group: Any, x: Tensor, training: bool) -> str:
    """The name of a group of several ranks whose statistics are wanted, else "".

    Raises:
        TypeError: `process_group` is no process group.
        ValueError: statistics are to be taken of one value per channel.
    """
    group = ""
    if process_group is not None:
        if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup; got {process_group!r}")
        if training and process_group.size() > 1:
            group = process_group.group_name
    if training and not group and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x must have more than 1 value per channel where training is True; got {tuple(x.shape)}")
    return group


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """ValueError unless the residual has the shape of x."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}; got {tuple(residual.shape)}")


def _check_vector(name: str, vector: Tensor | None, symbol: str, size: int) -> None:
    if vector is not None and tuple(vector.shape) != (size,):
        raise ValueError(f"{name} must have shape ({symbol},) = ({size},); got {tuple(vector.shape)}")


def _check_weight(name: str, w: Tensor, rows: str, columns: str, n_rows: int | None, n_columns: int) -> None:
    is_matrix = w.dim() == 2 or (w.dim() == 4 and tuple(w.shape[2:]) == (1, 1))
    if not is_matrix or w.shape[1] != n_columns or w.shape[0] < 1 or n_rows not in (None, w.shape[0]):
        wanted = f"({rows}, {columns}) or ({rows}, {columns}, 1, 1) with {columns} = {n_columns}"
        wanted += f" and {rows} = {n_rows}" if n_rows is not None else ""
        raise ValueError(f"{name} must have shape {wanted}; got {tuple(w.shape)}")

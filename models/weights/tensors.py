"""What a tensor of weights must be, known before any is copied."""

from collections.abc import Mapping

import torch
from torch import Tensor

_COUNTER = "num_batches_tracked"
_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(state: Mapping[str, Tensor], title: str) -> None:
    """ValueError unless all tensors are plain, dense, real and have values; what their values are is not looked at."""
    for key, tensor in state.items():
        if problem := _problem(key, tensor):
            raise ValueError(f"weights of {title} must be dense tensors of real numbers: {key} is {problem}")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is made of its own values: no wrapper such as a DTensor, nor a fake."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided


def cast(key: str, tensor: Tensor, wanted: Tensor, title: str) -> Tensor:
    """The values in the dtype of `wanted`.

    Raises:
        ValueError: a value is not finite there, a variance is negative, or a counter no whole number of at least 0.
    """
    found = tensor.detach().to(dtype=wanted.dtype)
    if key.endswith(_COUNTER):
        # NaN is equal to nothing, and an infinity becomes some integer.
        if not ((found == tensor) & (found >= 0)).all():
            raise ValueError(f"weights of {title} must have whole counts of batches: {key} is {tensor.tolist()}")
        return found
    if not found.isfinite().all():
        if tensor.isfinite().all():
            raise ValueError(f"weights of {title} must fit {wanted.dtype}: {key} has values that are infinite there")
        what = "NaN" if tensor.isnan().any() else "infinite values"
        raise ValueError(f"weights of {title} must be finite: {key} has {what}")
    # Before the cast, which makes small ones 0.
    if key.endswith("running_var") and (tensor < 0).any():
        raise ValueError(
            f"weights of {title} must have variances of at least 0: {key} has one of {tensor.min().item():g}"
        )
    return found


def dtype_note(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """A line for each dtype that becomes another one."""
    changes: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for key, tensor in state.items():
        pair = tensor.dtype, target[key].dtype
        if not key.endswith(_COUNTER) and pair[0] != pair[1]:
            changes[pair] = changes.get(pair, 0) + 1
    return [f"{count} tensors from {_short(old)} to {_short(new)}" for (old, new), count in changes.items()]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(key: str, tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_nested:
        return "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
    if not is_plain(tensor):
        return f"a {type(tensor).__name__}"
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.numel() == 0:
        return f"empty, of shape {tuple(tensor.shape)}"
    allowed = (*_REAL, torch.int64, torch.int32) if key.endswith(_COUNTER) else _REAL
    return "" if tensor.dtype in allowed else f"of {tensor.dtype}"

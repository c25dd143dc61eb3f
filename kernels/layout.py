"""Memory layouts the kernels read: a feature map is an (HW, C) matrix per image, dense along one of the two."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W), dense in one of the two layouts, is best walked along channels.

    Maps of 1x1 pixels, or of one channel, are dense in both layouts: the longer axis wins.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return not x.is_contiguous() or x.shape[1] >= x.shape[2] * x.shape[3]


def as_dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a channels_last copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def as_layout_of(dy: Tensor, x: Tensor) -> Tensor:
    """dy in the layout of x, so that one set of offsets serves both; a copy only where they differ."""
    if dy.stride() == x.stride():
        return dy
    return dy.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def hw_c_strides(x: Tensor) -> tuple[int, int]:
    """Strides (stride_hw, stride_c) of a dense x seen as N matrices (HW, C)."""
    _, channels, height, width = x.shape
    return (channels, 1) if is_channels_last(x) else (1, height * width)


def geometry(x: Tensor) -> dict[str, int | bool]:
    """Sizes and strides of a dense x, by the names that kernels give them."""
    _, channels, height, width = x.shape
    stride_hw, stride_c = hw_c_strides(x)
    return {
        "C": channels,
        "HW": height * width,
        "stride_hw": stride_hw,
        "stride_c": stride_c,
        "WIDE": channels * height * width >= 2**31,
    }


def packed_shape(x: Tensor) -> tuple[int, int, int]:
    """Shape of one bit for each element of x: bytes of eight channels, rows of pixels that end with a 32-byte sector.

    The same for both layouts: a compiler may hand the backward pass x in another one than the forward pass had.
    """
    n, channels, height, width = x.shape
    return n, -(-channels // 8), -(-height * width // 32) * 32

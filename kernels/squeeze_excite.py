"""Squeeze-and-Excitation, y = x * gate(W2 act(W1 mean(x) + b1) + b2): 3 passes over x forward, 4 backward.

A feature map is walked as N matrices (HW, C) with explicit strides, so that one kernel serves both layouts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .excite import excite, excite_backward
from .layout import as_dense, as_layout_of, hw_c_strides
from .primitives import apply_gate, block_offsets, gate_grad, image_offset, map_tile, tile_offsets, unravel
from .tuning import LAUNCH_OPTIONS, Tile, reduction_splits, sweep_tile


@triton.jit
def _squeeze_kernel(
    x_ptr, q_ptr,
    C, HW, SPLITS, tiles_per_split, stride_hw, stride_c,
    WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q (N, SPLITS, C): the sum over one part of the map, over HW."""
    n, split, block_c = unravel(tl.program_id(0), tl.cdiv(C, BLOCK_C), SPLITS)
    offs_c, mask_c = block_offsets(block_c, BLOCK_C, C)
    x_ptr += image_offset(n, HW, C)
    acc = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        offs_hw, mask_hw = block_offsets(tile, BLOCK_HW, HW)
        offs = tile_offsets(offs_hw, offs_c, stride_hw, stride_c, WIDE)
        acc += tl.load(x_ptr + offs, mask_hw[:, None] & mask_c[None, :], 0.0).to(tl.float32)
    tl.store(q_ptr + (n * SPLITS + split).to(tl.int64) * C + offs_c, tl.sum(acc, axis=0) / HW, mask_c)


@triton.jit
def _scale_kernel(
    x_ptr, z2_ptr, y_ptr,
    C, HW, stride_hw, stride_c,
    GATE: tl.constexpr, WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x * gate(z2)."""
    offs_nc, mask_c, offs, mask = map_tile(C, HW, stride_hw, stride_c, WIDE, BLOCK_HW, BLOCK_C)
    e = apply_gate(tl.load(z2_ptr + offs_nc, mask_c, 0.0), GATE)
    y = tl.load(x_ptr + offs, mask).to(tl.float32) * e[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _scale_bwd_reduce_kernel(
    dy_ptr, x_ptr, z2_ptr, dz2_ptr,
    C, HW, SPLITS, tiles_per_split, stride_hw, stride_c,
    GATE: tl.constexpr, WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz2 (N, SPLITS, C): gate'(z2) times the sum of dy * x over one part of the map."""
    n, split, block_c = unravel(tl.program_id(0), tl.cdiv(C, BLOCK_C), SPLITS)
    offs_c, mask_c = block_offsets(block_c, BLOCK_C, C)
    start = image_offset(n, HW, C)
    acc = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        offs_hw, mask_hw = block_offsets(tile, BLOCK_HW, HW)
        offs = start + tile_offsets(offs_hw, offs_c, stride_hw, stride_c, WIDE)
        mask = mask_hw[:, None] & mask_c[None, :]
        dy = tl.load(dy_ptr + offs, mask, 0.0).to(tl.float32)
        acc += dy * tl.load(x_ptr + offs, mask, 0.0).to(tl.float32)
    de = tl.sum(acc, axis=0)
    dz2 = de * gate_grad(tl.load(z2_ptr + n.to(tl.int64) * C + offs_c, mask_c, 0.0), GATE)
    tl.store(dz2_ptr + (n * SPLITS + split).to(tl.int64) * C + offs_c, dz2, mask_c)


@triton.jit
def _scale_bwd_kernel(
    dy_ptr, z2_ptr, dq_ptr, dx_ptr,
    C, HW, stride_hw, stride_c,
    GATE: tl.constexpr, WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dy * gate(z2) + dq / HW."""
    offs_nc, mask_c, offs, mask = map_tile(C, HW, stride_hw, stride_c, WIDE, BLOCK_HW, BLOCK_C)
    e = apply_gate(tl.load(z2_ptr + offs_nc, mask_c, 0.0), GATE)
    dq = tl.load(dq_ptr + offs_nc, mask_c, 0.0) / HW
    dx = tl.load(dy_ptr + offs, mask).to(tl.float32) * e[None, :] + dq[None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)


def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (N, C, H, W) in the dtype and layout of x; fp32 q (N, C), z1 (N, R), z2 (N, C) for the backward pass."""
    x = as_dense(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        q = _reduce(_squeeze_kernel, x, [x])
        z1, z2 = excite(q, _matrix(w1), b1, _matrix(w2), b2, act)
        _map(_scale_kernel, x, [x, z2, y], GATE=gate)
    return y, q, z1, z2


def squeeze_excite_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, q: Tensor, z1: Tensor, z2: Tensor, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in the dtype and layout of x; dw1, dw2 in the shapes and dtypes of the weights; db1, db2 in fp32."""
    x = as_dense(x)
    dy = as_layout_of(dy, x)
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        dz2 = _reduce(_scale_bwd_reduce_kernel, x, [dy, x, z2], GATE=gate)
        dq, dw1, db1, dw2, db2 = excite_backward(dz2, q, z1, _matrix(w1), _matrix(w2), act)
        _map(_scale_bwd_kernel, x, [dy, z2, dq, dx], GATE=gate)
    return dx, dw1.view(w1.shape), db1, dw2.view(w2.shape), db2


def _matrix(w: Tensor) -> Tensor:
    """A 1x1 convolution's weight (O, I, 1, 1), or a linear one (O, I), as a contiguous (O, I)."""
    return w.reshape(w.shape[0], w.shape[1]).contiguous()


def _geometry(x: Tensor, tile: Tile) -> dict[str, int | bool]:
    stride_hw, stride_c = hw_c_strides(x)
    _, channels, height, width = x.shape
    return {
        "C": channels,
        "HW": height * width,
        "stride_hw": stride_hw,
        "stride_c": stride_c,
        "WIDE": channels * height * width >= 2**31,
        "BLOCK_HW": tile.block_hw,
        "BLOCK_C": tile.block_c,
        **LAUNCH_OPTIONS,
    }


def _reduce(kernel: triton.JITFunction, x: Tensor, operands: list[Tensor], **flags: str) -> Tensor:
    """Launch a sweep that reduces maps shaped like x to fp32 (N, C), in a fixed order."""
    n, channels, height, width = x.shape
    tile = sweep_tile(x)
    blocks_c, tiles = triton.cdiv(channels, tile.block_c), triton.cdiv(height * width, tile.block_hw)
    tiles_per_split = triton.cdiv(tiles, reduction_splits(n * blocks_c, tiles, x.device))
    splits = max(triton.cdiv(tiles, max(tiles_per_split, 1)), 1)
    partial = x.new_empty((n, splits, channels), dtype=torch.float32)
    # One program owns BLOCK_C channels of one image, over one of `splits` parts of the map.
    grid = (n * splits * blocks_c,)
    if grid[0]:
        parts = {"SPLITS": splits, "tiles_per_split": tiles_per_split}
        kernel[grid](*operands, partial, **parts, **_geometry(x, tile), **flags)
    return partial.sum(1) if splits > 1 else partial[:, 0]


def _map(kernel: triton.JITFunction, x: Tensor, operands: list[Tensor], **flags: str) -> None:
    """Launch a sweep that writes a map shaped like x."""
    n, channels, height, width = x.shape
    tile = sweep_tile(x)
    # One program owns a (BLOCK_HW, BLOCK_C) tile of one image.
    grid = (n * triton.cdiv(height * width, tile.block_hw) * triton.cdiv(channels, tile.block_c),)
    if grid[0]:
        kernel[grid](*operands, **_geometry(x, tile), **flags)

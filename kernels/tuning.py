"""Tile shapes of the sweeps over a feature map: picked from sizes alone, so that no launch ever benchmarks anything."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import is_channels_last

# 4,096 elements over 128 threads are 32 a thread: four 16-byte loads of bf16 in flight, and an fp32 accumulator that
# leaves registers for eight resident programs (64 a thread on sm_90, `setriton bench resources`).
TILE_ELEMENTS = 4096
# Fused multiply-adds said outright: Triton 3.10 changes the default, and results must not depend on the version.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Programs wanted per multiprocessor before a reduction stops being split.
PROGRAMS_PER_SM = 8


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """Block sizes over one image seen as an (HW, C) matrix."""

    block_hw: int
    block_c: int


def sweep_tile(x: Tensor) -> Tile:
    """The tile whose rows run along the dense axis of x, 256 or 1,024 elements wide at most."""
    channels, hw = x.shape[1], x.shape[2] * x.shape[3]
    if is_channels_last(x):
        block_c = min(next_power_of_2(channels), 256)
        return Tile(min(next_power_of_2(hw), TILE_ELEMENTS // block_c), block_c)
    block_hw = min(next_power_of_2(hw), 1024)
    return Tile(block_hw, min(next_power_of_2(channels), TILE_ELEMENTS // block_hw))


def reduction_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts a sum over `tiles` tiles is cut so that `programs` of them fill the device."""
    wanted = PROGRAMS_PER_SM * multiprocessors(device)
    return max(1, min(tiles, wanted // max(programs, 1)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 in Triton's interpreter, so that small tests reach split reductions too."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

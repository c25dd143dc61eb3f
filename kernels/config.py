"""Configurations of the launches: tiles by the size and layout of a map, and what the excitation's products have."""

import dataclasses
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import is_channels_last

# 2,048 elements over 128 threads are 16 a thread: two 16-byte loads of bf16 for each tensor, and two fp32 accumulators
# leave registers for five programs a multiprocessor and more (`setriton bench resources`).
TILE_ELEMENTS = 2048
# A piece of this many tiles reads what it needs of each channel, 20 bytes and more, for 512 pixels: 1 % of its traffic.
TILES_PER_PIECE = 16
# Pieces wanted for each multiprocessor, twice what it runs at once, before a map is cut no further.
PIECES_PER_SM = 12
# Where an image's result must not depend on the batch, its map is cut as in a batch of so many.
USUAL_BATCH = 32
# Part of the L2 cache that one group of images may fill: two groups and what is written meanwhile are there at once.
GROUP_SHARE = 1 / 8
# Registers a thread of the excitation's products may have. Left alone, ptxas spills: in the forward kernel at 80 where
# SE alone needs 98 and the products of 64 hidden units 150, in the gradients' at 128 of 162 for sm_120.
EXCITE_MAXNREG = 168
# Where neither C nor R is a multiple of 16, each element has an address and a mask: more registers, for fewer images.
UNALIGNED_MAXNREG, UNALIGNED_IMAGES = 208, 32
# And those of its gradients, of eight warps: five sums of each element have an address each. Sums over images take 16
# of them at a time, and two stages of the loop: with 64 and three, 1,000 bytes a thread were spilled.
GRADIENTS_MAXNREG = 255


@dataclass(frozen=True)
class Pieces:
    """A sweep cut into pieces: `images` whole images, or one part in `splits` of an image; and block_c channels."""

    splits: int
    images: int
    tiles_per_split: int

    @classmethod
    def of(cls, hw: int, block_hw: int, tiles: int, most_images: int = 2**31) -> "Pieces":
        """Pieces of at most `tiles` tiles of block_hw pixels, or of one image, and of at most `most_images`."""
        in_image = -(-hw // block_hw)
        splits = max(1, -(-in_image // tiles))
        images = min(most_images, max(1, tiles * block_hw // max(hw, 1))) if splits == 1 else 1
        return cls(splits, images, max(1, -(-in_image // splits)))

    def count(self, n: int) -> int:
        """Pieces of n images, over one block of channels."""
        return -(-n // self.images) * self.splits


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep is cut: tiles (block_hw, block_c), at most `tiles` of them in a piece, `num_warps` a program.

    maxnreg: registers a thread may have, on NVIDIA; None leaves it to ptxas.
    """

    block_hw: int
    block_c: int
    tiles: int
    num_warps: int
    maxnreg: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ForwardConfig(SweepConfig):
    """And into how many launches the forward pass is cut: 1; 2, y apart; 3, batch statistics apart as well."""

    launches: int
    group_kib: int
    maxnreg: int | None = field(default=EXCITE_MAXNREG, kw_only=True)


def sweep_config(x: Tensor, elements: int = TILE_ELEMENTS, tiles: int = TILES_PER_PIECE) -> SweepConfig:
    """Tiles whose rows are 128 bytes of bf16 or more along the dense axis of x; 8 channels at least, for the bits."""
    channels, hw = x.shape[1], x.shape[2] * x.shape[3]
    if is_channels_last(x):
        block_c = min(max(next_power_of_2(channels), 8), 64)
        block_hw = min(next_power_of_2(hw), elements // block_c)
    else:
        block_hw = min(next_power_of_2(hw), elements // 8)
        block_c = min(max(next_power_of_2(channels), 8), elements // block_hw)
    return SweepConfig(block_hw, block_c, tiles, 4)


def forward_config(x: Tensor, training: bool, l2_bytes: int) -> ForwardConfig:
    """Training couples the whole batch, so that nothing is read twice from the cache: three plain launches.

    Of maps whose rows have no common alignment each element has an address and a mask: tiles of 2,048 spilled 80 bytes
    a thread in the statistics' sweep (Triton 3.6, sm_90); of half, more programs run at once.
    """
    has_rows = is_channels_last(x) or x.shape[2] * x.shape[3] % 16 == 0
    sweep = sweep_config(x) if has_rows or not training else sweep_config(x, TILE_ELEMENTS // 2, 2 * TILES_PER_PIECE)
    group_kib = int(GROUP_SHARE * l2_bytes) // 1024
    tile = sweep.block_hw, sweep.block_c, sweep.tiles, sweep.num_warps
    return ForwardConfig(*tile, launches=3 if training else 1, group_kib=group_kib)


def backward_config(x: Tensor, has_act: bool) -> SweepConfig:
    """Behind an activation five sums are kept, not two: smaller tiles keep them in registers, and a limit where rows
    have no common alignment, for ptxas stops at 128 and spills."""
    if not has_act:
        return sweep_config(x)
    row = x.shape[1] if is_channels_last(x) else x.shape[2] * x.shape[3]
    found = sweep_config(x, TILE_ELEMENTS // 2, 2 * TILES_PER_PIECE)
    return dataclasses.replace(found, maxnreg=EXCITE_MAXNREG) if row % 16 else found


def excite_blocks(images: int, r: int) -> dict[str, int]:
    """Tiles of the excitation's products, of at most `images` images at once: as many as fit a tile of 64, so that each
    weight is read once for them; chunks of 128 channels, so that 2,048 of them keep 16 programs a tile busy."""
    return {
        "BLOCK_N": min(max(next_power_of_2(images), 16), 64),
        "BLOCK_R": min(max(next_power_of_2(r), 16), 32),
        "BLOCK_K": 32,
        "CHUNK": 128,
        "BLOCK_G": 32,
    }


def launch_options(num_warps: int, maxnreg: int | None = None) -> dict[str, int | bool]:
    """Fused multiply-adds are said outright: Triton 3.10 changes the default, and results must not depend on it."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    return options if maxnreg is None or is_amd() else options | {"maxnreg": maxnreg}


def dot_precision() -> str:
    """Products of fp32 matrices: three TF32 products on NVIDIA, the fp32 matrix instructions on AMD."""
    return "ieee" if is_amd() else "tf32x3"


def is_amd() -> bool:
    return torch.version.hip is not None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; in Triton's interpreter, one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; 256 KiB in the interpreter, so that small tests reach several groups of images."""
    if device.type != "cuda":
        return 2**18
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2**25

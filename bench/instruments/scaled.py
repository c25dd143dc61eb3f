"""Candidates of tuning on maps small enough for the interpreter, cut in the same way as on a network's maps.

A candidate is a tile and numbers that say how a map is cut: into parts or into several images a piece, into columns of
channels, into groups of images, with something left over at each end. All of that is kept. What is only many becomes
two or three, and the tiles of the excitation's products shrink with the images and channels that they hold.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from setriton.kernels import backward, forward, tuning
from setriton.kernels.cases import DTYPES, LAYOUTS, Case, Machine
from setriton.kernels.config import ForwardConfig, Pieces, SweepConfig, next_power_of_2
from setriton.kernels.trials import Trial

# One image in place of 32, one hidden unit in place of 8: tiles of 64 images and 32 units become tiles of 2 and 4.
_IMAGES, _HIDDEN = 32, 8


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A small map, its hidden units, and a configuration that cuts it as another cuts a large map."""

    case: Case
    hidden: int
    config: SweepConfig

    def outputs(self) -> dict[str, Tensor]:
        """All that a launch computes in floating point, in the interpreter."""
        with _small_tiles(self.case.channels, chunks=3):
            return Trial(self.case, torch.device("cpu"), hidden=self.hidden).outputs(self.config)


def scaled(case: Case, found: SweepConfig) -> Scaled:
    """A candidate of a case, scaled down."""
    columns = -(-case.channels // found.block_c)
    channels = found.block_c * (min(columns, 2) - 1) + case.channels - found.block_c * (columns - 1)
    pieces, in_map = Pieces.of(case.hw, found.block_hw, found.tiles), -(-case.hw // found.block_hw)
    rest = case.hw - found.block_hw * (in_map - 1)
    if pieces.splits > 1:
        # As many parts, up to three; a part of two tiles where it had several; the last one shorter where it was.
        tiles = min(pieces.tiles_per_split, 2)
        is_ragged = in_map % pieces.splits > 0 and tiles > 1
        in_map = tiles * min(pieces.splits, 3) - is_ragged
    else:
        in_map = min(in_map, 2)
    hw = found.block_hw * (in_map - 1) + rest
    if pieces.splits == 1:
        tiles = max(in_map, -(-min(pieces.images, 3) * hw // found.block_hw))
    n = -(-case.n // _IMAGES) + (case.n > 1)  # odd for the usual batch: the last group has fewer
    changes: dict[str, Any] = {"tiles": tiles, "num_warps": 4, "maxnreg": None}
    if isinstance(found, ForwardConfig):
        # A group of KiB may hold more small images than wanted; never fewer than one.
        group = -(-tuning._images_of_a_group(case, found.group_kib) // _IMAGES)
        image_bytes = channels * hw * DTYPES[case.dtype].itemsize
        is_grouped = found.launches == 1
        changes["group_kib"] = max(1, -(-group * image_bytes // 1024)) if is_grouped else 1
    hidden = max(1, min(case.channels // 16 // _HIDDEN, 7))
    small = dataclasses.replace(case, n=n, channels=channels, hw=hw)
    return Scaled(small, hidden, dataclasses.replace(found, **changes))


def all_scaled(cases: Iterable[Case], machine: Machine) -> list[Scaled]:
    """What differs among the candidates of cases, each once, in a fixed order."""
    found = (scaled(case, each) for case in cases for each in tuning.candidates_of(case, machine))
    return list(dict.fromkeys(found))


def cases_of_networks(batch_size: int, names: Iterable[str]) -> list[Case]:
    """Cases of the maps of networks, in each dtype and layout that can be tuned; networks without SE have none."""
    from setriton.tune_plan import maps_of_model

    maps: dict[tuple[str, tuple[int, ...]], None] = {}
    for name in names:
        with contextlib.suppress(ValueError):
            maps |= dict.fromkeys(maps_of_model(name, batch_size))
    return [
        Case.of(kind, shape, dtype, layout) for kind, shape in maps for dtype in DTYPES for layout in LAYOUTS
    ]  # fmt: skip


@contextlib.contextmanager
def _small_tiles(channels: int, chunks: int) -> Iterator[None]:
    """Within, products of the excitation have a few tiles and chunks of so many channels."""
    block_k = min(32, next_power_of_2(-(-channels // chunks)))
    blocks = {
        "BLOCK_N": 64 // _IMAGES,
        "BLOCK_R": 32 // _HIDDEN,
        "BLOCK_K": block_k,
        "CHUNK": block_k * max(1, -(-channels // block_k // chunks)),
        "BLOCK_G": next_power_of_2(-(-channels // chunks)),
    }

    def excite_blocks(n: int, r: int) -> dict[str, int]:
        return blocks

    with contextlib.ExitStack() as stack:
        for module in (forward, backward):
            stack.enter_context(mock.patch.object(module, "excite_blocks", excite_blocks))
        yield

"""Cases to be configured: kinds of launches on maps of some size, and what the cost model picks for them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch

from . import config
from .config import Pieces, SweepConfig, next_power_of_2
from .layout import is_channels_last

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
Config = TypeVar("Config", bound=SweepConfig)


@dataclass(frozen=True)
class Kind:
    """What the model knows of one kind of launch.

    `registers` of a thread, fixed and for each element of the tile it holds: an envelope over dtypes, layouts and
    activations of what Triton 3.9 compiled for sm_90. `vectors`: float32 values of a channel that a piece reads or
    writes. `loads`: maps read at once in the sweep that reads the fewest. `passes` over the map, `bn_act` as tried.
    """

    registers: tuple[int, float]
    vectors: int
    loads: int
    passes: int
    bn_act: str | None = "identity"
    training: bool = True
    is_forward: bool = True

    @property
    def is_per_image(self) -> bool:
        """Whether an image's result is its own: then its bits may not depend on the batch it comes in."""
        return self.is_forward and not self.training


# Most telling first: this is the order of measuring.
KINDS = {
    "bn-training": Kind((56, 4.2), vectors=8, loads=1, passes=4),
    "bn-backward": Kind((42, 6.0), vectors=14, loads=2, passes=6, is_forward=False),
    "bn-evaluation": Kind((56, 3.6), vectors=6, loads=1, passes=4, training=False),
    "se": Kind((40, 2.7), vectors=2, loads=1, passes=3, bn_act=None, training=False),
    "se-backward": Kind((26, 2.8), vectors=3, loads=1, passes=4, bn_act=None, training=False, is_forward=False),
    "bn-act-training": Kind((52, 4.7), vectors=13, loads=1, passes=4, bn_act="silu"),
    "bn-act-backward": Kind((104, 5.6), vectors=17, loads=2, passes=5, bn_act="silu", is_forward=False),
}


def kind_of(bn_act: str | None, training: bool, is_forward: bool) -> str:
    """The name of the kind of a launch; bn_act is None without BN."""
    if not is_forward:
        return "se-backward" if bn_act is None else "bn-backward" if bn_act == "identity" else "bn-act-backward"
    if bn_act is None:
        return "se"
    return "bn-evaluation" if not training else "bn-training" if bn_act == "identity" else "bn-act-training"


@dataclass(frozen=True)
class Case:
    """A launch to configure: its kind, the map (N, C, H * W), its dtype and layout by name."""

    kind: str
    n: int
    channels: int
    hw: int
    dtype: str
    layout: str

    @classmethod
    def of(cls, kind: str, shape: Sequence[int], dtype: str = "bfloat16", layout: str = "channels_last") -> Self:
        """Of a map (N, C, H, W).

        Raises:
            ValueError: an unknown kind, dtype or layout, or a size below 1.
        """
        for name, value, choices in (("kind", kind, KINDS), ("dtype", dtype, DTYPES), ("layout", layout, LAYOUTS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape must be N, C, H, W of at least 1; got {tuple(shape)}")
        n, channels, height, width = shape
        case = cls(kind, n, channels, height * width, dtype, layout)
        # Maps of one pixel, or of one channel, are dense in both layouts: the kernels choose.
        return dataclasses.replace(case, layout="channels_last" if is_channels_last(case.map()) else "contiguous")

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Sizes rounded up to powers of two: maps of one bucket can use the same tiles.

        One bucket of every batch where an image's result may not depend on it.
        """
        n = config.USUAL_BATCH if KINDS[self.kind].is_per_image else self.n
        return next_power_of_2(n), next_power_of_2(self.channels), next_power_of_2(self.hw)

    def map(self, device: torch.device | str = "meta") -> torch.Tensor:
        """An uninitialized map of the case."""
        shape, layout = (self.n, self.channels, self.hw, 1), LAYOUTS[self.layout]
        return torch.empty(shape, dtype=DTYPES[self.dtype], device=device, memory_format=layout)

    def __str__(self) -> str:
        return f"{self.kind} {self.n}x{self.channels}x{self.hw} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU."""

    multiprocessors: int
    l2_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """The machine behind a device."""
        return cls(config.multiprocessors(device), config.l2_bytes(device))


H200 = Machine(132, 60 * 2**20)


def pick(case: Case, machine: Machine) -> SweepConfig:
    """The cost model's own choice."""
    kind, x = KINDS[case.kind], case.map()
    if not kind.is_forward:
        return _fill(config.backward_config(x, kind.bn_act not in (None, "identity")), case, machine)
    return _fill(config.forward_config(x, kind.training, machine.l2_bytes), case, machine)


def fitted(found: SweepConfig, measured: Case, case: Case, machine: Machine) -> SweepConfig:
    """What was measured on one map, for another: tiles as large that fit it, and as many pieces as there were."""
    elements = found.block_hw * found.block_c
    rows, columns = next_power_of_2(case.hw), max(next_power_of_2(case.channels), 8)
    if case.layout == "channels_last":
        block_c = min(found.block_c, columns)
        block_hw = min(rows, elements // block_c)
    else:
        block_hw = min(found.block_hw, rows)
        block_c = min(columns, elements // block_hw)
    tile = dataclasses.replace(found, block_hw=block_hw, block_c=block_c)
    if KINDS[case.kind].is_per_image:
        measured = dataclasses.replace(measured, n=config.USUAL_BATCH)
    return _fill(tile, case, machine, programs(measured, found))


def programs(case: Case, found: SweepConfig) -> int:
    """Programs of one sweep over the map."""
    pieces = Pieces.of(case.hw, found.block_hw, found.tiles)
    return pieces.count(case.n) * -(-case.channels // found.block_c)


def _fill(found: Config, case: Case, machine: Machine, most: int = 2**62) -> Config:
    """With pieces short enough for as many as the model wants, or for `most`.

    Where an image's sums may not depend on its batch, the usual batch decides how a map is cut, and the batch at hand
    only how many whole maps make a piece.
    """
    wanted = min(most, config.PIECES_PER_SM * machine.multiprocessors)
    if not KINDS[case.kind].is_per_image:
        return _shorten(found, case, wanted)
    whole = max(1, -(-case.hw // found.block_hw))
    # A map of two tiles is whole: its halves would gain little for one image, and be many for a hundred.
    cut = _shorten(found, dataclasses.replace(case, n=config.USUAL_BATCH), wanted, min(whole, 2))
    return cut if cut.tiles < whole else _shorten(found, case, wanted, whole)


def _shorten(found: Config, case: Case, wanted: int, least: int = 1) -> Config:
    """With pieces of half the tiles, and half of that, down to `least`, until there are as many as wanted."""
    while found.tiles > least and programs(case, found) < wanted:
        found = dataclasses.replace(found, tiles=max(least, found.tiles // 2))
    return found

"""Bytes that kernels move, counted: each load and store of a function's launches in Triton's interpreter.

Counts are of bytes and of 32-byte sectors, the unit of memory transfers: a kernel whose programs read one channel each
of a channels_last map asks for few bytes and moves 16 times as many.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .instruments import accesses
from .instruments.accesses import Watcher
from .instruments.interpreter import watched_by

SECTOR = 32
# L2 caches keep and evict lines of four sectors.
LINE = 128


@dataclass
class Access:
    """What one kernel did to one tensor: bytes asked for, and bytes of the sectors touched."""

    loaded: int = 0
    stored: int = 0
    loaded_sectors: int = 0
    stored_sectors: int = 0


@dataclass
class Launch:
    """One kernel launch; `tensors` is keyed by the kernel's parameter names, without _ptr."""

    kernel: str
    tensors: dict[str, Access] = field(default_factory=dict)


@dataclass
class Traffic:
    """All launches of a function, and what of it reaches HBM behind an L2 cache of `l2_bytes` (0: none is modelled)."""

    launches: list[Launch] = field(default_factory=list)
    hbm_loaded: int = 0
    hbm_stored: int = 0

    @property
    def requested(self) -> int:
        """Bytes loaded and stored."""
        return sum(a.loaded + a.stored for launch in self.launches for a in launch.tensors.values())

    @property
    def sectors(self) -> int:
        """Bytes of the sectors loaded and stored: at least `requested`, more where accesses are scattered."""
        return sum(a.loaded_sectors + a.stored_sectors for launch in self.launches for a in launch.tensors.values())

    @property
    def hbm(self) -> int:
        """Bytes between the modelled L2 and HBM."""
        return self.hbm_loaded + self.hbm_stored

    def passes(self, feature_map: torch.Tensor) -> float:
        """Sectors moved, in sizes of a feature map."""
        return self.sectors / feature_map.nbytes

    def hbm_passes(self, feature_map: torch.Tensor) -> float:
        """Bytes between L2 and HBM, in sizes of a feature map."""
        return self.hbm / feature_map.nbytes


def measure_traffic(function: Callable[[], Any], l2_bytes: int = 0) -> Traffic:
    """Run a function whose kernels are interpreted, and count what they load and store.

    Args:
        function: calls launchers or ops with tensors on the CPU.
        l2_bytes: size of an L2 cache with least-recently-used eviction, in front of HBM; it starts and ends empty.
            Programs run one after another here and side by side on a GPU, so this is the best a launch order can do.

    Raises:
        RuntimeError: the process does not interpret kernels (TRITON_INTERPRET=1 must be set when it starts).
    """
    traffic, cache = Traffic(), _Cache(l2_bytes)
    with watched_by(_Recorder(traffic, cache)):
        function()
    cache.flush()
    traffic.hbm_loaded, traffic.hbm_stored = cache.loaded, cache.stored
    return traffic


class _Recorder(Watcher):
    """Attributes each access to the tensor argument of the running launch that it falls into."""

    def __init__(self, traffic: Traffic, cache: "_Cache") -> None:
        self.traffic = traffic
        self.cache = cache

    def begin(self, launch: accesses.Launch) -> None:
        names = [name.removesuffix("_ptr") for name in launch.tensors]
        self.tensors = {name: Access() for name in names}
        self.traffic.launches.append(Launch(launch.kernel, self.tensors))

    def load(self, access: accesses.Access) -> None:
        counted, sectors = self.tensors[access.argument.name], _units(access.addresses, SECTOR)
        counted.loaded += access.addresses.size * access.size
        counted.loaded_sectors += sectors.size * SECTOR
        self.cache.load(_units(access.addresses, LINE))

    def store(self, access: accesses.Access) -> None:
        counted, sectors = self.tensors[access.argument.name], _units(access.addresses, SECTOR)
        counted.stored += access.addresses.size * access.size
        counted.stored_sectors += sectors.size * SECTOR
        self.cache.store(_units(access.addresses, LINE))


class _Cache:
    """Lines kept in order of use. A store needs no load first: sweeps write whole lines."""

    def __init__(self, size: int) -> None:
        self.capacity = size // LINE
        self.lines: OrderedDict[int, bool] = OrderedDict()  # line -> written since it came
        self.loaded = 0
        self.stored = 0

    def load(self, lines: npt.NDArray[np.int64]) -> None:
        for line in lines.tolist():
            if line in self.lines:
                self.lines.move_to_end(line)
            else:
                self.loaded += LINE
                self._add(line, written=False)

    def store(self, lines: npt.NDArray[np.int64]) -> None:
        for line in lines.tolist():
            self._add(line, written=True)

    def flush(self) -> None:
        """Write back what was written and not yet evicted."""
        self.stored += LINE * sum(self.lines.values())
        self.lines.clear()

    def _add(self, line: int, *, written: bool) -> None:
        self.lines[line] = written
        self.lines.move_to_end(line)
        if len(self.lines) > self.capacity:
            _, evicted_written = self.lines.popitem(last=False)
            self.stored += LINE * evicted_written


def _units(addresses: accesses.Addresses, unit: int) -> npt.NDArray[np.int64]:
    """Numbers of the sectors or lines that one access touches; elements are aligned, so none straddles two."""
    return np.unique(addresses.astype(np.int64) // unit)

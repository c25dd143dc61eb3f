"""Bytes that kernels move, counted: each load and store of a function's launches in Triton's interpreter.

Counts are of bytes and of 32-byte sectors, the unit of memory transfers: a kernel whose programs read one channel each
of a channels_last map asks for few bytes and moves 16 times as many.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

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
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: start the process with TRITON_INTERPRET=1")
    traffic, cache = Traffic(), _Cache(l2_bytes)
    recorder = _Recorder(traffic, cache)
    builder = interpreter.InterpreterBuilder
    with (
        _wrapped(interpreter.GridExecutor, "__call__", recorder.launch),
        _wrapped(builder, "create_masked_load", recorder.load),
        _wrapped(builder, "create_masked_store", recorder.store),
    ):
        function()
    cache.flush()
    traffic.hbm_loaded, traffic.hbm_stored = cache.loaded, cache.stored
    return traffic


class _Recorder:
    """Attributes each access to the tensor argument of the running launch that it falls into."""

    def __init__(self, traffic: Traffic, cache: "_Cache") -> None:
        self.traffic = traffic
        self.cache = cache
        self.spans: list[tuple[int, int, Access]] = []

    def launch(self, original: Callable[..., Any], executor: Any, *arguments: Any, **options: Any) -> Any:
        launch = Launch(executor.fn.__name__)
        self.traffic.launches.append(launch)
        self.spans = []
        for name, value in {**dict(zip(executor.arg_names, arguments, strict=False)), **options}.items():
            if isinstance(value, torch.Tensor):
                access = launch.tensors.setdefault(name.removesuffix("_ptr"), Access())
                start = value.untyped_storage().data_ptr()
                self.spans.append((start, start + value.untyped_storage().nbytes(), access))
        return original(executor, *arguments, **options)

    def load(self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses, size = _addresses(pointers, mask)
        if addresses.size:
            access, sectors = self._access(addresses), _units(addresses, SECTOR)
            access.loaded += addresses.size * size
            access.loaded_sectors += sectors.size * SECTOR
            self.cache.load(_units(addresses, LINE))
        return original(builder, pointers, mask, *rest)

    def store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        addresses, size = _addresses(pointers, mask)
        if addresses.size:
            access, sectors = self._access(addresses), _units(addresses, SECTOR)
            access.stored += addresses.size * size
            access.stored_sectors += sectors.size * SECTOR
            self.cache.store(_units(addresses, LINE))
        return original(builder, pointers, value, mask, *rest)

    def _access(self, addresses: npt.NDArray[np.int64]) -> Access:
        low, high = int(addresses.min()), int(addresses.max())
        for start, end, access in self.spans:
            if start <= low and high < end:
                return access
        raise IndexError(f"a kernel touches addresses {low} to {high}, outside each of its arguments")


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


@contextlib.contextmanager
def _wrapped(owner: type, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        return wrapper(original, *arguments, **options)

    with mock.patch.object(owner, name, call):
        yield


def _addresses(pointers: Any, mask: Any) -> tuple[npt.NDArray[np.int64], int]:
    """Addresses of the elements that the mask lets through, and the bytes of one."""
    addresses = np.asarray(pointers.data).astype(np.int64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)], size


def _units(addresses: npt.NDArray[np.int64], unit: int) -> npt.NDArray[np.int64]:
    """Numbers of the sectors or lines that one access touches; elements are aligned, so none straddles two."""
    return np.unique(addresses // unit)

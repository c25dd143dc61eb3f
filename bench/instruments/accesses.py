"""Launches and accesses of interpreted kernels, as those who watch them are told."""

import math
import os
import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Addresses = npt.NDArray[np.uint64]


class MemoryFault(RuntimeError):
    """A kernel does to memory what it must not."""


class OutOfBounds(MemoryFault):
    """An address lies outside the tensor that its pointer was made of."""


class Argument:
    """A tensor that a launch was given: the bytes from `start` to `end`, without the gaps between its elements."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.data_ptr()
        self.end = self.start + (elements * tensor.element_size() if tensor.numel() else 0)
        self.own: npt.NDArray[np.bool_] | None = None
        if tensor.numel() not in (0, elements):
            self.own = np.zeros(elements, bool)
            np.lib.stride_tricks.as_strided(self.own, tensor.shape, tensor.stride())[...] = True

    def holds(self, addresses: Addresses, size: int) -> npt.NDArray[np.bool_]:
        """Of each element of `size` bytes, whether it lies in the tensor."""
        inside = (addresses >= self.start) & (addresses + np.uint64(size) <= self.end)
        if self.own is None:
            return inside
        item = self.tensor.element_size()
        ends = [(addresses - np.uint64(self.start) + np.uint64(offset)) // np.uint64(item) for offset in (0, size - 1)]
        return np.logical_and.reduce([inside, *(self.own.take(index.astype(np.int64), mode="clip") for index in ends)])

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.tensor.shape))
        return f"{self.name} ({shape}) {str(self.tensor.dtype).removeprefix('torch.')}"


@dataclass
class Launch:
    """One launch: its kernel's name, its grid, its tensors and its numbers by parameter."""

    kernel: str
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    grid: tuple[int, int, int] = (0, 0, 0)
    arguments: list[Argument] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


@dataclass
class Access:
    """What one program does in one instruction to one tensor: the addresses of its lanes, masked ones left out."""

    launch: Launch
    program: int
    argument: Argument
    addresses: Addresses
    size: int

    def __str__(self) -> str:
        return f"{self.launch.kernel}: program {self.program} at {kernel_line()}"


@dataclass
class Atomic(Access):
    """And what an atomic orders, what it found in its first lane, and whether it left that as it was."""

    acquires: bool
    releases: bool
    found: int | float
    is_changed: bool
    result: Any = None


class Watcher:
    """Told of each launch and of each access, after the bounds were checked and, for atomics, after it was made."""

    # Whether others are to be told first: it may let other programs run.
    is_last = False

    def begin(self, launch: Launch) -> None:
        """Before the first program; the grid is not known yet."""

    def load(self, access: Access) -> None: ...
    def store(self, access: Access) -> None: ...
    def atomic(self, access: Atomic) -> None: ...
    def end(self, launch: Launch) -> None:
        """After the last program, or after one that failed."""


def kernel_line() -> str:
    """Files and lines of the kernel that is at work, from its body to the function it is in."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_qualname not in ("GridExecutor.__call__", "Thread.run"):
        name, code = frame.f_code.co_filename, frame.f_code.co_qualname
        if "/triton/" not in name and "/unittest/" not in name and os.path.dirname(name) != os.path.dirname(__file__):
            lines.append(f"{name.rpartition('/')[2]}:{frame.f_lineno} {code}")
        frame = frame.f_back
    return " in ".join(lines)

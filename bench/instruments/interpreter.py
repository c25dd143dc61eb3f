"""What interpreted kernels do to memory, told to those who watch: launches, loads, stores and atomics.

Every pointer that a kernel is given carries the number of its argument in the bits that no address has. Arithmetic
leaves them alone, so each access is held against the tensor it was meant for, and never against a neighbour.
"""

import contextlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from torch import Tensor

Addresses = npt.NDArray[np.uint64]
# Of an address; the bits above hold the argument's number.
BITS = 48
_ADDRESS = np.uint64(2**BITS - 1)
_BITS = np.uint64(BITS)


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


@contextlib.contextmanager
def watched_by(*watchers: Watcher) -> Iterator[None]:
    """Tell these of what happens within.

    Raises:
        RuntimeError: the process does not interpret kernels (TRITON_INTERPRET=1 must be set when it starts).
        OutOfBounds: in the launch, when an address lies outside the tensor it was made of.
    """
    from triton import knobs

    if not knobs.runtime.interpret:
        raise RuntimeError("kernels are watched in Triton's interpreter: start the process with TRITON_INTERPRET=1")
    with contextlib.ExitStack() as stack:
        if not _hooks.watchers:
            stack.enter_context(_hooks.installed())
        before = _hooks.watchers
        _hooks.watchers = sorted([*before, *watchers], key=lambda watcher: watcher.is_last)
        try:
            yield
        finally:
            _hooks.watchers = before


def kernel_line() -> str:
    """Files and lines of the kernel that is at work, from its body to the function it is in."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and frame.f_code.co_qualname not in ("GridExecutor.__call__", "Thread.run"):
        name, code = frame.f_code.co_filename, frame.f_code.co_qualname
        if "/triton/" not in name and "/unittest/" not in name and os.path.dirname(name) != os.path.dirname(__file__):
            lines.append(f"{name.rpartition('/')[2]}:{frame.f_lineno} {code}")
        frame = frame.f_back
    return " in ".join(lines)


class _Hooks:
    """Where Triton's interpreter is listened to: launches, pointers made of tensors, and its four ways to memory."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self.launch: Launch | None = None
        self.patched: set[int] = set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        from triton.runtime import interpreter

        memory = interpreter._interpreter
        self.builder = interpreter.interpreter_builder
        self.acquiring = {memory.MEM_SEMANTIC.ACQUIRE, memory.MEM_SEMANTIC.ACQUIRE_RELEASE}
        self.releasing = {memory.MEM_SEMANTIC.RELEASE, memory.MEM_SEMANTIC.ACQUIRE_RELEASE}
        with contextlib.ExitStack() as stack:
            for owner, name, wrapper in (
                (interpreter.GridExecutor, "__call__", self._call),
                (interpreter.InterpreterBuilder, "set_grid_dim", self._set_grid_dim),
                (interpreter, "_implicit_cvt", self._convert),
                (interpreter, "_patch_lang", self._patch),
                (memory, "load", self._load),
                (memory, "store", self._store),
                (memory, "atomic_rmw", self._atomic_rmw),
                (memory, "atomic_cas", self._atomic_cas),
            ):
                stack.enter_context(wrapped(owner, name, wrapper))
            yield

    def _call(self, original: Callable[..., Any], executor: Any, *arguments: Any, **options: Any) -> Any:
        given = {**dict(zip(executor.arg_names, arguments, strict=False)), **options}
        given = {name: value for name, value in given.items() if name in executor.arg_names}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in given.items() if isinstance(value, int | float | str | bool)}
        self.patched = set()
        self.launch = launch = Launch(inspect.unwrap(executor.fn).__name__, tensors, numbers)
        try:
            for watcher in self.watchers:
                watcher.begin(launch)
            return original(executor, *arguments, **options)
        finally:
            for watcher in self.watchers:
                watcher.end(launch)
            self.launch = None

    def _set_grid_dim(self, original: Callable[..., Any], builder: Any, *grid: int) -> None:
        if self.launch is not None:
            self.launch.grid = (grid[0], grid[1], grid[2])
        original(builder, *grid)

    def _convert(self, original: Callable[..., Any], value: Any) -> Any:
        """The kernel's view of an argument: a pointer gets the argument's number."""
        result = original(value)
        if self.launch is not None and hasattr(value, "data_ptr"):
            names = [
                n for n, t in self.launch.tensors.items() if t.data_ptr() == value.data_ptr() and t.shape == value.shape
            ]
            self.launch.arguments.append(Argument((names or ["a tensor"])[0].removesuffix("_ptr"), value))
            result.handle.data = result.handle.data | np.uint64(len(self.launch.arguments) << BITS)
        return result

    def _patch(self, original: Callable[..., Any], function: Any) -> Any:
        """Once a launch: patching the language at each call of a device function is half of the interpreter's time."""
        import triton.language as tl

        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if self.launch is not None and languages <= self.patched:
            return None
        self.patched |= languages
        return original(function)

    def _access(self, pointers: Any, mask: Any, size: int, verb: str) -> Access | None:
        launch = self.launch
        assert launch is not None
        marked = np.asarray(pointers)
        mask = np.asarray(mask)
        marked = marked.ravel() if mask.all() else marked[np.broadcast_to(mask, marked.shape)]
        if not marked.size:
            return None
        x, y, z = self.builder.grid_idx
        program = (x * launch.grid[1] + y) * launch.grid[2] + z
        low, high = int(marked.min()), int(marked.max())
        number = low >> BITS
        argument = launch.arguments[number - 1] if 0 < number <= len(launch.arguments) else None
        access = Access(launch, program, argument or launch.arguments[0], marked & _ADDRESS, size)
        mark = number << BITS
        if (
            argument is None
            or argument.own is not None
            or low < mark + argument.start
            or high + size > mark + argument.end
        ):
            self._check(access, marked >> _BITS, verb)
        return access

    def _check(self, access: Access, numbers: Addresses, verb: str) -> None:
        for number in np.unique(numbers).tolist():
            if not 0 < number <= len(access.launch.arguments):
                raise OutOfBounds(f"{access} {verb} at an address that comes from no tensor")
            argument, addresses = access.launch.arguments[number - 1], access.addresses[numbers == number]
            wrong = addresses[~argument.holds(addresses, access.size)]
            if wrong.size:
                offsets = wrong.astype(np.int64) - argument.start
                raise OutOfBounds(
                    f"{access} {verb} {wrong.size} elements of {access.size} bytes outside {argument}: "
                    f"at bytes {offsets.min()} to {offsets.max()} of {argument.end - argument.start}"
                )
        if np.unique(numbers).size > 1:
            raise OutOfBounds(f"{access} {verb} in several tensors at once, which is not understood")

    def _load(self, original: Callable[..., Any], pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        access = self._access(pointers, mask, np.dtype(dtype).itemsize, "loads")
        if access is not None:
            for watcher in self.watchers:
                watcher.load(access)
        return original(np.asarray(pointers) & _ADDRESS, mask, other, dtype)

    def _store(self, original: Callable[..., Any], pointers: Any, values: Any, mask: Any) -> Any:
        access = self._access(pointers, mask, values.itemsize, "stores")
        if access is not None:
            for watcher in self.watchers:
                watcher.store(access)
        return original(np.asarray(pointers) & _ADDRESS, values, mask)

    def _atomic_rmw(
        self, original: Callable[..., Any], operation: Any, pointers: Any, values: Any, mask: Any, order: Any
    ) -> Any:
        return self._atomic(
            lambda plain: original(operation, plain, values, mask, order), pointers, values, mask, order
        )

    def _atomic_cas(self, original: Callable[..., Any], pointers: Any, wanted: Any, values: Any, order: Any) -> Any:
        mask = np.ones(np.shape(pointers), bool)
        return self._atomic(lambda plain: original(plain, wanted, values, order), pointers, values, mask, order)

    def _atomic(self, make: Callable[[Any], Any], pointers: Any, values: Any, mask: Any, order: Any) -> Any:
        access = self._access(pointers, mask, values.itemsize, "changes")
        found = make(np.asarray(pointers) & _ADDRESS)
        if access is None:
            return found
        before = np.asarray(found)[np.broadcast_to(mask, np.shape(found))]
        after = memory_at(access.addresses, before.dtype)
        atomic = Atomic(
            **vars(access), acquires=order in self.acquiring, releases=order in self.releasing,
            found=before.flat[0].item(), is_changed=bool((before != after).any()), result=found,
        )  # fmt: skip
        for watcher in self.watchers:
            watcher.atomic(atomic)
        return found


def memory_at(addresses: Addresses, dtype: Any) -> npt.NDArray[Any]:
    """What stands there now, an element of a dtype at each address."""
    from triton.runtime.interpreter import _interpreter

    ones = np.ones(addresses.shape, bool)
    return np.asarray(_read(_interpreter)(addresses, ones, np.zeros(addresses.shape, dtype), np.dtype(dtype)))


def _read(memory: Any) -> Callable[..., Any]:
    return getattr(memory.load, "original", memory.load)


@contextlib.contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """`owner.name(...)` is `wrapper(original, ...)`."""
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        return wrapper(original, *arguments, **options)

    call.original = original  # type: ignore[attr-defined]
    with mock.patch.object(owner, name, call):
        yield


_hooks = _Hooks()

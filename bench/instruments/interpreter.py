"""What interpreted kernels do to memory, told to those who watch: launches, loads, stores and atomics.

Every pointer that a kernel is given carries the number of its argument in the bits that no address has. Arithmetic
leaves them alone, so each access is held against the tensor it was meant for, and never against a neighbour.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .accesses import Access, Addresses, Argument, Atomic, Launch, OutOfBounds, Watcher

# Of an address; the bits above hold the argument's number.
BITS = 48
_ADDRESS = np.uint64(2**BITS - 1)
_BITS = np.uint64(BITS)


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


class _Hooks:
    """Where Triton's interpreter is listened to: launches, pointers made of tensors, and its four ways to memory."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self.launch: Launch | None = None
        self.is_wide = True
        self.patched: set[int] = set()
        self.dtypes: dict[str, Any] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        from triton._C.libtriton import ir
        from triton.runtime import interpreter

        memory = interpreter._interpreter
        self.builder = interpreter.interpreter_builder
        self.acquiring = {memory.MEM_SEMANTIC.ACQUIRE, memory.MEM_SEMANTIC.ACQUIRE_RELEASE}
        self.releasing = {memory.MEM_SEMANTIC.RELEASE, memory.MEM_SEMANTIC.ACQUIRE_RELEASE}
        self.narrow = ir.MEM_SYNC_SCOPE.CTA
        with contextlib.ExitStack() as stack:
            for owner, name, wrapper in (
                (interpreter.GridExecutor, "__call__", self._call),
                (interpreter.InterpreterBuilder, "set_grid_dim", self._set_grid_dim),
                (interpreter, "_implicit_cvt", self._convert),
                (interpreter, "_patch_lang", self._patch),
                (interpreter, "_get_np_dtype", self._dtype),
                (interpreter.InterpreterBuilder, "create_atomic_rmw", self._scoped),
                (interpreter.InterpreterBuilder, "create_atomic_cas", self._scoped),
                (memory, "load", self._load),
                (memory, "store", self._store),
                (memory, "atomic_rmw", self._atomic_rmw),
                (memory, "atomic_cas", self._atomic_cas),
            ):
                stack.enter_context(wrapped(owner, name, wrapper))
            # Checks each sum of integers, which is a quarter of the interpreter's time: an offset that has gone wrong
            # is seen where it is used.
            options = dataclasses.replace(self.builder.options, sanitize_overflow=False)
            stack.enter_context(mock.patch.object(self.builder, "options", options))
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

    def _dtype(self, original: Callable[..., Any], dtype: Any) -> Any:
        """NumPy's dtype: the interpreter makes a table of them at each call."""
        name = str(dtype.scalar)
        if name not in self.dtypes:
            self.dtypes[name] = original(dtype.scalar)
        return self.dtypes[name]

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

    def _scoped(self, original: Callable[..., Any], *arguments: Any) -> Any:
        """Notice the scope of an atomic: one within a program orders nothing between programs."""
        self.is_wide = arguments[-1] != self.narrow
        return original(*arguments)

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
            **vars(access),
            acquires=self.is_wide and order in self.acquiring, releases=self.is_wide and order in self.releasing,
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

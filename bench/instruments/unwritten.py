"""Memory that nobody has written yet: what torch's `empty` functions return holds poison, and is remembered.

Lanes of a load that are masked off without a value of their own hold poison as well. Bytes are known one by one where
kernels write them. What torch writes is seen by the poison being gone; and where
poison was copied, by a clone or a change of layout, it is still poison.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .interpreter import wrapped

# A quiet NaN in each floating-point type of two to eight bytes, with a payload that no arithmetic makes.
POISON = np.uint64(0x7FFD7FFD7FFD7FFD)
Bytes = npt.NDArray[np.uint8]


@dataclass
class _Memory:
    storage: StorageWeakRef
    itemsize: int
    unwritten: npt.NDArray[np.bool_]


_known: dict[int, _Memory] = {}


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within, the memory of `torch.empty`, `empty_like`, `Tensor.new_empty` and their like on the CPU is poisoned."""
    with contextlib.ExitStack() as stack:
        for owner, prefix in ((torch, "empty"), (Tensor, "new_empty")):
            for name in dir(owner):
                if name.startswith(prefix):
                    stack.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


@functools.cache
def _poisoning(function: Callable[..., Any]) -> Callable[..., Any]:
    """One for each function and process: torch.compile keeps tables of what it finds under these names."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        # Not a subclass, such as a fake tensor, nor the wrapper of a transform: those have no memory of their own.
        if type(result) is Tensor and result.device.type == "cpu" and _has_memory(result):
            poison(result)
        return result

    return call


@contextlib.contextmanager
def poisoned_lanes() -> Iterator[None]:
    """Within, what a load leaves undefined, lanes masked off without `other`, is NaN or a large number.

    Triton promises nothing of them; its interpreter fills in zeros, with which many a wrong sum comes out right.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    def masked_load(
        original: Callable[..., Any], builder: Any, ptrs: Any, mask: Any, other: Any, *others: Any, **options: Any
    ) -> Any:
        dtype = ptrs.get_element_ty()
        numpy_dtype = _get_np_dtype(dtype)
        if other is None and numpy_dtype.kind != "b" and not np.all(mask.data):
            value = np.frombuffer(POISON.tobytes(), numpy_dtype)[0]
            other = TensorHandle(np.full(np.shape(ptrs.data), value, numpy_dtype), dtype)
        return original(builder, ptrs, mask, other, *others, **options)

    with wrapped(InterpreterBuilder, "create_masked_load", masked_load):
        yield


def poison(tensor: Tensor) -> None:
    """Make a dense tensor's memory what `empty` leaves."""
    content = bytes_of(tensor.untyped_storage())
    if content.size:
        content[:] = np.resize(np.frombuffer(POISON.tobytes(), np.uint8), content.size)
        storage = StorageWeakRef(tensor.untyped_storage())
        unwritten = np.ones(content.size, bool)
        if len(_known) > 1000:
            for start in [start for start, memory in _known.items() if memory.storage.expired()]:
                del _known[start]
        _known[tensor.data_ptr()] = _Memory(storage, tensor.element_size(), unwritten)


def unwritten_bytes(storage: torch.UntypedStorage) -> npt.NDArray[np.bool_] | None:
    """Of each byte, whether nobody has written it yet; None where all are written."""
    content = bytes_of(storage)
    if not content.size:
        return None
    memory = _memory(storage)
    if memory is None:
        words = content[: content.size // 8 * 8].view(np.uint64) == POISON
        return np.append(words.repeat(8), np.zeros(content.size % 8, bool)) if words.any() else None
    # A byte may happen to be poison's: types of one byte are told by eight of them.
    item = max(memory.itemsize, 2) if memory.itemsize > 1 else 8
    whole = content.size // item * item
    same = content == np.resize(np.frombuffer(POISON.tobytes(), np.uint8), content.size)
    if whole:
        same[:whole] = same[:whole].reshape(-1, item).all(axis=1).repeat(item)
    if whole < content.size:
        same[whole:] = same[whole:].all()
    memory.unwritten &= same | _partly(memory.unwritten, item, whole)
    return memory.unwritten if memory.unwritten.any() else None


def _partly(unwritten: npt.NDArray[np.bool_], item: int, whole: int) -> npt.NDArray[np.bool_]:
    """Bytes of elements that kernels have written in part: for the rest, kernels alone are believed."""
    partly = np.zeros_like(unwritten)
    if whole:
        rows = unwritten[:whole].reshape(-1, item)
        partly[:whole] = (rows.any(axis=1) & ~rows.all(axis=1)).repeat(item)
    return partly


def set_unwritten(storage: torch.UntypedStorage, unwritten: npt.NDArray[np.bool_]) -> None:
    """Say what kernels left unwritten."""
    memory = _memory(storage)
    if memory is not None:
        memory.unwritten &= unwritten


def bytes_of(storage: torch.UntypedStorage) -> Bytes:
    """The memory itself, to read and to write."""
    size = storage.nbytes()
    if not size:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(storage.data_ptr()))


def _memory(storage: torch.UntypedStorage) -> _Memory | None:
    memory = _known.get(storage.data_ptr())
    # The weak reference keeps the number of a freed storage from being given to another.
    if memory is None or memory.storage.expired() or memory.storage.cdata != storage._cdata:
        return None
    return memory


def _has_memory(tensor: Tensor) -> bool:
    return not torch._is_functional_tensor(tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)

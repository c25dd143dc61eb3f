"""Checkpoints of torch.save, in both its formats, without torch.load: nothing is called, and only what is used is read.

The tensors are `StoredTensor`s until they are loaded. Each lies within its storage, and each storage is as long as its
record: torch.load believes what the pickle says of both.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .archive import Archive, reading
from .pickled import Call, MoreThanTensors, Name, Reader, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    "Untyped": torch.uint8,
}
_REBUILD = {
    "_rebuild_tensor": "",
    "_rebuild_tensor_v2": "",
    "_rebuild_tensor_v3": "",
    "_rebuild_parameter": "",
    "_rebuild_parameter_with_state": "",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}


@dataclass(frozen=True)
class Storage:
    """What a pickle says of a storage: `size` values."""

    key: str
    dtype: torch.dtype | None
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint that has not been read."""

    storage: Storage | None
    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    problem: str = ""
    """What it is, if it is no dense tensor."""
    read: Callable[[str], bytearray] | None = None

    def load(self, cache: dict[str, bytearray]) -> Tensor:
        """The tensor, a view of its storage's bytes, of which `cache` keeps those that have been read.

        Raises:
            ValueError: it is no dense tensor, or not within its storage.
        """
        if self.storage is None or self.storage.dtype is None or self.read is None or self.dtype is None:
            raise ValueError(f"is {self.problem or 'a tensor of an unknown type'}; weights must be dense tensors")
        key, size = self.storage.key, self.storage.size
        if key not in cache:
            cache[key] = self.read(key)
        content = cache[key]
        if len(content) != size * self.storage.dtype.itemsize:
            raise ValueError(f"has {size:,} values of {self.storage.dtype} in storage, and {len(content):,} bytes")
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        last = 0
        for step, n in sorted(zip(self.strides, self.shape, strict=True)):
            if n > 1 and step <= last:
                raise ValueError(f"has the strides {self.strides}, with which its values overlap")
            last += (n - 1) * step
        if (self.offset + last + 1) * self.dtype.itemsize > len(content):
            raise ValueError(f"reaches behind the {size:,} values of its storage")
        return torch.frombuffer(content, dtype=self.dtype).as_strided(self.shape, self.strides, self.offset)


def read_checkpoint(path: Path) -> Any:
    """The object that torch.save wrote: nested dictionaries, of `StoredTensor`s where tensors are.

    Raises:
        ValueError: it is damaged, or no such file; or its pickle holds more than tensors, containers and numbers.
    """
    with reading(path, "cannot be read as a PyTorch checkpoint"):
        try:
            with path.open("rb") as file:
                is_zip = file.read(2) == b"PK"
            return _read_zip(path) if is_zip else _read_stream(path)
        except MoreThanTensors as error:
            reason = str(error)
    raise ValueError(
        f"{path} is refused: {reason}. Write the state dict alone where you trust the file: "
        "torch.save(model.state_dict(), path), or as safetensors"
    )


def _read_zip(path: Path) -> Any:
    archive = Archive(path)
    found = [name for name in archive.entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError("it is a zip file without data.pkl, which torch.save writes")
    folder = found[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.entries:
        raise ValueError("it is a TorchScript program; wanted is its state_dict()")
    order = f"{folder}byteorder"
    if order in archive.entries and bytes(archive.read(order)) != b"little":
        raise ValueError("its numbers are big-endian; save it again on a usual machine")
    return _unpickle(Reader(memoryview(archive.read(found[0]))), lambda key: archive.read(f"{folder}data/{key}"))


def _read_stream(path: Path) -> Any:
    """The format before PyTorch 1.6: five pickles, then each storage behind its number of values."""
    content = memoryview(read_whole(path))
    reader = Reader(content)
    if bytes(content[:1]) != b"\x80" or _unpickle(reader) != _MAGIC or _unpickle(reader) != _PROTOCOL:
        raise ValueError("it does not begin as torch.save does")
    system = _unpickle(reader)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian; save it again on a usual machine")
    positions: dict[str, tuple[int, int]] = {}
    item_sizes: dict[str, int] = {}

    def read(key: str) -> bytearray:
        start, size = positions[key]
        return bytearray(content[start : start + size])

    found = _unpickle(reader, read, item_sizes)
    keys = _unpickle(reader)
    if sorted(keys) != sorted(item_sizes):
        raise ValueError("its list of storages is another one than its tensors have")
    for key in keys:
        (count,) = struct.unpack("<q", reader.read(8))
        size = count * item_sizes[key]
        if count < 0 or reader.position + size > len(content):
            raise ValueError(f"storage {key[:50]!r} of {count:,} values is cut short")
        positions[key] = (reader.position, size)
        reader.position += size
    if reader.position != len(content):
        raise ValueError(f"{len(content) - reader.position:,} bytes follow its last storage")
    return found


def read_whole(path: Path) -> bytearray:
    """A file's bytes, writable, as torch wants them under its tensors."""
    content = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        count = file.readinto(content)
    return content[:count]


def _unpickle(
    reader: Reader, read: Callable[[str], bytearray] | None = None, item_sizes: dict[str, int] | None = None
) -> Any:
    def stored(identity: Any) -> Storage:
        kind, storage_type, key, _, size, *view = identity
        dtype = _storage_dtype(storage_type)
        if kind != "storage" or not isinstance(key, str) or not _is_size(size) or any(view):
            raise ValueError("it has a storage of an unknown kind")
        if item_sizes is not None and dtype is not None:
            item_sizes[key] = dtype.itemsize
        return Storage(key, dtype, size)

    return _with_tensors(read_pickle(reader, _is_of_tensors, stored), read)


def _is_of_tensors(path: str) -> bool:
    module, _, name = path.partition(" ")
    if module == "torch._utils":
        return name in _REBUILD
    if module == "torch._tensor":
        return name in ("_rebuild_from_type", "_rebuild_from_type_v2")
    if module in ("torch", "torch.cuda", "torch.storage"):
        return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    return False


def _storage_dtype(name: object) -> torch.dtype | None:
    return _STORAGES.get(name.path.partition(" ")[2].removesuffix("Storage")) if isinstance(name, Name) else None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _with_tensors(content: Any, read: Callable[[str], bytearray] | None) -> Any:
    """Dictionaries with tensors for the calls that make them, each dictionary once, however often it is held."""
    if not isinstance(content, dict):
        return content
    todo, seen = [content], {id(content)}
    while todo:
        mapping = todo.pop()
        for key, value in mapping.items():
            if isinstance(value, Call):
                mapping[key] = _tensor(value, read)
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                todo.append(value)
    return content


def _tensor(call: Call, read: Callable[[str], bytearray] | None) -> Any:
    """The tensor that a call rebuilds; the call itself, where it rebuilds another thing."""
    for _ in range(8):  # a parameter of a tensor of a type, at most
        name, arguments = call.function.partition(" ")[2], call.arguments
        if name == "_rebuild_from_type_v2" and len(arguments) == 4 and isinstance(arguments[0], Name):
            kind, state = arguments[1], arguments[2]
            if not isinstance(kind, Name) or kind.path.partition(" ")[2] not in ("Tensor", "Parameter", "Buffer"):
                return StoredTensor(None, problem="a tensor of a class of its own")
            call = Call(arguments[0].path, state)
        elif name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter", "Buffer"):
            if not arguments or not isinstance(arguments[0], Call):
                return call
            call = arguments[0]
        else:
            break
    if name not in _REBUILD:
        return call
    if _REBUILD[name]:
        return StoredTensor(None, problem=_REBUILD[name])
    return _dense(name, list(arguments), read)


def _dense(name: str, arguments: list[Any], read: Callable[[str], bytearray] | None) -> StoredTensor:
    storage, offset, shape, strides, *further = arguments
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor has no storage, shape or strides")
    if not all(map(_is_size, (offset, *shape, *strides))) or len(shape) != len(strides) or len(shape) > 64:
        raise ValueError("a tensor has an impossible shape")
    dtype, metadata = storage.dtype, further[2:]
    if name == "_rebuild_tensor_v3":
        named, *metadata = metadata
        dtype = getattr(torch, named.path.partition(" ")[2]) if isinstance(named, Name) else None
    if any(metadata):
        return StoredTensor(None, problem="a tensor that is stored conjugated or negated")
    return StoredTensor(storage, offset, shape, strides, dtype, read=read)

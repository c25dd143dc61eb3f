"""Blobs of a .caffemodel: the few messages of Caffe's protocol buffer that hold them, read without its compiler.

Numbers of fields are those of caffe.proto: NetParameter.layer 100 (and .layers 2, of the first version), LayerParameter
.name 1, .blobs 7 (V1LayerParameter .name 4, .blobs 6), BlobProto .num 1 .channels 2 .height 3 .width 4 .data 5 .shape 7
.double_data 8, BlobShape.dim 1.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .archive import reading
from .checkpoint import read_whole

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LAYERS = {100: (1, 7), 2: (4, 6)}
_DATA = {5: torch.float32, 8: torch.float64}
_LONGEST_VARINT = 10
_MOST_AXES = 32
# SENet-154's file has about 10,000.
_MOST_FIELDS = 50_000

Field = tuple[int, int, int, memoryview]


def read_caffemodel(path: Path) -> dict[str, Tensor]:
    """All blobs of a network, named "layer:index", as Caffe shapes them.

    Raises:
        ValueError: the file is damaged, or is no .caffemodel.
    """
    with reading(path, "is not a whole .caffemodel"):
        blobs = _Parser(memoryview(read_whole(path))).blobs()
    if not blobs:
        raise ValueError(f"{path} is not a .caffemodel: it has no layer with weights")
    return blobs


class _Parser:
    """Reads the messages of one file, of which there are only so many."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.fields_left = content, _MOST_FIELDS

    def blobs(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers = set()
        for number, kind, _, layer in self._fields(self.content):
            if kind != _BYTES or number not in _LAYERS:
                continue
            name, blobs = self._layer(layer, *_LAYERS[number])
            if blobs and name in layers:
                raise ValueError(f"two layers are called {name[:200]!r}")
            layers.add(name)
            found.update({f"{name}:{index}": blob for index, blob in enumerate(blobs)})
        return found

    def _layer(self, layer: memoryview, name_field: int, blobs_field: int) -> tuple[str, list[Tensor]]:
        name, blobs = "", []
        for number, kind, _, value in self._fields(layer):
            if kind == _BYTES and number == name_field:
                name = bytes(value).decode()
            elif kind == _BYTES and number == blobs_field:
                blobs.append(self._blob(value))
        return name, blobs

    def _blob(self, blob: memoryview) -> Tensor:
        shape: list[int] = []
        old_shape: dict[int, int] = {}
        data: dict[int, list[memoryview]] = {}
        for number, kind, integer, value in self._fields(blob):
            if number == 7 and kind == _BYTES:
                shape = self._shape(value)
            elif number <= 4 and kind == _VARINT:
                old_shape[number] = integer
            elif number in _DATA:
                if kind != _BYTES:
                    raise ValueError("a blob's values are not packed")
                data.setdefault(number, []).append(value)
        if old_shape:
            shape = [old_shape.get(axis, 1) for axis in (1, 2, 3, 4)]
        if len(data) != 1:
            raise ValueError("a blob has no values, or has them in two precisions")
        ((number, parts),) = data.items()
        content = parts[0] if len(parts) == 1 else bytearray().join(parts)
        dtype = _DATA[number]
        if not len(content) or math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"a blob of shape {shape[:8]} has {len(content):,} bytes of {dtype}")
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def _shape(self, message: memoryview) -> list[int]:
        dims: list[int] = []
        for number, kind, integer, value in self._fields(message):
            if number == 1 and kind == _VARINT:
                dims.append(integer)
            elif number == 1 and kind == _BYTES:
                position = 0
                while position < len(value) and len(dims) <= _MOST_AXES:
                    dim, position = _varint(value, position)
                    dims.append(dim)
            if len(dims) > _MOST_AXES:
                raise ValueError(f"a blob has more than {_MOST_AXES} axes")
        return dims

    def _fields(self, message: memoryview) -> Iterator[Field]:
        """Number, wire type, value if it is a varint, and bytes if it is not, of each field."""
        position = 0
        while position < len(message):
            self.fields_left -= 1
            if self.fields_left < 0:
                raise ValueError(f"it has more than {_MOST_FIELDS:,} fields")
            tag, position = _varint(message, position)
            number, kind = tag >> 3, tag & 7
            integer, size = 0, {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
            if kind == _VARINT:
                integer, position = _varint(message, position)
            elif kind == _BYTES:
                size, position = _varint(message, position)
            elif not size:
                raise ValueError(f"a field has wire type {kind}")
            if not number or position + size > len(message):
                raise ValueError(f"it ends within a field of {size:,} bytes" if number else "a field has the number 0")
            yield number, kind, integer, message[position : position + size]
            position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where the next field starts."""
    value = 0
    for index, byte in enumerate(message[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"an integer does not end at byte {position}")

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

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LAYERS = {100: (1, 7), 2: (4, 6)}
_DATA = {5: torch.float32, 8: torch.float64}

Field = tuple[int, int, int, memoryview]


def read_caffemodel(path: Path) -> dict[str, Tensor]:
    """All blobs of a network, named "layer:index", as Caffe shapes them.

    Raises:
        ValueError: the file is cut short, or is no .caffemodel.
    """
    # A bytearray, since tensors are views of it, and torch wants those writable.
    content = memoryview(bytearray(path.read_bytes()))
    blobs: dict[str, Tensor] = {}
    try:
        for number, kind, _, layer in _fields(content):
            if kind == _BYTES and number in _LAYERS:
                _read_layer(layer, *_LAYERS[number], blobs)
    except (IndexError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole .caffemodel: {error}") from None
    if not blobs:
        raise ValueError(f"{path} is not a .caffemodel: it has no layer with weights")
    return blobs


def _read_layer(layer: memoryview, name_field: int, blobs_field: int, blobs: dict[str, Tensor]) -> None:
    name, found = "", []
    for number, kind, _, value in _fields(layer):
        if kind == _BYTES and number == name_field:
            name = bytes(value).decode()
        elif kind == _BYTES and number == blobs_field:
            found.append(_read_blob(value))
    blobs.update({f"{name}:{index}": blob for index, blob in enumerate(found)})


def _read_blob(blob: memoryview) -> Tensor:
    shape: list[int] = []
    old_shape: dict[int, int] = {}
    parts: list[Tensor] = []
    for number, kind, integer, value in _fields(blob):
        if number == 7 and kind == _BYTES:
            shape = _read_shape(value)
        elif number <= 4 and kind == _VARINT:
            old_shape[number] = integer
        elif number in _DATA and len(value):
            parts.append(torch.frombuffer(value, dtype=_DATA[number]))
    if old_shape:
        shape = [old_shape.get(axis, 1) for axis in (1, 2, 3, 4)]
    data = torch.cat(parts) if len(parts) != 1 else parts[0]
    if math.prod(shape) != data.numel():
        raise RuntimeError(f"a blob of shape {shape} has {data.numel()} values")
    return data.float().reshape(shape)


def _read_shape(message: memoryview) -> list[int]:
    dims: list[int] = []
    for number, kind, integer, value in _fields(message):
        if number == 1 and kind == _VARINT:
            dims.append(integer)
        elif number == 1 and kind == _BYTES:
            position = 0
            while position < len(value):
                dim, position = _varint(value, position)
                dims.append(dim)
    return dims


def _fields(message: memoryview) -> Iterator[Field]:
    """Number, wire type, value if it is a varint, and bytes if it is not, of each field."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        integer, size = 0, {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
        if kind == _VARINT:
            integer, position = _varint(message, position)
        elif kind == _BYTES:
            size, position = _varint(message, position)
        elif not size:
            raise IndexError(f"wire type {kind} at byte {position}")
        if position + size > len(message):
            raise IndexError(f"it ends within a field of {size} bytes")
        yield number, kind, integer, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where the next field starts."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7

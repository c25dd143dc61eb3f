"""Arrays out of an .npz file: numbers alone, as large as their entries."""

import io
import math
from pathlib import Path

import torch
from torch import Tensor

from .archive import Archive, reading


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file, by name.

    Raises:
        ValueError: it is damaged, or an array holds other things than numbers, of which none is unpickled.
    """
    with reading(path, "must be an .npz of numeric arrays named layer:index"):
        archive = Archive(path)
        names = [name for name in archive.entries if name.endswith(".npy")]
        if not names:
            raise ValueError("it has no arrays")
        return {name.removesuffix(".npy"): _array(archive.read(name), name) for name in names}


def _array(content: bytearray, name: str) -> Tensor:
    from numpy.lib import format as npy

    header = io.BytesIO(content[: 1 << 16])
    version = npy.read_magic(header)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} is in version {version} of NumPy's format, which is for records")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read(header)
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ValueError(f"{name} holds {dtype}, no real numbers")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name} has the shape {shape}")
    data = memoryview(content)[header.tell() :]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} says it has {math.prod(shape):,} values of {dtype}, and has {len(data):,} bytes")
    import numpy as np

    array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))

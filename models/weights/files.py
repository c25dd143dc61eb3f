"""Tensors out of files, whose kind their content says; nothing in a file is run."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..saved import Header, load
from .archive import reading
from .arrays import read_npz
from .caffemodel import read_caffemodel
from .checkpoint import StoredTensor, read_checkpoint
from .state_dicts import find_state_dict

State = dict[str, Tensor]
Roots = Callable[[list[str]], list[str]]


def read_weights(path: Path) -> tuple[Mapping[str, Any], Header | None]:
    """What a file holds, for `unwrapped`, with its tensors on the CPU; and its header if setriton wrote it.

    Args:
        path: safetensors; a PyTorch checkpoint, alone or with an optimizer's state around it; a .caffemodel; or an .npz
            of Caffe's blobs. A blob has the key "layer:index".

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file, or one of another kind; a damaged one; or a pickle that holds more than tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"weights must be a file; {path} is {'a folder' if path.is_dir() else 'none'}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty")
    if start[:2] == b"PK":
        with reading(path, "cannot be read as a PyTorch checkpoint or .npz"), zipfile.ZipFile(path) as archive:
            is_npz = any(name.endswith(".npy") for name in archive.namelist())
        return read_npz(path) if is_npz or path.suffix == ".npz" else read_checkpoint(path), None
    is_safetensors = start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size
    if is_safetensors or path.suffix == ".safetensors":
        return load(path)
    if path.suffix == ".caffemodel":
        return read_caffemodel(path), None
    if path.suffix == ".npz":
        raise ValueError(f"{path} must be an .npz of numeric arrays named layer:index: it is no zip file")
    return read_checkpoint(path), None


def unwrapped(content: object, where: str, roots: Roots, use_ema: bool = True) -> tuple[State, list[str]]:
    """The state dict in a checkpoint, and what was chosen and left out; errors are those of `find_state_dict`."""
    found = find_state_dict(content, where, roots, use_ema)
    state: State = {}
    cache: dict[str, bytearray] = {}
    for key, leaf in found.leaves.items():
        if isinstance(leaf, StoredTensor):
            with reading(Path(where), f"cannot be read as a PyTorch checkpoint: {key}"):
                leaf = leaf.load(cache)
        state[key] = leaf
    return state, found.notes

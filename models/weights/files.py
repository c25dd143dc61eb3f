"""State dicts out of files; nothing in a file is run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..saved import Header, load
from .caffemodel import read_caffemodel

State = dict[str, Tensor]

# Where training scripts keep the network's state dict in a checkpoint; the most specific first.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
# What DistributedDataParallel and torch.compile put in front of every key.
_WRAPPERS = ("module.", "_orig_mod.")


def read_weights(path: Path) -> tuple[State, Header | None]:
    """The tensors of a file, on the CPU, and its header if setriton wrote it.

    Args:
        path: safetensors; a PyTorch checkpoint (.pth, .pt, .bin, .tar, .pkl), alone or with an optimizer's state around
            it; a .caffemodel; or an .npz of Caffe's blobs. A blob has the key "layer:index".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".safetensors":
        return load(path)
    if path.suffix == ".caffemodel":
        return read_caffemodel(path), None
    if path.suffix == ".npz":
        return _read_npz(path), None
    return unwrapped(_read_pickle(path), str(path)), None


def unwrapped(content: object, where: str) -> State:
    """The state dict in a checkpoint.

    Raises:
        ValueError: there is none.
    """
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must hold a state dict; got {type(content).__name__}")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            f"{where} must hold a state dict; it has no tensors, only {', '.join(map(str, content)) or '{}'}"
        )
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: what is no checkpoint may be anything
        # What the unpickler found, without the advice that torch wraps it in.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        detail = reason[0][:200] if reason else type(error).__name__
        if not isinstance(error, pickle.UnpicklingError) or "Unsupported global" not in detail:
            raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {detail}") from None
        found = detail.partition(". ")[0]
        raise ValueError(
            f"{path} is refused: it holds more than tensors, and such a pickle can run any code ({found}). Write the "
            "state dict alone where you trust the file: torch.save(model.state_dict(), path), or as safetensors"
        ) from None


def _read_npz(path: Path) -> State:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz of numeric arrays named layer:index: {error}") from None

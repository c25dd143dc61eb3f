"""A network in one safetensors file that says how to build it and what images it wants."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from setriton.files import publish

from .base import Network
from .preprocessing import Preprocessing

_KEY = "setriton"


@dataclass(frozen=True)
class Header:
    """What a file says of the network in it."""

    model: str
    """Its name for `create_model`."""
    options: dict[str, Any]
    """Further arguments of `create_model`; those that are missing have their defaults."""
    preprocessing: Preprocessing
    origin: str
    """The images it was trained with, or where its weights are from."""

    @classmethod
    def of(cls, network: Network, origin: str) -> Self:
        """The header of a network that `create_model` built."""
        options = dict(network.config)
        name = options.pop("name")
        return cls(name, options, network.preprocessing, origin)


def save(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write a state dict and what belongs to it; the file is whole or not there.

    Raises:
        TypeError: an option that JSON cannot hold.
        OSError: the file cannot be written.
    """
    # One entry: safetensors writes several in any order, and equal networks should be equal files.
    write_tensors(path, tensors, {_KEY: json.dumps(asdict(header))})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary), metadata=metadata)
        publish(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """The tensors of a safetensors file, on the CPU, and its header if setriton wrote it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors file, or a header that names no network.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = file.metadata() or {}
    except (AttributeError, LookupError, OverflowError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if _KEY not in metadata:
        return tensors, None
    try:
        return tensors, _header(metadata[_KEY])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say which network it holds: {error!r}") from None


def _header(text: str) -> Header:
    fields = json.loads(text, object_pairs_hook=_once)
    if not isinstance(fields, dict) or not isinstance(fields.get("options"), dict):
        raise ValueError("its header must be an object with the network's options")
    header = Header(**fields | {"preprocessing": Preprocessing(**fields["preprocessing"])})
    if not isinstance(header.model, str) or not isinstance(header.origin, str):
        raise ValueError("its header must have names of the network and of its origin")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may be written twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice")
    return found

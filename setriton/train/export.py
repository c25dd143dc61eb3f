"""Trained weights as one safetensors file that says which network it belongs to."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from setriton.train.files import publish

_KEY = "setriton"


@dataclass(frozen=True)
class ExportMetadata:
    """Enough to build the network again and to feed it."""

    model: str
    layout: str | None
    num_classes: int
    in_chans: int
    image_size: int
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def export(model: nn.Module, path: Path, metadata: ExportMetadata) -> None:
    """Write the whole network to `path`, atomically, from rank 0; call it on all ranks.

    Tensors are unsharded, contiguous and keep their state-dict keys; parameters and statistics are fp32.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        str(temporary),
        metadata={_KEY: json.dumps(asdict(metadata))},
    )
    publish(temporary, path)


def load_exported(path: str | Path) -> tuple[nn.Module, ExportMetadata]:
    """The network of a file written by `export`, on the CPU and in evaluation mode, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or not one of ours.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from setriton.models import create_model

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no exported network {path}")
    try:
        tensors: dict[str, Tensor] = load_file(str(path))
        header = _read_header(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if _KEY not in header:
        raise ValueError(f"{path} does not say which network it belongs to; wanted a file written by `setriton train`")
    try:
        fields = json.loads(header[_KEY])
        metadata = ExportMetadata(**fields | {name: tuple(fields[name]) for name in ("mean", "std")})
        layout: dict[str, Any] = {"layout": metadata.layout} if metadata.layout else {}
        with torch.random.fork_rng(devices=[]):
            model = create_model(metadata.model, num_classes=metadata.num_classes, in_chans=metadata.in_chans, **layout)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the network it says it does: {error!r}") from None
    return model.eval(), metadata


def _read_header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}

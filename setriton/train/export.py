"""Trained weights as one safetensors file that says which network it belongs to."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from setriton.models.saved import Header, load, save


def export(model: nn.Module, path: Path, header: Header) -> None:
    """Write the whole network to `path`, atomically, from rank 0; call it on all ranks.

    Tensors are unsharded, contiguous and keep their state-dict keys; parameters and statistics are fp32.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    save(path, tensors, header)


def load_exported(path: str | Path) -> tuple[nn.Module, Header]:
    """The network of a file written by `setriton train` or `setriton convert`, on the CPU, for evaluation; its header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or not one of ours.
    """
    from setriton.models import create_model

    path = Path(path)
    tensors, header = load(path)
    if header is None:
        raise ValueError(
            f"{path} does not say which network it belongs to; wanted a file of `setriton train` or `setriton convert`"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            model = create_model(header.model, **header.options)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the network it says it does: {error!r}") from None
    return model.eval(), header

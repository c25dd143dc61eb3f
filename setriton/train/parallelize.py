"""Compile, then shard: the order in which a network is made ready for many devices."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from setriton.models.stages import Stage
from setriton.train.config import ParallelConfig

# Training, evaluation and a second image size of SE-ResNet-152 need over 16 graphs per block class; with the default
# limit of 8 the first evaluation after training fails.
_RECOMPILE_LIMIT = 64


def parallelize(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> nn.Module:
    """Compile and shard `model` in place, and return it. Weights stay contiguous: FSDP takes no channels_last ones."""
    if config.compile:
        _compile_blocks(model)
    if mesh.size() > 1:
        _shard(model, mesh, reshard_after_forward=config.reshard_after_forward)
    return model


def precision_context(config: ParallelConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast for bf16: parameters, their gradients and BatchNorm statistics stay fp32."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients over the ranks in the coming backward pass, or keep them for the next micro-step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def _stages(model: nn.Module) -> list[Stage]:
    return [child for child in model.children() if isinstance(child, Stage)]


def _compile_blocks(model: nn.Module) -> None:
    """Per block and before sharding, so that FSDP's hooks stay outside the graphs and equal blocks share them."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    blocks = [block for stage in _stages(model) for block in stage.children()]
    for block in blocks or [model]:
        # Symbolic shapes fail in Inductor's CPU backend (torch 2.15), and batches here never change their shape.
        block.compile(fullgraph=True, dynamic=False)


def _shard(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """One group per stage: a group per block costs more in latency than its few megabytes take to send."""
    for stage in _stages(model):
        fully_shard(stage, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)

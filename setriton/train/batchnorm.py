"""BatchNorm running statistics across ranks: FSDP shards parameters and leaves buffers to each rank."""

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def sync_batch_norm_stats(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average running_mean and running_var over the ranks of `group`, in one all-reduce.

    Each rank has seen other images. Call it before every evaluation, save and export; without it ranks evaluate
    different networks and a checkpoint holds the statistics of whichever rank happened to write them.
    """
    world_size = dist.get_world_size(group)
    stats = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in ("running_mean", "running_var")
    ]
    if world_size == 1 or not stats:
        return
    flat = torch.cat([buffer.flatten() for buffer in stats])
    dist.all_reduce(flat, group=group)
    flat /= world_size
    means = torch.split(flat, [buffer.numel() for buffer in stats])
    for buffer, mean in zip(stats, means, strict=True):
        buffer.copy_(mean.view_as(buffer))

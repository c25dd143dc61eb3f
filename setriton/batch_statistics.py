"""Mean and variance of each channel, of this rank's batch or of all ranks', and what a backward pass needs of them."""

from typing import Any, cast

import torch
from torch import Tensor


def batch_statistics(x: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
    """mean, var (C), means of each map (N, C), and the number of values per channel; one sweep.

    Statistics of each (n, c), merged: reductions of the same extent share a sweep, and the squeeze wants its means.
    """
    n, channels, height, width = x.shape
    count = n * height * width
    empty = x.new_zeros(n, channels)
    map_var, map_mean = torch.var_mean(x, (2, 3), correction=0) if count else (empty, empty)
    # Differences from the first map: where all means are equal so is theirs, and the variance is not its rounding.
    first = map_mean[:1].sum(0)
    mean = first + (map_mean - first).sum(0) / max(n, 1)
    var = (map_var + (map_mean - mean).square()).sum(0) / max(n, 1)
    if not group:
        return mean, var, map_mean, count
    mean, var, total = merge_statistics(mean, var, count, group)
    return mean, var, map_mean, total


def merge_statistics(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """mean and var (C) of this rank's `count` values per channel -> those of all ranks, and their number.

    Chan's formula; a rank with an empty batch has weight 0.
    """
    from torch.distributed.distributed_c10d import _get_group_size_by_name  # not in every build of torch

    mine = torch.cat([mean, var * count, mean.new_full((1,), count)])
    size = _get_group_size_by_name(cast(Any, group))
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(mine, size, group)
    ranks = torch.ops._c10d_functional.wait_tensor(gathered).view(size, -1)
    counts, channels = ranks[:, -1:], mean.shape[0]
    total = counts.sum().clamp(min=1)
    means, m2 = ranks[:, :channels], ranks[:, channels:-1]
    mean = means[0] + (counts * (means - means[0])).sum(0) / total
    var = (m2 + counts * (means - mean).square()).sum(0) / total
    return mean, var, total


def move_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor | int, momentum: float
) -> tuple[Tensor, Tensor]:
    """The running statistics after this batch; an empty batch leaves them as they are, as in F.batch_norm."""
    if isinstance(count, Tensor):
        unbiased = var * (count / (count - 1).clamp(min=1))
    elif count == 0:
        return running_mean.clone(), running_var.clone()
    else:
        unbiased = var * (count / max(count - 1, 1))
    new_mean = running_mean.to(mean.dtype) * (1 - momentum) + mean * momentum
    new_var = running_var.to(mean.dtype) * (1 - momentum) + unbiased * momentum
    return new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)


def gradient_shares(dbias: Tensor, dweight: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """What each value's gradient loses through the batch statistics, over all ranks of the group."""
    if not group:
        return dbias / max(count, 1), dweight / max(count, 1)
    mine = torch.cat([dbias, dweight, dbias.new_full((1,), count)])
    reduced = torch.ops._c10d_functional.all_reduce(mine, "sum", group)
    total = torch.ops._c10d_functional.wait_tensor(reduced)
    through_mean, through_var = (total[:-1] / total[-1].clamp(min=1)).chunk(2)
    return through_mean, through_var

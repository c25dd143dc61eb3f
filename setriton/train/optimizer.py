"""The optimizer."""

import torch
from torch import nn

from setriton.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over all parameters; without `decay_norm_and_bias`, vectors (BatchNorm, biases) are not decayed."""
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return torch.optim.SGD(
        [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": config.weight_decay if config.decay_norm_and_bias else 0.0},
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        foreach=True,  # fused has no sharding rule for DTensor
    )

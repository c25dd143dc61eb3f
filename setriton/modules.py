"""The modules: parameters in the stock layout, the fused functions as their forward."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .functional import check_choice, check_size, squeeze_excite
from .reference import ACTS, GATES


class SqueezeExcite(nn.Module):
    """The Squeeze-and-Excitation block, fused: reads and writes feature maps (N, C, H, W).

    Parameters are those of two 1x1 convolutions `fc1` (R, C, 1, 1) and `fc2` (C, R, 1, 1), the state dict of timm's
    `SEModule` and torchvision's `SqueezeExcitation`; pass the class to timm as ``block_args=dict(attn_layer=...)``.
    timm rounds R to a multiple of 8: where C / 16 is none (C = 64: 8 there, 4 here), give `rd_channels`.

    Args:
        channels: C, channels of the feature map.
        rd_ratio: hidden width R over C, rounded down, at least 1. The paper's r = 16 (section 6.1) is 1/16.
        rd_channels: R itself; overrides `rd_ratio`.
        bias: whether the two layers have biases, as in the authors' released networks.
        act: relu, silu, gelu or identity.
        gate: sigmoid or hardsigmoid.
        device, dtype: of the parameters.

    Raises:
        TypeError: a width that is no int.
        ValueError: a width below 1, or an unknown `act` or `gate`.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("act", act, ACTS)
        check_choice("gate", gate, GATES)
        check_size("channels", channels)
        if rd_channels is None:
            if not 0 < rd_ratio < math.inf:
                raise ValueError(f"rd_ratio must be positive; got {rd_ratio}")
            rd_channels = max(1, int(channels * rd_ratio))
        check_size("rd_channels", rd_channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(channels, rd_channels, 1, bias=bias, **factory)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1, bias=bias, **factory)
        self.act = act
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return squeeze_excite(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, act=self.act, gate=self.gate)

    def extra_repr(self) -> str:
        return f"act={self.act}, gate={self.gate}"

"""How the SE blocks of a network are made: fused, or from stock layers for comparison and for ablations."""

import functools
import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setriton.checks import check_choice, check_size
from setriton.modules import SqueezeExcite, Step, called_tail, tail

_log = logging.getLogger("setriton")

SQUEEZES = {"avg": lambda x: x.mean((2, 3), keepdim=True), "max": lambda x: x.amax((2, 3), keepdim=True), "none": None}
GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
ACTS = {"identity": lambda x: x, "relu": F.relu}


class StockSqueezeExcite(nn.Module):
    """SE from PyTorch's own operators: what the fused block is compared with, and the paper's ablations.

    Parameters and keys are those of `setriton.SqueezeExcite`; x and the result are (N, C, H, W).

    Args:
        channels, rd_channels: C and the hidden width R.
        bias: whether the two layers have biases.
        squeeze: avg, max, or none for a gate for each pixel (arXiv 1709.01507, section 7.1, NoSqueeze).
        gate: sigmoid, tanh or relu (section 6.3).
    """

    def __init__(
        self, channels: int, rd_channels: int, bias: bool = True, squeeze: str = "avg", gate: str = "sigmoid"
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, rd_channels, 1, bias=bias)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1, bias=bias)
        self.squeeze = squeeze
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        pool = SQUEEZES[self.squeeze]
        squeezed = x if pool is None else pool(x)
        return x * GATES[self.gate](self.fc2(F.relu(self.fc1(squeezed))))

    def extra_repr(self) -> str:
        return f"squeeze={self.squeeze}, gate={self.gate}"


SEBlock = SqueezeExcite | StockSqueezeExcite


@dataclass(frozen=True)
class SEOptions:
    """What all SE blocks of a network have in common.

    The fused operators compute the paper's block: an average, a sigmoid. With another squeeze or gate the block is made
    of stock operators, as with `fused=False`; the state dict is the same.

    Raises:
        TypeError, ValueError: a value that no SE block can have.
    """

    rd_ratio: float = 1 / 16
    """Hidden width over channels; the paper's reduction r = 16 is 1/16."""
    rd_channels: int | None = None
    """The hidden width itself, in every block; overrides `rd_ratio`. NVIDIA's networks have 16."""
    rd_divisor: int = 1
    """Hidden widths are rounded to multiples of it, halves up; 1 rounds down. timm's have 8."""
    se_bias: bool = True
    """Whether the two layers have biases, as in the authors' released networks."""
    squeeze: Literal["avg", "max", "none"] = "avg"
    """How a channel becomes a number; none leaves a gate for each pixel."""
    gate: Literal["sigmoid", "tanh", "relu"] = "sigmoid"
    """The function after the second layer."""
    fused: bool = True
    """Whether SE, and the BN, residual and ReLU around it, run as one fused operator."""

    def __post_init__(self) -> None:
        check_choice("squeeze", self.squeeze, SQUEEZES)
        check_choice("gate", self.gate, GATES)
        check_size("rd_divisor", self.rd_divisor)
        if self.rd_channels is not None:
            check_size("rd_channels", self.rd_channels)
        if not 0 < self.rd_ratio < math.inf:
            raise ValueError(f"rd_ratio must be positive; got {self.rd_ratio}")

    @property
    def is_stock(self) -> bool:
        """Whether the blocks are made of PyTorch's own operators."""
        return not self.fused or self.squeeze != "avg" or self.gate != "sigmoid"

    def hidden(self, channels: int) -> int:
        """R, the hidden width of a block of C channels."""
        if self.rd_channels is not None:
            return self.rd_channels
        divisor = self.rd_divisor
        return max(divisor, int(channels * self.rd_ratio + divisor // 2) // divisor * divisor)

    def make(self, channels: int) -> SEBlock:
        """An SE block for C channels."""
        hidden = self.hidden(channels)
        if self.is_stock:
            if self.fused:
                _report_stock(self.squeeze, self.gate)
            return StockSqueezeExcite(channels, hidden, self.se_bias, self.squeeze, self.gate)
        return SqueezeExcite(channels, rd_channels=hidden, bias=self.se_bias)


@functools.cache
def _report_stock(squeeze: str, gate: str) -> None:
    """Once for each kind of block."""
    _log.warning(
        "SE blocks with squeeze=%s and gate=%s are made of PyTorch's own operators: fused ones have avg and sigmoid",
        squeeze,
        gate,
    )


def bn_se(
    owner: nn.Module,
    bn: nn.Module,
    se: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    bn_act: Step = "identity",
    out_act: Step = "identity",
    fork: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`setriton.modules.tail`, of PyTorch's own operators without a message where the network was made of them."""
    if isinstance(se, StockSqueezeExcite):
        return called_tail(bn, se, x, residual, bn_act=bn_act, out_act=out_act), None
    return tail(owner, bn, se, x, residual, bn_act=bn_act, out_act=out_act, fork=fork)

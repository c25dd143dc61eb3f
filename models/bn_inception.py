"""BN-Inception and SE-BN-Inception (arXiv 1502.03167, Figure 5; arXiv 1709.01507, Table 2)."""

from collections import OrderedDict
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setriton.stock import is_traced, leaf

from .base import Level, Network, Options
from .blocks import init_weights
from .registry import register
from .se import SEOptions
from .stages import Stage


class ConvBN(nn.Sequential):
    """``relu(bn(conv(x)))`` without a bias in the convolution: children `conv`, `bn` and `relu`.

    Args:
        in_chans, out_chans: channels.
        kernel, stride, padding: of the convolution; `kernel` and `padding` are numbers, or pairs for height and width.
        eps: of the BN.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_chans, eps=eps)
        self.relu = nn.ReLU(inplace=True)


class CeilMaxPool(nn.Module):
    """The largest of each 3x3 window, every second pixel, without padding: as many windows as a convolution has.

    Of a map of an even size it is Caffe's pooling, which rounds up: half the size. Of an odd size that gives one window
    less than the 3x3 convolutions beside it, which pad, and the maps could not be concatenated; here one more window
    begins on the last pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) and (call := leaf(self, x)) is not None:
            return call
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2), value=float("-inf"))
        return F.max_pool2d(x, 3, 2, ceil_mode=True)


class Widths(NamedTuple):
    """Channels of a module's convolutions; without `conv_1x1` and `pool_proj` its stride is 2."""

    conv_1x1: int | None
    conv_3x3: tuple[int, int]
    double_3x3: tuple[int, int, int]
    pool_proj: int | None
    pool: str = "avg"


# The modules in stages of one resolution: those with stride 2 begin theirs.
STAGES = {
    "stage3": {
        "inception_3a": Widths(64, (64, 64), (64, 96, 96), 32),
        "inception_3b": Widths(64, (64, 96), (64, 96, 96), 64),
    },
    "stage4": {
        "inception_3c": Widths(None, (128, 160), (64, 96, 96), None),
        "inception_4a": Widths(224, (64, 96), (96, 128, 128), 128),
        "inception_4b": Widths(192, (96, 128), (96, 128, 128), 128),
        "inception_4c": Widths(160, (128, 160), (128, 160, 160), 128),
        "inception_4d": Widths(96, (128, 192), (160, 192, 192), 128),
    },
    "stage5": {
        "inception_4e": Widths(None, (128, 192), (192, 256, 256), None),
        "inception_5a": Widths(352, (192, 320), (160, 224, 224), 128),
        "inception_5b": Widths(352, (192, 320), (192, 224, 224), 128, pool="max"),
    },
}


class InceptionModule(nn.Module):
    """Convolutions side by side, concatenated; then SE, of the pooled channels that pass through too.

    Args:
        in_chans: of the input.
        widths: of the convolutions.
        se: how its SE block is, or None.

    Attributes:
        out_chans: of the output.
    """

    def __init__(self, in_chans: int, widths: Widths, se: SEOptions | None = None) -> None:
        super().__init__()
        strided = widths.conv_1x1 is None
        stride = 2 if strided else 1
        (reduced, out_3x3), (double_reduced, double_1, double_2) = widths.conv_3x3, widths.double_3x3
        self.conv_1x1 = None if widths.conv_1x1 is None else ConvBN(in_chans, widths.conv_1x1, 1)
        self.conv_3x3_reduce = ConvBN(in_chans, reduced, 1)
        self.conv_3x3 = ConvBN(reduced, out_3x3, 3, stride=stride, padding=1)
        self.conv_double_3x3_reduce = ConvBN(in_chans, double_reduced, 1)
        self.conv_double_3x3_1 = ConvBN(double_reduced, double_1, 3, padding=1)
        self.conv_double_3x3_2 = ConvBN(double_1, double_2, 3, stride=stride, padding=1)
        self.pool: nn.Module
        if strided:
            self.pool = CeilMaxPool()
        elif widths.pool == "max":
            self.pool = nn.MaxPool2d(3, 1, padding=1)
        else:
            # Caffe divides by the whole window at borders as well.
            self.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=True)
        self.conv_pool_proj = None if widths.pool_proj is None else ConvBN(in_chans, widths.pool_proj, 1)
        self.out_chans = (widths.conv_1x1 or 0) + out_3x3 + double_2 + (widths.pool_proj or in_chans)
        self.se = None if se is None else se.make(self.out_chans)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)
        branches = [
            self.conv_3x3(self.conv_3x3_reduce(x)),
            self.conv_double_3x3_2(self.conv_double_3x3_1(self.conv_double_3x3_reduce(x))),
            pooled if self.conv_pool_proj is None else self.conv_pool_proj(pooled),
        ]
        if self.conv_1x1 is not None:
            branches.insert(0, self.conv_1x1(x))
        x = torch.cat(branches, dim=1)
        return x if self.se is None else self.se(x)


class BNInception(Network):
    """BN-Inception, or SE-BN-Inception with `se`: the network of the SE authors' release.

    Images (N, in_chans, H, W) of at least 7 pixels a side, 224 in the paper; the last map is (N, 1024, H/32, W/32).
    Convolutions have no biases. SE follows the concatenation of each of the ten modules, those of stride 2 included.

    A module's convolutions are `conv_` and their names in the authors' files, as in
    `stage4.inception_3c.conv_double_3x3_1.conv.weight`; those of the stem are `conv1`, `conv2_reduce` and `conv2`.

    Args:
        se: how the SE blocks are; None for the plain network.
        options: of `setriton.models.base.Options`.

    Raises:
        TypeError, ValueError: as `Network`.
    """

    def __init__(self, se: SEOptions | None = None, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.conv1 = ConvBN(self.in_chans, 64, 7, stride=2, padding=3)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2_reduce = ConvBN(64, 64, 1)
        self.conv2 = ConvBN(64, 192, 3, padding=1)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        levels: list[Level] = [
            {"module": "conv1", "num_chs": 64, "reduction": 2},
            {"module": "conv2", "num_chs": 192, "reduction": 4},
        ]
        in_chans, reduction = 192, 8
        for stage, modules in STAGES.items():
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for name, widths in modules.items():
                block = InceptionModule(in_chans, widths, se)
                in_chans = block.out_chans
                blocks[name] = block
            self.add_module(stage, Stage(blocks))
            levels.append({"module": stage, "num_chs": in_chans, "reduction": reduction})
            reduction *= 2
        self.finish(("conv1", "pool1", "conv2_reduce", "conv2", "pool2", *STAGES), levels)
        init_weights(self)


register("bn_inception", BNInception, fixed={})
register("se_bn_inception", BNInception, SEOptions, fixed={})

"""What every residual network here is made of: convolutions, the SE tail of a block, initialisation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from setriton.checks import check_size
from setriton.modules import SqueezeExcite, bn_se_forward

MakeSE = Callable[[int], SqueezeExcite]
Forked = Tensor | tuple[Tensor, Tensor | None]


def conv3x3(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)


def conv1x1(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)


class _Apart(torch.autograd.Function):
    """The same memory with an axis of 1 in front, which autograd does not know as a view.

    Inductor returns two outputs of one layout and memory as one tensor: their gradients would be summed outside of the
    compiled block, and one of them read as zeros inside. The extra axis keeps them apart.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.unsqueeze(0).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.squeeze(0)


class ResidualBlock(nn.Module):
    """A block whose branch ends ``BN -> SE -> + shortcut -> ReLU``, one fused call; a plain network leaves the SE out.

    The shortcut is `downsample(x)` where the shape changes, else x itself.
    """

    def __init__(self, out_chans: int, downsample: nn.Module | None, make_se: MakeSE | None) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.se = None if make_se is None else make_se(out_chans)
        self.downsample = downsample

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The BN at the end of the residual branch."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, up to `last_bn`."""
        raise NotImplementedError

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:
        """The block's output; with `fork` a pair, x and skip of the next block, whose shortcut reads `skip`.

        A forked output has two gradients, which the fused tail sums as it reads them: a pass over the map more, where
        a sum of its own takes three. A plain block has nothing to fork, and its `skip` is None.
        """
        y = self.branch(x)
        shortcut = x if skip is None else skip.view_as(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if self.se is None:
            y = self.relu(self.last_bn(y) + shortcut)
            return (y, None) if fork else y
        if not fork:
            return bn_se_forward(self.last_bn, self.se, y, shortcut, out_act="relu")
        y, y_skip = bn_se_forward(self.last_bn, self.se, y, shortcut, out_act="relu", fork=True)
        return y, _Apart.apply(y_skip) if torch.compiler.is_compiling() else y_skip


class Stage(nn.Sequential):
    """Blocks of one width, each output forked for the two readers it has in the next block."""

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:
        """As `ResidualBlock.forward`."""
        *blocks, last = self
        for block in blocks:
            x, skip = block(x, skip, fork=True)
        return last(x, skip, fork=fork)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the stride is in the first."""

    expansion = 1

    def __init__(
        self, in_chans: int, planes: int, stride: int, downsample: nn.Module | None, make_se: MakeSE | None
    ) -> None:
        super().__init__(planes, downsample, make_se)
        self.conv1 = conv3x3(in_chans, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn1(self.conv1(x))))


class Bottleneck(ResidualBlock):
    """1x1 reduce, 3x3, 1x1 expand by 4; the stride is in the first 1x1 (`stride_in_1x1`) or in the 3x3."""

    expansion = 4

    def __init__(
        self,
        in_chans: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        make_se: MakeSE | None,
        stride_in_1x1: bool,
    ) -> None:
        out_chans = planes * self.expansion
        super().__init__(out_chans, downsample, make_se)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_chans, planes, stride_1x1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride_3x3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, out_chans)
        self.bn3 = nn.BatchNorm2d(out_chans)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.conv3(self.relu(self.bn2(self.conv2(x))))


def init_weights(model: nn.Module, zero_init_last: bool) -> None:
    """He et al. (arXiv 1502.01852) for convolutions, fan out; each block's last BN starts at 0 if `zero_init_last`."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if zero_init_last:
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.last_bn.weight)


def check_sizes(num_classes: int, in_chans: int, drop_rate: float) -> None:
    """TypeError or ValueError for sizes no network can have."""
    check_size("num_classes", num_classes)
    check_size("in_chans", in_chans)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate must be in [0, 1); got {drop_rate}")

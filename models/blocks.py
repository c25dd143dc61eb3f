"""What every residual network here is made of: convolutions, the SE tail of a block, initialisation."""

from collections.abc import Callable

from torch import Tensor, nn

from setriton.functional import check_size
from setriton.modules import SqueezeExcite

MakeSE = Callable[[int], SqueezeExcite]


def conv3x3(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)


def conv1x1(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)


class ResidualBlock(nn.Module):
    """A block whose branch ends ``BN -> SE -> + shortcut -> ReLU``; a plain network leaves the SE out.

    The shortcut is `downsample(x)` where the shape changes, else x itself.
    """

    def __init__(self, out_chans: int, downsample: nn.Module | None, make_se: MakeSE | None) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.se = None if make_se is None else make_se(out_chans)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, up to and including its last BN."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.se is not None:
            y = self.se(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)


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

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


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

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


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
                last = [child for child in module.children() if isinstance(child, nn.BatchNorm2d)][-1]
                nn.init.zeros_(last.weight)


def check_sizes(num_classes: int, in_chans: int, drop_rate: float) -> None:
    """TypeError or ValueError for sizes no network can have."""
    check_size("num_classes", num_classes)
    check_size("in_chans", in_chans)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate must be in [0, 1); got {drop_rate}")

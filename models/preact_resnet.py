"""Pre-activation and wide ResNets for 32-pixel images and their SE twins (arXiv 1709.01507, section 5.1, CIFAR)."""

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from setriton.checks import check_rate, check_size
from setriton.stock import is_traced

from .base import Level, Network, Options
from .blocks import affine_se, conv1x1, conv3x3, init_weights, may_fuse
from .preprocessing import Preprocessing
from .registry import register
from .se import SEOptions
from .stages import Forked, ForkedStage, only_reads


class PreActBlock(nn.Module):
    """``x + SE(branch(relu(bn1(x))))``; a plain network leaves the SE out.

    Where the shape changes, the shortcut is a 1x1 convolution of ``relu(bn1(x))``, as in the code of both papers.

    Args:
        in_chans, mid_chans, out_chans: of the block, its 3x3 convolutions' output, and its output.
        stride: of the block.
        se: how its SE block is made, or None.
        conv_drop_rate: dropout before the last convolution.
    """

    takes_forks = True

    def __init__(
        self,
        in_chans: int,
        mid_chans: int,
        out_chans: int,
        *,
        stride: int = 1,
        se: SEOptions | None = None,
        conv_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(conv_drop_rate)
        self.se = None if se is None else se.make(out_chans)
        changes = stride != 1 or in_chans != out_chans
        self.projection = conv1x1(in_chans, out_chans, stride) if changes else None

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, from the first convolution to the last."""
        raise NotImplementedError

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:
        """The block's output; with `fork` a pair, x and skip of the next block (see `ResidualBlock.forward`)."""
        if is_traced(x):
            skip, fork = None, False
        shortcut = x if skip is None or not only_reads(self.bn1) else skip.view_as(x)
        x = self.relu(self.bn1(x))
        if self.projection is not None:
            shortcut = self.projection(x)
        x, se = self.branch(x), self.se
        if may_fuse(se, self, x):
            return affine_se(se, x, shortcut, fork=fork)
        y = shortcut + (x if se is None else se(x))
        return (y, None) if fork else y


class PreActBasic(PreActBlock):
    """Two 3x3 convolutions; the stride is in the first."""

    def __init__(self, in_chans: int, mid_chans: int, out_chans: int, *, stride: int = 1, **options: Any) -> None:
        super().__init__(in_chans, mid_chans, out_chans, stride=stride, **options)
        self.conv1 = conv3x3(in_chans, mid_chans, stride)
        self.bn2 = nn.BatchNorm2d(mid_chans)
        self.conv2 = conv3x3(mid_chans, out_chans)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.relu(self.bn2(self.conv1(x)))))


class PreActBottleneck(PreActBlock):
    """1x1, 3x3 and 1x1 convolutions; the stride is in the first (`stride_in_1x1`) or in the 3x3."""

    def __init__(
        self,
        in_chans: int,
        mid_chans: int,
        out_chans: int,
        *,
        stride: int = 1,
        stride_in_1x1: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_chans, mid_chans, out_chans, stride=stride, **options)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_chans, mid_chans, stride_1x1)
        self.bn2 = nn.BatchNorm2d(mid_chans)
        self.conv2 = conv3x3(mid_chans, mid_chans, stride_3x3)
        self.bn3 = nn.BatchNorm2d(mid_chans)
        self.conv3 = conv1x1(mid_chans, out_chans)

    def branch(self, x: Tensor) -> Tensor:
        x = self.conv2(self.relu(self.bn2(self.conv1(x))))
        return self.conv3(self.dropout(self.relu(self.bn3(x))))


class PreActResNet(Network):
    """The pre-activation ResNet for small images: three stages, then BN and ReLU.

    ResNet-110 and -164 are those of arXiv 1603.05027 (Tables 2 and 3), with 1x1 projections where the shape changes;
    WRN-16-8 is arXiv 1605.07146's (Table 1). SE is on the residual branch's output, before the sum; no BN stands there.
    Maps of stages 1 and 2 come out as sums, the last map behind the final BN and ReLU.

    Args:
        depth: blocks in each stage.
        widths: channels of the stages' 3x3 convolutions.
        bottleneck: blocks of three convolutions, with outputs four times as wide.
        se: how blocks have SE; None for the plain network.
        conv_drop_rate: dropout before each block's last convolution (arXiv 1605.07146, section 2.4).
        stride_in_1x1: whether a bottleneck's stride is in its first 1x1 convolution, as in the code of its paper, or in
            its 3x3 (+1.3 % operations in ResNet-164).
        options: of `setriton.models.base.Options`.

    Raises:
        TypeError, ValueError: a size or rate out of range.
    """

    usual_preprocessing = Preprocessing(32, 32)

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = (16, 32, 64),
        bottleneck: bool = False,
        se: SEOptions | None = None,
        *,
        conv_drop_rate: float = 0.0,
        stride_in_1x1: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        check_size("depth", depth)
        check_rate("conv_drop_rate", conv_drop_rate)
        self.conv1 = conv3x3(self.in_chans, 16)
        of_blocks: dict[str, Any] = {"se": se, "conv_drop_rate": conv_drop_rate}
        if bottleneck:
            of_blocks["stride_in_1x1"] = stride_in_1x1
        block = PreActBottleneck if bottleneck else PreActBasic
        levels: list[Level] = []
        in_chans = 16
        for stage, width in enumerate(widths):
            out_chans = width * (4 if bottleneck else 1)
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_chans, width, out_chans, stride=stride, **of_blocks))
                in_chans = out_chans
            self.add_module(f"layer{stage + 1}", ForkedStage(*blocks))
            levels.append({"module": f"layer{stage + 1}", "num_chs": in_chans, "reduction": 1 << stage})
        levels[-1]["module"] = "relu"
        self.bn = nn.BatchNorm2d(in_chans)
        self.relu = nn.ReLU(inplace=True)
        self.finish(("conv1", "layer1", "layer2", "layer3", "bn", "relu"), levels)
        init_weights(self)


# Networks without bottlenecks do not have the choice of where their stride is.
_NETWORKS: dict[str, dict[str, Any]] = {
    "preact_resnet110": {"depth": 18, "stride_in_1x1": False},
    "preact_resnet164": {"depth": 18, "bottleneck": True},
    "wrn16_8": {"depth": 2, "widths": (128, 256, 512), "stride_in_1x1": False},
}
for _name, _fixed in _NETWORKS.items():
    register(_name, PreActResNet, fixed=_fixed, num_classes=10)
    register(f"se_{_name}", PreActResNet, SEOptions, fixed=_fixed, num_classes=10)

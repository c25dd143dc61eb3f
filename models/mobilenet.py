"""MobileNet (arXiv 1704.04861) and its SE twin (arXiv 1709.01507, section 5.1 and Table 3)."""

from dataclasses import dataclass
from typing import Literal, Unpack

from torch import Tensor, nn

from setriton.checks import check_choice

from .base import Level, Network, Options
from .blocks import conv1x1, conv3x3, init_weights
from .registry import register
from .se import SEOptions, bn_se
from .stages import Stage

POSITIONS = ("pointwise", "depthwise")

# Output channels of the blocks, by resolution: Table 1 of the paper. A stage's first block has stride 2, but for the
# first stage's.
_STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))


@dataclass(frozen=True)
class MobileNetSEOptions(SEOptions):
    """SE blocks in MobileNet, and where.

    Raises:
        ValueError: also for a place that does not exist.
    """

    se_position: Literal["pointwise", "depthwise"] = "pointwise"
    """After which convolution's BN and ReLU. The paper does not say; its 4.7 million parameters are those of
    pointwise, and so are its 572 million operations, the squeeze's additions counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("se_position", self.se_position, POSITIONS)


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, each with BN and ReLU; then SE, one fused call with those.

    Args:
        in_chans, out_chans: of the block.
        stride: of the depthwise convolution.
        se: how and where its SE block is, or None.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, se: MobileNetSEOptions | None = None) -> None:
        super().__init__()
        self.conv_dw = conv3x3(in_chans, in_chans, stride, groups=in_chans)
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.conv_pw = conv1x1(in_chans, out_chans)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.relu = nn.ReLU(inplace=True)
        self.se_position = None if se is None else se.se_position
        self.se = None if se is None else se.make(in_chans if self.se_position == "depthwise" else out_chans)

    def forward(self, x: Tensor) -> Tensor:
        x = self._norm("depthwise", self.bn1, self.conv_dw(x))
        return self._norm("pointwise", self.bn2, self.conv_pw(x))

    def _norm(self, position: str, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if self.se is not None and self.se_position == position:
            return bn_se(self, bn, self.se, x, bn_act=self.relu)[0]
        return self.relu(bn(x))


class MobileNet(Network):
    """MobileNet 1.0: a 3x3 convolution, then 13 depthwise separable ones in five stages.

    Keys are timm's `mobilenetv1_100`, with `conv1`, `layer1` ... `layer5` and `fc` for its `conv_stem`, `blocks.0` ...
    `blocks.4` and `classifier`; timm's default is ReLU6, the paper's is ReLU.

    Args:
        se: how and where blocks have SE; None for the plain network.
        options: of `setriton.models.base.Options`.

    Raises:
        TypeError, ValueError: a size out of range.
    """

    def __init__(self, se: MobileNetSEOptions | None = None, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.conv1 = conv3x3(self.in_chans, 32, 2)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        levels: list[Level] = []
        in_chans = 32
        for stage, widths in enumerate(_STAGES):
            blocks = []
            for index, out_chans in enumerate(widths):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(SeparableBlock(in_chans, out_chans, stride, se))
                in_chans = out_chans
            self.add_module(f"layer{stage + 1}", Stage(*blocks))
            levels.append({"module": f"layer{stage + 1}", "num_chs": in_chans, "reduction": 2 << stage})
        self.finish(("conv1", "bn1", "relu", *(level["module"] for level in levels)), levels)
        init_weights(self)


register("mobilenet", MobileNet, fixed={})
register("se_mobilenet", MobileNet, MobileNetSEOptions, fixed={})

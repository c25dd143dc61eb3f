"""ResNet and SE-ResNet 18 to 152 for 224-pixel images (arXiv 1709.01507, Table 1), in both published layouts."""

import functools
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from setriton.checks import check_choice
from setriton.modules import SqueezeExcite

from .blocks import BasicBlock, Bottleneck, MakeSE, Stage, check_sizes, conv1x1, init_weights
from .registry import register

Layout = Literal["caffe", "torch"]
LAYOUTS = ("caffe", "torch")


class ResNet(nn.Module):
    """ResNet, or SE-ResNet with `se`. State-dict keys are torchvision's, and `se.fc1`, `se.fc2` in each block.

    The two layouts have the same parameters and different outputs:

    - "caffe", the authors': a bottleneck's stride is in its first 1x1 convolution, the stem pools without padding and
      rounds sizes up.
    - "torch", torchvision's and timm's (whose `seresnet18` and `34` have wider SE layers): the stride is in the 3x3
      (+6 % operations in ResNet-50), the stem pools with padding 1.

    Args:
        block: BasicBlock (18, 34) or Bottleneck (50, 101, 152).
        depths: blocks in each of the four stages.
        se: whether each block has a Squeeze-and-Excitation block after its last BN.
        num_classes: size of the output.
        in_chans: channels of the input images.
        layout: "caffe" or "torch".
        rd_ratio: hidden width of the SE blocks over their channels; the paper's r = 16 is 1/16.
        se_bias: whether the SE layers have biases, as in the authors' networks.
        drop_rate: dropout before the classifier; the paper has none here.
        zero_init_last: start each block as the identity.

    Raises:
        ValueError: an unknown layout, or a size out of range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        se: bool,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        layout: Layout = "caffe",
        rd_ratio: float = 1 / 16,
        se_bias: bool = True,
        drop_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_chans, drop_rate)
        check_choice("layout", layout, LAYOUTS)
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True) if layout == "caffe" else nn.MaxPool2d(3, 2, padding=1)
        make_se = functools.partial(SqueezeExcite, rd_ratio=rd_ratio, bias=se_bias) if se else None
        in_width = 64
        for stage, depth in enumerate(depths):
            planes, stride = 64 << stage, 1 if stage == 0 else 2
            blocks = []
            for index in range(depth):
                blocks.append(_make_block(block, in_width, planes, stride if index == 0 else 1, make_se, layout))
                in_width = planes * block.expansion
            self.add_module(f"layer{stage + 1}", Stage(*blocks))
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_width, num_classes)
        init_weights(self, zero_init_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, 512 * expansion, H/32, W/32)."""
        x, skip = self.maxpool(self.relu(self.bn1(self.conv1(x)))), None
        for name in ("layer1", "layer2", "layer3"):
            x, skip = self.get_submodule(name)(x, skip, fork=True)
        return self.get_submodule("layer4")(x, skip)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        x = self.forward_features(x).mean((2, 3))
        return self.fc(self.dropout(x))


def _make_block(
    block: type[BasicBlock] | type[Bottleneck],
    in_chans: int,
    planes: int,
    stride: int,
    make_se: MakeSE | None,
    layout: Layout,
) -> BasicBlock | Bottleneck:
    out_chans = planes * block.expansion
    downsample = None
    if stride != 1 or in_chans != out_chans:
        downsample = nn.Sequential(conv1x1(in_chans, out_chans, stride), nn.BatchNorm2d(out_chans))
    if block is BasicBlock:
        return BasicBlock(in_chans, planes, stride, downsample, make_se)
    return Bottleneck(in_chans, planes, stride, downsample, make_se, stride_in_1x1=layout == "caffe")


for _depth, _block, _depths in (
    (18, BasicBlock, (2, 2, 2, 2)),
    (34, BasicBlock, (3, 4, 6, 3)),
    (50, Bottleneck, (3, 4, 6, 3)),
    (101, Bottleneck, (3, 4, 23, 3)),
    (152, Bottleneck, (3, 8, 36, 3)),
):
    register(f"resnet{_depth}", functools.partial(ResNet, _block, _depths, False))
    register(f"se_resnet{_depth}", functools.partial(ResNet, _block, _depths, True))

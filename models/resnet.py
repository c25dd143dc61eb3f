"""ResNet, ResNeXt, their SE twins and SENet-154 (arXiv 1709.01507, Table 1), in both published layouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

from torch import nn

from setriton.checks import check_choice

from .base import Level, Network, Options
from .blocks import (
    BasicBlock,
    BlockSEOptions,
    Bottleneck,
    conv1x1,
    conv3x3,
    drop_path_rates,
    init_weights,
)
from .registry import register
from .se import ACTS
from .stages import ForkedStage

Layout = Literal["caffe", "torch"]
LAYOUTS = ("caffe", "torch")


@dataclass(frozen=True)
class Design:
    """What makes one network of the family differ from another."""

    depths: Sequence[int]
    """Blocks in each of the four stages."""
    bottleneck: bool = True
    groups: int = 1
    """Groups of the 3x3 convolutions: the cardinality of ResNeXt."""
    base_width: int = 64
    """Channels of each group of the first stage's 3x3 convolutions, for 64 planes."""
    senet154: bool = False
    """The changes of SENet-154 (arXiv 1709.01507, section 6.5 of its first version): three 3x3 convolutions as the
    stem, first 1x1 convolutions of half the width, 3x3 projections where the stride is 2."""


class ResNet(Network):
    """ResNet, or SE-ResNet with `se`. State-dict keys are torchvision's, and `se.fc1`, `se.fc2` in each block.

    The two layouts have the same parameters and different outputs:

    - "caffe", the authors': a bottleneck's stride is in its first 1x1 convolution (where those are not grouped), the
      stem pools without padding and rounds sizes up.
    - "torch", torchvision's and timm's: the stride is in the 3x3 (+6 % operations in ResNet-50), the stem pools with
      padding 1.

    Args:
        design: depths, widths and stem.
        se: how and where blocks have SE; None for the plain network.
        layout: "caffe" or "torch".
        output_stride: 32; or 16 or 8, where the last stages are dilated instead of strided.
        drop_path_rate: probability that an image skips the last block's branch in training; 0 in the first block,
            growing linearly.
        zero_init_last: start each block as the identity.
        bn_act: what stands between a block's last BN and SE: identity, or relu as in timm's `legacy_seresnet18`, `34`.
        options: of `setriton.models.base.Options`.

    Raises:
        TypeError, ValueError: an unknown layout, or a size out of range.
    """

    def __init__(
        self,
        design: Design,
        se: BlockSEOptions | None = None,
        *,
        layout: Layout = "caffe",
        output_stride: int = 32,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        bn_act: Literal["identity", "relu"] = "identity",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        check_choice("layout", layout, LAYOUTS)
        check_choice("bn_act", bn_act, ACTS)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32; got {output_stride}")
        self.design, self.layout, self.bn_act = design, layout, bn_act
        self.conv1 = _senet154_stem(self.in_chans) if design.senet154 else _stem(self.in_chans)
        stem_chans = 128 if design.senet154 else 64
        self.bn1 = nn.BatchNorm2d(stem_chans)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True) if layout == "caffe" else nn.MaxPool2d(3, 2, padding=1)
        drop_paths = iter(drop_path_rates(drop_path_rate, sum(design.depths)))
        levels: list[Level] = [{"module": "relu", "num_chs": stem_chans, "reduction": 2}]
        in_chans, reduction, dilation = stem_chans, 4, 1
        for stage, depth in enumerate(design.depths):
            stride, first_dilation = (1 if stage == 0 else 2), dilation
            if reduction * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            blocks = []
            for index in range(depth):
                first = index == 0
                block = self._block(
                    in_chans,
                    64 << stage,
                    se if se is None or stage + 2 in se.se_stages else None,
                    stride=stride if first else 1,
                    dilations=(first_dilation if first else dilation, dilation),
                    drop_path=next(drop_paths),
                )
                in_chans = block.last_bn.num_features
                blocks.append(block)
            self.add_module(f"layer{stage + 1}", ForkedStage(*blocks))
            levels.append({"module": f"layer{stage + 1}", "num_chs": in_chans, "reduction": reduction})
        self.finish(("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"), levels)
        init_weights(self, zero_init_last)

    def _block(
        self,
        in_chans: int,
        planes: int,
        se: BlockSEOptions | None,
        *,
        stride: int,
        dilations: tuple[int, int],
        drop_path: float,
    ) -> BasicBlock | Bottleneck:
        design = self.design
        out_chans = planes * (4 if design.bottleneck else 1)
        downsample = None
        if stride != 1 or in_chans != out_chans:
            wide = design.senet154 and (stride != 1 or dilations[1] != 1)
            project = (
                conv3x3(in_chans, out_chans, stride, dilations[0]) if wide else conv1x1(in_chans, out_chans, stride)
            )
            downsample = nn.Sequential(project, nn.BatchNorm2d(out_chans))
        shared = {"downsample": downsample, "se": se, "bn_act": self.bn_act, "drop_path": drop_path}
        if not design.bottleneck:
            return BasicBlock(in_chans, out_chans, stride=stride, dilations=dilations, **shared)
        mid_chans = planes * design.base_width // 64 * design.groups
        return Bottleneck(
            in_chans,
            mid_chans // 2 if design.senet154 else mid_chans,
            mid_chans,
            out_chans,
            stride=stride,
            dilation=dilations[0],
            groups=design.groups,
            stride_in_1x1=self.layout == "caffe" and design.groups == 1,
            **shared,
        )


def _stem(in_chans: int) -> nn.Module:
    return nn.Conv2d(in_chans, 64, 7, 2, padding=3, bias=False)


def _senet154_stem(in_chans: int) -> nn.Module:
    return nn.Sequential(
        conv3x3(in_chans, 64, 2),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        conv3x3(64, 64),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        conv3x3(64, 128),
    )


_RESNETS = {
    "resnet18": Design((2, 2, 2, 2), bottleneck=False),
    "resnet34": Design((3, 4, 6, 3), bottleneck=False),
    "resnet50": Design((3, 4, 6, 3)),
    "resnet101": Design((3, 4, 23, 3)),
    "resnet152": Design((3, 8, 36, 3)),
    "resnext50_32x4d": Design((3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x4d": Design((3, 4, 23, 3), groups=32, base_width=4),
    "resnext152_64x4d": Design((3, 8, 36, 3), groups=64, base_width=4),
}
_SENET154 = Design((3, 8, 36, 3), groups=64, base_width=4, senet154=True)

for _name, _design in _RESNETS.items():
    register(_name, ResNet, fixed={"design": _design})
    register(f"se_{_name}", ResNet, BlockSEOptions, fixed={"design": _design})
# Dropout 0.2 before the classifier is one of the changes of SENet-154, and of no other network.
register("resnext152_64x4d_modified", ResNet, fixed={"design": _SENET154}, drop_rate=0.2)
register("senet154", ResNet, BlockSEOptions, fixed={"design": _SENET154}, drop_rate=0.2)

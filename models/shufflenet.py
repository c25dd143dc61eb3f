"""ShuffleNet (arXiv 1707.01083) and its SE twin (arXiv 1709.01507, section 5.1 and Table 3)."""

from typing import Unpack

import torch
from torch import Tensor, nn

from setriton.stock import is_traced

from .base import Level, Network, Options
from .blocks import ResidualBlock, conv3x3, init_weights
from .registry import register
from .se import SEOptions, bn_se
from .stages import Forked, ForkedStage, only_reads

# Output channels and units of stages 2 to 4 for 3 groups (Table 1).
_STAGES = ((240, 4), (480, 8), (960, 4))


class ShuffleUnit(ResidualBlock):
    """A grouped 1x1, a shuffle, a depthwise 3x3 and a grouped 1x1 convolution, added to the input (Figure 2b).

    Args:
        in_chans, mid_chans, out_chans: of the branch.
        groups: of the 1x1 convolutions.
        first_groups: of the first, where others.
        stride: of the depthwise convolution.
        se: how its SE block is made, or None.
    """

    def __init__(
        self,
        in_chans: int,
        mid_chans: int,
        out_chans: int,
        groups: int,
        *,
        first_groups: int | None = None,
        stride: int = 1,
        se: SEOptions | None = None,
    ) -> None:
        super().__init__(in_chans, mid_chans, out_chans, se=se)
        self.groups = groups
        self.conv1 = nn.Conv2d(in_chans, mid_chans, 1, groups=first_groups or groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_chans)
        self.conv2 = conv3x3(mid_chans, mid_chans, stride, groups=mid_chans)
        self.bn2 = nn.BatchNorm2d(mid_chans)
        self.conv3 = nn.Conv2d(mid_chans, out_chans, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        x = _shuffle(self.relu(self.bn1(self.conv1(x))), self.groups)
        return self.conv3(self.bn2(self.conv2(x)))


class StridedShuffleUnit(ShuffleUnit):
    """A unit that halves the map: its branch is concatenated to the averaged input (Figure 2c).

    The ReLU behind the concatenation is in the branch alone, where it is one call with BN and SE: the input is no
    smaller than 0 already. SE too is in the branch alone, as in units that add.
    """

    def __init__(
        self,
        in_chans: int,
        mid_chans: int,
        out_chans: int,
        groups: int,
        *,
        first_groups: int | None = None,
        se: SEOptions | None = None,
    ) -> None:
        branch_chans = out_chans - in_chans
        super().__init__(in_chans, mid_chans, branch_chans, groups, first_groups=first_groups, stride=2, se=se)
        self.pool = nn.AvgPool2d(3, 2, padding=1)

    def only_reads(self) -> bool:
        return super().only_reads() and only_reads(self.pool)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:
        if is_traced(x):
            skip, fork = None, False
        pooled = self.pool(x if skip is None or not self.only_reads() else skip.view_as(x))
        y = self.branch(x)
        y = self.relu(self.bn3(y)) if self.se is None else bn_se(self, self.bn3, self.se, y, out_act=self.relu)[0]
        y = torch.cat((pooled, y), dim=1)
        return (y, None) if fork else y


class ShuffleNet(Network):
    """ShuffleNet 1x with 3 groups: a 3x3 convolution, a max pool, and 16 units in three stages.

    Two things the paper's text leaves open: the first unit's first convolution is not grouped, for it has 24 inputs,
    and the averaged input stands before the branch in concatenations.

    Args:
        se: how units have SE, on the residual branch before the sum or concatenation; None for the plain network.
        options: of `setriton.models.base.Options`.

    Raises:
        TypeError, ValueError: a size out of range.
    """

    def __init__(self, se: SEOptions | None = None, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        groups, in_chans = 3, 24
        self.conv1 = conv3x3(self.in_chans, in_chans, 2)
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        levels: list[Level] = [{"module": "relu", "num_chs": in_chans, "reduction": 2}]
        for stage, (out_chans, units) in enumerate(_STAGES):
            mid_chans = out_chans // 4
            first_groups = 1 if stage == 0 else groups
            first = StridedShuffleUnit(in_chans, mid_chans, out_chans, groups, first_groups=first_groups, se=se)
            others = (ShuffleUnit(out_chans, mid_chans, out_chans, groups, se=se) for _ in range(units - 1))
            self.add_module(f"layer{stage + 1}", ForkedStage(first, *others))
            levels.append({"module": f"layer{stage + 1}", "num_chs": out_chans, "reduction": 8 << stage})
            in_chans = out_chans
        self.finish(("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"), levels)
        init_weights(self)


@torch.fx.wrap
def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i of group j becomes channel j of group i: one copy, in the map's own layout."""
    if x.is_contiguous(memory_format=torch.channels_last):
        # Flattened as the other layout is, channels_last maps come out contiguous.
        last = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
        return last.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


register("shufflenet_g3", ShuffleNet, fixed={})
register("se_shufflenet_g3", ShuffleNet, SEOptions, fixed={})

"""Inception-ResNet-v2 (arXiv 1602.07261) and its SE twin (arXiv 1709.01507, Table 2); residual scales fused with SE."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from setriton.checks import check_choice, check_size
from setriton.modules import SqueezeExcite
from setriton.reference import accumulate_dtype
from setriton.stock import Conv2d, is_traced, weight_and_bias

from .base import Network, Options
from .blocks import affine_se, init_weights, may_fuse
from .bn_inception import ConvBN
from .preprocessing import Preprocessing
from .registry import register
from .se import SEOptions
from .stages import Forked, ForkedStage, only_reads

POSITIONS = ("standard", "post")

# Inception-ResNet's BN has another eps than BN-Inception's.
Conv = functools.partial(ConvBN, eps=1e-3)


@dataclass(frozen=True)
class InceptionResNetSEOptions(SEOptions):
    """SE blocks in Inception-ResNet-v2, and where.

    The authors of SE released no such network. "Squeeze and Excitation both act before summation with the identity
    branch" (arXiv 1709.01507, section 3.3) is what they say; the rest of the defaults is chosen here.

    Raises:
        ValueError: also for a place that does not exist, and for a scaled squeeze where there is no scale.
    """

    se_position: Literal["standard", "post"] = "standard"
    """standard: on the residual branch, before the sum. post: after the sum and ReLU, as in ports by others."""
    se_scaled: bool = False
    """Whether the squeeze reads the branch after its multiplication by the residual scale, rather than before."""
    se_mixed: bool = False
    """Whether the three modules without a residual, mixed_5b, mixed_6a and mixed_7a, have SE as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("se_position", self.se_position, POSITIONS)
        if self.se_scaled and self.se_position == "post":
            raise ValueError("se_scaled must be False where se_position is post, after the scaled sum")


class Branches(nn.Module):
    """Branches `branch0`, `branch1`, ... of one input, concatenated; then SE, if `se`."""

    def __init__(self, *branches: nn.Module, se: nn.Module | None = None) -> None:
        super().__init__()
        for index, branch in enumerate(branches):
            self.add_module(f"branch{index}", branch)
        self.width = len(branches)
        self.se = se

    def forward(self, x: Tensor) -> Tensor:
        x = self.concatenated(x)
        return x if self.se is None else self.se(x)

    def concatenated(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(f"branch{index}")(x) for index in range(self.width)], dim=1)


class ScaledResidual(Branches):
    """A residual block: ``relu(x + scale * se(conv2d(branches(x))))``, x being (N, C, H, W) as is the result.

    Where SE is fused, all that follows the convolution is one operator, the convolution's bias included: BN that
    normalizes nothing, of weight `scale`. What it squeezes is the scaled map; where that is not wanted, the first
    layer's weight is divided by the scale.

    Args:
        channels: C.
        branches: of the residual.
        branch_chans: channels of their concatenation.
        scale: of the residual.
        relu: whether the block ends in one.
        se: how and where its SE block is, or None.
    """

    takes_forks = True

    def __init__(
        self,
        channels: int,
        branches: Sequence[nn.Module],
        branch_chans: int,
        scale: float,
        relu: bool = True,
        se: InceptionResNetSEOptions | None = None,
    ) -> None:
        super().__init__(*branches, se=None if se is None else se.make(channels))
        self.conv2d = nn.Conv2d(branch_chans, channels, 1)
        self.scale = scale
        self.out_act: Literal["relu", "identity"] = "relu" if relu else "identity"
        self.se_position = None if se is None else se.se_position
        self.se_scaled = se is not None and se.se_scaled

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:  # type: ignore[override]
        """The block's output; with `fork` a pair, x and skip of the next block (see `ResidualBlock.forward`)."""
        if is_traced(x):
            skip, fork = None, False
        shortcut = x if skip is None or not self.only_reads() else skip.view_as(x)
        u, se = self.concatenated(x), self.se
        if self.se_position == "standard" and may_fuse(se, self, u, conv2d=(self.conv2d, Conv2d)):
            return self._fused(u, se, shortcut, fork)
        u = self.conv2d(u)
        scale = self.scale
        if se is not None and self.se_position == "standard":
            u, scale = (se(u * scale), 1.0) if self.se_scaled else (se(u), scale)
        y = torch.add(shortcut, u, alpha=scale)
        if self.out_act == "relu":
            y = torch.relu(y)
        if se is not None and self.se_position == "post":
            y = se(y)
        return (y, None) if fork else y

    def only_reads(self) -> bool:
        """Whether the block leaves its input as it is: only then may its shortcut be another tensor than x."""
        return all(only_reads(self.get_submodule(f"branch{index}")) for index in range(self.width))

    def _fused(self, u: Tensor, se: SqueezeExcite, shortcut: Tensor, fork: bool) -> Forked:
        conv, scale = self.conv2d, self.scale
        kernel, bias = weight_and_bias(conv)
        # The convolution's bias is BN's: no pass of its own adds it, and none sums its gradient.
        u = nn.Conv2d._conv_forward(conv, u, kernel, None)
        dtype = accumulate_dtype(u.dtype)
        weight, bias = u.new_full((u.shape[1],), scale, dtype=dtype), None if bias is None else bias.to(dtype) * scale
        w1_scale = 1.0 if self.se_scaled else scale
        options: dict[str, Any] = {"w1_scale": w1_scale, "out_act": self.out_act, "fork": fork}
        return affine_se(se, u, shortcut, weight=weight, bias=bias, **options)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, out_act={self.out_act}"


class InceptionResNetV2(Network):
    """Inception-ResNet-v2 as TF-slim has it, or SE-Inception-ResNet-v2 with `se`. State-dict keys are timm's, but `fc`.

    Images (N, in_chans, H, W) of at least 75 pixels a side, 299 in the paper; the last map is (N, 1536, 8, 8) of those.
    SE blocks are `se.fc1` and `se.fc2` in each block.

    Args:
        se: how and where blocks have SE; None for the plain network.
        repeats: residual blocks of the three resolutions, the last one's `block8` included. (5, 20, 5) has the 11.8
            GFLOPs that arXiv 1709.01507 states, which may be the network of its Table 2.
        options: of `setriton.models.base.Options`. TF-slim trained with a dropout of 0.2.

    Raises:
        TypeError, ValueError: `repeats` are not three numbers, of at least 1, 1 and 2; and as `Network`.
    """

    # timm's for TF-slim's weights: a crop of 0.8975.
    usual_preprocessing = Preprocessing(299, 333, (0.5,) * 3, (0.5,) * 3, interpolation="bicubic")

    def __init__(
        self,
        se: InceptionResNetSEOptions | None = None,
        *,
        repeats: Sequence[int] = (10, 20, 10),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        if isinstance(repeats, str) or not isinstance(repeats, Sequence) or len(repeats) != 3:
            raise ValueError(f"repeats must be three numbers; got {repeats!r}")
        for count in repeats:
            check_size("repeats", count)
        if repeats[2] < 2:
            raise ValueError(f"repeats must end in at least 2, block8 being one; got {repeats!r}")
        self.repeats = tuple(repeats)
        mixed = functools.partial(_mixed, se=se if se is not None and se.se_mixed else None)
        self.conv2d_1a = Conv(self.in_chans, 32, 3, stride=2)
        self.conv2d_2a = Conv(32, 32, 3)
        self.conv2d_2b = Conv(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = Conv(64, 80, 1)
        self.conv2d_4a = Conv(80, 192, 3)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = mixed(
            320,
            Conv(192, 96, 1),
            nn.Sequential(Conv(192, 48, 1), Conv(48, 64, 5, padding=2)),
            nn.Sequential(Conv(192, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)),
            nn.Sequential(nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), Conv(192, 64, 1)),
        )
        self.repeat = ForkedStage(*(_block35(se) for _ in range(repeats[0])))
        self.mixed_6a = mixed(
            1088,
            Conv(320, 384, 3, stride=2),
            nn.Sequential(Conv(320, 256, 1), Conv(256, 256, 3, padding=1), Conv(256, 384, 3, stride=2)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_1 = ForkedStage(*(_block17(se) for _ in range(repeats[1])))
        self.mixed_7a = mixed(
            2080,
            nn.Sequential(Conv(1088, 256, 1), Conv(256, 384, 3, stride=2)),
            nn.Sequential(Conv(1088, 256, 1), Conv(256, 288, 3, stride=2)),
            nn.Sequential(Conv(1088, 256, 1), Conv(256, 288, 3, padding=1), Conv(288, 320, 3, stride=2)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_2 = ForkedStage(*(_block8(se, 0.2) for _ in range(repeats[2] - 1)))
        self.block8 = _block8(se, 1.0, relu=False)
        self.conv2d_7b = Conv(2080, 1536, 1)
        self.finish(
            [name for name, _ in self.named_children()],
            [
                {"module": "conv2d_2b", "num_chs": 64, "reduction": 2},
                {"module": "conv2d_4a", "num_chs": 192, "reduction": 4},
                {"module": "repeat", "num_chs": 320, "reduction": 8},
                {"module": "repeat_1", "num_chs": 1088, "reduction": 16},
                {"module": "conv2d_7b", "num_chs": 1536, "reduction": 32},
            ],
        )
        init_weights(self)


def _mixed(channels: int, *branches: nn.Module, se: SEOptions | None) -> Branches:
    return Branches(*branches, se=None if se is None else se.make(channels))


def _block35(se: InceptionResNetSEOptions | None) -> ScaledResidual:
    branches = (
        Conv(320, 32, 1),
        nn.Sequential(Conv(320, 32, 1), Conv(32, 32, 3, padding=1)),
        nn.Sequential(Conv(320, 32, 1), Conv(32, 48, 3, padding=1), Conv(48, 64, 3, padding=1)),
    )
    return ScaledResidual(320, branches, 128, 0.17, se=se)


def _block17(se: InceptionResNetSEOptions | None) -> ScaledResidual:
    factored = nn.Sequential(
        Conv(1088, 128, 1), Conv(128, 160, (1, 7), padding=(0, 3)), Conv(160, 192, (7, 1), padding=(3, 0))
    )
    return ScaledResidual(1088, (Conv(1088, 192, 1), factored), 384, 0.1, se=se)


def _block8(se: InceptionResNetSEOptions | None, scale: float, relu: bool = True) -> ScaledResidual:
    factored = nn.Sequential(
        Conv(2080, 192, 1), Conv(192, 224, (1, 3), padding=(0, 1)), Conv(224, 256, (3, 1), padding=(1, 0))
    )
    return ScaledResidual(2080, (Conv(2080, 192, 1), factored), 448, scale, relu, se)


register("inception_resnet_v2", InceptionResNetV2, fixed={})
register("se_inception_resnet_v2", InceptionResNetV2, InceptionResNetSEOptions, fixed={})

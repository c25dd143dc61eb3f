"""ResNet-20/32/56/110 for 32-pixel images and their SE twins (arXiv 1709.01507, section 5.1, CIFAR)."""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Level, Network, Options
from .blocks import BasicBlock, BlockSEOptions, conv3x3, drop_path_rates, init_weights
from .preprocessing import Preprocessing
from .registry import register
from .stages import ForkedStage


class PadShortcut(nn.Module):
    """The shortcut without parameters (arXiv 1512.03385, option A): every second pixel, zeros for new channels."""

    only_reads = True

    def __init__(self, new_chans: int) -> None:
        super().__init__()
        self.new_chans = new_chans

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_chans // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_chans - before))


class SmallResNet(Network):
    """The ResNet of depth 6n + 2 for small images: three stages of n blocks, 16, 32 and 64 channels wide.

    Args:
        depth: 6n + 2.
        se: how and where blocks have SE; None for the plain network. Its stages are 2, 3 and 4.
        drop_path_rate: probability that an image skips the last block's branch in training; 0 in the first block,
            growing linearly.
        zero_init_last: start each block as the identity.
        options: of `setriton.models.base.Options`.

    Raises:
        TypeError, ValueError: a depth that is not 6n + 2, or a size out of range.
    """

    usual_preprocessing = Preprocessing(32, 32)

    def __init__(
        self,
        depth: int,
        se: BlockSEOptions | None = None,
        *,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, such as 20 or 56; got {depth}")
        if se is not None and not set(se.se_stages) & {2, 3, 4}:
            raise ValueError(f"se_stages must have some of the stages 2, 3 and 4 that there are; got {se.se_stages!r}")
        self.conv1 = conv3x3(self.in_chans, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        levels: list[Level] = [{"module": "relu", "num_chs": 16, "reduction": 1}]
        drop_paths = iter(drop_path_rates(drop_path_rate, (depth - 2) // 2))
        in_chans = 16
        for stage, planes in enumerate((16, 32, 64)):
            blocks = []
            for index in range((depth - 2) // 6):
                grows = stage > 0 and index == 0
                block = BasicBlock(
                    in_chans,
                    planes,
                    stride=2 if grows else 1,
                    downsample=PadShortcut(planes - in_chans) if grows else None,
                    se=se if se is None or stage + 2 in se.se_stages else None,
                    drop_path=next(drop_paths),
                )
                blocks.append(block)
                in_chans = planes
            self.add_module(f"layer{stage + 1}", ForkedStage(*blocks))
            levels.append({"module": f"layer{stage + 1}", "num_chs": planes, "reduction": 1 << stage})
        self.finish(("conv1", "bn1", "relu", "layer1", "layer2", "layer3"), levels)
        init_weights(self, zero_init_last)


for _depth in (20, 32, 56, 110):
    register(f"resnet{_depth}", SmallResNet, fixed={"depth": _depth}, num_classes=10)
    register(f"se_resnet{_depth}", SmallResNet, BlockSEOptions, fixed={"depth": _depth}, num_classes=10)

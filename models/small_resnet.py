"""ResNet-20/32/56/110 for 32-pixel images and their SE twins (arXiv 1709.01507, section 5.1, CIFAR)."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from setriton.modules import SqueezeExcite

from .blocks import BasicBlock, Stage, check_sizes, conv3x3, init_weights
from .registry import register


class PadShortcut(nn.Module):
    """The shortcut without parameters (arXiv 1512.03385, option A): every second pixel, zeros for new channels."""

    def __init__(self, new_chans: int) -> None:
        super().__init__()
        self.new_chans = new_chans

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_chans // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_chans - before))


class SmallResNet(nn.Module):
    """The ResNet of depth 6n + 2 for small images: three stages of n blocks, 16, 32 and 64 channels wide.

    Args:
        depth: 6n + 2.
        se: whether each block has a Squeeze-and-Excitation block after its last BN.
        num_classes: size of the output.
        in_chans: channels of the input images.
        rd_ratio: hidden width of the SE blocks over their channels: 1, 2 and 4 for the paper's r = 16.
        se_bias: whether the SE layers have biases.
        drop_rate: dropout before the classifier; the paper has none here.
        zero_init_last: start each block as the identity.

    Raises:
        ValueError: a depth that is not 6n + 2, or a size out of range.
    """

    def __init__(
        self,
        depth: int,
        se: bool,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        rd_ratio: float = 1 / 16,
        se_bias: bool = True,
        drop_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_chans, drop_rate)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, such as 20 or 56; got {depth}")
        make_se = functools.partial(SqueezeExcite, rd_ratio=rd_ratio, bias=se_bias) if se else None
        self.conv1 = conv3x3(in_chans, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        in_width = 16
        for stage, planes in enumerate((16, 32, 64)):
            blocks = []
            for index in range((depth - 2) // 6):
                grows = stage > 0 and index == 0
                shortcut = PadShortcut(planes - in_width) if grows else None
                blocks.append(BasicBlock(in_width, planes, 2 if grows else 1, shortcut, make_se))
                in_width = planes
            self.add_module(f"layer{stage + 1}", Stage(*blocks))
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_width, num_classes)
        init_weights(self, zero_init_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, 64, H/4, W/4)."""
        x, skip = self.relu(self.bn1(self.conv1(x))), None
        for name in ("layer1", "layer2"):
            x, skip = self.get_submodule(name)(x, skip, fork=True)
        return self.get_submodule("layer3")(x, skip)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        x = self.forward_features(x).mean((2, 3))
        return self.fc(self.dropout(x))


for _depth in (20, 32, 56, 110):
    register(f"resnet{_depth}", functools.partial(SmallResNet, _depth, False))
    register(f"se_resnet{_depth}", functools.partial(SmallResNet, _depth, True))

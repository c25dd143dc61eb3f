"""VGG-16 with BN (arXiv 1409.1556) and its SE twin (arXiv 1709.01507, Table 2)."""

from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from setriton.checks import check_size

from .base import GlobalPool, Level, Network, Options
from .blocks import init_weights
from .registry import register
from .se import SEOptions, bn_se
from .stages import Stage

# Convolutions and their channels between the max pools: configuration D of Table 1.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# Side of the map that the hidden layers read: 224 / 32.
_HEAD_SIDE = 7


class VGGBlock(nn.Module):
    """A 3x3 convolution with bias, BN and ReLU; then SE, one fused call with those.

    Args:
        in_chans, out_chans: of the convolution.
        se: how its SE block is made, or None.
    """

    def __init__(self, in_chans: int, out_chans: int, se: SEOptions | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.bn = nn.BatchNorm2d(out_chans)
        self.relu = nn.ReLU(inplace=True)
        self.se = None if se is None else se.make(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.relu(self.bn(x)) if self.se is None else bn_se(self, self.bn, self.se, x, bn_act=self.relu)[0]


class VGG(Network):
    """VGG-16 with BN: 13 convolutions in five stages, a max pool behind each, and two hidden layers before `fc`.

    The arithmetic is that of torchvision's `vgg16_bn`, and so are the order of the state dict's tensors, the keys of
    the hidden layers (`classifier.0` and `.3`) and dropout, which is behind both of them. Images of other sizes are
    averaged to 7x7 before the hidden layers.

    The paper on SE does not say where SE stands in VGG: after BN and ReLU of each convolution is the choice made here.
    It agrees with the paper's 15.48 billion operations, the squeeze's additions counted; so would fewer places.

    Args:
        se: how blocks have SE; None for the plain network.
        hidden_size: width of the hidden layers, and of the features that the head gives without classes.
        options: of `setriton.models.base.Options`. `global_pool` is avg, or "" for no head at all; `drop_rate` is 0.5
            by default.

    Raises:
        TypeError, ValueError: a size out of range, another pool.
    """

    def __init__(self, se: SEOptions | None = None, *, hidden_size: int = 4096, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        check_size("hidden_size", hidden_size)
        self.hidden_size = hidden_size
        levels: list[Level] = []
        trunk: list[str] = []
        in_chans = self.in_chans
        for stage, (depth, width) in enumerate(STAGES, start=1):
            blocks = []
            for _ in range(depth):
                blocks.append(VGGBlock(in_chans, width, se))
                in_chans = width
            self.add_module(f"layer{stage}", Stage(*blocks))
            self.add_module(f"pool{stage}", nn.MaxPool2d(2))
            levels.append({"module": f"layer{stage}", "num_chs": width, "reduction": 1 << (stage - 1)})
            trunk += [f"layer{stage}", f"pool{stage}"]
        levels.append({"module": trunk[-1], "num_chs": in_chans, "reduction": 32})
        self.classifier: nn.Module = nn.Identity()
        self.finish(trunk, levels)
        init_weights(self)

    @property
    def head_hidden_size(self) -> int:
        return self.hidden_size

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """A new `fc`; the hidden layers stay. They are removed with the pool, and new if there is one again.

        Raises:
            TypeError, ValueError: as for the constructor.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool must be avg in VGG, or '' for no head; got {pool!r}")
        super().reset_classifier(num_classes, pool)
        if not pool:
            self.classifier = nn.Identity()
        elif isinstance(self.classifier, nn.Identity):
            self.classifier = self._hidden_layers()

    def _hidden_layers(self) -> nn.Module:
        where = next(self.parameters())
        like: dict[str, Any] = {"device": where.device, "dtype": where.dtype}
        return nn.Sequential(
            nn.Linear(self.num_features * _HEAD_SIDE**2, self.hidden_size, **like),
            nn.ReLU(inplace=True),
            nn.Dropout(self.drop_rate),
            nn.Linear(self.hidden_size, self.hidden_size, **like),
            nn.ReLU(inplace=True),
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The 7x7 average, hidden layers, dropout and classifier; (N, hidden_size) if `pre_logits`."""
        if not self.global_pool:
            return x
        x = F.adaptive_avg_pool2d(x, _HEAD_SIDE).flatten(1)
        x = self.dropout(self.classifier(x))
        return x if pre_logits else self.fc(x)

    def prune(self, last: int) -> None:
        super().prune(last)
        self.reset_classifier(0, "")


register("vgg16_bn", VGG, fixed={}, drop_rate=0.5)
register("se_vgg16_bn", VGG, SEOptions, fixed={}, drop_rate=0.5)

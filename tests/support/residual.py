"""A network of three residual blocks with SE, as users write them."""

import torch
import torch.nn.functional as F
from graphs import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C = 8


class Residual(nn.Module):
    """A convolution and a tail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        e = torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        return F.relu(y * e + x)


class Network(nn.Module):
    """Three residual blocks, the second one checkpointed if asked for."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.checkpointed = checkpointed
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed and index == 1 else block(x)
        return x


def image(n: int = 2, size: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, C, size, size, dtype=torch.float64)

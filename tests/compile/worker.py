"""Compiles a network by the backend's name alone, and prints what the caches held and how many blocks were found."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """A convolution and a tail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y * torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True))))) + x)


if __name__ == "__main__":
    from torch._dynamo.utils import counters

    assert "setriton" not in sys.modules
    torch.compile(Network(), backend="setriton", fullgraph=True)(torch.randn(2, 8, 4, 4)).sum().backward()
    import setriton

    found = counters["aot_autograd"]
    print(found["autograd_cache_hit"], "hits", found["autograd_cache_miss"], "misses")
    print(len(setriton.compile_report()), "blocks")

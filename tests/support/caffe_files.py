"""Caffe's side of weight loading: an encoder of .caffemodel files, and an interpreter of the authors' ResNets.

Both follow caffe.proto, Caffe's layers and the prototxts of hujie-frank/SENet, and share no code with setriton.
"""

import struct
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Blobs = dict[str, list[Tensor]]


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def encode_caffemodel(blobs: Blobs, *, old: bool = False) -> bytes:
    """A NetParameter; `old` is the first version of layers, with four-dimensional blobs."""
    layer_field, name_field, blobs_field = (2, 4, 6) if old else (100, 1, 7)
    net = _message(1, b"a network")
    for name, tensors in blobs.items():
        layer = _message(name_field, name.encode())
        if not old:
            layer += _message(2, b"Convolution")
        for tensor in tensors:
            data = struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())
            if old:
                shape = [1] * (4 - tensor.dim()) + list(tensor.shape)
                head = b"".join(_varint(axis << 3) + _varint(size) for axis, size in enumerate(shape, 1))
            else:
                head = _message(7, _message(1, b"".join(map(_varint, tensor.shape))))
            layer += _message(blobs_field, head + _message(5, data))
        net += _message(layer_field, layer)
    return net


class CaffeNet:
    """Runs layers by name in float64, making random blobs for those that it has not met."""

    def __init__(self, conv_bias: bool = False) -> None:
        self.blobs: Blobs = {}
        self.conv_bias = conv_bias
        self.generator = torch.Generator().manual_seed(0)

    def _random(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        # Numbers that float32, in which Caffe's files are, holds exactly.
        values = torch.empty(shape, dtype=torch.float32).uniform_(low, high, generator=self.generator)
        return values.double()

    def conv(
        self, name: str, x: Tensor, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Tensor:
        if name not in self.blobs:
            fan_in = x.shape[1] // groups * kernel * kernel
            weight = self._random(out, x.shape[1] // groups, kernel, kernel) * 2 ** -round(0.5 * fan_in.bit_length())
            self.blobs[name] = [weight, *([self._random(out)] if bias else [])]
        weight, *rest = self.blobs[name]
        return F.conv2d(x, weight, rest[0] if rest else None, stride, kernel // 2, 1, groups)

    def bn(self, name: str, x: Tensor) -> Tensor:
        """BatchNorm and Scale: statistics are sums, to be divided by a factor."""
        channels = x.shape[1]
        if f"{name}/bn" not in self.blobs:
            factor = torch.tensor([4.0], dtype=torch.float64)
            mean, var = self._random(channels), self._random(channels, low=2.0, high=6.0)
            self.blobs[f"{name}/bn"] = [mean, var, factor]
            self.blobs[f"{name}/bn/scale"] = [self._random(channels, low=0.5), self._random(channels)]
        mean, var, factor = self.blobs[f"{name}/bn"]
        weight, bias = (blob.view(1, -1, 1, 1) for blob in self.blobs[f"{name}/bn/scale"])
        centred = x - (mean / factor).view(1, -1, 1, 1)
        return centred / (var / factor + 1e-5).sqrt().view(1, -1, 1, 1) * weight + bias

    def conv_bn(
        self, name: str, x: Tensor, out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> Tensor:
        y = self.bn(name, self.conv(name, x, out, kernel, stride, groups, self.conv_bias))
        return y.relu() if relu else y

    def pool(self, x: Tensor) -> Tensor:
        """Max 3x3, stride 2, no padding, sizes rounded up."""
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def excite(self, name: str, x: Tensor) -> Tensor:
        """The gates of one block, whose layers are called after it."""
        s = x.mean((2, 3), keepdim=True)
        s = self._fc(f"{name}_1x1_down", s, x.shape[1] // 16).relu()
        return torch.sigmoid(self._fc(f"{name}_1x1_up", s, x.shape[1]))

    def _fc(self, name: str, s: Tensor, out: int) -> Tensor:
        if name not in self.blobs:
            self.blobs[name] = [self._random(out, s.shape[1], 1, 1) / 4, self._random(out)]
        weight, bias = self.blobs[name]
        return F.conv2d(s, weight, bias)

    def classifier(self, x: Tensor, classes: int) -> Tensor:
        x = x.mean((2, 3))
        if "classifier" not in self.blobs:
            self.blobs["classifier"] = [self._random(classes, x.shape[1]) / 4, self._random(classes)]
        weight, bias = self.blobs["classifier"]
        return F.linear(x, weight, bias)


def se_resnet(depths: tuple[int, ...], width: int, groups: int) -> Callable[[CaffeNet, Tensor], Tensor]:
    """SE-ResNet (one group; the stride is in the first 1x1) or SE-ResNeXt (more; it is in the 3x3)."""

    def run(net: CaffeNet, x: Tensor) -> Tensor:
        x = net.pool(net.conv_bn("conv1/7x7_s2", x, 64, 7, 2))
        for stage, depth in enumerate(depths, 2):
            for block in range(1, depth + 1):
                name, planes, out = f"conv{stage}_{block}", width << (stage - 2), 256 << (stage - 2)
                stride = 2 if stage > 2 and block == 1 else 1
                first, second = (stride, 1) if groups == 1 else (1, stride)
                y = net.conv_bn(f"{name}_1x1_reduce", x, planes, 1, first)
                y = net.conv_bn(f"{name}_3x3", y, planes, 3, second, groups)
                y = net.conv_bn(f"{name}_1x1_increase", y, out, 1, relu=False)
                if block == 1:
                    x = net.conv_bn(f"{name}_1x1_proj", x, out, 1, stride, relu=False)
                x = (net.excite(name, y) * y + x).relu()
        return net.classifier(x, 1000)

    return run


def senet154(net: CaffeNet, x: Tensor) -> Tensor:
    """SENet-154: three 3x3 convolutions first, halved first 1x1, 3x3 projections where the stride is 2."""
    x = net.conv_bn("conv1_1/3x3_s2", x, 64, 3, 2)
    x = net.conv_bn("conv1_2/3x3", x, 64, 3)
    x = net.pool(net.conv_bn("conv1_3/3x3", x, 128, 3))
    for stage, depth in enumerate((3, 8, 36, 3), 2):
        for block in range(1, depth + 1):
            name, out = f"conv{stage}_{block}", 256 << (stage - 2)
            stride = 2 if stage > 2 and block == 1 else 1
            y = net.conv_bn(f"{name}_1x1_reduce", x, out // 2, 1)
            y = net.conv_bn(f"{name}_3x3", y, out, 3, stride, 64)
            y = net.conv_bn(f"{name}_1x1_increase", y, out, 1, relu=False)
            if block == 1:
                x = net.conv_bn(f"{name}_1x1_proj", x, out, 3 if stride == 2 else 1, stride, relu=False)
            x = (net.excite(name, y) * y + x).relu()
    return net.classifier(x, 1000)


# Of each module: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, a, b; projection behind the pool. 0: there is none, stride 2.
_INCEPTION = {
    "3a": (64, 64, 64, 64, 96, 96, 32),
    "3b": (64, 64, 96, 64, 96, 96, 64),
    "3c": (0, 128, 160, 64, 96, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128, 128),
    "4c": (160, 128, 160, 128, 160, 160, 128),
    "4d": (96, 128, 192, 160, 192, 192, 128),
    "4e": (0, 128, 192, 192, 256, 256, 0),
    "5a": (352, 192, 320, 160, 224, 224, 128),
    "5b": (352, 192, 320, 192, 224, 224, 128),
}


def bn_inception(net: CaffeNet, x: Tensor, se: bool = True) -> Tensor:
    """SE-BN-Inception, or BN-Inception."""
    x = net.pool(net.conv_bn("conv1/7x7_s2", x, 64, 7, 2))
    x = net.pool(net.conv_bn("conv2/3x3", net.conv_bn("conv2/3x3_reduce", x, 64, 1), 192, 3))
    for module, (one, reduce, three, double, a, b, proj) in _INCEPTION.items():
        name, stride = f"inception_{module}", 1 if one else 2
        maps = [net.conv_bn(f"{name}/1x1", x, one, 1)] if one else []
        maps.append(net.conv_bn(f"{name}/3x3", net.conv_bn(f"{name}/3x3_reduce", x, reduce, 1), three, 3, stride))
        y = net.conv_bn(f"{name}/double3x3a", net.conv_bn(f"{name}/double3x3_reduce", x, double, 1), a, 3)
        maps.append(net.conv_bn(f"{name}/double3x3b", y, b, 3, stride))
        if not one:
            maps.append(net.pool(x))
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if module == "5b" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=True)
            maps.append(net.conv_bn(f"{name}/pool_proj", pooled, proj, 1))
        x = torch.cat(maps, dim=1)
        if se:
            x = net.excite(name, x) * x
    return net.classifier(x, 1000)

"""Results have the strides that PyTorch's own operations give them, also of maps that are parts of others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_step import randomized
from timm.layers import SEModule
from torch import Tensor, nn

import setriton
from setriton.modules import bn_se_forward

LAST = torch.channels_last

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "channels_last": lambda z: z.contiguous(memory_format=LAST),
    "chunk": lambda z: z.chunk(2, 1)[1],
    "chunk of channels_last": lambda z: z.contiguous(memory_format=LAST).chunk(2, 1)[1],
    "rows": lambda z: z[:, :, ::2],
    "columns": lambda z: z[..., 1:4],
    "columns of channels_last": lambda z: z.contiguous(memory_format=LAST)[..., 1:],
    "channels": lambda z: z[:, ::2],
    "channels of channels_last": lambda z: z.contiguous(memory_format=LAST)[:, ::2],
    "images": lambda z: z.contiguous(memory_format=LAST)[::2],
    "transposed": lambda z: z.transpose(2, 3),
    "transposed channels_last": lambda z: z.contiguous(memory_format=LAST).transpose(2, 3),
    "channels first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda z: z[:1].expand(4, -1, -1, -1),
    "expanded pixels": lambda z: z[:, :, :1, :1].expand(-1, -1, 6, 5),
    "one row": lambda z: z[:, :, :1],
    "one column of channels_last": lambda z: z.contiguous(memory_format=LAST)[..., :1],
    "one pixel": lambda z: z[:, :, :1, :1],
    "one channel": lambda z: z[:, :1],
    "one image": lambda z: z[:1].chunk(2, 1)[1],
}


def strides(t: Tensor) -> list[int]:
    """Along the axes that are stepped over."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_strides_of_results(name: str, training: bool, fork: bool) -> None:
    x = MAPS[name](torch.randn(4, 8, 6, 5, dtype=torch.float64))
    channels = x.shape[1]
    tail: Any = randomized(setriton.BatchNormSqueezeExcite(channels, rd_channels=3, act="gelu")).train(training)
    bn, se = tail.to_pair()
    e = torch.sigmoid(se.fc2(torch.nn.functional.gelu(se.fc1(x.mean((2, 3), keepdim=True)))))
    y, wanted = se(x), x * e
    torch.testing.assert_close(y, wanted)
    assert strides(y) == strides(wanted)
    wanted = torch.nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training)
    for found in _results(bn, se, x, fork):
        assert strides(found) == strides(wanted)


def _results(bn: nn.BatchNorm2d, se: setriton.SqueezeExcite, x: Tensor, fork: bool) -> list[Tensor]:
    return [*bn_se_forward(bn, se, x, x, fork=True)] if fork else [bn_se_forward(bn, se, x)]


@pytest.mark.parametrize("name", MAPS)
def test_strides_of_accelerated_modules(name: str) -> None:
    x = MAPS[name](torch.randn(4, 8, 6, 5, dtype=torch.float64))
    model = randomized(nn.Sequential(nn.BatchNorm2d(x.shape[1]), _stock(x.shape[1])))
    twin = randomized(nn.Sequential(nn.BatchNorm2d(x.shape[1]), _stock(x.shape[1])))
    twin.load_state_dict(model.state_dict())
    assert setriton.accelerate(model).replaced == {"1": "bn_se"}
    for found, wanted in ((model(x), twin(x)), (model[1](x), twin[1](x))):  # type: ignore[index]
        torch.testing.assert_close(found, wanted)
        assert strides(found) == strides(wanted)


def _stock(channels: int) -> nn.Module:
    return SEModule(channels, rd_channels=3, act_layer=nn.GELU)

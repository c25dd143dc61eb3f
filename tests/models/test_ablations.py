"""The variants of the paper's section 6: their sizes, and what they compute against each written out plainly."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_step import assert_same, assert_same_step, images, randomized
from torch import Tensor, nn

from setriton import SqueezeExcite, create_model
from setriton.models.blocks import POSITIONS, BlockSEOptions, Bottleneck
from setriton.models.published import count
from setriton.models.resnet import Design, ResNet
from setriton.models.se import GATES, StockSqueezeExcite

# Parameters and multiply-adds of SE-ResNet-50 in the authors' layout without biases in SE blocks, as in section 6.
SIZES: list[tuple[dict[str, Any], int, int]] = [
    ({"rd_ratio": 1 / 2}, 45_676_584, 3_878_092_800),
    ({"rd_ratio": 1 / 4}, 35_616_808, 3_868_033_024),
    ({"rd_ratio": 1 / 8}, 30_586_920, 3_863_003_136),
    ({"rd_ratio": 1 / 16}, 28_071_976, 3_860_488_192),
    ({"rd_ratio": 1 / 32}, 26_814_504, 3_859_230_720),
    ({"squeeze": "max"}, 28_071_976, 3_860_488_192),
    ({"gate": "tanh"}, 28_071_976, 3_860_488_192),
    ({"gate": "relu"}, 28_071_976, 3_860_488_192),
    ({"se_stages": (2,)}, 25_581_608, 3_857_997_824),
    ({"se_stages": (3,)}, 25_688_104, 3_858_104_320),
    ({"se_stages": (4,)}, 26_343_464, 3_858_759_680),
    ({"se_stages": (2, 3, 4, 5)}, 28_071_976, 3_860_488_192),
    ({"se_stages": (2, 3, 4)}, 26_499_112, 3_858_915_328),
    ({"se_position": "pre"}, 27_548_200, 3_859_964_416),
    ({"se_position": "post"}, 28_071_976, 3_860_488_192),
    ({"se_position": "identity"}, 28_071_976, 3_860_488_192),
    ({"se_position": "3x3"}, 25_714_216, 3_858_130_432),
    ({"squeeze": "none"}, 28_071_976, 4_269_015_040),
]
VARIANTS: list[dict[str, Any]] = [
    *({"se_position": position} for position in POSITIONS),
    {"squeeze": "max"},
    {"squeeze": "none"},
    {"gate": "tanh"},
    {"gate": "relu"},
    {"rd_ratio": 1 / 2, "se_bias": False},
    {"rd_channels": 3},
    {"se_stages": (3, 4)},
]


@pytest.mark.parametrize(("options", "parameters", "macs"), SIZES, ids=str)
def test_sizes(options: dict[str, Any], parameters: int, macs: int) -> None:
    counted = count("se_resnet50", layout="caffe", se_bias=False, **options)
    assert (counted.parameters, counted.macs) == (parameters, macs)
    extra = parameters - 25_557_032
    if options.keys() == {"squeeze"} and options["squeeze"] == "none":
        # The gate is computed for each pixel: every weight is used as often as its map has pixels.
        weights = {56: 2 * 3 * 256 * 16, 28: 2 * 4 * 512 * 32, 14: 2 * 6 * 1024 * 64, 7: 2 * 3 * 2048 * 128}
        assert sum(weights.values()) == extra
        extra = sum(number * size**2 for size, number in weights.items())
    # One multiply-add for each weight more than in ResNet-50.
    assert macs - 3_857_973_248 == extra


def gate_widths(name: str) -> list[tuple[int, int]]:
    blocks = [m for m in create_model(name, device="meta").modules() if isinstance(m, SqueezeExcite)]
    return [(se.fc1.in_channels, se.fc1.out_channels) for se in blocks]


@pytest.mark.parametrize("name", ["se_resnet50", "se_resnext50_32x4d"])
def test_widths_of_gates(name: str) -> None:
    assert gate_widths(name) == [(256, 16)] * 3 + [(512, 32)] * 4 + [(1024, 64)] * 6 + [(2048, 128)] * 3


def test_widths_of_gates_that_are_no_multiples_of_8() -> None:
    widths = [(256, 16), (320, 20), *[(576, 36)] * 3, *[(608, 38)] * 2, (1056, 66), *[(1024, 64)] * 2]
    assert gate_widths("se_bn_inception") == widths
    assert BlockSEOptions(rd_divisor=8).hidden(576) == 40
    assert BlockSEOptions(rd_divisor=8).hidden(64) == 8
    assert BlockSEOptions(rd_channels=16).hidden(2048) == 16
    assert BlockSEOptions().hidden(8) == 1


def naive_bn(bn: Any, x: Tensor, training: bool) -> Tensor:
    columns = (1, -1, 1, 1)
    mean, var = bn.running_mean, bn.running_var
    if training:
        mean = x.mean((0, 2, 3))
        var = (x - mean.view(columns)).square().mean((0, 2, 3))
    scaled = (x - mean.view(columns)) / (var.view(columns) + bn.eps).sqrt()
    return scaled * bn.weight.view(columns) + bn.bias.view(columns)


def naive_se(se: Any, x: Tensor, squeeze: str, gate: str) -> Tensor:
    w1, w2 = se.fc1.weight[:, :, 0, 0], se.fc2.weight[:, :, 0, 0]
    b1 = 0 if se.fc1.bias is None else se.fc1.bias
    b2 = 0 if se.fc2.bias is None else se.fc2.bias
    pixels = x.flatten(2).transpose(1, 2)  # (N, H W, C)
    squeezed = {"avg": pixels.mean(1, keepdim=True), "max": pixels.max(1, keepdim=True).values, "none": pixels}[squeeze]
    z = (squeezed @ w1.T + b1).clamp(min=0) @ w2.T + b2
    gates = {"sigmoid": 1 / (1 + (-z).exp()), "tanh": 1 - 2 / ((2 * z).exp() + 1), "relu": z.clamp(min=0)}[gate]
    return (pixels * gates).transpose(1, 2).reshape(x.shape)


def naive_block(block: Any, x: Tensor, position: str, squeeze: str, gate: str) -> Tensor:
    """A bottleneck whose stride is in its 3x3 convolution, by the figures 5 and 2 of the paper."""

    def se(y: Tensor, here: str) -> Tensor:
        return naive_se(block.se, y, squeeze, gate) if position == here else y

    training = block.training
    shortcut = x
    if block.downsample is not None:
        project, bn = block.downsample
        shortcut = naive_bn(bn, F.conv2d(x, project.weight, stride=block.conv2.stride), training)
    y = F.conv2d(se(x, "pre"), block.conv1.weight)
    y = F.conv2d(naive_bn(block.bn1, y, training).clamp(min=0), block.conv2.weight, None, block.conv2.stride, 1)
    y = se(naive_bn(block.bn2, y, training), "3x3").clamp(min=0)
    y = se(naive_bn(block.bn3, F.conv2d(y, block.conv3.weight), training), "standard")
    return se((y + se(shortcut, "identity")).clamp(min=0), "post")


@pytest.mark.parametrize("options", VARIANTS[:-1], ids=str)
@pytest.mark.parametrize("projects", [True, False], ids=["projection", "identity"])
def test_a_block_computes_its_formula(options: dict[str, Any], projects: bool) -> None:
    torch.manual_seed(0)
    in_chans = 24 if projects else 32
    project = nn.Sequential(nn.Conv2d(in_chans, 32, 1, 2, bias=False), nn.BatchNorm2d(32)) if projects else None
    se = BlockSEOptions(**{"rd_ratio": 1 / 8, **options})
    block = Bottleneck(in_chans, 8, 16, 32, stride=2 if projects else 1, downsample=project, se=se)
    randomized(block)
    x = torch.randn(3, in_chans, 6, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    for training in (True, False):
        block.train(training)
        want = naive_block(block, x, se.se_position, se.squeeze, se.gate)
        found = block(x)
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)
        outputs = [torch.autograd.grad(y.sin().sum(), inputs) for y in (found, want)]
        for gradient, wanted in zip(*outputs, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


def network(depths: Sequence[int] = (1, 1, 1, 1), **options: Any) -> Any:
    """SE-ResNet of so many bottlenecks."""
    torch.manual_seed(0)
    return randomized(ResNet(Design(depths), BlockSEOptions(**options), num_classes=5))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_fused_or_stock_a_variant_is_the_same(options: dict[str, Any]) -> None:
    fused, stock = network(**options), network(fused=False, **options)
    stock.load_state_dict(fused.state_dict())
    is_paper = options.keys().isdisjoint({"squeeze", "gate"})
    for model, kind in ((fused, SqueezeExcite if is_paper else StockSqueezeExcite), (stock, StockSqueezeExcite)):
        blocks = [m for m in model.modules() if isinstance(m, SqueezeExcite | StockSqueezeExcite)]
        assert len(blocks) == (2 if "se_stages" in options else 4)
        assert {type(m) for m in blocks} == {kind}
    assert_same(fused, stock, images(48), 1e-9)


@pytest.mark.parametrize("options", VARIANTS[:-1], ids=str)
def test_a_variant_trains_compiled_in_one_graph(options: dict[str, Any]) -> None:
    """Two blocks, of which the first projects and hands its output on twice."""
    torch._dynamo.reset()
    stage = network((2, 1, 1, 1), **options).layer1.train()
    twin = copy.deepcopy(stage)
    stage.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, 12, 12, dtype=torch.float64)
    assert_same_step(stage, twin, x, 1e-9)


def test_every_gate_has_a_test() -> None:
    assert {options["gate"] for options in VARIANTS if "gate" in options} | {"sigmoid"} == GATES.keys()

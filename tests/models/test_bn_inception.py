"""BN-Inception and its SE twin against published counts and an interpreter of the authors' layer list."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from setriton import SqueezeExcite, create_model
from setriton.models.bn_inception import CeilMaxPool

# Learnable parameters, elements of BN statistics, multiply-adds at 224 pixels.
PUBLISHED = {
    "bn_inception": (11_285_224, 20_032, 2_032_600_064),
    "se_bn_inception": (11_931_622, 20_032, 2_033_239_424),
}

# 1x1; 3x3 reduce, 3x3; double 3x3 reduce, first, second; pool and its projection. 0: none, and stride 2.
LAYERS = {
    "3a": (64, 64, 64, 64, 96, 96, "avg", 32),
    "3b": (64, 64, 96, 64, 96, 96, "avg", 64),
    "3c": (0, 128, 160, 64, 96, 96, "max", 0),
    "4a": (224, 64, 96, 96, 128, 128, "avg", 128),
    "4b": (192, 96, 128, 96, 128, 128, "avg", 128),
    "4c": (160, 128, 160, 128, 160, 160, "avg", 128),
    "4d": (96, 128, 192, 160, 192, 192, "avg", 128),
    "4e": (0, 128, 192, 192, 256, 256, "max", 0),
    "5a": (352, 192, 320, 160, 224, 224, "avg", 128),
    "5b": (352, 192, 320, 192, 224, 224, "max", 128),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_statistics_and_operations(name: str) -> None:
    params, statistics, macs = PUBLISHED[name]
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(b.numel() for key, b in model.named_buffers() if "running" in key) == statistics
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * macs


def test_widths_of_gates() -> None:
    model = create_model("se_bn_inception", device="meta")
    widths = [(m.fc2.out_channels, m.fc1.out_channels) for m in model.modules() if isinstance(m, SqueezeExcite)]
    middle = [(576, 36)] * 3 + [(608, 38)] * 2
    assert widths == [(256, 16), (320, 20), *middle, (1056, 66), (1024, 64), (1024, 64)]
    assert not any(isinstance(m, SqueezeExcite) for m in create_model("bn_inception", device="meta").modules())


def caffe_pool(x: Tensor, kind: str, kernel: int, stride: int, pad: int) -> Tensor:
    """Caffe's PoolingLayer::Forward_cpu: sizes round up, averages divide by windows as far as they are padded."""
    sizes = []
    for length in x.shape[2:]:
        size = -(-(length + 2 * pad - kernel) // stride) + 1
        sizes.append(size - 1 if pad and (size - 1) * stride >= length + pad else size)
    y = x.new_empty(*x.shape[:2], *sizes)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            starts = i * stride - pad, j * stride - pad
            ends = [min(start + kernel, length + pad) for start, length in zip(starts, x.shape[2:], strict=True)]
            area = (ends[0] - starts[0]) * (ends[1] - starts[1])
            window = x[:, :, max(starts[0], 0) : ends[0], max(starts[1], 0) : ends[1]]
            y[:, :, i, j] = window.amax((2, 3)) if kind == "max" else window.sum((2, 3)) / area
    return y


def interpreted(weights: dict[str, Tensor], x: Tensor, has_se: bool) -> Tensor:
    """Logits from tensors under the authors' layer names; every tensor is used, once."""
    unused = dict(weights)

    def convolve(name: str, x: Tensor, out: int, stride: int = 1, pad: int = 0) -> Tensor:
        weight = unused.pop(f"{name}.weight")
        assert weight.shape[0] == out
        gamma, beta, mean, var = (
            unused.pop(f"{name}_bn.{key}")[:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
        )
        x = F.conv2d(x, weight, None, stride, pad)
        return ((x - mean) / (var + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    x = convolve("conv1_7x7_s2", x, 64, 2, 3)
    x = caffe_pool(x, "max", 3, 2, 0)
    x = convolve("conv2_3x3_reduce", x, 64)
    x = convolve("conv2_3x3", x, 192, 1, 1)
    x = caffe_pool(x, "max", 3, 2, 0)
    for module, (c1, reduce, c3, double_reduce, double_1, double_2, pool, proj) in LAYERS.items():
        name, stride = f"inception_{module}", 1 if c1 else 2
        parts = [convolve(f"{name}_1x1", x, c1)] if c1 else []
        parts.append(convolve(f"{name}_3x3", convolve(f"{name}_3x3_reduce", x, reduce), c3, stride, 1))
        double = convolve(f"{name}_double_3x3_reduce", x, double_reduce)
        double = convolve(f"{name}_double_3x3_1", double, double_1, 1, 1)
        parts.append(convolve(f"{name}_double_3x3_2", double, double_2, stride, 1))
        pooled = caffe_pool(x, pool, 3, stride, 1 if c1 else 0)
        parts.append(convolve(f"{name}_pool_proj", pooled, proj) if proj else pooled)
        x = torch.cat(parts, 1)
        if has_se:
            (w1, b1), (w2, b2) = (
                [unused.pop(f"{name}_{layer}.{key}") for key in ("weight", "bias")] for layer in ("down", "up")
            )
            hidden = (x.mean((2, 3)) @ w1[:, :, 0, 0].T + b1).clamp(min=0)
            x = x / (1 + torch.exp(-(hidden @ w2[:, :, 0, 0].T + b2)))[:, :, None, None]
    logits = x.mean((2, 3)) @ unused.pop("last_linear.weight").T + unused.pop("last_linear.bias")
    assert not unused
    return logits


RENAMES = (
    (r"^conv1\.", "conv1_7x7_s2."),
    (r"^conv2(_reduce)?\.", r"conv2_3x3\1."),
    (r"^stage\d\.(\w+)\.conv_", r"\1_"),
    (r"^stage\d\.(\w+)\.se\.fc1", r"\1_down"),
    (r"^stage\d\.(\w+)\.se\.fc2", r"\1_up"),
    (r"\.conv\.", "."),
    (r"\.bn\.", "_bn."),
    (r"^fc\.", "last_linear."),
)


def to_authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        if not key.endswith("num_batches_tracked"):
            renamed[key] = value
    return renamed


def random_network(name: str, **options: Any) -> nn.Module:
    """In float64, with random BN parameters and statistics: at their initial values they would hide mistakes."""
    torch.manual_seed(0)
    model = create_model(name, **options).double()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "running" in key or ".bn." in key:
            nn.init.uniform_(tensor, 0.5, 1.0) if tensor.is_floating_point() else None
        elif ".se." in key:
            nn.init.normal_(tensor, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_equal_those_of_the_authors_layers(name: str) -> None:
    model = random_network(name, num_classes=50)
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        want = interpreted(to_authors_names(model.state_dict()), x, has_se=name.startswith("se_"))
        found = model(x)
    assert (found - want).abs().max() <= 1e-10 * want.abs().max()


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    logits = model(x)
    logits.sin().sum().backward()
    return {"logits": logits.detach(), **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}}


def test_fused_blocks_equal_stock_ones() -> None:
    fused, stock = (random_network("se_bn_inception", num_classes=5, fused=fused).train() for fused in (True, False))
    stock.load_state_dict(fused.state_dict())
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    found, want = step(fused, x), step(stock, x)
    assert found.keys() == want.keys() == {"logits", *dict(fused.named_parameters())}
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9 * value.abs().max().item() + 1e-12, msg=key)


@pytest.mark.parametrize("size", [(7, 8), (33, 32), (75, 107)], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_trains_on_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    model = create_model(name, num_classes=7, in_chans=2)
    found = step(model, torch.randn(2, 2, *size))
    assert found["logits"].shape == (2, 7)
    assert found.keys() == {"logits", *dict(model.named_parameters())}


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 8), (6, 1), (9, 7)])
def test_pool_has_a_window_for_every_second_pixel(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width)
    y = CeilMaxPool()(x)
    assert y.shape[2:] == ((height + 1) // 2, (width + 1) // 2)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            assert torch.equal(y[:, :, i, j], x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((2, 3)))


def test_feature_maps() -> None:
    x = torch.randn(1, 3, 96, 128)
    shapes = [(64, 48, 64), (192, 24, 32), (320, 12, 16), (608, 6, 8), (1024, 3, 4)]
    model: Any = create_model("se_bn_inception").eval()
    last, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert torch.equal(last, maps[-1])
    extractor: Any = create_model("bn_inception", features_only=True, out_indices=(1, 3))
    assert [level["reduction"] for level in extractor.feature_info] == [4, 16]
    assert [tuple(m.shape[1:]) for m in extractor(x)] == [shapes[1], shapes[3]]
    assert any(key.startswith("stage5") for key in model.state_dict())
    assert not any(key.startswith("network.stage5") for key in extractor.state_dict())


def test_groups_for_layer_decay() -> None:
    model: Any = create_model("se_bn_inception", device="meta")
    number = model.group_matcher()
    assert [number(f"{layer}.conv.weight") for layer in ("conv1", "conv2", "stage3.inception_3b.conv_3x3")] == [0, 0, 2]
    assert len(model.layer_groups()) == number("fc.bias") + 1 == 12
    assert len(model.layer_groups(coarse=True)) == model.group_matcher(coarse=True)("fc.bias") + 1 == 5
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {0.5**power for power in range(12)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_model("bn_inception", gate="tanh"), TypeError, "takes no option 'gate'"),
        (lambda: create_model("se_bn_inception", output_stride=16), TypeError, "takes no option 'output_stride'"),
        (
            lambda: create_model("se_bn_inception", gate="softmax"),
            ValueError,
            "gate must be one of sigmoid, tanh, relu",
        ),
    ],
)
def test_wrong_options(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

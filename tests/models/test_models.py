"""The networks against published parameter counts and, with the same weights, against timm's and torchvision's."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from setriton import SqueezeExcite, create_model, list_models
from setriton.models.blocks import ResidualBlock

# Learnable parameters, elements of BN statistics, multiply-adds at 224 pixels in the caffe and the torch layout.
PUBLISHED = {
    "resnet50": (25_557_032, 53_120, 3_857_973_248, 4_089_184_256),
    "resnet101": (44_549_160, 105_344, 7_570_194_432, 7_801_405_440),
    "resnet152": (60_192_808, 151_424, 11_282_415_616, 11_513_626_624),
    "se_resnet50": (28_088_024, 53_120, 3_860_488_192, 4_091_699_200),
    "se_resnet101": (49_326_872, 105_344, 7_574_937_600, 7_806_148_608),
    "se_resnet152": (66_821_848, 151_424, 11_288_993_792, 11_520_204_800),
}
SMALL = {"resnet110": 1_727_962, "se_resnet110": 1_742_200}
WITHOUT_SE_BIAS = {
    "se_resnet50": 28_071_976,
    "se_resnet101": 49_292_328,
    "se_resnet152": 66_770_984,
    "se_resnet110": 1_740_058,
}


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_statistics_and_operations(name: str) -> None:
    params, statistics, *operations = PUBLISHED[name]
    for layout, macs in zip(("caffe", "torch"), operations, strict=True):
        model = on_meta(name, layout=layout)
        assert parameters(model) == params
        assert sum(b.numel() for key, b in model.named_buffers() if "running" in key) == statistics
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224, device="meta"))
        assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(("name", "count"), [*SMALL.items()])
def test_parameters_of_small_networks(name: str, count: int) -> None:
    assert parameters(on_meta(name)) == count


@pytest.mark.parametrize(("name", "count"), WITHOUT_SE_BIAS.items())
def test_parameters_without_se_bias(name: str, count: int) -> None:
    assert parameters(on_meta(name, se_bias=False)) == count


@pytest.mark.parametrize("depth", [18, 34])
def test_basic_blocks_have_the_counts_of_timm(depth: int) -> None:
    with torch.device("meta"):
        assert parameters(on_meta(f"se_resnet{depth}")) == parameters(timm.create_model(f"legacy_seresnet{depth}"))
        assert parameters(on_meta(f"resnet{depth}")) == parameters(torchvision.models.get_model(f"resnet{depth}"))


def randomize(model: nn.Module) -> nn.Module:
    """Random BN affine parameters and statistics: at their initial values they would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0, generator=generator)  # type: ignore[arg-type]
    return model.double().eval()


def to_torch_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's legacy names, which are Cadene's, to ours."""
    renames = (("layer0.", ""), (".se_module.", ".se."), ("last_linear.", "fc."))
    for old, new in renames:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


@pytest.mark.parametrize(
    ("name", "theirs", "layout"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(), "torch"),
        ("resnet50", lambda: torchvision.models.resnet50(), "torch"),
        ("se_resnet50", lambda: timm.create_model("seresnet50"), "torch"),
        ("se_resnet152", lambda: timm.create_model("seresnet152"), "torch"),
        ("se_resnet50", lambda: timm.create_model("legacy_seresnet50", drop_rate=0.0), "caffe"),
        ("se_resnet101", lambda: timm.create_model("legacy_seresnet101", drop_rate=0.0), "caffe"),
    ],
    ids=["resnet18", "resnet50", "se_resnet50", "se_resnet152", "se_resnet50 caffe", "se_resnet101 caffe"],
)
def test_logits_equal_with_the_same_weights(name: str, theirs: Any, layout: str) -> None:
    theirs = randomize(theirs())
    x = torch.randn(2, 3, 96, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(x)
        for candidate in ("caffe", "torch"):
            ours = create_model(name, layout=candidate).double().eval()
            ours.load_state_dict(to_torch_keys(theirs.state_dict()))
            distance = (ours(x) - want).abs().max() / want.abs().max()
            assert distance < 1e-10 if candidate == layout else distance > 1e-6


@pytest.mark.parametrize("name", list_models())
def test_every_network_trains_a_step(name: str) -> None:
    if "110" in name or "152" in name or "101" in name:
        model, x = on_meta(name, num_classes=7, in_chans=1), torch.empty(2, 1, 33, 32, device="meta")
    else:
        model, x = create_model(name, num_classes=7, in_chans=1), torch.randn(2, 1, 33, 32)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert all(isinstance(block.se, SqueezeExcite) == name.startswith("se_") for block in blocks)


def test_zero_init_last_starts_each_block_as_its_shortcut() -> None:
    model = create_model("se_resnet50", zero_init_last=True)
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.split(".")[-1] for name, w in weights.items() if not w.any()} == {"bn3"}
    assert sum(not w.any() for w in weights.values()) == 16


def test_channels_last_gives_the_same_logits() -> None:
    model = create_model("se_resnet20").double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-12, atol=1e-12)


def test_list_models() -> None:
    assert len(list_models()) == 18
    assert list_models("se_resnet5*") == ["se_resnet50", "se_resnet56"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_model("seresnet50"), ValueError, "did you mean se_resnet50"),
        (lambda: create_model(50), TypeError, "name must be a string; got int"),
        (lambda: create_model("resnet50", classes=3), TypeError, "takes no option 'classes'; it takes num_classes"),
        (lambda: create_model("resnet50", layout="nchw"), ValueError, "layout must be one of caffe, torch; got 'nchw'"),
        (lambda: create_model("resnet50", num_classes=0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: create_model("resnet20", in_chans=0), ValueError, "in_chans must be at least 1; got 0"),
        (lambda: create_model("resnet20", drop_rate=1.0), ValueError, r"drop_rate must be in \[0, 1\); got 1.0"),
        (lambda: list_models(3), TypeError, "pattern must be a string; got int"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

"""The sizes of all networks against what is published of them, and of some options against what they add."""

from typing import Any

import pytest
import timm
import torch
import torchvision

from setriton import create_model, list_models
from setriton.models.published import PUBLISHED, Counts, count, crop, differences

# Multiply-adds at 224 pixels in the layouts "caffe", the default, and "torch", and elements of BN statistics.
LAYOUTS = {
    "resnet50": (3_857_973_248, 4_089_184_256, 53_120),
    "resnet101": (7_570_194_432, 7_801_405_440, 105_344),
    "resnet152": (11_282_415_616, 11_513_626_624, 151_424),
    "resnext50_32x4d": (4_230_479_872, 4_230_479_872, 68_224),
    "resnext101_32x4d": (7_969_996_800, 7_969_996_800, 137_856),
    "resnext152_64x4d": (22_939_303_936, 22_939_303_936, 295_040),
    "resnext152_64x4d_modified": (20_681_785_344, 20_681_785_344, 247_552),
    "se_resnet50": (3_860_488_192, 4_091_699_200, 53_120),
    "se_resnet101": (7_574_937_600, 7_806_148_608, 105_344),
    "se_resnet152": (11_288_993_792, 11_520_204_800, 151_424),
    "se_resnext50_32x4d": (4_232_994_816, 4_232_994_816, 68_224),
    "se_resnext101_32x4d": (7_974_739_968, 7_974_739_968, 137_856),
    "senet154": (20_688_363_520, 20_688_363_520, 247_552),
}
WITHOUT_SE_BIAS = {
    "se_resnet50": 28_071_976,
    "se_resnet101": 49_292_328,
    "se_resnet152": 66_770_984,
    "se_resnet110": 1_740_058,
}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", list_models())
def test_sizes_are_as_published(name: str) -> None:
    counted = count(name)
    assert differences(name, counted) == []
    assert counted.parameters
    assert counted.macs
    assert bool(counted.se_blocks) == (name in list_models(se=True))


def test_every_published_network_is_there() -> None:
    assert PUBLISHED.keys() <= set(list_models())
    assert crop("resnet20") == 32


def test_the_paper_finds_se_networks_better() -> None:
    pairs = [(PUBLISHED[name], PUBLISHED.get(f"se_{name}")) for name in PUBLISHED if not name.startswith("se")]
    errors = [(plain.top1, se.top1) for plain, se in pairs if plain.top1 and se and se.top1]
    assert len(errors) >= 13
    assert all(with_se < without for without, with_se in errors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_operations_in_both_layouts(name: str) -> None:
    caffe, torch, statistics = LAYOUTS[name]
    assert PUBLISHED[name].macs == caffe
    counted = count(name, layout="torch")
    assert (counted.parameters, counted.macs) == (PUBLISHED[name].parameters, torch)
    buffers = create_model(name, device="meta").named_buffers()
    assert sum(b.numel() for key, b in buffers if "running" in key) == statistics


@pytest.mark.parametrize(("name", "parameters"), WITHOUT_SE_BIAS.items())
def test_parameters_without_se_bias(name: str, parameters: int) -> None:
    assert count(name, se_bias=False).parameters == parameters


@pytest.mark.parametrize("depth", [18, 34])
def test_basic_blocks_have_the_sizes_of_timm(depth: int) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"legacy_seresnet{depth}"), torchvision.models.get_model(f"resnet{depth}")
    assert [count(f"{se}resnet{depth}").parameters for se in ("se_", "")] == [parameters(model) for model in theirs]


def test_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    published = PUBLISHED["resnet110"]
    macs: Any = published.macs
    assert differences("resnet110", Counts(1_727_962, macs + 50_000, 0)) == []
    assert differences("resnet110", Counts(1_727_963, macs + 50_001, 0)) == [
        "resnet110: 1,727,963 parameters, published are 1,727,962",
        "resnet110: 252,950,001 macs, published are about 252,900,000",
    ]
    monkeypatch.delitem(PUBLISHED, "resnet110")
    assert differences("resnet110", Counts(1, 1, 1)) == []

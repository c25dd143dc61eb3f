"""timm's own questions to models of its registry, put to those that are registered here."""

import math
from typing import Any

import pytest
import timm
import timm.models
import torch
from torch import Tensor

from setriton.models.timm_registry import register_with_timm

register_with_timm()
# One of each class, and the two stems.
NAMES = [
    f"setriton_{name}"
    for name in (
        *("se_resnet18", "senet154", "se_bn_inception", "inception_resnet_v2", "mobilenet"),
        *("se_shufflenet_g3", "wrn16_8", "se_resnet20", "vgg16_bn"),
    )
]
SMALL = "setriton_se_resnet20"
CLASSES = ("getter", "list", "dict", "hook")


def create(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options).eval()


def image(size: int, device: str | None = "meta") -> Tensor:
    return torch.randn(1, 3, size, size, device=device)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name: str) -> None:
    model = create(name, device="meta")
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["num_classes"] == model.num_classes
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    maps = model.forward_features(image(cfg["input_size"][-1]))
    assert tuple(maps.shape[2:]) == cfg["pool_size"]
    assert maps.shape[1] == model.num_features
    assert model.forward_head(maps, pre_logits=True).shape[1] == model.head_hidden_size
    assert timm.models.get_pretrained_cfg_value(name, "input_size") == cfg["input_size"]


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name: str) -> None:
    model = create(name, device="meta", features_only=True)
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    size = model.default_cfg["input_size"][-1]
    maps = model(image(size))
    assert [m.shape[1] for m in maps] == channels
    assert all(m.shape[2] <= math.ceil(size / r) + 1 for m, r in zip(maps, reduction, strict=True))
    assert model.feature_info.channels(0) == channels[0]
    assert model.feature_info.reduction([0, 1]) == reduction[:2]
    assert model.feature_info.module_name()[-1] == model.network.feature_info[-1]["module"]


@pytest.mark.parametrize("feature_cls", [*CLASSES, "fx"])
def test_timms_extractors(feature_cls: str) -> None:
    x = image(32, None)
    torch.manual_seed(0)
    _, want = create(SMALL).forward_intermediates(x, (1, -1))
    torch.manual_seed(0)
    model = create(SMALL, features_only=True, feature_cls=feature_cls, out_indices=(1, -1))
    found = model(x)
    found = list(found.values()) if isinstance(found, dict) else found
    assert model.feature_info.channels() == [16, 64]
    assert model.feature_info.reduction() == [1, 4]
    # A graph of torch.fx calls each layer, where a block calls one operator: sums are in another order.
    rtol = 1e-4 if feature_cls == "fx" else 0.0
    torch.testing.assert_close(found, list(want), rtol=rtol, atol=rtol)


def test_forward_intermediates() -> None:
    model, x = create(SMALL), image(32, None)
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    last, maps = model.forward_intermediates(x, output_fmt="NCHW", norm=False)
    assert [m.shape[1] for m in maps] == info.channels()
    assert torch.equal(last, model.forward_features(x))
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW; got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match="norm must be False"):
        model.forward_intermediates(x, norm=True)
    assert model.prune_intermediate_layers((0, 2)) == [0, 2]
    assert not hasattr(model, "layer3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_cfg_overlay": {"file": "a.pth"}}, "pretrained_cfg_overlay must be left out"),
        ({"cache_dir": "cache"}, "cache_dir must be left out"),
        ({"features_only": True, "feature_cls": "tree"}, "feature_cls must be one of getter, list, dict, hook, fx"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(SMALL, **options)


def test_a_tag_is_refused() -> None:
    with pytest.raises(ValueError, match="pretrained_cfg must be left out"):
        timm.create_model("setriton_se_resnet50.a1_in1k", device="meta")

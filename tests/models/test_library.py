"""What every network promises besides its layers: head, options, groups of parameters, copies, and clear refusals."""

import copy
import pickle
from typing import Any

import pytest
import timm.layers
import timm.models
import timm.optim
import torch
from same_step import assert_same, images, randomized
from torch import Tensor, nn

from setriton import create_model, list_models
from setriton.models.published import crop

# Without types: what is wrong with some arguments is their type.
create: Any = create_model
names: Any = list_models

SMALL = ["resnet20", "se_resnet20"]


def small(name: str = "se_resnet20", **options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(create_model(name, **options))


def meta_image(name: str, channels: int = 3) -> Tensor:
    return torch.empty(2, channels, crop(name), crop(name), device="meta")


@pytest.mark.parametrize("name", list_models())
def test_heads(name: str) -> None:
    """Pools, classes and channels of every network, by shapes alone."""
    model: Any = create_model(name, device="meta", in_chans=4).eval()
    x, width = meta_image(name, 4), model.head_hidden_size
    assert model.get_classifier() is model.fc
    maps = model.forward_features(x)
    assert maps.shape[:2] == (2, model.num_features)
    for pool in ("avg", "max", "avgmax", "catavgmax"):
        doubled = 2 if pool == "catavgmax" else 1
        model.reset_classifier(3, pool)
        assert model.forward_head(maps).shape == (2, 3)
        assert model.forward_head(maps, pre_logits=True).shape == (2, doubled * width)
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert model.forward_head(maps).shape == (2, doubled * width)
    model.reset_classifier(0, "")
    assert model(x).shape == maps.shape
    assert (model.num_classes, model.global_pool) == (0, "")


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_pools_are_timms(pool: str) -> None:
    model, x = small(num_classes=0, global_pool=pool).eval(), images(16)
    want = timm.layers.SelectAdaptivePool2d(pool_type=pool, flatten=True)(model.forward_features(x))
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_a_new_classifier_is_where_and_what_the_network_is() -> None:
    model = create_model("resnet20", device="meta", dtype=torch.bfloat16)
    model.reset_classifier(7)
    assert (model.fc.weight.device.type, model.fc.weight.dtype) == ("meta", torch.bfloat16)
    assert model.fc.weight.shape == (7, 64)


def test_dropout_is_before_the_classifier_and_in_training_alone() -> None:
    model, x = small(drop_rate=0.5), images(16)
    head = copy.deepcopy(model.fc)
    features = model.eval().forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), head(features))
    model.train()
    maps = model.forward_features(x)
    torch.manual_seed(2)
    found = model.forward_head(maps)
    torch.manual_seed(2)
    want = head(nn.functional.dropout(maps.mean((2, 3)), 0.5))
    torch.testing.assert_close(found, want)
    assert create_model("senet154", device="meta").dropout.p == 0.2


def test_zero_init_last_starts_each_block_as_its_shortcut() -> None:
    model: Any = create_model("se_resnet50", zero_init_last=True)
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.split(".")[-1] for name, w in weights.items() if not w.any()} == {"bn3"}
    assert sum(not w.any() for w in weights.values()) == 16
    stage = model.layer2.eval()[1:]
    x = torch.rand(2, 512, 4, 4)
    torch.testing.assert_close(stage(x), x)
    assert all(w.all() for w in (m.weight for m in create_model("se_resnet50").modules() if type(m) is nn.BatchNorm2d))


def test_device_and_dtype_of_a_network() -> None:
    model = create_model("se_resnet20", dtype=torch.float64)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
    with torch.device("meta"):
        assert create_model("se_resnet20").fc.weight.is_meta
        assert not create_model("se_resnet20", device="cpu").fc.weight.is_meta
    torch.manual_seed(3)
    first = create_model("se_resnet20").state_dict()
    torch.manual_seed(3)
    second = create_model("se_resnet20", device=torch.device("cpu")).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_changes_nothing(name: str) -> None:
    model = small(name)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images(16)
    assert_same(twin, model, x)
    features = twin.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", list_models())
def test_layer_groups_have_each_parameter_once_and_in_order(name: str) -> None:
    model = create_model(name, device="meta")
    for coarse in (False, True):
        groups = model.layer_groups(coarse)
        keys = [key for group in groups for key in group]
        assert len(keys) == len(set(keys))
        assert set(keys) == {key for key, _ in model.named_parameters()}
        children = [group[0].split(".")[0] for group in groups]
        positions = [model.trunk.index(child) for child in children if child in model.trunk]
        assert positions == sorted(positions)
        assert keys[-1].startswith("fc.")
        matched = timm.models.group_parameters(model, model.group_matcher(coarse))
        assert list(matched.values()) == groups


def test_layer_groups_are_stem_blocks_and_head() -> None:
    model = create_model("se_resnet50", device="meta")
    groups = model.layer_groups()
    assert len(groups) == 18
    assert groups[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert {key.split(".")[1] for key in groups[-3]} == {"1"}
    assert groups[-1] == ["fc.weight", "fc.bias"]
    assert len(model.layer_groups(coarse=True)) == 6


@pytest.mark.parametrize("name", ["se_resnet50", "se_inception_resnet_v2", "se_mobilenet"])
def test_timms_layer_decay_falls_from_the_head_to_the_stem(name: str) -> None:
    model = create_model(name, device="meta")
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    depths = [[scales[id(model.get_parameter(key))] for key in group] for group in model.layer_groups()]
    # timm counts the last group and the one before it as one: what follows the last block has no parameters there.
    assert [set(depth) for depth in depths] == [{0.5 ** (len(depths) - 1 - i)} for i in range(len(depths))]
    assert {group["weight_decay"] for group in groups for p in group["params"] if p.ndim == 1} == {0.0}


def test_list_models() -> None:
    assert list_models("se_resnet5*") == ["se_resnet50", "se_resnet56"]
    assert list_models(["se_resnet5?", "resnet2*"]) == ["resnet20", "se_resnet50", "se_resnet56"]
    assert list_models("se_resnet*", exclude=["*_32x4d", "*1*"]) == [
        f"se_resnet{depth}" for depth in (20, 32, 34, 50, 56)
    ]
    assert list_models("nothing*") == []
    plain, se = list_models(se=False), list_models(se=True)
    assert sorted(plain + se) == sorted(list_models())
    assert "senet154" in se
    assert not set(plain) & set(se)
    # By number, not by digit.
    assert list_models("resnet*").index("resnet50") < list_models("resnet*").index("resnet101")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same(how: str) -> None:
    model = small(num_classes=3, drop_path_rate=0.2).eval()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = images(16)
    assert torch.equal(twin(x), model(x))
    assert twin.config == model.config == {"name": "se_resnet20", "num_classes": 3, "drop_path_rate": 0.2}
    assert twin.feature_info == model.feature_info


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create("seresnet50"), ValueError, "did you mean se_resnet50"),
        (lambda: create("unknown"), ValueError, "name 'unknown' is no known network; there are "),
        (lambda: create(50), TypeError, "name must be a string; got int"),
        (lambda: create("resnet50", classes=3), TypeError, "takes no option 'classes'; it takes num_classes"),
        (lambda: create("resnet50", rd_ratio=0.1), TypeError, "resnet50 takes no option 'rd_ratio'"),
        (lambda: create("resnet50", layout="nchw"), ValueError, "layout must be one of caffe, torch; got 'nchw'"),
        (lambda: create("resnet50", num_classes=-1), ValueError, "num_classes must be at least 1; got -1"),
        (lambda: create("resnet50", num_classes=1.0), TypeError, "num_classes must be an int"),
        (lambda: create("resnet50", num_classes=False), TypeError, "num_classes must be an int"),
        (lambda: create("resnet20", in_chans=0), ValueError, "in_chans must be at least 1; got 0"),
        (lambda: create("resnet20", drop_rate=1.0), ValueError, r"drop_rate must be in \[0, 1\); got 1.0"),
        (lambda: create("resnet20", drop_rate="no"), TypeError, "drop_rate must be a number; got 'no'"),
        (lambda: create("resnet20", drop_path_rate=-0.1), ValueError, r"drop_path_rate must be in \[0, 1\)"),
        (lambda: create("resnet20", drop_path_rate="no"), TypeError, "drop_path_rate must be a number; got 'no'"),
        (lambda: create("resnet20", global_pool="mean"), ValueError, "global_pool must be one of avg, max"),
        (lambda: create("resnet20", global_pool=""), ValueError, "for a classifier; got ''"),
        (lambda: create("resnet20").reset_classifier(3, ""), ValueError, "for a classifier; got ''"),
        (lambda: create("resnet50", output_stride=4), ValueError, "output_stride must be 8, 16 or 32; got 4"),
        (lambda: create("se_resnet50", bn_act="silu"), ValueError, "bn_act must be one of identity, relu"),
        (lambda: create("resnet20", out_indices=(1,)), ValueError, "given with features_only=True"),
        (lambda: create("resnet20", features_only=True, out_indices=()), ValueError, "levels 0 to 3; got"),
        (lambda: create("resnet20", features_only=True, out_indices=(4,)), ValueError, "levels 0 to 3; got"),
        (lambda: create("resnet20", features_only=True, out_indices=5), ValueError, "at most the 4 levels"),
        (lambda: create("resnet20", features_only=True, out_indices="1"), TypeError, "indices must be ints"),
        (lambda: create("resnet20", features_only=True, out_indices=(1.5,)), TypeError, "indices must be ints"),
        (lambda: create("se_resnet20", rd_ratio=0), ValueError, "rd_ratio must be positive; got 0"),
        (lambda: create("se_resnet20", rd_channels=0), ValueError, "rd_channels must be at least 1; got 0"),
        (lambda: create("se_resnet20", rd_divisor=0), ValueError, "rd_divisor must be at least 1; got 0"),
        (lambda: create("se_resnet20", squeeze="std"), ValueError, "squeeze must be one of avg, max, none"),
        (lambda: create("se_resnet20", gate="elu"), ValueError, "gate must be one of sigmoid, tanh, relu"),
        (lambda: create("se_resnet20", se_position="mid"), ValueError, "se_position must be one of standard"),
        (lambda: create("se_resnet20", se_position="3x3"), ValueError, "se_position must not be 3x3 in basic"),
        (lambda: create("se_resnet20", se_stages=(1,)), ValueError, r"se_stages must be some of \(2, 3, 4, 5\)"),
        (lambda: create("se_resnet20", se_stages=()), ValueError, r"se_stages must be some of .*; got \(\)"),
        (lambda: create("se_resnet20", se_stages=(5,)), ValueError, "some of the stages 2, 3 and 4 that there are"),
        (lambda: create("se_resnet20", se_stages="234"), ValueError, "se_stages must be some of"),
        (lambda: create("se_resnet20", se_stages=3), ValueError, "se_stages must be some of"),
        (lambda: names(3), TypeError, "pattern must be a string or several; got int"),
        (lambda: names(exclude=[3]), TypeError, "exclude must be a string or several; got list"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

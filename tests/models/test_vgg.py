"""VGG-16 with BN against published counts and torchvision's; with narrow hidden layers, where these have weights."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from graphs import compare
from same_step import assert_same, images, randomized
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from setriton import create_model

# Learnable parameters, and multiply-adds at 224 pixels.
COUNTS = {"vgg16_bn": (138_365_992, 15_470_264_320), "se_vgg16_bn": (138_596_784, 15_470_490_624)}


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(create_model(name, **{"num_classes": 5, "hidden_size": 16, "drop_rate": 0.0, **options}))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_operations(name: str) -> None:
    model = create_model(name, device="meta")
    params, macs = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * macs


def test_operations_with_squeezes_are_those_of_the_paper() -> None:
    """arXiv 1709.01507, Table 2: 15.48 billion."""
    model, squeezed = create_model("se_vgg16_bn", fused=False, device="meta"), []
    for name, module in model.named_modules():
        if name.endswith(".se"):
            module.register_forward_pre_hook(lambda module, inputs: squeezed.append(inputs[0].numel()))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(squeezed) == 13
    assert round((COUNTS["se_vgg16_bn"][1] + sum(squeezed)) / 1e9, 2) == 15.48


@pytest.mark.parametrize("side", [32, 97])
def test_logits_equal_torchvision(side: int) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs: Any = torchvision.models.vgg16_bn()
    theirs.features.to_empty(device="cpu")
    for module in theirs.features:
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    theirs.classifier[0] = nn.Linear(512 * 7 * 7, 16)
    theirs.classifier[3] = nn.Linear(16, 16)
    theirs.classifier[6] = nn.Linear(16, 5)
    theirs = randomized(theirs).eval()
    ours = build("vgg16_bn").eval()
    # The keys of convolutions differ, their order does not.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = images(side)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            ours.forward_head(ours.forward_features(x), pre_logits=True),
            theirs.classifier[:6](theirs.avgpool(theirs.features(x)).flatten(1)),
            rtol=1e-10,
            atol=1e-10,
        )


def test_keys_of_hidden_layers_and_dropout_are_torchvisions() -> None:
    with torch.device("meta"):
        ours, theirs = create_model("vgg16_bn"), torchvision.models.vgg16_bn()
    shapes = {
        key: tuple(p.shape)
        for key, p in theirs.state_dict().items()
        if key.startswith(("classifier.0", "classifier.3"))
    }
    assert {key: tuple(p.shape) for key, p in ours.state_dict().items() if key.startswith("classifier")} == shapes
    rates = [[m.p for m in model.modules() if isinstance(m, nn.Dropout)] for model in (ours, theirs)]
    assert rates[0] == rates[1] == [0.5, 0.5]


def test_se_stands_behind_each_relu() -> None:
    model, x = build("se_vgg16_bn").eval(), images(32)
    want = x
    with torch.no_grad():
        for stage in range(1, 6):
            for block in getattr(model, f"layer{stage}"):
                want = block.se(torch.relu(block.bn(block.conv(want))))
            want = F.max_pool2d(want, 2)
        torch.testing.assert_close(model.forward_features(x), want, rtol=1e-10, atol=1e-10)


def test_fused_equals_stock() -> None:
    fused, stock = (build("se_vgg16_bn", fused=fused) for fused in (True, False))
    stock.load_state_dict(fused.state_dict())
    assert_same(fused, stock, images(32), 1e-9)


def test_checkpointing_changes_nothing() -> None:
    model = build("se_vgg16_bn")
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    assert_same(twin, model, images(32))


def test_compiles_to_one_graph() -> None:
    compare(build("vgg16_bn").train(), images(32), backend="aot_eager")
    model = build("se_vgg16_bn").train()
    model.prune(1)  # what is behind level 1 is like what is before
    compare(model, images(32), backend="aot_eager")


@pytest.mark.parametrize("name", COUNTS)
def test_a_step_of_training_lowers_the_loss(name: str) -> None:
    model, x, target = build(name).float(), images().float(), torch.arange(2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = F.cross_entropy(model(x), target)
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert F.cross_entropy(model(x), target) < before


def test_maps_of_levels() -> None:
    x = torch.randn(1, 3, 64, 64)
    channels, reductions = (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)
    shapes = [(1, c, 64 // r, 64 // r) for c, r in zip(channels, reductions, strict=True)]
    model = build("se_vgg16_bn").float().eval()
    last, maps = model.forward_intermediates(x)
    assert [tuple(y.shape) for y in maps] == shapes
    assert torch.equal(model.forward_head(last), model(x))
    pyramid = create_model("vgg16_bn", hidden_size=16, features_only=True, out_indices=(1, 4))
    assert [tuple(y.shape) for y in pyramid(x)] == [shapes[1], shapes[4]]
    head = ("classifier", "fc")
    assert {key.partition(".")[0] for key in model.state_dict()} >= set(head)
    assert not [key for key in pyramid.state_dict() if any(part in key for part in head)]


def test_the_head_without_classes_and_without_a_pool() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = build("vgg16_bn", num_classes=0).float().eval()
    assert model(x).shape == (2, 16)
    hidden = model.classifier
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.classifier is hidden
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 512, 1, 1)
    assert isinstance(model.classifier, nn.Identity)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_pools_make_the_maps_of_the_hidden_layers(pool: str) -> None:
    """14x14 to 7x7: each value that a hidden layer reads is of four."""
    model, x = build("vgg16_bn", global_pool=pool).eval(), torch.randn(2, 512, 14, 14, dtype=torch.float64)
    windows = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    average, largest = windows.mean(4), windows.amax(4)
    maps = {"avg": [average], "max": [largest], "avgmax": [(average + largest) / 2], "catavgmax": [average, largest]}
    want = torch.cat([model.classifier(m.flatten(1)) for m in maps[pool]], dim=1)
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), want)
    torch.testing.assert_close(model.forward_head(x), model.fc(want))


@pytest.mark.parametrize("name", COUNTS)
def test_a_group_for_each_block_and_the_head(name: str) -> None:
    model = build(name)
    groups = model.layer_groups()
    assert len(groups) == 14
    assert sum(len(group) for group in groups) == len(list(model.parameters()))
    assert {key.split(".")[0] for key in groups[-1]} == {"classifier", "fc"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"global_pool": "min"}, ValueError, "global_pool must be one of avg, max, avgmax, catavgmax, .*got 'min'"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1; got 0"),
        ({"rd_ratio": 1 / 8}, TypeError, "vgg16_bn takes no option 'rd_ratio'"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_model("vgg16_bn", device="meta", **options)

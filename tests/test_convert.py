"""accelerate and restore: networks keep their numbers, keys, parameters and modes, and can be copied and compiled."""

import copy
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from same_step import assert_same, assert_same_step, images, randomized, tail
from timm.layers import SEModule
from timm.models.resnet import BasicBlock
from torch import nn
from torch._dynamo.testing import CompileCounter

from setriton import SqueezeExcite
from setriton.convert import Report, accelerate, restore

pytestmark = pytest.mark.usefixtures("one_thread")

TAIL = "bn_se+add+relu"


NETWORKS = {
    "timm seresnet": (lambda: timm.create_model("seresnet18", num_classes=10), {TAIL: 8}),
    "timm seresnet, bottlenecks": (
        lambda: timm.create_model("seresnext26d_32x4d", num_classes=10, layers=(1, 1, 1, 1)),
        {TAIL: 4},
    ),
    "timm legacy": (lambda: timm.create_model("legacy_seresnet18", num_classes=10), {"bn_act_se+add+relu": 8}),
    "timm legacy, bottlenecks": (
        lambda: timm.create_model("legacy_seresnext26_32x4d", num_classes=10, layers=(1, 1, 1, 1)),
        {TAIL: 4},
    ),
    "timm efficientnet": (lambda: timm.create_model("efficientnet_b0", num_classes=10), {"bn_act_se": 16}),
    "timm mobilenet": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), {"bn_act_se": 9}),
    "timm regnet": (lambda: timm.create_model("regnety_002", num_classes=10), {"bn_act_se": 13}),
    "torchvision efficientnet": (lambda: torchvision.models.efficientnet_b0(num_classes=10), {"bn_act_se": 16}),
    "torchvision mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), {"bn_act_se": 9}),
    "torchvision regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), {"bn_act_se": 16}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_they_did(name: str) -> None:
    torch.manual_seed(0)
    make, expected = NETWORKS[name]
    model = randomized(make())
    twin, modules, parameters = copy.deepcopy(model), dict(model.named_modules()), dict(model.named_parameters())
    report = accelerate(model)
    assert Counter(report.replaced.values()) == expected
    assert report.left == {}
    # float64 hardsigmoid and hardswish of torch are off by 3e-8.
    assert_same(model, twin, images(), 1e-7 if "mobilenet" in name else 1e-10)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(p is parameters[path] for path, p in model.named_parameters())

    again = accelerate(model)
    assert again.replaced == {}
    assert set(again.left) == set(report.replaced)
    assert set(again.left.values()) == {"already accelerated"}

    restore(model)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


def test_an_optimizer_made_before_goes_on() -> None:
    model = randomized(timm.create_model("seresnet18", num_classes=10))
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, twin)]
    accelerate(model)
    for _ in range(2):
        assert_same_step(model, twin, images())
        for optimizer in optimizers:
            optimizer.step()
    restore(model)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_as_well(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    accelerate(model)
    twin = duplicate(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(x), model(x))
    restore(twin)
    torch.testing.assert_close(twin(x), model(x))


def test_frozen_modes_and_parameters_stay() -> None:
    model = randomized(timm.create_model("seresnet18", num_classes=10, drop_path_rate=0.2))
    for name, module in model.named_modules():
        module.train("layer2" not in name)
    model.layer1.requires_grad_(False)
    twin = copy.deepcopy(model)
    report = accelerate(model)
    # Stochastic depth comes between SE and the sum in all blocks but the first.
    assert Counter(report.replaced.values()) == {TAIL: 1, "bn_se": 7}
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert_same_step(model, twin, images())


def test_roots() -> None:
    se, block = SEModule(8), BasicBlock(8, 8, attn_layer=SEModule)
    reports = accelerate(se), accelerate(block)
    assert reports == (Report({"": "se"}), Report({"se": TAIL}))
    assert "the model  se" in str(reports[0])
    assert isinstance(block, BasicBlock)
    restore(se)
    assert type(se) is SEModule


def test_our_module_in_a_timm_network() -> None:
    model = randomized(timm.create_model("seresnet18", block_args={"attn_layer": SqueezeExcite}, num_classes=10))
    twin = copy.deepcopy(model)
    assert Counter(accelerate(model).replaced.values()) == {TAIL: 8}
    assert accelerate(model) == Report()
    assert type(model.get_submodule("layer1.0.se")) is SqueezeExcite
    assert_same(model, twin, images())


def test_what_is_made_of_a_fused_module_is_not_fused() -> None:
    model = tail()
    x = torch.randn(2, 3, 6, 6)
    parts = model[:2], model[3:]
    want = parts[1](nn.functional.silu(parts[0](x)))
    accelerate(model.eval())
    model.train()
    torch.testing.assert_close(model[3:](nn.functional.silu(model[:2](x))), want)
    assert type(model[:2]) is nn.Sequential


def test_compiled_and_exported() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(torchvision.models.mobilenet_v3_small().features[:6], BasicBlock(40, 40, attn_layer=SEModule))
    assert Counter(accelerate(model).replaced.values()) == {"bn_act_se": 3, TAIL: 1}
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
    assert counter.frame_count == 1
    model.eval()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(x[:3]), model(x[:3]))


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    options = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8, "layer_type": "y"}
    regnet = transformers.RegNetModel(transformers.RegNetConfig(**options))
    config = transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320)
    for model, count in ((regnet, 3), (transformers.EfficientNetModel(config), 10)):
        twin, x = copy.deepcopy(randomized(model)), images()
        assert Counter(accelerate(model).replaced.values()) == {"bn_act_se": count}
        for training in (True, False):
            found = []
            for m in (model, twin):
                torch.manual_seed(1)
                found.append(m.train(training)(x).last_hidden_state)
            torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_report_is_a_table() -> None:
    report = Report(
        {"layer1.0.se": TAIL, "layer10.0.se": "se"}, {"layer10.0.se": "bn2 has hooks", "head.se": "one layer"}
    )
    assert str(report).splitlines() == [
        "SE blocks: 2 replaced, 1 left",
        "  layer1.0.se   bn_se+add+relu",
        "  layer10.0.se  se              bn2 has hooks",
        "  head.se       -               one layer",
    ]


@pytest.mark.parametrize("function", [accelerate, restore])
def test_wrong_arguments(function: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got dict"):
        function({})


def test_wrapped_modules_are_not_restored() -> None:
    model = tail(SEModule(8))
    accelerate(model)
    se = model[3]
    se.__class__ = type("Wrapped", (type(se),), {})
    with pytest.raises(ValueError, match=r"model must have .*; got 3 of class Wrapped"):
        restore(model)
    assert type(model) is not nn.Sequential


def test_works_with_torch_alone() -> None:
    code = """
import sys
for name in ("triton", "torchvision", "timm", "rich", "transformers"):
    sys.modules[name] = None
import torch
from setriton import SqueezeExcite
from setriton.convert import accelerate
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), SqueezeExcite(8))
print(accelerate(model).replaced, model(torch.randn(2, 3, 4, 4)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'2': 'bn_se'} torch.Size([2, 8, 4, 4])", done.stderr

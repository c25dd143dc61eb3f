"""Networks without their SE, weights that hide nothing, and steps that are refused when they compute something else."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import setriton
from setriton.bench import networks
from setriton.bench.networks import EAGER, INFERENCE, MODES, NETWORKS, TRAINING, WAYS, Case, Way, Workload

WAY = {way.name: way for way in WAYS}
CPU = torch.device("cpu")
# A torchvision built for another torch fails to import, and timm with it, with a RuntimeError.
with contextlib.suppress(Exception):
    import timm
needs_timm = pytest.mark.skipif(bool(networks.timm_missing()), reason=f"timm: {networks.timm_missing()}")


def tiny(mode: str = TRAINING, dtype: str = "float32") -> Case:
    return Case("se_resnet20", mode, 4, 16, dtype)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@needs_timm
@pytest.mark.parametrize(
    ("name", "blocks", "plain"),
    [
        ("seresnet50", 16, "resnet50"),
        ("se_resnet50", 16, "resnet50"),
        ("efficientnet_b0", 16, ""),
        ("regnety_032", 21, ""),
        ("seresnext101_32x4d", 33, "resnext101_32x4d"),
        ("mobilenetv3_large_100", 8, ""),
        ("seresnet152", 50, "resnet152"),
        ("se_resnet152", 50, "resnet152"),
        ("legacy_senet154", 50, ""),
    ],
)
def test_a_network_without_se_lacks_its_parameters_alone(name: str, blocks: int, plain: str) -> None:
    assert name in NETWORKS
    with torch.device("meta"):
        model = networks.build(name)
        twin = networks.without_se(model)
        found = [module for module in model.modules() if networks.is_se(module)]
        assert len(found) == blocks
        assert count(twin) == count(model) - sum(map(count, found)) < count(model)
        if plain:
            published = setriton.create_model(plain) if name.startswith("se_") else timm.create_model(plain)
            shapes = {key: value.shape for key, value in published.state_dict().items()}
            assert {key: value.shape for key, value in twin.state_dict().items()} == shapes


@needs_timm
@pytest.mark.parametrize(("name", "plain"), [("seresnet18", "resnet18"), ("se_resnet20", "resnet20")])
def test_a_network_without_se_is_the_plain_one(name: str, plain: str) -> None:
    model = networks.build(name)
    networks.randomize(model)
    twin = networks.without_se(model).eval()
    published = setriton.create_model(plain) if name.startswith("se_") else timm.create_model(plain)
    published.load_state_dict(twin.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin(x), published.eval()(x))


@needs_timm
@pytest.mark.parametrize("name", ["seresnet18", "legacy_seresnet18", "mobilenetv3_small_050", "regnety_002"])
def test_se_and_what_is_left_without_it_both_count(name: str) -> None:
    work = Workload(Case(name, INFERENCE, 4, 48, "float32"), CPU)
    logits = work.step(WAY[EAGER]).outputs()["logits"]
    plain = work.step(replace(WAY[EAGER], plain=True)).outputs()["logits"]
    assert networks.distance(plain, logits) > networks.FAR
    assert logits.std(0).mean() > 0.1 * logits.std()


def test_a_network_that_has_no_se() -> None:
    with pytest.raises(ValueError, match="model must have SE modules; SmallResNet has none"):
        networks.without_se(setriton.create_model("resnet20"))


def test_weights_hide_no_block() -> None:
    model: Any = setriton.create_model("se_resnet20", zero_init_last=True)
    networks.randomize(model)
    ends = [block.bn2.weight for block in model.modules() if hasattr(block, "downsample")]
    assert len(ends) == 9
    assert all(weight.min() >= 0.1 and weight.max() <= 0.3 for weight in ends)
    assert model.bn1.weight.min() >= 0.5


def test_statistics_are_near_those_of_images() -> None:
    torch.manual_seed(0)
    bn: Any = nn.BatchNorm2d(64)
    model = nn.Sequential(bn)
    networks.settle(model, 10 + 2 * torch.randn(8, 64, 9, 9))
    assert bn.momentum == 0.1
    assert (bn.running_mean - 10).abs().mean() == pytest.approx(0.1 * 2 * 0.8, rel=0.3)
    assert 0.75 * 4 < bn.running_var.min() < bn.running_var.max() < 1.3 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_right_step(mode: str, dtype: str) -> None:
    work = Workload(tiny(mode, dtype), CPU)
    weights = count(work.models[False])
    step = work.right_step(replace(WAY["compile"], backend="eager"))
    assert step.outputs()["logits"].shape == (4, 10)
    buffers = sum(buffer.nbytes for buffer in step.model.buffers())
    # Momenta are there once a training step has run.
    assert step.held_bytes() == buffers + 4 * weights * (2 if mode == TRAINING else 1)


def test_a_step_trains() -> None:
    work = Workload(tiny(), CPU)
    step = work.step(WAY[EAGER])
    before = [parameter.clone() for parameter in step.parameters]
    gradient = step.outputs()["gradient"]
    assert gradient.numel() == count(step.model)
    assert gradient.norm() > 0
    step()
    assert all(parameter.grad is None for parameter in step.parameters)
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, step.parameters, strict=True)])
    decay = torch.cat([1e-4 * parameter.flatten() for parameter in before])
    assert networks.distance(moved, 1e-4 * (gradient + decay)) < 1e-2
    assert all(torch.equal(p, q) for p, q in zip(work.models[False].parameters(), before, strict=True))


def _double_logits(model: Any) -> None:
    model.fc.weight.data *= 2
    model.fc.bias.data *= 2


def _double_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize(
    ("fault", "mode", "message"),
    [
        (_double_logits, INFERENCE, "logits is 1.00 of its norm from eager PyTorch's"),
        (_double_logits, TRAINING, "logits is 1.00 of its norm"),
        (_double_gradients, TRAINING, "gradient is 1.00 of its norm"),
    ],
)
def test_what_is_wrong_is_refused(
    fault: Callable[[nn.Module], None], mode: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setriton, "accelerate", fault, raising=False)
    with pytest.raises(ValueError, match=message):
        Workload(tiny(mode), CPU).right_step(Way("accelerate", "", backend=None, accelerated=True))


def test_rounding_that_goes_far_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(tiny(INFERENCE, "bfloat16"), CPU)
    monkeypatch.setattr(networks, "distance", lambda found, want: 0.4)
    assert work._reference(plain=False)[1] == {"logits": 0.8}
    monkeypatch.setattr(networks, "distance", lambda found, want: 0.01)
    assert work._reference(plain=False)[1] == {"logits": networks.FAR}


@pytest.mark.parametrize("installed", [True, False])
def test_setriton_is_a_backend_of_a_checkout_too(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["inductor", "setriton"] if installed else ["inductor"]
    monkeypatch.setattr(torch.compiler, "list_backends", lambda exclude: names)
    found = networks._backend("setriton")
    assert found == "setriton" if installed else callable(found)
    assert networks._backend("inductor") == "inductor"


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    networks.check_network("se_resnet20")
    with pytest.raises(ValueError, match="networks must have SE modules; resnet20 has none"):
        networks.check_network("resnet20")
    monkeypatch.setattr(networks, "timm_missing", lambda: "ImportError: none")
    with pytest.raises(
        ValueError, match=r"networks must be of se_.*, as timm cannot be imported \(ImportError: none\)"
    ):
        networks.check_network("seresnet50")


@needs_timm
def test_names_of_timm() -> None:
    networks.check_network("mobilenetv3_small_050")
    with pytest.raises(ValueError, match="networks must be names of setriton's or timm's; got 'seresnet'"):
        networks.check_network("seresnet")

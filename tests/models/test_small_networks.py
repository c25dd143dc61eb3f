"""Pre-activation and wide ResNets against published counts and against the blocks written out as functions."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import compare
from oracle import naive_squeeze_excite
from same_step import assert_same, assert_same_step, images, randomized
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from setriton import create_model
from setriton.models.preact_resnet import PreActResNet
from setriton.models.se import SEOptions

# Learnable parameters, and multiply-adds at 32 pixels.
COUNTS = {
    "preact_resnet110": (1_730_522, 253_149_824),
    "se_preact_resnet110": (1_744_760, 253_161_920),
    "preact_resnet164": (1_703_258, 244_500_992),
    "se_preact_resnet164": (1_905_362, 244_694_528),
    "wrn16_8": (10_961_370, 1_548_145_664),
    "se_wrn16_8": (11_049_290, 1_548_231_680),
}
# The same networks, but for their size.
SHALLOW: dict[str, dict[str, Any]] = {
    "basic": {"depth": 2},
    "bottleneck": {"depth": 2, "widths": (4, 8, 16), "bottleneck": True},
    "stride in the 3x3": {"depth": 1, "widths": (4, 8, 16), "bottleneck": True, "stride_in_1x1": False},
    "wide": {"depth": 1, "widths": (32, 64, 128)},
}


def build(kind: str, se: SEOptions | None = None, **options: Any) -> PreActResNet:
    torch.manual_seed(0)
    network = randomized(PreActResNet(**SHALLOW[kind], se=se, num_classes=5, **options))
    assert isinstance(network, PreActResNet)
    return network


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_operations(name: str) -> None:
    model = create_model(name, device="meta")
    params, macs = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 10)
    assert counter.get_total_flops() == 2 * macs


def test_parameters_without_se_bias_and_operations_with_another_stride() -> None:
    model = create_model("se_preact_resnet164", se_bias=False, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 1_896_794
    model = create_model("preact_resnet164", stride_in_1x1=False, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * 247_646_720


def written_out(state: dict[str, Tensor], x: Tensor, convolutions: int, strided: int) -> Tensor:
    """The network as arXiv 1603.05027, Figure 1b, has it, convolution number `strided` having the stride."""

    def norm(x: Tensor, name: str) -> Tensor:
        tensors = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return torch.relu(F.batch_norm(x, *tensors))

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    blocks = dict.fromkeys(".".join(key.split(".")[:2]) for key in state if key.startswith("layer"))
    for prefix in blocks:
        stride = 2 if prefix in ("layer2.0", "layer3.0") else 1
        before, y = norm(x, f"{prefix}.bn1"), x
        for number in range(1, convolutions + 1):
            weight = state[f"{prefix}.conv{number}.weight"]
            y = norm(y, f"{prefix}.bn{number}")
            y = F.conv2d(y, weight, stride=stride if number == strided else 1, padding=weight.shape[-1] // 2)
        if f"{prefix}.se.fc1.weight" in state:
            layers = (state[f"{prefix}.se.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
            y = naive_squeeze_excite(y, *layers, "relu", "sigmoid")
        if f"{prefix}.projection.weight" in state:
            x = F.conv2d(before, state[f"{prefix}.projection.weight"], stride=stride)
        x = x + y
    return F.linear(norm(x, "bn").mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("se", [None, SEOptions()], ids=["plain", "se"])
@pytest.mark.parametrize("kind", SHALLOW)
def test_logits_equal_the_blocks_written_out(kind: str, se: SEOptions | None) -> None:
    model, x = build(kind, se).eval(), images(32)
    bottleneck = SHALLOW[kind].get("bottleneck", False)
    strided = 1 if SHALLOW[kind].get("stride_in_1x1", True) else 2
    with torch.no_grad():
        want = written_out(model.state_dict(), x, 3 if bottleneck else 2, strided)
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SHALLOW)
def test_fused_equals_stock(kind: str) -> None:
    fused, stock = (build(kind, SEOptions(rd_ratio=1 / 4, fused=fused)) for fused in (True, False))
    stock.load_state_dict(fused.state_dict())
    assert_same(fused, stock, images(32), 1e-9)


def test_checkpointing_changes_nothing() -> None:
    model = build("bottleneck", SEOptions())
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    assert_same(twin, model, images(32))


@pytest.mark.parametrize("se", [None, SEOptions()], ids=["plain", "se"])
def test_compiles_to_one_graph(se: SEOptions | None) -> None:
    compare(build("stride in the 3x3", se).train(), images(32), backend="aot_eager")


def test_blocks_compiled_alone_keep_the_gradients_of_a_fork_apart() -> None:
    torch._dynamo.reset()
    model = build("basic", SEOptions())
    twin = copy.deepcopy(model)
    for block in twin.get_submodule("layer2").children():
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same_step(twin.train(), model.train(), images(32))


def test_a_step_of_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model, x, target = build("wide", SEOptions(), conv_drop_rate=0.3).float(), images(32).float(), torch.arange(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    before = F.cross_entropy(model(x), target)
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert F.cross_entropy(model(x), target) < before


def test_dropout_is_before_the_last_convolution_and_in_training_alone() -> None:
    model = build("wide", conv_drop_rate=0.5).eval()
    block, seen = model.get_submodule("layer2.0"), []
    block.get_submodule("conv2").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = images(16)
    model(x)
    model.train()
    model(x)
    shares = [(tensor == 0).double().mean().item() for tensor in seen]
    assert shares[0] < 0.7
    assert shares[1] > 0.7  # half of a map, of which ReLU leaves half


def test_maps_of_levels() -> None:
    x = torch.randn(1, 3, 32, 32)
    shapes = [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]
    model: Any = create_model("se_preact_resnet164").eval()
    last, maps = model.forward_intermediates(x)
    assert [tuple(y.shape) for y in maps] == shapes
    assert [level["num_chs"] for level in model.feature_info] == [64, 128, 256]
    assert torch.equal(last, maps[-1])
    assert torch.equal(model.forward_head(last), model(x))
    model = create_model("wrn16_8", features_only=True, out_indices=(0, 1))
    assert [tuple(y.shape) for y in model(x)] == [(1, 128, 32, 32), (1, 256, 16, 16)]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("wrn16_8", {"conv_drop_rate": 1.0}, ValueError, r"conv_drop_rate must be in \[0, 1\); got 1.0"),
        ("wrn16_8", {"stride_in_1x1": True}, TypeError, "wrn16_8 takes no option 'stride_in_1x1'"),
        ("preact_resnet110", {"rd_ratio": 1 / 4}, TypeError, "preact_resnet110 takes no option 'rd_ratio'"),
        ("se_preact_resnet110", {"rd_ratio": 0}, ValueError, "rd_ratio must be positive; got 0"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_model(name, device="meta", **options)


def test_depth_is_a_number_of_blocks() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1; got 0"):
        PreActResNet(0)

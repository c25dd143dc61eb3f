"""MobileNet and ShuffleNet against published counts, and against timm's and an independent build."""

import copy
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graphs import compare
from oracle import naive_squeeze_excite
from same_step import assert_same, images, randomized
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from setriton import create_model
from setriton.models.shufflenet import _shuffle

# Learnable parameters, and multiply-adds at 224 pixels.
COUNTS = {
    "mobilenet": (4_231_976, 568_740_352),
    "se_mobilenet": (4_718_044, 569_220_096),
    "shufflenet_g3": (1_865_728, 137_460_672),
    "se_shufflenet_g3": (2_484_533, 138_071_088),
}


def operations(model: nn.Module) -> tuple[int, int]:
    """Multiply-adds of convolutions and linear layers at 224 pixels, and additions of SE's squeezes."""
    squeezed = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal squeezed
        squeezed += inputs[0].numel()

    for name, module in model.named_modules():
        if name.endswith(".se"):
            module.register_forward_pre_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() // 2, squeezed


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_operations(name: str) -> None:
    model = create_model(name, device="meta")
    assert (parameters(model), operations(model)[0]) == COUNTS[name]


def test_operations_with_squeezes_are_those_of_the_paper() -> None:
    """arXiv 1709.01507, Table 3: 572 million for SE-MobileNet, 2 million more than ShuffleNet for its twin."""
    assert round(sum(operations(create_model("se_mobilenet", device="meta"))) / 1e6) == 572
    plain, se = (operations(create_model(name, device="meta")) for name in ("shufflenet_g3", "se_shufflenet_g3"))
    assert plain[1] == 0
    assert round((sum(se) - plain[0]) / 1e6) == 2


def test_se_after_the_depthwise_convolution() -> None:
    model = create_model("se_mobilenet", se_position="depthwise", device="meta")
    assert parameters(model) == 4_586_046
    assert model.get_submodule("layer2.0.se.fc1").in_channels == 64


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(create_model(name, num_classes=5, **options))


def test_mobilenet_equals_timm() -> None:
    torch.manual_seed(0)
    theirs: Any = randomized(timm.create_model("mobilenetv1_100", act_layer=nn.ReLU)).eval()
    ours = create_model("mobilenet").double().eval()
    renames = {"conv_stem": "conv1", "classifier": "fc"}
    state = {
        re.sub(
            r"^blocks\.(\d)", lambda m: f"layer{int(m[1]) + 1}", re.sub(r"^\w+", lambda m: renames.get(m[0], m[0]), k)
        ): v
        for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    x = images(97)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def excited(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    if f"{prefix}.se.fc1.weight" not in state:
        return x
    layers = (state[f"{prefix}.se.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    return naive_squeeze_excite(x, *layers, "relu", "sigmoid")


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))


def mobilenet_written_out(state: dict[str, Tensor], x: Tensor, position: str) -> Tensor:
    x = F.relu(norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=1)))
    for stage, depth in enumerate((1, 2, 2, 6, 2), start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            x = F.conv2d(x, state[f"{prefix}.conv_dw.weight"], stride=stride, padding=1, groups=x.shape[1])
            x = F.relu(norm(state, f"{prefix}.bn1", x))
            x = excited(state, prefix, x) if position == "depthwise" else x
            x = F.relu(norm(state, f"{prefix}.bn2", F.conv2d(x, state[f"{prefix}.conv_pw.weight"])))
            x = excited(state, prefix, x) if position == "pointwise" else x
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("position", ["pointwise", "depthwise"])
def test_se_mobilenet_equals_its_blocks_written_out(position: str) -> None:
    model, x = build("se_mobilenet", se_position=position).eval(), images(64)
    with torch.no_grad():
        want = mobilenet_written_out(model.state_dict(), x, position)
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


def shufflenet_written_out(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Figure 2 of arXiv 1707.01083, the ReLU behind the concatenation."""
    x = F.max_pool2d(F.relu(norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=1))), 3, 2, 1)
    for stage, depth in enumerate((4, 8, 4), start=1):
        for unit in range(depth):
            prefix, stride = f"layer{stage}.{unit}", 2 if unit == 0 else 1
            y = F.conv2d(x, state[f"{prefix}.conv1.weight"], groups=1 if (stage, unit) == (1, 0) else 3)
            y = nn.functional.channel_shuffle(F.relu(norm(state, f"{prefix}.bn1", y)), 3)
            y = F.conv2d(y, state[f"{prefix}.conv2.weight"], stride=stride, padding=1, groups=y.shape[1])
            y = F.conv2d(norm(state, f"{prefix}.bn2", y), state[f"{prefix}.conv3.weight"], groups=3)
            y = excited(state, prefix, norm(state, f"{prefix}.bn3", y))
            x = F.relu(x + y if stride == 1 else torch.cat((F.avg_pool2d(x, 3, 2, padding=1), y), 1))
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("name", ["shufflenet_g3", "se_shufflenet_g3"])
def test_shufflenet_equals_its_units_written_out(name: str) -> None:
    model, x = build(name).eval(), images(65)
    with torch.no_grad():
        torch.testing.assert_close(model(x), shufflenet_written_out(model.state_dict(), x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shuffle_keeps_the_layout(layout: torch.memory_format) -> None:
    x = torch.randn(2, 12, 5, 4).contiguous(memory_format=layout)
    y = _shuffle(x, 3)
    assert torch.equal(y, F.channel_shuffle(x, 3))
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("name", "options"),
    [("se_mobilenet", {}), ("se_mobilenet", {"se_position": "depthwise"}), ("se_shufflenet_g3", {})],
    ids=["mobilenet", "mobilenet depthwise", "shufflenet"],
)
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    fused, stock = (build(name, fused=fused, **options) for fused in (True, False))
    stock.load_state_dict(fused.state_dict())
    assert_same(fused, stock, images(), 1e-9)


@pytest.mark.parametrize("name", ["se_mobilenet", "se_shufflenet_g3"])
def test_checkpointing_changes_nothing(name: str) -> None:
    model = build(name)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    assert_same(twin, model, images())


@pytest.mark.parametrize("name", ["se_mobilenet", "se_shufflenet_g3"])
def test_compiles_to_one_graph(name: str) -> None:
    model = build(name).train()
    model.prune(1)  # what is behind level 1 is like what is before
    compare(model, images(), backend="aot_eager")


@pytest.mark.parametrize("name", COUNTS)
def test_a_step_of_training_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    model, x, target = create_model(name, num_classes=5), images().float(), torch.arange(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = F.cross_entropy(model(x), target)
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert F.cross_entropy(model(x), target) < before


@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [
        ("se_mobilenet", (64, 128, 256, 512, 1024), (2, 4, 8, 16, 32)),
        ("se_shufflenet_g3", (24, 240, 480, 960), (2, 8, 16, 32)),
    ],
)
def test_maps_of_levels(name: str, channels: tuple[int, ...], reductions: tuple[int, ...]) -> None:
    x = torch.randn(1, 3, 64, 64)
    shapes = [(1, c, 64 // r, 64 // r) for c, r in zip(channels, reductions, strict=True)]
    model: Any = create_model(name).eval()
    last, maps = model.forward_intermediates(x)
    assert [tuple(y.shape) for y in maps] == shapes
    assert [(level["num_chs"], level["reduction"]) for level in model.feature_info] == list(
        zip(channels, reductions, strict=True)
    )
    assert torch.equal(last, maps[-1])
    pyramid = create_model(name, features_only=True, out_indices=(1, 2))
    assert [tuple(y.shape) for y in pyramid(x)] == shapes[1:3]


def test_an_se_block_has_a_place_that_exists() -> None:
    with pytest.raises(ValueError, match="se_position must be one of pointwise, depthwise; got 'standard'"):
        create_model("se_mobilenet", se_position="standard")
    with pytest.raises(TypeError, match="se_shufflenet_g3 takes no option 'se_position'"):
        create_model("se_shufflenet_g3", se_position="pre")

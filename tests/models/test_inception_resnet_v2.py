"""Inception-ResNet-v2 against timm's, and its SE blocks against the formula and stock operators."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from setriton import SqueezeExcite, create_model
from setriton.models.inception_resnet_v2 import InceptionResNetSEOptions, ScaledResidual
from setriton.models.stages import ForkedStage

# Learnable parameters, elements of BN statistics, multiply-adds at 299 pixels, SE blocks.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "plain": ("inception_resnet_v2", {}, 55_843_464, 60_544, 13_155_794_016, 0),
    "SE": ("se_inception_resnet_v2", {}, 64_387_444, 60_544, 13_164_289_376, 40),
    "SE everywhere": ("se_inception_resnet_v2", {"se_mixed": True}, 65_092_718, 60_544, 13_164_990_944, 43),
}
SHALLOW = (2, 1, 2)
OPTIONS = [
    {},
    {"se_scaled": True},
    {"se_mixed": True, "se_bias": False},
    {"se_position": "post"},
]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_statistics_and_operations(variant: str) -> None:
    name, options, params, statistics, macs, se_blocks = PUBLISHED[variant]
    model = create_model(name, device="meta", **options)
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(b.numel() for key, b in model.named_buffers() if "running" in key) == statistics
    assert sum(isinstance(m, SqueezeExcite) for m in model.modules()) == se_blocks
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 299, 299, device="meta"))
    assert counter.get_total_flops() == 2 * macs


def test_fewer_repeats() -> None:
    model: Any = create_model("inception_resnet_v2", device="meta", repeats=(5, 20, 5))
    assert sum(p.numel() for p in model.parameters()) == 45_050_504
    assert [len(stage) for stage in (model.repeat, model.repeat_1, model.repeat_2)] == [5, 20, 4]


def test_widths_of_gates() -> None:
    model = create_model("se_inception_resnet_v2", device="meta", se_mixed=True)
    widths = [(m.fc2.out_channels, m.fc1.out_channels) for m in model.modules() if isinstance(m, SqueezeExcite)]
    assert widths == [(320, 20)] * 11 + [(1088, 68)] * 21 + [(2080, 130)] * 11


def randomize(model: nn.Module) -> nn.Module:
    """In float64, with random BN parameters and statistics: at their initial values they would hide mistakes."""
    torch.manual_seed(0)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if "running" in key or ".bn." in key:
            nn.init.uniform_(tensor, 0.5, 1.0)
        elif "se.fc" in key:
            nn.init.normal_(tensor, std=0.3)
    return model.double().eval()


def test_logits_equal_timms_with_the_same_weights() -> None:
    theirs: Any = randomize(timm.create_model("inception_resnet_v2", num_classes=50))
    ours: Any = create_model("inception_resnet_v2", num_classes=50).double().eval()
    ours.load_state_dict({key.replace("classif.", "fc."): value for key, value in theirs.state_dict().items()})
    x = torch.randn(2, 3, 91, 107, dtype=torch.float64)
    with torch.no_grad():
        found, want = ours(x), theirs(x)
    assert (found - want).abs().max() <= 1e-10 * want.abs().max()
    levels = theirs.feature_info
    assert ours.feature_info == [{key: level[key] for key in ("module", "num_chs", "reduction")} for level in levels]


def residual_block(relu: bool = True, **options: Any) -> ScaledResidual:
    torch.manual_seed(1)
    branches = [nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 3, padding=1)]
    se = InceptionResNetSEOptions(rd_channels=9, **options)  # enough for some to be positive
    return randomize(ScaledResidual(32, branches, 16, 0.17, relu, se))  # type: ignore[return-value]


def by_formula(block: ScaledResidual, x: Tensor, scaled: bool, relu: bool, post: bool) -> Tensor:
    p = dict(block.named_parameters())

    def gate(q: Tensor) -> Tensor:
        hidden = (q @ p["se.fc1.weight"][:, :, 0, 0].T + p["se.fc1.bias"]).clamp(min=0)
        return 1 / (1 + torch.exp(-(hidden @ p["se.fc2.weight"][:, :, 0, 0].T + p["se.fc2.bias"])))[:, :, None, None]

    first = F.conv2d(x, p["branch0.weight"], p["branch0.bias"])
    second = F.conv2d(x, p["branch1.weight"], p["branch1.bias"], padding=1)
    u = F.conv2d(torch.cat((first, second), 1), p["conv2d.weight"], p["conv2d.bias"])
    mean = u.mean((2, 3))
    s = 1.0 if post else gate(0.17 * mean if scaled else mean)
    y = x + 0.17 * s * u
    y = y.clamp(min=0) if relu else y
    return gate(y.mean((2, 3))) * y if post else y


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
@pytest.mark.parametrize("place", ["unscaled", "scaled", "post"])
def test_a_block_computes_the_formula(place: str, fused: bool, relu: bool) -> None:
    post, scaled = place == "post", place == "scaled"
    block = residual_block(relu, fused=fused, se_scaled=scaled, se_position="post" if post else "standard")
    x = torch.randn(3, 32, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    want = by_formula(block, x, scaled, relu, post)
    want_grads = torch.autograd.grad(want.sin().sum(), inputs)
    for mode in (True, False):
        found = block.train(mode)(x)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        for grad, wanted in zip(torch.autograd.grad(found.sin().sum(), inputs), want_grads, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)
    y, y_skip = block(x, fork=True)
    assert torch.equal(y, block(x))
    assert torch.equal(y_skip, y) if fused and not post else y_skip is None


def test_only_parameters_are_state() -> None:
    fused, stock = (residual_block(fused=fused) for fused in (True, False))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    assert not list(fused.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_stock_operators(dtype: torch.dtype) -> None:
    fused, stock = residual_block(), residual_block(fused=False)
    x = torch.randn(4, 32, 9, 9, dtype=torch.float64).to(dtype)
    exact = fused(x.double())
    errors = [(block.to(dtype)(x).double() - exact).square().mean().sqrt() for block in (fused, stock)]
    assert fused(x).dtype == dtype
    assert errors[0] <= errors[1]


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers of one step."""
    logits = model(x)
    logits.sin().sum().backward()
    gradients = {f"{key}.grad": p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for key, value in want.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[key], value, rtol=1e-9, atol=1e-9 * scale + 1e-12, msg=functools.partial("{1}: {0}".format, key)
        )


def shallow(**options: Any) -> nn.Module:
    return randomize(create_model("se_inception_resnet_v2", repeats=SHALLOW, num_classes=5, **options)).train()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_blocks_equal_stock_ones(options: dict[str, Any]) -> None:
    fused, stock = shallow(**options), shallow(**options, fused=False)
    stock.load_state_dict(fused.state_dict())
    x = torch.randn(3, 3, 107, 109, dtype=torch.float64)
    found = step(fused, x)
    assert len([key for key in found if key.endswith(".grad")]) == len(list(fused.parameters()))
    assert_equal(found, step(stock, x))


def test_a_network_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = shallow(se_mixed=True)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 3, 107, 107, dtype=torch.float64)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_equal(step(model, x), step(twin, x))


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    stage = ForkedStage(residual_block(), residual_block())
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        stage.zero_grad()
        stage.grad_checkpointing = checkpointing
        results.append(step(stage, x))
    assert_equal(*results)


def test_built_on_the_meta_device() -> None:
    model = residual_block()
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("name", ["inception_resnet_v2", "se_inception_resnet_v2"])
def test_trains_a_step(name: str) -> None:
    model = create_model(name, num_classes=7, in_chans=1)
    found = step(model, torch.randn(2, 1, 75, 83))
    assert found["logits"].shape == (2, 7)
    assert all(p.grad is not None for p in model.parameters())


def test_feature_maps() -> None:
    x = torch.randn(1, 3, 107, 139)
    shapes = [(64, 51, 67), (192, 23, 31), (320, 11, 15), (1088, 5, 7), (1536, 2, 3)]
    model: Any = create_model("se_inception_resnet_v2", repeats=SHALLOW).eval()
    last, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert torch.equal(last, model.forward_features(x))
    extractor: Any = create_model("inception_resnet_v2", repeats=SHALLOW, features_only=True, out_indices=(2, 3))
    assert [tuple(m.shape[1:]) for m in extractor(x)] == shapes[2:4]
    assert any(key.startswith("mixed_7a") for key in model.state_dict())
    assert not any(key.startswith("network.mixed_7a") for key in extractor.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"se_position": "pre"}, ValueError, "se_position must be one of standard, post; got 'pre'"),
        ({"se_position": "post", "se_scaled": True}, ValueError, "se_scaled must be False where se_position is post"),
        ({"se_stages": (2,)}, TypeError, "takes no option 'se_stages'"),
        ({"repeats": (10, 20)}, ValueError, r"repeats must be three numbers; got \(10, 20\)"),
        ({"repeats": (0, 1, 2)}, ValueError, "repeats must be at least 1; got 0"),
        ({"repeats": (1, 1, 1)}, ValueError, "repeats must end in at least 2, block8 being one"),
        ({"repeats": (1, 1.5, 2)}, TypeError, "repeats must be an int; got 1.5"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_model("se_inception_resnet_v2", device="meta", **options)


@pytest.mark.parametrize("option", ["se_position", "se_scaled", "se_mixed", "fused"])
def test_the_plain_network_takes_no_option_of_se(option: str) -> None:
    build: Callable[..., nn.Module] = functools.partial(create_model, "inception_resnet_v2", device="meta")
    with pytest.raises(TypeError, match=f"takes no option '{option}'"):
        build(**{option: True})

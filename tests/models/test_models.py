"""The networks against published parameter counts and, with the same weights, against timm's and torchvision's."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from oracle import naive_squeeze_excite
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from setriton import SqueezeExcite, create_model, list_models
from setriton.models import blocks
from setriton.models.blocks import ResidualBlock
from setriton.models.stages import ForkedStage

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
    residual_blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert all(isinstance(block.se, SqueezeExcite) == (name in list_models(se=True)) for block in residual_blocks)


def unfused(
    bn: nn.BatchNorm2d, se: SqueezeExcite, x: Tensor, residual: Tensor, *, bn_act: str, out_act: str, fork: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """What a block's last step computes, module by module."""
    assert (bn_act, out_act) == ("identity", "relu")
    y = naive_squeeze_excite(bn(x), se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias, se.act, se.gate)
    y = torch.relu(y + residual)
    return (y, y) if fork else y


def train_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers of one step."""
    model.zero_grad()
    logits = model(x)
    logits.sin().sum().backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads, **{name: b.clone() for name, b in model.named_buffers()}}


@pytest.mark.parametrize("name", ["se_resnet20", "se_resnet50"])
def test_fused_tails_equal_their_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = randomize(create_model(name, num_classes=5)).train()
    plain = copy.deepcopy(fused)
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = [train_step(fused, x) for _ in range(2)]
    monkeypatch.setattr(blocks, "bn_se_forward", unfused)
    monkeypatch.setattr(blocks, "bn_se", unfused)
    for found in steps:
        want = train_step(plain, x)
        assert found.keys() == want.keys()
        for key in want:
            scale = want[key].abs().max().item()
            # The gradient of ResNet-50's bn1.bias is 0: 1x1 convolutions pass the shift on, and the next BN removes it.
            atol = 1e-9 * scale + 1e-12
            torch.testing.assert_close(found[key], want[key], rtol=1e-9, atol=atol, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", ["resnet20", "se_resnet20"])
def test_a_network_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = randomize(create_model(name)).train()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found, want = train_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), train_step(twin, x)
    for (key, value), wanted in zip(found.items(), want.values(), strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_export_with_any_batch(training: bool) -> None:
    model, x = randomize(create_model("se_resnet20")).train(training), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_compiled_blocks_keep_the_gradients_of_a_fork_apart(layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    stage = randomize(create_model("se_resnet20").get_submodule("layer2")).train()
    twin = copy.deepcopy(stage)
    for block in stage.children():
        block.compile(fullgraph=True, dynamic=False)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    results = []
    for module in (stage, twin):
        y, y_skip = module(x, fork=True)
        edges = [torch.autograd.graph.get_gradient_edge(output) for output in (y, y_skip)]
        assert edges[0].node is edges[1].node
        assert [edge.output_nr for edge in edges] == [0, 1]
        assert y.data_ptr() == y_skip.data_ptr()
        loss = y.sin().sum() + y_skip.cos().sum()
        results.append([y, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet20", "se_resnet20"])
def test_blocks_and_stages_alone_take_and_give_one_map(name: str) -> None:
    stage = create_model(name).get_submodule("layer2")
    assert isinstance(stage, ForkedStage)
    x = torch.randn(2, 16, 8, 8)
    for module in (stage, stage[0]):
        y, y_skip = module(x, x, fork=True)
        assert y.shape == (2, 32, 4, 4)
        assert torch.equal(module(x), y)
        assert y_skip is None if name == "resnet20" else torch.equal(y_skip, y)


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
    assert len(list_models()) == 26
    assert list_models("se_resnet5*") == ["se_resnet50", "se_resnet56"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_model("seresnet50"), ValueError, "did you mean se_resnet50"),
        (lambda: create_model(50), TypeError, "name must be a string; got int"),
        (lambda: create_model("resnet50", classes=3), TypeError, "takes no option 'classes'; it takes num_classes"),
        (lambda: create_model("resnet50", layout="nchw"), ValueError, "layout must be one of caffe, torch; got 'nchw'"),
        (lambda: create_model("resnet50", num_classes=-1), ValueError, "num_classes must be at least 1; got -1"),
        (lambda: create_model("resnet20", in_chans=0), ValueError, "in_chans must be at least 1; got 0"),
        (lambda: create_model("resnet20", drop_rate=1.0), ValueError, r"drop_rate must be in \[0, 1\); got 1.0"),
        (lambda: list_models(3), TypeError, "pattern must be a string or several; got int"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

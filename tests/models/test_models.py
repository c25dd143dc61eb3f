"""The networks against timm's and torchvision's with the same weights; their fused tails against the modules."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from oracle import naive_squeeze_excite
from same_step import well_conditioned
from torch import Tensor, nn

from setriton import SqueezeExcite, create_model, list_models, modules
from setriton.models.published import crop
from setriton.models.stages import ForkedStage


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
    theirs = well_conditioned(theirs())
    x = torch.randn(2, 3, 96, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(x)
        for candidate in ("caffe", "torch"):
            ours = create_model(name, layout=candidate).double().eval()
            ours.load_state_dict(to_torch_keys(theirs.state_dict()))
            distance = (ours(x) - want).abs().max() / want.abs().max()
            assert distance < 1e-10 if candidate == layout else distance > 1e-6


@pytest.mark.parametrize("name", list_models())
def test_every_network_trains_a_step_on_images_of_any_size_without_memory(name: str) -> None:
    side = 33 if crop(name) == 32 else 97
    model = create_model(name, num_classes=7, in_chans=1, device="meta", dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    logits = model(torch.empty(2, 1, side, side - 1, device="meta", dtype=torch.float64))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


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
    fused = well_conditioned(create_model(name, num_classes=5)).train()
    plain = copy.deepcopy(fused)
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = [train_step(fused, x) for _ in range(2)]
    monkeypatch.setattr(modules, "bn_se_forward", unfused)
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
    model = well_conditioned(create_model(name)).train()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found, want = train_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), train_step(twin, x)
    for (key, value), wanted in zip(found.items(), want.values(), strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_export_with_any_batch(training: bool) -> None:
    model, x = (
        well_conditioned(create_model("se_resnet20")).train(training),
        torch.randn(4, 3, 16, 16, dtype=torch.float64),
    )
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_compiled_blocks_keep_the_gradients_of_a_fork_apart(layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    stage = well_conditioned(create_model("se_resnet20").get_submodule("layer2")).train()
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

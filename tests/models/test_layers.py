"""What was done to a layer of a block takes effect as it does in the block of stock operators."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changed_layers import CHANGES, Doubled
from torch import Tensor, nn

from setriton import SqueezeExcite, stock
from setriton.models.blocks import BasicBlock, BlockSEOptions, Bottleneck
from setriton.models.bn_inception import InceptionModule, Widths
from setriton.models.inception_resnet_v2 import Branches, InceptionResNetSEOptions, ScaledResidual
from setriton.models.mobilenet import MobileNetSEOptions, SeparableBlock
from setriton.models.preact_resnet import PreActBasic, PreActBottleneck
from setriton.models.se import SEOptions
from setriton.models.shufflenet import ShuffleUnit, StridedShuffleUnit
from setriton.models.stages import ForkedStage, Stage
from setriton.models.vgg import VGGBlock

C = 12


def scaled(fused: bool, **options: Any) -> nn.Module:
    se = InceptionResNetSEOptions(rd_ratio=1 / 3, fused=fused, **options)
    branches = (nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(C, 4, 3, padding=1))
    return ScaledResidual(C, branches, 8, 0.3, se=se)


def residual(**options: Any) -> Callable[[bool], nn.Module]:
    return lambda fused: BasicBlock(C, C, se=BlockSEOptions(rd_ratio=1 / 3, fused=fused, **options), bn_act="relu")


def shuffled(fused: bool) -> nn.Module:
    strided = StridedShuffleUnit(C, 6, 2 * C, 3, se=SEOptions(rd_ratio=1 / 3, fused=fused))
    return ForkedStage(strided, ShuffleUnit(2 * C, 6, 2 * C, 3, se=SEOptions(rd_ratio=1 / 3, fused=fused)))


BLOCKS: dict[str, Callable[[bool], nn.Module]] = {
    "basic": residual(),
    "pre": residual(se_position="pre"),
    "bottleneck": lambda fused: Bottleneck(C, 4, 4, C, se=BlockSEOptions(rd_ratio=1 / 3, fused=fused)),
    "3x3": lambda fused: Bottleneck(C, 6, 6, C, se=BlockSEOptions(se_position="3x3", rd_ratio=1 / 3, fused=fused)),
    "separable": lambda fused: SeparableBlock(C, C, 1, MobileNetSEOptions(rd_ratio=1 / 3, fused=fused)),
    "vgg": lambda fused: VGGBlock(C, C, SEOptions(rd_ratio=1 / 3, fused=fused)),
    "preact": lambda fused: PreActBasic(C, 8, C, se=SEOptions(rd_ratio=1 / 3, fused=fused)),
    "preact bottleneck": lambda fused: PreActBottleneck(C, 4, C, se=SEOptions(rd_ratio=1 / 3, fused=fused)),
    "scaled": scaled,
    "scaled squeeze": lambda fused: scaled(fused, se_scaled=True),
    "branches": lambda fused: Branches(nn.Conv2d(C, C, 1), se=SEOptions(rd_ratio=1 / 3, fused=fused).make(C)),
    "inception": lambda fused: InceptionModule(C, Widths(4, (4, 2), (4, 4, 2), 4), SEOptions(fused=fused)),
    "shuffle": shuffled,
}


def make(block: str) -> tuple[nn.Module, nn.Module]:
    """Two of a block one after the other, fused and of stock operators, with the same numbers."""
    build = BLOCKS[block]
    first = [build(True), build(True)] if block != "shuffle" else [*build(True)]
    stage = ForkedStage if hasattr(type(first[0]), "takes_forks") else Stage
    fused = stage(*first).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in fused.parameters():
            spread = 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * spread)
        for module in fused.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1)
            if isinstance(module, SqueezeExcite) and module.fc1.bias is not None:
                module.fc1.bias.add_(0.7)  # units that are dead would hide what is squeezed
    plain = stage(*([build(False), build(False)] if block != "shuffle" else [*build(False)])).double()
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def steps(model: nn.Module, count: int = 2) -> dict[str, Any]:
    """Outputs, gradients and buffers of steps in training and one in evaluation."""
    found: dict[str, Any] = {}
    x = torch.randn(3, C, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for step in range(count + 1):
        model.train(step < count)
        model.zero_grad()
        image = (x + 0.1 * step).requires_grad_()
        y = model(image * 1)
        y.sin().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        buffers = {f"{name} buffer": b.clone() for name, b in model.named_buffers()}
        found |= {f"{step} {n}": v for n, v in ({"y": y.detach(), "dx": image.grad} | grads | buffers).items()}
    return found


def assert_same(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found.keys() == want.keys()
    for key, wanted in want.items():
        if wanted is None:
            assert found[key] is None, key
            continue
        scale = wanted.abs().max().item() if wanted.numel() else 0
        torch.testing.assert_close(
            found[key], wanted, rtol=1e-10, atol=1e-10 * scale + 1e-11, msg=lambda m, k=key: f"{k}: {m}"
        )


# Every block with these; the other changes with two blocks, of a tail with BN and of one without.
OF_EACH_BLOCK = (
    "prune",
    "new spectral_norm",
    "hook of fc1",
    "hook of se",
    "hook of norms",
    "hook of relu",
    "group norm",
    "identity",
    "silu",
)
CASES = [
    (block, change) for block in BLOCKS for change in CHANGES if change in OF_EACH_BLOCK or block in ("basic", "scaled")
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("block", "change"), CASES)
def test_what_was_done_to_a_layer_takes_effect(block: str, change: str) -> None:
    fused, plain = make(block)
    for model in (fused, plain):
        torch.manual_seed(7)
        CHANGES[change](model)
    assert_same(steps(fused), steps(plain))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_changes_something(change: str) -> None:
    changed, plain = make("basic")
    CHANGES[change](changed)
    found, want = steps(changed, 1), steps(plain, 1)
    same = [key for key in found.keys() & want.keys() if _is_same(found[key], want[key])]
    assert len(same) < max(len(found), len(want))


def _is_same(found: Tensor | None, want: Tensor | None) -> bool:
    return found is want if found is None or want is None else torch.equal(found, want)


@pytest.mark.parametrize("block", BLOCKS)
def test_stock_blocks_are_fused_without_a_message(block: str, caplog: pytest.LogCaptureFixture) -> None:
    fused, plain = make(block)
    assert_same(steps(fused), steps(plain))
    assert not caplog.records


class DoubledReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("block", "kind"),
    [("basic", Doubled), ("basic", DoubledNorm), ("basic", DoubledReLU), ("scaled", Doubled), ("scaled", DoubledNorm)],
)
def test_classes_that_stand_in_for_torchs(block: str, kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of quantization exchange torch.nn.Conv2d before a network is made."""
    _, plain = make(block)
    monkeypatch.setattr(nn, kind.__mro__[1].__name__, kind)
    fused, exchanged = make(block)
    assert any(type(module) is kind for module in fused.modules())
    assert_same(steps(fused), want := steps(exchanged))
    assert not torch.equal(want["0 y"], steps(plain)["0 y"])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU])
def test_methods_that_were_exchanged(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stock, "_reported", set())
    fused, plain = make("basic")
    before, inner = steps(copy.deepcopy(plain))["0 y"], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * inner(self, x))
    assert_same(steps(fused), want := steps(plain))
    assert not torch.equal(want["0 y"], before)
    assert "methods of torch's classes were exchanged" in caplog.text


class Halved(Tensor):
    """A tensor of another class, of which sigmoid is half of what it is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y / 2 if func is torch.sigmoid else y


def test_tensors_that_change_what_functions_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stock, "_reported", set())
    fused, plain = make("basic")
    x = torch.randn(2, C, 3, 3, dtype=torch.float64)
    found, want = (model(x.as_subclass(Halved)) for model in (fused, plain))
    assert type(found) is type(want) is Halved
    torch.testing.assert_close(found.as_subclass(Tensor), want.as_subclass(Tensor))
    assert not torch.allclose(found.as_subclass(Tensor), plain(x))
    assert "its input is a Halved" in caplog.text

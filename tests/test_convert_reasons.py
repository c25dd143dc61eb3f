"""What accelerate fuses of a block, what it leaves, and the reasons it gives."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from same_step import assert_same, images, randomized, tail
from timm.layers import BatchNormAct2d, SEModule
from timm.layers.squeeze_excite import EffectiveSEModule
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from setriton import SqueezeExcite, create_model
from setriton.convert import Report, accelerate, restore

TAIL = "bn_se+add+relu"


@pytest.mark.parametrize(
    ("bn", "act", "kind"),
    [
        (nn.BatchNorm2d(8), nn.Identity(), "bn_se"),
        (nn.BatchNorm2d(8, momentum=None), nn.ReLU(inplace=True), "bn_act_se"),
        (nn.SyncBatchNorm(8), nn.Hardswish(), "bn_act_se"),
        (BatchNormAct2d(8, act_layer=nn.SiLU), nn.Identity(), "bn_act_se"),
        (BatchNormAct2d(8, apply_act=False), nn.ReLU(), "bn_act_se"),
        (nn.BatchNorm2d(8), nn.Sequential(), "bn_se"),
    ],
    ids=str,
)
def test_kinds_of_batch_norm(bn: nn.Module, act: nn.Module, kind: str) -> None:
    model = randomized(tail(SEModule(8), act, bn))
    twin = copy.deepcopy(model)
    assert accelerate(model) == Report({"3": kind})
    assert_same(model, twin, images(8), 1e-7)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tail(SEModule(8), nn.ReLU6()), "hardtanh between BN and SE"),
        (tail(SEModule(8), nn.Mish()), "Mish between BN and SE"),
        (tail(SEModule(8), nn.ReLU(), BatchNormAct2d(8)), "relu, relu between BN and SE"),
        (tail(SEModule(8), nn.Identity(), BatchNormAct2d(8, act_layer=nn.Tanh)), "Tanh between BN and SE"),
        (tail(SEModule(8), nn.SiLU(), nn.GroupNorm(2, 8)), None),
    ],
)
def test_se_alone_where_the_tail_has_no_fused_form(model: nn.Module, reason: str | None) -> None:
    twin = copy.deepcopy(randomized(model))
    assert accelerate(model) == Report({"3": "se"}, {} if reason is None else {"3": reason})
    assert_same(model, twin, images(8))


class Block(nn.Module):
    """A tail in a class that nobody named."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.se = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), se

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.bn(self.conv(x)))


def test_tails_in_unknown_classes_are_said_to_be_unknown() -> None:
    model = randomized(Block(SEModule(8)))
    twin = copy.deepcopy(model)
    note = "no tail is looked for in Block: torch.compile(backend='setriton') does"
    assert accelerate(model) == Report({"se": "se"}, {"se": note})
    assert_same(model, twin, images(8))
    assert accelerate(Block(SqueezeExcite(8))) == Report()


class Softmax(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).softmax(1)


class Keeping(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))
        return x * self.kept


class Dropping(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.fc2(nn.functional.dropout(hidden, 0.5, self.training)))


class Deciding(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 2 else x


class Adding(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("se", "reason"),
    [
        (SEModule(8, norm_layer=nn.BatchNorm2d), "normalization"),
        (SEModule(8, add_maxpool=True), "the map's maximum is added to its mean"),
        (SEModule(8, act_layer=nn.Tanh), "tanh"),
        (SEModule(8, gate_layer="tanh"), "the gate is tanh, not sigmoid or hardsigmoid"),
        (SqueezeExcitation(8, 4, lambda: nn.GELU(approximate="tanh")), "gelu with approximate='tanh'"),
        (EffectiveSEModule(8), "one layer"),
        (Softmax(8), "softmax"),
        (Keeping(8), "its forward sets kept"),
        (Dropping(8), "not the same in training and in evaluation"),
        (Deciding(8), "cannot be traced"),
        (Adding(8), "not recognized"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_what_looks_like_se_and_is_left(se: nn.Module, reason: str) -> None:
    model = tail(se)
    before = [dict(vars(module)) for module in model.modules()]
    report = accelerate(model)
    assert report.replaced == {}
    assert reason in report.left["3"]
    assert [vars(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    "module", [nn.TransformerEncoderLayer(8, 2, 16), nn.LazyConv2d(8, 1), create_model("se_resnet20")]
)
def test_nothing_to_do(module: nn.Module) -> None:
    assert accelerate(module) == Report()
    assert str(accelerate(module)) == "SE blocks: 0 replaced, 0 left"
    restore(module)


class Linears(nn.Module):
    """As written by hand in many networks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(8, 2, bias=False), nn.ReLU(inplace=True), nn.Linear(2, 8), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class Products(nn.Module):
    """Weights as (in, out), and a bias for the map."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.randn(1, 8))
        self.b2 = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gate = (x.mean((2, 3)) @ self.w1).relu() @ self.w2
        return (gate[:, :, None, None] + self.b2).sigmoid() * x


@pytest.mark.parametrize("make", [Linears, Products])
def test_blocks_written_by_hand(make: Callable[[], nn.Module]) -> None:
    model = randomized(tail(make()))
    twin = copy.deepcopy(model)
    assert accelerate(model).replaced == {"3": "bn_act_se"}
    assert_same(model, twin, images(8))
    se, twin_se = randomized(make()), make().double()
    twin_se.load_state_dict(se.state_dict())
    assert accelerate(se).replaced == {"": "se"}
    assert_same(se, twin_se, torch.randn(2, 8, 5, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("hooked", "kind", "reason"),
    [
        ("", TAIL, None),
        ("conv2", TAIL, None),
        ("bn2", "se", "bn2 has hooks"),
        ("se", "se", "se has hooks"),
        ("act2", "se", "act2 has hooks"),
        ("se.gate", None, "gate has hooks"),
    ],
)
def test_hooks_go_on(hooked: str, kind: str | None, reason: str | None) -> None:
    block = randomized(BasicBlock(8, 8, attn_layer=SEModule))
    twin, calls = copy.deepcopy(block), []
    block.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(1))
    report = accelerate(block)
    assert report == Report({} if kind is None else {"se": kind}, {} if reason is None else {"se": reason})
    assert calls == []
    assert_same(block, twin, torch.randn(2, 8, 5, 5, dtype=torch.float64))
    assert calls == [1, 1]


def test_a_hooked_container_is_called() -> None:
    model, calls = torchvision.models.mobilenet_v3_small().features[1].block, []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert accelerate(model) == Report({"1": "se"}, {"1": "0 has hooks"})
    model(torch.randn(2, 16, 5, 5))
    assert calls == [1]


def test_forwards_of_instances_are_not_replaced() -> None:
    se, block, model = SEModule(8), BasicBlock(8, 8, attn_layer=SEModule), tail(SEModule(8))
    for module in (se, block, model[1]):
        module.forward = module.forward
    assert accelerate(se) == Report({}, {"": "it has a forward of its own"})
    assert accelerate(block) == Report({"se": "se"}, {"se": "the model has a forward of its own"})
    assert accelerate(model) == Report({"3": "se"}, {"3": "1 has a forward of its own"})

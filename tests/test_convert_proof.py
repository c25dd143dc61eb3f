"""What accelerate must not change: modules whose forwards do more than their graphs show stay as they are."""

import copy
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_step import assert_same, randomized, tail
from timm.layers import DropPath, SEModule
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from setriton.convert import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")


class SEBlock(nn.Module):
    """With GELU, whose hidden units are never dead; what subclasses change is one line of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def gate(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.squeeze(x)))).sigmoid()

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(x)


class Counting(SEBlock):
    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return x * self.gate(x)


class CountingInPlace(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.gate(x)


class Stats(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.stats["gate"] = e = self.gate(x)
        return x * e


class History(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        e = self.gate(x)
        self.history.append(e.mean())
        return x * e


class Nested(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"runs": [[0]]}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["runs"][0][0] += 1
        return x * self.gate(x)


_seen = [0]
_runs = 0


class GlobalList(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        _seen[0] += 1
        return x * self.gate(x)


class GlobalCounter(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        global _runs
        _runs += 1
        return x * self.gate(x)


class ClassCounter(SEBlock):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).runs += 1
        return x * self.gate(x)


def _count() -> None:
    _seen[0] += 1


class CallsGlobal(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        _count()
        return super().squeeze(x)


class CallsGlobalWithoutGradient(SEBlock):
    @torch.no_grad()
    def squeeze(self, x: Tensor) -> Tensor:
        _count()
        return super().squeeze(x)


class Weakly(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.owner = weakref.ref(self)


class Uncopyable(SEBlock):
    def __deepcopy__(self, memo: Any) -> Any:
        _seen[0] += 1
        raise RuntimeError("no copies")


class WithoutGradient(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            e = self.gate(x)
        return x * e


class Decorated(SEBlock):
    @torch.no_grad()
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x)


class Inference(SEBlock):
    @torch.inference_mode()
    def squeeze(self, x: Tensor) -> Tensor:
        return super().squeeze(x)


class Detached(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        return x.detach().mean((2, 3), keepdim=True)


class WithoutAutocast(SEBlock):
    def gate(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().gate(x.float())


class InFloat(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x.double() * self.gate(x)


class InPlace(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        x *= self.gate(x)
        return x


class InPlaceMethod(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gate(x))


class IntoView(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        e = self.gate(x)
        x[:, :3].relu_()
        return x * e


class Drawing(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return x * self.gate(x)


class DrawingInPython(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) if random.random() < 2 else x


class TrainingOnly(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) if self.training else x


class Tuple(SEBlock):
    def forward(self, x: Tensor) -> Any:
        e = self.gate(x)
        return x * e, e


class Keyword(SEBlock):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * self.gate(x) * scale


class Deciding(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) if x.mean() > 0 else x


class OneRow(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        return x[:, :, 0].mean(-1)[:, :, None, None]


class OverBatch(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        return x.reshape(1, x.shape[1], -1).mean(2)[:, :, None, None]


class Masked(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        return torch.masked.mean(x, (2, 3), mask=x > 0, keepdim=True)


class Alpha(SEBlock):
    def gate(self, x: Tensor) -> Tensor:
        z = F.conv2d(F.gelu(self.fc1(self.squeeze(x))), self.fc2.weight)
        return torch.add(z, self.fc2.bias[:, None, None], alpha=0.5).sigmoid()  # type: ignore[index]


class HardAlpha(SEBlock):
    def gate(self, x: Tensor) -> Tensor:
        z = self.fc2(F.gelu(self.fc1(self.squeeze(x))))
        return F.relu6(torch.add(z, 3, alpha=2)) / 6


class Rounding(SEBlock):
    def gate(self, x: Tensor) -> Tensor:
        z = self.fc2(F.gelu(self.fc1(self.squeeze(x))))
        return torch.div(F.relu6(z + 3), 6, rounding_mode="trunc")


class Addcmul(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        e = self.gate(x)
        return torch.addcmul(e, x, e)


class Out(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, self.gate(x), out=x)


class Repeated(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gate(x)).expand(5, -1, -1, -1) if x.shape[0] == 1 else x * self.gate(x)


LEFT = [
    Counting, CountingInPlace, Stats, History, Nested, GlobalList, GlobalCounter, ClassCounter, CallsGlobal,
    CallsGlobalWithoutGradient, Weakly, Uncopyable, WithoutGradient, Decorated, Inference, Detached, WithoutAutocast,
    InFloat, InPlace, InPlaceMethod, IntoView, Drawing, DrawingInPython, TrainingOnly, Tuple, Keyword, Deciding,
    OneRow, OverBatch, Masked, Alpha, HardAlpha, Rounding, Addcmul, Out, Repeated,
]  # fmt: skip


def state_of(module: nn.Module) -> list[Any]:
    """All that a module holds, down to the numbers; what it held may not be changed in its place either."""
    return [
        (path, type(child), {k: repr(v) for k, v in vars(child).items() if k[0] != "_"}, list(vars(child)))
        for path, child in module.named_modules()
    ] + [(name, id(t), t._version, t.clone()) for name, t in module.state_dict(keep_vars=True).items()]


def assert_untouched(before: list[Any], after: list[Any]) -> None:
    for was, now in zip(before, after, strict=True):
        *head, last = was
        *head_now, last_now = now
        assert head == head_now
        assert torch.equal(last, last_now) if isinstance(last, Tensor) else last == last_now


@pytest.mark.parametrize("make", LEFT, ids=lambda kind: kind.__name__)
def test_what_does_more_is_left_untouched(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), make())
    before, python, generator = state_of(model), random.getstate(), torch.get_rng_state()
    seen, runs = list(_seen), (_runs, ClassCounter.runs)
    report = accelerate(model)
    assert report.replaced == {}
    assert list(report.left) == ["1"]
    assert report.left["1"]
    assert_untouched(before, state_of(model))
    assert (seen, runs) == (_seen, (_runs, ClassCounter.runs))
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), generator)


class Tuned(nn.Conv2d):
    """A convolution of another class that computes the same."""


class Subclassed(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = Tuned(8, 4, 1)


class Closure(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda z: F.gelu(z)

    def gate(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.squeeze(x)))).sigmoid()


class AveragePool(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, x.size()[2:])


class AveragePoolOfShape(SEBlock):
    def squeeze(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (x.shape[2], x.shape[3]))


class Addmm(SEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)

    def gate(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.addmm(self.fc1.bias, x.mean((2, 3)), self.fc1.weight.t()))
        return torch.addmm(self.fc2.bias, hidden, self.fc2.weight.t()).sigmoid()[:, :, None, None]


class AddmmOfHalf(Addmm):
    def gate(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.addmm(self.fc1.bias, x.mean((2, 3)), self.fc1.weight.t(), beta=0.5))
        return torch.addmm(self.fc2.bias, hidden, self.fc2.weight.t()).sigmoid()[:, :, None, None]


@pytest.mark.parametrize("make", [SEBlock, Subclassed, Closure, AveragePool, AveragePoolOfShape, Addmm])
def test_what_is_one_is_replaced_and_nothing_else_changes(make: Callable[[], nn.Module]) -> None:
    model = randomized(make())
    twin, before = copy.deepcopy(model), state_of(model)
    generator = torch.get_rng_state()
    assert accelerate(model).replaced == {"": "se"}
    after = state_of(model)
    assert [entry[0] for entry in after] == [entry[0] for entry in before]
    assert_untouched(before[1:], after[1:])
    assert torch.equal(torch.get_rng_state(), generator)
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    assert_same(model, twin, x)


def test_a_forward_of_an_instance_runs_nothing_of_the_users() -> None:
    block = BasicBlock(8, 8, attn_layer=SEModule)
    forward = block.bn1.forward
    block.bn1.forward = lambda x: 2 * forward(x)
    before = state_of(block.bn1)
    assert accelerate(block).replaced == {"se": "se"}
    assert_untouched(before, state_of(block.bn1))


@pytest.mark.parametrize("name", ["drop_path", "drop_block"])
def test_what_drops_nothing_now_may_drop_later(name: str) -> None:
    block = randomized(BasicBlock(8, 8, attn_layer=SEModule))
    setattr(block, name, DropPath(0.0))
    twin = copy.deepcopy(block)
    assert "se" in accelerate(block).replaced
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    assert_same(block, twin, x)
    for module in (block, twin):
        getattr(module, name).drop_prob = 0.9
    assert_same(block, twin, x)
    getattr(block, name).drop_prob = 0.0
    torch.manual_seed(0)
    want = block.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), want)


def change_act(module: nn.Module) -> None:
    module.get_submodule("3").act = nn.Tanh()


def add_hook(module: nn.Module) -> None:
    module.get_submodule("3.fc1").register_forward_hook(lambda _m, _a, y: 2 * y)


def add_pre_hook(module: nn.Module) -> None:
    module.get_submodule("1").register_forward_pre_hook(lambda _m, args: (args[0] + 1,))


def prune_weight(module: nn.Module) -> None:
    prune.l1_unstructured(module.get_submodule("3.fc1"), "weight", 0.5)


@pytest.mark.parametrize("change", [change_act, add_hook, add_pre_hook, prune_weight])
def test_what_is_changed_later_takes_effect(change: Callable[[nn.Module], None]) -> None:
    model = randomized(tail(SEModule(8, rd_channels=4), nn.ReLU()))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert accelerate(model).replaced == {"3": "bn_act_se"}
    for module in (model, twin):
        change(module)
    assert_same(model, twin, x)


class Mlp(nn.Module):
    """Two weights of transposed shapes, and no SE block."""

    def __init__(self, down: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, down), nn.Linear(down, 8)
        self.runs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(x)
        return self.fc2(F.gelu(self.fc1(x)))


@pytest.mark.parametrize("module", [Mlp(), nn.TransformerEncoderLayer(8, 1, 16), nn.MultiheadAttention(8, 2)])
def test_layers_of_transformers_are_no_se_blocks(module: nn.Module) -> None:
    before = state_of(module)
    report = accelerate(nn.Sequential(module))
    assert (report.replaced, report.left) == ({}, {})
    assert_untouched(before, state_of(module))


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.half(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.to("meta"),
        lambda model: model.requires_grad_(False),
        lambda model: model.eval(),
    ],
    ids=["half", "channels_last", "meta", "frozen", "eval"],
)
def test_any_device_type_layout_and_mode(prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = prepare(BasicBlock(8, 8, attn_layer=SEModule))
    kinds = [(t.dtype, t.device, t.stride(), t.requires_grad) for t in model.state_dict(keep_vars=True).values()]
    assert accelerate(model).replaced == {"se": "bn_se+add+relu"}
    found = [(t.dtype, t.device, t.stride(), t.requires_grad) for t in model.state_dict(keep_vars=True).values()]
    assert found == kinds


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_any_mode_of_the_caller(where: Callable[[], Any]) -> None:
    model = BasicBlock(8, 8, attn_layer=SEModule)
    with where():
        assert accelerate(model).replaced == {"se": "bn_se+add+relu"}


def test_hooks_on_all_modules_see_no_copies() -> None:
    calls: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        model = SEModule(8)
        assert accelerate(model).replaced == {"": "se"}
        assert calls == []
        model(torch.randn(1, 8, 3, 3))
        assert "Conv2d" in calls
    finally:
        hook.remove()


def test_modes_of_the_caller_see_nothing() -> None:
    with FlopCounterMode(display=False) as counter:
        assert accelerate(SEModule(8)).replaced == {"": "se"}
    assert counter.get_total_flops() == 0
    with FakeTensorMode():
        assert accelerate(SEModule(8)).replaced == {"": "se"}


def test_shared_modules_and_tied_weights() -> None:
    se = SEModule(8, rd_channels=4)
    blocks = [BasicBlock(8, 8, attn_layer=lambda *_, **__: se) for _ in range(2)]
    blocks[1].conv1.weight = blocks[0].conv1.weight
    model = randomized(nn.Sequential(*blocks))
    twin = copy.deepcopy(model)
    assert set(accelerate(model).replaced) == {"0.se"}
    assert blocks[0].se is blocks[1].se
    assert_same(model, twin, torch.randn(2, 8, 5, 5, dtype=torch.float64))


def test_compiled_children() -> None:
    torch._dynamo.reset()
    block = randomized(BasicBlock(8, 8, attn_layer=SEModule))
    twin = copy.deepcopy(block)
    block.conv1 = torch.compile(block.conv1, backend="eager")
    block.get_submodule("se.fc1").compile(backend="eager")
    report = accelerate(block)
    assert report.replaced == {}
    assert "compiled" in report.left["se"]
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), twin(x))


def test_arguments_of_products_are_read() -> None:
    assert accelerate(AddmmOfHalf()).left == {"": "addmm between squeeze and gate"}

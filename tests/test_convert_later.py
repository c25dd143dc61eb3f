"""What is done to a network after accelerate takes effect; and what could change between two calls is left alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_step import assert_same, randomized
from torch import Tensor, nn

from setriton.convert import accelerate
from setriton.convert_fused import Fused

pytestmark = pytest.mark.usefixtures("one_thread")


class SEBlock(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, hidden, 1), nn.Conv2d(hidden, 8, 1)

    def gate(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.GELU(), nn.Conv2d(4, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x).sigmoid()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.GELU(), nn.Conv2d(4, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        e = x.mean((2, 3), keepdim=True)
        for step in self.steps:
            e = step(e)
        return x * e.sigmoid()


class Extensible(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y * getattr(self, "extra", 1.0) if hasattr(self, "extra") else y


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), SEBlock())


def patch(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


ADDITIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "append": (model, lambda m: m.append(nn.Tanh().double())),
    "insert": (model, lambda m: m.insert(2, nn.Tanh())),
    "append to layers": (Sequence, lambda m: m.fc.append(nn.Tanh())),
    "append to a list": (Listed, lambda m: m.steps.append(nn.Tanh())),
    "method": (SEBlock, patch("gate", lambda x: 2.0)),
    "attribute": (Extensible, patch("extra", 3.0)),
    "parameter": (Extensible, lambda m: m.register_parameter("extra", nn.Parameter(torch.tensor(3.0).double()))),
    "buffer": (Extensible, lambda m: m.register_buffer("extra", torch.tensor(3.0).double())),
    "child": (Extensible, lambda m: setattr(m, "extra", _Number())),
    "tie": (lambda: SEBlock(8), lambda m: setattr(m.fc2, "weight", m.fc1.weight)),
}


class _Number(nn.Module):
    def __rmul__(self, y: Tensor) -> Tensor:
        return 3 * y


@pytest.mark.parametrize("name", ADDITIONS)
def test_what_is_added_takes_effect(name: str) -> None:
    make, change = ADDITIONS[name]
    module = randomized(make())
    twin, x = copy.deepcopy(module), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    assert accelerate(module).replaced
    assert_same(module, twin, x)
    before = module(x)
    change(module)
    change(twin)
    assert_same(module, twin, x)
    assert not torch.allclose(module(x), before)


@pytest.mark.parametrize("name", ["append", "attribute", "parameter", "buffer"])
def test_what_is_added_takes_effect_when_compiled(name: str) -> None:
    make, change = ADDITIONS[name]
    module, x = randomized(make()), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    twin = copy.deepcopy(module)
    accelerate(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    change(module)
    change(twin)
    torch.testing.assert_close(compiled(x), twin(x))


@pytest.mark.parametrize("name", ["gate", "forward"])
def test_a_class_that_is_changed_takes_effect(name: str) -> None:
    class Changed(SEBlock):
        def gate(self, x: Tensor) -> Tensor:
            return super().gate(x)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    module, x = randomized(Changed()), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    assert accelerate(module).replaced
    setattr(Changed, name, lambda self, x: 2.0 * x)
    torch.testing.assert_close(module(x), 2 * x * x if name == "gate" else 2 * x)


def test_what_calls_a_module_otherwise_is_no_addition() -> None:
    module, x = randomized(model()), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    accelerate(module)
    calls: list[str] = []
    module.compile(backend=lambda graph, _: calls.append(str(graph.graph)) or graph)  # type: ignore[func-returns-value]
    module(x)
    assert calls[0].count("torch.conv2d]") == 1  # those of SE are read


def test_tied_weights_are_left() -> None:
    """They may be untied, by load_state_dict(assign=True) say."""
    module = SEBlock(8)
    module.fc2.weight = module.fc1.weight
    assert accelerate(module).left == {"": "fc1.weight and fc2.weight are one tensor"}


class Autocast(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if torch.is_autocast_enabled("cpu") else 1)


class Compiling(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if torch.compiler.is_compiling() else 1)


class Deterministic(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if torch.are_deterministic_algorithms_enabled() else 1)


class DefaultType(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if torch.get_default_dtype() is torch.float64 else 1)


class Backends(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if torch.backends.cudnn.benchmark else 1)


class Frozen(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        e = self.gate(x)
        return x * (e if all(p.requires_grad for p in self.parameters()) else e.detach())


class Half(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if {p.dtype for p in self.parameters()} == {torch.float16} else 1)


class Counted(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) * (2 if len([*self.children()]) > 2 else 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Autocast, "calls torch.is_autocast_enabled, whose answer may change"),
        (Compiling, "asks torch.compiler"),
        (Deterministic, "calls torch.are_deterministic_algorithms_enabled, whose answer may change"),
        (DefaultType, "calls torch.get_default_dtype, whose answer may change"),
        (Backends, "asks torch.backends"),
        (Frozen, "asks for all its parameters"),
        (Half, "asks for all its parameters"),
        (Counted, "asks for all its children"),
    ],
)
def test_what_asks_for_more_than_its_input_is_left(kind: type[nn.Module], reason: str) -> None:
    module = kind()
    assert accelerate(module).left == {"": f"it {reason}"}
    assert not isinstance(module, Fused)

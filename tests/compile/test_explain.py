"""setriton.explain: whatever a module holds and however often, and nothing is left behind."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import rewriting
from residual import C, Network, Residual, image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import setriton
from setriton.compile.shadow import unwrapped

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
    pytest.mark.usefixtures("one_thread"),
]


class Around(nn.Module):
    """A network, and what a subclass does around it."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or Network().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]


class PlainTensor(Around):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(C, 1, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Nested(Around):
    """Tensors and parameters in lists and dicts, and a tensor that autograd made."""

    def __init__(self) -> None:
        super().__init__()
        ones = torch.ones(C, 1, 1, dtype=torch.float64)
        self.scales: list[Any] = [ones, {"shift": (nn.Parameter(ones), [ones])}]
        self.scales.append(nn.Parameter(ones) * 2)

    def forward(self, x: Tensor) -> Tensor:
        shift, (more,) = self.scales[1]["shift"]
        return super().forward(x * self.scales[0] * self.scales[2] + shift + more)


class Keeps(Around):
    """Writes to itself what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.calls = self.calls + 1
        self.history.append(y.mean())
        self.last = y
        return y


class Asks(Around):
    """Breaks the graph to ask for values."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.sum().item() > 0 and y.amax() > 0:
            y = y * float(y.detach().mean())
        return super().forward(y)


class Breaks(Around):
    """Breaks the graph between two calls."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(y)


class Selects(Around):
    """Has a shape that depends on values, between two calls."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        rows = y.mean((1, 2, 3)).gt(0).nonzero().flatten()
        return super().forward(y[rows])


def pruned() -> nn.Module:
    network = Network()
    prune.l1_unstructured(network.blocks[0].fc1, "weight", 0.3)
    prune.random_structured(network.blocks[1].fc2, "weight", 0.5, dim=0)
    prune.random_unstructured(network.blocks[2].conv, "weight", 0.5)
    network(image().float())
    return network


def weight_normed() -> nn.Module:
    network = Network()
    for block in network.blocks:
        nn.utils.weight_norm(block.get_submodule("fc1"))
        parametrizations.weight_norm(block.fc2)
        parametrizations.spectral_norm(block.conv)
    return network


def compiled_inside() -> nn.Module:
    network = Network()
    network.blocks[1] = torch.compile(network.blocks[1], backend="eager")
    network.blocks[2].compile(backend="eager")
    return network


def compiled_forward() -> nn.Module:
    network = Network()
    network.forward = torch.compile(network.forward, backend="eager")  # type: ignore[method-assign]
    return network


def of_closure(network: nn.Module) -> nn.Module:
    """A module that does not know the network it calls."""

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x)  # type: ignore[no-any-return]

    calls = Calls()
    calls.state_dict = network.state_dict  # type: ignore[method-assign]
    return calls


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pruned": (pruned, 3),
    "weight-normed": (weight_normed, 3),
    "plain tensor": (PlainTensor, 3),
    "nested tensors": (Nested, 3),
    "writes to itself": (Keeps, 3),
    "asks for values": (Asks, 6),
    "graph break": (Breaks, 6),
    "compiled": (lambda: torch.compile(Network()), 3),  # type: ignore[dict-item, return-value]
    "compiled, other backend": (lambda: torch.compile(Network(), backend="eager"), 3),  # type: ignore[dict-item, return-value]
    "compiled inside": (compiled_inside, 3),
    "lambda": (lambda: with_attribute(lambda x: x), 3),
    "generator": (lambda: with_attribute(torch.Generator()), 3),
    "lock": (lambda: with_attribute(threading.Lock()), 3),
    "compiled twice": (lambda: torch.compile(torch.compile(Network())), 3),  # type: ignore[dict-item, return-value]
    "compiled forward": (compiled_forward, 3),
    "function of another module": (lambda: of_closure(Network()), 3),
    "in DataParallel": (lambda: nn.DataParallel(Network()), 3),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(Network()), 3),
    "frozen": (lambda: Network().requires_grad_(False), 3),
    "meta device": (lambda: Network().to("meta"), 3),
}


def with_attribute(value: Any) -> nn.Module:
    module = Around()
    module.value = value
    return module


@pytest.mark.filterwarnings("ignore:.*skipping.*")
@pytest.mark.parametrize(("make", "blocks"), MODELS.values(), ids=MODELS.keys())
def test_any_module(make: Callable[[], nn.Module], blocks: int) -> None:
    model = make()
    module = unwrapped(model)
    x = image().to(next(tensor for tensor in module.state_dict().values() if tensor.dim() == 4))
    before, names = [t.clone() for t in module.state_dict().values()], set(vars(module))
    state = torch.get_rng_state()
    for _ in range(2):
        explanation = setriton.explain(model, x)
        assert len(explanation.replaced) == blocks
        assert explanation.ended is None
    assert torch.equal(state, torch.get_rng_state())
    assert names == set(vars(module))
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True) if not a.is_meta)
    assert not any("Fake" in type(value).__name__ for value in vars(module).values())
    assert not getattr(module, "history", None)


def test_shapes_that_depend_on_values() -> None:
    explanation = setriton.explain(Selects(), image())
    assert len(explanation) == 3
    assert "nonzero" in str(explanation.ended)
    assert str(explanation).endswith(str(explanation.ended))


def test_inputs_of_any_structure() -> None:
    class Takes(Around):
        def forward(  # type: ignore[override]
            self, xs: dict[str, list[Tensor]], *, n: int, mask: Tensor | None = None
        ) -> Tensor:
            y = sum(super(Takes, self).forward(x) for x in xs["maps"][:n])
            return y if mask is None else y * mask  # type: ignore[return-value, operator]

    x = image()
    model = Takes()
    assert len(setriton.explain(model, {"maps": [x, x]}, n=2).replaced) == 6
    assert len(setriton.explain(model, {"maps": [x, x.mT]}, n=1, mask=x > 0).replaced) == 3


def test_often_and_a_compilation_afterwards() -> None:
    """Not even the ninth call exhausts what Dynamo compiles anew."""
    torch._dynamo.reset()
    model = Breaks(Residual().double())
    network = Residual().double()
    compiled = torch.compile(network, backend=rewriting)
    compiled(image(2))
    for n in range(1, 12):
        explanation = setriton.explain(model, image(n))
        assert [match.shape[0] for match in explanation.replaced] == [n] * 2
        setriton.explain(torch.compile(network, backend=rewriting), image(n))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(image(2))  # what was compiled before still serves
    setriton.reset_compile_report()
    torch.compile(Breaks(Residual().double()), backend=rewriting)(image(5, 3))
    shapes = {match.shape for match in setriton.compile_report().replaced}
    assert len(setriton.compile_report().replaced) == 2
    assert all(shape[1] == C for shape in shapes)


def test_a_new_size_after_explaining_another() -> None:
    torch._dynamo.reset()
    model = Network().float()
    setriton.explain(model, image(2).float())
    setriton.reset_compile_report()
    torch.compile(model, backend=rewriting)(image(3).float())
    assert [match.shape for match in setriton.compile_report()] == [(3, C, 4, 4)] * 3


def test_after_the_recompile_limit() -> None:
    """A class that was compiled too often is explained all the same."""
    torch._dynamo.reset()
    model = Network().float()
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (1, 2, 3):
            torch.compile(model, backend=lambda module, inputs: module.forward, dynamic=False)(image(n).float())
    assert len(setriton.explain(model, image().float()).replaced) == 3


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got function"):
        setriton.explain(image, image())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model cannot be copied.*generator"):
        setriton.explain(with_attribute(n for n in range(3)), image())
    with pytest.raises(TypeError, match="parameters without a shape; call it once"):
        setriton.explain(nn.Sequential(nn.LazyConv2d(C, 1), Network()), image())
    with pytest.raises(Exception, match=r"channels|expected input"):
        setriton.explain(Network(), torch.zeros(2, C + 1, 4, 4))

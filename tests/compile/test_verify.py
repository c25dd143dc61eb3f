"""Blocks run beside their replacements: errors told, planted faults found, nothing of the user's touched."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import compare
from residual import Network, image
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

import setriton
from setriton.compile import rewrite
from setriton.compile.block import Block
from setriton.compile.report import CompileReport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETRITON_VERIFY", "1")


@pytest.mark.usefixtures("_verifying")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_errors_are_told(training: bool, dynamic: bool) -> None:
    report = compare(Network().train(training), image(), dynamic=dynamic)
    assert len(report.replaced) == 3
    assert all(match.error is not None and match.error < 1e-12 for match in report)
    assert "error " in str(report)


def test_explain_verifies_when_asked() -> None:
    network, x = Network().to(torch.bfloat16), image().to(torch.bfloat16).requires_grad_()
    before, state = {name: tensor.clone() for name, tensor in network.state_dict().items()}, torch.get_rng_state()
    explanation = setriton.explain(network, x, verify=True)
    assert [match.error is not None and match.error < 1e-12 for match in explanation.replaced] == [True] * 3
    assert all(match.error is None for match in setriton.explain(network, x))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert x.grad is None
    assert all(p.grad is None for p in network.parameters())


class Counts(TorchDispatchMode):
    """A mode as profilers have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is the caller's business")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, FakeTensorMode, Counts])
def test_explain_verifies_under_any_mode_of_the_caller(mode: Callable[[], Any]) -> None:
    network, x = Network().double(), image()
    with mode():
        explanation = setriton.explain(network, x, verify=True)
    assert [match.error is not None and match.error < 1e-12 for match in explanation.replaced] == [True] * 3


@pytest.mark.usefixtures("_verifying")
def test_random_numbers_and_buffers_of_a_compilation() -> None:
    """A compiled step draws the numbers, and moves the statistics, that it does without verification."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.network(x), 0.5, self.training)

    report = compare(Drops(), image())
    assert len(report.replaced) == 3


def _another_act(block: Block) -> Block:
    assert block.excitation is not None
    return dataclasses.replace(block, excitation=dataclasses.replace(block.excitation, act="silu"))


def _another_momentum(block: Block) -> Block:
    assert block.bn is not None
    return dataclasses.replace(block, bn=dataclasses.replace(block.bn, momentum=0.2))


FAULTS: dict[str, Callable[[Block], Block]] = {
    "another activation": _another_act,
    "statistics": _another_momentum,
    "no residual": lambda block: dataclasses.replace(block, residual=None),
    "no ReLU": lambda block: dataclasses.replace(block, out_act="identity"),
}


@pytest.mark.usefixtures("_verifying")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_wrong_replacements_are_left_out(fault: Callable[[Block], Block], monkeypatch: pytest.MonkeyPatch) -> None:
    right = rewrite._replace
    monkeypatch.setattr(rewrite, "_replace", lambda graph, block: right(graph, fault(block)))
    with pytest.warns(UserWarning, match="a block is left alone: its replacement differs"):
        report = compare(Network(), image())
    _all_left(report, "its replacement differs")
    assert all(match.error is not None and match.error > 1e-3 for match in report)


@pytest.mark.usefixtures("_verifying")
def test_wrong_gradients_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are right, and the gradient of a layer is missing."""
    right = rewrite._replace

    def replace(graph: Graph, block: Block) -> Node:
        assert block.excitation is not None
        weight = block.excitation.fc1.weight
        new = right(graph, block)
        with graph.inserting_before(new):
            new.replace_input_with(weight, graph.call_method("detach", (weight,)))
        return new

    monkeypatch.setattr(rewrite, "_replace", replace)
    with pytest.warns(UserWarning, match=r"differs in the gradient of .*fc1.*weight_: .* as written, none replaced"):
        _all_left(compare(Network(), image()), "the gradient of")


@pytest.mark.usefixtures("_verifying")
def test_what_cannot_be_run_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(graph: Graph, block: Block) -> Node:
        raise RuntimeError("no replacement today")

    monkeypatch.setattr(rewrite, "_replace", replace)
    with pytest.warns(UserWarning, match="cannot be verified: no replacement today"):
        report = compare(Network(), image())
    _all_left(report, "it cannot be verified: no replacement today")


def test_verification_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "verified", lambda *_: pytest.fail("verified"))
    assert len(compare(Network(), image()).replaced) == 3


def _all_left(report: CompileReport, reason: str) -> Any:
    assert report.replaced == []
    assert len(report.left) == 3
    assert all(reason in str(match.reason) for match in report)

"""Exporters and tracers: what they write runs elsewhere, gives the same numbers, and can be trained."""

import copy
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn

import setriton
from setriton import reference_tail
from setriton.functional import bn_squeeze_excite_forked

# Tracers and the TorchScript exporter announce their end.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    """A tail of each kind: with and without a residual, an activation in between, a forked result; and SE alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = setriton.BatchNormSqueezeExcite(8, 1 / 4, act="gelu", out_act="relu")
        self.act_tail = setriton.BatchNormSqueezeExcite(8, 1 / 4, bn_act="silu", gate="hardsigmoid", bias=False)
        self.se = setriton.SqueezeExcite(8, 1 / 4, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.act_tail(self.tail(x, x))
        bn, fc1, fc2 = self.tail.bn, self.se.fc1, self.se.fc2
        layers = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        y, y_skip = bn_squeeze_excite_forked(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, *layers, training=self.training, out_act="relu"
        )
        return self.se(y.sin() + y_skip).mean((2, 3))  # type: ignore[no-any-return]


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5 if "running_var" in name else -0.5, 1)
    return model


@pytest.fixture
def net() -> nn.Module:
    return randomized(Net())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """With fused tails in every block."""
    return randomized(setriton.create_model("se_resnet20", num_classes=5)).eval()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def to_onnx(model: nn.Module, path: Path, *, dynamo: bool) -> None:
    """For any batch, from an example of two images."""
    options: dict[str, Any] = {"dynamic_axes": {"x": {0: "n"}}}
    if dynamo:
        options = {"dynamic_shapes": {"x": {0: torch.export.Dim("n")}}, "verbose": False}
    torch.onnx.export(model, (images(2),), path, dynamo=dynamo, input_names=["x"], **options)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_onnx(net: nn.Module, network: nn.Module, dynamo: bool, tmp_path: Path) -> None:
    x = images()
    for model in (network, net.eval()):
        to_onnx(model, tmp_path / "model.onnx", dynamo=dynamo)
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["accelerated", "half"])
def test_onnx_of_other_models(model: str, tmp_path: Path) -> None:
    """A network that `accelerate` changed, and one of half-precision weights."""
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), setriton.SqueezeExcite(8, 1 / 4), nn.ReLU())
    changed, x = randomized(stock).eval(), images(2)
    if model == "accelerated":
        setriton.accelerate(changed)
    else:
        changed, x = changed.half(), x.half()
    torch.onnx.export(changed, (x,), tmp_path / "model.onnx", dynamo=False)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), changed(x), rtol=1e-2, atol=1e-3)


def test_a_trace_is_saved_and_loaded(network: nn.Module, tmp_path: Path) -> None:
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(network, (x[:2],)).save(tmp_path / "trace.pt")
    loaded = torch.jit.load(tmp_path / "trace.pt")
    for y in (x, torch.randn(3, 3, 12, 16)):
        torch.testing.assert_close(loaded(y), network(y))


def assert_trains_as(module: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Outputs, gradients of all parameters, and buffers of one step."""
    results = []
    for each in (module, twin):
        each.zero_grad()
        y = each(x)
        y.sin().sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters()}
        results.append({"y": y} | gradients | dict(each.named_buffers()))
    assert set(dict(twin.named_parameters())) < results[0].keys() <= results[1].keys()  # strict export drops counts
    for name, found in results[0].items():
        torch.testing.assert_close(found, results[1][name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)


def test_a_trace_in_training_mode_trains(net: nn.Module, tmp_path: Path) -> None:
    twin, x = copy.deepcopy(net.double()), images().double()
    traced = torch.jit.trace(copy.deepcopy(net), (x[:2],), check_trace=False)
    traced.load_state_dict(net.state_dict())  # the trace ran once, and moved the running statistics
    traced.save(tmp_path / "trace.pt")
    assert_trains_as(torch.jit.load(tmp_path / "trace.pt"), twin, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_train(net: nn.Module, strict: bool, training: bool, tmp_path: Path) -> None:
    net.double().train(training)
    twin, x = copy.deepcopy(net), images().double()
    shapes = {"x": {0: torch.export.Dim("n")}}
    program = torch.export.export(net, (x[:2],), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "net.pt2")
    assert_trains_as(torch.export.load(tmp_path / "net.pt2").module(), twin, x)


def test_an_exported_program_is_transformed(net: nn.Module) -> None:
    """Per-sample gradients of what was exported."""
    net.double().eval()
    x = images(3).double()
    exported = torch.export.export(net.tail, (x.new_ones(2, 8, 3, 3),)).module()
    maps = torch.randn(3, 2, 8, 3, 3, dtype=torch.float64)
    found, wanted = (torch.vmap(torch.func.grad(lambda t, f=f: f(t).sin().sum()))(maps) for f in (exported, net.tail))
    torch.testing.assert_close(found, wanted)


def test_what_needs_no_gradient_passes_no_autograd_function(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("an autograd Function was called")

    monkeypatch.setattr(reference_tail._Tail, "apply", fail)
    x, frozen = images(), copy.deepcopy(net).requires_grad_(False)
    for training in (True, False):
        frozen.train(training)(x)
        with torch.no_grad():
            net.train(training)(x)
    with pytest.raises(pytest.fail.Exception, match="was called"):
        net(x)

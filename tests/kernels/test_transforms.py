"""What differentiates or batches the functions where kernels run: right by PyTorch's operations, or refused by name."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from oracle import make_inputs, naive_squeeze_excite
from tail_oracle import TailInputs, make_tail_inputs, naive_tail
from torch import Tensor, nn

import setriton
from setriton import composite, ops, ops_tail
from setriton.functional import bn_squeeze_excite_forked

OPTIONS: dict[str, Any] = {"act": "gelu", "training": True, "out_act": "relu"}
# 11 channels and 15 pixels: neither fills the bytes and rows in which the kernels keep the bits of the ReLU.
SHAPE = (2, 11, 3, 3, 5)


def tail_inputs(device: torch.device) -> list[Tensor]:
    """Without the running statistics, which would be moved in each call, and the gradients."""
    inputs = make_tail_inputs(*SHAPE, torch.float32)
    return [t.to(device) for i, t in enumerate(inputs[:10]) if t is not None and i not in (3, 4)]


def ours(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    *layers, residual = rest
    return setriton.bn_squeeze_excite(x, weight, bias, None, None, *layers, residual=residual, **OPTIONS)


def forked(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    *layers, residual = rest
    y, y_skip = bn_squeeze_excite_forked(x, weight, bias, None, None, *layers, residual=residual, **OPTIONS)
    return y.sin() + y_skip


def naive(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    *layers, residual = rest
    return naive_tail(x, weight, bias, None, None, *layers, residual=residual, **OPTIONS)


def assert_equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, check_dtype=False)


def second_derivative(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves))  # type: ignore[arg-type]


@pytest.mark.parametrize("fork", [False, True])
def test_second_derivatives_of_the_tail(device: torch.device, fork: bool) -> None:
    tensors = tail_inputs(device)
    wanted = second_derivative(
        (lambda *t: naive(*t).sin() + naive(*t)) if fork else naive, [t.double() for t in tensors]
    )
    assert_equal(second_derivative(forked if fork else ours, tensors), wanted)


def test_second_derivatives_of_se(device: torch.device) -> None:
    tensors = [t.to(device) for t in make_inputs(*SHAPE, torch.float32, channels_last=True)[:5] if t is not None]
    wanted = second_derivative(lambda *t: naive_squeeze_excite(*t, "gelu", "sigmoid"), [t.double() for t in tensors])
    assert_equal(second_derivative(lambda *t: setriton.squeeze_excite(*t, act="gelu"), tensors), wanted)


def test_second_derivatives_of_what_dynamo_traced(device: torch.device) -> None:
    """Dynamo's graph, run as it is, drops none; AOTAutograd refuses."""
    torch._dynamo.reset()
    tensors = tail_inputs(device)
    for function in (ours, forked):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert_equal(second_derivative(compiled, tensors), second_derivative(function, tensors))
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            second_derivative(torch.compile(function, backend="aot_eager", fullgraph=True), tensors)


class Forked(nn.Module):
    """A result with two uses; parameters are those of a tail."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(t.clone() for t in tensors[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        return forked(x, *self.tensors, x)


def test_an_exported_program_trains(device: torch.device) -> None:
    """Its op has both uses of the result behind it."""
    tensors = tail_inputs(device)
    module = Forked(tensors)
    program = torch.export.export(module, (tensors[0],))
    assert [str(n.target) for n in program.graph.nodes if "setriton" in str(n.target)] == [
        "setriton.bn_squeeze_excite.default"
    ]
    results = []
    for each in (program.module(), module):
        y = each(tensors[0])
        results.append([y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
    assert_equal(*results)


def test_traces_hold_no_ops_of_ours(device: torch.device, tmp_path: Path) -> None:
    tensors = tail_inputs(device)
    module, x = Forked(tensors), tensors[0]
    torch.jit.trace(module, (x,)).save(tmp_path / "trace.pt")
    loaded = torch.jit.load(tmp_path / "trace.pt")
    assert "setriton::" not in str(loaded.inlined_graph)
    assert_equal(loaded(x), module(x))
    torch.onnx.export(module, (x,), tmp_path / "model.onnx", dynamo=False)
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} == {""}


def test_transforms(device: torch.device) -> None:
    tensors = tail_inputs(device)
    results = []
    for function in (ours, naive):
        grad = torch.func.grad(lambda *t, f=function: f(*t).sin().sum(), tuple(range(len(tensors))))
        _, tangent = torch.func.jvp(function, tuple(tensors), tuple(tensors))
        with fwAD.dual_level():
            dual = fwAD.unpack_dual(function(*[fwAD.make_dual(t, t) for t in tensors]))
        stacked = [torch.stack((t, t.cos())) for t in tensors]
        results.append([grad(*tensors), tangent, dual.tangent, torch.vmap(function)(*stacked)])
    assert_equal(*results)


def test_networks_under_transforms(device: torch.device) -> None:
    """Gradients of each image, and an ensemble."""
    networks = [setriton.create_model("se_resnet20", num_classes=3, fused=f).to(device).eval() for f in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(2, 3, 8, 8, device=device)
    results = []
    for network in networks:
        parameters, buffers = torch.func.stack_module_state([network] * 2)

        def logits(parameters: Any, buffers: Any, images: Tensor, network: nn.Module = network) -> Tensor:
            return torch.func.functional_call(network, (parameters, buffers), images).sin()

        one = torch.func.grad(lambda p, b, image, f=logits: f(p, b, image[None]).sum())
        own = dict(network.named_parameters()), dict(network.named_buffers())
        of_images = torch.vmap(one, (None, None, 0))(*own, x)
        results.append([torch.vmap(logits, (0, 0, None))(parameters, buffers, x), *of_images.values()])
    assert_equal(*results)


def test_a_batch_of_gradients(device: torch.device) -> None:
    """A backward pass under vmap and one in forward mode, of a forward pass that kernels ran."""
    leaves = [t.requires_grad_() for t in tail_inputs(device)]
    dy = torch.randn(3, *leaves[0].shape, device=device)
    results = []
    for function in (ours, naive):
        y = function(*leaves)
        batch = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
        with fwAD.dual_level():
            one = torch.autograd.grad(y, leaves, fwAD.make_dual(dy[0], dy[1]))
            results.append([batch, one, [fwAD.unpack_dual(g).tangent for g in one]])
    assert_equal(*results)


def test_a_fallback_is_reported_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composite, "_reported", set())
    tensors = tail_inputs(device)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.func.jvp(ours, tuple(tensors), tuple(tensors))
            second_derivative(ours, tensors)
    messages = [str(w.message) for w in found if "setriton" in str(w.message)]
    assert messages == [
        f"setriton: {reason} is given PyTorch's own operations instead of Triton kernels"
        for reason in ("a torch.func transform", "a second derivative")
    ]


def op_calls(device: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each op as an exported program calls it, as a function of its first argument."""
    x, w1, b1, w2, b2, dy = (t.to(device) for t in make_inputs(*SHAPE, torch.float32, channels_last=True))  # type: ignore[union-attr]
    _, *saved = ops.squeeze_excite(x, w1, b1, w2, b2, "relu", "sigmoid")
    inputs = TailInputs(*(None if t is None else t.to(device) for t in make_tail_inputs(*SHAPE, torch.float32)))  # type: ignore[arg-type]
    tail = (*inputs[1:10], True, 0.1, 1e-5, "identity", "relu", "sigmoid", "relu", "", True)
    _, bits, mean, var, *kept, _, _ = ops_tail._forward(inputs.x, *tail)
    of_tail = (None, inputs.x, bits, inputs.bn_weight, inputs.bn_bias, mean, var, inputs.w1, inputs.w2, *kept)
    options = (True, True, 1e-5, "identity", "relu", "sigmoid", "")
    return {
        "squeeze_excite": (lambda x: ops.squeeze_excite(x, w1, b1, w2, b2, "relu", "sigmoid")[0], x),
        "squeeze_excite_backward": (
            lambda dy: ops.squeeze_excite_backward(dy, x, w1, w2, *saved, "relu", "sigmoid")[0], dy,
        ),
        "bn_squeeze_excite": (lambda x: ops_tail._forward(x, *tail)[0], inputs.x),
        "bn_squeeze_excite_backward": (lambda dy: ops_tail._backward(dy, *of_tail, *options)[0], inputs.dy),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["squeeze_excite", "squeeze_excite_backward", "bn_squeeze_excite", "bn_squeeze_excite_backward"]
)
def test_ops_refuse_by_name(device: torch.device, name: str) -> None:
    function, x = op_calls(device)[name]
    no_forward_mode = pytest.raises(NotImplementedError, match=f"setriton::{name} has no forward-mode derivative")
    with no_forward_mode:
        torch.func.jvp(function, (x,), (x,))
    with fwAD.dual_level():
        with no_forward_mode:
            function(fwAD.make_dual(x, x))
        with no_forward_mode:
            function(fwAD.make_dual(x.clone().requires_grad_(), x))
        assert fwAD.unpack_dual(function(x)).tangent is None
    with pytest.raises(NotImplementedError, match=f"setriton::{name} is not differentiated by torch.func"):
        torch.func.grad(lambda x: function(x).sum())(x)
    assert_equal(torch.vmap(function)(torch.stack((x, x.cos()))), torch.stack((function(x), function(x.cos()))))

"""Second derivatives, and what autograd is asked to keep in other ways: as SE that users write gives, in float64."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from oracle import ACTS, GATES
from tail_oracle import BN_ACTS
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transforms import PAIRS, Function, assert_equal, gradient_penalty, random, se_pair, tail_pair

import setriton
from setriton.functional import bn_squeeze_excite_forked


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_batch_of_gradients(pair: str, create_graph: bool) -> None:
    """A backward pass under vmap, of a forward pass that was not."""
    tensors, *functions = PAIRS[pair]()
    leaves = [t.requires_grad_() for t in tensors]
    dy = random(3, *tensors[0].shape)
    found, wanted = (
        torch.autograd.grad(f(*leaves), leaves, dy, is_grads_batched=True, create_graph=create_graph) for f in functions
    )
    assert_equal(found, wanted)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_forward_derivative_of_a_backward_pass(pair: str) -> None:
    tensors, *functions = PAIRS[pair]()
    leaves = [t.requires_grad_() for t in tensors]
    results = []
    for function, create_graph in zip(functions, (False, True), strict=True):  # aten's silu needs the graph for it
        y = function(*leaves)
        with fwAD.dual_level():
            dy = fwAD.make_dual(y.detach(), y.detach().cos())
            gradients = torch.autograd.grad(y, leaves, dy, create_graph=create_graph)
            results.append([fwAD.unpack_dual(g).tangent for g in gradients])
    assert_equal(*results)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
def test_second_derivatives_of_the_excitation(act: str, gate: str) -> None:
    for tensors, function, _ in (se_pair(act, gate), tail_pair(act=act, gate=gate)):
        leaves = [t.requires_grad_() for t in tensors]
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out_act", ["identity", "relu"])
@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_second_derivatives_of_the_tail(bn_act: str, out_act: str, training: bool, residual: bool) -> None:
    tensors, *functions = tail_pair(training, residual, 3, bn_act=bn_act, out_act=out_act)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(functions[0], leaves, fast_mode=True)
    assert_equal(*(gradient_penalty(f, leaves) for f in functions))


def test_second_derivatives_of_forked_outputs() -> None:
    tensors, _, naive = tail_pair(out_act="relu")
    x, weight, bias, w1, b1, w2, b2, residual = leaves = [t.requires_grad_() for t in tensors]

    def forked(*_: Tensor) -> Tensor:
        y, y_skip = bn_squeeze_excite_forked(
            x, weight, bias, None, None, w1, b1, w2, b2, residual=residual, training=True, act="gelu", out_act="relu"
        )
        return y.sin() * y_skip

    assert_equal(gradient_penalty(forked, leaves), gradient_penalty(lambda *t: naive(*t).sin() * naive(*t), leaves))


def test_weights_that_are_computed_from_the_map() -> None:
    """The gradient of a weight must not flow on into the map's."""
    tensors, *functions = tail_pair(n=3)
    x = tensors[0].requires_grad_()

    def of(function: Function) -> list[Tensor | None]:
        w1 = tensors[3] * x.square().mean()
        leaves = [x, *tensors[1:3], w1, *tensors[4:]]
        return gradient_penalty(lambda *t: function(*leaves), [x])

    assert_equal(*map(of, functions))


def test_compiled_second_derivatives() -> None:
    """Right where Dynamo's graph runs as it is; AOTAutograd refuses, it never drops them."""
    torch._dynamo.reset()
    tensors, ours, naive = tail_pair(out_act="relu")
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_equal(gradient_penalty(compiled, leaves), gradient_penalty(naive, leaves))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient_penalty(torch.compile(ours, backend="aot_eager", fullgraph=True), leaves)


class Stock(nn.Module):
    """The tail of PyTorch's operations."""

    def __init__(self, tail: Any) -> None:
        super().__init__()
        self.bn, self.se = tail.bn, nn.Module()
        self.se.fc1, self.se.fc2 = tail.se.fc1, tail.se.fc2

    @classmethod
    def pair(cls) -> "tuple[nn.Module, Stock]":
        torch.manual_seed(0)
        tail = setriton.BatchNormSqueezeExcite(4, 1 / 2, act="gelu", out_act="relu")
        for parameter in tail.parameters():
            nn.init.uniform_(parameter, -1, 1)
        return tail, cls(copy.deepcopy(tail))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        u, fc1, fc2 = self.bn(x), self.se.fc1, self.se.fc2
        e = torch.sigmoid(fc2(F.gelu(fc1(u.mean((2, 3), keepdim=True)))))  # type: ignore[operator]
        return torch.relu(u * e + residual)


@pytest.fixture
def tails() -> list[nn.Module]:
    """A tail with a residual, and the same of PyTorch's operations; in training mode."""
    return [module.double() for module in Stock.pair()]


def numpy_hooks() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy)


CALLS: dict[str, Callable[..., Any]] = {
    "reentrant checkpoint": lambda m, *t: checkpoint(m, *t, use_reentrant=True),
    "checkpoint": lambda m, *t: checkpoint(m, *t, use_reentrant=False),
    "saved on the CPU": lambda m, *t: within(torch.autograd.graph.save_on_cpu(), m, *t),
    "saved elsewhere": lambda m, *t: within(numpy_hooks(), m, *t),
    "anomaly detection": lambda m, *t: within(torch.autograd.detect_anomaly(), m, *t),
    "pickled": lambda m, *t: pickle.loads(pickle.dumps(m)).requires_grad_(False)(*t) + 0 * m(*t),
    "partitioned": lambda m, *t: torch.compile(m, backend="aot_eager_decomp_partition", fullgraph=True)(*t),
}


def within(context: Any, module: nn.Module, *tensors: Tensor) -> Tensor:
    with context:
        return module(*tensors)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", CALLS)
def test_what_autograd_keeps(tails: list[nn.Module], call: str) -> None:
    """Kept as a copy, on another device, as nothing but the inputs: the gradients are the same."""
    torch._dynamo.reset()
    x, residual = random(3, 4, 2, 3), random(3, 4, 2, 3)
    results = []
    for module in tails:
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = CALLS[call](module, *leaves)
        y.sin().sum().backward()
        results.append([y, *(t.grad for t in [*leaves, *module.parameters()])])
    assert_equal(*results)


@pytest.mark.parametrize("function", ["hessian", "hvp", "vhp", "jacobian", "jvp"])
def test_autograd_functional(tails: list[nn.Module], function: str) -> None:
    x, residual = random(2, 4, 1, 2), random(2, 4, 1, 2)
    results = []
    for module in tails:
        call: Any = getattr(torch.autograd.functional, function)
        vectors = (x.cos(),) if function in ("hvp", "vhp", "jvp") else ()
        results.append(call(lambda t, m=module: m(t, residual).sin().sum(), x, *vectors))
    assert_equal(*results)


def test_double_backward_under_autocast(tails: list[nn.Module]) -> None:
    """The first backward pass, which is within it here, is computed in float32 too."""
    x, residual = torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2, 3)
    leaves = [x.requires_grad_(), *tails[0].float().parameters()]
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = tails[0](x, residual)
            (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_training_after_inference_mode(tails: list[nn.Module]) -> None:
    x = random(3, 4, 2, 3)
    results = []
    for module in tails:
        with torch.inference_mode():
            module(x, x)
            module.eval()(x, x)
        y = module.train()(x, x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(module.parameters())), *module.buffers()])
    assert_equal(*results)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_have_no_gradient(training: bool) -> None:
    """F.batch_norm refuses them too."""
    tail = setriton.BatchNormSqueezeExcite(4, 1 / 2).train(training)
    x = torch.randn(2, 4, 3, 3)
    for name in ("running_mean", "running_var"):
        buffers = {f"bn.{name}": torch.ones(4, requires_grad=True) * 1}
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            functional_call(tail, buffers, x)
        with torch.no_grad():
            functional_call(tail, buffers, x)


def test_nan_lets_gradients_through(tails: list[nn.Module]) -> None:
    """As torch.relu does: a NaN is not at or below 0."""
    results = []
    for module in tails:
        x, residual = torch.ones(2, 4, 2, 3, dtype=torch.float64), torch.ones(2, 4, 2, 3, dtype=torch.float64)
        residual[0, 1, 0, 2] = float("nan")
        y = module.eval()(x, residual.requires_grad_())
        for create_graph in (True, False):
            results.append(torch.autograd.grad(y.sum(), residual, create_graph=create_graph)[0])
    assert results[0][0, 1, 0, 2] == 1
    assert_equal(results[:2], results[2:])

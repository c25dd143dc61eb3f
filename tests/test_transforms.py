"""Second derivatives, forward mode and torch.func: what they give for SE as users write it, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from oracle import ACTS, GATES, make_inputs, naive_squeeze_excite
from tail_oracle import BN_ACTS, make_tail_inputs, naive_tail
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import setriton
from setriton import composite
from setriton.functional import bn_squeeze_excite_forked

Function = Callable[..., Any]
# Of x, BN's weight, fc1's weight and the residual: one of each kind.
WANTED = (0, 1, 5, 9)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def se_pair(act: str = "gelu", gate: str = "sigmoid") -> tuple[list[Tensor], Function, Function]:
    """Arguments, setriton's function and the one that users write, of SE alone."""
    tensors = [t for t in make_inputs(2, 3, 2, 2, 2, torch.float64, channels_last=True)[:5] if t is not None]
    return (
        tensors,
        lambda *t: setriton.squeeze_excite(*t, act=act, gate=gate),
        lambda *t: naive_squeeze_excite(*t, act, gate),
    )


def tail_pair(
    training: bool = True, residual: bool = True, n: int = 2, **options: Any
) -> tuple[list[Tensor], Function, Function]:
    """The same of the tail; arguments without the running statistics, which are copied for each call."""
    inputs = make_tail_inputs(n, 3, 2, 2, 2, torch.float64, residual=residual)
    mean, var = inputs.running_mean, inputs.running_var
    assert mean is not None
    assert var is not None
    options = {"act": "gelu", "training": training} | options

    def call(function: Function, tensors: tuple[Tensor, ...]) -> Any:
        x, weight, bias, w1, b1, w2, b2, *rest = tensors
        statistics = (None, None) if training else (mean, var)
        extra = {"residual": rest[0] if rest else None} | options
        return function(x, weight, bias, *statistics, w1, b1, w2, b2, **extra)

    tensors = [t for i, t in enumerate(inputs[:10]) if t is not None and i not in (3, 4)]
    return tensors, lambda *t: call(setriton.bn_squeeze_excite, t), lambda *t: call(naive_tail, t)


PAIRS: dict[str, Callable[[], tuple[list[Tensor], Function, Function]]] = {
    "se": se_pair,
    "training": tail_pair,
    "evaluation": lambda: tail_pair(training=False, out_act="relu"),
    "no residual": lambda: tail_pair(residual=False, bn_act="silu"),
    "relu": lambda: tail_pair(bn_act="hardswish", out_act="relu", gate="hardsigmoid"),
}


def forward_mode(function: Function) -> Function:
    def of(*tensors: Tensor) -> Any:
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, t.cos()) for t in tensors]
            return fwAD.unpack_dual(function(*duals)).tangent

    return of


def scalar(function: Function) -> Function:
    return lambda *t: function(*t).sin().sum()


def stacked(function: Function) -> Function:
    """vmap over all arguments."""
    return lambda *t: vmap(function)(*(torch.stack((v, v.cos(), 1 - v)) for v in t))


TRANSFORMS: dict[str, Callable[[Function, int], Function]] = {
    "grad": lambda f, n: grad(scalar(f), tuple(range(n))),
    "vjp": lambda f, n: lambda *t: vjp(f, *t)[1](t[0].cos()),
    "jvp": lambda f, n: lambda *t: jvp(f, t, tuple(v.cos() for v in t)),
    "forward_ad": lambda f, n: forward_mode(f),
    "jacrev": lambda f, n: jacrev(f, tuple(range(n))),
    "jacfwd": lambda f, n: jacfwd(f, tuple(range(n))),
    "hessian": lambda f, n: hessian(scalar(f), (0, n - 1)),
    "jacrev of jacfwd": lambda f, n: jacrev(jacfwd(scalar(f), n - 1), 0),
    "third derivative": lambda f, n: grad(scalar(grad(scalar(grad(scalar(f)))))),
    "vmap": lambda f, n: stacked(f),
    "vmap of the maps": lambda f, n: lambda x, *t: vmap(f, (0, *[None] * (n - 1)))(torch.stack((x, x.cos())), *t),
    "vmap of the weights": lambda f, n: lambda *t: vmap(f, (*[None] * (n - 1), 0))(*t[:-1], torch.stack((t[-1],) * 2)),
    "vmap of grad": lambda f, n: stacked(grad(scalar(f), tuple(range(n)))),
    "vmap of jvp": lambda f, n: stacked(lambda *t: jvp(f, t, t)),
}


def assert_equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("pair", PAIRS)
def test_transforms(pair: str, transform: str) -> None:
    tensors, ours, naive = PAIRS[pair]()
    found, wanted = (TRANSFORMS[transform](f, len(tensors))(*tensors) for f in (ours, naive))
    assert_equal(found, wanted)


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


def gradient_penalty(function: Function, leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the square of the gradient of x; None where it does not depend on a tensor."""
    y = function(*leaves)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    assert dx.requires_grad
    return list(torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype: torch.dtype) -> None:
    """Maps and statistics of different dtypes keep theirs, and statistics move as they do without a transform."""
    tensors = make_tail_inputs(3, 4, 2, 3, 3, dtype)
    parameters = list(tensors[1:10])
    statistics = [torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)]
    parameters[2:4] = statistics

    def function(x: Tensor) -> Tensor:
        *arguments, residual = parameters
        return setriton.bn_squeeze_excite(x, *arguments, residual=residual, training=True)  # type: ignore[arg-type]

    y, tangent = jvp(function, (tensors.x,), (tensors.x,))
    moved = [t.clone() for t in statistics]
    statistics[0].zero_()
    statistics[1].fill_(1)
    torch.testing.assert_close(y, function(tensors.x))
    assert tangent.dtype == y.dtype == dtype
    for found, wanted in zip(moved, statistics, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("batched", [True, False], ids=["batched statistics", "shared statistics"])
def test_running_statistics_under_vmap_are_batch_norms(batched: bool) -> None:
    """Each network of an ensemble moves its own; one that all share cannot be moved by each."""
    tail = setriton.BatchNormSqueezeExcite(3, rd_channels=2, dtype=torch.float64)
    twin = nn.Sequential(tail.bn, tail.se)
    x = random(4, 2, 3, 2, 2)
    if not batched:
        for module in (tail, twin):
            with pytest.raises(RuntimeError, match="running_mean or running_var"):
                vmap(module)(x)
        return
    results = []
    for module in (tail, twin):
        parameters, buffers = stack_module_state([module] * 4)
        y = vmap(lambda p, b, x, m=module: functional_call(m, (p, b), x))(parameters, buffers, x)
        results.append([y, *buffers.values()])
    assert_equal(*results)
    assert not torch.equal(results[0][1][0], results[0][1][1])


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """A small SE-ResNet, and the same from stock layers."""
    ours, stock = (setriton.create_model("se_resnet20", num_classes=3, fused=f).double() for f in (True, False))
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5 if "running_var" in name else -0.5, 1)
    stock.load_state_dict(ours.state_dict())
    return ours.eval(), stock.eval()


def test_per_sample_gradients_of_a_network(networks: tuple[nn.Module, nn.Module]) -> None:
    x, labels = random(3, 3, 8, 8), torch.tensor([0, 1, 2])

    def loss(network: nn.Module, parameters: Any, buffers: Any, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (parameters, buffers), image[None])
        return nn.functional.cross_entropy(logits, label[None])

    results = []
    for network in networks:
        parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
        one = grad(lambda *t, n=network: loss(n, *t))
        results.append(vmap(one, (None, None, 0, 0))(parameters, buffers, x, labels))
    assert_equal(*results)
    weights = list(networks[0].parameters())
    alone = torch.autograd.grad(nn.functional.cross_entropy(networks[0](x[1:2]), labels[1:2]), weights)
    assert_equal([g[1] for g in results[0].values()], list(alone))


def test_an_ensemble_of_networks(networks: tuple[nn.Module, nn.Module]) -> None:
    """In training mode: outputs, gradients of all parameters, and running statistics of each network."""
    x = random(2, 3, 8, 8)
    results = []
    for network in networks:
        parameters, buffers = stack_module_state([network.train()] * 2)
        parameters = {name: p.detach() for name, p in parameters.items()}
        buffers = {name: b.clone() for name, b in buffers.items()}

        def loss(parameters: Any, buffers: Any, x: Tensor, n: nn.Module = network) -> Tensor:
            return functional_call(n, (parameters, buffers), x).square().sum()

        gradients = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
        results.append([*gradients.values(), *buffers.values()])
        network.eval()
    assert_equal(*results)


def test_a_process_group_is_refused() -> None:
    tensors = make_tail_inputs(2, 3, 2, 2, 2, torch.float64)
    *arguments, residual, _, _ = tensors
    with pytest.raises(NotImplementedError, match=r"setriton.bn_squeeze_excite with statistics of a process_group"):
        composite.bn_squeeze_excite(
            *arguments, residual, True, 0.1, 1e-5, "identity", "relu", "sigmoid", "identity", "0"
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms(backend: str) -> None:
    torch._dynamo.reset()
    tensors, ours, naive = tail_pair(out_act="relu")
    for transform in ("grad", "vmap", "jvp"):
        compiled = torch.compile(TRANSFORMS[transform](ours, len(tensors)), backend=backend, fullgraph=True)
        assert_equal(compiled(*tensors), TRANSFORMS[transform](naive, len(tensors))(*tensors))


def test_compiled_second_derivatives() -> None:
    """Right where Dynamo's graph runs as it is; AOTAutograd refuses, it never drops them."""
    torch._dynamo.reset()
    tensors, ours, naive = tail_pair(out_act="relu")
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_equal(gradient_penalty(compiled, leaves), gradient_penalty(naive, leaves))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient_penalty(torch.compile(ours, backend="aot_eager", fullgraph=True), leaves)


def test_a_rewritten_graph_under_vmap() -> None:
    """The compiler's own calls are right within a transform, as the modules' are."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.BatchNorm2d(4), setriton.SqueezeExcite(4, 1 / 2)).double().eval()
    x = random(3, 2, 4, 2, 2)
    compiled = torch.compile(vmap(model), backend="setriton", options={"compile_threads": 1})
    assert_equal(compiled(x), vmap(model)(x))

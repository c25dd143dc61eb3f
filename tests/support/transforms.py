"""Functions with the ones that users write in their place, and what transforms them, in float64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from oracle import make_inputs, naive_squeeze_excite
from tail_oracle import make_tail_inputs, naive_tail
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import setriton

Function = Callable[..., Any]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def se_pair(act: str = "gelu", gate: str = "sigmoid") -> tuple[list[Tensor], Function, Function]:
    """Arguments, setriton's function and the one that users write, of SE alone."""
    tensors = [t for t in make_inputs(2, 3, 2, 2, 2, torch.float64, channels_last=True)[:5] if t is not None]
    return (
        tensors,
        lambda *t: setriton.squeeze_excite(*t, act=act, gate=gate),
        lambda x, w1, b1, w2, b2: naive_squeeze_excite(x, w1, b1, w2, b2, act, gate),
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


def gradient_penalty(function: Function, leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the square of the gradient of x; None where it does not depend on a tensor."""
    y = function(*leaves)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    assert dx.requires_grad
    return list(torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True))

"""SE as users write it, in float64 and in low precision, and how far from it fp32 arithmetic may lead.

The bounds are those of a textbook rounding analysis (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): a
sum or product of n terms in fp32 is off by at most gamma(n) times the sum of the magnitudes of its terms.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": lambda z: z * F.relu6(z + 3) / 6,
    "identity": lambda z: z,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": lambda z: F.relu6(z + 3) / 6}
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")
U = 2.0**-24
# exp, erf and a division or two: eight roundings are more than any of the functions takes.
FUNCTION = 8 * U
# Largest slopes of the functions and of their derivatives.
ACT_SLOPE = {
    "relu": (1.0, 0.0),
    "identity": (1.0, 0.0),
    "silu": (1.1, 0.5),
    "gelu": (1.13, 0.8),
    "hardswish": (1.5, 1 / 3),
}
GATE_SLOPE = {"sigmoid": (0.25, 0.1), "hardsigmoid": (1 / 6, 0.0)}


class Inputs(NamedTuple):
    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    dy: Tensor


def make_inputs(
    n: int, c: int, r: int, h: int, w: int, dtype: torch.dtype, *, channels_last: bool, bias: bool = True, seed: int = 0
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (randn(n, c, h, w).contiguous(memory_format=layout) for _ in range(2))
    b1, b2 = (randn(r), randn(c)) if bias else (None, None)
    return Inputs(x, randn(r, c, 1, 1) / c**0.5, b1, randn(c, r, 1, 1) / r**0.5, b2, dy)


def naive_squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> Tensor:
    q = F.adaptive_avg_pool2d(x, 1)
    return x * GATES[gate](F.conv2d(ACTS[act](F.conv2d(q, w1, b1)), w2, b2))


def outputs(function: object, inputs: Inputs, act: str, gate: str) -> dict[str, Tensor]:
    """y and all gradients of a function with the signature of `naive_squeeze_excite`."""
    *arguments, dy = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    y = function(*leaves, act, gate)  # type: ignore[operator]
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy))
    named = zip(NAMES, [y.detach(), *(None if t is None else next(grads) for t in leaves)], strict=True)
    return {name: value for name, value in named if value is not None}


def double(inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.double().cpu() for t in inputs))  # type: ignore[arg-type]


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def rounding_bounds(inputs: Inputs, act: str, gate: str) -> dict[str, Tensor]:
    """For each output, element by element, what fp32 arithmetic may add to the error; inputs as `double` gives them."""
    x, w1, b1, w2, b2, dy = inputs
    n, c, h, w = x.shape
    m1, m2, r, hw = w1.flatten(1), w2.flatten(1), w1.shape[0], h * w
    zero = torch.zeros((), dtype=torch.float64)
    bias1, bias2 = zero if b1 is None else b1, zero if b2 is None else b2

    q = x.mean((2, 3))
    q_err = gamma(hw + 2) * x.abs().mean((2, 3))
    z1 = q @ m1.t() + bias1
    z1_err = gamma(c + 2) * (q.abs() @ m1.abs().t() + bias1.abs()) + q_err @ m1.abs().t()
    a, a_err = ACTS[act](z1), ACT_SLOPE[act][0] * z1_err + FUNCTION * z1.abs()
    z2 = a @ m2.t() + bias2
    z2_err = gamma(r + 2) * (a.abs() @ m2.abs().t() + bias2.abs()) + a_err @ m2.abs().t()
    e, e_err = GATES[gate](z2), GATE_SLOPE[gate][0] * z2_err + FUNCTION
    y_err = x.abs() * e_err[:, :, None, None] + gamma(2) * (x * e[:, :, None, None]).abs()

    de = (dy * x).sum((2, 3))
    de_err = gamma(hw + 2) * (dy * x).abs().sum((2, 3))
    slope2 = _derivative(GATES[gate], z2)
    dz2 = de * slope2
    dz2_err = slope2.abs() * de_err + de.abs() * (GATE_SLOPE[gate][1] * z2_err + FUNCTION) + gamma(2) * dz2.abs()
    slope1 = _derivative(ACTS[act], z1)
    da = dz2 @ m2
    da_err = gamma(c + 2) * (dz2.abs() @ m2.abs()) + dz2_err @ m2.abs()
    dz1 = da * slope1
    dz1_err = slope1.abs() * da_err + da.abs() * (ACT_SLOPE[act][1] * z1_err + FUNCTION) + gamma(2) * dz1.abs()
    dq_err = gamma(r + 2) * (dz1.abs() @ m1.abs()) + dz1_err @ m1.abs()
    dq = dz1 @ m1
    dx_err = dy.abs() * e_err[:, :, None, None] + (dq_err / hw)[:, :, None, None]
    dx_err = dx_err + gamma(4) * ((dy * e[:, :, None, None]).abs() + (dq / hw).abs()[:, :, None, None])

    def weight(dz: Tensor, dz_err: Tensor, v: Tensor, v_err: Tensor) -> Tensor:
        return gamma(n + 2) * (dz.abs().t() @ v.abs()) + dz_err.t() @ v.abs() + dz.abs().t() @ v_err

    return {
        "y": y_err,
        "dx": dx_err,
        "dw1": weight(dz1, dz1_err, q, q_err)[:, :, None, None],
        "db1": gamma(n + 2) * dz1.abs().sum(0) + dz1_err.sum(0),
        "dw2": weight(dz2, dz2_err, a, a_err)[:, :, None, None],
        "db2": gamma(n + 2) * dz2.abs().sum(0) + dz2_err.sum(0),
    }


def assert_no_worse_than_eager(function: object, inputs: Inputs, act: str, gate: str) -> None:
    """Error against float64 at most eager's largest in the same dtype, plus fp32 rounding and one of the result."""
    exact_inputs = double(inputs)
    exact = outputs(naive_squeeze_excite, exact_inputs, act, gate)
    eager = outputs(naive_squeeze_excite, inputs, act, gate)
    ours = outputs(function, inputs, act, gate)
    bounds = rounding_bounds(exact_inputs, act, gate)
    for name, want in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        assert ours[name].shape == eager[name].shape, name
        if not want.numel():
            continue
        eager_error = (eager[name].double().cpu() - want).abs().max()
        result_rounding = torch.finfo(ours[name].dtype).eps / 2 * want.abs()
        excess = (ours[name].double().cpu() - want).abs() - (eager_error + result_rounding + bounds[name])
        assert excess.max() <= 0, f"{name}: off by {excess.max():.2e} more than eager ({eager_error:.2e}) and rounding"


def _derivative(function: object, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]  # type: ignore[operator]

"""The library's functions in plain PyTorch: the path of every device without Triton, and what kernels compute.

Written so that Inductor can fuse them: autograd differentiates the forward; the closed-form gradients stand beside it.
Notation as in Squeeze-and-Excitation Networks (arXiv 1709.01507), section 3: q is the squeezed map (eq. 2),
z1 = W1 q + b1 and z2 = W2 act(z1) + b2 the pre-activations of the excitation (eq. 3), e = gate(z2) its output.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Nonlinearity(NamedTuple):
    """An element-wise function and its derivative."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density


ACTS = {
    "relu": Nonlinearity(F.relu, lambda z: (z > 0).to(z.dtype)),
    "silu": Nonlinearity(F.silu, _silu_derivative),
    "gelu": Nonlinearity(F.gelu, _gelu_derivative),
    # relu6 rather than F.hardswish for the reason below; the derivative at -3 and 3 is F.hardswish's: 0 and 1.
    "hardswish": Nonlinearity(
        lambda z: z * F.relu6(z + 3) / 6, lambda z: (F.relu6(z + 3) + z * ((z > -3) & (z < 3)).to(z.dtype)) / 6
    ),
    "identity": Nonlinearity(lambda z: z, torch.ones_like),
}
BN_ACTS = {name: ACTS[name] for name in ("identity", "relu", "silu", "hardswish")}
OUT_ACTS = ("identity", "relu")
# Their derivatives are functions of e = gate(z2), which is what is kept.
GATES = {
    "sigmoid": Nonlinearity(torch.sigmoid, lambda e: e * (1 - e)),
    # relu6 rather than F.hardsigmoid, whose float64 kernel divides by a float32 constant (3e-8 off).
    "hardsigmoid": Nonlinearity(lambda z: F.relu6(z + 3) / 6, lambda e: ((e > 0) & (e < 1)).to(e.dtype) / 6),
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and the excitation are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_disabled(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Float32 stays float32 inside, whatever the caller's autocast; the meta device has no autocast to disable."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> Tensor:
    """y (N, C, H, W) = x * e, in the dtype of x."""
    return _forward(x, w1, b1, w2, b2, act, gate)[0]


def squeeze_excite_with_saved(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and q (N, C), z1 (N, R), e (N, C) that the closed-form gradients need."""
    with torch.no_grad():
        return _forward(x, w1, b1, w2, b2, act, gate)


def squeeze_excite_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, q: Tensor, z1: Tensor, e: Tensor, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2, from two sweeps: one reads (dy, x), the other reads dy and writes dx; db1, db2 as q."""
    dtype = q.dtype
    m1, m2 = w1.flatten(1).to(dtype), w2.flatten(1).to(dtype)
    with autocast_disabled(x):
        de = (dy.to(dtype) * x.to(dtype)).sum((2, 3))
        dz2 = de * GATES[gate].derivative(e)
        dz1 = (dz2 @ m2) * ACTS[act].derivative(z1)
        dw2, dw1 = dz2.t() @ ACTS[act].function(z1), dz1.t() @ q
        dq = dz1 @ m1
        hw = x.shape[2] * x.shape[3]
        dx = dy.to(dtype) * e[:, :, None, None] + dq[:, :, None, None] / hw
    return (
        dx.to(x.dtype),
        dw1.view(w1.shape).to(w1.dtype),
        dz1.sum(0),
        dw2.view(w2.shape).to(w2.dtype),
        dz2.sum(0),
    )


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    with autocast_disabled(x):
        q = x.mean((2, 3), dtype=dtype)
        z1 = F.linear(q, w1.flatten(1).to(dtype), None if b1 is None else b1.to(dtype))
        z2 = F.linear(ACTS[act].function(z1), w2.flatten(1).to(dtype), None if b2 is None else b2.to(dtype))
        e = GATES[gate].function(z2)
        y = x * e.to(x.dtype)[:, :, None, None]
    return y, q, z1, e

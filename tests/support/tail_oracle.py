"""BN, SE, the residual's sum and ReLU as users write them, and how far from float64 the fused tail may be.

The textbook bounds of `oracle` would take pages here. Instead, backward error (Higham, Accuracy and Stability of
Numerical Algorithms, 1.5): a result is good when it is the exact one of inputs a few roundings away.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import ACTS, U, naive_squeeze_excite
from torch import Tensor

BN_ACTS = {
    "identity": ACTS["identity"],
    "relu": ACTS["relu"],
    "silu": ACTS["silu"],
    "hardswish": lambda z: z * F.relu6(z + 3) / 6,  # F.hardswish in float64 divides by a float32 constant
}
OUT_ACTS = {"identity": ACTS["identity"], "relu": ACTS["relu"]}
# Each input may be this far off, relatively; the result may change by as much as in the worst of so many trials.
INPUT_ERROR, TRIALS = 16 * U, 6


class TailInputs(NamedTuple):
    """Arguments of `setriton.bn_squeeze_excite` in its order, and the gradients of its result, one or two."""

    x: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    residual: Tensor | None
    dy: Tensor
    dy_skip: Tensor | None


def make_tail_inputs(
    n: int,
    c: int,
    r: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    *,
    channels_last: bool = True,
    bias: bool = True,
    affine: bool = True,
    residual: bool = True,
    fork: bool = False,
    mean_over_std: float = 0.0,
    seed: int = 0,
) -> TailInputs:
    """Maps and SE's weights in dtype, BN's vectors in float32 (float64 with it), as mixed precision has them."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def a_map(offset: Tensor | float = 0.0) -> Tensor:
        return (randn(n, c, h, w) + offset).to(dtype).contiguous(memory_format=layout)

    of_bn = torch.float64 if dtype == torch.float64 else torch.float32
    offset = mean_over_std * randn(c).sign()
    running_mean, running_var = offset + randn(c), 0.5 + torch.rand(c, generator=generator)
    return TailInputs(
        x=a_map(offset[:, None, None]),
        bn_weight=(1 + randn(c) / 2).to(of_bn) if affine else None,
        bn_bias=randn(c).to(of_bn) if affine else None,
        running_mean=running_mean.to(of_bn),
        running_var=running_var.to(of_bn),
        w1=(randn(r, c, 1, 1) / c**0.5).to(dtype),
        b1=randn(r).to(dtype) if bias else None,
        w2=(randn(c, r, 1, 1) / r**0.5).to(dtype),
        b2=randn(c).to(dtype) if bias else None,
        residual=a_map() if residual else None,
        dy=a_map(),
        dy_skip=a_map() if fork else None,
    )


def naive_tail(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    bn_act: str = "identity",
    act: str = "relu",
    gate: str = "sigmoid",
    out_act: str = "identity",
) -> Tensor:
    v = BN_ACTS[bn_act](F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps))
    y = naive_squeeze_excite(v, w1, b1, w2, b2, act, gate)
    return OUT_ACTS[out_act](y if residual is None else y + residual)


def tail_outputs(function: object, inputs: TailInputs, **options: Any) -> dict[str, Tensor]:
    """y, all gradients and the running statistics after the call, of a function with the arguments of `naive_tail`.

    A function of two results gets a gradient for each; the only result of another gets both.
    """
    *arguments, dy, dy_skip = inputs
    leaves = dict(zip(TailInputs._fields, (None if t is None else t.detach().clone() for t in arguments), strict=False))
    running = {name: leaves[name] for name in ("running_mean", "running_var")}
    wanted = {name: t.requires_grad_() for name, t in leaves.items() if t is not None and name not in running}
    residual = leaves.pop("residual")
    results = function(*leaves.values(), residual=residual, **options)  # type: ignore[operator]
    y, y_skip = results if isinstance(results, tuple) else (results, results)
    ends, starts = ((y,), (dy,)) if dy_skip is None else ((y, y_skip), (dy, dy_skip))
    grads = torch.autograd.grad(ends, list(wanted.values()), starts)
    named = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"y": y.detach(), **named, **{name: t for name, t in running.items() if t is not None}}


def double(inputs: TailInputs) -> TailInputs:
    return TailInputs(*(None if t is None else t.double().cpu() for t in inputs))  # type: ignore[arg-type]


def input_error_effect(inputs: TailInputs, exact: dict[str, Tensor], **options: Any) -> dict[str, float]:
    """For each output, how much it changes where every element of every input is off by up to INPUT_ERROR."""
    generator = torch.Generator().manual_seed(0)

    def perturbed(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t * (1 + INPUT_ERROR * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1))

    effect = dict.fromkeys(exact, 0.0)
    for _ in range(TRIALS):
        found = tail_outputs(naive_tail, TailInputs(*map(perturbed, inputs)), **options)  # type: ignore[arg-type]
        for name, want in exact.items():
            if want.numel():
                effect[name] = max(effect[name], (found[name] - want).abs().max().item())
    return effect


def dx_rounding(
    inputs: TailInputs, bn_act: str = "identity", act: str = "relu", gate: str = "sigmoid", out_act: str = "identity",
    eps: float = 1e-5, **_: Any,
) -> Tensor:  # fmt: skip
    """What two float32 roundings of each term add to dx in training, element by element; inputs in float64.

    dx = w rstd (du - mean(du) - xh mean(du xh)): of two values in a channel it is 0 but for eps, and its terms are not.
    """
    var, mean = torch.var_mean(inputs.x, (0, 2, 3), correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    xh = (inputs.x - mean) * rstd
    weight, bias = (t if t is None else t.view(1, -1, 1, 1) for t in (inputs.bn_weight, inputs.bn_bias))
    scale = rstd if weight is None else rstd * weight
    u = (xh if weight is None or bias is None else xh * weight + bias).detach().requires_grad_()
    y = naive_squeeze_excite(BN_ACTS[bn_act](u), inputs.w1, inputs.b1, inputs.w2, inputs.b2, act, gate)
    y = OUT_ACTS[out_act](y if inputs.residual is None else y + inputs.residual)
    (du,) = torch.autograd.grad(y, u, inputs.dy if inputs.dy_skip is None else inputs.dy + inputs.dy_skip)
    means = du.abs().mean((0, 2, 3), keepdim=True) + xh.abs() * (du * xh).abs().mean((0, 2, 3), keepdim=True)
    return 2 * U * scale.abs() * (du.abs() + means)


def assert_tail_no_worse_than_eager(function: object, inputs: TailInputs, **options: Any) -> None:
    """Error against float64 at most eager's largest in the same dtypes, the inputs' effect, and one last rounding.

    And two roundings of the terms of dx, where they cancel.
    """
    exact_inputs = double(inputs)
    exact = tail_outputs(naive_tail, exact_inputs, **options)
    eager = tail_outputs(naive_tail, inputs, **options)
    ours = tail_outputs(function, inputs, **options)
    effect = input_error_effect(exact_inputs, exact, **options)
    for name, want in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        assert ours[name].shape == eager[name].shape, name
        if not want.numel():
            continue
        eager_error = (eager[name].double().cpu() - want).abs().max()
        result_rounding = torch.finfo(ours[name].dtype).eps / 2 * want.abs()
        if name == "dx" and options.get("training"):
            result_rounding = result_rounding + dx_rounding(exact_inputs, **options)
        excess = (ours[name].double().cpu() - want).abs() - (eager_error + result_rounding + effect[name])
        assert excess.max() <= 0, (
            f"{name}: off by {excess.max():.2e} more than eager ({eager_error:.2e}) and its inputs ({effect[name]:.2e})"
        )

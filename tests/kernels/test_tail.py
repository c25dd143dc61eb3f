"""The kernels of the tail against float64: every activation, layout and mode, hard numbers, odd shapes, modules."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tail_oracle import (
    BN_ACTS,
    OUT_ACTS,
    TailInputs,
    assert_tail_no_worse_than_eager,
    make_tail_inputs,
    naive_tail,
    tail_outputs,
)
from torch import nn

import setriton
from setriton import ops_tail
from setriton.functional import bn_squeeze_excite_forked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

# (N, C, R, H, W) and what each is here for.
SHAPES = {
    "two values a channel": (2, 1, 1, 1, 1),
    "1x1 maps": (5, 66, 4, 1, 1),
    "C = 20, odd sizes": (2, 20, 2, 5, 7),
    "more channels than a block": (2, 150, 9, 3, 5),
    "more channels than a chunk, more hidden than a block": (2, 140, 40, 2, 2),
    "maps in parts": (1, 10, 3, 30, 35),
    "several images a piece, the last piece short": (37, 8, 2, 6, 5),
    "more images than a tile of the products": (70, 8, 2, 2, 1),
}


def on(device: torch.device, inputs: TailInputs) -> TailInputs:
    return TailInputs(*(None if t is None else t.to(device) for t in inputs))  # type: ignore[arg-type]


@MODES
@LAYOUTS
@pytest.mark.parametrize("out_act", OUT_ACTS)
@pytest.mark.parametrize("bn_act", BN_ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant(
    device: torch.device, dtype: torch.dtype, bn_act: str, out_act: str, channels_last: bool, training: bool
) -> None:
    residual = out_act == "relu"
    inputs = make_tail_inputs(3, 40, 5, 6, 7, dtype, channels_last=channels_last, residual=residual)
    options = {"training": training, "bn_act": bn_act, "out_act": out_act}
    assert_tail_no_worse_than_eager(setriton.bn_squeeze_excite, on(device, inputs), **options)


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("bn_act", "training"), [("identity", True), ("identity", False), ("silu", True)], ids=lambda value: str(value)
)
def test_every_shape(
    device: torch.device, shape: tuple[int, int, int, int, int], bn_act: str, training: bool, channels_last: bool
) -> None:
    inputs = make_tail_inputs(*shape, torch.float32, channels_last=channels_last, seed=1)
    options = {"training": training, "bn_act": bn_act, "out_act": "relu"}
    assert_tail_no_worse_than_eager(setriton.bn_squeeze_excite, on(device, inputs), **options)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(2, 4), c=st.integers(1, 70), r=st.integers(1, 20), h=st.integers(1, 9), w=st.integers(1, 9),
    channels_last=st.booleans(), bias=st.booleans(), affine=st.booleans(), residual=st.booleans(),
    training=st.booleans(), dtype=st.sampled_from(DTYPES), bn_act=st.sampled_from(sorted(BN_ACTS)),
    gate=st.sampled_from(["sigmoid", "hardsigmoid"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    device: torch.device, n: int, c: int, r: int, h: int, w: int, channels_last: bool, bias: bool, affine: bool,
    residual: bool, training: bool, dtype: torch.dtype, bn_act: str, gate: str, seed: int,
) -> None:  # fmt: skip
    inputs = make_tail_inputs(
        n, c, r, h, w, dtype, channels_last=channels_last, bias=bias, affine=affine, residual=residual, seed=seed
    )
    options = {"training": training, "bn_act": bn_act, "gate": gate}
    assert_tail_no_worse_than_eager(setriton.bn_squeeze_excite, on(device, inputs), **options)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_gradients_are_joined(device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    inputs = make_tail_inputs(3, 24, 3, 5, 6, dtype, channels_last=channels_last, fork=True)
    options = {"training": True, "out_act": "relu"}
    assert_tail_no_worse_than_eager(bn_squeeze_excite_forked, on(device, inputs), **options)


def test_one_of_two_gradients_may_be_missing(device: torch.device) -> None:
    inputs = on(device, make_tail_inputs(3, 24, 3, 5, 6, torch.float32))
    *leaves, dy, _ = inputs
    x = inputs.x.clone().requires_grad_()
    want = torch.autograd.grad(setriton.bn_squeeze_excite(x, *leaves[1:9], residual=leaves[9], training=True), x, dy)
    for which in (0, 1):
        ys = bn_squeeze_excite_forked(x, *leaves[1:9], residual=leaves[9], training=True)
        assert torch.equal(torch.autograd.grad(ys[which], x, dy)[0], want[0])


@MODES
@LAYOUTS
@pytest.mark.parametrize("bn_act", ["identity", "silu"])
def test_means_a_hundred_times_the_deviation(
    device: torch.device, bn_act: str, channels_last: bool, training: bool
) -> None:
    inputs = make_tail_inputs(4, 12, 3, 20, 15, torch.float32, channels_last=channels_last, mean_over_std=100.0)
    options = {"training": training, "bn_act": bn_act, "out_act": "relu"}
    assert_tail_no_worse_than_eager(setriton.bn_squeeze_excite, on(device, inputs), **options)


@LAYOUTS
@pytest.mark.parametrize("batch", [3, 7, 70])
@pytest.mark.parametrize("value", [0.0, 3.0, 0.37, 3000.1, -7e5])
def test_constant_channels(device: torch.device, value: float, batch: int, channels_last: bool) -> None:
    """Pieces' means are merged without rounding: y is the bias, though eps is far below their distance to the next."""
    inputs = make_tail_inputs(batch, 12, 3, 7, 7, torch.float32, channels_last=channels_last)
    inputs.x[:, 5] = value
    options = {"training": True, "out_act": "relu"}
    assert_tail_no_worse_than_eager(setriton.bn_squeeze_excite, on(device, inputs), **options)


@MODES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bn_act", ["identity", "relu", "silu"])
def test_non_finite_values_spread_as_in_eager(device: torch.device, bn_act: str, bad: float, training: bool) -> None:
    inputs = make_tail_inputs(2, 12, 3, 4, 4, torch.float32)
    inputs.x[1, 5, 2, 2] = bad
    *arguments, _, _ = on(device, inputs)
    options: dict[str, Any] = {"training": training, "bn_act": bn_act, "residual": arguments.pop(), "out_act": "relu"}
    want, found = (
        f(*(t.clone() for t in arguments if t is not None), **options) for f in (naive_tail, setriton.bn_squeeze_excite)
    )
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isinf(), want.isinf())


def test_bit_for_bit_the_same_in_every_run(device: torch.device) -> None:
    inputs = on(device, make_tail_inputs(2, 10, 3, 30, 35, torch.float32))
    run = functools.partial(tail_outputs, setriton.bn_squeeze_excite, inputs, training=True, bn_act="silu")
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@MODES
def test_empty_batch(device: torch.device, training: bool) -> None:
    inputs = on(device, make_tail_inputs(0, 20, 2, 3, 3, torch.float32))
    want, found = (
        tail_outputs(f, inputs, training=training, out_act="relu") for f in (naive_tail, setriton.bn_squeeze_excite)
    )
    for name, value in found.items():
        assert value.shape == want[name].shape
        assert torch.equal(value, want[name]), name


def test_mixed_dtypes_and_layouts(device: torch.device) -> None:
    """A bfloat16 map with float32 weights; residual and gradient in other layouts, the residual in float32."""
    inputs = on(device, make_tail_inputs(2, 20, 3, 5, 6, torch.bfloat16))
    assert inputs.residual is not None
    weights = {name: getattr(inputs, name).float() for name in ("w1", "b1", "w2", "b2")}
    mixed = inputs._replace(**weights, residual=inputs.residual.contiguous(), dy=inputs.dy.contiguous())
    same, other = (
        tail_outputs(setriton.bn_squeeze_excite, i, training=True, out_act="relu")
        for i in (inputs._replace(**weights), mixed)
    )
    assert all(torch.equal(same[name], other[name]) for name in same)
    wide = mixed._replace(residual=mixed.residual.float())  # type: ignore[union-attr]
    found = tail_outputs(setriton.bn_squeeze_excite, wide, training=True, out_act="relu")
    assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
    assert found["dresidual"].dtype == found["dw1"].dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(device: torch.device, training: bool) -> None:
    *arguments, dy, dy_skip = on(device, make_tail_inputs(3, 20, 2, 5, 6, torch.float32, fork=True))
    options = ("identity", "relu", "sigmoid")
    leaves = [t.clone().requires_grad_(i not in (3, 4)) for i, t in enumerate(arguments) if t is not None]
    forward = (training, 0.1, 1e-5, *options, "relu", "", True)
    torch.library.opcheck(torch.ops.setriton.bn_squeeze_excite.default, (*leaves, *forward))
    _, bits, mean, var, *saved, _, _ = ops_tail._forward(*arguments, *forward)
    x, weight, bias, running_mean, running_var, w1, _, w2, *_ = arguments
    statistics = (mean, var) if training else (running_mean, running_var)
    torch.library.opcheck(
        torch.ops.setriton.bn_squeeze_excite_backward.default,
        (dy, dy_skip, x, bits, weight, bias, *statistics, w1, w2, *saved, True, training, 1e-5, *options, ""),
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 1)
        self.tail = setriton.BatchNormSqueezeExcite(24, 1 / 8, out_act="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.conv(x), x)


def test_compiled_training_steps(device: torch.device) -> None:
    """Full graph, any batch size from two compilations; the same numbers and running statistics as eager."""
    torch._dynamo.reset()
    eager, compiled = (Block().to(device) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, fullgraph=True)
    for index, batch in enumerate((2, 3, 5, 4)):
        x = torch.randn(batch, 24, 6, 6, device=device)
        with torch._dynamo.config.patch(error_on_recompile=index >= 2):
            found = run(x)
        want = eager(x)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        grads = [
            torch.autograd.grad(y.square().sum(), [*m.parameters()]) for m, y in ((compiled, found), (eager, want))
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_x_bits_and_vectors(device: torch.device) -> None:
    inputs = on(device, make_tail_inputs(3, 24, 3, 8, 8, torch.float32))
    *arguments, _, _ = inputs
    x = inputs.x.requires_grad_()
    saved: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        setriton.bn_squeeze_excite(*arguments[:9], residual=arguments[9], training=True, out_act="relu")
    maps = sum(t.nbytes for t in saved if t.numel() > 2 * 3 * 24)
    assert maps == x.nbytes + x.numel() // 8

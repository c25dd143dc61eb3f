"""The Triton kernels against float64, for every dtype, layout, act and gate, and every shape that could trip them."""

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ACTS, GATES, Inputs, assert_no_worse_than_eager, make_inputs, naive_squeeze_excite, outputs
from torch import Tensor

from setriton import squeeze_excite
from setriton.kernels import forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (N, C, R, H, W) and what each is here for.
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1),
    "1x1 maps": (3, 66, 4, 1, 1),
    "R = 1": (2, 16, 1, 4, 4),
    "C = 20, odd sizes": (2, 20, 2, 5, 7),
    "C = 36": (2, 36, 3, 7, 7),
    "more channels than a block": (2, 300, 18, 3, 5),
    "C = 608, R = 38": (1, 608, 38, 2, 2),
    "a reduction in parts": (1, 24, 3, 40, 33),
    "more images than a tile of the products": (35, 8, 2, 2, 3),
    "a long row": (1, 3, 2, 1, 2100),
}


def fused(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate: str) -> Tensor:
    return squeeze_excite(x, w1, b1, w2, b2, act=act, gate=gate)


def on(device: torch.device, inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.to(device) for t in inputs))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_variant(device: torch.device, dtype: torch.dtype, channels_last: bool, act: str, gate: str) -> None:
    inputs = make_inputs(3, 40, 5, 6, 7, dtype, channels_last=channels_last)
    assert_no_worse_than_eager(fused, on(device, inputs), act, gate)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape(
    device: torch.device, shape: tuple[int, int, int, int, int], dtype: torch.dtype, channels_last: bool, bias: bool
) -> None:
    inputs = make_inputs(*shape, dtype, channels_last=channels_last, bias=bias)
    assert_no_worse_than_eager(fused, on(device, inputs), "relu", "sigmoid")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3), c=st.integers(1, 70), r=st.integers(1, 20), h=st.integers(1, 9), w=st.integers(1, 9),
    channels_last=st.booleans(), bias=st.booleans(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(sorted(ACTS)),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    device: torch.device, n: int, c: int, r: int, h: int, w: int,
    channels_last: bool, bias: bool, dtype: torch.dtype, act: str, seed: int,
) -> None:  # fmt: skip
    inputs = make_inputs(n, c, r, h, w, dtype, channels_last=channels_last, bias=bias, seed=seed)
    assert_no_worse_than_eager(fused, on(device, inputs), act, "sigmoid")


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_empty_batch(device: torch.device, channels_last: bool) -> None:
    inputs = on(device, make_inputs(0, 20, 2, 3, 3, torch.float32, channels_last=channels_last))
    found = outputs(fused, inputs, "relu", "sigmoid")
    assert found["y"].shape == found["dx"].shape == (0, 20, 3, 3)
    assert all(found[name].abs().sum() == 0 for name in ("dw1", "db1", "dw2", "db2"))


def test_layouts_of_input_and_gradient_may_differ(device: torch.device) -> None:
    inputs = on(device, make_inputs(2, 20, 3, 5, 6, torch.float32, channels_last=True))
    mixed = inputs._replace(dy=inputs.dy.contiguous())
    same, other = (outputs(fused, i, "relu", "sigmoid") for i in (inputs, mixed))
    assert all(torch.equal(same[name], other[name]) for name in same)
    assert other["dx"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.permute(1, 0, 2, 3),
    ],
    ids=["transposed", "every second row", "every second channel", "expanded", "images as channels"],
)
def test_other_strides_become_those_of_eager(device: torch.device, view: object) -> None:
    x = view(make_inputs(4, 4, 1, 6, 6, torch.float32, channels_last=False).x)  # type: ignore[operator]
    inputs = make_inputs(*x.shape[:2], 2, *x.shape[2:], torch.float32, channels_last=False)._replace(x=x.to(device))
    inputs = on(device, inputs)._replace(x=x.to(device))
    assert_no_worse_than_eager(fused, inputs, "relu", "sigmoid")
    want, found = (f(*inputs[:5], "relu", "sigmoid") for f in (naive_squeeze_excite, fused))
    assert found.stride() == want.stride()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", ACTS)
def test_non_finite_values_spread_as_in_eager(device: torch.device, act: str, bad: float) -> None:
    inputs = make_inputs(2, 12, 3, 4, 4, torch.float32, channels_last=True)
    inputs.x[1, 5, 2, 2] = bad
    inputs = on(device, inputs)
    want, found = (f(*inputs[:5], act, "sigmoid") for f in (naive_squeeze_excite, fused))
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isinf(), want.isinf())


def test_mixed_dtypes_as_under_autocast(device: torch.device) -> None:
    """A bfloat16 map with float32 weights: gradients come in each tensor's own dtype."""
    low = on(device, make_inputs(2, 20, 3, 5, 6, torch.bfloat16, channels_last=True))
    weights = [None if t is None else t.float() for t in low[1:5]]
    found = outputs(fused, Inputs(low.x, *weights, low.dy), "relu", "sigmoid")  # type: ignore[arg-type]
    assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
    assert all(found[name].dtype == torch.float32 for name in ("dw1", "db1", "dw2", "db2"))


def test_bit_for_bit_the_same_in_every_run(device: torch.device) -> None:
    inputs = on(device, make_inputs(2, 24, 3, 40, 33, torch.float32, channels_last=True))
    first, second = (outputs(fused, inputs, "silu", "sigmoid") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_weights_and_biases(device: torch.device) -> None:
    inputs = on(device, make_inputs(2, 20, 3, 5, 6, torch.float32, channels_last=True))
    b1, b2 = inputs.b1, inputs.b2
    assert b1 is not None
    assert b2 is not None
    strided = inputs._replace(
        w1=inputs.w1.flatten(1).t().contiguous().t(),
        b1=torch.stack([b1, b1 + 1], dim=1)[:, 0],
        w2=inputs.w2.flatten(1).repeat_interleave(2, dim=0)[::2],
        b2=b2[:1].expand(20),
    )
    for name, value in outputs(fused, strided, "relu", "sigmoid").items():
        dense = strided._replace(**{n: getattr(strided, n).contiguous() for n in ("w1", "b1", "w2", "b2")})
        assert torch.equal(value, outputs(fused, dense, "relu", "sigmoid")[name]), name


def test_bias_gradients_keep_the_precision_of_the_biases(device: torch.device) -> None:
    inputs = on(device, make_inputs(5, 20, 3, 5, 6, torch.float32, channels_last=True))
    mixed = inputs._replace(w1=inputs.w1.bfloat16(), w2=inputs.w2.bfloat16())
    same = mixed._replace(w1=mixed.w1.float(), w2=mixed.w2.float())
    found, want = (outputs(fused, i, "relu", "sigmoid") for i in (mixed, same))
    assert torch.equal(found["db1"], want["db1"])
    assert torch.equal(found["db2"], want["db2"])


def test_two_dimensional_weights(device: torch.device) -> None:
    inputs = on(device, make_inputs(2, 20, 3, 5, 6, torch.float32, channels_last=True))
    flat = inputs._replace(w1=inputs.w1.flatten(1), w2=inputs.w2.flatten(1))
    conv, linear = (outputs(fused, i, "relu", "sigmoid") for i in (inputs, flat))
    assert linear["dw1"].shape == (3, 20)
    assert all(torch.equal(conv[name].flatten(), linear[name].flatten()) for name in conv if "w" in name)


def test_the_kernels_really_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above compare is the kernels' result, not the reference path's."""
    launches = mock.MagicMock()
    monkeypatch.setattr(forward, "forward_kernel", launches)
    inputs = on(device, make_inputs(1, 4, 1, 2, 2, torch.float32, channels_last=True))
    assert fused(*inputs[:5], "relu", "sigmoid").isnan().all()
    launches.__getitem__.assert_called_once()

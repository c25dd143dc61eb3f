"""Maps without pixels, numbers at the end of float32, NaN behind ReLU, the padding of the bits: as eager PyTorch."""

from collections.abc import Callable

import pytest
import torch
from oracle import make_inputs, naive_squeeze_excite, outputs
from tail_oracle import TailInputs, make_tail_inputs, naive_tail, tail_outputs
from torch import Tensor

import setriton

pytest.importorskip("triton")

from setriton.kernels.config import ForwardConfig
from setriton.kernels.forward import BatchNorm, Excitation, forward

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
BN_ACTS = pytest.mark.parametrize("bn_act", ["identity", "relu", "silu"])


def both(inputs: TailInputs, **options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    want, found = (tail_outputs(f, inputs, **options) for f in (naive_tail, setriton.bn_squeeze_excite))
    return want, found


def on(device: torch.device, inputs: TailInputs) -> TailInputs:
    return TailInputs(*(None if t is None else t.to(device) for t in inputs))  # type: ignore[arg-type]


@MODES
@BN_ACTS
@pytest.mark.parametrize(("act", "gate"), [("relu", "sigmoid"), ("gelu", "sigmoid"), ("gelu", "hardsigmoid")])
@pytest.mark.parametrize("shape", [(3, 8, 0, 7), (3, 8, 7, 0), (0, 8, 3, 3), (0, 8, 0, 3)], ids=str)
def test_tail_of_no_pixels(
    device: torch.device, shape: tuple[int, ...], act: str, gate: str, bn_act: str, training: bool
) -> None:
    n, c, h, w = shape
    inputs = on(device, make_tail_inputs(n, c, 2, h, w, torch.float32))
    want, found = both(inputs, training=training, bn_act=bn_act, act=act, gate=gate, out_act="relu")
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("act", "gate"), [("relu", "sigmoid"), ("gelu", "sigmoid"), ("gelu", "hardsigmoid")])
@pytest.mark.parametrize("shape", [(3, 8, 0, 7), (0, 8, 3, 3), (0, 8, 0, 3)], ids=str)
def test_squeeze_excite_of_no_pixels(device: torch.device, shape: tuple[int, ...], act: str, gate: str) -> None:
    n, c, h, w = shape
    inputs = make_inputs(n, c, 2, h, w, torch.float32, channels_last=True)
    inputs = type(inputs)(*(None if t is None else t.to(device) for t in inputs))  # type: ignore[arg-type]

    def fused(*arguments: object) -> Tensor:
        return setriton.squeeze_excite(*arguments[:-2], act=arguments[-2], gate=arguments[-1])  # type: ignore[arg-type]

    want, found = (outputs(f, inputs, act, gate) for f in (naive_squeeze_excite, fused))
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def one(x: Tensor) -> None:
    x[1, 2, 0, 1] = 3e38


def one_negative(x: Tensor) -> None:
    x[1, 2, 0, 1] = -3e38


def half(x: Tensor) -> None:
    x[:, 2, :3] = 3e38


def a_channel(x: Tensor) -> None:
    x[:, 2] = 3e38


def both_signs(x: Tensor) -> None:
    x[:, 2] = 3e38 * torch.randn_like(x[:, 2]).sign()


def images_apart(x: Tensor) -> None:
    x[:, 2] = 3e38
    x[::3, 2] = -3e38


@MODES
@BN_ACTS
@pytest.mark.parametrize("fill", [one, one_negative, half, a_channel, both_signs, images_apart])
def test_numbers_at_the_end_of_float32(
    device: torch.device, fill: Callable[[Tensor], None], bn_act: str, training: bool
) -> None:
    """No NaN where eager has none, and its numbers; on maps of several tiles, and several images a piece."""
    torch.manual_seed(0)
    inputs = make_tail_inputs(4, 6, 2, 5, 5, torch.float32)
    fill(inputs.x)
    want, found = both(on(device, inputs), training=training, bn_act=bn_act, act="gelu", out_act="relu")
    names = ["y", "dx"]
    if training and torch.isfinite(want["y"]).all():
        names = list(want)
    for name in names:
        known = ~want[name].isnan()
        assert not (found[name].isnan() & known).any(), name
        if name != "dx":
            torch.testing.assert_close(found[name][known], want[name][known], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [1e-18, 1e-6, 1e6, 1e18])
def test_any_scale_is_normalized(device: torch.device, value: float) -> None:
    """The statistics' sums lose no digits to the factor that keeps them in float32."""
    inputs = make_tail_inputs(4, 6, 2, 5, 7, torch.float32)
    scaled = on(device, inputs._replace(x=inputs.x * value))
    eps = 1e-5 * value**2
    want, found = (
        f(*scaled[:9], residual=scaled.residual, training=True, eps=eps)
        for f in (naive_tail, setriton.bn_squeeze_excite)
    )
    if value == 1e-18:  # whose variance, 1e-36, has few digits left
        assert torch.isfinite(found).all()
    else:
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@MODES
def test_gradients_pass_where_the_output_is_nan(device: torch.device, training: bool) -> None:
    """ReLU's gradient in eager PyTorch is 0 where y <= 0, which NaN is not."""
    inputs = make_tail_inputs(2, 12, 3, 4, 4, torch.float32)
    inputs.x[1, 5, 2, 2] = float("nan")
    want, found = both(on(device, inputs), training=training, out_act="relu")
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(found[name].isnan(), want[name].isnan()), name
    assert torch.equal(found["dresidual"], want["dresidual"])


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("block_hw", "tiles"), [(1, 2), (4, 64), (16, 1), (64, 1)])
@pytest.mark.parametrize(("h", "w"), [(7, 7), (5, 1), (4, 8)])
def test_every_byte_of_the_bits_is_written(
    device: torch.device, h: int, w: int, block_hw: int, tiles: int, channels_last: bool
) -> None:
    c, r = 11, 2
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, c, h, w).contiguous(memory_format=layout).to(device)
    w1, b1, w2, b2, vector = (torch.randn(s).to(device) for s in ((r, c), (r,), (c, r), (c,), (c,)))
    bn = BatchNorm(vector, vector, vector, vector.exp(), 1e-5, "identity")
    config = ForwardConfig(block_hw, 8, tiles, 4, launches=1, group_kib=64)
    found = forward(x, Excitation(w1, b1, w2, b2, "relu", "sigmoid"), bn, x, "relu", True, False, config=config)
    bits = torch.zeros(2, 16, found.bits.shape[-1], dtype=torch.bool, device=device)
    bits[:, :c, : h * w] = (found.y > 0).flatten(2)
    weights = 2 ** torch.arange(8, device=device)
    assert torch.equal(found.bits, (bits.view(2, 2, 8, -1) * weights[:, None]).sum(2).to(torch.uint8))

"""The fused tail's reference path: against naive autograd in float64, in Inductor, and at the edges."""

import math
from typing import Any

import pytest
import torch
from oracle import GATES
from tail_oracle import (
    BN_ACTS,
    OUT_ACTS,
    TailInputs,
    assert_tail_no_worse_than_eager,
    make_tail_inputs,
    naive_tail,
    tail_outputs,
)

from setriton import bn_squeeze_excite
from setriton.batch_statistics import batch_statistics
from setriton.functional import bn_squeeze_excite_forked
from setriton.reference import ACTS
from setriton.reference import BN_ACTS as OURS

SHAPE = (3, 10, 3, 4, 5)
EDGES = [(1, 8, 2, 3, 3), (2, 7, 1, 1, 1), (5, 3, 2, 1, 7), (2, 1, 1, 9, 1)]


def float64_inputs(*shape: int, **options: Any) -> TailInputs:
    return make_tail_inputs(*(shape or SHAPE), torch.float64, **options)  # type: ignore[misc]


def assert_equals_naive(inputs: TailInputs, function: object = bn_squeeze_excite, **options: Any) -> None:
    want, found = (tail_outputs(f, inputs, **options) for f in (naive_tail, function))
    assert found.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().item() if want[name].numel() else 0.0
        torch.testing.assert_close(found[name], want[name], rtol=1e-11, atol=1e-11 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("out_act", OUT_ACTS)
@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_float64(bn_act: str, out_act: str, residual: bool, training: bool) -> None:
    inputs = float64_inputs(residual=residual)
    assert_equals_naive(inputs, training=training, bn_act=bn_act, out_act=out_act)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bn_act", ["identity", "silu"])
def test_float64_excitation(bn_act: str, act: str, gate: str) -> None:
    assert_equals_naive(float64_inputs(), training=True, bn_act=bn_act, act=act, gate=gate)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("bn_act", BN_ACTS)
@pytest.mark.parametrize("changed", [{"affine": False}, {"bias": False}, {"channels_last": False}], ids=str)
def test_float64_without(changed: dict[str, bool], bn_act: str, training: bool) -> None:
    assert_equals_naive(float64_inputs(**changed), training=training, bn_act=bn_act, out_act="relu")


@pytest.mark.parametrize("missing", ["bn_weight", "bn_bias"])
def test_float64_with_half_an_affine_map(missing: str) -> None:
    assert_equals_naive(float64_inputs()._replace(**{missing: None}), training=True)


@pytest.mark.parametrize("bn_act", BN_ACTS)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_float64_edges(shape: tuple[int, ...], bn_act: str) -> None:
    assert_equals_naive(float64_inputs(*shape), training=True, bn_act=bn_act, out_act="relu", momentum=0.3, eps=1e-3)


@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_float64_constant_channels(bn_act: str) -> None:
    inputs = float64_inputs()
    inputs.x[:, ::3] = 1.5
    assert_equals_naive(inputs, training=True, bn_act=bn_act)


@pytest.mark.parametrize("batch", [3, 7, 70])
@pytest.mark.parametrize("value", [0.37, 3000.1, -7e5])
def test_the_variance_of_a_constant_channel_is_0(value: float, batch: int) -> None:
    """Not what rounding leaves of the merged means, which may be far above eps."""
    x = torch.randn(batch, 4, 5, 7)
    x[:, 2] = value
    mean, var, *_ = batch_statistics(x, group="")
    assert (mean[2].item(), var[2].item()) == (x[0, 2, 0, 0].item(), 0.0)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training: bool) -> None:
    inputs = float64_inputs(0, 8, 2, 3, 3)
    found = tail_outputs(bn_squeeze_excite, inputs, training=training)
    for name, value in found.items():
        before = getattr(inputs, name) if name.startswith("running") else torch.zeros_like(value)
        assert torch.equal(value, before), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 2, 0, 3), (2, 8, 2, 3, 0)], ids=str)
def test_maps_without_pixels(shape: tuple[int, ...], training: bool) -> None:
    """Each gradient is the 0 or the NaN that it is as written."""
    inputs = float64_inputs(*shape)
    want, found = (tail_outputs(f, inputs, training=training, out_act="relu") for f in (naive_tail, bn_squeeze_excite))
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], equal_nan=True, msg=name)
    assert any(value.isnan().any() for value in want.values())


@pytest.mark.parametrize("bn_act", BN_ACTS)
@pytest.mark.parametrize("training", [True, False])
def test_forked_gradients_are_joined(training: bool, bn_act: str) -> None:
    inputs = float64_inputs(fork=True)
    assert_equals_naive(inputs, bn_squeeze_excite_forked, training=training, bn_act=bn_act, out_act="relu")


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_forked_gradients_may_be_absent(used: int) -> None:
    def one_of_two(*arguments: Any, **options: Any) -> torch.Tensor:
        return bn_squeeze_excite_forked(*arguments, **options)[used]

    assert_equals_naive(float64_inputs(), one_of_two, training=True, out_act="relu")


def test_forked_outputs_share_memory() -> None:
    *arguments, residual, _, _ = float64_inputs()
    y, y_skip = bn_squeeze_excite_forked(*arguments, residual=residual, training=True)
    assert y.data_ptr() == y_skip.data_ptr()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_gradcheck(bn_act: str, training: bool) -> None:
    inputs = float64_inputs(3, 4, 2, 2, 3)
    leaves = [t.requires_grad_() for i, t in enumerate(inputs[:10]) if t is not None and i not in (3, 4)]
    running = inputs.running_mean, inputs.running_var

    def function(x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        *layers, residual = rest
        copies = [None if t is None else t.clone() for t in running]
        arguments = (x, weight, bias, *copies, *layers)
        return bn_squeeze_excite_forked(*arguments, residual=residual, training=training, bn_act=bn_act)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_derivatives_at_the_kinks_are_torchs(bn_act: str) -> None:
    import torch.nn.functional as F

    z = torch.tensor([-4.0, -3.0, -1.0, 0.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    stock = {"identity": lambda z: 1 * z, "hardswish": F.hardswish}.get(bn_act) or getattr(F, bn_act)
    (want,) = torch.autograd.grad(stock(z).sum(), z)
    torch.testing.assert_close(OURS[bn_act].derivative(z.detach()), want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("mean_over_std", [0.0, 100.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_float32_no_worse_than_eager(bn_act: str, training: bool, mean_over_std: float) -> None:
    inputs = make_tail_inputs(3, 40, 5, 6, 7, torch.float32, mean_over_std=mean_over_std)
    assert_tail_no_worse_than_eager(bn_squeeze_excite, inputs, training=training, bn_act=bn_act, out_act="relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bn_act", BN_ACTS)
def test_half_precision_no_worse_than_eager(bn_act: str, dtype: torch.dtype) -> None:
    inputs = make_tail_inputs(3, 40, 5, 6, 7, dtype, fork=True)
    assert_tail_no_worse_than_eager(bn_squeeze_excite_forked, inputs, training=True, bn_act=bn_act, out_act="relu")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["x", "residual", "dy"])
def test_infinities_and_nan_reach_what_they_reach_in_eager(where: str, value: float) -> None:
    """And more of the gradients, where eager has 0 for 0 * inf: a loss scaler must see them, not where they are."""
    inputs = make_tail_inputs(2, 6, 2, 3, 3, torch.float32)
    getattr(inputs, where)[1, 2, 0, 0] = value
    want, found = (tail_outputs(f, inputs, training=True) for f in (naive_tail, bn_squeeze_excite))
    assert torch.equal(found["y"].isfinite(), want["y"].isfinite())
    for name in want:
        assert not found[name][~want[name].isfinite()].isfinite().any(), name


def test_nothing_passes_a_closed_relu() -> None:
    inputs = make_tail_inputs(2, 6, 2, 3, 3, torch.float32)
    residual = torch.full_like(inputs.x, -100)
    residual[0, 0, 0, 0] = 100
    dy = torch.full_like(inputs.x, math.nan)
    dy[0, 0, 0, 0] = 1
    found = tail_outputs(bn_squeeze_excite, inputs._replace(residual=residual, dy=dy), training=True, out_act="relu")
    assert all(value.isfinite().all() for value in found.values())
    assert found["dresidual"].sum() == 1


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(residual_dtype: torch.dtype) -> None:
    """bfloat16 maps with float32 parameters, as under autocast, and a residual of any dtype."""
    inputs = make_tail_inputs(2, 8, 2, 3, 3, torch.float32)
    assert inputs.residual is not None
    half = inputs._replace(x=inputs.x.bfloat16(), dy=inputs.dy.bfloat16(), residual=inputs.residual.to(residual_dtype))
    found = tail_outputs(bn_squeeze_excite, half, training=True, out_act="relu")
    dtypes = {name: value.dtype for name, value in found.items()}
    assert dtypes == dict.fromkeys(found, torch.float32) | {
        "y": torch.bfloat16, "dx": torch.bfloat16, "dresidual": residual_dtype
    }  # fmt: skip
    exact = tail_outputs(bn_squeeze_excite, TailInputs(*(None if t is None else t.double() for t in half)),
                         training=True, out_act="relu")  # fmt: skip
    torch.testing.assert_close(found["y"].double(), exact["y"], rtol=2**-8, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    *arguments, residual, _, _ = make_tail_inputs(2, 64, 8, 4, 4, torch.float32)
    plain = bn_squeeze_excite(*arguments, residual=residual, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = bn_squeeze_excite(*arguments, residual=residual, training=True)
    assert torch.equal(under, plain)


@pytest.mark.parametrize("bn_act", ["identity", "silu"])
def test_compiles_to_one_graph_for_any_batch(bn_act: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(bn_squeeze_excite_forked, fullgraph=True)
    for index, batch in enumerate((2, 3, 5, 4)):
        inputs = make_tail_inputs(batch, 16, 4, 6, 6, torch.float32, fork=True)
        with torch._dynamo.config.patch(error_on_recompile=index >= 2):
            found = tail_outputs(compiled, inputs, training=True, bn_act=bn_act, out_act="relu")
        want = tail_outputs(bn_squeeze_excite_forked, inputs, training=True, bn_act=bn_act, out_act="relu")
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-4)

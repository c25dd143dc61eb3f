"""The reference path: against naive autograd in float64, in closed form, and in Inductor."""

import pytest
import torch
from oracle import ACTS, GATES, Inputs, assert_no_worse_than_eager, double, make_inputs, naive_squeeze_excite, outputs

from setriton import SqueezeExcite, ops, reference

CASES = [(3, 20, 2, 5, 6), (2, 8, 1, 1, 1), (0, 8, 2, 3, 3)]


def closed_form(x, w1, b1, w2, b2, act, gate):  # type: ignore[no-untyped-def]
    return ops.squeeze_excite(x, w1, b1, w2, b2, act, gate)[0]


@pytest.mark.parametrize("function", [reference.squeeze_excite, closed_form], ids=["autograd", "closed form"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_float64(shape: tuple[int, int, int, int, int], bias: bool, act: str, gate: str, function: object) -> None:
    inputs = double(make_inputs(*shape, torch.float32, channels_last=True, bias=bias))
    want, found = (outputs(f, inputs, act, gate) for f in (naive_squeeze_excite, function))
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager(dtype: torch.dtype, channels_last: bool) -> None:
    inputs = make_inputs(3, 40, 5, 6, 7, dtype, channels_last=channels_last)
    assert_no_worse_than_eager(reference.squeeze_excite, inputs, "relu", "sigmoid")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act: str, gate: str) -> None:
    inputs: Inputs = double(make_inputs(2, 6, 2, 3, 2, torch.float32, channels_last=True))
    leaves = [t.requires_grad_() for t in inputs[:5] if t is not None]
    for function in (reference.squeeze_excite, closed_form):
        assert torch.autograd.gradcheck(lambda *a, f=function: f(*a, act, gate), leaves)


def test_opcheck() -> None:
    inputs = make_inputs(3, 20, 2, 5, 6, torch.float32, channels_last=True)
    *leaves, dy = (t.requires_grad_() for t in inputs if t is not None)
    torch.library.opcheck(ops.squeeze_excite, (*leaves, "relu", "sigmoid"))
    arguments = [t.detach() for t in leaves]
    x, w1, _, w2, _ = arguments
    _, *saved = ops.squeeze_excite(*arguments, "relu", "sigmoid")
    torch.library.opcheck(ops.squeeze_excite_backward, (dy.detach(), x, w1, w2, *saved, "relu", "sigmoid"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_to_one_graph_for_any_batch(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    module = SqueezeExcite(16, 1 / 4).to(dtype)
    compiled = torch.compile(module, fullgraph=True)
    for index, batch in enumerate((2, 3, 5, 4)):
        x = torch.randn(batch, 16, 6, 6, dtype=dtype, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=index >= 2):
            found = compiled(x)
        torch.testing.assert_close(found, module(x))
        found.sum().backward()
        assert x.grad is not None


def test_export_with_any_batch() -> None:
    module = SqueezeExcite(16, 1 / 4)
    program = torch.export.export(module, (torch.randn(4, 16, 6, 6),), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    x = torch.randn(7, 16, 6, 6)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("function", [reference.squeeze_excite, closed_form], ids=["reference", "op"])
def test_autocast_leaves_the_excitation_in_float32(function: object) -> None:
    x, w1, b1, w2, b2, _ = make_inputs(2, 64, 8, 4, 4, torch.float32, channels_last=True)
    plain = function(x, w1, b1, w2, b2, "relu", "sigmoid")  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        under = function(x, w1, b1, w2, b2, "relu", "sigmoid")  # type: ignore[operator]
        half = function(x.bfloat16(), w1, b1, w2, b2, "relu", "sigmoid")  # type: ignore[operator]
    assert torch.equal(under, plain)
    assert half.dtype == torch.bfloat16


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w1, b1, w2, b2, _ = make_inputs(3, 32, 4, 5, 5, torch.float32, channels_last=True)
    leaves = [t.requires_grad_() for t in (x, w1, b1, w2, b2) if t is not None]

    def count(function: object) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*leaves, "relu", "sigmoid").sum().backward()  # type: ignore[operator]
        return int(counter.get_total_flops())

    assert count(closed_form) == count(naive_squeeze_excite) == 12 * 3 * 32 * 4

"""Wrong arguments to the public functions: one clear message each."""

from typing import Any

import pytest
import torch
from oracle import make_inputs

import setriton

INPUTS = make_inputs(2, 8, 3, 4, 4, torch.float32, channels_last=False)
GOOD = {name: getattr(INPUTS, name) for name in ("x", "w1", "b1", "w2", "b2")}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a tensor; got list"),
        ({"w1": None}, TypeError, r"w1 must be a tensor; got NoneType"),
        ({"x": torch.ones(2, 8, 4, 4, dtype=torch.int32)}, TypeError, "floating-point dtype; got torch.int32"),
        ({"x": torch.ones(2, 8, 4, 4, dtype=torch.complex64)}, TypeError, r"x must have a floating-point dtype"),
        ({"x": torch.ones(8, 4, 4)}, ValueError, r"x must have shape \(N, C, H, W\) .* got \(8, 4, 4\)"),
        ({"x": torch.ones(2, 9, 4, 4)}, ValueError, r"w1 must have shape \(R, C\) or .* with C = 9; got \(3, 8"),
        ({"w1": torch.ones(3, 8, 3, 3)}, ValueError, r"w1 must have shape .* got \(3, 8, 3, 3\)"),
        ({"w1": torch.ones(0, 8)}, ValueError, r"w1 must have shape"),
        ({"w2": torch.ones(3, 8)}, ValueError, r"w2 must have shape \(C, R\) .* with R = 3 and C = 8; got \(3, 8\)"),
        ({"b1": torch.ones(8)}, ValueError, r"b1 must have shape \(R,\) = \(3,\); got \(8,\)"),
        ({"b2": torch.ones(8, 1)}, ValueError, r"b2 must have shape \(C,\) = \(8,\); got \(8, 1\)"),
        ({"w2": torch.ones(8, 3, device="meta")}, ValueError, r"w2 must be on cpu like x; got meta"),
        ({"x": torch.ones(2, 0, 4, 4)}, ValueError, r"x must have shape .* with C at least 1; got \(2, 0, 4, 4\)"),
        ({"x": torch.ones(2, 8, 4, 4).to_sparse()}, TypeError, r"x must be dense; got layout torch.sparse_coo"),
        ({"act": ["relu"]}, ValueError, r"act must be one of .* got \['relu'\]"),
        ({"act": "tanh"}, ValueError, r"act must be one of relu, silu, gelu, identity; got 'tanh'"),
        ({"gate": "relu"}, ValueError, r"gate must be one of sigmoid, hardsigmoid; got 'relu'"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        setriton.squeeze_excite(**(GOOD | changed))


def test_the_message_survives_torch_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(setriton.squeeze_excite, backend="eager")
    with pytest.raises(ValueError, match="x must have shape"):
        compiled(**(GOOD | {"x": torch.ones(8, 4, 4)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be at least 1; got 0"),
        ({"channels": 8, "rd_ratio": 0.0}, "rd_ratio must be positive; got 0.0"),
        ({"channels": 8, "rd_channels": 0}, "rd_channels must be at least 1; got 0"),
        ({"channels": 8, "rd_ratio": float("nan")}, "rd_ratio must be positive; got nan"),
        ({"channels": 8, "act": "tanh"}, "act must be one of"),
        ({"channels": 8, "gate": "tanh"}, "gate must be one of"),
    ],
)
def test_wrong_module_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setriton.SqueezeExcite(**options)


@pytest.mark.parametrize("options", [{"channels": 8.0}, {"channels": "8"}, {"channels": 8, "rd_channels": 2.5}])
def test_wrong_types_of_module_options(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"channels must be an int; got"):
        setriton.SqueezeExcite(**options)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'squeeze'"):
        setriton.squeeze  # noqa: B018

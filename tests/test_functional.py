"""Wrong arguments to the public functions: one clear message each."""

from typing import Any

import pytest
import torch
from oracle import make_inputs
from tail_oracle import make_tail_inputs

import setriton
from setriton.functional import bn_squeeze_excite_forked

INPUTS = make_inputs(2, 8, 3, 4, 4, torch.float32, channels_last=False)
TAIL = make_tail_inputs(2, 8, 3, 4, 4, torch.float32)
GOOD = {name: getattr(INPUTS, name) for name in ("x", "w1", "b1", "w2", "b2")}

GOOD_TAIL = {name: t for name, t in TAIL._asdict().items() if not name.startswith("dy")} | {"training": True}


NESTED = torch.nested.nested_tensor([torch.ones(8, 4, 4), torch.ones(8, 3, 3)])
QUANTIZED = torch.quantize_per_tensor(torch.ones(2, 8, 4, 4), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a tensor; got list"),
        ({"w1": None}, TypeError, r"w1 must be a tensor; got NoneType"),
        (
            {"x": torch.ones(2, 8, 4, 4, dtype=torch.int32)},
            TypeError,
            "x must have a float.* got torch.int32",
        ),
        ({"x": torch.ones(2, 8, 4, 4, dtype=torch.complex64)}, TypeError, "x must have .* got torch.complex64"),
        (
            {"x": torch.ones(2, 8, 4, 4).to(torch.float8_e4m3fn)},
            TypeError,
            "64 bits; got torch.float8_e4m3fn",
        ),
        ({"x": QUANTIZED}, TypeError, "x must have a floating-point dtype .* got torch.quint8"),
        ({"x": NESTED}, TypeError, "x must be dense; got a nested tensor"),
        ({"w2": NESTED}, TypeError, "w2 must be dense; got a nested tensor"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(N, C, H, W\) .* got \(\)"),
        ({"x": torch.ones(1, 2, 8, 4, 4)}, ValueError, r"x must have shape .* got \(1, 2, 8, 4, 4\)"),
        ({"w1": torch.ones(3, 8).to_sparse_csr()}, TypeError, "w1 must be dense; got layout torch.sparse_csr"),
        ({"x": torch.ones(2, 8, 4, 4).to_mkldnn()}, TypeError, "x must be dense; got layout torch._mkldnn"),
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
        ({"act": "tanh"}, ValueError, r"act must be one of relu, silu, gelu, hardswish, identity; got 'tanh'"),
        ({"gate": "relu"}, ValueError, r"gate must be one of sigmoid, hardsigmoid; got 'relu'"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        setriton.squeeze_excite(**(GOOD | changed))


@pytest.mark.parametrize("function", [setriton.bn_squeeze_excite, bn_squeeze_excite_forked])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(8, 4, 4)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        ({"w1": None}, TypeError, "w1 must be a tensor; got NoneType"),
        ({"bn_weight": 1.0}, TypeError, "bn_weight must be a tensor; got float"),
        ({"bn_weight": torch.ones(8, dtype=torch.int32)}, TypeError, "bn_weight must have a floating-point dtype"),
        ({"bn_bias": torch.ones(7)}, ValueError, r"bn_bias must have shape \(C,\) = \(8,\); got \(7,\)"),
        ({"running_mean": torch.ones(8, 1)}, ValueError, r"running_mean must have shape \(C,\) = \(8,\); got \(8, 1\)"),
        ({"running_var": None}, ValueError, "running_mean and running_var must both be tensors or both be None"),
        (
            {"running_mean": None, "running_var": None, "training": False},
            ValueError,
            "running_mean and running_var must be tensors where training is False; got None",
        ),
        ({"residual": NESTED}, TypeError, "residual must be dense; got a nested tensor"),
        ({"residual": torch.ones(2, 8, 4, 4).to_sparse()}, TypeError, "residual must be dense; got layout"),
        ({"running_mean": torch.ones(8, dtype=torch.complex64)}, TypeError, "running_mean must have a floating-point"),
        ({"running_var": torch.ones(8, device="meta")}, ValueError, "running_var must be on cpu like x; got meta"),
        ({"residual": torch.ones(2, 8, 4, 5)}, ValueError, r"residual must have the shape of x, \(2, 8, 4, 4\); got"),
        ({"training": 1}, TypeError, "training must be a bool; got 1"),
        ({"momentum": None}, TypeError, "momentum must be a number; got None"),
        ({"momentum": float("nan")}, ValueError, "momentum must be at least 0; got nan"),
        ({"eps": -1e-5}, ValueError, "eps must be at least 0; got -1e-05"),
        ({"eps": 0}, ValueError, "eps must be above 0 where training is True; got 0"),
        ({"bn_act": "gelu"}, ValueError, "bn_act must be one of identity, relu, silu, hardswish; got 'gelu'"),
        ({"act": "tanh"}, ValueError, "act must be one of relu, silu, gelu, hardswish, identity; got 'tanh'"),
        ({"gate": "relu"}, ValueError, "gate must be one of sigmoid, hardsigmoid; got 'relu'"),
        ({"out_act": "silu"}, ValueError, "out_act must be one of identity, relu; got 'silu'"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup; got 'world'"),
        (
            {"x": torch.ones(1, 8, 1, 1), "residual": None},
            ValueError,
            r"x must have more than 1 value per channel where training is True; got \(1, 8, 1, 1\)",
        ),
    ],
)
def test_wrong_arguments_of_the_tail(
    changed: dict[str, Any], error: type[Exception], message: str, function: Any
) -> None:
    with pytest.raises(error, match=message):
        function(**(GOOD_TAIL | changed))


def test_one_value_per_channel_is_enough_for_the_running_statistics() -> None:
    y = setriton.bn_squeeze_excite(**(GOOD_TAIL | {"x": torch.ones(1, 8, 1, 1), "residual": None, "training": False}))
    assert y.shape == (1, 8, 1, 1)


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


@pytest.mark.parametrize("option", ["act", "gate", "bn_act", "out_act"])
def test_wrong_options_of_the_tails_module(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of"):
        setriton.BatchNormSqueezeExcite(8, **{option: "tanh"})


@pytest.mark.parametrize("ratio", ["a", None, 1j, True, torch.tensor(0.5)])
def test_wrong_types_of_ratios(ratio: Any) -> None:
    for module in (setriton.SqueezeExcite, setriton.BatchNormSqueezeExcite):
        with pytest.raises(TypeError, match="rd_ratio must be a number; got"):
            module(8, rd_ratio=ratio)
    with pytest.raises(TypeError, match="rd_ratio must be a number; got"):
        setriton.create_model("se_resnet20", rd_ratio=ratio)


@pytest.mark.parametrize("options", [{"channels": 8.0}, {"channels": "8"}, {"channels": 8, "rd_channels": 2.5}])
def test_wrong_types_of_module_options(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"channels must be an int; got"):
        setriton.SqueezeExcite(**options)
    with pytest.raises(TypeError, match=r"channels must be an int; got"):
        setriton.BatchNormSqueezeExcite(**options)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'squeeze'"):
        setriton.squeeze  # noqa: B018

"""Every operation, in every way it is written, gives the same results; and the maps are those of real networks."""

import functools
import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from setriton.bench.cases import (
    BOTH,
    DTYPES,
    EAGER,
    EFFICIENTNET,
    FORWARD,
    IMPLEMENTATIONS,
    LAYOUTS,
    OPERATIONS,
    RESNET,
    Group,
    Operation,
    Shape,
    Workload,
    implementations,
    plan,
)

CPU = torch.device("cpu")
TINY = Shape(channels=24, size=5, reduced=3)
# Compiles in a tenth of Inductor's time, through the same graphs.
aot_eager = functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """All operations share their code, and Dynamo keeps eight graphs of one function."""
    torch.compiler.reset()


every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


@every_operation
def test_implementations_agree(operation: Operation) -> None:
    torch.manual_seed(0)
    work = Workload(operation, TINY, 3, CPU, torch.float64)
    functions = implementations(operation, aot_eager)
    assert tuple(functions) == IMPLEMENTATIONS
    running = work.parameters[2:4] if operation.normalized else []
    begin = [t.clone() for t in running]
    for direction in operation.passes:
        outputs = {}
        for name, function in functions.items():
            for tensor, value in zip(running, begin, strict=True):
                tensor.copy_(value)
            outputs[name] = [*work.outputs(function, direction), *(t.clone() for t in running)]
        for found in outputs.values():
            torch.testing.assert_close(found, outputs[EAGER], rtol=1e-10, atol=1e-10)
        moved = [not torch.equal(a, b) for a, b in zip(running, begin, strict=True)]
        assert moved == [operation.training] * len(running)


@every_operation
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_calls_in_the_precision_that_is_timed(operation: Operation, layout: torch.memory_format) -> None:
    work = Workload(operation, TINY, 2, CPU, torch.bfloat16, layout, rotate_bytes=20_000)
    for direction in operation.passes:
        for function in implementations(operation, aot_eager).values():
            outputs: Any = work.call(function, direction)()
            y, *gradients = outputs
            assert y.dtype == torch.bfloat16
            assert y.is_contiguous(memory_format=layout)
            assert y.requires_grad == (direction == BOTH or operation.training)
            maps = (2 if operation.residual else 1) if direction == BOTH else 0
            assert [t.shape for t in gradients[:maps]] == [y.shape] * maps


@every_operation
def test_calls_rotate_through_maps(operation: Operation) -> None:
    seen: list[Tensor] = []

    def function(x: Tensor, *rest: Tensor | None) -> Tensor:
        seen.append(x)
        return x

    work = Workload(operation, TINY, 1, CPU, rotate_bytes=10_000)
    calls = [work.call(function, FORWARD) for _ in range(2)]
    bytes_of_a_set = (1 + operation.residual + (BOTH in operation.passes)) * 24 * 25 * 2
    assert work.copies == 2 + 10_000 // bytes_of_a_set
    for index in range(work.copies):
        calls[index % 2]()
    assert len({x.data_ptr() for x in seen}) == work.copies
    calls[0]()
    assert seen[-1].data_ptr() == seen[0].data_ptr()


def test_bytes_that_the_arithmetic_moves() -> None:
    elements = 2 * 24 * 25

    def moved(name: str, direction: str, dtype: torch.dtype = torch.bfloat16) -> int:
        return Workload(OPERATIONS[name], TINY, 2, CPU, dtype).bytes_moved(direction)

    assert moved("squeeze-excite", FORWARD) == 3 * 2 * elements
    assert moved("squeeze-excite", BOTH, torch.float32) == 7 * 4 * elements
    assert moved("tail-training", BOTH) == 10 * 2 * elements + 3 * elements // 8
    assert moved("efficientnet-training", BOTH) == 9 * 2 * elements


def test_the_copy_moves_as_many_bytes() -> None:
    work = Workload(OPERATIONS["squeeze-excite"], TINY, 2, CPU)
    copy = work.copy_call(FORWARD)
    copy()
    source, target = next(inspect.getclosurevars(copy).nonlocals["turn"])
    assert 2 * source.nbytes == work.bytes_moved(FORWARD)
    assert source.nbytes == target.nbytes


def maps_of(network: str, module: str) -> set[Shape]:
    """What the SE modules of a timm network meet in an image of 224 pixels."""
    found = set()

    def record(se: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        reduce: Any = se.fc1 if hasattr(se, "fc1") else se.conv_reduce
        found.add(Shape(inputs[0].shape[1], inputs[0].shape[2], reduce.out_channels))

    with torch.device("meta"):
        model = timm.create_model(network).eval()
        for se in model.modules():
            if type(se).__name__ == module:
                se.register_forward_hook(record)
        model(torch.empty(1, 3, 224, 224))
    return found


@pytest.mark.parametrize("network", ["legacy_seresnet50", "legacy_seresnet152", "legacy_senet154"])
def test_maps_of_the_resnets(network: str) -> None:
    assert maps_of(network, "SEModule") == set(RESNET)


def test_maps_of_efficientnet() -> None:
    assert set(EFFICIENTNET) <= maps_of("efficientnet_b0", "SqueezeExcite")


def test_plan_begins_with_what_tells_most() -> None:
    groups = plan((128, 1), ())
    assert str(groups[0]) == "tail-training 128x256x56x56 R=16"
    assert len(groups) == 2 * (3 * 4 + 2 * 7)
    assert [g.batch for g in groups] == [128] * 26 + [1] * 26
    chosen = plan((8,), ("squeeze-excite", "tail-training"))
    assert [g.operation.name for g in chosen] == ["squeeze-excite"] * 4 + ["tail-training"] * 4
    assert Group(OPERATIONS["squeeze-excite"], RESNET[0], 8) == chosen[0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_parameters_as_mixed_precision_has_them(dtype: torch.dtype) -> None:
    gamma, beta, mean, var, *weights = Workload(OPERATIONS["tail-training"], TINY, 2, CPU, dtype).parameters
    assert {t.dtype for t in (gamma, beta, mean, var)} == {torch.float32}
    assert {t.dtype for t in weights} == {dtype}
    assert [t.requires_grad for t in (gamma, beta, mean, var, *weights)] == [True] * 2 + [False] * 2 + [True] * 4

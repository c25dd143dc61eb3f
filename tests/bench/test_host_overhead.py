"""What a call costs the host, setriton's against eager PyTorch's, on a map too small for the device to matter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from setriton.bench.cases import BOTH, EAGER, FORWARD, FUSED, OPERATIONS, Shape, Workload, as_written, fused

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: the host's overhead is left out")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _nan_filled_empty() -> None:
    """Not here: filling what torch.empty returns is a launch more."""


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("implementation", [EAGER, FUSED])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("operation", ["squeeze-excite", "tail-training"])
def test_host_overhead(benchmark: Any, operation: str, direction: str, implementation: str) -> None:
    op = OPERATIONS[operation]
    make: Callable[..., Any] = {EAGER: as_written, FUSED: fused}[implementation]
    work = Workload(op, Shape(channels=16, size=2, reduced=4), 1, DEVICE)
    call = work.call(make(op), direction)
    benchmark.group = f"{operation}, {direction}"
    # The queue is empty when a call begins, so no call waits for room in it.
    benchmark.pedantic(call, setup=synchronize, rounds=500, warmup_rounds=20)

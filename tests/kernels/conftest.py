"""Kernel tests run on the GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1) on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from time_limit import time_limit

from setriton.bench.instruments.memory import check_memory
from setriton.kernels import schedule
from setriton.ops import INTERPRET

# Of one test, compiling included.
SECONDS_ON_A_GPU = 60.0

if INTERPRET:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    _cast = InterpreterBuilder.cast_impl

    def _round_to_nearest(builder: Any, src: Any, dst_type: Any) -> Any:
        """The interpreter cuts float32 to bfloat16 where GPUs round to nearest even; do as they do."""
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _cast(builder, src, dst_type)
        bits = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(bits, dst_type.scalar)

    InterpreterBuilder.cast_impl = _round_to_nearest

    def _sum(reduction: Any, values: Any) -> Any:
        """NumPy adds rows one after another where GPUs add in a tree; along the last axis it does as they do."""
        data = np.moveaxis(values.handle.data, reduction.axis, -1) if reduction.axis is not None else values.handle.data
        total = np.sum(np.ascontiguousarray(data), axis=None if reduction.axis is None else -1, keepdims=False)
        if reduction.keep_dims and reduction.axis is not None:
            total = np.expand_dims(total, reduction.axis)
        return reduction.to_tensor(total.astype(values.handle.data.dtype), values.dtype)

    ReduceOps.sum = _sum


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available() and not INTERPRET:
        return torch.device("cuda")
    if not INTERPRET:
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1 (make test runs them so)")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _ended_in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU a launch that never ends would leave no word of which it was."""
    if INTERPRET or not torch.cuda.is_available():
        yield
        return
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    with time_limit(SECONDS_ON_A_GPU, print if reporter is None else reporter.write_line, request.node.nodeid):
        yield


@pytest.fixture(autouse=True)
def _checked_memory() -> Iterator[None]:
    """Every interpreted launch: in bounds, nothing read that nobody wrote, no race, counters left at zero."""
    if not INTERPRET:
        yield
        return
    with check_memory():
        yield
    buffers = schedule._local.__dict__.get("buffers", {})
    left = [buffer for buffer in buffers.values() if buffer.device.type == "cpu" and buffer.any()]
    if left:
        buffers.clear()
    assert not left, "a launch has left counters for the next one"

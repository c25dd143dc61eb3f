"""Kernel tests run on the GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1) on the CPU."""

from typing import Any

import pytest
import torch

from setriton.ops import INTERPRET

if INTERPRET:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _cast = InterpreterBuilder.cast_impl

    def _round_to_nearest(builder: Any, src: Any, dst_type: Any) -> Any:
        """The interpreter cuts float32 to bfloat16 where GPUs round to nearest even; do as they do."""
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _cast(builder, src, dst_type)
        bits = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(bits, dst_type.scalar)

    InterpreterBuilder.cast_impl = _round_to_nearest


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available() and not INTERPRET:
        return torch.device("cuda")
    if not INTERPRET:
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1 (make test runs them so)")
    return torch.device("cpu")

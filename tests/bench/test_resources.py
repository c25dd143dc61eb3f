"""Every kernel compiles for every target: no spills, and 16-byte accesses on aligned maps."""

from collections.abc import Callable

import pytest
import torch
from oracle import make_inputs

triton = pytest.importorskip("triton")

from setriton.bench.resources import TARGETS, resources  # noqa: E402
from setriton.kernels import squeeze_excite as kernels  # noqa: E402


def training_step(dtype: torch.dtype, channels_last: bool) -> Callable[[], None]:
    x, w1, b1, w2, b2, dy = make_inputs(2, 256, 16, 28, 28, dtype, channels_last=channels_last)

    def step() -> None:
        _, *saved = kernels.squeeze_excite(x, w1, b1, w2, b2, "relu", "sigmoid")
        kernels.squeeze_excite_backward(dy, x, w1, w2, *saved, "relu", "sigmoid")

    return step


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_accesses(target: str, dtype: torch.dtype, channels_last: bool) -> None:
    found = resources(training_step(dtype, channels_last), target)
    assert {r.kernel for r in found} >= {"_squeeze_kernel", "_scale_kernel", "_scale_bwd_reduce_kernel", "_scale_bwd_kernel"}
    for launch in found:
        assert launch.spilled == 0, launch
        # A tile of the excitation's 16-bit weights is 1,024 elements, 8 bytes for each of 128 threads.
        assert launch.widest_access >= (64 if launch.kernel == "_linear_kernel" else 128), launch
        assert launch.shared <= 48 * 1024, launch


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        resources(lambda: None, "sm_10")

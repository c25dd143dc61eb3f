"""Every kernel compiles for every target: no spills, and 16-byte accesses on aligned maps."""

import pytest
import torch

triton = pytest.importorskip("triton")

from setriton.bench.resources import TARGETS, resources, training_step  # noqa: E402


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_accesses(target: str, dtype: torch.dtype, channels_last: bool) -> None:
    found = resources(training_step(dtype=dtype, channels_last=channels_last), target)
    sweeps = {"_squeeze_kernel", "_scale_kernel", "_scale_bwd_reduce_kernel", "_scale_bwd_kernel"}
    assert {launch.kernel for launch in found} == sweeps | {"_linear_kernel"}
    for launch in found:
        assert launch.spilled == 0, launch
        # A tile of the weights is 512 elements for 128 threads: 4 of them, 8 bytes in 16-bit dtypes, for each.
        assert launch.widest_access >= (64 if launch.kernel == "_linear_kernel" else 128), launch
        assert launch.shared <= 48 * 1024, launch


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        resources(lambda: None, "sm_10")

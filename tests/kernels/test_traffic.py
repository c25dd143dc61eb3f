"""The bytes that kernels move, and the instrument that counts them."""

import pytest
import torch
import triton
import triton.language as tl

from setriton.bench.traffic import LINE, Traffic, measure_traffic, squeeze_excite_traffic
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="traffic is counted in the interpreter")


def moved(traffic: Traffic, kernel: str) -> dict[str, tuple[int, int]]:
    """Bytes of sectors loaded and stored by a kernel, for each of its tensors."""
    (launch,) = (launch for launch in traffic.launches if launch.kernel == kernel)
    return {name: (access.loaded_sectors, access.stored_sectors) for name, access in launch.tensors.items()}


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_squeeze_excite_walks_the_map_three_and_four_times(channels_last: bool) -> None:
    x, forward, backward = squeeze_excite_traffic(channels_last=channels_last, l2_bytes=2**20)
    assert moved(forward, "_squeeze_kernel")["x"] == (x.nbytes, 0)
    assert moved(forward, "_scale_kernel") | {"z2": None} == {"x": (x.nbytes, 0), "y": (0, x.nbytes), "z2": None}
    reduce, apply = moved(backward, "_scale_bwd_reduce_kernel"), moved(backward, "_scale_bwd_kernel")
    assert reduce["dy"] == reduce["x"] == apply["dy"] == (x.nbytes, 0)
    assert apply["dx"] == (0, x.nbytes)
    # What is left is O(N*C), and the weights: under 8 % of so small a map.
    assert 3 < forward.passes(x) < 3.25
    assert 4 < backward.passes(x) < 4.33
    # A map that fits the L2 is read from HBM once.
    assert 2 < forward.hbm_passes(x) < 2.2


@triton.jit
def _one_channel_kernel(x_ptr, y_ptr, HW, C, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK) * C + tl.program_id(0)
    tl.store(y_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + offs, tl.arange(0, BLOCK) < HW, 0.0).to(tl.float32)))


def test_scattered_reads_do_not_look_good() -> None:
    """One channel of a channels_last map per program: each 2-byte element costs a 32-byte sector."""
    x, y = torch.randn(64, 32).to(torch.bfloat16), torch.zeros(32)
    traffic = measure_traffic(lambda: _one_channel_kernel[(32,)](x, y, 64, 32, BLOCK=64))
    access = traffic.launches[0].tensors["x"]
    assert (access.loaded, access.loaded_sectors) == (x.nbytes, 16 * x.nbytes)


@triton.jit
def _copy_twice_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    for _ in range(2):
        for start in range(0, N, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            tl.store(y_ptr + offs, tl.load(x_ptr + offs, offs < N), offs < N)


def starting_at_a_line(elements: int) -> torch.Tensor:
    buffer = torch.zeros(elements + LINE // 4)
    start = -buffer.data_ptr() % LINE // 4
    return buffer[start : start + elements]


@pytest.mark.parametrize(
    ("l2_bytes", "loaded", "stored"), [(0, 2, 2), (2**11, 2, 2), (2**14, 1, 1)], ids=["no cache", "small", "large"]
)
def test_cache_model(l2_bytes: int, loaded: int, stored: int) -> None:
    x, y = (starting_at_a_line(1024) for _ in range(2))
    traffic = measure_traffic(lambda: _copy_twice_kernel[(1,)](x, y, 1024, BLOCK=256), l2_bytes)
    assert (traffic.hbm_loaded / x.nbytes, traffic.hbm_stored / x.nbytes) == (loaded, stored)
    assert traffic.requested == 4 * x.nbytes

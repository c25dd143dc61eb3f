"""The bytes that kernels move, and the instrument that counts them."""

import pytest
import torch
import triton
import triton.language as tl

from setriton.bench.passes import CASES, LAYOUTS, Case, count_passes, traffic_of
from setriton.bench.traffic import LINE, measure_traffic
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="traffic is counted in the interpreter")


# Parameters of kernels that are maps.
MAPS = ("x", "residual", "y", "bits", "dy", "dy_skip", "g", "dx")
# Passes requested forward and backward, O(N C) terms and all; 3 % more are let pass.
TARGETS = {
    "squeeze_excite": (3.0, 4.0),
    "tail, training": (4.07, 6.15),
    "tail, two gradients joined": (4.07, 7.1),
    "tail, evaluation": (4.0, None),
    "BN-SiLU-SE, training": (4.0, 5.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_passes_over_the_map(case: Case, layout: str) -> None:
    """Maps are read and written as often as the arithmetic says, exactly; vectors and weights add 3 % at most."""
    x, measured = traffic_of(case, (16, 32, 20, 20), layout, l2_bytes=2**20)
    needs = (case.forward, case.backward)
    targets = TARGETS.get(case.name, (None, None))
    for traffic, needed, target in zip(measured, needs, targets, strict=False):
        assert needed is not None
        large = sum(
            access.loaded_sectors + access.stored_sectors
            for launch in traffic.launches
            for name, access in launch.tensors.items()
            if name in MAPS
        )
        # One bit in 16 of bf16: rows of bits end with a sector, 400 pixels with the 416th.
        assert large / x.nbytes == pytest.approx(needed, abs=0.01), [launch.tensors for launch in traffic.launches]
        assert target is None or traffic.passes(x) <= 1.03 * target
    assert len(measured[0].launches) <= 3
    assert all(len(traffic.launches) <= 4 for traffic in measured[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["squeeze_excite", "tail, evaluation", "BN-SiLU-SE, evaluation"])
def test_what_is_read_again_is_in_the_cache(name: str, layout: str) -> None:
    """One launch, whose second read of x is made from an L2 that holds a third of x: HBM sees x once."""
    (case,) = (case for case in CASES if case.name == name)
    x, measured = traffic_of(case, (48, 32, 16, 16), layout, l2_bytes=2**18)
    assert x.nbytes == 3 * 2**18
    assert len(measured[0].launches) == 1
    assert measured[0].hbm_passes(x) == pytest.approx(case.forward_hbm, rel=0.03)


def test_rows_of_the_table() -> None:
    rows = list(count_passes(2, 32, 8, 2**20, cases=CASES[:2]))
    assert [(row.case, row.layout, row.direction) for row in rows] == [
        (case.name, layout, direction)
        for layout in LAYOUTS
        for case in CASES[:2]
        for direction in ("forward", "backward")
    ]
    assert all(row.passes >= row.needed - 0.01 for row in rows)
    with pytest.raises(ValueError, match="at least 1"):
        next(count_passes(0, 32, 8, 2**20))


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

"""The memory check sees what it is for: kernels that are wrong in one way each, and their neighbours that are right.

`tests/kernels/conftest.py` has it check every launch of every test; here faults are planted.
"""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from setriton.bench.instruments.memory import check_memory
from setriton.bench.instruments.unwritten import POISON, bytes_of
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="memory is checked in the interpreter")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, first, count, limit, BLOCK: tl.constexpr):
    offs = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs < limit) & (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < count)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask), mask)


def copy(x: Tensor, y: Tensor, first: int = 0, count: int = 16, limit: int = 16) -> None:
    _copy_kernel[(2,)](x, y, first, count, limit, BLOCK=8)


def fails(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(Exception, match=message):
        call()


def test_what_is_masked_off_is_not_touched() -> None:
    x, y = torch.randn(16), torch.empty(16)
    copy(x, y)
    assert torch.equal(x, y)
    copy(torch.randn(11), torch.empty(11), limit=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_addresses_beyond_a_tensor(dtype: torch.dtype) -> None:
    x, y = torch.zeros(16, dtype=dtype), torch.zeros(15, dtype=dtype)
    size = y.nbytes
    fails(
        rf"OutOfBounds.*program 1 at test_memory.*stores 1 elements.*outside y \(15\).* of {size}", lambda: copy(x, y)
    )
    fails(r"OutOfBounds.*program 1 .*loads 1 elements.*outside x \(15\)", lambda: copy(y, x))
    fails(r"OutOfBounds.*program 0 .*loads 3 elements.*outside x", lambda: copy(x, x, first=-3))
    fails(r"OutOfBounds.*outside x \(0\)", lambda: copy(x[:0], x))


def test_addresses_in_another_tensor() -> None:
    """That the memory belongs to somebody, even to the same storage, makes no access right."""
    both = torch.randn(32)
    x, y = both[:16], both[16:]
    copy(x, y)
    fails(r"OutOfBounds.*outside x \(16\)", lambda: copy(x, y, first=4, limit=20))
    # x is a matrix whose rows stand apart: what is between them is nobody's.
    rows = torch.randn(4, 8)[:, :4]
    fails(r"OutOfBounds.*loads 4 elements.*outside x \(4, 4\)", lambda: copy(rows, torch.zeros(28), limit=28, count=8))
    copy(rows, torch.zeros(28), limit=4)


@triton.jit
def _atomic_kernel(x_ptr, index):
    tl.atomic_add(x_ptr + index, 1)


def test_atomics_beyond_a_tensor() -> None:
    counter = torch.zeros(2, dtype=torch.int32)
    _atomic_kernel[(3,)](counter, 1)
    assert counter.tolist() == [0, 3]
    fails("OutOfBounds.*changes 1 elements", lambda: _atomic_kernel[(3,)](counter, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize(
    "empty",
    [
        lambda dtype: torch.empty(16, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(16, dtype=dtype)),
        lambda dtype: torch.zeros(2, dtype=dtype).new_empty(16),
        lambda dtype: torch.empty_strided((16,), (1,), dtype=dtype),
        lambda dtype: torch.empty(16, dtype=dtype).clone(),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided", "copied"],
)
def test_what_nobody_wrote(empty: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    x, y = empty(dtype), torch.zeros(16, dtype=dtype)
    fails("Unwritten.*program 0 at .* reads elements of x .* that nobody wrote", lambda: copy(x, y))
    x[:8] = 1
    copy(x, y, limit=8)
    fails("Unwritten.*program 1 at .* reads elements of x", lambda: copy(x, y))
    x.fill_(2)
    copy(x, y)
    assert (y == 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_poison_is_not_a_number(dtype: torch.dtype) -> None:
    assert torch.empty(3, dtype=dtype).isnan().all()


def test_what_nobody_wrote_in_another_layout() -> None:
    x = torch.empty(4, 4).t().contiguous()
    fails("Unwritten.*program 0", lambda: copy(x.view(16), torch.zeros(16)))


def test_what_kernels_wrote_is_known_byte_by_byte() -> None:
    x, y, z = torch.randn(16), torch.empty(16), torch.zeros(16)
    copy(x, y, limit=11)
    copy(y, z, limit=11)
    assert torch.equal(z[:11], x[:11])
    fails("Unwritten.*program 1", lambda: copy(y, z, limit=12))
    x_bytes, y_bytes = x.view(torch.uint8), y.view(torch.uint8)
    copy(x_bytes, y_bytes[44:], limit=1)
    fails("Unwritten.*program 1", lambda: copy(y, z, limit=12))
    copy(y_bytes[44:], x_bytes, limit=1)
    fails("Unwritten.*program 0", lambda: copy(y_bytes[44:], x_bytes, limit=2))


def test_poison_that_a_kernel_wrote_is_a_value() -> None:
    x, y, z = torch.zeros(16, dtype=torch.uint8), torch.empty(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    content = bytes_of(x.untyped_storage())
    content[1:8] = content[9:] = POISON.tobytes()[1]
    copy(x, y)
    copy(y, z)
    assert torch.equal(x, z)


@triton.jit
def _masked_sum_kernel(x_ptr, y_ptr, count, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, offs < count, 0.0) if HAS_OTHER else tl.load(x_ptr + offs, offs < count)
    tl.store(y_ptr, tl.sum(x.to(tl.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_lanes_that_are_masked_off_hold_anything(dtype: torch.dtype) -> None:
    x = torch.ones(5, dtype=dtype)
    y = torch.zeros(1, dtype=torch.float64)
    _masked_sum_kernel[(1,)](x, y, 5, HAS_OTHER=True, BLOCK=8)
    assert y == 5
    _masked_sum_kernel[(1,)](x, y, 5, HAS_OTHER=False, BLOCK=8)
    assert y != 5


@triton.jit
def _descriptor_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, 4], [4, 1], [BLOCK, 4])
    y = tl.make_tensor_descriptor(y_ptr, [rows, 4], [4, 1], [BLOCK, 4])
    first = tl.program_id(0) * BLOCK
    y.store([first, 0], x.load([first, 0]))


def test_tensor_descriptors() -> None:
    x, y = torch.randn(6, 4), torch.empty(6, 4)
    _descriptor_kernel[(2,)](x, y, 6, BLOCK=4)
    assert torch.equal(x, y)
    fails(r"OutOfBounds.*program 1 .*loads 4 elements .*outside x \(6, 4\)",
          lambda: _descriptor_kernel[(2,)](x, y, 7, BLOCK=4))  # fmt: skip
    fails("Unwritten.*program 1", lambda: (x.copy_(torch.empty(6, 4)), x[:4].zero_(),
                                           _descriptor_kernel[(2,)](x, y, 6, BLOCK=4)))  # fmt: skip


@triton.jit
def _copy_by_descriptor_kernel(x_desc, y_ptr):
    tl.store(y_ptr + tl.arange(0, 8)[:, None] * 4 + tl.arange(0, 4)[None, :], x_desc.load([0, 0]))


def test_descriptors_made_by_the_host() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.randn(8, 4), torch.empty(8, 4)
    _copy_by_descriptor_kernel[(1,)](TensorDescriptor.from_tensor(x, [8, 4]), y)
    assert torch.equal(x, y)
    fails(
        "Unwritten",
        lambda: _copy_by_descriptor_kernel[(1,)](TensorDescriptor.from_tensor(torch.empty(8, 4), [8, 4]), y),
    )


def test_an_empty_grid_and_empty_tensors() -> None:
    x, y = torch.empty(0), torch.empty(0)
    _copy_kernel[(0,)](x, y, 0, 0, 0, BLOCK=8)
    copy(x, y, count=0)
    fails("OutOfBounds", lambda: copy(torch.empty(0), y, count=1))


def test_checks_may_be_nested() -> None:
    x, y = torch.randn(16), torch.zeros(16)
    with check_memory():
        copy(x, y)
        fails("Unwritten", lambda: copy(torch.empty(16), y))
    fails("OutOfBounds", lambda: copy(x, y, first=4, limit=20))
    assert torch.equal(x, y)

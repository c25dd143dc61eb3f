"""Races and waits that the memory check sees: programs that nothing orders, no real arrivals, endless waits."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from setriton.bench.instruments.schedules import side_by_side
from setriton.kernels import schedule
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="memory is checked in the interpreter")


def fails(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(Exception, match=message):
        call()


@triton.jit
def _same_place_kernel(x_ptr, y_ptr, READS: tl.constexpr, STORES: tl.constexpr):
    pid = tl.program_id(0)
    if STORES == 1 and pid == 0:
        tl.store(x_ptr, 1.0)
    if STORES == 2:
        tl.store(x_ptr, 1.0)
    if READS:
        tl.store(y_ptr + pid, tl.load(x_ptr))


def test_programs_that_touch_the_same_bytes() -> None:
    x, y = torch.zeros(1), torch.zeros(4)
    _same_place_kernel[(4,)](x, y, READS=True, STORES=0)
    _same_place_kernel[(4,)](x, y, READS=False, STORES=1)
    _same_place_kernel[(1,)](x, y, READS=True, STORES=2)
    message = "Race.*program 1 at .* stores elements of x .* that programs 0 have stored; no arrival orders them"
    fails(message, lambda: _same_place_kernel[(4,)](x, y, READS=False, STORES=2))
    fails("Race.*program 1 .* reads elements of x .* programs 0 have stored",
          lambda: _same_place_kernel[(4,)](x, y, READS=True, STORES=1))  # fmt: skip


@triton.jit
def _hand_over_kernel(
    counter_ptr,
    x_ptr,
    y_ptr,
    programs,
    HOW: tl.constexpr,
    AFTER: tl.constexpr,
    RESETS: tl.constexpr,
    WAITS: tl.constexpr,
    SCOPE: tl.constexpr,
):
    """All but the last program write x; the last one adds it up, then writes it."""
    pid = tl.program_id(0)
    if pid < programs - 1:
        if not AFTER:
            tl.store(x_ptr + pid, 1.0)
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem=HOW, scope=SCOPE)
        if AFTER:
            tl.store(x_ptr + pid, 1.0)
    else:
        if RESETS:
            tl.store(counter_ptr, 0)
        while tl.atomic_add(counter_ptr, 0, sem=WAITS) < programs - 1:
            pass
        total = 0.0
        for other in range(0, programs - 1):
            total += tl.load(x_ptr + other)
            tl.store(x_ptr + other, 0.0)
        tl.store(y_ptr, total)


def hand_over(
    how: str = "release", after: bool = False, resets: bool = False, waits: str = "acquire", scope: str = "gpu"
) -> float:
    counter, x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(4), torch.empty(1)
    _hand_over_kernel[(5,)](counter, x, y, 5, how, after, resets, waits, scope)
    return y.item()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_an_arrival_orders_programs(seed: int | None) -> None:
    if seed is None:
        assert hand_over() == hand_over("acq_rel", waits="acq_rel") == 4
        return
    with side_by_side(seed):
        assert hand_over() == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "relaxed"}, "reads elements of x .* stored"),
        ({"waits": "relaxed"}, "reads elements of x .* stored"),
        ({"scope": "cta"}, "reads elements of x .* stored"),
        ({"after": True}, "reads elements of x .* stored"),
        ({"resets": True}, "stores elements of counter .* changed atomically"),
    ],
    ids=[
        "relaxed arrival",
        "relaxed wait",
        "arrival within a program",
        "stores after arriving",
        "resets what others count",
    ],
)
def test_what_is_no_arrival(arguments: dict[str, Any], message: str) -> None:
    fails(f"Race.*program 4 at .* {message}; no arrival orders them", lambda: hand_over(**arguments))


@triton.jit
def _overwrite_kernel(counter_ptr, x_ptr, y_ptr, WAITS: tl.constexpr):
    """The first program reads x, the second writes it."""
    if tl.program_id(0) == 0:
        tl.store(y_ptr, tl.load(x_ptr))
        schedule.arrive(counter_ptr)
    else:
        if WAITS:
            schedule.wait_for(counter_ptr, 1)
        tl.store(x_ptr, 1.0)


def test_what_others_may_still_read_is_not_overwritten() -> None:
    counter, x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1)
    _overwrite_kernel[(2,)](counter, x, y, WAITS=True)
    fails("Race.*program 1 at .* stores elements of x .* programs 0 have read",
          lambda: _overwrite_kernel[(2,)](counter.zero_(), x, y, WAITS=False))  # fmt: skip


def test_a_wait_for_a_later_program() -> None:
    """Where programs run one after another, the interpreter would never come back."""
    counter, x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1)
    message = r"Deadlock.*program 0 at .* waits for counter\[0\]: sees 0, compares it with 1; changed by nobody"
    fails(message, lambda: _late_kernel[(2,)](counter, x, y))


@triton.jit
def _late_kernel(counter_ptr, x_ptr, y_ptr):
    if tl.program_id(0) == 0:
        schedule.wait_for(counter_ptr, 1)
    else:
        schedule.arrive(counter_ptr)


@triton.jit
def _plain_wait_kernel(counter_ptr):
    while tl.load(counter_ptr) == 0:
        pass


@pytest.mark.parametrize("seed", [None, 0])
def test_a_wait_by_plain_loads(seed: int | None) -> None:
    with contextlib.nullcontext() if seed is None else side_by_side(seed):
        fails(r"Deadlock.*program 0 at .* waits for counter\[0\]: sees the same",
              lambda: _plain_wait_kernel[(1,)](torch.zeros(1, dtype=torch.int32)))  # fmt: skip

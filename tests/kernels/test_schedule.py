"""Launches whose programs wait for each other: any order, any number of them at once, and several launches in a row."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from setriton.bench.instruments.schedules import side_by_side
from setriton.bench.instruments.waits import Deadlock
from setriton.kernels import config, schedule
from setriton.kernels.forward import BatchNorm, Excitation, Forward, forward
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the order of programs is chosen in the interpreter")


@triton.jit
def _find_kernel(out_ptr, n_statistics, n_finalize, n_squeeze, n_hidden, n_gate, n_apply, groups):
    ticket = tl.program_id(0)
    phase, group, index = schedule.find_piece(
        ticket, n_statistics, n_finalize, n_squeeze, n_hidden, n_gate, n_apply, groups
    )
    tl.store(out_ptr + 3 * ticket, phase)
    tl.store(out_ptr + 3 * ticket + 1, group)
    tl.store(out_ptr + 3 * ticket + 2, index)


@pytest.mark.parametrize(
    "counts", [(4, 2, 3, 1, 2, 3), (0, 0, 2, 1, 1, 2), (0, 3, 0, 2, 2, 0), (5, 0, 0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_every_piece_has_one_ticket_after_those_it_waits_for(counts: tuple[int, ...], groups: int) -> None:
    once, repeated = sum(counts[:2]), sum(counts[2:])
    tickets = once + groups * repeated
    out = torch.zeros(tickets, 3, dtype=torch.int32)
    _find_kernel[(tickets,)](out, *counts, groups)
    order = {tuple(piece): ticket for ticket, piece in enumerate(out.tolist())}
    want = {(phase, 0, i) for phase in (0, 1) for i in range(counts[phase])}
    want |= {(phase, g, i) for phase in range(2, 6) for g in range(groups) for i in range(counts[phase])}
    assert set(order) == want
    for (phase, group, _), ticket in order.items():
        for (other, other_group, _), other_ticket in order.items():
            if other < phase and (other < 2 or other_group == group):
                assert other_ticket < ticket


def run(launches: int, training: bool, bn_act: str = "identity", n: int = 5) -> Forward:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    c, r = 40, 3
    x = randn(n, c, 4, 5).contiguous(memory_format=torch.channels_last)
    excitation = Excitation(randn(r, c), randn(r), randn(c, r), randn(c), "relu", "sigmoid")
    bn = BatchNorm(randn(c), randn(c), randn(c), randn(c).exp(), 1e-5, bn_act)
    picked = config.forward_config(x, training, 2**18)
    # A group of 4 KiB is one image.
    cut = dataclasses.replace(picked, launches=launches, group_kib=4, block_hw=8, tiles=2)
    return forward(x, excitation, bn, x, "relu", True, training, 0.1, config=cut)


def same(a: Forward, b: Forward) -> bool:
    return all(torch.equal(value, getattr(b, name)) for name, value in vars(a).items())


@pytest.mark.parametrize("launches", [1, 2, 3])
@pytest.mark.parametrize(("training", "bn_act"), [(False, "identity"), (True, "identity"), (True, "silu")])
@pytest.mark.parametrize(("seed", "resident"), [(0, None), (1, 3), (2, 1)])
def test_any_order_gives_the_same_bits(
    launches: int, training: bool, bn_act: str, seed: int, resident: int | None
) -> None:
    want = run(launches, training, bn_act)
    with side_by_side(seed, resident):
        found = run(launches, training, bn_act)
    assert same(found, want)


def test_counters_are_left_at_zero() -> None:
    with side_by_side(seed=3):
        first, second = (run(1, training=False, n=n) for n in (7, 5))
    assert same(second, run(1, training=False, n=5))
    assert first.y.shape[0] == 7
    assert not schedule.counters(torch.device("cpu"), 1).any()


@triton.jit
def _barrier_kernel(counter_ptr, programs):
    schedule.arrive(counter_ptr)
    schedule.wait_for(counter_ptr, programs)


def test_a_barrier_needs_all_programs_at_once() -> None:
    """The instrument sees what tickets avoid: the same waiting, on programs that have not started."""
    counter = torch.zeros(1, dtype=torch.int32)
    with side_by_side(seed=0):
        _barrier_kernel[(6,)](counter, 6)
    assert counter.item() == 6
    with side_by_side(seed=0, resident=2), pytest.raises(Exception, match="2 programs run and get nowhere, 4 have not"):
        _barrier_kernel[(6,)](counter.zero_(), 6)
    assert issubclass(Deadlock, RuntimeError)


@triton.jit
def _reversed_kernel(counter_ptr, out_ptr, programs):
    """Work by program number, in which the first waits for the last: what tickets in starting order cannot do."""
    pid = tl.program_id(0)
    if pid < programs - 1:
        schedule.wait_for(counter_ptr, 1)
    else:
        schedule.arrive(counter_ptr)
    tl.store(out_ptr + pid, 1)


def test_order_of_programs_matters_without_tickets() -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with side_by_side(seed=0, resident=3, in_order=True), pytest.raises(Exception, match="get nowhere"):
        _reversed_kernel[(4,)](counter, out, 4)


# A map (N, C, H, W), hidden units, and images a group: the last group has fewer tiles of images than a full one has.
GROUPED = {
    "130 images": ((130, 16, 2, 2), 1, 128),
    "147 images": ((147, 24, 3, 1), 3, 85),
    "MobileNetV3-large, last stage, scaled down": ((128, 40, 1, 1), 40, 83),
}


@pytest.mark.parametrize(("seed", "resident"), [(0, None), (1, 2), (2, 1)])
@pytest.mark.parametrize(("shape", "hidden", "group"), GROUPED.values(), ids=GROUPED.keys())
@pytest.mark.parametrize("bn_act", [None, "silu"])
def test_last_groups_of_fewer_tiles(
    shape: tuple[int, ...], hidden: int, group: int, bn_act: str | None, seed: int, resident: int | None
) -> None:
    """SE alone and BN-SiLU-SE in evaluation, one launch: every order ends, and none changes a bit."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    x = randn(*shape)
    c = shape[1]
    excitation = Excitation(randn(hidden, c), randn(hidden), randn(c, hidden), randn(c), "gelu", "sigmoid")
    bn = None if bn_act is None else BatchNorm(randn(c), randn(c), randn(c), randn(c).exp(), 1e-5, bn_act)
    bytes_of_group = group * x[0].nbytes
    cut = config.ForwardConfig(8, 64, 64, 4, launches=1, group_kib=-(-bytes_of_group // 1024))
    want = forward(x, excitation, bn, config=cut)
    with side_by_side(seed, resident):
        found = forward(x, excitation, bn, config=cut)
    assert same(found, want)

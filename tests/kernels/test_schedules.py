"""Launches of generated shapes and cuts with their programs side by side, in random orders: the bits of the usual one.

The memory check of `conftest.py` goes along: in each order, what programs read was written before, and nothing else.
"""

import contextlib
import dataclasses
import re
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from planted import count_the_tiles_of_the_group_at_hand
from torch import Tensor

from setriton.bench.instruments.schedules import side_by_side
from setriton.kernels import forward_kernel, schedule
from setriton.kernels.backward import Saved, backward
from setriton.kernels.config import ForwardConfig, SweepConfig
from setriton.kernels.forward import BatchNorm, Excitation, forward
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the order of programs is chosen in the interpreter")

KINDS = {
    "SE": (None, False),
    "BN-SE, evaluation": ("identity", False),
    "BN-SiLU-SE, evaluation": ("silu", False),
    "BN-SE, training": ("identity", True),
    "BN-SiLU-SE, training": ("silu", True),
}
# Images times tiles of one sweep: more only take longer.
MOST = 320


@dataclass(frozen=True)
class Drawn:
    """A map, hidden units, and how the launches are cut; `group` images are read again before the next are read."""

    kind: str
    n: int
    c: int
    r: int
    hw: int
    group: int
    launches: int
    block_hw: int
    block_c: int
    tiles: int
    channels_last: bool
    has_residual: bool

    @property
    def config(self) -> ForwardConfig:
        group_kib = max(1, self.group * self.c * self.hw * 4 // 1024)
        return ForwardConfig(self.block_hw, self.block_c, self.tiles, 4, launches=self.launches, group_kib=group_kib)


@st.composite
def cases(draw: st.DrawFn) -> Drawn:
    # Few images in groups of any size, or groups of several tiles of 64 images, the last of which may have fewer.
    n, group = draw(st.one_of(
        st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(66, 300), st.integers(66, 140))
    ))  # fmt: skip
    hw = draw(st.integers(1, max(1, min(40, MOST // n))))
    sizes = {
        "block_hw": draw(st.sampled_from([1, 2, 4, 16])),
        "block_c": draw(st.sampled_from([8, 16, 64])) if n <= 20 else 64,
    }
    found = Drawn(
        draw(st.sampled_from(sorted(KINDS))), n,
        draw(st.sampled_from([20, 33, 70, 131, 259] if n <= 20 else [1, 7, 20, 33])),
        draw(st.sampled_from([1, 3, 16, 17, 33, 70])), hw, group, draw(st.sampled_from([1, 1, 2, 3])),
        tiles=draw(st.sampled_from([1, 2, 8])), **sizes,
        channels_last=draw(st.booleans()), has_residual=draw(st.booleans()),
    )  # fmt: skip
    tiles = found.n * -(-found.hw // found.block_hw)
    assume(tiles <= MOST and tiles * -(-found.c // found.block_c) <= MOST)
    return found


def run(drawn: Drawn) -> dict[str, Tensor]:
    """All that a forward and, for small batches, a backward pass compute.

    With counters of its own: a failed launch leaves them as they are.
    """
    schedule._local.__dict__.clear()
    bn_act, training = KINDS[drawn.kind]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n, c, r = drawn.n, drawn.c, drawn.r
    layout = torch.channels_last if drawn.channels_last else torch.contiguous_format
    x, dy = (randn(n, c, drawn.hw, 1).contiguous(memory_format=layout) for _ in range(2))
    excitation = Excitation(randn(r, c), randn(r), randn(c, r), randn(c), "silu", "sigmoid")
    mean, var = randn(c), randn(c).exp()
    bn = None if bn_act is None else BatchNorm(randn(c), randn(c), mean, var, 1e-5, bn_act)
    residual, out_act = (x, "relu") if drawn.has_residual and bn_act == "identity" else (None, "identity")
    wants_bits = out_act == "relu"
    done = forward(x, excitation, bn, residual, out_act, wants_bits, training, 0.1, config=drawn.config)
    statistics = (done.mean, done.var) if training else (mean, var) if bn else (None, None)
    saved = Saved(x, done.bits if wants_bits else None, *statistics, done.squeezed, done.z1, done.e)
    if n > 40:
        return vars(done)
    config = SweepConfig(drawn.block_hw, drawn.block_c, drawn.tiles, 4)
    gradients = backward(dy, saved, excitation, bn, None, wants_bits, training, config=config)
    if bn is None:
        gradients = dataclasses.replace(gradients, dweight=None, dbias=None)
    found = {**vars(done), **{f"{name} of the backward pass": t for name, t in vars(gradients).items()}}
    return {name: t for name, t in found.items() if t is not None}


LAUNCHES = cases(), st.integers(0, 2**31), st.one_of(st.none(), st.integers(1, 5)), st.booleans()
FEW = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


@settings(FEW, max_examples=14, derandomize=True)
@given(*LAUNCHES)
def test_any_order_of_any_launch_gives_the_same_bits(
    drawn: Drawn, seed: int, resident: int | None, in_order: bool
) -> None:
    check(drawn, seed, resident, in_order)


@pytest.mark.full_autotune
@pytest.mark.timeout(4 * 3600)
@settings(FEW, max_examples=500)
@given(*LAUNCHES)
def test_any_order_of_many_launches(drawn: Drawn, seed: int, resident: int | None, in_order: bool) -> None:
    check(drawn, seed, resident, in_order)


def check(drawn: Drawn, seed: int, resident: int | None, in_order: bool) -> None:
    want = run(drawn)
    with side_by_side(seed, resident, in_order):
        found = run(drawn)
    assert [name for name, t in want.items() if not torch.equal(t, found[name])] == []


# Groups of 128 images, which are two tiles of the excitation's products, and of the two that are left, which are one.
TWO_GROUPS = Drawn("SE", 130, 16, 1, 4, 128, 1, 4, 16, 16, False, False)


def test_a_last_group_of_fewer_tiles() -> None:
    want = run(TWO_GROUPS)
    for seed, resident in ((0, None), (1, 2)):
        with side_by_side(seed, resident):
            found = run(TWO_GROUPS)
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_stores_beyond_the_chunks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    count_the_tiles_of_the_group_at_hand(monkeypatch)
    x, w1, w2 = torch.randn(130, 16, 2, 2), torch.randn(1, 16), torch.randn(16, 1)
    with pytest.raises(Exception, match=r"OutOfBounds.*stores 2 elements of 4 bytes outside chunks \(1, 130, 1\)"):
        forward(x, Excitation(w1, None, w2, None, "relu", "sigmoid"))
    schedule._local.__dict__.clear()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_who_waits_for_whom_is_told(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that never ends, in the usual order and in others: one tile of gates is made, and nobody says so."""

    def arrive_but_once(counter_ptr: Any) -> Any:
        caller = sys._getframe(1).f_locals
        if caller["phase"] == schedule.GATE and caller["group"] == 1 and caller["index"] == 0:
            return None
        return schedule.arrive(counter_ptr)

    monkeypatch.setattr(forward_kernel, "arrive", arrive_but_once)
    order = contextlib.nullcontext() if seed is None else side_by_side(seed)
    with order, pytest.raises(Exception, match="Deadlock") as caught:
        run(TWO_GROUPS)
    schedule._local.__dict__.clear()
    message = str(caught.value)
    who = r"program \d+ at schedule.py:\d+ wait_for in forward_kernel.py:\d+ forward_kernel waits for counters"
    assert re.search(who + r"\[\d+\]: sees 1, compares it with 2; changed by program \d+", message)
    told = (
        "nobody is left who could arrive: the other [0-9]+ programs have ended" if seed is not None else "nobody else"
    )
    assert re.search(told, message)

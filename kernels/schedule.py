"""Work that depends on other work inside one launch: ordered tickets instead of barriers.

A launch is a series of phases, each cut into pieces; a program takes the next ticket, finds its piece, waits until the
phase it reads from is complete, works, and says so. Forward progress: tickets are handed out in the order in which
programs start, and a piece waits only for pieces with smaller tickets. So whatever a program waits for is held by
programs that have started, and the smallest unfinished ticket waits for nothing; no number of resident programs is too
small, and no cooperative launch is needed. (A grid-wide barrier, in contrast, hangs unless all programs are resident.)

Where images do not depend on each other (evaluation), the phases are repeated for groups of images small enough that
what the squeeze reads is still in the L2 cache when y is made of it.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS = tl.constexpr(0)
FINALIZE = tl.constexpr(1)
SQUEEZE = tl.constexpr(2)
HIDDEN = tl.constexpr(3)
GATE = tl.constexpr(4)
APPLY = tl.constexpr(5)

# Counters of a launch, by place: tickets taken, pieces of statistics, channels finalized, pieces of the last phase;
# then for each group the pieces squeezed, hidden tiles complete, gate tiles complete; then one a hidden tile.
FIRST_GROUP = tl.constexpr(4)


def counters_of(groups: int, tiles: int) -> int:
    """Number of a launch's counters, with so many groups of so many hidden tiles."""
    return int(FIRST_GROUP.value) + groups * (3 + tiles)


@triton.jit
def arrive(counter_ptr):
    """Publish what this program wrote, count it, and return how many had arrived before."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def wait_for(counter_ptr, count):
    """Return once `count` pieces have arrived; what they wrote is visible then."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _pieces_before(stage, n_squeeze, n_rest, groups):
    return n_squeeze * tl.minimum(stage, groups) + n_rest * tl.minimum(tl.maximum(stage - 1, 0), groups)


@triton.jit
def find_piece(ticket, n_statistics, n_finalize, n_squeeze, n_hidden, n_gate, n_apply, groups):
    """(phase, group, index) of a ticket; n_squeeze to n_apply are counts of one group.

    The order: all statistics, all channels, then stages: the hidden layer of the group before, the squeeze of this
    group, the gate and the application of the group before. So a squeeze stands between the two short phases, whose
    latency it hides, and x is read again one group after it was read first.
    """
    phase = STATISTICS
    group = 0
    index = ticket
    if ticket >= n_statistics:
        phase += 1
        index -= n_statistics
        if index >= n_finalize:
            index -= n_finalize
            n_rest = n_hidden + n_gate + n_apply
            stage = index // (n_squeeze + n_rest)  # the first stage is shorter, so this is never too far
            while _pieces_before(stage + 1, n_squeeze, n_rest, groups) <= index:
                stage += 1
            index -= _pieces_before(stage, n_squeeze, n_rest, groups)
            group = stage - 1
            n_hidden = tl.where(stage > 0, n_hidden, 0)
            n_squeeze = tl.where(stage < groups, n_squeeze, 0)
            if index < n_hidden:
                phase += 2
            elif index < n_hidden + n_squeeze:
                phase += 1
                group = stage
                index -= n_hidden
            elif index < n_hidden + n_squeeze + n_gate:
                phase += 3
                index -= n_hidden + n_squeeze
            else:
                phase += 4
                index -= n_hidden + n_squeeze + n_gate
    return phase, group, index


@triton.jit
def reset(counters_ptr, n_counters, BLOCK: tl.constexpr):
    """Leave all counters at 0 for the next launch; for the program that knows it is the last."""
    for start in range(0, n_counters, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(counters_ptr + offs, tl.zeros((BLOCK,), tl.int32), offs < n_counters)


_local = threading.local()


def counters(device: torch.device, size: int) -> Tensor:
    """At least `size` int32 zeros, which the launch leaves at zero: one buffer for each thread, device and stream.

    Launches on one stream follow each other, so they can share it; a captured CUDA graph may be replayed on any stream,
    so it gets zeros of its own, in its own memory.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    buffers: dict[object, Tensor] = _local.__dict__.setdefault("buffers", {})
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = buffers.get((device, stream))
    if buffer is None or buffer.numel() < size:
        buffer = torch.zeros(max(size, 1024), dtype=torch.int32, device=device)
        buffers[device, stream] = buffer
    return buffer

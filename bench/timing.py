"""How calls are measured on a GPU: time between events, memory, kernels."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

METHOD = (
    "CUDA events around each call. Implementations and a copy of as many bytes take turns in 5 rounds; before each, "
    "one call that is not counted fills the queue. Every call reads other maps, in turn from 1 GiB of them."
)
# Four times the 256 MiB of AMD's MI300X, the largest last-level cache of a GPU (H200: 60 MB).
ROTATE_BYTES = 2**30
ROUNDS = 5
# Long enough for clocks to rise from idle after a compilation.
WARM_UP_SECONDS = 0.05
SAMPLES_OF_A_ROUND = (4, 100)
PROFILED_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median, 20th and 80th percentile of `samples` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int


@dataclass(frozen=True)
class Kernels:
    """What the GPU runs for a call, copies and fills included, and for how long, without the gaps between."""

    launches: float
    milliseconds: float


class Meter(Protocol):
    """What measures; tests have one that makes numbers up."""

    device: torch.device
    rotate_bytes: int

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        """Of each call, all measured side by side."""

    def peak_bytes(self, call: Call) -> int | None:
        """Memory allocated at the worst moment of a call, beyond what was there before; its results count."""

    def kernels(self, call: Call) -> Kernels | None:
        """None where there is no profiler."""


class GpuMeter:
    """Measures on the current GPU; `seconds` go into the samples of each call."""

    device = torch.device("cuda")
    rotate_bytes = ROTATE_BYTES

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds = seconds

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        counts = [self._samples_of_a_round(call) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(ROUNDS):
            for call, count, times in zip(calls, counts, samples, strict=True):
                times += self._sample(call, count)
        return [summary(times) for times in samples]

    def peak_bytes(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, call: Call) -> Kernels | None:
        # The profiler of torch 2.15 writes two lines to stderr whenever it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(PROFILED_CALLS):
                    call()
                torch.cuda.synchronize()
            events = profiler.events() or []
            times = [e.time_range.elapsed_us() for e in events if e.device_type.name == "CUDA"]
        except RuntimeError:  # the driver may keep its counters to itself; times and memory are worth having alone
            return None
        return Kernels(len(times) / PROFILED_CALLS, sum(times) / PROFILED_CALLS / 1e3) if times else None

    def _samples_of_a_round(self, call: Call) -> int:
        """Warm up, and see how many calls fill this call's share of a round."""
        call()
        torch.cuda.synchronize()
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < WARM_UP_SECONDS:
            call()
            torch.cuda.synchronize()
            calls += 1
        per_call = (time.perf_counter() - start) / calls
        fewest, most = SAMPLES_OF_A_ROUND
        return min(max(int(self.seconds / ROUNDS / per_call), fewest), most)

    def _sample(self, call: Call, count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        call()
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def summary(times: Sequence[float]) -> Timing:
    """Median and percentiles of two samples or more."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80, len(times))

"""A worker of `setriton tune` whose candidates hang, die, fail or lose their GPU, each where it is told to."""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from setriton.bench.timing import Call, Timing
from setriton.bench.tune_worker import Worker
from setriton.bench.watchdog import Mark
from setriton.kernels.config import SweepConfig

Faults = dict[SweepConfig, str]


def faulty_worker(faults: Faults, mark: Mark) -> "FaultyWorker":
    """For `Watched`: by configuration, what happens to it."""
    return FaultyWorker(_Meter(), lambda *_: _Trial(faults), mark)


class FaultyWorker(Worker):
    """Whose synchronisation fails for ever once a kernel has touched what is not its own, as CUDA's does."""

    def _synchronize(self) -> None:
        if _Trial.is_dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class _Trial:
    is_dead = False

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def outputs(self, found: SweepConfig) -> dict[str, torch.Tensor]:
        match self.faults.get(found):
            case "hang":
                time.sleep(600)
            case "crash":
                ctypes.string_at(0)
            case "error":
                raise RuntimeError("out of resource: shared memory")
            case "illegal access":
                _Trial.is_dead = True
        if _Trial.is_dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"y": torch.ones(3)}

    def call(self, found: SweepConfig) -> Callable[[], object]:
        return lambda: time.sleep(600) if self.faults.get(found) == "hang when timed" else None


class _Meter:
    """The second is the fastest."""

    device = torch.device("cpu")
    rotate_bytes = 4000

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        for call in calls:
            call()
        return [Timing(0.5 if index == 1 else 1.0, 0.8, 1.2, 50) for index in range(len(calls))]

    def peak_bytes(self, call: Call) -> Any: ...
    def kernels(self, call: Call) -> Any: ...

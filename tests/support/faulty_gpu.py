"""A worker of `setriton tune` on a real GPU, some of whose candidates launch kernels that hang or write elsewhere."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl

from setriton.bench.timing import GpuMeter
from setriton.bench.tune_worker import Worker
from setriton.bench.watchdog import Mark
from setriton.kernels.cases import Case
from setriton.kernels.config import SweepConfig
from setriton.kernels.trials import Trial


@triton.jit
def _endless_kernel(counter_ptr):
    while tl.atomic_add(counter_ptr, 0, sem="acquire") == 0:
        pass


@triton.jit
def _stray_kernel(x_ptr, offset):
    tl.store(x_ptr + offset, 1.0)


def faulty_gpu_worker(faults: dict[SweepConfig, str], mark: Mark) -> Worker:
    """For `Watched`: by configuration, what happens to it."""

    class FaultyTrial(Trial):
        def outputs(self, found: SweepConfig) -> dict[str, torch.Tensor]:
            memory = torch.zeros(1, device="cuda")
            match faults.get(found):
                case "hang":
                    _endless_kernel[(1,)](memory.int())
                case "illegal access":
                    _stray_kernel[(1,)](memory, 2**44)
            torch.cuda.synchronize()
            return super().outputs(found)

    def trial(case: Case, device: torch.device, _: int) -> Any:
        return FaultyTrial(case, device, 0)

    return Worker(GpuMeter(0.01), trial, mark)

"""What compiling a network costs, for `setriton bench models`: each number from a process of its own.

In a process that has compiled before, imports and caches in memory hide what a user waits for.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .child import in_child
from .networks import Case, Step, Way, Workload, random_batch


@dataclass(frozen=True)
class FirstStep:
    """Seconds that it takes longer than the second, its graph breaks, and graphs that further steps compile.

    Dynamo counts a break inside of a function that it inlines once more for each of the callers.
    """

    seconds: float
    graph_breaks: int
    recompiles: int


@dataclass(frozen=True)
class Costs:
    """The first step without anything in the compiler's caches on disk, and again with what it left there."""

    cold: FirstStep
    warm: FirstStep


def costs(case: Case, way: Way, device: torch.device) -> Costs:
    """Of a way that compiles, in two fresh processes; the second goes on to batches of two other sizes.

    Raises:
        RuntimeError: it fails there.
    """
    with tempfile.TemporaryDirectory() as cache:
        cold = in_child(_try_first_step, case, way, device, cache, ())
        return Costs(cold, in_child(_try_first_step, case, way, device, cache, (case.batch + 1, case.batch + 2)))


def _try_first_step(case: Case, way: Way, device: torch.device, cache: str, batches: Sequence[int]) -> FirstStep:
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache, "triton"))}
    try:
        return first_step(case, way, device, batches)
    except Exception as error:  # the compiler's own exceptions cannot all be sent to another process
        reason = str(error).strip().splitlines() or [""]
        raise RuntimeError(f"{type(error).__name__}: {reason[0]}") from None


def first_step(case: Case, way: Way, device: torch.device, batches: Sequence[int]) -> FirstStep:
    """Of a process that has compiled nothing yet; then, a step with each of the batch sizes."""
    from torch._dynamo.utils import counters

    torch.backends.cudnn.benchmark = True
    work = Workload(case, device)
    # The device's first use and cuDNN's choice of algorithms are not the compiler's.
    _seconds(work.step(replace(way, backend=None, accelerated=False)), device)
    step = work.step(way)
    counters.clear()
    first = _seconds(step, device)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    second = _seconds(step, device)
    for batch in batches:
        step.run(*random_batch(batch, case.image_size, device))
    return FirstStep(first - second, breaks, counters["stats"]["unique_graphs"] - graphs)


def _seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

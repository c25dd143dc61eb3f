"""A tuner of `setriton tune` that launches nothing: what is measured and computed is what a test says."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from setriton import tune
from setriton.bench.timing import Call, Timing
from setriton.bench.tune_worker import Worker
from setriton.kernels.cases import H200, Case
from setriton.kernels.config import SweepConfig

DEVICE = "NVIDIA H200"
MEASURED = {"driver": "1", "torch": "2", "triton": "3", "source": "of a test", "date": "2026-01-01"}


class ToldMeter:
    """Takes a second for each case; the third configuration is the fastest, by a tenth."""

    device = torch.device("cpu")
    rotate_bytes = 4000

    def __init__(self) -> None:
        self.now = 0.0
        self.measured: list[int] = []

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        for call in calls:
            call()
        self.now += 1
        self.measured.append(len(calls))
        return [Timing(0.9 if index == 2 else 1.0, 0.8, 1.2, 50) for index in range(len(calls))]

    def peak_bytes(self, call: Call) -> Any: ...
    def kernels(self, call: Call) -> Any: ...

    def clock(self) -> float:
        return self.now


class ToldTrial:
    """Launches nothing; `results` of a configuration are what the test says."""

    def __init__(self, results: Callable[[Case, SweepConfig], torch.Tensor]) -> None:
        self.results = results

    def __call__(self, case: Case, device: torch.device, rotate_bytes: int) -> "ToldTrial":
        assert (device.type, rotate_bytes) == ("cpu", 4000)
        self.case = case
        return self

    def call(self, found: SweepConfig) -> Callable[[], object]:
        return lambda: None

    def outputs(self, found: SweepConfig) -> dict[str, torch.Tensor]:
        return {"y": self.results(self.case, found)}


def same(case: Case, found: SweepConfig) -> torch.Tensor:
    return torch.ones(3)


def tuner(path: Path, meter: ToldMeter, results: Any = same, **changes: str) -> tune.Tuner:
    return tune.Tuner(path, DEVICE, H200, MEASURED | changes, Worker(meter, ToldTrial(results)), meter.clock)

"""The timer's order of events, on a GPU that is made up."""

from typing import Any

import pytest
import torch

from setriton.bench import timing


def test_summary() -> None:
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Timing(3.5, 2.0, 5.0, 6)


class MadeUpGpu:
    """A clock that calls advance, and events that read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log = ""
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = gpu.now

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float) -> timing.Call:
        def call() -> None:
            self.now += seconds
            self.log += name

        return call


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeUpGpu(monkeypatch)
    fast, slow = timing.GpuMeter(seconds=0.1).time([gpu.call("f", 2**-10), gpu.call("s", 2**-7)])
    assert fast == timing.Timing(2**-10 * 1e3, 2**-10 * 1e3, 2**-10 * 1e3, 5 * 20)
    # 0.1 s has room for fewer slow calls than are measured at least.
    assert slow == timing.Timing(2**-7 * 1e3, 2**-7 * 1e3, 2**-7 * 1e3, 5 * 4)
    # A first call, 0.05 s of warming up; then, in each round, one call that is not counted.
    warm_up = "f" * (1 + 52) + "s" * (1 + 7)
    assert gpu.log == warm_up + 5 * ("f" * (1 + 20) + "s" * (1 + 4))


@pytest.mark.gpu
def test_measures_a_copy() -> None:
    x = torch.randn(2**26, device="cuda")
    meter = timing.GpuMeter(seconds=0.02)
    (timed,) = meter.time([x.clone])
    assert timed.p20_ms <= timed.median_ms <= timed.p80_ms
    assert meter.peak_bytes(x.clone) == x.nbytes
    kernels = meter.kernels(x.clone)
    assert kernels is None or kernels.launches == 1
    assert kernels is None or 0.5 * timed.median_ms < kernels.milliseconds < 1.5 * timed.median_ms

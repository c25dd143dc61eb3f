"""Candidates of a case compiled, compared and timed: what `setriton tune` does in a child process."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from setriton.kernels.cases import Case
from setriton.kernels.config import SweepConfig

from .timing import GpuMeter, Meter
from .watchdog import Lost, Mark, Watched

# Of its norm, how far a result may be from the model's pick's. Sums in another order change a bfloat16 result by 0.004.
FAR = 1 / 64
# Of a candidate: compiling one takes up to half a minute, several at once on few cores.
PATIENCE = 180.0


class Trials(Protocol):
    """What `setriton.kernels.trials.Trial` is; tests have one that launches nothing."""

    def call(self, found: SweepConfig) -> Callable[[], object]: ...
    def outputs(self, found: SweepConfig) -> dict[str, Tensor]: ...


class Failed(RuntimeError):
    """A candidate failed: `kind` is one of `setriton.kernels.entries.FAILURES`; `index` it has among those timed."""

    def __init__(self, kind: str, message: str, index: int | None = None) -> None:
        super().__init__(kind, message, index)
        self.kind, self.message, self.index = kind, message, index


class Worker:
    """Tries candidates of one case after another.

    Args:
        meter: what times them.
        trial: makes a case's tensors and launches.
        mark: says which candidate is at work, to whoever watches.
    """

    def __init__(
        self, meter: Meter, trial: Callable[[Case, torch.device, int], Trials], mark: Mark | None = None
    ) -> None:
        self.meter, self.make_trial, self.mark = meter, trial, mark
        self.case: Case | None = None
        self.want: dict[str, Tensor] | None = None

    def compile(self, case: Case, candidates: Sequence[SweepConfig]) -> None:
        """Run each once in threads: compiling takes seconds, most of them in LLVM and ptxas, which run in parallel.

        What fails is left for `check` to meet again.

        Raises:
            Failed: the process can no longer use its GPU.
        """
        trial = self._trial(case)

        def run(found: SweepConfig) -> None:
            with contextlib.suppress(Exception):
                trial.outputs(found)
            self._at(-1)

        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(run, candidates))
        if not self._is_alive():
            raise Failed("illegal access", "one of several")

    def check(self, case: Case, reference: SweepConfig, found: SweepConfig) -> None:
        """Run a candidate, and compare what it computes with what the reference does, which is not compared.

        Raises:
            Failed: it does not run, or computes something else.
            torch.OutOfMemoryError: there is no memory for the maps.
        """
        trial = self._trial(case)
        try:
            self._at(0)
            results = trial.outputs(found)
            if self.want is None or found == reference:
                self.want = results if found == reference else trial.outputs(reference)
            for name, result in results.items():
                want = self.want[name].float()
                if found != reference and not (result.float() - want).norm() <= FAR * want.norm():
                    raise Failed("wrong", f"{name} differs from the model's pick's")
            self._synchronize()
        except torch.OutOfMemoryError:
            self.case = None
            raise
        except Failed:
            raise
        except Exception as error:  # of a compiler, or of resources that this GPU has not
            raise Failed("error" if self._is_alive() else "illegal access", _told(error)) from None

    def time(self, case: Case, candidates: Sequence[SweepConfig]) -> list[float]:
        """Milliseconds of each, measured side by side.

        Raises:
            Failed: one of them does not run any more.
            torch.OutOfMemoryError: there is no memory for the maps.
        """
        trial, self.step = self._trial(case), -1
        calls = [self._marked(index, trial.call(found)) for index, found in enumerate(candidates)]
        try:
            return [timed.median_ms for timed in self.meter.time(calls)]
        except torch.OutOfMemoryError:
            self.case = None
            raise
        except Exception as error:
            raise Failed("error" if self._is_alive() else "illegal access", _told(error), self.step) from None

    def close(self) -> None:
        """Nothing is left behind."""

    def _trial(self, case: Case) -> Trials:
        if self.case != case:
            self.want = None
            self.trial = self.make_trial(case, self.meter.device, self.meter.rotate_bytes)
            self.case = case
        return self.trial

    def _marked(self, index: int, call: Callable[[], object]) -> Callable[[], object]:
        def marked() -> object:
            self._at(index)
            return call()

        return marked

    def _at(self, step: int) -> None:
        self.step = step
        if self.mark is not None:
            self.mark.at(step)

    def _synchronize(self) -> None:
        if self.meter.device.type == "cuda":
            torch.cuda.synchronize()

    def _is_alive(self) -> bool:
        """Whether the process can still use its GPU: after an illegal access it never can."""
        try:
            self._synchronize()
        except Exception:
            return False
        return True


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def gpu_worker(seconds: float, device: int, mark: Mark) -> Worker:
    """For the child: its own context on the GPU, `seconds` of samples for each candidate."""
    torch.cuda.set_device(device)
    from setriton.kernels.trials import Trial

    return Worker(GpuMeter(seconds), Trial, mark)


class WatchedWorker:
    """A `Worker` in a child process: who hangs or dies loses one candidate, and the next call has a new child."""

    def __init__(self, child: Watched) -> None:
        self.child = child

    def compile(self, case: Case, candidates: Sequence[SweepConfig]) -> None:
        """Nobody is to blame for what goes wrong here, where several are at work: `check` meets it again, alone."""
        with contextlib.suppress(Failed):
            self._call("compile", case, candidates)

    def check(self, case: Case, reference: SweepConfig, found: SweepConfig) -> None:
        """As `Worker.check`, whose Failed is of kind hang or crash, too."""
        self._call("check", case, reference, found)

    def time(self, case: Case, candidates: Sequence[SweepConfig]) -> list[float]:
        """As `Worker.time`, whose Failed is of kind hang or crash, too."""
        milliseconds: list[float] = self._call("time", case, candidates)
        return milliseconds

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self.child.call(method, *arguments)
        except Lost as lost:
            raise Failed(lost.kind, str(lost), lost.step) from None
        except Failed as failed:
            if failed.kind == "illegal access":
                self.child.close()
            raise

    def close(self) -> None:
        """End the child."""
        self.child.close()

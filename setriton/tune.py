"""Launch configurations measured on this GPU, for the maps of a network: `setriton tune`."""

import concurrent.futures
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .bench.environment import environment
from .bench.measure import digest
from .bench.timing import GpuMeter, Meter
from .command import show
from .kernels import stored
from .kernels.cases import KINDS, Case, Machine
from .kernels.config import ForwardConfig, SweepConfig
from .kernels.stored import Entry
from .kernels.tuning import best_of, candidates_of
from .tune_plan import plan

if TYPE_CHECKING:
    from rich.table import Table

# An entry is measured again where one of these has changed.
IDENTITY = ("driver", "torch", "triton", "source")
# Of its norm, how far a result may be from the model's pick's. Sums in another order change a bfloat16 result by 0.004.
FAR = 1 / 64
SECONDS_OF_A_CANDIDATE = 0.05


class Trials(Protocol):
    """What `setriton.kernels.trials.Trial` is; tests have one that launches nothing."""

    def call(self, found: SweepConfig) -> Callable[[], object]: ...
    def outputs(self, found: SweepConfig) -> dict[str, Tensor]: ...


def run(
    model: str | None = None,
    batch_size: int = 128,
    image_size: int | None = None,
    shapes: Sequence[str] = (),
    dtype: str = "bfloat16",
    layout: str = "channels_last",
    kinds: Sequence[str] = (),
    *,
    seconds: float = math.inf,
    force: bool = False,
    out: Path | None = None,
) -> Path:
    """Measure what is not stored yet, and store each result as soon as it is there.

    Args:
        model: a network whose maps are tuned, by name.
        batch_size, image_size: of the model; image_size None is 224, or 32 for the networks of small images.
        shapes: maps instead, as N,C,H or N,C,H,W. With neither, the maps of SE-ResNet-50, then of EfficientNet-B0.
        dtype, layout: of the maps.
        kinds: some of `KINDS`; none means all that the model or the maps may need.
        seconds: stop in time, and say what is missing.
        force: measure what is stored, too.
        out: the file; None is this user's cache, which launches read.

    Returns:
        The file.

    Raises:
        ValueError: no GPU, or an argument has no such value.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    if out is not None and (out.is_dir() or out.suffix != ".json"):
        raise ValueError(f"out must be a .json file; got {out}")
    cases = plan(model, batch_size, image_size, shapes, dtype, layout, kinds)
    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU; torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    where = environment()
    name = where.pop("device")
    from .kernels.trials import Trial

    path = out or stored.user_file(name)
    measured = {**where, "source": source_digest(), "by": "setriton tune"}
    Tuner(path, name, Machine.of(device), measured, GpuMeter(SECONDS_OF_A_CANDIDATE), Trial).tune(
        cases, seconds, force=force
    )
    return path


def shipped_file() -> Path:
    """Where results of this GPU go in a checkout to come with the package."""
    return stored.SHIPPED / f"{stored.slug(torch.cuda.get_device_name())}.json"


def source_digest() -> str:
    """Of the kernels: what was measured with other ones is measured again."""
    return digest(sorted(Path(stored.__file__).parent.glob("*.py")))


class Tuner:
    """Measures cases one after another into a file."""

    def __init__(
        self,
        path: Path,
        device: str,
        machine: Machine,
        measured: dict[str, str],
        meter: Meter,
        trial: Callable[[Case, torch.device, int], Trials],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.device, self.machine, self.measured = path, device, machine, measured
        self.meter, self.trial, self.clock = meter, trial, clock

    def tune(self, cases: Sequence[Case], seconds: float = math.inf, *, force: bool = False) -> list[Case]:
        """Measure what the file lacks, or everything; the cases that the time did not suffice for."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        held = stored.read(self.path, self.device)
        todo = [case for case in cases if force or not self._is_current(held, case)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        start, took = self.clock(), 0.0
        with Progress(*columns) as progress:
            say = functools.partial(progress.console.print, highlight=False, markup=False, soft_wrap=True)
            if len(todo) < len(cases):
                say(f"{len(cases) - len(todo)} of {len(cases)} maps are in {self.path}")
            task = progress.add_task("", total=len(todo))
            for index, case in enumerate(todo):
                begun = self.clock()
                if begun - start + took > seconds:
                    say(f"stopped in time; run again for {len(todo) - index} more")
                    return list(todo[index:])
                progress.update(task, description=str(case))
                try:
                    entry = self._measure(case, say)
                except torch.OutOfMemoryError:
                    say(f"{case}: left out, not enough memory", style="red")
                except KeyboardInterrupt:
                    say(f"{index} of {len(todo)} are in {self.path}; run again for the others")
                    raise
                else:
                    stored.store(self.path, self.device, [entry])
                    say(f"{case}: {_told(entry)}")
                took = self.clock() - begun
                progress.advance(task)
        return []

    def _is_current(self, held: dict[stored.Key, Entry], case: Case) -> bool:
        entry = held.get((case.kind, case.dtype, case.layout, case.bucket))
        return entry is not None and all(entry.measured.get(name) == self.measured.get(name) for name in IDENTITY)

    def _measure(self, case: Case, say: Callable[[str], None]) -> Entry:
        trial = self.trial(case, self.meter.device, self.meter.rotate_bytes)
        first, *others = candidates_of(case, self.machine)
        want = trial.outputs(first)
        failures = _in_threads(lambda found: _failure(trial, found, want), others)
        for found, failure in failures.items():
            if failure:
                say(f"{case}: without {found}: {failure}")
        wanted = [first, *(found for found, failure in failures.items() if not failure)]
        timings = self.meter.time([trial.call(found) for found in wanted])
        milliseconds = {found: timed.median_ms for found, timed in zip(wanted, timings, strict=True)}
        best = best_of(milliseconds, first)
        return Entry(case, best, milliseconds[best], milliseconds[first], self.measured)


def _in_threads(
    function: Callable[[SweepConfig], str], configurations: Iterable[SweepConfig]
) -> dict[SweepConfig, str]:
    """Results by configuration. Each compiles for seconds, most of them in LLVM and ptxas, which run in parallel."""
    pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        futures = {found: pool.submit(function, found) for found in configurations}
        return {found: future.result() for found, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _failure(trial: Trials, found: SweepConfig, want: dict[str, Tensor]) -> str:
    """Why a configuration is not to be timed; empty where it computes what the model's pick does."""
    try:
        for name, result in trial.outputs(found).items():
            difference = (result.float() - want[name].float()).norm()
            if not difference <= FAR * want[name].float().norm():
                return f"{name} differs from the model's pick's"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, or of resources that this GPU has not: the others are worth measuring
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _told(entry: Entry) -> str:
    gain = entry.pick_ms / entry.ms - 1
    return f"{entry.ms:.4f} ms" + (f", the model's pick {gain:.0%} slower" if gain > 0 else ", the model's pick")


def show_stored() -> None:
    """Print the stored configurations that apply to this machine's GPU, or why there are none.

    Raises:
        ValueError: a file holds something else.
    """
    show(stored_table())


def stored_table() -> "Table | str":
    """What `show_stored` prints.

    Raises:
        ValueError: a file holds something else.
    """
    from rich.table import Table

    if not torch.cuda.is_available():
        return "no GPU here: configurations are the cost model's picks"
    device = torch.cuda.get_device_name()
    entries = stored.entries_of(device)
    if not entries:
        return f"nothing is stored for {device}: configurations are the cost model's picks"
    own = stored.read(stored.user_file(device), device)
    columns = ("kind", "map", "dtype", "layout", "tile", "tiles", "warps", "launches", "ms", "model's ms", "from")
    table = Table(*columns, title=device, title_justify="left")
    for key in sorted(entries, key=lambda key: (list(KINDS).index(key[0]), key)):
        case, found = entries[key].case, entries[key].config
        launches = str(found.launches) if isinstance(found, ForwardConfig) else ""
        table.add_row(
            case.kind, f"{case.n}x{case.channels}x{case.hw}", case.dtype, case.layout,
            f"{found.block_hw}x{found.block_c}", str(found.tiles), str(found.num_warps), launches,
            f"{entries[key].ms:.4f}", f"{entries[key].pick_ms:.4f}", "user" if key in own else "package",
        )  # fmt: skip
    return table

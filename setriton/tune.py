"""Launch configurations measured on this GPU, for the maps of a network: `setriton tune`."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .bench.environment import environment
from .bench.measure import digest
from .bench.tune_worker import PATIENCE, Failed, WatchedWorker, Worker, gpu_worker
from .bench.watchdog import Watched
from .command import show
from .kernels import stored
from .kernels.cases import KINDS, Case, Machine
from .kernels.config import ForwardConfig, SweepConfig
from .kernels.entries import Entry, Failure, Key
from .kernels.tuning import best_of, candidates_of
from .tune_plan import plan

if TYPE_CHECKING:
    from rich.table import Table

# An entry is measured again where one of these has changed.
IDENTITY = ("driver", "torch", "triton", "source")
SECONDS_OF_A_CANDIDATE = 0.05


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
    path = out or stored.user_file(name)
    measured = {**where, "source": source_digest(), "by": "setriton tune"}
    worker = WatchedWorker(Watched(gpu_worker, SECONDS_OF_A_CANDIDATE, device.index, patience=PATIENCE))
    Tuner(path, name, Machine.of(device), measured, worker).tune(cases, seconds, force=force)
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
        worker: Worker | WatchedWorker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.device, self.machine, self.measured = path, device, machine, measured
        self.worker, self.clock = worker, clock

    def tune(self, cases: Sequence[Case], seconds: float = math.inf, *, force: bool = False) -> list[Case]:
        """Measure what the file lacks, or everything; the cases that the time did not suffice for.

        A candidate that hangs, dies, is refused or computes something else is stored as failed, and, unless `force`
        asks for it, not tried again with the same kernels.
        """
        with contextlib.closing(self.worker):
            return self._tune(cases, seconds, force)

    def _tune(self, cases: Sequence[Case], seconds: float, force: bool) -> list[Case]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        held = stored.read(self.path, self.device)
        todo = [case for case in cases if force or not self._is_current(held.get(self._key(case)))]
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
                    entry = self._measure(case, say, force)
                except torch.OutOfMemoryError:
                    say(f"{case}: left out, not enough memory", style="red")
                except KeyboardInterrupt:
                    say(f"{index} of {len(todo)} are in {self.path}; run again for the others")
                    raise
                else:
                    if entry is None:
                        say(f"{case}: left out, no candidate runs", style="red")
                    else:
                        stored.store(self.path, self.device, [entry])
                        say(f"{case}: {_told(entry)}")
                took = self.clock() - begun
                progress.advance(task)
        return []

    def _key(self, case: Case) -> Key:
        return case.kind, case.dtype, case.layout, case.bucket

    def _is_current(self, held: Entry | Failure | None) -> bool:
        return held is not None and all(held.measured.get(name) == self.measured.get(name) for name in IDENTITY)

    def _measure(self, case: Case, say: Callable[[str], None], force: bool) -> Entry | None:
        """The fastest of the candidates that run; None where none does."""
        first, *others = candidates_of(case, self.machine)
        failed = {} if force else stored.read_failures(self.path, self.device)
        wanted = [found for found in (first, *others) if not self._is_current(failed.get((case, found)))]
        if len(wanted) <= len(others):
            say(f"{case}: without {1 + len(others) - len(wanted)} that failed before")
        self.worker.compile(case, wanted)
        running: list[SweepConfig] = []
        for found in wanted:
            try:
                # The first that runs, which is the model's pick where that does, is what the others are held against.
                self.worker.check(case, (running or [found])[0], found)
                running.append(found)
            except Failed as failure:
                self._drop(case, found, failure, say)
        milliseconds = self._time(case, running, say)
        if not milliseconds:
            return None
        best = best_of(milliseconds, first)
        return Entry(case, best, milliseconds[best], milliseconds.get(first, milliseconds[best]), self.measured)

    def _time(self, case: Case, running: list[SweepConfig], say: Callable[[str], None]) -> dict[SweepConfig, float]:
        """Milliseconds; who fails now, though it ran, is left out, and the others are timed anew."""
        while running:
            try:
                return dict(zip(running, self.worker.time(case, running), strict=True))
            except Failed as failure:
                # Where it is not known who failed, the case is given up.
                index = failure.index
                for found in running if index is None else [running[index]]:
                    self._drop(case, found, failure, say)
                running = [] if index is None else running[:index] + running[index + 1 :]
        return {}

    def _drop(self, case: Case, found: SweepConfig, failure: Failed, say: Callable[[str], None]) -> None:
        say(f"{case}: without {found}: {failure.kind}: {failure.message}")
        stored.store(self.path, self.device, [], [Failure(case, found, failure.kind, failure.message, self.measured)])


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

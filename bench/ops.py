"""setriton's operators on this GPU, against eager PyTorch, torch.compile and a copy: `setriton bench ops`."""

import functools
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import setriton
from setriton.checks import check_choice

from . import cases
from .cases import DTYPES, EAGER, IMPLEMENTATIONS, LAYOUTS, OPERATIONS, Call, Function, Group, Workload, plan
from .environment import environment, results_folder
from .report import Results, Row
from .timing import GpuMeter, Meter

# The batch of most published timings first, then the ends of the range.
BATCH_SIZES = (128, 1, 32, 256)
# How far, by the 2-norm, y and the gradient of the map may be from eager's before a timing is refused. What bfloat16
# rounds differently is 0.004 of y and, where it flips a ReLU, 0.03 of the gradient; tests catch smaller faults.
FAR = 1 / 8


def run(
    batch_sizes: Sequence[int] = BATCH_SIZES,
    operations: Sequence[str] = (),
    *,
    seconds: float = math.inf,
    force: bool = False,
    out: Path | None = None,
    dtype: str = "bfloat16",
    layout: str = "channels_last",
) -> list[Path]:
    """Time what ops.json does not hold yet of this environment, and write it, ops.md and roofline.png.

    Args:
        batch_sizes: images per call, in the order of measuring.
        operations: some of `OPERATIONS`, in the order of measuring; none means all.
        seconds: stop in time, and say what is missing.
        force: measure what the file holds, too.
        out: folder for the results; None is bench/results/<device>.
        dtype: of the maps and of the SE weights.
        layout: of the maps.

    Returns:
        The files.

    Raises:
        ValueError: no GPU, a batch size below 1, or an unknown operation, dtype or layout.
    """
    for operation in operations:
        check_choice("ops", operation, OPERATIONS)
    check_choice("dtype", dtype, DTYPES)
    check_choice("layout", layout, LAYOUTS)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be at least 1; got {batch_sizes}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    if not torch.cuda.is_available():
        raise ValueError("bench ops times kernels on a GPU; torch sees none")
    where = environment()
    results = Results.open(out or results_folder(where["device"]), {**where, "source": source_digest()})
    bench = Bench(results, GpuMeter(), dtype, layout)
    try:
        bench.measure(plan(batch_sizes, operations), seconds, force=force)
    finally:
        paths = results.write_reports()
    return paths


def source_digest() -> str:
    """Of the files that decide what is timed and how: equal digests make rows comparable, whatever the commit."""
    package, here = Path(setriton.__file__).parent, Path(__file__).parent
    kernels = Path(setriton.kernels.__file__).parent
    files = [path for suffix in ("*.py", "*.json") for path in sorted(kernels.rglob(suffix))]
    files += [path for name in ("functional", "ops", "reference") for path in sorted(package.glob(f"{name}*.py"))]
    files += [here / name for name in ("ops.py", "cases.py", "timing.py")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Bench:
    """Measures groups one after another into results."""

    def __init__(
        self,
        results: Results,
        meter: Meter,
        dtype: str = "bfloat16",
        layout: str = "channels_last",
        compiler: cases.Compiler = cases.compile_for_one_shape,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.results = results
        self.meter = meter
        self.dtype = dtype
        self.layout = layout
        self.compiler = compiler
        self.clock = clock

    def measure(self, groups: Sequence[Group], seconds: float = math.inf, *, force: bool = False) -> list[Group]:
        """Measure what the results lack, or everything; the groups that the time did not suffice for."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        todo = [group for group in groups if force or self._missing(group)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        start, took = self.clock(), 0.0
        with Progress(*columns) as progress:
            say = functools.partial(progress.console.print, highlight=False, markup=False, soft_wrap=True)
            if self.results.outdated:
                say(f"{self.results.path} is of another environment or other sources: measuring anew")
            if len(todo) < len(groups):
                say(f"{len(groups) - len(todo)} of {len(groups)} maps are in {self.results.path}")
            task = progress.add_task("", total=len(todo))
            for index, group in enumerate(todo):
                begun = self.clock()
                # Compilation takes most of a group's time, and about as long for each.
                if begun - start + took > seconds:
                    say(f"stopped in time; run again for {_counted(todo[index:])}")
                    return todo[index:]
                progress.update(task, description=str(group))
                try:
                    for rows in self._rows(group, force):
                        self.results.add(rows)
                        say(f"{group}, {rows[0].direction}: " + ", ".join(map(_brief, rows)))
                except torch.OutOfMemoryError as error:
                    self._fail(str(group), error)
                for what, why in self.results.failures.items():
                    if what.startswith(str(group)):
                        say(f"{what}: {why}", style="red")
                took = self.clock() - begun
                progress.advance(task)
        return []

    def _missing(self, group: Group) -> bool:
        return any(
            self._key(group, direction, name) not in self.results.rows
            for direction in group.operation.passes
            for name in IMPLEMENTATIONS
        )

    def _rows(self, group: Group, force: bool) -> Iterator[list[Row]]:
        """Rows of one direction after another."""
        # A static graph for every map and grad mode: nine of them would pass Dynamo's limit of one function.
        torch.compiler.reset()
        work = Workload(
            group.operation,
            group.shape,
            group.batch,
            self.meter.device,
            DTYPES[self.dtype],
            LAYOUTS[self.layout],
            self.meter.rotate_bytes,
        )
        functions = cases.implementations(group.operation, self.compiler)
        for direction in group.operation.passes:
            wanted = [
                name for name in IMPLEMENTATIONS if force or self._key(group, direction, name) not in self.results.rows
            ]
            calls = dict(self._right_calls(group, direction, work, functions, wanted))
            if calls:
                yield self._time(group, direction, work, calls)

    def _right_calls(
        self, group: Group, direction: str, work: Workload, functions: dict[str, Function], wanted: Sequence[str]
    ) -> Iterator[tuple[str, Call]]:
        """Calls of the implementations that run, and compute what eager PyTorch does."""
        want = work.outputs(functions[EAGER], direction)[:2] if wanted else []
        for name in wanted:
            try:
                found = work.outputs(functions[name], direction)[:2]
                for what, ours, eager in zip(("y", "dx"), found, want, strict=False):
                    _refuse_other_function(what, ours, eager)
            except Exception as error:  # one compiler's failure on one map leaves the rest worth measuring
                self._fail(f"{group}, {direction}, {name}", error)
            else:
                yield name, work.call(functions[name], direction)

    def _time(self, group: Group, direction: str, work: Workload, calls: dict[str, Call]) -> list[Row]:
        copy, *timings = self.meter.time([work.copy_call(direction), *calls.values()])
        rows = []
        for (name, call), timed in zip(calls.items(), timings, strict=True):
            peak, kernels = self.meter.peak_bytes(call), self.meter.kernels(call)
            rows.append(
                Row(
                    *self._key(group, direction, name),
                    timed.median_ms,
                    timed.p20_ms,
                    timed.p80_ms,
                    timed.samples,
                    copy_ms=copy.median_ms,
                    gigabytes=work.bytes_moved(direction) / 1e9,
                    peak_mebibytes=None if peak is None else peak / 2**20,
                    kernel_ms=None if kernels is None else kernels.milliseconds,
                    launches=None if kernels is None else kernels.launches,
                )
            )
        return rows

    def _key(self, group: Group, direction: str, name: str) -> tuple[str, str, str, int, int, int, int, str, str]:
        shape = group.shape
        where = (group.batch, shape.channels, shape.size, shape.reduced)
        return group.operation.name, direction, name, *where, self.dtype, self.layout

    def _fail(self, what: str, error: Exception) -> None:
        reason = str(error).strip().splitlines() or [""]
        self.results.failures[what] = f"{type(error).__name__}: {reason[0]}"


def _refuse_other_function(what: str, found: Tensor, want: Tensor) -> None:
    difference = (found.float() - want.float()).norm() / want.float().norm()
    if not difference <= FAR:
        raise ValueError(f"{what} is {difference:.2f} of its norm from eager PyTorch's")


def _counted(groups: Sequence[Group]) -> str:
    counts = Counter(f"{group.operation.name} N={group.batch}" for group in groups)
    return ", ".join(f"{name} ({count} maps)" for name, count in counts.items())


def _brief(row: Row) -> str:
    return f"{row.implementation} {row.median_ms:.3f} ms ({row.copy_share:.0%} of copy)"

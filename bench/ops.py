"""setriton's operators on this GPU, against eager PyTorch, torch.compile and a copy: `setriton bench ops`."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import setriton
from setriton.checks import check_choice

from . import cases
from .cases import DTYPES, EAGER, IMPLEMENTATIONS, LAYOUTS, OPERATIONS, Call, Function, Group, Workload, plan
from .environment import environment, results_folder
from .measure import ResumableBench, check_run, digest, refuse_other_results
from .report import Results, Row
from .timing import GpuMeter, Meter

# The batch of most published timings first, then the ends of the range.
BATCH_SIZES = (128, 1, 32, 256)


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
    check_choice("layout", layout, LAYOUTS)
    check_run("bench ops", batch_sizes, seconds, dtype)
    where = environment()
    results = Results.open(out or results_folder(where["device"]), {**where, "source": source_digest()})
    bench = Bench(results, GpuMeter(), dtype, layout)
    try:
        bench.measure(plan(batch_sizes, operations), seconds, force=force)
    finally:
        paths = results.write_reports()
    return paths


def source_digest() -> str:
    """Of the files that decide what is timed and how."""
    package, here = Path(setriton.__file__).parent, Path(__file__).parent
    kernels = Path(setriton.kernels.__file__).parent
    files = [path for suffix in ("*.py", "*.json") for path in sorted(kernels.rglob(suffix))]
    files += [path for name in ("functional", "ops", "reference") for path in sorted(package.glob(f"{name}*.py"))]
    files += [here / name for name in ("ops.py", "cases.py", "measure.py", "timing.py")]
    return digest(files)


class Bench(ResumableBench[Group, Row]):
    """Measures groups one after another into results."""

    unit = "maps"

    def __init__(
        self,
        results: Results,
        meter: Meter,
        dtype: str = "bfloat16",
        layout: str = "channels_last",
        compiler: cases.Compiler = cases.compile_for_one_shape,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(results, clock)
        self.meter = meter
        self.dtype = dtype
        self.layout = layout
        self.compiler = compiler

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
                    refuse_other_results(what, ours, eager)
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

    def _brief(self, group: Group, rows: Sequence[Row]) -> str:
        times = (f"{row.implementation} {row.median_ms:.3f} ms ({row.copy_share:.0%} of copy)" for row in rows)
        return f"{group}, {rows[0].direction}: " + ", ".join(times)

    def _counted(self, groups: Sequence[Group]) -> str:
        counts = Counter(f"{group.operation.name} N={group.batch}" for group in groups)
        return ", ".join(f"{name} ({count} maps)" for name, count in counts.items())

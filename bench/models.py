"""Whole networks on this GPU, eager and compiled, with SE and without: `setriton bench models`."""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import setriton.kernels
import setriton.models
from setriton.checks import check_choice, check_size

from .compile_costs import Costs, costs
from .environment import environment, results_folder
from .measure import OutOfTime, ResumableBench, check_run, digest
from .models_report import ModelResults, Row, row_key
from .networks import MODES, NETWORKS, WAYS, Case, Step, Way, Workload, check_network, timm_missing
from .timing import GpuMeter, Meter

BATCH_SIZES = (128,)
# A training step is tens of milliseconds: enough for ten or more in each of the meter's rounds.
SECONDS_OF_SAMPLES = 2.0
CostsOf = Callable[[Case, Way, torch.device], Costs]


def run(
    networks: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    image_size: int = 224,
    modes: Sequence[str] = MODES,
    ways: Sequence[str] = (),
    seconds: float = math.inf,
    force: bool = False,
    out: Path | None = None,
    dtype: str = "bfloat16",
) -> list[Path]:
    """Time what models.json does not hold yet of this environment, and write it, models.md and models.png.

    Args:
        networks: names of setriton's networks and timm's, in the order of measuring; none means `NETWORKS`.
        batch_sizes: images of a step, in the order of measuring.
        image_size: height and width of the images.
        modes: some of `MODES`.
        ways: names of some of `WAYS`; none means all.
        seconds: stop in time, and say what is missing.
        force: measure what the file holds, too.
        out: folder for the results; None is bench/results/<device>.
        dtype: of autocast; with float32 there is none.

    Returns:
        The files.

    Raises:
        TypeError: an image size that is no int.
        ValueError: no GPU, a size below 1, or an unknown network, mode, way or dtype.
    """
    check_size("image_size", image_size)
    for name in networks:
        check_network(name)
    for mode in modes:
        check_choice("modes", mode, MODES)
    for way in ways:
        check_choice("ways", way, [known.name for known in WAYS])
    check_run("bench models", batch_sizes, seconds, dtype)
    if not networks and (reason := timm_missing()):
        print(f"setriton's own networks only, as timm cannot be imported: {reason}")
    torch.backends.cudnn.benchmark = True
    where = environment() | {"source": source_digest(), "timm": timm_version()}
    results = ModelResults.open(out or results_folder(where["device"]), where)
    bench = Bench(results, GpuMeter(SECONDS_OF_SAMPLES), [way for way in WAYS if not ways or way.name in ways])
    try:
        groups = plan(networks or default_networks(), batch_sizes, image_size, modes, dtype)
        bench.measure(groups, seconds, force=force)
    finally:
        paths = results.write_reports()
    return paths


def default_networks() -> list[str]:
    """NETWORKS; without timm, setriton's own of them."""
    own = setriton.list_models()
    return [name for name in NETWORKS if name in own or not timm_missing()]


def timm_version() -> str:
    if timm_missing():
        return "not installed"
    import timm

    return str(timm.__version__)


def source_digest() -> str:
    """Of the files that decide what is timed and how."""
    package, here = Path(setriton.__file__).parent, Path(__file__).parent
    kernels, models = Path(setriton.kernels.__file__).parent, Path(setriton.models.__file__).parent
    files = [path for suffix in ("*.py", "*.json") for path in sorted(kernels.rglob(suffix))]
    names = ("functional", "modules", "ops", "reference", "convert", "compile/")
    files += [path for name in names for path in sorted(package.glob(f"{name}*.py"))]
    files += sorted(models.glob("*.py"))
    files += [here / f"{name}.py" for name in ("models", "networks", "compile_costs", "measure", "timing")]
    return digest(files)


@dataclass(frozen=True)
class Group:
    """What is measured in one go: the speeds of a case, side by side, or what compiling it costs."""

    case: Case
    compiling: bool = False

    def __str__(self) -> str:
        return f"{self.case}, compilation" if self.compiling else str(self.case)


def plan(
    networks: Sequence[str], batch_sizes: Sequence[int], image_size: int, modes: Sequence[str], dtype: str
) -> list[Group]:
    """All speeds first."""
    cases = [
        Case(network, mode, batch, image_size, dtype) for batch in batch_sizes for network in networks for mode in modes
    ]
    return [Group(case, compiling) for compiling in (False, True) for case in cases]


class Bench(ResumableBench[Group, Row]):
    """Measures groups one after another into results."""

    unit = "measurements"

    def __init__(
        self,
        results: ModelResults,
        meter: Meter,
        ways: Sequence[Way] = WAYS,
        costs: CostsOf = costs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(results, clock)
        self.meter = meter
        self.ways = ways
        self.costs = costs
        self.longest = 0.0

    def _expected(self) -> float:
        """Those of the longest compilation: a group stops between two of them where time is short."""
        return self.longest

    def _missing(self, group: Group) -> bool:
        return bool(self._wanted(group, force=False))

    def _wanted(self, group: Group, force: bool) -> list[Way]:
        rows = {way.name: self.results.rows.get(row_key(group.case, way.name)) for way in self.ways}
        if not group.compiling:
            return [way for way in self.ways if force or rows[way.name] is None]
        return [
            way
            for way in self.ways
            if way.backend and (force or (row := rows[way.name]) is None or row.cold_seconds is None)
        ]

    def _rows(self, group: Group, force: bool) -> Iterator[list[Row]]:
        # What the group before has left, and its graphs: children need the memory, and Dynamo has a limit for these.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        return self._costs(group, force) if group.compiling else self._speeds(group, force)

    def _speeds(self, group: Group, force: bool) -> Iterator[list[Row]]:
        """Of the ways that compute what eager PyTorch does; of fewer, where time is too short to compile all."""
        work = Workload(group.case, self.meter.device)
        steps: dict[str, Step] = {}
        late = False
        for way in self._wanted(group, force):
            if late := not self.has_time(self.longest):
                break
            begun = self.clock()
            try:
                steps[way.name] = work.right_step(way)
            except Exception as error:  # one compiler's failure on one network leaves the rest worth measuring
                self._fail(f"{group}, {way.title}", error)
            self.longest = max(self.longest, self.clock() - begun)
        if steps:
            yield self._time(group.case, steps)
        if late:
            raise OutOfTime

    def _time(self, case: Case, steps: Mapping[str, Step]) -> list[Row]:
        rows = []
        for (name, step), timed in zip(steps.items(), self.meter.time(list(steps.values())), strict=True):
            peak = self.meter.peak_bytes(step)
            rows.append(
                Row(
                    case.network,
                    case.mode,
                    name,
                    case.batch,
                    case.image_size,
                    case.dtype,
                    timed.median_ms,
                    timed.p20_ms,
                    timed.p80_ms,
                    timed.samples,
                    peak_mebibytes=None if peak is None else (step.held_bytes() + peak) / 2**20,
                )
            )
        return rows

    def _costs(self, group: Group, force: bool) -> Iterator[list[Row]]:
        """Of the ways that have a row."""
        for way in self._wanted(group, force):
            row = self.results.rows.get(row_key(group.case, way.name))
            if row is None:
                continue
            if not self.has_time(self.longest):
                raise OutOfTime
            begun = self.clock()
            try:
                found = self.costs(group.case, way, self.meter.device)
            except Exception as error:
                self._fail(f"{group}, {way.title}", error)
            else:
                yield [
                    replace(
                        row,
                        cold_seconds=found.cold.seconds,
                        warm_seconds=found.warm.seconds,
                        graph_breaks=found.cold.graph_breaks,
                        recompiles=found.warm.recompiles,
                    )
                ]
            self.longest = max(self.longest, self.clock() - begun)

    def _brief(self, group: Group, rows: Sequence[Row]) -> str:
        if group.compiling:
            costs = (f"{row.way} {row.cold_seconds:.1f} s, {row.warm_seconds:.1f} s warm" for row in rows)
            return f"{group}: " + ", ".join(costs)
        return f"{group}: " + ", ".join(f"{row.way} {row.images_per_second:,.0f} img/s" for row in rows)

    def _counted(self, groups: Sequence[Group]) -> str:
        counts = Counter(group.case.network for group in groups)
        return "measurements of " + ", ".join(f"{name} ({count})" for name, count in counts.items())

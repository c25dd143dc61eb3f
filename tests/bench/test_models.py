"""What is measured of networks, kept, resumed and left out, with a meter that is told the numbers."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import setriton
from setriton.bench import environment, models
from setriton.bench.compile_costs import Costs, FirstStep
from setriton.bench.models import Bench, Group, plan
from setriton.bench.models_report import ModelResults
from setriton.bench.networks import MODES, NETWORKS, TRAINING, WAYS, Case, Way
from setriton.bench.timing import Call, Kernels, Timing

WHERE = {**environment.environment(), "source": "of a test", "timm": "0"}
GROUPS = plan(("one", "two"), (4,), 16, (TRAINING,), "float32")
COMPILED = [way.name for way in WAYS if way.backend]
# Real ones, but for the compiler, which takes its time.
QUICK_WAYS = [replace(way, backend=way.backend and "eager") for way in WAYS]


class ToldMeter:
    """Calls everything once."""

    device = torch.device("cpu")
    rotate_bytes = 0

    def __init__(self) -> None:
        self.measured: list[int] = []

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        for call in calls:
            call()
        self.measured.append(len(calls))
        return [Timing(20.0, 19.0, 21.0, 60) for _ in calls]

    def peak_bytes(self, call: Call) -> int | None:
        return 3 * 2**20

    def kernels(self, call: Call) -> Kernels | None:
        raise NotImplementedError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class MadeUpWorkload:
    """Takes a second to compile each way, and computes nothing."""

    clock: Clock
    case: Case

    def right_step(self, way: Way) -> Any:
        self.clock.now += way.backend is not None
        step = lambda: None  # noqa: E731
        step.held_bytes = lambda: 2**20
        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes in compilers alone, and networks that are made up."""
    clock = Clock()
    monkeypatch.setattr(models, "Workload", lambda case, device: MadeUpWorkload(clock, case))
    return clock


def costs(case: Case, way: Way, device: torch.device) -> Costs:
    return Costs(FirstStep(40.5, 2, 0), FirstStep(10.25, 2, 1))


def bench(folder: Path, clock: Clock, meter: ToldMeter | None = None, where: dict[str, str] = WHERE) -> Bench:
    def timed_costs(*case: Any) -> Costs:
        clock.now += 1
        return costs(*case)

    return Bench(ModelResults.open(folder, where), meter or ToldMeter(), costs=timed_costs, clock=clock)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_is_measured(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated: list[nn.Module] = []
    monkeypatch.setattr(setriton, "accelerate", accelerated.append, raising=False)
    meter = ToldMeter()
    this = Bench(ModelResults.open(tmp_path, WHERE), meter, QUICK_WAYS, costs)
    assert this.measure(plan(("se_resnet20",), (4,), 16, (mode,), "float32")) == []
    assert this.results.failures == {}
    assert [row.way for row in this.results.rows.values()] == [way.name for way in WAYS]
    assert len(accelerated) == 1
    assert meter.measured == [len(WAYS)]


def test_numbers_of_a_row(tmp_path: Path, clock: Clock) -> None:
    bench(tmp_path, clock).measure(GROUPS)
    rows = ModelResults.open(tmp_path, WHERE).rows
    assert len(rows) == 2 * len(WAYS)
    row = rows["one", "training", "compile", 4, 16, "float32"]
    assert (row.median_ms, row.p20_ms, row.p80_ms, row.samples) == (20.0, 19.0, 21.0, 60)
    assert row.images_per_second == 200
    assert row.peak_mebibytes == 1 + 3
    assert (row.cold_seconds, row.warm_seconds, row.graph_breaks, row.recompiles) == (40.5, 10.25, 2, 1)
    assert rows["one", "training", "eager", 4, 16, "float32"].cold_seconds is None


def test_speeds_come_first() -> None:
    cases = [Case(name, mode, n, 16, "float32") for n in (8, 4) for name in ("b", "a") for mode in MODES]
    groups = plan(("b", "a"), (8, 4), 16, MODES, "float32")
    assert groups == [Group(case) for case in cases] + [Group(case, compiling=True) for case in cases]


def test_stops_between_two_ways_and_goes_on(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    meter = ToldMeter()
    # Four ways of a network are compiled, a second each.
    assert bench(tmp_path, clock, meter).measure(GROUPS, seconds=6.5) == GROUPS[1:]
    assert "stopped in time; run again for measurements of two (2), one (1)" in capsys.readouterr().out
    assert meter.measured == [5, 3]
    assert len(ModelResults.open(tmp_path, WHERE).rows) == 5 + 3
    assert bench(tmp_path, clock, meter).measure(GROUPS, seconds=5) == GROUPS[2:]
    assert "1 of 4 measurements are in" in capsys.readouterr().out
    assert meter.measured == [5, 3, 2]
    rows = ModelResults.open(tmp_path, WHERE).rows.values()
    assert [row.way for row in rows if row.cold_seconds is not None] == COMPILED[:3]
    assert bench(tmp_path, clock, meter).measure(GROUPS) == []
    assert meter.measured == [5, 3, 2]
    assert sum(row.cold_seconds is not None for row in ModelResults.open(tmp_path, WHERE).rows.values()) == 8
    before = clock.now
    assert bench(tmp_path, clock, meter).measure(GROUPS) == []
    assert clock.now == before
    assert bench(tmp_path, clock, meter).measure(GROUPS, force=True) == []
    assert clock.now == before + 4 * 4


def test_what_fails_is_listed_and_tried_again(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    right_step = MadeUpWorkload.right_step

    def fails(work: MadeUpWorkload, way: Way) -> Any:
        if way.name == "backend":
            raise ValueError("logits is 1.00 of its norm from eager PyTorch's\nand more")
        return right_step(work, way)

    monkeypatch.setattr(MadeUpWorkload, "right_step", fails)
    this = bench(tmp_path, clock)
    assert this.measure(GROUPS[:1]) == []
    message = "ValueError: logits is 1.00 of its norm from eager PyTorch's"
    what = 'one, training, 4 images, torch.compile(backend="setriton")'
    assert this.results.failures == {what: message}
    assert [row.way for row in this.results.rows.values()] == [way.name for way in WAYS if way.name != "backend"]
    monkeypatch.setattr(MadeUpWorkload, "right_step", right_step)
    meter = ToldMeter()
    bench(tmp_path, clock, meter).measure(GROUPS[:1])
    assert meter.measured == [1]


def test_a_child_that_fails_leaves_the_speeds(tmp_path: Path, clock: Clock) -> None:
    this = bench(tmp_path, clock)

    def fails(case: Case, way: Way, device: torch.device) -> Costs:
        if way.name == "plain":
            raise RuntimeError("OutOfMemoryError: CUDA out of memory")
        return costs(case, way, device)

    this.costs = fails
    assert this.measure([GROUPS[0], GROUPS[2]]) == []
    assert list(this.results.failures) == ["one, training, 4 images, compilation, without SE, torch.compile"]
    assert [row.way for row in this.results.rows.values() if row.cold_seconds is None] == ["eager", "plain"]


def test_a_network_too_large_is_left_out(tmp_path: Path, clock: Clock) -> None:
    meter = ToldMeter()

    def time(calls: Sequence[Call]) -> list[Timing]:
        meter.time = lambda calls: ToldMeter.time(meter, calls)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    meter.time = time
    this = bench(tmp_path, clock, meter)
    this.measure(GROUPS)
    assert {row.network for row in this.results.rows.values()} == {"two"}
    assert this.results.failures == {"one, training, 4 images": "OutOfMemoryError: CUDA out of memory."}


@pytest.mark.parametrize("name", ["device", "torch", "source", "timm"])
def test_another_environment_begins_anew(name: str, tmp_path: Path, clock: Clock) -> None:
    bench(tmp_path, clock).measure(GROUPS)
    other = {**WHERE, name: "another"}
    bench(tmp_path, clock, where=other).measure(GROUPS[:1])
    assert len(ModelResults.open(tmp_path, other).rows) == len(WAYS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": ("resnet20",)}, "networks must have SE modules; resnet20 has none"),
        ({"batch_sizes": ()}, "batch_sizes must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        ({"modes": ("evaluation",)}, "modes must be one of training, inference; got 'evaluation'"),
        ({"ways": ("inductor",)}, "ways must be one of eager, plain, backend, compile, accelerate; got 'inductor'"),
        ({"dtype": "float64"}, "dtype must be one of bfloat16, "),
        ({"seconds": 0}, "seconds must be positive"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.run(**arguments)


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="bench models needs a GPU; torch sees none"):
        models.run()


@pytest.fixture
def told_run(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> ToldMeter:
    """`models.run` as on a GPU, of networks that are made up."""
    meter = ToldMeter()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models, "GpuMeter", lambda seconds: meter)
    monkeypatch.setattr(models, "environment", lambda: {**WHERE, "device": "NVIDIA Made-up"})
    monkeypatch.setattr(models, "Bench", functools.partial(Bench, costs=costs, clock=clock))
    return meter


def test_run(told_run: ToldMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = models.run(("se_resnet20",), (2,), image_size=32, modes=(TRAINING,), ways=("plain", "eager"))
    folder = Path("bench", "results", "nvidia-made-up")
    assert paths == [folder / name for name in ("models.json", "models.md", "models.png")]
    data = json.loads(paths[0].read_text())
    assert data["environment"]["source"] == models.source_digest()
    assert [(row["network"], row["way"]) for row in data["rows"]] == [("se_resnet20", n) for n in ("eager", "plain")]
    assert torch.backends.cudnn.benchmark is True


def test_without_timm_setritons_own_are_timed(
    told_run: ToldMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "timm_missing", lambda: "ImportError: none")
    paths = models.run(out=tmp_path)
    assert "setriton's own networks only, as timm cannot be imported: ImportError: none" in capsys.readouterr().out
    data = json.loads(paths[0].read_text())
    assert data["environment"]["timm"] == "not installed"
    assert {row["network"] for row in data["rows"]} == {"se_resnet50", "se_resnet152"} < set(NETWORKS)
    assert {(row["mode"], row["batch"], row["image_size"]) for row in data["rows"]} == {(m, 128, 224) for m in MODES}


def test_sources_have_a_digest() -> None:
    assert len(models.source_digest()) == 12
    assert models.source_digest() == models.source_digest()


@pytest.mark.gpu
def test_run_on_the_gpu(tmp_path: Path) -> None:
    paths = models.run(("se_resnet20",), (8,), image_size=32, ways=("eager", "plain", "backend"), out=tmp_path)
    assert [path.name for path in paths] == ["models.json", "models.md", "models.png"]
    data = json.loads(paths[0].read_text())
    assert data["failures"] == {}
    assert len(data["rows"]) == 2 * 3
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in data["rows"])
    assert all(0 < row["warm_seconds"] < row["cold_seconds"] for row in data["rows"] if row["way"] != "eager")

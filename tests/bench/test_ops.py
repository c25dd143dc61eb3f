"""What is measured, kept, resumed and left out, with a meter that is told the numbers; what it calls is real."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from setriton.bench import cases, environment, ops
from setriton.bench.cases import BOTH, FORWARD, IMPLEMENTATIONS, OPERATIONS, Group, Shape
from setriton.bench.report import Results
from setriton.bench.timing import Call, Kernels, Timing

WHERE = {**environment.environment(), "source": "of a test"}
GROUPS = [Group(OPERATIONS["squeeze-excite"], Shape(16, size, 4), 2) for size in (2, 3, 4, 5)]
compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)


class ToldMeter:
    """Calls everything, twice, and takes a second on its own clock for each group of calls."""

    device = torch.device("cpu")
    rotate_bytes = 4000

    def __init__(self) -> None:
        self.now = 0.0
        self.measured = 0

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        for call in (*calls, *calls):
            call()
        self.now += 1
        self.measured += len(calls) - 1
        return [Timing(1.0, 0.9, 1.2, 50), *(Timing(2.0, 1.5, 2.5, 50) for _ in calls[1:])]

    def peak_bytes(self, call: Call) -> int | None:
        return 3 * 2**20

    def kernels(self, call: Call) -> Kernels | None:
        return Kernels(4, 1.75)

    def clock(self) -> float:
        return self.now


def uncompiled(function: cases.Function) -> cases.Function:
    return function


def bench(
    folder: Path, meter: ToldMeter, where: dict[str, str] = WHERE, compiler: cases.Compiler = uncompiled
) -> ops.Bench:
    return ops.Bench(Results.open(folder, where), meter, compiler=compiler, clock=meter.clock)


def test_every_operation_is_measured(tmp_path: Path) -> None:
    groups = [Group(operation, Shape(24, 5, 3), 2) for operation in OPERATIONS.values()]
    this = bench(tmp_path, ToldMeter(), compiler=compiled)
    assert this.measure(groups) == []
    assert this.results.failures == {}
    measured = {(row.operation, row.direction, row.implementation) for row in this.results.rows.values()}
    assert measured == {(op.name, d, i) for op in OPERATIONS.values() for d in op.passes for i in IMPLEMENTATIONS}


def test_numbers_of_a_row(tmp_path: Path) -> None:
    bench(tmp_path, ToldMeter()).measure(GROUPS[:1])
    rows = Results.open(tmp_path, WHERE).rows
    row = rows["squeeze-excite", BOTH, "setriton", 2, 16, 2, 4, "bfloat16", "channels_last"]
    assert row.gigabytes == pytest.approx(7 * (2 * 16 * 4 * 2) / 1e9)
    assert row.gigabytes_per_second == pytest.approx(row.gigabytes / 2e-3)
    assert row.copy_gigabytes_per_second == pytest.approx(row.gigabytes / 1e-3)
    assert row.copy_share == 0.5
    assert (row.median_ms, row.p20_ms, row.p80_ms, row.samples) == (2.0, 1.5, 2.5, 50)
    assert (row.peak_mebibytes, row.kernel_ms, row.launches) == (3.0, 1.75, 4.0)


def test_stops_in_time_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = ToldMeter()
    # A group is two seconds, one for each direction.
    assert bench(tmp_path, meter).measure(GROUPS, seconds=5) == GROUPS[2:]
    assert "stopped in time; run again for squeeze-excite N=2 (2 maps)" in capsys.readouterr().out
    assert meter.measured == len(Results.open(tmp_path, WHERE).rows) == 2 * 2 * 4
    assert bench(tmp_path, meter).measure(GROUPS) == []
    assert "2 of 4 maps are in" in capsys.readouterr().out
    assert meter.measured == 4 * 2 * 4
    bench(tmp_path, meter).measure(GROUPS)
    assert meter.measured == 4 * 2 * 4
    bench(tmp_path, meter).measure(GROUPS[:1], force=True)
    assert meter.measured == 5 * 2 * 4
    assert len(Results.open(tmp_path, WHERE).rows) == 4 * 2 * 4


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    meter = ToldMeter()

    class Killed(BaseException):
        pass

    def kernels(call: Call) -> Kernels | None:
        if meter.now == 2:
            raise Killed
        return None

    meter.kernels = kernels
    with pytest.raises(Killed):
        bench(tmp_path, meter).measure(GROUPS)
    rows = Results.open(tmp_path, WHERE).rows
    assert {row.direction for row in rows.values()} == {BOTH}
    assert len(rows) == 4
    meter = ToldMeter()
    bench(tmp_path, meter).measure(GROUPS[:1])
    assert meter.measured == 4


@pytest.mark.parametrize("name", ["device", "driver", "torch", "triton", "source"])
def test_another_environment_begins_anew(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(tmp_path, ToldMeter()).measure(GROUPS[:2])
    other = {**WHERE, name: "another"}
    bench(tmp_path, ToldMeter(), other).measure(GROUPS[:1])
    assert "measuring anew" in capsys.readouterr().out
    assert len(Results.open(tmp_path, other).rows) == 2 * 4
    data = json.loads((tmp_path / "ops.json").read_text())
    assert data["environment"] == other


def test_another_commit_of_the_same_sources_goes_on(tmp_path: Path) -> None:
    bench(tmp_path, ToldMeter()).measure(GROUPS[:1])
    assert len(Results.open(tmp_path, {**WHERE, "commit": "other", "date": "2100-01-01"}).rows) == 2 * 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda y: y * 2, "ValueError: y is 1.00 of its norm from eager PyTorch's"),
        (lambda y: y * float("nan"), "ValueError: y is nan of its norm"),
        (lambda y: y + y.sum().item().no_such, "AttributeError: 'float' object"),
    ],
)
def test_what_is_wrong_is_not_timed(
    fault: Callable[[Tensor], Tensor], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cases.fused

    def wrong(operation: cases.Operation) -> cases.Function:
        function = right(operation)
        return lambda *tensors: fault(function(*tensors))

    monkeypatch.setattr(cases, "fused", wrong)
    this = bench(tmp_path, ToldMeter())
    this.measure(GROUPS[:1])
    assert {row.implementation for row in this.results.rows.values()} == set(IMPLEMENTATIONS[:3])
    failures = this.results.failures
    assert list(failures) == [f"squeeze-excite 2x16x2x2 R=4, {d}, setriton" for d in (BOTH, FORWARD)]
    assert all(why.startswith(reason) for why in failures.values())
    monkeypatch.setattr(cases, "fused", right)
    meter = ToldMeter()
    bench(tmp_path, meter).measure(GROUPS[:1])
    assert meter.measured == 2


def test_a_map_too_large_is_left_out(tmp_path: Path) -> None:
    meter = ToldMeter()

    def time(calls: Sequence[Call]) -> list[Timing]:
        if meter.now == 0:
            meter.now += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return ToldMeter.time(meter, calls)

    meter.time = time
    this = bench(tmp_path, meter)
    this.measure(GROUPS[:2])
    assert {row.size for row in this.results.rows.values()} == {3}
    assert list(this.results.failures.values()) == ["OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."]


def test_more_maps_than_dynamo_keeps_of_one_function(tmp_path: Path) -> None:
    this = bench(tmp_path, ToldMeter(), compiler=compiled)
    with torch._dynamo.config.patch(recompile_limit=2):
        this.measure(GROUPS[:3])
    assert this.results.failures == {}


def test_sources_have_a_digest() -> None:
    assert len(ops.source_digest()) == 12
    assert ops.source_digest() == ops.source_digest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (32, 0)}, "batch_sizes must be at least 1"),
        ({"operations": ("tail",)}, "ops must be one of tail-training, "),
        ({"dtype": "float64"}, "dtype must be one of bfloat16, "),
        ({"layout": "NHWC"}, "layout must be one of channels_last, contiguous"),
        ({"seconds": 0}, "seconds must be positive"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.run(**arguments)


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch sees none"):
        ops.run((32,))


@pytest.fixture
def told_run(monkeypatch: pytest.MonkeyPatch) -> ToldMeter:
    """`ops.run` as on a GPU, but that everything runs here, uncompiled, and the numbers are told."""
    meter = ToldMeter()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ops, "GpuMeter", lambda: meter)
    monkeypatch.setattr(ops, "environment", lambda: {**WHERE, "device": "NVIDIA Made-up"})
    return meter


def test_run(told_run: ToldMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ops.run((1,), ("squeeze-excite",))
    folder = Path("bench", "results", "nvidia-made-up")
    assert paths == [folder / name for name in ("ops.json", "ops.md", "roofline.png")]
    assert paths[1].read_text().count("| 1, 2048, 7, 128 | ") == 2 * 4
    assert json.loads(paths[0].read_text())["environment"]["source"] == ops.source_digest()
    assert told_run.measured == 4 * 2 * 4
    ops.run((1,), ("squeeze-excite",), dtype="float32", layout="contiguous")
    assert len(json.loads(paths[0].read_text())["rows"]) == 2 * 4 * 2 * 4


def test_an_interrupted_run_leaves_all_files(told_run: ToldMeter, tmp_path: Path) -> None:
    def time(calls: Sequence[Call]) -> list[Timing]:
        if told_run.now:
            raise KeyboardInterrupt
        return ToldMeter.time(told_run, calls)

    told_run.time = time
    with pytest.raises(KeyboardInterrupt):
        ops.run((1,), ("squeeze-excite",), out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ops.json", "ops.md", "roofline.png"]
    assert (tmp_path / "ops.md").read_text().count("| 1, 256, 56, 16 | ") == 4


@pytest.mark.gpu
def test_run_on_the_gpu(tmp_path: Path) -> None:
    paths = ops.run((2,), ("squeeze-excite",), out=tmp_path)
    assert [path.name for path in paths] == ["ops.json", "ops.md", "roofline.png"]
    rows = json.loads(paths[0].read_text())["rows"]
    assert len(rows) == 4 * 2 * 4
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)


def test_folder_of_a_device() -> None:
    assert environment.results_folder("NVIDIA H200").as_posix() == "bench/results/nvidia-h200"

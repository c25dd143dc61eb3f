"""The benchmark's bookkeeping, with a clock that is told the time; what it times is real."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from setriton.bench import environment, ops


def clock(function: Callable[[], object]) -> tuple[float, float, float]:
    function()
    return 2.0, 1.5, 2.5


def test_rows_and_files(tmp_path: Path) -> None:
    device = torch.device("cpu")
    copy = ops.copy_bandwidth(device, clock, elements=10**6)
    assert copy == pytest.approx(2 * 2 * 10**6 / 2e-3 / 1e9)
    rows = list(ops.time_shapes(2, device, clock, copy, shapes=[(32, 4)]))
    assert [(row.direction, row.implementation) for row in rows] == [
        (direction, name)
        for direction in ("forward", "forward and backward")
        for name in ("eager", "torch.compile", "setriton")
    ]
    assert rows[0].gigabytes_per_second == pytest.approx(3 * (2 * 32 * 16 * 2) / 2e-3 / 1e9)
    assert rows[-1].copy_share == pytest.approx(rows[-1].gigabytes_per_second / copy)
    where = environment.environment()
    data, table = ops.write_results(tmp_path, where, copy, rows)
    assert json.loads(data.read_text())["environment"] == where
    assert len(json.loads(data.read_text())["rows"]) == 6
    assert "| forward | 2, 32, 4 | setriton | 2.0000 (1.5000, 2.5000) |" in table.read_text()


def test_more_shapes_than_dynamo_keeps_of_one_function() -> None:
    device, shapes = torch.device("cpu"), [(16, size) for size in (2, 3, 4, 5)]
    with torch._dynamo.config.patch(recompile_limit=3):
        rows = [row for batch in (1, 2) for row in ops.time_shapes(batch, device, clock, 1.0, shapes)]
    assert len(rows) == 2 * 4 * 2 * 3


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch sees none"):
        ops.run((32,))


def test_folder_of_a_device() -> None:
    assert environment.results_folder("NVIDIA H200").as_posix() == "bench/results/nvidia-h200"

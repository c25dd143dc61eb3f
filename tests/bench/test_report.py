"""The files: what they say is what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from measured import WHERE

from setriton.bench.cases import IMPLEMENTATIONS, plan
from setriton.bench.report import Results, Row, draw_roofline, markdown

# Made up: milliseconds where a copy takes 1.
MILLISECONDS = dict(zip(IMPLEMENTATIONS, (4.0, 2.0, 1.5, 1.25), strict=True))


def rows() -> list[Row]:
    return [
        Row(
            operation=group.operation.name,
            direction=direction,
            implementation=name,
            batch=group.batch,
            channels=group.shape.channels,
            size=group.shape.size,
            reduced=group.shape.reduced,
            dtype="bfloat16",
            layout="channels_last",
            median_ms=milliseconds,
            p20_ms=0.99 * milliseconds,
            p80_ms=1.01 * milliseconds,
            samples=100,
            copy_ms=1.0,
            gigabytes=group.batch * group.shape.channels * group.shape.size**2 * maps * 2 / 1e9,
            peak_mebibytes=100.0,
            kernel_ms=0.9 * milliseconds,
            launches=7.0,
        )
        for group in plan((128, 1), ())
        for direction, (maps, _) in group.operation.passes.items()
        for name, milliseconds in MILLISECONDS.items()
    ]


def test_json_holds_every_number_once_a_row_is_added(tmp_path: Path) -> None:
    results = Results(tmp_path / "new", WHERE)
    first, *rest = rows()
    results.add([first])
    data = json.loads(results.path.read_text())
    assert data["environment"] == WHERE
    assert [Row(**row) for row in data["rows"]] == [replace(first, gigabytes=float(f"{first.gigabytes:.6g}"))]
    results.add(rest)
    again = Results.open(results.folder, WHERE)
    assert list(again.rows) == [row.key for row in rows()]
    assert sorted(path.name for path in results.folder.iterdir()) == ["ops.json"]


def test_rows_are_lines(tmp_path: Path) -> None:
    results = Results(tmp_path, WHERE)
    results.add(rows())
    before = results.path.read_text().splitlines()
    results.add([replace(rows()[5], median_ms=3.0)])
    after = results.path.read_text().splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"environment": {}, "rows": []}', "[]"])
def test_other_files_are_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "ops.json").write_text(text)
    with pytest.raises(ValueError, match="is no result of this benchmark; move it away"):
        Results.open(tmp_path, WHERE)
    assert (tmp_path / "ops.json").read_text() == text


def test_table() -> None:
    shown = markdown(WHERE, rows(), {"tail-training 1x2x3x3 R=1, forward, eager": "RuntimeError: why"})
    assert "device NVIDIA H200, driver 580.1, torch 2.15.0" in shown
    assert (
        "| tail-training | forward + backward | 128 | bfloat16, channels_last | 3.20 (4) | 1.60 (4) | 1.20 (4) |"
        in shown
    )
    assert "10 passes over the map and 3 over a mask of one bit an element" in shown
    assert "| 128, 256, 56, 16 | setriton | 1.2500 (1.2375, 1.2625) | 1,644 | 80% | 1.1250 | 7 | 100.0 |" in shown
    assert "- tail-training 1x2x3x3 R=1, forward, eager: RuntimeError: why" in shown


def test_table_of_some_rows_claims_no_more() -> None:
    chosen = [replace(row, peak_mebibytes=None, kernel_ms=None, launches=None) for row in rows()[:2]]
    shown = markdown(WHERE, chosen, {})
    # Nothing of setriton's is measured, so there are no ratios.
    assert "| tail-training | forward + backward | 128" not in shown
    assert "| 128, 256, 56, 16 | eager | 4.0000 (3.9600, 4.0400) | 514 | 25% |  |  |  |" in shown
    assert "## Not measured" not in shown
    assert shown.count("## ") == 1


def test_other_dtypes_are_named() -> None:
    shown = markdown(WHERE, [replace(rows()[0], dtype="float32", layout="contiguous")], {})
    assert "| 128, 256, 56, 16, float32 contiguous | eager |" in shown


@pytest.mark.parametrize("count", [1, 3, 40, None])
def test_picture(count: int | None, tmp_path: Path) -> None:
    draw_roofline(WHERE, rows()[:count], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_all_files(tmp_path: Path) -> None:
    results = Results(tmp_path, WHERE)
    assert results.write_reports() == []
    assert list(tmp_path.iterdir()) == []
    results.add(rows())
    paths = results.write_reports()
    assert [path.name for path in paths] == ["ops.json", "ops.md", "roofline.png"]
    assert all(path.is_file() for path in paths)

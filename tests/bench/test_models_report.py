"""The files about networks: what they say is what was measured."""

from dataclasses import replace
from pathlib import Path

import measured
import pytest

from setriton.bench.models_report import ModelResults, Row, draw_taxes, markdown, taxes
from setriton.bench.networks import EAGER, MODES, NETWORKS, PLAIN, WAYS

WHERE = measured.WHERE | {"timm": "1.0.31"}
# Made up.
MILLISECONDS = {"eager": 80.0, "plain": 40.0, "backend": 39.0, "compile": 50.0, "accelerate": 41.0}


def rows(modes: tuple[str, ...] = MODES, networks: tuple[str, ...] = NETWORKS) -> list[Row]:
    return [
        Row(
            network=network,
            mode=mode,
            way=way.name,
            batch=128,
            image_size=224,
            dtype="bfloat16",
            median_ms=MILLISECONDS[way.name],
            p20_ms=MILLISECONDS[way.name] - 0.5,
            p80_ms=MILLISECONDS[way.name] + 0.5,
            samples=60,
            peak_mebibytes=12345.6,
            cold_seconds=None if way.name == EAGER else 45.25,
            warm_seconds=None if way.name == EAGER else 12.5,
            graph_breaks=None if way.name == EAGER else 0,
            recompiles=None if way.name == EAGER else 1,
        )
        for mode in modes
        for network in networks
        for way in WAYS
    ]


def test_taxes() -> None:
    found = taxes(rows())
    assert found["seresnet50", "training", "compile", 128, 224, "bfloat16"] == pytest.approx(0.25)
    assert found["seresnet50", "training", "backend", 128, 224, "bfloat16"] == pytest.approx(-0.025)
    assert len(found) == 2 * len(NETWORKS) * 4
    # Of the same network, mode, batch, size and dtype, or of none.
    plain = [row for row in rows() if row.way == PLAIN]
    others = [replace(row, dtype="float16") for row in rows() if row.way != PLAIN]
    assert taxes(plain + others) == {}


def test_table() -> None:
    shown = markdown(WHERE, rows(), {"seresnet50, training, 128 images, torch.compile": "RuntimeError: why"})
    assert "device NVIDIA H200, driver 580.1, torch 2.15.0" in shown
    assert "## training, batch 128, 224 pixels, bfloat16" in shown
    assert "| seresnet50 | 1,600 (+100.0 %) | 2,560 (+25.0 %) | 3,122 (+2.5 %) | 3,282 (-2.5 %) | 3,200 |" in shown
    assert "| seresnet50 | torch.compile | 50.00 (49.50, 50.50) | 60 | 12,346 | 45.2 | 12.5 | 0 | 1 |" in shown
    assert "| seresnet50 | eager | 80.00 (79.50, 80.50) | 60 | 12,346 |  |  |  |  |" in shown
    assert "- seresnet50, training, 128 images, torch.compile: RuntimeError: why" in shown


def test_table_of_some_rows_claims_no_more() -> None:
    shown = markdown(WHERE, [replace(rows()[0], peak_mebibytes=None)], {})
    assert "| seresnet50 | 1,600 |  |  |  |  |" in shown
    assert "| seresnet50 | eager | 80.00 (79.50, 80.50) | 60 |  |  |  |  |  |" in shown
    assert "%)" not in shown.split("## training")[1].replace("ms (20 %, 80 %)", "")
    assert "## Not measured" not in shown


def test_rows_are_in_order() -> None:
    other = [replace(row, network="aresnet50") for row in rows(networks=("seresnet50",))]
    assert markdown(WHERE, [*other, *rows()][::-1], {}) == markdown(WHERE, [*rows(), *other], {})
    lines = markdown(WHERE, [*other, *rows()], {}).split("## inference")[0].splitlines()
    assert [line.split(" | ")[0] for line in lines if "| 3,200 |" in line] == [
        f"| {n}" for n in (*NETWORKS, "aresnet50")
    ]


@pytest.mark.parametrize(
    "shown",
    [
        rows(),
        rows(modes=("training",), networks=("seresnet50",)),
        rows(networks=NETWORKS[:2]) + [replace(row, batch=1) for row in rows(modes=("training",))],
        [row for row in rows(networks=("seresnet50",)) if row.way in ("plain", "backend")],
    ],
    ids=["all", "one", "panels of unequal size", "taxes below 0"],
)
def test_picture(shown: list[Row], tmp_path: Path) -> None:
    assert draw_taxes(WHERE, shown, tmp_path / "models.png")
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    assert not draw_taxes(WHERE, [row for row in rows() if row.way != PLAIN], tmp_path / "models.png")
    assert list(tmp_path.iterdir()) == []


def test_all_files(tmp_path: Path) -> None:
    results = ModelResults(tmp_path, WHERE)
    assert results.write_reports() == []
    results.add(rows())
    paths = results.write_reports()
    assert [path.name for path in paths] == ["models.json", "models.md", "models.png"]
    assert ModelResults.open(tmp_path, WHERE).rows == results.rows
    results.rows = {row.key: row for row in rows()[:1]}
    assert [path.name for path in results.write_reports()] == ["models.json", "models.md"]

"""The files of `setriton bench ops`: ops.json, which holds every number, and what is made of it to look at."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .cases import FUSED, IMPLEMENTATIONS, OPERATIONS
from .measure import AnyRow, Key, StoredResults
from .timing import METHOD


@dataclass(frozen=True)
class Row(AnyRow):
    """One implementation on one map.

    `gigabytes` are what the arithmetic needs to move, over 1e9, the same for every implementation; `copy_ms` is the
    time of a copy that moves as many, measured in turns with the implementations. `kernel_ms` and `launches` are of
    the GPU's own record. Memory and kernels are None where they could not be measured.
    """

    operation: str
    direction: str
    implementation: str
    batch: int
    channels: int
    size: int
    reduced: int
    dtype: str
    layout: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    copy_ms: float
    gigabytes: float
    peak_mebibytes: float | None
    kernel_ms: float | None
    launches: float | None

    @property
    def key(self) -> Key:
        names = (self.operation, self.direction, self.implementation)
        return (*names, self.batch, self.channels, self.size, self.reduced, self.dtype, self.layout)

    @property
    def gigabytes_per_second(self) -> float:
        return 1e3 * self.gigabytes / self.median_ms

    @property
    def copy_gigabytes_per_second(self) -> float:
        return 1e3 * self.gigabytes / self.copy_ms

    @property
    def copy_share(self) -> float:
        """Of the bandwidth of a copy of as many bytes."""
        return self.copy_ms / self.median_ms


class Results(StoredResults[Row]):
    """ops.json, and ops.md and roofline.png beside it."""

    name = "ops.json"
    row = Row
    method = METHOD

    def _write_pages(self, rows: Sequence[Row]) -> list[Path]:
        table, picture = self.folder / "ops.md", self.folder / "roofline.png"
        table.write_text(markdown(self.environment, rows, self.failures))
        draw_roofline(self.environment, rows, picture)
        return [table, picture]


def markdown(environment: Mapping[str, str], rows: Sequence[Row], failures: Mapping[str, str]) -> str:
    """Ratios on top, then every row."""
    lines = [
        "# Operators of Squeeze-and-Excitation",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()) + ".",
        "",
        f"{METHOD} GB/s count the sweeps over the map that the arithmetic needs (none of the weights and vectors), the "
        "same for every implementation; the share is of a copy of as many bytes.",
        "",
        *_speedups(rows),
    ]
    for (operation, direction), group in groupby(_sorted(rows), lambda row: (row.operation, row.direction)):
        maps, masks = OPERATIONS[operation].passes[direction]
        needs = f"{maps} passes over the map" + (f" and {masks} over a mask of one bit an element" if masks else "")
        lines += [
            f"## {operation}, {direction}",
            "",
            f"{OPERATIONS[operation].title}: {needs}.",
            "",
            "| N, C, H=W, R | implementation | ms (20 %, 80 %) | GB/s | of copy | kernels ms | launches | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in group),
            "",
        ]
    if failures:
        lines += ["## Not measured", "", *(f"- {what}: {why}" for what, why in failures.items()), ""]
    return "\n".join(lines)


def _speedups(rows: Sequence[Row]) -> list[str]:
    others = [name for name in IMPLEMENTATIONS if name != FUSED]
    lines = [
        "Time over setriton's, geometric mean over the maps where both are measured (number of maps):",
        "",
        f"| operation | direction | N | dtype, layout | {' | '.join(others)} |",
        "|---" * (4 + len(others)) + "|",
    ]

    def head(row: Row) -> tuple[str, str, int, str, str]:
        return row.operation, row.direction, row.batch, row.dtype, row.layout

    by_head: dict[tuple[str, str, int, str, str], list[Row]] = {}
    for row in _sorted(rows):
        by_head.setdefault(head(row), []).append(row)
    for (operation, direction, batch, dtype, layout), group in by_head.items():
        fused = {(r.channels, r.size, r.reduced): r.median_ms for r in group if r.implementation == FUSED}
        cells = []
        for name in others:
            other = {(r.channels, r.size, r.reduced): r.median_ms for r in group if r.implementation == name}
            ratios = [other[shape] / fused[shape] for shape in other.keys() & fused.keys()]
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "")
        if any(cells):
            lines.append(f"| {operation} | {direction} | {batch} | {dtype}, {layout} | {' | '.join(cells)} |")
    return [*lines, ""]


def _line(row: Row) -> str:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    usual = (row.dtype, row.layout) == ("bfloat16", "channels_last")
    variant = "" if usual else f", {row.dtype} {row.layout}"
    return (
        f"| {row.batch}, {row.channels}, {row.size}, {row.reduced}{variant} | {row.implementation} "
        f"| {row.median_ms:.4f} ({row.p20_ms:.4f}, {row.p80_ms:.4f}) | {row.gigabytes_per_second:,.0f} "
        f"| {row.copy_share:.0%} | {number(row.kernel_ms, 4)} | {number(row.launches, 0)} "
        f"| {number(row.peak_mebibytes, 1)} |"
    )


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """In the order of the operations, their directions, batches and maps, whatever order they were measured in."""
    order = [(name, direction) for name, op in OPERATIONS.items() for direction in op.passes]

    def place(row: Row) -> tuple[int | str, ...]:
        of_map = (row.dtype, row.layout, row.batch, row.channels, -row.size, row.reduced)
        return order.index((row.operation, row.direction)), *of_map, IMPLEMENTATIONS.index(row.implementation)

    return sorted(rows, key=place)


def draw_roofline(environment: Mapping[str, str], rows: Sequence[Row], path: Path) -> None:
    """Achieved bandwidth over bytes moved, a panel for each operation and direction; the roof is the copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {(row.operation, row.direction) for row in rows}
    panels = [(name, direction) for name, op in OPERATIONS.items() for direction in op.passes]
    families = groupby((p for p in panels if p in measured), lambda panel: panel[0].split("-")[0])
    lines = [list(family) for _, family in families]
    columns = max(map(len, lines))
    size = (4.6 * columns + 0.5, 3.2 * len(lines) + 1)
    figure, grid = plt.subplots(len(lines), columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for line, axes_of_line in zip(lines, grid, strict=True):
        for axes in axes_of_line[len(line) :]:
            axes.remove()
        for (operation, direction), axes in zip(line, axes_of_line, strict=False):
            _panel(axes, [row for row in rows if (row.operation, row.direction) == (operation, direction)])
            axes.set_title(f"{operation}, {direction}", fontsize=10)
        axes_of_line[0].set_ylabel("GB/s")
    for axes in grid[-1, : len(lines[-1])]:
        axes.set_xlabel("MB that the arithmetic moves in a call")
    where = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "commit", "date"))
    figure.suptitle(f"{environment['device']}: {where}", fontsize=11)
    shown = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    # Okabe and Ito's colours, which the colour-blind tell apart, and one dark one for setriton.
    styles = zip(IMPLEMENTATIONS, ("#999999", "#e69f00", "#56b4e9", "#a8005c"), "vsDo", strict=True)
    roof = _medians([(1e3 * row.gigabytes, row.copy_gigabytes_per_second) for row in rows])
    axes.plot(*zip(*roof, strict=True), color="black", linewidth=1.5, label="roof: a copy of as many bytes = 100%")
    for name, colour, marker in styles:
        points = _medians([(1e3 * r.gigabytes, r.gigabytes_per_second) for r in rows if r.implementation == name])
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1, label=name)
            x, y = points[-1]
            label = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": colour}
            axes.annotate(f"{y / dict(roof)[x]:.0%}", (x, y), (6, 0), **label)
    axes.set(xscale="log", ylim=(0, None))
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, alpha=0.3)


def _medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point for all maps that move as many bytes, from left to right."""
    by_x = groupby(sorted(points), lambda point: point[0])
    return [(x, statistics.median(y for _, y in group)) for x, group in by_x]

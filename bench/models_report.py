"""The files of `setriton bench models`: models.json, which holds every number, and what is made of it to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .measure import AnyRow, Key, StoredResults
from .networks import BACKEND, EAGER, MODES, NETWORKS, PLAIN, WAYS, Case

METHOD = (
    "A training step: forward under autocast with float32 weights in channels_last, cross-entropy, backward, SGD with "
    "momentum outside of the compiled graph. Inference: under autocast and inference_mode. Random weights and images. "
    "CUDA events around each call; the ways to run a network take turns in 5 rounds, one uncounted call before each. "
    "Peak memory: weights, momenta, gradients and activations. Compilation: what the first step takes longer than the "
    "second in a fresh process, with empty caches on disk (cold) and with those that this left (warm). Recompilations: "
    "graphs compiled by further steps, two of them of other batch sizes."
)
# In tables and, from top to bottom, in bars.
ORDER = (EAGER, "compile", "accelerate", BACKEND, PLAIN)
TITLES = {way.name: way.title for way in sorted(WAYS, key=lambda way: ORDER.index(way.name))}
# The tax of eager PyTorch dwarfs what compilers differ by; bars end here, and say what they are.
LONGEST_BAR = 0.6
# Okabe and Ito's colours, which the colour-blind tell apart, and dark ones for setriton.
COLOURS = {EAGER: "#999999", "compile": "#e69f00", "accelerate": "#0072b2", BACKEND: "#a8005c"}
# Between the bars of two networks, in bars.
GAP = 0.8


@dataclass(frozen=True)
class Row(AnyRow):
    """One way to run a network. What compiling costs is None until it is measured, and for eager PyTorch."""

    network: str
    mode: str
    way: str
    batch: int
    image_size: int
    dtype: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    peak_mebibytes: float | None
    cold_seconds: float | None = None
    warm_seconds: float | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None

    @property
    def key(self) -> Key:
        return row_key(self.case, self.way)

    @property
    def case(self) -> Case:
        return Case(self.network, self.mode, self.batch, self.image_size, self.dtype)

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.median_ms


def row_key(case: Case, way: str) -> Key:
    """Of the row of a way to run a case's network."""
    return case.network, case.mode, way, case.batch, case.image_size, case.dtype


class ModelResults(StoredResults[Row]):
    """models.json, and models.md and models.png beside it."""

    name = "models.json"
    row = Row
    method = METHOD
    identity = (*StoredResults.identity, "timm")

    def _write_pages(self, rows: Sequence[Row]) -> list[Path]:
        table, picture = self.folder / "models.md", self.folder / "models.png"
        table.write_text(markdown(self.environment, rows, self.failures))
        drawn = draw_taxes(self.environment, rows, picture)
        return [table, picture] if drawn else [table]


def taxes(rows: Sequence[Row]) -> dict[Key, float]:
    """Of each row, the time over that of the same network without SE under torch.compile, less 1; where both are."""
    plain = {row.case: row.median_ms for row in rows if row.way == PLAIN}
    return {row.key: row.median_ms / plain[row.case] - 1 for row in rows if row.way != PLAIN and row.case in plain}


def markdown(environment: Mapping[str, str], rows: Sequence[Row], failures: Mapping[str, str]) -> str:
    """The price of SE on top, then every row."""
    rows, tax = _sorted(rows), taxes(rows)
    lines = [
        "# Networks with Squeeze-and-Excitation",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()) + ".",
        "",
        METHOD,
        "",
        "SE tax: time over that of the same network without SE under torch.compile, less 1.",
        "",
    ]
    for panel, group in groupby(rows, _panel):
        by_key = {row.key: row for row in group}
        cases = list(dict.fromkeys(row.case for row in by_key.values()))
        lines += [f"## {_panel_title(panel)}", ""]
        lines += ["| img/s (SE tax) | " + " | ".join(TITLES.values()) + " |", "|---" * (1 + len(TITLES)) + "|"]
        for case in cases:
            cells = [_speed(by_key.get(row_key(case, way)), tax) for way in TITLES]
            lines.append(f"| {case.network} | {' | '.join(cells)} |")
        lines += [
            "",
            "| network | way | ms (20 %, 80 %) | samples | peak MiB | cold s | warm s | graph breaks | recompiled |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_line, by_key.values()),
            "",
        ]
    if failures:
        lines += ["## Not measured", "", *(f"- {what}: {why}" for what, why in failures.items()), ""]
    return "\n".join(lines)


def _speed(row: Row | None, tax: Mapping[Key, float]) -> str:
    if row is None:
        return ""
    price = f" ({_percent(tax[row.key])})" if row.key in tax else ""
    return f"{row.images_per_second:,.0f}{price}"


def _percent(tax: float) -> str:
    return f"{100 * tax:+.1f} %"


def _line(row: Row) -> str:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    return (
        f"| {row.network} | {TITLES[row.way]} | {row.median_ms:.2f} ({row.p20_ms:.2f}, {row.p80_ms:.2f}) "
        f"| {row.samples} | {number(row.peak_mebibytes, 0)} | {number(row.cold_seconds, 1)} "
        f"| {number(row.warm_seconds, 1)} | {number(row.graph_breaks, 0)} | {number(row.recompiles, 0)} |"
    )


Panel = tuple[str, int, int, str]


def _panel(row: Row) -> Panel:
    return row.mode, row.batch, row.image_size, row.dtype


def _panel_title(panel: Panel) -> str:
    mode, batch, image_size, dtype = panel
    return f"{mode}, batch {batch}, {image_size} pixels, {dtype}"


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """In the order of dtypes, sizes, modes, networks and ways, whatever order they were measured in."""
    networks = list(NETWORKS)

    def place(row: Row) -> tuple[int | str, ...]:
        # Networks that were asked for by name follow those that are there by default.
        network = networks.index(row.network) if row.network in networks else len(networks)
        of_panel = (row.dtype, -row.image_size, -row.batch, MODES.index(row.mode))
        return *of_panel, network, row.network, ORDER.index(row.way)

    return sorted(rows, key=place)


def draw_taxes(environment: Mapping[str, str], rows: Sequence[Row], path: Path) -> bool:
    """Bars of the SE tax, a panel for each mode and size; whether there was any to draw."""
    tax = taxes(rows)
    plain = {row.case: row for row in rows if row.way == PLAIN}
    rows = [row for row in _sorted(rows) if row.key in tax]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(panel, list(of_panel)) for panel, of_panel in groupby(rows, _panel)]
    columns = min(2, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    bars = [max(len(of) + GAP * len({row.network for row in of}) for _, of in line) for line in lines]
    size = (6.6 * columns + 1.2, 0.2 * sum(bars) + 0.6 * len(lines) + 1.4)
    figure, grid = plt.subplots(
        len(lines), columns, figsize=size, height_ratios=bars, squeeze=False, layout="constrained"
    )
    for line, bars_of_line, axes_of_line in zip(lines, bars, grid, strict=True):
        for axes in axes_of_line[len(line) :]:
            axes.remove()
        for (panel, of_panel), axes in zip(line, axes_of_line, strict=False):
            _draw_panel(axes, of_panel, tax, plain)
            axes.set_title(_panel_title(panel), fontsize=11)
            axes.set_ylim(bars_of_line - GAP / 2, -1)
    where = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "commit", "date"))
    cut = f" (bars end at {LONGEST_BAR:+.0%})" if max(tax.values()) > LONGEST_BAR else ""
    title = f"SE tax: time over that of the network without SE under torch.compile, less 1{cut}"
    figure.suptitle(f"{title}\n{environment['device']}: {where}", fontsize=11)
    shown = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2 * columns, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _draw_panel(axes: Any, rows: Sequence[Row], tax: Mapping[Key, float], plain: Mapping[Case, Row]) -> None:
    longest = min(LONGEST_BAR, max(0.01, *(tax[row.key] for row in rows)))
    middles, names, place = [], [], 0.0
    for case, of_case in groupby(rows, lambda row: row.case):
        first = place
        for row in of_case:
            end = min(tax[row.key], longest)
            axes.barh(place, end, 0.9, color=COLOURS[row.way], label=TITLES[row.way])
            label = f"{_percent(tax[row.key])}, {row.images_per_second:,.0f} img/s"
            axes.annotate(label, (max(0, end), place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            place += 1
        middles.append((first + place - 1) / 2)
        names.append(f"{case.network}\nwithout SE: {plain[case].images_per_second:,.0f} img/s")
        place += GAP
    axes.set_yticks(middles, names, fontsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(0, color="black", linewidth=1)
    # The labels stand to the right of the longest bar.
    least = min(0, *(tax[row.key] for row in rows))
    axes.set_xlim(1.1 * least, longest + 0.45 * (longest - least))
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:+.3g} %" if x else "0")

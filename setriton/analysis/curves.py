"""Training curves in the manner of the paper's Figure 2: training error dashed, validation error solid."""

from collections.abc import Mapping
from pathlib import Path

from setriton.train.metrics import EpochMetrics, read_metrics

FORMATS = (".png", ".pdf", ".svg")


def draw_curves(runs: Mapping[str, Path], out: Path) -> None:
    """Draw training and validation error over epochs, one colour a run.

    Args:
        runs: label to folder of a training run, which holds a metrics.csv.
        out: the picture to write; its suffix says the format.

    Raises:
        ValueError: no runs, one without a finished epoch, or a format that `out` cannot have.
        FileNotFoundError: a run has no metrics.csv.
    """
    curves = {label: _read(folder) for label, folder in runs.items()}
    if not curves:
        raise ValueError("runs must name at least one training run; got none")
    if out.suffix not in FORMATS:
        raise ValueError(f"out must end in {', '.join(FORMATS)}; got {out}")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (label, rows) in enumerate(curves.items()):
        epochs = [row.epoch + 1 for row in rows]
        final = rows[-1].val_error_top1
        axes.plot(epochs, [row.train_error for row in rows], color=f"C{index}", linestyle="--", linewidth=1.2)
        axes.plot(
            epochs,
            [row.val_error_top1 for row in rows],
            color=f"C{index}",
            linewidth=2,
            label=f"{label}: {final:.2f} % validation error",
        )
    axes.plot([], [], color="grey", linestyle="--", linewidth=1.2, label="training (augmented images)")
    axes.plot([], [], color="grey", linewidth=2, label="validation")
    # Errors span two decades within a run: a linear axis would hide everything after the first epochs.
    axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set(xlabel="epoch", ylabel="error (%)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _read(folder: Path) -> list[EpochMetrics]:
    path = folder / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.csv; it is no training run")
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path} has no finished epoch yet")
    return rows

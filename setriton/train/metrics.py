"""What a run reports: metrics.csv, TensorBoard, and a progress display or plain lines."""

import csv
import io
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from setriton.files import write_atomically


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv. Errors in percent; `step` counts the steps done at the end of the epoch."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_error: float
    val_loss: float
    val_error_top1: float
    val_error_top5: float | None
    images_per_second: float
    seconds: float


COLUMNS = tuple(field.name for field in fields(EpochMetrics))


class MetricsLogger:
    """The silent logger of every rank but 0, and the interface of the other."""

    def log_step(self, step: int, *, loss: float, error: float, lr: float, images_per_second: float) -> None:
        """Training loss, error (percent) and speed since the last log step."""

    def log_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch and its evaluation."""

    def close(self) -> None:
        """Flush everything to disk."""


class RunLogger(MetricsLogger):
    """Writes to `out`; what an interrupted run logged past `step`, from where this one goes on, is dropped.

    Args:
        out: folder of metrics.csv and tensorboard/.
        step: first step of this run.
        steps_per_epoch: for the epoch counter.
        epochs: planned epochs.
    """

    def __init__(self, out: Path, *, step: int, steps_per_epoch: int, epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.csv_path = out / "metrics.csv"
        rows = [row for row in read_metrics(self.csv_path) if row.step <= step] if step else []
        write_atomically(self.csv_path, _to_csv(rows, header=True).encode())
        self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        self.epochs = epochs
        self.display = _Display(step, steps_per_epoch, epochs) if sys.stdout.isatty() else None

    def log_step(self, step: int, *, loss: float, error: float, lr: float, images_per_second: float) -> None:
        scalars = {"loss": loss, "error": error, "lr": lr, "images_per_second": images_per_second}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(f"train/{name}", value, step)
        if self.display:
            self.display.update(step, loss=loss, error=error, images_per_second=images_per_second)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        with self.csv_path.open("a", newline="") as file:
            file.write(_to_csv([metrics], header=False))
            file.flush()
            # A checkpoint of this step may follow: its row must not be younger on disk than it is.
            os.fsync(file.fileno())
        scalars = {"loss": metrics.val_loss, "error_top1": metrics.val_error_top1, "error_top5": metrics.val_error_top5}
        for name, value in scalars.items():
            if value is not None:
                self.tensorboard.add_scalar(f"val/{name}", value, metrics.step)
        self.tensorboard.flush()
        top5 = "" if metrics.val_error_top5 is None else f" top-5 {metrics.val_error_top5:.2f} %"
        line = (
            f"epoch {metrics.epoch + 1}/{self.epochs}: train loss {metrics.train_loss:.4f} "
            f"error {metrics.train_error:.2f} %, val loss {metrics.val_loss:.4f} "
            f"error {metrics.val_error_top1:.2f} %{top5}, {metrics.images_per_second:.0f} img/s"
        )
        if self.display:
            self.display.print(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self.tensorboard.close()
        if self.display:
            self.display.progress.stop()


class _Display:
    """One line on a terminal: where in the epoch, loss, error, speed, time to the end of the run."""

    def __init__(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * epochs
        self.first_step = step
        self.started = time.monotonic()
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self.task = self.progress.add_task("", total=steps_per_epoch, epoch=f"1/{epochs}", numbers="")
        self.epochs = epochs
        self.progress.start()

    def update(self, step: int, *, loss: float, error: float, images_per_second: float) -> None:
        epoch, done = divmod(step - 1, self.steps_per_epoch)
        per_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
        minutes, seconds = divmod(round(per_step * (self.total_steps - step)), 60)
        numbers = (
            f"loss {loss:.4f}  error {error:.2f} %  {images_per_second:.0f} img/s  "
            f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        )
        self.progress.update(self.task, completed=done + 1, epoch=f"{epoch + 1}/{self.epochs}", numbers=numbers)

    def print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)


def read_metrics(path: Path) -> list[EpochMetrics]:
    """Rows of a metrics.csv; an absent file has none, a half-written last line is left out.

    Raises:
        ValueError: the file has other columns, or values that are no numbers.
    """
    if not path.exists():
        return []
    text = path.read_text()
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    if rows.fieldnames and tuple(rows.fieldnames) != COLUMNS:
        raise ValueError(f"{path} is not the metrics.csv of one run: its columns are {', '.join(rows.fieldnames)}")
    try:
        return [_parse(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} line {rows.line_num}: {error}") from None


def _parse(row: dict[str, str]) -> EpochMetrics:
    return EpochMetrics(
        epoch=int(row["epoch"]),
        step=int(row["step"]),
        val_error_top5=float(row["val_error_top5"]) if row["val_error_top5"] else None,
        **{name: float(row[name]) for name in COLUMNS if name not in ("epoch", "step", "val_error_top5")},
    )


def _to_csv(rows: list[EpochMetrics], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()

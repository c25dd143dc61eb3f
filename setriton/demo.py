"""The demonstration: SE-ResNet-20 and its plain twin trained on real images, with their curves side by side."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .analysis.curves import draw_curves
from .doctor import check_kernels
from .recipes import RECIPES
from .train.metrics import COLUMNS

NETWORKS = ("se_resnet20", "resnet20")


def run(out: Path, ranks: int | None = None, epochs: int | None = None) -> None:
    """Train both networks under torchrun, then write curves.png, metrics.csv and a closing table.

    Args:
        out: folder for the results; runs of an earlier demonstration in it are resumed, or shown if they are complete.
        ranks: processes; None is one per GPU, or two on a machine without.
        epochs: passes over the training images; None is the recipe's.

    Raises:
        ValueError: a number out of range, or a finished demonstration of another length in `out`.
        RunError: a training run failed or was stopped; its own message stands above.
    """
    for name, value in (("ranks", ranks), ("epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = ranks or _default_ranks()
    batch_size = RECIPES["digits"][1].batch_size
    if batch_size % ranks:
        raise ValueError(f"ranks must divide the recipe's batch of {batch_size} images; got {ranks}")
    console.print(f"[bold]squeeze_excite[/bold] on {device.type}: {check_kernels(device)}", soft_wrap=True)
    if device.type == "cpu":
        console.print(
            "No GPU here, so SE runs in plain PyTorch; on a GPU it would be the Triton kernels.", soft_wrap=True
        )
    for network in NETWORKS:
        console.print(f"\n[bold]{network}[/bold] on 1,797 handwritten digits, {ranks} FSDP ranks")
        _train(network, out / network, ranks, epochs)
    draw_curves({network: out / network for network in NETWORKS}, out / "curves.png")
    _join_metrics(out)
    console.print(_summary(out))
    console.print(
        f"curves    {out / 'curves.png'}\nmetrics   {out / 'metrics.csv'}\n"
        f"weights   {', '.join(str(out / network / 'model.safetensors') for network in NETWORKS)}\n\n"
        f"Next:\n{_activation()}"
        f"  setriton evaluate {out / NETWORKS[0] / 'model.safetensors'}\n"
        f"  tensorboard --logdir {out}\n"
        "  torchrun --nproc-per-node 8 -m setriton train imagenet-modern --data.source imagefolder:/path/to/imagenet",
        soft_wrap=True,
        highlight=False,
    )


def _activation() -> str:
    """The line that makes the commands below it known, where they are not."""
    activate = Path(sys.executable).with_name("activate")
    return f"  source {activate}\n" if shutil.which("setriton") is None and activate.is_file() else ""


class RunError(RuntimeError):
    """A training run did not come to its end."""


def _default_ranks() -> int:
    """One per GPU, as far as they share the batch evenly, or two on a machine without."""
    if not torch.cuda.is_available():
        return 2
    batch_size = RECIPES["digits"][1].batch_size
    return max(n for n in range(1, torch.cuda.device_count() + 1) if batch_size % n == 0)


def _train(network: str, out: Path, ranks: int, epochs: int | None) -> None:
    result = out / "result.json"
    if result.is_file():
        trained = json.loads(result.read_text())["epochs"]
        if epochs not in (None, trained):
            raise ValueError(f"epochs: {out} holds a finished run of {trained}; delete it or choose another --out")
        print(f"already trained: {out} (delete it to train anew)")
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # A free port is picked here, where the fixed default would meet another job's.
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "setriton", "train", "digits", "--model.name", network, "--out", str(out), "--resume"]
    if epochs is not None:
        command += ["--schedule.epochs", str(epochs)]
    # One thread a rank: torchrun would choose that too, with a warning.
    status = subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ).returncode
    if not result.is_file():
        raise RunError(
            f"training {network} did not finish (status {status}); the same command goes on where it stopped"
        )


def _join_metrics(out: Path) -> None:
    """One metrics.csv of both runs, with the network in the first column."""
    with (out / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("network", *COLUMNS))
        writer.writeheader()
        for network in NETWORKS:
            with (out / network / "metrics.csv").open(newline="") as rows:
                writer.writerows({"network": network, **row} for row in csv.DictReader(rows))


def _summary(out: Path) -> Table:
    table = Table("network", "validation error", "parameters", "img/s", "epochs", "device")
    for network in NETWORKS:
        result = json.loads((out / network / "result.json").read_text())
        speed = result["images_per_second"]
        table.add_row(
            network,
            f"{result['val_error_top1']:.2f} %",
            f"{result['parameters']:,}",
            "-" if speed is None else f"{speed:,.0f}",
            str(result["epochs"]),
            f"{result['world_size']} x {result['device']}",
        )
    return table

"""squeeze_excite on this GPU, against eager PyTorch and torch.compile, at the maps of SE-ResNet-50."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import setriton

from .environment import environment, results_folder

# (C, H) of the four stages; R is C // 16.
SHAPES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
# Passes over the map that the arithmetic needs: read, read, write; and backward read, read, read, write.
PASSES = {"forward": 3, "forward and backward": 7}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# Milliseconds of a call: median, 20th and 80th percentile.
Timer = Callable[[Callable[[], object]], tuple[float, float, float]]


@dataclass(frozen=True)
class Row:
    """One timing. `copy_share` is the achieved bandwidth over that of a device-to-device copy in the same run."""

    implementation: str
    direction: str
    batch: int
    channels: int
    size: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    gigabytes_per_second: float
    copy_share: float


def naive(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The block as users write it."""
    q = x.mean((2, 3), keepdim=True)
    return x * torch.sigmoid(F.conv2d(F.relu(F.conv2d(q, w1, b1)), w2, b2))


def run(batch_sizes: Sequence[int], out: Path | None = None) -> list[Path]:
    """Time every implementation, shape and batch size in bfloat16, channels_last; write squeeze_excite.json and .md.

    Args:
        batch_sizes: images per call.
        out: folder for the results; None is bench/results/<device>.

    Raises:
        ValueError: no GPU, or a batch size below 1.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench ops times kernels on a GPU; torch sees none")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be at least 1; got {batch_sizes}")
    where = environment()
    device = torch.device("cuda")
    copy = copy_bandwidth(device, do_bench)
    rows = [row for batch in batch_sizes for row in time_shapes(batch, device, do_bench, copy)]
    return write_results(out or results_folder(where["device"]), where, copy, rows)


def do_bench(function: Callable[[], object]) -> tuple[float, float, float]:
    """Triton's timer: CUDA events, the L2 cache flushed before each call."""
    from triton.testing import do_bench

    median, p20, p80 = do_bench(function, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    return median, p20, p80


def copy_bandwidth(device: torch.device, timer: Timer, elements: int = 2**28) -> float:
    """Gigabytes per second of a copy, read and written: the practical ceiling of any sweep."""
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))[0] / 1e6


def time_shapes(
    batch: int, device: torch.device, timer: Timer, copy: float, shapes: Sequence[tuple[int, int]] = SHAPES
) -> Iterator[Row]:
    """Rows of all implementations and both directions at one batch size."""
    for channels, size in shapes:
        # A static graph for every shape and grad mode: nine of them would pass Dynamo's limit of one function.
        torch.compiler.reset()
        implementations: dict[str, Function] = {
            "eager": naive,
            "torch.compile": torch.compile(naive, fullgraph=True, dynamic=False),
            "setriton": setriton.squeeze_excite,
        }
        inputs = _inputs(batch, channels, size, device)
        for direction, passes in PASSES.items():
            for name, function in implementations.items():
                median, p20, p80 = timer(_call(function, inputs, direction))
                bandwidth = passes * inputs[0].nbytes / median / 1e6
                yield Row(name, direction, batch, channels, size, median, p20, p80, bandwidth, bandwidth / copy)


def write_results(folder: Path, where: dict[str, str], copy: float, rows: Sequence[Row]) -> list[Path]:
    """squeeze_excite.json with everything, squeeze_excite.md to read."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"environment": where, "copy_gigabytes_per_second": copy, "rows": [asdict(row) for row in rows]}
    paths = [folder / "squeeze_excite.json", folder / "squeeze_excite.md"]
    paths[0].write_text(json.dumps(data, indent=2) + "\n")
    paths[1].write_text(_markdown(where, copy, rows))
    return paths


def _call(function: Function, inputs: Inputs, direction: str) -> Callable[[], object]:
    dy = torch.randn_like(inputs[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, dy)

    return forward if direction == "forward" else forward_and_backward


def _inputs(batch: int, channels: int, size: int, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    reduced = channels // 16
    x = randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    weights = randn(reduced, channels, 1, 1), randn(reduced), randn(channels, reduced, 1, 1), randn(channels)
    for tensor in (x, *weights):
        tensor.requires_grad_()
    return x, *weights


def _markdown(where: dict[str, str], copy: float, rows: Sequence[Row]) -> str:
    lines = [
        "# squeeze_excite, bfloat16, channels_last",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items()) + f"; copy {copy:,.0f} GB/s.",
        "Median of 100 ms of calls, 20th and 80th percentile in brackets; L2 flushed before each call.",
        "",
        "| direction | N, C, H=W | implementation | ms | GB/s | of copy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.direction} | {row.batch}, {row.channels}, {row.size} | {row.implementation} "
            f"| {row.median_ms:.4f} ({row.p20_ms:.4f}, {row.p80_ms:.4f}) "
            f"| {row.gigabytes_per_second:,.0f} | {row.copy_share:.0%} |"
        )
    return "\n".join(lines) + "\n"

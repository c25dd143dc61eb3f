"""The command line. Each command imports what it needs when it runs, and answers wrong input with one line."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from . import __version__

# What commands raise for wrong input, answered with one line; SETRITON_TRACEBACK=1 shows where it came from. Anything
# else is a defect and keeps its traceback.
INPUT_ERRORS = (ValueError, TypeError, OSError)


def train(arguments: Sequence[str]) -> int:
    """Train a network: setriton train RECIPE [overrides]; under torchrun, on all ranks together."""
    import tyro

    from .recipes import RECIPES
    from .train import NonFiniteError, TrainConfig
    from .train import train as run
    from .train.distributed import errors_once

    if not arguments or arguments[0] in ("-h", "--help"):
        recipes = [f"  {name:<16} {description}" for name, (description, _) in RECIPES.items()]
        print("\n".join(["usage: setriton train RECIPE [options]", "", *recipes, "", "Options: train RECIPE --help"]))
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in RECIPES:
        with errors_once():
            raise ValueError(f"RECIPE must be one of {', '.join(RECIPES)}; got {name!r}")
    description, default = RECIPES[name]
    with _rank_0_speaks():
        config = tyro.cli(
            TrainConfig, default=default, description=description, prog=f"setriton train {name}", args=rest
        )
    try:
        run(config)
    except NonFiniteError as error:
        return _fail("train", error, status=1)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Loss and errors of a trained network (model.safetensors) on validation images."""
    from .train import ParallelConfig
    from .train import evaluate as run

    def command(
        path: Annotated[Path, _positional()],
        source: str | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        batch_size: int = 256,
        workers: int = 0,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Loss and errors of a trained network on validation images.

        Args:
            path: model.safetensors as a training run leaves it.
            source: digits, imagefolder:PATH or synthetic; unset, the images it was trained with.
            image_size: side of the input in pixels; unset, what it was trained with.
            resize: shorter side before the centre crop; unset, image_size * 256 / 224.
            batch_size: images per rank and forward pass.
            workers: data loading processes per rank.
            precision: fp32, or bf16 autocast.
        """
        result = run(
            path,
            source,
            image_size=image_size,
            resize=resize,
            batch_size=batch_size,
            workers=workers,
            parallel=ParallelConfig(precision=precision),
        )
        top5 = "" if result.error_top5 is None else f", top-5 error {result.error_top5:.2f} %"
        if _is_rank0():
            print(f"{result.images} images: loss {result.loss:.4f}, top-1 error {result.error_top1:.2f} %{top5}")

    return _call("evaluate", command, arguments)


def models(arguments: Sequence[str]) -> int:
    """The networks: names, parameters, classes."""
    import torch
    from rich.table import Table

    from .models import create_model, list_models

    def command(pattern: Annotated[str, _positional()] = "*") -> None:
        """The networks: names, parameters, classes by default.

        Args:
            pattern: shell pattern, such as 'se_*'.
        """
        names = list_models(pattern)
        if not names:
            raise ValueError(f"no network matches {pattern!r}; `setriton models` lists all")
        table = Table("network", "parameters", "classes")
        for name in names:
            with torch.device("meta"):
                model = create_model(name)
            parameters = sum(p.numel() for p in model.parameters())
            table.add_row(name, f"{parameters:,}", f"{model.get_submodule('fc').out_features:,}")
        _print(table)

    return _call("models", command, arguments)


def curves(arguments: Sequence[str]) -> int:
    """Draw training and validation error of finished or running trainings."""
    from .analysis.curves import draw_curves

    def command(runs: Annotated[tuple[Path, ...], _positional()], out: Path = Path("curves.png")) -> None:
        """Training and validation error over epochs, one colour a run.

        Args:
            runs: folders of training runs, each with a metrics.csv.
            out: the picture to write (.png, .pdf, .svg).
        """
        draw_curves({str(run): run for run in runs}, out)
        print(out)

    return _call("curves", command, arguments)


def bench(arguments: Sequence[str]) -> int:
    """Benchmarks: `ops` times kernels on this GPU; `resources`, `traffic`: what they need and move, without one."""
    kinds = {"ops": _bench_ops, "resources": _bench_resources, "traffic": _bench_traffic}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: setriton bench {'|'.join(kinds)} ...\n\n{bench.__doc__}\n\nOptions: bench ops --help, and so on")
        return 0 if arguments else 2
    if arguments[0] not in kinds:
        raise ValueError(f"bench wants one of {', '.join(kinds)}; got {arguments[0]!r}")
    return kinds[arguments[0]](arguments[1:])


def _bench_ops(arguments: Sequence[str]) -> int:
    from .bench.ops import run

    def command(batch_sizes: tuple[int, ...] = (32, 128), out: Path | None = None) -> None:
        """Time squeeze_excite on this GPU against eager PyTorch and torch.compile.

        Args:
            batch_sizes: images per call.
            out: folder for the results; unset, bench/results/<device>.
        """
        for path in run(batch_sizes, out):
            print(path)

    return _call("bench ops", command, arguments)


def _bench_resources(arguments: Sequence[str]) -> int:
    from .bench.resources import TARGETS, resources, training_step

    def command(targets: tuple[str, ...] = tuple(TARGETS)) -> None:
        """Registers, spills, shared memory and widest access of every kernel, compiled for GPUs that need not be here.

        Args:
            targets: sm_80, sm_90, sm_100, sm_120, gfx942, gfx950.
        """
        from rich.table import Table

        table = Table("target", "kernel", "registers", "spilled B", "shared B", "access bits")
        for target in targets:
            for row in dict.fromkeys(resources(training_step(), target)):
                numbers = (row.registers, row.spilled, row.shared, row.widest_access)
                table.add_row(row.target, row.kernel.strip("_").removesuffix("_kernel"), *map(str, numbers))
        _print(table)

    return _call("bench resources", command, arguments)


def _bench_traffic(arguments: Sequence[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at import whether kernels are compiled or interpreted.
        again = [sys.executable, "-m", "setriton", "bench", "traffic", *arguments]
        return subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    from .bench.traffic import squeeze_excite_traffic

    def command(n: int = 2, channels: int = 64, size: int = 16, l2_mib: int = 50) -> None:
        """Passes over the feature map that squeeze_excite makes in bfloat16, counted in Triton's interpreter.

        Args:
            n: images.
            channels: channels of the map.
            size: its height and width; small ones take seconds, and O(N*C) terms weigh more in them.
            l2_mib: the modelled L2 cache, MiB.
        """
        from rich.table import Table

        if min(n, channels, size, l2_mib) < 1:
            raise ValueError(f"n, channels, size and l2_mib must be at least 1; got {(n, channels, size, l2_mib)}")
        table = Table("layout", "direction", "launches", "passes", "passes to HBM")
        for layout in ("channels_last", "contiguous"):
            x, *both = squeeze_excite_traffic(
                n, channels, size, channels_last=layout == "channels_last", l2_bytes=l2_mib * 2**20
            )
            for direction, traffic in zip(("forward", "backward"), both, strict=True):
                passes = f"{traffic.passes(x):.2f}", f"{traffic.hbm_passes(x):.2f}"
                table.add_row(layout, direction, str(len(traffic.launches)), *passes)
        _print(table)

    return _call("bench traffic", command, arguments)


def doctor(arguments: Sequence[str]) -> int:
    """What this machine can do: versions, devices, and whether the kernels run and are right."""
    from .doctor import report

    def command() -> None:
        """Versions, devices, and whether the kernels run here and are right."""
        _print(report())

    return _call("doctor", command, arguments)


def demo(arguments: Sequence[str]) -> int:
    """Train SE-ResNet-20 and its plain twin on real digits, and draw their curves: minutes on two cores."""
    from .demo import RunError, run

    def command(out: Path = Path("out/demo"), ranks: int | None = None, epochs: int | None = None) -> None:
        """Train SE-ResNet-20 and its plain twin on scikit-learn's digits, and draw their curves.

        Args:
            out: folder for the picture, the metrics and both runs.
            ranks: processes; unset, one per GPU, or two on a machine without.
            epochs: passes over the training images; unset, as in the recipe.
        """
        run(out, ranks, epochs)

    try:
        return _call("demo", command, arguments)
    except RunError as error:
        return _fail("demo", error, status=1)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    function.__name__: function for function in (train, evaluate, models, curves, bench, doctor, demo)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a failed run, 2 for wrong input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(name, ValueError(f"no such command; there are {', '.join(COMMANDS)}"))
    try:
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        print(f"setriton {name}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return _fail(name, ImportError(f"{error}; Triton comes with torch's GPU builds for Linux"))
        extra = "bench" if name == "bench" else "train"
        return _fail(name, ImportError(f"{error}; pip install 'setriton[{extra}]' brings what this command needs"))
    except INPUT_ERRORS as error:
        return _fail(name, error)


def _call(name: str, command: Callable[..., None], arguments: Sequence[str]) -> int:
    import tyro

    tyro.cli(command, prog=f"setriton {name}", args=list(arguments), console_outputs=_is_rank0())
    return 0


def _positional() -> Any:
    import tyro

    return tyro.conf.Positional


def _usage() -> str:
    lines = [f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    head = "usage: setriton COMMAND ...\n\nSqueeze-and-Excitation networks as fast as the hardware allows.\n"
    return "\n".join([head, *lines, "", "`setriton COMMAND --help` says more."])


def _fail(name: str, error: BaseException, status: int = 2) -> int:
    # On every rank: what all ranks meet alike is held back on the others, what one rank meets alone is worth reading.
    if os.environ.get("SETRITON_TRACEBACK") == "1":
        raise error
    message = str(error)
    if "Original Traceback" in message:  # from a data loading process: what counts is its last line
        message = message.strip().splitlines()[-1]
    print(f"setriton {name}: error: {message}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _rank_0_speaks() -> Iterator[None]:
    """For parsing, in which all ranks fail alike: one message, and torchrun ends no rank before it is out."""
    if _is_rank0():
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit:
        time.sleep(5)
        raise


def _is_rank0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)

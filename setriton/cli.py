"""The command line. Each command imports what it needs when it runs, and answers wrong input with one line."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from . import __version__
from .cli_bench import bench
from .cli_models import models
from .cli_weights import convert
from .command import call, is_rank0, positional, show

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
        path: Annotated[Path, positional()],
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
        if is_rank0():
            print(f"{result.images} images: loss {result.loss:.4f}, top-1 error {result.error_top1:.2f} %{top5}")

    return call("evaluate", command, arguments)


def curves(arguments: Sequence[str]) -> int:
    """Draw training and validation error of finished or running trainings."""
    from .analysis.curves import draw_curves

    def command(runs: Annotated[tuple[Path, ...], positional()], out: Path = Path("curves.png")) -> None:
        """Training and validation error over epochs, one colour a run.

        Args:
            runs: folders of training runs, each with a metrics.csv.
            out: the picture to write (.png, .pdf, .svg).
        """
        draw_curves({str(run): run for run in runs}, out)
        print(out)

    return call("curves", command, arguments)


def tune(arguments: Sequence[str]) -> int:
    """Measure on this GPU how launches are best cut, for a network's maps, and store it."""
    from .tune import run, show_stored

    def command(
        model: str | None = None,
        shapes: tuple[str, ...] = (),
        kinds: tuple[str, ...] = (),
        batch_size: int = 128,
        image_size: int | None = None,
        dtype: str = "bfloat16",
        layout: str = "channels_last",
        seconds: float = float("inf"),
        force: bool = False,
        out: Path | None = None,
        show: bool = False,
    ) -> None:
        """Measure on this GPU how launches are best cut, for a network's maps, and store it.

        What is stored is not measured again, so a run that was stopped goes on.

        Args:
            model: a network, such as se_resnet50.
            shapes: maps instead, each N,C,H or N,C,H,W. With neither, those of SE-ResNet-50 and EfficientNet-B0.
            kinds: launches to tune; unset, all that the maps may need.
            batch_size: images per call, of a network.
            image_size: side of its input in pixels; unset, 224, or 32 for the small networks.
            dtype: of the maps: bfloat16, float16 or float32.
            layout: of the maps: channels_last or contiguous.
            seconds: stop in time, and say what is missing.
            force: measure what is stored, too.
            out: the .json file to store it in; unset, the user's cache, where launches find it.
            show: print the stored configurations that apply here, and measure nothing.
        """
        if show:
            show_stored()
            return
        of_model, of_maps = (model, batch_size, image_size), (shapes, dtype, layout)
        print(run(*of_model, *of_maps, kinds, seconds=seconds, force=force, out=out))

    return call("tune", command, arguments)


def doctor(arguments: Sequence[str]) -> int:
    """What this machine can do: versions, devices, and whether the kernels run and are right."""
    from .doctor import report

    def command() -> None:
        """Versions, devices, and whether the kernels run here and are right."""
        show(report())

    return call("doctor", command, arguments)


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
        return call("demo", command, arguments)
    except RunError as error:
        return _fail("demo", error, status=1)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    function.__name__: function for function in (train, evaluate, models, convert, curves, bench, tune, doctor, demo)
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
        extra = "bench" if name in ("bench", "tune") else "train"
        return _fail(name, ImportError(f"{error}; pip install 'setriton[{extra}]' brings what this command needs"))
    except INPUT_ERRORS as error:
        return _fail(name, error)


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
    if is_rank0():
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit:
        time.sleep(5)
        raise

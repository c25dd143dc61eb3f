"""The command that rewrites published weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from .command import call, positional


def convert(arguments: Sequence[str]) -> int:
    """Published weights of any known kind as one safetensors file."""

    def command(
        path: Annotated[Path, positional()],
        out: Path,
        model: str | None = None,
        to: Literal["setriton", "timm"] = "setriton",
        use_ema: bool = True,
        force: bool = False,
    ) -> None:
        """Published weights of any known kind as one safetensors file.

        Args:
            path: the weights: safetensors, a PyTorch checkpoint, .caffemodel, or .npz of Caffe's blobs.
            out: the file to write, name.safetensors.
            model: the network they are of; unset, the one whose parameters they fit.
            to: setriton, for `setriton evaluate` and create_model(weights=...); or timm, for timm's network.
            use_ema: of a checkpoint with averaged weights (EMA) take those, as timm does; else the trained.
            force: write over a file that exists.
        """
        from .models.weights.convert import convert as run

        if out.exists() and not force:
            raise FileExistsError(f"out {out} exists; --force writes over it")
        name, report = run(path, out, model, to, use_ema)
        print(f"{out}: {name}\n{report}")

    return call("convert", command, arguments)

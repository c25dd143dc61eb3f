"""The benchmarks' part of the command line."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .command import call, show


def bench(arguments: Sequence[str]) -> int:
    """Benchmarks: `ops`, `models` time kernels, networks on this GPU; `resources`, `traffic` need none."""
    kinds = {"ops": _bench_ops, "models": _bench_models, "resources": _bench_resources, "traffic": _bench_traffic}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: setriton bench {'|'.join(kinds)} ...\n\n{bench.__doc__}\n\nOptions: bench ops --help, and so on")
        return 0 if arguments else 2
    if arguments[0] not in kinds:
        raise ValueError(f"bench wants one of {', '.join(kinds)}; got {arguments[0]!r}")
    return kinds[arguments[0]](arguments[1:])


def _bench_ops(arguments: Sequence[str]) -> int:
    from .bench.ops import BATCH_SIZES, run

    def command(
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        ops: tuple[str, ...] = (),
        seconds: float = float("inf"),
        force: bool = False,
        out: Path | None = None,
        dtype: str = "bfloat16",
        layout: str = "channels_last",
    ) -> None:
        """Time setriton's operators on this GPU against eager PyTorch, torch.compile and a copy.

        What the results hold of this environment is not measured again, so a run that was stopped goes on.

        Args:
            batch_sizes: images per call, in the order of measuring.
            ops: tail-training, tail-evaluation, squeeze-excite, efficientnet-training or efficientnet-evaluation, in
                the order of measuring; unset, all.
            seconds: stop in time, and say what is missing.
            force: measure what the results hold, too.
            out: folder for the results; unset, bench/results/<device>.
            dtype: of the maps and SE weights: bfloat16, float16 or float32.
            layout: of the maps: channels_last or contiguous.
        """
        for path in run(batch_sizes, ops, seconds=seconds, force=force, out=out, dtype=dtype, layout=layout):
            print(path)

    return call("bench ops", command, arguments)


def _bench_models(arguments: Sequence[str]) -> int:
    from .bench.models import BATCH_SIZES, run

    def command(
        networks: tuple[str, ...] = (),
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        image_size: int = 224,
        modes: tuple[str, ...] = ("training", "inference"),
        ways: tuple[str, ...] = (),
        seconds: float = float("inf"),
        force: bool = False,
        out: Path | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        """Time networks with SE on this GPU: what SE costs them, and what compiling them takes.

        The price is the time over that of the same network without SE under torch.compile. What the results hold of
        this environment is not measured again, so a run that was stopped goes on.

        Args:
            networks: names of setriton's networks (se_resnet50) or timm's (seresnet50), in the order of measuring;
                unset, nine of both.
            batch_sizes: images of a step, in the order of measuring.
            image_size: height and width of the images.
            modes: training, inference or both.
            ways: eager; plain, the network without SE under torch.compile; backend, torch.compile(backend="setriton");
                compile, torch.compile; or accelerate, setriton.accelerate and torch.compile; unset, all.
            seconds: stop in time, and say what is missing.
            force: measure what the results hold, too.
            out: folder for the results; unset, bench/results/<device>.
            dtype: of autocast: bfloat16, float16 or, for none, float32.
        """
        paths = run(
            networks,
            batch_sizes,
            image_size=image_size,
            modes=modes,
            ways=ways,
            seconds=seconds,
            force=force,
            out=out,
            dtype=dtype,
        )
        for path in paths:
            print(path)

    return call("bench models", command, arguments)


def _bench_resources(arguments: Sequence[str]) -> int:
    from .bench.launches import FORMS, NETWORKS, step, steps_of
    from .bench.resources import TARGETS, resources, worst

    def command(targets: tuple[str, ...] = tuple(TARGETS), networks: bool = False) -> None:
        """Registers, spills, shared memory and widest access of every kernel, compiled for GPUs that need not be here.

        Args:
            targets: sm_80, sm_90, sm_100, sm_120, gfx942, gfx950.
            networks: the worst of all launches of real networks, by kernel, instead: every SE block of SE-ResNet-50,
                EfficientNet-B0 and MobileNetV3-large, in training and evaluation, in both layouts, float32 and
                bfloat16, for batches of 1, 32 and 128. Minutes for each target.
        """
        from rich.table import Table

        for target in targets if networks else ():
            for network in NETWORKS:
                title = f"{network}, {target}"
                table = Table("kernel", "compiled", "registers", "spilled B", "shared B", title=title)
                for kernel, (count, row) in worst(steps_of(network), target).items():
                    numbers = (count, row.registers, row.spilled, row.shared)
                    table.add_row(kernel.removesuffix("_kernel"), *map(str, numbers))
                show(table)
        for target in () if networks else targets:
            table = Table("operation", "kernel", "registers", "spilled B", "shared B", "access bits", title=target)
            for name, form in FORMS.items():
                for row in resources(step(form), target):
                    numbers = (row.registers, row.spilled, row.shared, row.widest_access)
                    table.add_row(name, row.kernel.removesuffix("_kernel"), *map(str, numbers))
                    name = ""
            show(table)

    return call("bench resources", command, arguments)


def _bench_traffic(arguments: Sequence[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at import whether kernels are compiled or interpreted.
        again = [sys.executable, "-m", "setriton", "bench", "traffic", *arguments]
        return subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    from .bench.passes import LAYOUTS, count_passes, inductor_passes

    def command(
        n: int = 16, channels: int = 64, size: int = 16, l2_kib: int = 512, layout: str = "both", inductor: bool = True
    ) -> None:
        """Passes over the feature map in bfloat16: ours counted in Triton's interpreter, the arithmetic's, Inductor's.

        To HBM: what the modelled L2 cache lets through, of "ours". Inductor's are what torch.compile generates for the
        same operation, as users write it, in a chain of 1x1 convolutions under autocast, at batch 32, 256 channels,
        56x56.

        Args:
            n: images.
            channels: channels of the map.
            size: its height and width; larger ones take minutes, in smaller ones O(N*C) terms weigh more.
            l2_kib: the modelled L2 cache, KiB. Kernels cut their work for one of 256 KiB here.
            layout: channels_last, contiguous or both.
            inductor: also compile with Inductor; half a minute an operation.
        """
        from rich.table import Table

        layouts = LAYOUTS if layout == "both" else (layout,)
        theirs = inductor_passes() if inductor else {}
        for name in layouts:
            table = Table("operation", "direction", "launches", "needed", "ours", "to HBM", "Inductor", title=name)
            for row in count_passes(n, channels, size, l2_kib * 1024, (name,)):
                written = theirs.get((row.case, row.direction))
                table.add_row(
                    row.case, row.direction, str(row.launches), f"{row.needed:.2f}", f"{row.passes:.2f}",
                    f"{row.hbm:.2f}", "" if written is None else f"{written:.2f}",
                )  # fmt: skip
            show(table)

    return call("bench traffic", command, arguments)

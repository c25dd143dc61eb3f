"""What torch.compile generates for an NVIDIA GPU, on a machine with or without one: kernels, and passes over the map.

Inductor decides from shapes and device properties alone, so it is given fake tensors on a pretended H200 and stopped
where it would load what it wrote. The pretence stays in a child process, which sees no real GPU: the numbers are the
same everywhere.
"""

import contextlib
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .child import in_child
from .pretended_gpu import move_to_fake_cuda, pretend


@dataclass(frozen=True)
class GeneratedCode:
    """Code for one direction. Passes are sizes of the map, and each kernel counts each of its operands once.

    `extern_passes` is the part of `passes` in extern kernels: Inductor does not see how often those, custom ops among
    them, sweep over an operand. `triton_kernels` includes bookkeeping ones, such as casts of weights.
    """

    passes: float
    extern_passes: float
    triton_kernels: int
    extern_kernels: int


@dataclass(frozen=True)
class Block:
    """`make(channels)` is a module that maps y to a map of its shape, or y and a residual if it takes one."""

    make: Callable[[int], nn.Module]
    residual: bool = False


class SqueezeExcite(nn.Module):
    """SE as users write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(1, channels // 16)
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))))


class ResidualTail(nn.Module):
    """The end of a block of SE-ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.se(self.bn(y)) + residual)


class SiluTail(ResidualTail):
    """What follows the depthwise convolution of EfficientNet."""

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.se(F.silu(self.bn(y)))


AS_WRITTEN = {
    "SE": Block(SqueezeExcite),
    "BN, SE, + residual, ReLU": Block(ResidualTail, residual=True),
    "BN, SiLU, SE": Block(SiluTail),
}


def generated_code(
    block: Block,
    *,
    training: bool,
    in_chain: bool = True,
    shape: tuple[int, int, int, int] = (32, 256, 56, 56),
    channels_last: bool = True,
    rewritten: bool = False,
) -> dict[str, GeneratedCode]:
    """Kernels and passes of one block under bfloat16 autocast, its convolutions of maps not counted.

    Args:
        block: what to compile; its `make` has to be picklable.
        training: whether gradients are recorded and BN takes batch statistics.
        in_chain: count the interior block of blocks joined by 1x1 convolutions: what four of them take, less what three
            do. Otherwise a graph that holds the block alone, whose inputs and outputs no other kernel could fuse.
        shape: N, C, H, W of the map.
        channels_last: layout of the maps and of the weights.
        rewritten: whether SE blocks are replaced first, as ``backend="setriton"`` does.

    Returns:
        "forward" and, in training, "backward".

    The child is one of multiprocessing's: a script calls this below ``if __name__ == "__main__":``.

    Raises:
        TypeError: `block` is no Block, or its `make` not picklable.
        ValueError: a shape that is none.
        RuntimeError: torch is not built for CUDA, Triton is missing, or the block does not compile.
    """
    if not isinstance(block, Block):
        raise TypeError(f"block must be a Block; got {block!r}")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape must be N, C, H, W, each at least 1; got {shape}")
    if torch.version.cuda is None:
        raise RuntimeError(f"Inductor's CUDA code needs a torch built for CUDA; {torch.__version__} is not")
    if find_spec("triton") is None:
        raise RuntimeError("Inductor's CUDA code needs Triton, which is not installed")
    try:
        pickled = pickle.dumps(block)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"block.make must be picklable, as classes and functions of a module are: {error}") from None
    lengths = (3, 4) if in_chain else (0,)
    found = in_child(_compile, pickled, lengths, training, shape, channels_last, rewritten)
    return found[0] if len(found) == 1 else {name: _difference(found[1][name], found[0][name]) for name in found[0]}


class _Chain(nn.Module):
    """`length` blocks behind a 1x1 convolution each; a length of 0 is one block and nothing else."""

    def __init__(self, block: Block, length: int, channels: int) -> None:
        super().__init__()
        self.residual = block.residual
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(length))
        self.blocks = nn.ModuleList(block.make(channels) for _ in range(length or 1))

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        if not self.convolutions:
            return self.blocks[0](x, *residual)
        for convolution, block in zip(self.convolutions, self.blocks, strict=True):
            x = block(convolution(x), x) if self.residual else block(convolution(x))
        return x


def _compile(
    pickled: bytes,
    lengths: Sequence[int],
    training: bool,
    shape: tuple[int, int, int, int],
    channels_last: bool,
    rewritten: bool,
) -> list[dict[str, GeneratedCode]]:
    """In the child: the code of one chain of each length."""
    # Here, where a failure is an exception to report; one to unpickle arguments ends the process.
    block = pickle.loads(pickled)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    chains = [_Chain(block, length, shape[1]).train(training) for length in lengths]
    pretend()
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = []
    with FakeTensorMode():
        for chain in chains:
            move_to_fake_cuda(chain, layout)
            maps = [
                torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).requires_grad_(training)
                for _ in range(1 + (block.residual and not chain.convolutions))
            ]
            try:
                found.append(_generate(chain, maps, training, rewritten))
            except Exception as error:  # The compiler's own exceptions cannot all be sent to another process.
                raise RuntimeError(f"Inductor generates no code for {block}: {error}") from None
    return found


class _Stop(BaseException):
    """Not an Exception, of which the compiler makes others."""


def _generate(module: nn.Module, maps: Sequence[Tensor], training: bool, rewritten: bool) -> dict[str, GeneratedCode]:
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import compile_fx, metrics
    from torch._inductor.graph import GraphLowering

    from setriton.compile.rewrite import rewrite

    found: dict[str, GeneratedCode] = {}

    def stop(graph: GraphLowering) -> None:
        graph.codegen()
        _tell_strides(graph)
        found["backward" if graph.is_backward else "forward"] = _count(graph, maps[0].nbytes)
        raise _Stop

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        metrics.reset()
        with mock.patch.object(GraphLowering, "compile_to_module", stop), contextlib.suppress(_Stop):
            compile_fx.compile_fx_inner(graph, inputs, **options)

        def run(*_: Any) -> None:
            raise _Stop

        return run

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if rewritten:
            rewrite(graph)
        return compile_fx.compile_fx(graph, inputs, inner_compile=compile_graph)

    def call(*maps: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return module(*maps)

    torch.compiler.reset()
    with (
        # Constants would be folded on the device.
        torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False, joint_graph_constant_folding=False),
        # The backward graph is compiled at once: there is no backward pass that would ask for it.
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        torch.set_grad_enabled(training),
        contextlib.suppress(_Stop),
    ):
        torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*maps)
    return found


def _tell_strides(graph: Any) -> None:
    """What loading the code tells of its outputs: the backward graph gets what is saved as it lies in memory."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides += [
            tuple(map(int, output.get_stride())) if output.has_tensor_output() else None
            for output in graph.graph_outputs
        ]


def _count(graph: Any, map_bytes: int) -> GeneratedCode:
    from torch._inductor import metrics
    from torch._inductor.ir import MultiOutput, MultiOutputLayout
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    triton_bytes = 0
    extern_bytes: Counter[tuple[str, str]] = Counter()
    for node in graph.scheduler.nodes:
        if not isinstance(node, ExternKernelSchedulerNode):
            triton_bytes += node.get_read_write_buffers_sizes()
            continue
        kernel: Any = node.node
        if isinstance(kernel, MultiOutput):
            # One of an op's results. Inductor's count for the op holds them in some graphs and not in others.
            moved = kernel.get_dtype().itemsize * math.prod(int(size) for size in kernel.get_size())
            while isinstance(kernel, MultiOutput):
                kernel = kernel.inputs[0]
        else:
            writes = not isinstance(kernel.layout, MultiOutputLayout)
            moved = node.get_read_write_buffers_sizes_impl(include_reads=True, include_writes=writes)
        extern_bytes[kernel.get_name(), kernel.python_kernel_name or ""] += moved
    # Convolutions of maps, that is; those in an SE block are products of small matrices.
    counted = [
        size for (_, kernel), size in extern_bytes.items() if "convolution" not in kernel or size < map_bytes / 2
    ]
    return GeneratedCode(
        (triton_bytes + sum(counted)) / map_bytes,
        sum(counted) / map_bytes,
        metrics.generated_kernel_count,
        len(counted),
    )


def _difference(longer: GeneratedCode, shorter: GeneratedCode) -> GeneratedCode:
    a, b = astuple(longer), astuple(shorter)
    return GeneratedCode(*(x - y for x, y in zip(a, b, strict=True)))

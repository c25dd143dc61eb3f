"""What `setriton bench ops` times: operations, the maps they meet in networks, and the ways to write them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from setriton import functional, reference, reference_tail

MOMENTUM, EPS = 0.1, 1e-5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

Function = Callable[..., Tensor]
Compiler = Callable[[Function], Function]
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A map of `channels` x `size` x `size` whose SE block has hidden width `reduced`."""

    channels: int
    size: int
    reduced: int


# Images of 224 pixels. The four stages of SE-ResNet-50 are those of SE-ResNet-152 and of SENet-154.
RESNET = (Shape(256, 56, 16), Shape(512, 28, 32), Shape(1024, 14, 64), Shape(2048, 7, 128))
# Behind the depthwise convolutions of EfficientNet-B0; R is a quarter of the block's input channels.
EFFICIENTNET = (
    Shape(32, 112, 8),
    Shape(96, 56, 4),
    Shape(144, 56, 6),
    Shape(240, 28, 10),
    Shape(480, 14, 20),
    Shape(672, 14, 28),
    Shape(1152, 7, 48),
)
# Behind the depthwise convolutions of MobileNetV3-large: ReLU, then hard swish from 480 channels on.
MOBILENETV3 = (
    Shape(72, 28, 24),
    Shape(120, 28, 32),
    Shape(480, 14, 120),
    Shape(672, 14, 168),
    Shape(672, 7, 168),
    Shape(960, 7, 240),
)


@dataclass(frozen=True)
class Operation:
    """A function of a map, and what its arithmetic has to move.

    `passes` holds, for each direction, sweeps over the map and sweeps over a mask of one bit an element: statistics
    and squeeze in one sweep where no activation stands between them, nothing kept but x, the mask and vectors. The
    vectors and the SE weights are not counted.
    """

    name: str
    title: str
    passes: Mapping[str, tuple[int, int]]
    shapes: tuple[Shape, ...]
    # Batch statistics. A forward pass is timed with gradients recorded if so, without them if not.
    training: bool = False
    normalized: bool = True
    residual: bool = False
    bn_act: str = "identity"
    act: str = "relu"
    out_act: str = "identity"


FORWARD, BOTH = "forward", "forward + backward"
# Most telling first: a run cut short has these.
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "tail-training",
            "BN, SE, + residual, ReLU; batch statistics",
            # Forward: read x; read x and the residual, write y and the mask. Backward: read dy, mask, x; read dy, mask,
            # x, write dx and the residual's gradient.
            {BOTH: (10, 3), FORWARD: (4, 1)},
            RESNET,
            training=True,
            residual=True,
            out_act="relu",
        ),
        Operation(
            "tail-evaluation",
            "BN, SE, + residual, ReLU; running statistics",
            {FORWARD: (4, 0)},
            RESNET,
            residual=True,
            out_act="relu",
        ),
        Operation("squeeze-excite", "SE", {BOTH: (7, 0), FORWARD: (3, 0)}, RESNET, normalized=False),
        Operation(
            "efficientnet-training",
            "BN, SiLU, SE; batch statistics",
            # SiLU stands between BN and the squeeze, which therefore needs a sweep of its own.
            {BOTH: (9, 0), FORWARD: (4, 0)},
            EFFICIENTNET,
            training=True,
            bn_act="silu",
            act="silu",
        ),
        Operation(
            "efficientnet-evaluation",
            "BN, SiLU, SE; running statistics",
            {FORWARD: (3, 0)},
            EFFICIENTNET,
            bn_act="silu",
            act="silu",
        ),
    )
}

EAGER, COMPILED, RESTRUCTURED, FUSED = "eager", "torch.compile", "torch.compile, restructured", "setriton"
IMPLEMENTATIONS = (EAGER, COMPILED, RESTRUCTURED, FUSED)


def compile_for_one_shape(function: Function) -> Function:
    """torch.compile at its best: one graph, no dynamic shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def implementations(operation: Operation, compiler: Compiler = compile_for_one_shape) -> dict[str, Function]:
    """The operation as users write it, eager and compiled; its arithmetic restructured and compiled; setriton's."""
    return {
        EAGER: as_written(operation),
        COMPILED: compiler(as_written(operation)),
        RESTRUCTURED: compiler(restructured(operation)),
        FUSED: fused(operation),
    }


def as_written(operation: Operation) -> Function:
    """The functions that modules of a network call, one after another."""
    activations: dict[str, Function] = {"identity": lambda z: z, "relu": F.relu, "silu": F.silu}
    bn_act, act, out_act = (activations[name] for name in (operation.bn_act, operation.act, operation.out_act))
    training = operation.training

    def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        q = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(F.conv2d(act(F.conv2d(q, w1, b1)), w2, b2))

    def tail(
        x: Tensor, residual: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, *weights: Tensor
    ) -> Tensor:
        v = bn_act(F.batch_norm(x, mean, var, gamma, beta, training, MOMENTUM, EPS))
        y = squeeze_excite(v, *weights)
        return out_act(y if residual is None else y + residual)

    return tail if operation.normalized else squeeze_excite


def restructured(operation: Operation) -> Function:
    """`setriton.reference`: the arithmetic that setriton's kernels do, in PyTorch for Inductor to fuse."""
    op = operation

    def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return reference.squeeze_excite(x, w1, b1, w2, b2, op.act, "sigmoid")

    def tail(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor:
        gamma, beta, mean, var, w1, b1, w2, b2 = parameters
        options = (op.training, MOMENTUM, EPS, op.bn_act, op.act, "sigmoid", op.out_act, "", False)
        y, _, *moved = reference_tail.bn_squeeze_excite(x, gamma, beta, mean, var, w1, b1, w2, b2, residual, *options)
        with torch.no_grad():
            for statistic, new in zip((mean, var), moved, strict=True):
                if new is not None:
                    statistic.copy_(new)
        return y

    return tail if operation.normalized else squeeze_excite


def fused(operation: Operation) -> Function:
    """setriton's public functions."""
    op = operation

    def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return functional.squeeze_excite(x, w1, b1, w2, b2, act=op.act)

    def tail(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor:
        gamma, beta, mean, var, w1, b1, w2, b2 = parameters
        return functional.bn_squeeze_excite(
            x, gamma, beta, mean, var, w1, b1, w2, b2,
            residual=residual,
            training=op.training,
            momentum=MOMENTUM,
            eps=EPS,
            bn_act=op.bn_act,
            act=op.act,
            out_act=op.out_act,
        )  # fmt: skip

    return tail if operation.normalized else squeeze_excite


@dataclass
class Workload:
    """Tensors for calls of one operation on one map: one set of parameters, and maps in `rotate_bytes` of copies.

    Each call takes the next copy, whichever implementation it calls, so that none finds its maps in a cache.
    """

    operation: Operation
    shape: Shape
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    layout: torch.memory_format = torch.channels_last
    rotate_bytes: int = 0
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        op, c, r = self.operation, self.shape.channels, self.shape.reduced
        self.map_elements = self.batch * c * self.shape.size**2
        maps_of_a_set = 1 + op.residual + (BOTH in op.passes)
        self.copies = 2 + self.rotate_bytes // (maps_of_a_set * self.map_elements * self.dtype.itemsize)
        self.x = self._maps()
        self.residual = self._maps() if op.residual else [None] * self.copies
        self.dy = [t.detach() for t in self._maps()] if BOTH in op.passes else []
        # Scaled like initial weights: larger ones saturate the gates, and bfloat16 noise becomes most of dx.
        w1, b1 = self._randn(r, c, 1, 1, dtype=self.dtype) / c**0.5, self._randn(r, dtype=self.dtype)
        w2, b2 = self._randn(c, r, 1, 1, dtype=self.dtype) / r**0.5, self._randn(c, dtype=self.dtype)
        self.parameters = [t.requires_grad_() for t in (w1, b1, w2, b2)]
        if op.normalized:
            # BN's parameters and statistics stay float32 in mixed precision, as autocast leaves them.
            wide = reference.accumulate_dtype(self.dtype)
            gamma, beta, mean, var = (self._randn(c, dtype=wide) for _ in range(4))
            self.parameters = [gamma.requires_grad_(), beta.requires_grad_(), mean, var.exp_(), *self.parameters]
        self.turn: Iterator[int] = itertools.cycle(range(self.copies))

    def bytes_moved(self, direction: str) -> int:
        """By the arithmetic, not by an implementation."""
        maps, masks = self.operation.passes[direction]
        return maps * self.map_elements * self.dtype.itemsize + masks * self.map_elements // 8

    def call(self, function: Function, direction: str) -> Call:
        """A call on the next copy of the maps."""
        return lambda: self._call(function, direction, next(self.turn))

    def outputs(self, function: Function, direction: str) -> list[Tensor]:
        """y, or y and the gradients, always of the same copy of the maps."""
        return self._call(function, direction, 0)

    def copy_call(self, direction: str) -> Call:
        """A copy that moves as many bytes as the arithmetic: half of them read, half written."""
        size = max(1, self.bytes_moved(direction) // 4)
        copies = 2 + self.rotate_bytes // (4 * size)
        # Random like the maps: a GPU may run faster on constants, which toggle fewer bits.
        turn = itertools.cycle(self._randn(copies, 2, size, dtype=torch.bfloat16).unbind())

        def copy() -> None:
            source, target = next(turn)
            target.copy_(source)

        return copy

    def _call(self, function: Function, direction: str, index: int) -> list[Tensor]:
        x, residual = self.x[index], self.residual[index]
        inputs: list[Any] = [x, residual, *self.parameters] if self.operation.normalized else [x, *self.parameters]
        if direction == BOTH:
            y = function(*inputs)
            leaves = [t for t in inputs if t is not None and t.requires_grad]
            return [y, *torch.autograd.grad(y, leaves, self.dy[index])]
        with torch.set_grad_enabled(self.operation.training):
            return [function(*inputs)]

    def _maps(self) -> list[Tensor]:
        c, size = self.shape.channels, self.shape.size
        maps = self._randn(self.copies * self.batch, c, size, size, dtype=self.dtype)
        maps = maps.contiguous(memory_format=self.layout)
        return [t.detach().requires_grad_() for t in maps.split(self.batch)]

    def _randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Group:
    """What is measured side by side: every implementation and direction of one operation on one map."""

    operation: Operation
    shape: Shape
    batch: int

    def __str__(self) -> str:
        c, size, r = self.shape.channels, self.shape.size, self.shape.reduced
        return f"{self.operation.name} {self.batch}x{c}x{size}x{size} R={r}"


def plan(batch_sizes: Sequence[int], operations: Sequence[str]) -> list[Group]:
    """Groups in the order given; no operations means all."""
    chosen = [OPERATIONS[name] for name in operations or OPERATIONS]
    return [Group(op, shape, batch) for batch in batch_sizes for op in chosen for shape in op.shapes]

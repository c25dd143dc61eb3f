"""Passes over the feature map of each operation, counted in Triton's interpreter, beside what the arithmetic needs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import setriton
from setriton.checks import check_choice
from setriton.functional import bn_squeeze_excite_forked

from .inductor import AS_WRITTEN, generated_code
from .traffic import LINE, Traffic, measure_traffic


@dataclass(frozen=True)
class Case:
    """One operation, and the passes that the arithmetic needs: maps read and written, masks as 1/16 of a bf16 map.

    Attributes:
        name: as printed; the tail is BN, SE, residual, ReLU.
        forward, backward: passes requested; None where there is no backward pass.
        forward_hbm: passes that reach HBM where a second read of x is made from the L2 cache.
        has_bn, bn_act, residual, training, join: what the operation does; join: y has two consumers.
    """

    name: str
    forward: float
    forward_hbm: float
    backward: float | None
    has_bn: bool = True
    bn_act: str = "identity"
    residual: bool = False
    training: bool = True
    join: bool = False


MASK = 1 / 16
CASES = (
    Case("squeeze_excite", 3, 2, 4, has_bn=False),
    Case("tail, training", 4 + MASK, 4 + MASK, 6 + MASK, residual=True),
    Case("tail, two gradients joined", 4 + MASK, 4 + MASK, 7 + MASK, residual=True, join=True),
    Case("tail, evaluation", 4, 3, None, residual=True, training=False),
    Case("BN-SiLU-SE, training", 4, 4, 5, bn_act="silu"),
    Case("BN-SiLU-SE, evaluation", 3, 2, None, bn_act="silu", training=False),
)


LAYOUTS = ("channels_last", "contiguous")
# The blocks that Inductor is asked about, by case and mode.
_WRITTEN = {
    "squeeze_excite": ("SE", True),
    "tail, two gradients joined": ("BN, SE, + residual, ReLU", True),
    "tail, evaluation": ("BN, SE, + residual, ReLU", False),
    "BN-SiLU-SE, training": ("BN, SiLU, SE", True),
    "BN-SiLU-SE, evaluation": ("BN, SiLU, SE", False),
}


@dataclass(frozen=True)
class Row:
    """Counts of one case in one layout and direction, in sizes of the map; `hbm` behind the modelled L2 cache."""

    case: str
    layout: str
    direction: str
    launches: int
    needed: float
    passes: float
    needed_hbm: float
    hbm: float


def count_passes(
    n: int,
    channels: int,
    size: int,
    l2_bytes: int,
    layouts: Sequence[str] = LAYOUTS,
    cases: Sequence[Case] = CASES,
) -> Iterator[Row]:
    """Rows of all cases with bfloat16 maps (n, channels, size, size), hidden width channels / 16, float32 parameters.

    Args:
        n, channels, size: of the map. O(N C) terms weigh more in small maps, the excitation's weights in small batches.
        l2_bytes: size of the modelled L2 cache.
        layouts: channels_last and contiguous, or one of them.
        cases: what to count.

    Raises:
        ValueError: a size below 1, or an unknown layout.
        RuntimeError: the process does not interpret kernels (TRITON_INTERPRET=1 must be set when it starts).
    """
    if min(n, channels, size, l2_bytes) < 1:
        raise ValueError(f"n, channels, size and l2_bytes must be at least 1; got {(n, channels, size, l2_bytes)}")
    for layout in layouts:
        check_choice("layout", layout, LAYOUTS)
    for layout in layouts:
        for case in cases:
            yield from _count(case, (n, channels, size, size), layout, l2_bytes)


def inductor_passes() -> dict[tuple[str, str], float]:
    """Passes per block of what Inductor generates for these operations as users write them, by (case, direction).

    Inside a chain under autocast, where a block's input has two consumers: so training with a residual includes the
    sum of the two gradients. Half a minute an operation.

    Raises:
        RuntimeError: torch is not built for CUDA, or Triton is missing.
    """
    found = {}
    for case, (block, training) in _WRITTEN.items():
        for direction, code in generated_code(AS_WRITTEN[block], training=training).items():
            found[case, direction] = code.passes
    return found


def traffic_of(case: Case, shape: tuple[int, ...], layout: str, l2_bytes: int) -> tuple[Tensor, list[Traffic]]:
    """A map, and the traffic of the operation on it: forward, and backward where the case has one."""
    x, residual, dy, dy_skip = (_map(shape, layout) for _ in range(4))
    run = _operation(case, x, residual)
    outputs: list[Tensor] = []
    with torch.set_grad_enabled(case.backward is not None):
        measured = [measure_traffic(lambda: outputs.extend(run()), l2_bytes)]
    if case.backward is not None:
        leaves = [x, residual] if case.residual else [x]
        gradients = [dy, dy_skip] if case.join else [dy]
        measured.append(measure_traffic(lambda: torch.autograd.grad(outputs, leaves, gradients), l2_bytes))
    return x, measured


def _count(case: Case, shape: tuple[int, ...], layout: str, l2_bytes: int) -> Iterator[Row]:
    x, measured = traffic_of(case, shape, layout, l2_bytes)
    needs = ((case.forward, case.forward_hbm), (case.backward or 0.0, case.backward or 0.0))
    for direction, (needed, needed_hbm), traffic in zip(("forward", "backward"), needs, measured, strict=False):
        yield Row(
            case.name, layout, direction, len(traffic.launches),
            needed, traffic.passes(x), needed_hbm, traffic.hbm_passes(x),
        )  # fmt: skip


def _operation(case: Case, x: Tensor, residual: Tensor) -> Callable[[], list[Tensor]]:
    channels = x.shape[1]
    reduced = max(1, channels // 16)
    excitation = [torch.randn(s) for s in ((reduced, channels), (reduced,), (channels, reduced), (channels,))]
    if not case.has_bn:
        return lambda: [setriton.squeeze_excite(x, *excitation)]
    bn = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
    options: dict[str, Any] = {
        "residual": residual if case.residual else None,
        "training": case.training,
        "bn_act": case.bn_act,
        "out_act": "relu" if case.residual else "identity",
    }
    if case.join:
        return lambda: list(bn_squeeze_excite_forked(x, *bn, *excitation, **options))
    return lambda: [setriton.bn_squeeze_excite(x, *bn, *excitation, **options)]


def _map(shape: tuple[int, ...], layout: str) -> Tensor:
    """Random bfloat16 that starts at a cache line, as the GPU's allocator has it."""
    elements = torch.Size(shape).numel()
    buffer = torch.empty(elements + LINE, dtype=torch.bfloat16)
    start = -buffer.data_ptr() % LINE // 2
    flat = buffer[start : start + elements].normal_()
    n, c, h, w = shape
    dense = flat.view(n, h, w, c).permute(0, 3, 1, 2) if layout == "channels_last" else flat.view(shape)
    return dense.requires_grad_()

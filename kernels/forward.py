"""The forward pass of BN -> (act) -> SE -> (+ residual) -> (ReLU), or of SE alone, in one launch or in several.

Phases, as far as they apply: batch statistics, which are the squeeze too where no activation follows BN; BN's mean and
variance; the squeeze; the two products of the excitation; y. Each launch runs a series of consecutive phases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
import triton
from torch import Tensor

from . import stored
from .config import (
    UNALIGNED_IMAGES,
    UNALIGNED_MAXNREG,
    ForwardConfig,
    Pieces,
    dot_precision,
    excite_blocks,
    launch_options,
)
from .forward_kernel import forward_kernel
from .layout import as_dense, as_layout_of, geometry, packed_shape
from .schedule import APPLY, FINALIZE, GATE, HIDDEN, SQUEEZE, STATISTICS, counters, counters_of


@dataclass(frozen=True)
class BatchNorm:
    """What BN is given: weight, bias, running_mean, running_var (C), each pair or neither."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    act: str


@dataclass(frozen=True)
class Excitation:
    """Weights (R, C) and (C, R), biases (R) and (C) or None, and the two non-linearities."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    act: str
    gate: str


@dataclass
class Forward:
    """Results: y; what the backward pass needs; what the running statistics become."""

    y: Tensor
    bits: Tensor
    mean: Tensor
    var: Tensor
    squeezed: Tensor
    z1: Tensor
    e: Tensor
    new_running_mean: Tensor
    new_running_var: Tensor


def matrix(w: Tensor) -> Tensor:
    """A 1x1 convolution's weight (O, I, 1, 1), or a linear one (O, I), as a contiguous (O, I)."""
    return w.reshape(w.shape[0], w.shape[1]).contiguous()


# Mean and biased variance (C) of this rank's pixels, and their number -> mean and variance of all ranks', and the new
# running statistics.
Merge = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def forward(
    x: Tensor,
    excitation: Excitation,
    bn: BatchNorm | None = None,
    residual: Tensor | None = None,
    out_act: str = "identity",
    wants_bits: bool = False,
    training: bool = False,
    momentum: float = 0.0,
    merge: Merge | None = None,
    config: ForwardConfig | None = None,
) -> Forward:
    """y = out_act(phi(BN(x)) * e + residual), in the dtype and layout of x; without bn, x * e.

    Args:
        x: (N, C, H, W).
        excitation: weights of the SE block.
        bn: the BatchNorm before it.
        residual: added to the product, of the shape of x.
        out_act: identity or relu.
        wants_bits: keep a bit for each y > 0, which the backward pass of relu needs.
        training: normalize with the batch's statistics, and update the running ones by `momentum`.
        merge: joins this rank's statistics with other ranks'.
        config: how to cut the launches; None picks one.
    """
    x = as_dense(x)
    residual = None if residual is None else as_layout_of(residual, x)
    has_statistics = bn is not None and training
    config = config or stored.forward_config(x, None if bn is None else bn.act, has_statistics)
    launch = _Launch(
        x, excitation, bn, residual, out_act, wants_bits, has_statistics, momentum, merge is not None, config
    )
    with torch.cuda.device_of(x):
        for first, last in launch.cuts():
            launch.run(first, last)
            if merge is not None and last == FINALIZE:
                launch.use_statistics(*merge(*launch.statistics(), x.numel() // x.shape[1]))
    return launch.results


class _Launch:
    """Buffers and arguments of one forward pass, shared by its launches."""

    def __init__(
        self,
        x: Tensor,
        excitation: Excitation,
        bn: BatchNorm | None,
        residual: Tensor | None,
        out_act: str,
        wants_bits: bool,
        has_statistics: bool,
        momentum: float,
        is_merged: bool,
        config: ForwardConfig,
    ) -> None:
        n, c, h, w = x.shape
        hw, r = h * w, excitation.w1.shape[0]
        self.x, self.config, self.is_merged, self.has_statistics = x, config, is_merged, has_statistics
        self.squeezes_x = bn is None or bn.act == "identity"
        self.has_squeeze = not (has_statistics and self.squeezes_x)
        # Groups of images are for launches that read x again; pieces must not be larger than they.
        is_grouped = config.launches == 1 and not has_statistics
        group_images = max(1, config.group_kib * 1024 // max(c * hw * x.element_size(), 1)) if is_grouped else 2**31
        self.pieces = pieces = Pieces.of(hw, config.block_hw, config.tiles, group_images)
        # Where images do not depend on each other, neither may the tiles that compute one, in the last bit, on n.
        at_once = n if has_statistics else group_images
        is_aligned = c % 16 == 0 or r % 16 == 0
        self.blocks = blocks = excite_blocks(at_once if is_aligned else min(at_once, UNALIGNED_IMAGES), r)
        maxnreg = config.maxnreg
        if maxnreg is not None and not is_aligned:
            maxnreg = max(maxnreg, UNALIGNED_MAXNREG)
        self.group_images = max(1, min(n, group_images // pieces.images * pieces.images))
        part, z1, e = self._vectors(n, pieces.splits, c), self._vectors(n, r), self._vectors(n, c)
        squeezed = part[:, 0] if pieces.splits == 1 else self._vectors(n, c)
        bits = torch.empty(packed_shape(x) if wants_bits else 0, dtype=torch.uint8, device=x.device)
        mean, var = (self._vectors(c if has_statistics else 0) for _ in range(2))
        new = self._vectors(0), self._vectors(0)
        if has_statistics and bn is not None and bn.running_mean is not None and bn.running_var is not None:
            new = torch.empty_like(bn.running_mean), torch.empty_like(bn.running_var)
            if x.numel() == 0:  # as in F.batch_norm
                new = bn.running_mean.clone(), bn.running_var.clone()
        if x.numel() == 0:
            # Means of no pixels; an excitation of NaN is NaN.
            for vectors, value in ((mean, 0.0), (var, 0.0), (squeezed, nan), (z1, nan), (e, nan)):
                vectors.fill_(value)
        self.results = Forward(torch.empty_like(x), bits, mean, var, squeezed, z1, e, *new)
        # How often each block fits, by the names kernels give these numbers: nobody else derives them.
        self.extents = {
            "columns": triton.cdiv(c, config.block_c),
            "tiles_n": triton.cdiv(self.group_images, blocks["BLOCK_N"]),
            "tiles_r": triton.cdiv(r, blocks["BLOCK_R"]),
            "tiles_g": triton.cdiv(c, blocks["BLOCK_G"]),
            "n_chunks": triton.cdiv(c, blocks["CHUNK"]),
        }
        running: tuple[Tensor | None, Tensor | None] = (None, None)
        if bn is not None and bn.running_mean is not None and bn.running_var is not None:
            running = bn.running_mean.contiguous(), bn.running_var.contiguous()
        self.tensors: dict[str, Tensor | None] = {
            "x_ptr": x,
            "residual_ptr": residual,
            "y_ptr": self.results.y,
            "bits_ptr": bits if wants_bits else None,
            "weight_ptr": None if bn is None or bn.weight is None else bn.weight.contiguous(),
            "bias_ptr": None if bn is None or bn.bias is None else bn.bias.contiguous(),
            "mean_ptr": mean if has_statistics else running[0],
            "var_ptr": var if has_statistics else running[1],
            "running_mean_ptr": running[0] if new[0].numel() else None,
            "running_var_ptr": running[1] if new[1].numel() else None,
            "new_running_mean_ptr": new[0] if new[0].numel() else None,
            "new_running_var_ptr": new[1] if new[1].numel() else None,
            "w1_ptr": matrix(excitation.w1),
            "b1_ptr": None if excitation.b1 is None else excitation.b1.contiguous(),
            "w2_ptr": matrix(excitation.w2),
            "b2_ptr": None if excitation.b2 is None else excitation.b2.contiguous(),
            "part_ptr": part,
            "squeezed_ptr": None if pieces.splits == 1 else squeezed,
            "moments_ptr": self._vectors(2, pieces.count(n), c) if has_statistics else None,
            "chunks_ptr": self._vectors(self.extents["n_chunks"], n, r),
            "z1_ptr": z1,
            "e_ptr": e,
        }
        self.options = {
            **geometry(x),
            "N": n,
            "R": r,
            "SPLITS": pieces.splits,
            "IMAGES": pieces.images,
            "tiles_per_split": pieces.tiles_per_split,
            "n_pieces": pieces.count(n),
            "group_images": self.group_images,
            "groups": triton.cdiv(n, self.group_images),
            **self.extents,
            **blocks,
            "eps": 0.0 if bn is None else bn.eps,
            "momentum": momentum,
            "HAS_SQUEEZE": self.has_squeeze,
            "SQUEEZED_IS_X": bn is not None and self.squeezes_x,
            "BN_ACT": "identity" if bn is None else bn.act,
            "ACT": excitation.act,
            "GATE_FN": excitation.gate,
            "OUT_ACT": out_act,
            "PRECISION": dot_precision(),
            "BLOCK_HW": config.block_hw,
            "BLOCK_C": config.block_c,
            "BLOCK_P": 64,
            "BLOCK_F": 16,
            **launch_options(config.num_warps, maxnreg),
        }

    def cuts(self) -> list[tuple[int, int]]:
        """First and last phase of each launch."""
        begin = STATISTICS.value if self.has_statistics else SQUEEZE.value
        cuts = []
        if self.is_merged and self.has_statistics:
            cuts.append((begin, FINALIZE.value))
            begin = SQUEEZE.value if self.has_squeeze else HIDDEN.value
        elif self.has_statistics and self.config.launches == 3:
            cuts.append((begin, STATISTICS.value))
            begin = FINALIZE.value
        if self.config.launches == 1:
            return [*cuts, (begin, APPLY.value)]
        return [*cuts, (begin, GATE.value), (APPLY.value, APPLY.value)]

    def run(self, first: int, last: int) -> None:
        if self.x.numel() == 0:
            return
        extents, groups = self.extents, self.options["groups"]
        sweep = self.pieces.count(self.group_images) * extents["columns"]
        tiles = extents["tiles_n"] * extents["tiles_r"]
        counts = {
            "n_statistics": (STATISTICS, sweep),
            "n_finalize": (FINALIZE, triton.cdiv(self.x.shape[1], self.options["BLOCK_F"])),
            "n_squeeze": (SQUEEZE, sweep if self.has_squeeze else 0),
            "n_hidden": (HIDDEN, tiles * extents["n_chunks"]),
            "n_gate": (GATE, extents["tiles_n"] * extents["tiles_g"]),
            "n_apply": (APPLY, sweep),
        }
        pieces = {name: count if first <= phase.value <= last else 0 for name, (phase, count) in counts.items()}
        once = pieces["n_statistics"] + pieces["n_finalize"]
        n_counters = counters_of(groups, tiles)
        # One program owns one piece of one phase.
        grid = (once + groups * (sum(pieces.values()) - once),)
        forward_kernel[grid](
            **self.tensors, **self.options, **pieces, FIRST=first, LAST=last,
            n_counters=n_counters, counters_ptr=counters(self.x.device, n_counters),
        )  # fmt: skip

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.results.mean, self.results.var

    def use_statistics(self, mean: Tensor, var: Tensor, new_running_mean: Tensor, new_running_var: Tensor) -> None:
        self.results.mean, self.results.var = mean, var
        self.results.new_running_mean, self.results.new_running_var = new_running_mean, new_running_var
        self.tensors |= {"mean_ptr": mean, "var_ptr": var}

    def _vectors(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

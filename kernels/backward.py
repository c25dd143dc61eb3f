"""The backward pass of BN -> (act) -> SE -> (+ residual) -> (ReLU), or of SE alone, in four launches.

With u = BN(x), v = phi(u), xh = (x - mean) rstd, and g the gradient behind ReLU, sums over each image's map

    G0 = sum g v, G1 = sum g phi'(u), G2 = sum g phi'(u) xh, F1 = sum phi'(u), F2 = sum phi'(u) xh

come from one sweep; phi = identity needs G1 and G2 alone. The excitation's gradient dq follows from G0, and with it

    D1 = dbias = sum_n (e G1 + dq F1 / HW), D2 = dweight = sum_n (e G2 + dq F2 / HW),
    dx = scale ((e g + dq / HW) phi'(u) - D1 / M - xh D2 / M),

where the last two terms are absent unless the statistics are the batch's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import stored
from .backward_kernels import dx_kernel, excite_gradients_kernel, hidden_gradient_kernel, reduce_kernel
from .config import EXCITE_MAXNREG, GRADIENTS_MAXNREG, Pieces, SweepConfig, dot_precision, excite_blocks, launch_options
from .forward import BatchNorm, Excitation, matrix
from .layout import as_dense, as_layout_of, geometry
from .schedule import counters


@dataclass(frozen=True)
class Saved:
    """What the forward pass kept; mean and var are the running ones where it did not use the batch's."""

    x: Tensor
    bits: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    squeezed: Tensor
    z1: Tensor
    e: Tensor


@dataclass
class Gradients:
    """In fp32, but dx and g in the dtype of x, and dw1, dw2 in the weights' dtypes and shapes."""

    dx: Tensor
    g: Tensor | None
    dweight: Tensor
    dbias: Tensor
    dw1: Tensor
    db1: Tensor
    dw2: Tensor
    db2: Tensor


# This rank's D1, D2 (C) and number of pixels -> D1 and D2 of all ranks over the pixels of all ranks.
Reduce = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def backward(
    dy: Tensor,
    saved: Saved,
    excitation: Excitation,
    bn: BatchNorm | None = None,
    dy_skip: Tensor | None = None,
    wants_g: bool = False,
    training: bool = False,
    reduce: Reduce | None = None,
    config: SweepConfig | None = None,
) -> Gradients:
    """Gradients of `forward`.

    Args:
        dy: gradient of y.
        saved: what the forward pass kept.
        excitation, bn, training: as the forward pass had them.
        dy_skip: gradient of y's second consumer, added to dy on the way.
        wants_g: whether g, the residual's gradient, is asked for.
        reduce: joins D1 and D2 with other ranks'.
        config: how to cut the sweeps; None picks one.
    """
    x = as_dense(saved.x)
    dy = as_layout_of(dy, x)
    dy_skip = None if dy_skip is None else as_layout_of(dy_skip, x)
    has_statistics = bn is not None and training
    config = config or stored.backward_config(x, None if bn is None else bn.act)
    pass_ = _Pass(x, saved, excitation, bn, config)
    # With g in memory, the second sweep reads one tensor where it would read up to three.
    g = torch.empty_like(x) if wants_g or dy_skip is not None else None
    with torch.cuda.device_of(x):
        sums = pass_.reduce(dy, dy_skip, g)
        gradients, dq = pass_.excite(sums)
        if x.numel() == 0:  # as in F.batch_norm, where the excitation's gradients may be NaN
            gradients.dweight.zero_()
            gradients.dbias.zero_()
        d1, d2, count = gradients.dbias, gradients.dweight, x.numel() // x.shape[1]
        if reduce is not None and has_statistics:
            (d1, d2), count = reduce(d1, d2, count), 1
        pass_.dx(dy, g, dq, d1, d2, count, has_statistics, gradients.dx)
    gradients.g = g if wants_g else None
    return gradients


class _Pass:
    """What the launches of one backward pass share."""

    def __init__(
        self, x: Tensor, saved: Saved, excitation: Excitation, bn: BatchNorm | None, config: SweepConfig
    ) -> None:
        n, c, h, w = x.shape
        self.x, self.saved, self.excitation, self.bn = x, saved, excitation, bn
        self.w1, self.w2 = matrix(excitation.w1), matrix(excitation.w2)
        self.pieces = Pieces.of(h * w, config.block_hw, config.tiles)
        self.n_sums = 1 if bn is None else 2 if bn.act == "identity" else 5
        self.affine = {
            "weight_ptr": None if bn is None or bn.weight is None else bn.weight.contiguous(),
            "bias_ptr": None if bn is None or bn.bias is None else bn.bias.contiguous(),
        }
        self.statistics = {
            "mean_ptr": None if bn is None else saved.mean,
            "var_ptr": None if bn is None else saved.var,
            "eps": 0.0 if bn is None else bn.eps,
        }
        self.sweep = {
            **geometry(x),
            **self.affine,
            **self.statistics,
            "N": n,
            "columns": triton.cdiv(c, config.block_c),
            "SPLITS": self.pieces.splits,
            "IMAGES": self.pieces.images,
            "tiles_per_split": self.pieces.tiles_per_split,
            "BN_ACT": "identity" if bn is None else bn.act,
            "BLOCK_HW": config.block_hw,
            "BLOCK_C": config.block_c,
            **launch_options(config.num_warps, config.maxnreg),
        }
        # One program owns one piece of the map: whole images or a part of one, and BLOCK_C channels.
        self.sweep_grid = (self.pieces.count(n) * self.sweep["columns"],)

    def reduce(self, dy: Tensor, dy_skip: Tensor | None, g: Tensor | None) -> Tensor:
        """The sums over parts of each map, (1, 2 or 5, N, SPLITS, C); writes g."""
        n, c = self.x.shape[:2]
        sums = self._vectors(self.n_sums, n, self.pieces.splits, c)
        if self.x.numel() == 0:
            sums.zero_()
        else:
            reduce_kernel[self.sweep_grid](
                dy_ptr=dy, dy_skip_ptr=dy_skip, bits_ptr=self.saved.bits, x_ptr=self.x, g_ptr=g, sums_ptr=sums,
                **self.sweep,
            )  # fmt: skip
        return sums

    def excite(self, sums: Tensor) -> tuple[Gradients, Tensor]:
        """Gradients of all parameters, and dq (N, C); dx is to be filled."""
        (n, c, h, w), r = self.x.shape, self.w1.shape[0]
        gradients = Gradients(
            dx=torch.empty_like(self.x),
            g=None,
            dweight=self._vectors(c),
            dbias=self._vectors(c),
            dw1=torch.empty_like(self.w1),
            db1=self._vectors(r),
            dw2=torch.empty_like(self.w2),
            db2=self._vectors(c),
        )
        dz1, dz2, dq = self._vectors(n, r), self._vectors(n, c), self._vectors(n, c)
        blocks = excite_blocks(n, r)
        chunk, block_k = blocks.pop("CHUNK"), blocks.pop("BLOCK_K")
        block_g = blocks.pop("BLOCK_G")
        n_chunks = triton.cdiv(c, chunk)
        tiles_n, tiles_r, tiles_g = (
            triton.cdiv(extent, block)
            for extent, block in ((n, blocks["BLOCK_N"]), (r, blocks["BLOCK_R"]), (c, block_g))
        )
        tiles = tiles_n * tiles_r
        shared = {
            "sums_ptr": sums, "e_ptr": self.saved.e, "z1_ptr": self.saved.z1, "dz1_ptr": dz1, "dz2_ptr": dz2,
            "N": n, "C": c, "R": r, "SPLITS": self.pieces.splits, "tiles_n": tiles_n, "tiles_r": tiles_r,
            "ACT": self.excitation.act, "PRECISION": dot_precision(), **blocks, **self.affine,
        }  # fmt: skip
        if tiles:
            # One program owns one chunk of the channels that a (BLOCK_N, BLOCK_R) tile of dz1 sums over.
            hidden_gradient_kernel[(tiles * n_chunks,)](
                w2_ptr=self.w2, chunks_ptr=self._vectors(n_chunks, n, r), counters_ptr=counters(self.x.device, tiles),
                n_chunks=n_chunks, HAS_G0=self.n_sums != 2, GATE_FN=self.excitation.gate,
                BLOCK_K=block_k, CHUNK=chunk, **shared, **launch_options(4, EXCITE_MAXNREG),
            )  # fmt: skip
        # One program owns BLOCK_G channels of dq, D1 and D2, or a (BLOCK_R, BLOCK_G) tile of dW1 and dW2.
        excite_gradients_kernel[(tiles_g * (1 + tiles_r),)](
            squeezed_ptr=self.saved.squeezed, w1_ptr=self.w1, dq_ptr=dq,
            dweight_ptr=gradients.dweight, dbias_ptr=gradients.dbias,
            dw1_ptr=gradients.dw1, db1_ptr=gradients.db1, dw2_ptr=gradients.dw2, db2_ptr=gradients.db2,
            HW=h * w, tiles_g=tiles_g, SQUEEZED_IS_X=self.n_sums == 2, BLOCK_M=16, BLOCK_G=block_g,
            **self.statistics, **shared,
            num_stages=2, **launch_options(8, GRADIENTS_MAXNREG),
        )  # fmt: skip
        return gradients, dq

    def dx(
        self, dy: Tensor, g: Tensor | None, dq: Tensor, d1: Tensor, d2: Tensor, count: int,
        has_statistics: bool, dx: Tensor,
    ) -> None:  # fmt: skip
        """Fill dx: from g where it is in memory, else from dy and the bits."""
        if self.x.numel():
            dx_kernel[self.sweep_grid](
                g_ptr=dy if g is None else g, bits_ptr=self.saved.bits if g is None else None,
                x_ptr=self.x, e_ptr=self.saved.e, dq_ptr=dq, dweight_ptr=d2, dbias_ptr=d1, dx_ptr=dx,
                inverse_count=1.0 / max(count, 1), HAS_STATISTICS=has_statistics, **self.sweep,
            )  # fmt: skip

    def _vectors(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

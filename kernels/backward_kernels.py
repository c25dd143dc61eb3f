"""The kernels of the backward pass: two sweeps over the map, and the excitation's gradients between them."""

import triton
import triton.language as tl

from .batch_norm import bn_affine, piece_of_sweep
from .excite import excite_gradients, hidden_gradient
from .forward_kernel import activate
from .primitives import act_backward, act_grad, image_offset, load_vector, packed_tile_at, tile_at, unpack_bits


@triton.jit
def _load_g(
    dy_ptr, dy_skip_ptr, bits_ptr, offs, mask, image, tile, block_c, C, HW,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient behind the join of two consumers and ReLU."""
    g = tl.load(dy_ptr + offs, mask, 0.0).to(tl.float32)
    if dy_skip_ptr is not None:
        g += tl.load(dy_skip_ptr + offs, mask, 0.0).to(tl.float32)
    if bits_ptr is not None:
        offs, mask = packed_tile_at(image, tile, block_c, C, HW, HW, BLOCK_HW, BLOCK_C)
        bits = unpack_bits(tl.load(bits_ptr + offs, mask, 0), BLOCK_HW, BLOCK_C)
        g = tl.where(bits, g, 0.0)
    return g


@triton.jit
def _store_sum(sums_ptr, which, n_sums, acc, offs, mask):
    tl.store(sums_ptr + which * n_sums + offs, tl.sum(acc, axis=0), mask)


@triton.jit
def _store_normalized_sum(sums_ptr, which, n_sums, acc, rstd, offs, mask):
    """A sum of (x - mean) times rstd, which is 0 where the variance is beyond float32: so may the sum be."""
    total = tl.where(rstd == 0.0, 0.0, tl.sum(acc, axis=0) * rstd)
    tl.store(sums_ptr + which * n_sums + offs, total, mask)


@triton.jit(do_not_specialize=["N", "columns", "SPLITS", "IMAGES", "tiles_per_split"])
def reduce_kernel(
    dy_ptr, dy_skip_ptr, bits_ptr, x_ptr, g_ptr, sums_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    N, C, HW, columns, SPLITS, IMAGES, tiles_per_split, stride_hw, stride_c, eps,
    BN_ACT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums (1, 2 or 5, N, SPLITS, C) of a part of each map: G0; G1, G2; or G0, G1, G2, F1, F2. Writes g where asked."""
    n, end, split, block_c, offs_c, mask_c = piece_of_sweep(tl.program_id(0), 0, N, columns, C, SPLITS, IMAGES, BLOCK_C)
    HAS_BN: tl.constexpr = mean_ptr is not None
    HAS_ACT: tl.constexpr = BN_ACT != "identity"
    n_sums = tl.cast(N, tl.int64) * SPLITS * C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    rstd, scale, bias = mean, mean, mean
    if HAS_BN:
        mean, rstd, scale, bias = bn_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps)
    for image in range(n, end):
        g_sum = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
        gx_sum = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
        gv_sum, f_sum, fx_sum = g_sum, g_sum, g_sum
        start = image_offset(image, HW, C)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(HW, BLOCK_HW))):
            offs, mask = tile_at(tile, offs_c, mask_c, HW, stride_hw, stride_c, WIDE, BLOCK_HW)
            offs += start
            g = _load_g(dy_ptr, dy_skip_ptr, bits_ptr, offs, mask, image, tile, block_c, C, HW, BLOCK_HW, BLOCK_C)
            if g_ptr is not None:
                tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask)
            x = tl.load(x_ptr + offs, mask, 0.0).to(tl.float32)
            if HAS_ACT:
                centred = x - mean[None, :]
                u = centred * scale[None, :] + bias[None, :]
                slope = tl.where(mask, act_grad(u, BN_ACT), 0.0)
                gv_sum += g * tl.where(mask, activate(x, mean, scale, bias, True, BN_ACT), 0.0)
                g_sum += g * slope
                gx_sum += g * slope * centred
                f_sum += slope
                fx_sum += slope * centred
            elif HAS_BN:
                g_sum += g
                gx_sum += tl.where(mask, g * (x - mean[None, :]), 0.0)
            else:
                gv_sum += g * x
        offs = tl.cast(image * SPLITS + split, tl.int64) * C + offs_c
        if HAS_ACT:
            _store_sum(sums_ptr, 0, n_sums, gv_sum, offs, mask_c)
            _store_sum(sums_ptr, 1, n_sums, g_sum, offs, mask_c)
            _store_normalized_sum(sums_ptr, 2, n_sums, gx_sum, rstd, offs, mask_c)
            _store_sum(sums_ptr, 3, n_sums, f_sum, offs, mask_c)
            _store_normalized_sum(sums_ptr, 4, n_sums, fx_sum, rstd, offs, mask_c)
        elif HAS_BN:
            _store_sum(sums_ptr, 0, n_sums, g_sum, offs, mask_c)
            _store_normalized_sum(sums_ptr, 1, n_sums, gx_sum, rstd, offs, mask_c)
        else:
            _store_sum(sums_ptr, 0, n_sums, gv_sum, offs, mask_c)


@triton.jit(do_not_specialize=["N", "SPLITS", "n_chunks", "tiles_n", "tiles_r"])
def hidden_gradient_kernel(
    sums_ptr, e_ptr, z1_ptr, w2_ptr, weight_ptr, bias_ptr, dz2_ptr, chunks_ptr, dz1_ptr, counters_ptr,
    N, C, R, SPLITS, n_chunks, tiles_n, tiles_r,
    HAS_G0: tl.constexpr, ACT: tl.constexpr, GATE_FN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    hidden_gradient(
        tl.program_id(0), sums_ptr, e_ptr, z1_ptr, w2_ptr, weight_ptr, bias_ptr, dz2_ptr, chunks_ptr, dz1_ptr,
        counters_ptr, N, C, R, SPLITS, n_chunks, tiles_n, tiles_r,
        HAS_G0, ACT, GATE_FN, PRECISION, BLOCK_N, BLOCK_R, BLOCK_K, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "SPLITS", "tiles_n", "tiles_r", "tiles_g"])
def excite_gradients_kernel(
    sums_ptr, e_ptr, z1_ptr, squeezed_ptr, dz1_ptr, dz2_ptr, w1_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    dq_ptr, dweight_ptr, dbias_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    N, C, HW, R, SPLITS, tiles_n, tiles_r, tiles_g, eps,
    SQUEEZED_IS_X: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    excite_gradients(
        tl.program_id(0), sums_ptr, e_ptr, z1_ptr, squeezed_ptr, dz1_ptr, dz2_ptr, w1_ptr,
        weight_ptr, bias_ptr, mean_ptr, var_ptr, dq_ptr, dweight_ptr, dbias_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
        N, C, HW, R, SPLITS, tiles_n, tiles_r, tiles_g, eps,
        SQUEEZED_IS_X, ACT, PRECISION, BLOCK_N, BLOCK_M, BLOCK_R, BLOCK_G,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "columns", "SPLITS", "IMAGES", "tiles_per_split"])
def dx_kernel(
    g_ptr, bits_ptr, x_ptr, e_ptr, dq_ptr, dweight_ptr, dbias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, dx_ptr,
    N, C, HW, columns, SPLITS, IMAGES, tiles_per_split, stride_hw, stride_c, eps, inverse_count,
    BN_ACT: tl.constexpr, HAS_STATISTICS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = scale ((e g + dq / HW) phi'(u) - D1 / M - xh D2 / M)."""
    n, end, split, block_c, offs_c, mask_c = piece_of_sweep(tl.program_id(0), 0, N, columns, C, SPLITS, IMAGES, BLOCK_C)
    HAS_BN: tl.constexpr = mean_ptr is not None
    HAS_ACT: tl.constexpr = BN_ACT != "identity"
    mean = tl.zeros((BLOCK_C,), tl.float32)
    rstd, scale, bias, offset, slope_x = mean, mean, mean, mean, mean
    if HAS_BN:
        mean, rstd, scale, bias = bn_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps)
    if HAS_STATISTICS:
        offset = load_vector(dbias_ptr, offs_c, mask_c) * inverse_count
        slope_x = load_vector(dweight_ptr, offs_c, mask_c) * inverse_count * rstd
    for image in range(n, end):
        offs_nc = tl.cast(image, tl.int64) * C + offs_c
        e, dq = load_vector(e_ptr, offs_nc, mask_c), load_vector(dq_ptr, offs_nc, mask_c) / HW
        start = image_offset(image, HW, C)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(HW, BLOCK_HW))):
            offs, mask = tile_at(tile, offs_c, mask_c, HW, stride_hw, stride_c, WIDE, BLOCK_HW)
            offs += start
            g = _load_g(g_ptr, None, bits_ptr, offs, mask, image, tile, block_c, C, HW, BLOCK_HW, BLOCK_C)
            dx = e[None, :] * g + dq[None, :]
            if HAS_ACT or HAS_STATISTICS:
                centred = tl.load(x_ptr + offs, mask, 0.0).to(tl.float32) - mean[None, :]
                if HAS_ACT:
                    dx = act_backward(dx, centred * scale[None, :] + bias[None, :], BN_ACT)
                if HAS_STATISTICS:
                    dx -= offset[None, :] + centred * slope_x[None, :]
            if HAS_BN:
                dx *= scale[None, :]
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)

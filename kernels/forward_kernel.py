"""The phases of the forward pass, and the kernel that runs a series of them: FIRST to LAST of schedule.py."""

import triton
import triton.language as tl

from .batch_norm import bn_affine, finalize_statistics, piece_of_sweep, statistics_sweep
from .excite import gate_tile, hidden_tile
from .primitives import apply_act, image_offset, load_vector, pack_bits, packed_columns, packed_tile_at, tile_at
from .schedule import (
    APPLY,
    FINALIZE,
    FIRST_GROUP,
    GATE,
    HIDDEN,
    SQUEEZE,
    STATISTICS,
    arrive,
    find_piece,
    reset,
    wait_for,
)


@triton.jit
def activate(x, mean, scale, bias, HAS_BN: tl.constexpr, BN_ACT: tl.constexpr):
    """v = phi(BN(x)) of a tile, or x itself where there is no BN."""
    if HAS_BN:
        return apply_act((x - mean[None, :]) * scale[None, :] + bias[None, :], BN_ACT)
    else:
        return x


@triton.jit
def _squeeze_sweep(
    index, first_image, last_image, x_ptr, part_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    C, HW, columns, SPLITS, IMAGES, tiles_per_split, stride_hw, stride_c, eps,
    BN_ACT: tl.constexpr, IS_REREAD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part (N, SPLITS, C): sums over a part of each map, over HW: of phi(BN(x)), or of x where BN has no activation."""
    n, end, split, _, offs_c, mask_c = piece_of_sweep(
        index, first_image, last_image, columns, C, SPLITS, IMAGES, BLOCK_C
    )
    HAS_ACT: tl.constexpr = BN_ACT != "identity"
    mean = tl.zeros((BLOCK_C,), tl.float32)
    scale, bias = mean, mean
    if HAS_ACT:
        mean, _, scale, bias = bn_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps)
    for image in range(n, end):
        acc = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
        start = image_offset(image, HW, C)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(HW, BLOCK_HW))):
            offs, mask = tile_at(tile, offs_c, mask_c, HW, stride_hw, stride_c, WIDE, BLOCK_HW)
            # Keep in L2 what the same launch reads again.
            x = tl.load(x_ptr + start + offs, mask, 0.0, eviction_policy="evict_last" if IS_REREAD else "")
            x = x.to(tl.float32)
            if HAS_ACT:
                x = tl.where(mask, activate(x, mean, scale, bias, True, BN_ACT), 0.0)
            acc += x
        offs_part = tl.cast(image * SPLITS + split, tl.int64) * C + offs_c
        tl.store(part_ptr + offs_part, tl.sum(acc, axis=0) / HW, mask_c)


@triton.jit
def _apply_sweep(
    index, first_image, last_image, x_ptr, e_ptr, residual_ptr, y_ptr, bits_ptr,
    weight_ptr, bias_ptr, mean_ptr, var_ptr,
    C, HW, columns, SPLITS, IMAGES, tiles_per_split, stride_hw, stride_c, eps,
    BN_ACT: tl.constexpr, OUT_ACT: tl.constexpr, IS_REREAD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = out_act(phi(BN(x)) * e + residual), and a bit for each y > 0."""
    n, end, split, block_c, offs_c, mask_c = piece_of_sweep(
        index, first_image, last_image, columns, C, SPLITS, IMAGES, BLOCK_C
    )
    HAS_BN: tl.constexpr = mean_ptr is not None
    mean = tl.zeros((BLOCK_C,), tl.float32)
    scale, bias = mean, mean
    if HAS_BN:
        mean, _, scale, bias = bn_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps)
    for image in range(n, end):
        e = load_vector(e_ptr, tl.cast(image, tl.int64) * C + offs_c, mask_c)
        start = image_offset(image, HW, C)
        first = split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, tl.cdiv(HW, BLOCK_HW))
        if bits_ptr is not None:
            if split == SPLITS - 1:  # a row of bits ends behind the last pixel: zeros, whoever may read them
                last = tl.cdiv(packed_columns(HW), BLOCK_HW)
        for tile in range(first, last):
            offs, mask = tile_at(tile, offs_c, mask_c, HW, stride_hw, stride_c, WIDE, BLOCK_HW)
            offs += start
            x = tl.load(x_ptr + offs, mask, 0.0, eviction_policy="evict_first" if IS_REREAD else "").to(tl.float32)
            y = activate(x, mean, scale, bias, HAS_BN, BN_ACT) * e[None, :]
            if residual_ptr is not None:
                y += tl.load(residual_ptr + offs, mask, 0.0).to(tl.float32)
            y = apply_act(y, OUT_ACT)
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask)
            if bits_ptr is not None:
                bits = pack_bits(((y > 0.0) | (y != y)) & mask, BLOCK_HW, BLOCK_C)
                offs, mask = packed_tile_at(image, tile, block_c, C, HW, packed_columns(HW), BLOCK_HW, BLOCK_C)
                tl.store(bits_ptr + offs, bits, mask)


@triton.jit(do_not_specialize=[
    "N", "SPLITS", "IMAGES", "tiles_per_split", "n_pieces", "group_images", "groups", "columns", "tiles_n", "tiles_r",
    "tiles_g", "n_statistics", "n_finalize", "n_squeeze", "n_hidden", "n_gate", "n_apply", "n_chunks", "n_counters",
])  # fmt: skip
def forward_kernel(
    x_ptr, residual_ptr, y_ptr, bits_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    running_mean_ptr, running_var_ptr, new_running_mean_ptr, new_running_var_ptr,
    w1_ptr, b1_ptr, w2_ptr, b2_ptr, moments_ptr, part_ptr, squeezed_ptr, chunks_ptr, z1_ptr, e_ptr, counters_ptr,
    N, C, HW, R, SPLITS, IMAGES, tiles_per_split, n_pieces, group_images, groups, columns, tiles_n, tiles_r, tiles_g,
    n_statistics, n_finalize, n_squeeze, n_hidden, n_gate, n_apply, n_chunks, n_counters,
    stride_hw, stride_c, eps, momentum,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_SQUEEZE: tl.constexpr,
    SQUEEZED_IS_X: tl.constexpr, BN_ACT: tl.constexpr, ACT: tl.constexpr, GATE_FN: tl.constexpr, OUT_ACT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The phases FIRST to LAST; what earlier ones make is in memory already."""
    IS_REREAD: tl.constexpr = FIRST < APPLY and LAST == APPLY
    ticket = tl.program_id(0)
    if FIRST < LAST:
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    phase, group, index = find_piece(ticket, n_statistics, n_finalize, n_squeeze, n_hidden, n_gate, n_apply, groups)
    first_image = group * group_images
    last_image = tl.minimum(first_image + group_images, N)
    squeezed_ctr = counters_ptr + FIRST_GROUP + group
    hidden_ctr, gated_ctr = squeezed_ctr + groups, squeezed_ctr + 2 * groups
    tiles_ctr = counters_ptr + FIRST_GROUP + 3 * groups + group * tiles_n * tiles_r
    if FIRST <= STATISTICS:
        if phase == STATISTICS:
            statistics_sweep(
                index, x_ptr, part_ptr, moments_ptr,
                N, C, HW, columns, SPLITS, IMAGES, tiles_per_split, n_pieces, stride_hw, stride_c,
                WIDE, BLOCK_HW, BLOCK_C,
            )  # fmt: skip
            if LAST > STATISTICS:
                arrive(counters_ptr + 1)
    if FIRST <= FINALIZE and LAST >= FINALIZE:
        if phase == FINALIZE:
            if FIRST < FINALIZE:
                wait_for(counters_ptr + 1, n_statistics)
            finalize_statistics(
                index, moments_ptr, mean_ptr, var_ptr,
                running_mean_ptr, running_var_ptr, new_running_mean_ptr, new_running_var_ptr,
                N, C, HW, SPLITS, IMAGES, tiles_per_split, n_pieces, momentum, BLOCK_HW, BLOCK_P, BLOCK_F,
            )  # fmt: skip
            if LAST > FINALIZE:
                arrive(counters_ptr + 2)
    if HAS_SQUEEZE and FIRST <= SQUEEZE and LAST >= SQUEEZE:
        if phase == SQUEEZE:
            if FIRST <= FINALIZE:
                wait_for(counters_ptr + 2, n_finalize)
            _squeeze_sweep(
                index, first_image, last_image, x_ptr, part_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
                C, HW, columns, SPLITS, IMAGES, tiles_per_split, stride_hw, stride_c, eps,
                BN_ACT, IS_REREAD, WIDE, BLOCK_HW, BLOCK_C,
            )  # fmt: skip
            if LAST > SQUEEZE:
                arrive(squeezed_ctr)
    if FIRST <= HIDDEN and LAST >= HIDDEN:
        if phase == HIDDEN:
            if HAS_SQUEEZE and FIRST <= SQUEEZE:
                wait_for(squeezed_ctr, n_squeeze)
            elif FIRST <= FINALIZE:
                wait_for(counters_ptr + 2, n_finalize)
            is_complete = hidden_tile(
                index, first_image, last_image, tiles_n, tiles_r, part_ptr, squeezed_ptr, chunks_ptr, tiles_ctr, z1_ptr,
                weight_ptr, bias_ptr, mean_ptr, var_ptr, w1_ptr, b1_ptr, N, C, R, SPLITS, n_chunks, eps,
                SQUEEZED_IS_X, PRECISION, BLOCK_N, BLOCK_R, BLOCK_K, CHUNK,
            )  # fmt: skip
            if is_complete:
                arrive(hidden_ctr)
    if FIRST <= GATE and LAST >= GATE:
        if phase == GATE:
            wait_for(hidden_ctr, tiles_n * tiles_r)
            gate_tile(
                index, first_image, last_image, tiles_n, tiles_r, tiles_g, z1_ptr, w2_ptr, b2_ptr, e_ptr, C, R,
                ACT, GATE_FN, PRECISION, BLOCK_N, BLOCK_R, BLOCK_G,
            )  # fmt: skip
            if LAST > GATE:
                arrive(gated_ctr)
    if LAST == APPLY:
        if phase == APPLY:
            if FIRST <= GATE:
                wait_for(gated_ctr, n_gate)
            _apply_sweep(
                index, first_image, last_image, x_ptr, e_ptr, residual_ptr, y_ptr, bits_ptr,
                weight_ptr, bias_ptr, mean_ptr, var_ptr,
                C, HW, columns, SPLITS, IMAGES, tiles_per_split, stride_hw, stride_c, eps,
                BN_ACT, OUT_ACT, IS_REREAD, WIDE, BLOCK_HW, BLOCK_C,
            )  # fmt: skip
    if FIRST < LAST:
        # Whoever finishes the last piece of the last phase knows that all others have made their last arrival.
        n_last = n_finalize if LAST == FINALIZE else groups * (n_gate if LAST == GATE else n_apply)
        if phase == LAST:
            if arrive(counters_ptr + 3) == n_last - 1:
                reset(counters_ptr, n_counters, 256)

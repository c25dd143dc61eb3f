"""Excite, e = gate(W2 act(W1 q + b1) + b2), and its gradients, as matrix products in pieces that any launch can own.

Sums over channels are cut into chunks so that enough programs take part; the last program of a tile to arrive adds the
chunks up in their order, so that results repeat bit for bit. Products are fp32: three TF32 products on NVIDIA's tensor
cores (the error of one fp32 product is 2**-22 there), fp32 matrix instructions on AMD's.
"""

import triton
import triton.language as tl

from .batch_norm import bn_affine
from .primitives import act_backward, apply_act, apply_gate, block_offsets, load_vector, unravel
from .schedule import arrive


@triton.jit
def load_parts(part_ptr, offs_n, mask_n, offs_c, mask_c, C, SPLITS):
    """(images, channels) of sums over parts of the map, (N, SPLITS, C), added up."""
    mask = mask_n[:, None] & mask_c[None, :]
    offs = offs_n[:, None].to(tl.int64) * SPLITS * C + offs_c[None, :]
    total = load_vector(part_ptr, offs, mask)
    for split in range(1, SPLITS):
        total += load_vector(part_ptr + split * C, offs, mask)
    return total


@triton.jit
def normalize_squeezed(
    squeezed, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, SQUEEZED_IS_X: tl.constexpr
):  # fmt: skip
    """q of what was squeezed: BN without an activation is affine, so the mean of BN(x) is BN of the mean of x."""
    if SQUEEZED_IS_X:
        mean, _, scale, bias = bn_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps)
        return (squeezed - mean[None, :]) * scale[None, :] + bias[None, :]
    else:
        return squeezed


@triton.jit
def _add_chunks(
    acc, chunks_ptr, counter_ptr, chunk, n_chunks, offs, mask, chunk_size
):  # fmt: skip
    """Store this chunk's partial sum; (True, the sum of all chunks) for the last program that arrives."""
    tl.store(chunks_ptr + chunk * chunk_size + offs, acc, mask)
    is_last = arrive(counter_ptr) == n_chunks - 1
    total = tl.zeros_like(acc)
    if is_last:
        tl.debug_barrier()
        for other in range(0, n_chunks):
            total += tl.load(chunks_ptr + other * chunk_size + offs, mask, 0.0)
        tl.store(counter_ptr, 0)
    return is_last, total


@triton.jit
def hidden_tile(
    index, first_image, last_image, tiles_n, tiles_r, part_ptr, squeezed_ptr, chunks_ptr, counters_ptr, z1_ptr,
    weight_ptr, bias_ptr, mean_ptr, var_ptr, w1_ptr, b1_ptr,
    N, C, R, SPLITS, n_chunks, eps,
    SQUEEZED_IS_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of a tile of z1 = W1 q + b1; whether the tile is complete now. Keeps the squeezed map, added up.

    Every group has tiles_n tiles of images; the last group may have images for fewer.
    """
    chunk, block_n, block_r = unravel(index, tiles_r, tiles_n)
    offs_n = first_image + block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_image
    offs_r, mask_r = block_offsets(block_r, BLOCK_R, R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for block in range(chunk * (CHUNK // BLOCK_K), tl.minimum((chunk + 1) * (CHUNK // BLOCK_K), tl.cdiv(C, BLOCK_K))):
        offs_c, mask_c = block_offsets(block, BLOCK_K, C)
        squeezed = load_parts(part_ptr, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
        if squeezed_ptr is not None:
            if block_r == 0:
                offs = offs_n[:, None].to(tl.int64) * C + offs_c[None, :]
                tl.store(squeezed_ptr + offs, squeezed, mask_n[:, None] & mask_c[None, :])
        q = normalize_squeezed(squeezed, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, SQUEEZED_IS_X)
        w1 = load_vector(w1_ptr, offs_r[None, :] * C + offs_c[:, None], mask_r[None, :] & mask_c[:, None])
        acc = tl.dot(tl.where(mask_c[None, :], q, 0.0), w1, acc, input_precision=PRECISION)
    offs = offs_n[:, None].to(tl.int64) * R + offs_r[None, :]
    mask = mask_n[:, None] & mask_r[None, :]
    counter_ptr = counters_ptr + block_n * tiles_r + block_r
    is_last, z1 = _add_chunks(acc, chunks_ptr, counter_ptr, chunk, n_chunks, offs, mask, N.to(tl.int64) * R)
    if is_last:
        if b1_ptr is not None:
            z1 += load_vector(b1_ptr, offs_r, mask_r)[None, :]
        tl.store(z1_ptr + offs, z1, mask)
    return is_last


@triton.jit
def gate_tile(
    index, first_image, last_image, tiles_n, tiles_r, tiles_g, z1_ptr, w2_ptr, b2_ptr, e_ptr,
    C, R,
    ACT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_G) tile of e = gate(W2 act(z1) + b2)."""
    _, block_n, block_c = unravel(index, tiles_g, tiles_n)
    offs_n = first_image + block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_image
    offs_c, mask_c = block_offsets(block_c, BLOCK_G, C)
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for block in range(0, tiles_r):
        offs_r, mask_r = block_offsets(block, BLOCK_R, R)
        z1 = load_vector(z1_ptr, offs_n[:, None].to(tl.int64) * R + offs_r[None, :], mask_n[:, None] & mask_r[None, :])
        w2 = load_vector(w2_ptr, offs_c[None, :] * R + offs_r[:, None], mask_c[None, :] & mask_r[:, None])
        # act(0) = 0 for every act, so what lies beyond R adds nothing.
        acc = tl.dot(apply_act(z1, ACT), w2, acc, input_precision=PRECISION)
    if b2_ptr is not None:
        acc += load_vector(b2_ptr, offs_c, mask_c)[None, :]
    tl.store(e_ptr + offs_n[:, None].to(tl.int64) * C + offs_c[None, :], apply_gate(acc, GATE),
             mask_n[:, None] & mask_c[None, :])  # fmt: skip


@triton.jit
def _gate_gradient(e, GATE: tl.constexpr):
    """d gate(z) / dz, from e = gate(z)."""
    if GATE == "sigmoid":
        return e * (1.0 - e)
    else:
        tl.static_assert(GATE == "hardsigmoid", "gate is one of sigmoid, hardsigmoid")
        return tl.where((e > 0.0) & (e < 1.0), 1.0 / 6.0, 0.0)


@triton.jit
def hidden_gradient(
    index, sums_ptr, e_ptr, z1_ptr, w2_ptr, weight_ptr, bias_ptr, dz2_ptr, chunks_ptr, dz1_ptr, counters_ptr,
    N, C, R, SPLITS, n_chunks, tiles_n, tiles_r,
    HAS_G0: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of a tile of dz1 = (dz2 W2) act'(z1), where dz2 = G0 gate'(z2).

    The sweep's sums are G0, or G1 and G2, from which G0 = weight G2 + bias G1 since v = weight xh + bias.
    """
    chunk, block_n, block_r = unravel(index, tiles_r, tiles_n)
    offs_n, mask_n = block_offsets(block_n, BLOCK_N, N)
    offs_r, mask_r = block_offsets(block_r, BLOCK_R, R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for block in range(chunk * (CHUNK // BLOCK_K), tl.minimum((chunk + 1) * (CHUNK // BLOCK_K), tl.cdiv(C, BLOCK_K))):
        offs_c, mask_c = block_offsets(block, BLOCK_K, C)
        offs, mask = offs_n[:, None].to(tl.int64) * C + offs_c[None, :], mask_n[:, None] & mask_c[None, :]
        de = load_parts(sums_ptr, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
        if not HAS_G0:
            g2_ptr = sums_ptr + tl.cast(N, tl.int64) * SPLITS * C
            g1, de = de, load_parts(g2_ptr, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
            if weight_ptr is not None:
                de = de * load_vector(weight_ptr, offs_c, mask_c)[None, :]
                de += g1 * load_vector(bias_ptr, offs_c, mask_c)[None, :]
        dz2 = de * _gate_gradient(load_vector(e_ptr, offs, mask), GATE)
        if block_r == 0:
            tl.store(dz2_ptr + offs, dz2, mask)
        w2 = load_vector(w2_ptr, offs_c[:, None] * R + offs_r[None, :], mask_c[:, None] & mask_r[None, :])
        acc = tl.dot(dz2, w2, acc, input_precision=PRECISION)
    offs, mask = offs_n[:, None].to(tl.int64) * R + offs_r[None, :], mask_n[:, None] & mask_r[None, :]
    counter_ptr = counters_ptr + block_n * tiles_r + block_r
    is_last, da = _add_chunks(acc, chunks_ptr, counter_ptr, chunk, n_chunks, offs, mask, tl.cast(N, tl.int64) * R)
    if is_last:
        tl.store(dz1_ptr + offs, act_backward(da, load_vector(z1_ptr, offs, mask), ACT), mask)


@triton.jit
def _input_gradients(
    block_c, sums_ptr, e_ptr, squeezed_ptr, dz1_ptr, w1_ptr, mean_ptr, var_ptr, dq_ptr, dweight_ptr, dbias_ptr,
    N, C, HW, R, SPLITS, tiles_n, tiles_r, eps,
    SQUEEZED_IS_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """dq = dz1 W1 of BLOCK_G channels, and D1 and D2 of BN over all images."""
    offs_c, mask_c = block_offsets(block_c, BLOCK_G, C)
    HAS_BN: tl.constexpr = mean_ptr is not None
    n_sums = tl.cast(N, tl.int64) * SPLITS * C
    d1 = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    d2 = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for block_n in range(0, tiles_n):
        offs_n, mask_n = block_offsets(block_n, BLOCK_N, N)
        dq = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for block_r in range(0, tiles_r):
            offs_r, mask_r = block_offsets(block_r, BLOCK_R, R)
            offs, mask = offs_n[:, None].to(tl.int64) * R + offs_r[None, :], mask_n[:, None] & mask_r[None, :]
            w1 = load_vector(w1_ptr, offs_r[:, None] * C + offs_c[None, :], mask_r[:, None] & mask_c[None, :])
            dq = tl.dot(load_vector(dz1_ptr, offs, mask), w1, dq, input_precision=PRECISION)
        offs, mask = offs_n[:, None].to(tl.int64) * C + offs_c[None, :], mask_n[:, None] & mask_c[None, :]
        tl.store(dq_ptr + offs, dq, mask)
        if HAS_BN:
            e = load_vector(e_ptr, offs, mask)
            if SQUEEZED_IS_X:
                g1 = load_parts(sums_ptr, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
                g2 = load_parts(sums_ptr + n_sums, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
                mean, rstd, _, _ = bn_affine(None, None, mean_ptr, var_ptr, offs_c, mask_c, eps)
                xh = (load_vector(squeezed_ptr, offs, mask) - mean[None, :]) * rstd
                d1 += e * g1 + dq
                d2 += e * g2 + tl.where(mask, dq * xh, 0.0)
            else:
                g1 = load_parts(sums_ptr + n_sums, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
                g2 = load_parts(sums_ptr + 2 * n_sums, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
                f1 = load_parts(sums_ptr + 3 * n_sums, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
                f2 = load_parts(sums_ptr + 4 * n_sums, offs_n, mask_n, offs_c, mask_c, C, SPLITS)
                d1 += e * g1 + dq * (f1 / HW)
                d2 += e * g2 + dq * (f2 / HW)
    if HAS_BN:
        tl.store(dbias_ptr + offs_c, tl.sum(d1, axis=0), mask_c)
        tl.store(dweight_ptr + offs_c, tl.sum(d2, axis=0), mask_c)


@triton.jit
def _weight_gradients(
    block_c, block_r, z1_ptr, squeezed_ptr, dz1_ptr, dz2_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    N, C, R, eps,
    SQUEEZED_IS_X: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_R, BLOCK_G) tile of dW1 = dz1' q and of dW2' = act(z1)' dz2, and the bias gradients at its edges."""
    offs_c, mask_c = block_offsets(block_c, BLOCK_G, C)
    offs_r, mask_r = block_offsets(block_r, BLOCK_R, R)
    dw1 = tl.zeros((BLOCK_R, BLOCK_G), tl.float32)
    dw2 = tl.zeros((BLOCK_R, BLOCK_G), tl.float32)
    db1 = tl.zeros((BLOCK_R,), tl.float32)
    db2 = tl.zeros((BLOCK_G,), tl.float32)
    for block_n in range(0, tl.cdiv(N, BLOCK_M)):
        offs_n, mask_n = block_offsets(block_n, BLOCK_M, N)
        offs = offs_n[None, :].to(tl.int64) * R + offs_r[:, None]
        mask = mask_n[None, :] & mask_r[:, None]
        dz1, z1 = load_vector(dz1_ptr, offs, mask), load_vector(z1_ptr, offs, mask)
        offs, mask = offs_n[:, None].to(tl.int64) * C + offs_c[None, :], mask_n[:, None] & mask_c[None, :]
        dz2, squeezed = load_vector(dz2_ptr, offs, mask), load_vector(squeezed_ptr, offs, mask)
        q = normalize_squeezed(squeezed, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, SQUEEZED_IS_X)
        # Beyond N the gradients are 0 and q is BN of 0.
        dw1 = tl.dot(dz1, tl.where(mask, q, 0.0), dw1, input_precision=PRECISION)
        dw2 = tl.dot(apply_act(z1, ACT), dz2, dw2, input_precision=PRECISION)
        db1 += tl.sum(dz1, axis=1)
        db2 += tl.sum(dz2, axis=0)
    mask = mask_r[:, None] & mask_c[None, :]
    tl.store(dw1_ptr + offs_r[:, None] * C + offs_c[None, :], dw1.to(dw1_ptr.dtype.element_ty), mask)
    tl.store(dw2_ptr + offs_c[None, :] * R + offs_r[:, None], dw2.to(dw2_ptr.dtype.element_ty), mask)
    if block_c == 0:
        tl.store(db1_ptr + offs_r, db1, mask_r)
    if block_r == 0:
        tl.store(db2_ptr + offs_c, db2, mask_c)


@triton.jit
def excite_gradients(
    index, sums_ptr, e_ptr, z1_ptr, squeezed_ptr, dz1_ptr, dz2_ptr, w1_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    dq_ptr, dweight_ptr, dbias_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    N, C, HW, R, SPLITS, tiles_n, tiles_r, tiles_g, eps,
    SQUEEZED_IS_X: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """All that follows from dz1, in pieces: first the gradients of the input, the long sums, then those of weights."""
    if index < tiles_g:
        _input_gradients(
            index, sums_ptr, e_ptr, squeezed_ptr, dz1_ptr, w1_ptr, mean_ptr, var_ptr, dq_ptr, dweight_ptr, dbias_ptr,
            N, C, HW, R, SPLITS, tiles_n, tiles_r, eps, SQUEEZED_IS_X, PRECISION, BLOCK_N, BLOCK_R, BLOCK_G,
        )  # fmt: skip
    else:
        _weight_gradients(
            (index - tiles_g) % tiles_g, (index - tiles_g) // tiles_g,
            z1_ptr, squeezed_ptr, dz1_ptr, dz2_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
            dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
            N, C, R, eps, SQUEEZED_IS_X, ACT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_G,
        )  # fmt: skip

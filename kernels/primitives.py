"""Small device functions, one idea each."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def apply_act(z, ACT: tl.constexpr):
    """act(z) in fp32. Comparisons are written so that NaN passes through, as it does in eager PyTorch."""
    if ACT == "relu":
        return tl.where(z < 0.0, 0.0, z)
    elif ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "hardswish":
        return z * apply_gate(z, "hardsigmoid")
    else:
        tl.static_assert(ACT == "identity", "act is one of relu, silu, gelu, hardswish, identity")
        return z


@triton.jit
def act_grad(z, ACT: tl.constexpr):
    """d act(z) / dz."""
    if ACT == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif ACT == "silu":
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "hardswish":
        return tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, z / 3.0 + 0.5))
    else:
        tl.static_assert(ACT == "identity", "act is one of relu, silu, gelu, hardswish, identity")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def act_backward(dv, z, ACT: tl.constexpr):
    """dv d act(z) / dz. What ReLU did not let through has no gradient, be dv NaN, as in eager PyTorch."""
    if ACT == "relu":
        return tl.where(z <= 0.0, 0.0, dv)
    else:
        return dv * act_grad(z, ACT)


@triton.jit
def apply_gate(z, GATE: tl.constexpr):
    """The excitation's last non-linearity, in fp32."""
    if GATE == "sigmoid":
        return sigmoid(z)
    else:
        tl.static_assert(GATE == "hardsigmoid", "gate is one of sigmoid, hardsigmoid")
        return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, z / 6.0 + 0.5))


@triton.jit
def unravel(pid, inner, middle):
    """(i, j, k) of a flat program id over a grid of (anything, middle, inner), k fastest.

    One flat axis, because the second and third axis of a CUDA grid end at 65,535 and N alone may be larger.
    """
    k = pid % inner
    j = (pid // inner) % middle
    i = pid // (inner * middle)
    return i, j, k


@triton.jit
def block_offsets(block, BLOCK: tl.constexpr, limit):
    """The offsets of one block along an axis, and the mask of those inside it."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < limit


@triton.jit
def image_offset(n, HW, C):
    """Elements before image n, in 64 bits: a batch may pass 2**31 elements."""
    return tl.cast(n, tl.int64) * HW * C


@triton.jit
def tile_offsets(offs_hw, offs_c, stride_hw, stride_c, WIDE: tl.constexpr):
    """Offsets (BLOCK_HW, BLOCK_C) inside one image; WIDE where a single image passes 2**31 elements."""
    if WIDE:
        offs_hw = offs_hw.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    return offs_hw[:, None] * stride_hw + offs_c[None, :] * stride_c


@triton.jit
def tile_at(
    tile, offs_c, mask_c, HW, stride_hw, stride_c, WIDE: tl.constexpr, BLOCK_HW: tl.constexpr
):  # fmt: skip
    """Offsets (BLOCK_HW, BLOCK_C) of one tile inside an image, and the mask of those inside the map."""
    offs_hw, mask_hw = block_offsets(tile, BLOCK_HW, HW)
    return tile_offsets(offs_hw, offs_c, stride_hw, stride_c, WIDE), mask_hw[:, None] & mask_c[None, :]


@triton.jit
def load_vector(ptr, offs, mask):
    """Values of a vector in fp32, 0 beyond the mask."""
    return tl.load(ptr + offs, mask, 0.0).to(tl.float32)


@triton.jit
def pack_bits(bits, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Booleans (BLOCK_HW, BLOCK_C) as bytes (BLOCK_HW, BLOCK_C / 8), eight neighbouring channels in each."""
    bits = tl.reshape(bits.to(tl.int32), (BLOCK_HW, BLOCK_C // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """The booleans (BLOCK_HW, BLOCK_C) that `pack_bits` was given."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_HW, BLOCK_C)) != 0


@triton.jit
def packed_columns(HW):
    """Bytes in a row of the packed map."""
    return tl.cdiv(HW, 32) * 32


@triton.jit
def packed_tile_at(n, tile, block_c, C, HW, limit, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile's bytes in the packed map (N, ceil(C / 8), HW rounded up to 32), and the mask of columns
    below the limit."""
    rows, columns = tl.cdiv(C, 8), packed_columns(HW)
    offs_hw, mask_hw = block_offsets(tile, BLOCK_HW, limit)
    offs_c, mask_c = block_offsets(block_c, BLOCK_C // 8, rows)
    offs = image_offset(n, rows, columns) + offs_c[None, :].to(tl.int64) * columns + offs_hw[:, None]
    return offs, mask_hw[:, None] & mask_c[None, :]

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
    else:
        tl.static_assert(ACT == "identity", "act is one of relu, silu, gelu, identity")
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
    else:
        tl.static_assert(ACT == "identity", "act is one of relu, silu, gelu, identity")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def apply_gate(z, GATE: tl.constexpr):
    """The excitation's last non-linearity, in fp32."""
    if GATE == "sigmoid":
        return sigmoid(z)
    else:
        tl.static_assert(GATE == "hardsigmoid", "gate is one of sigmoid, hardsigmoid")
        return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, z / 6.0 + 0.5))


@triton.jit
def gate_grad(z, GATE: tl.constexpr):
    """d gate(z) / dz."""
    if GATE == "sigmoid":
        s = sigmoid(z)
        return s * (1.0 - s)
    else:
        tl.static_assert(GATE == "hardsigmoid", "gate is one of sigmoid, hardsigmoid")
        return tl.where((z > -3.0) & (z < 3.0), 1.0 / 6.0, 0.0)


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
    return n.to(tl.int64) * HW * C


@triton.jit
def map_tile(C, HW, stride_hw, stride_c, WIDE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """What one program of a sweep that writes a map owns: its channels of image n, offs_nc (BLOCK_C) into (N, C) with
    their mask, and a tile of the map, offs (BLOCK_HW, BLOCK_C) with its mask."""
    n, block_hw, block_c = unravel(tl.program_id(0), tl.cdiv(C, BLOCK_C), tl.cdiv(HW, BLOCK_HW))
    offs_c, mask_c = block_offsets(block_c, BLOCK_C, C)
    offs_hw, mask_hw = block_offsets(block_hw, BLOCK_HW, HW)
    offs = image_offset(n, HW, C) + tile_offsets(offs_hw, offs_c, stride_hw, stride_c, WIDE)
    return n.to(tl.int64) * C + offs_c, mask_c, offs, mask_hw[:, None] & mask_c[None, :]


@triton.jit
def tile_offsets(offs_hw, offs_c, stride_hw, stride_c, WIDE: tl.constexpr):
    """Offsets (BLOCK_HW, BLOCK_C) inside one image; WIDE where a single image passes 2**31 elements."""
    if WIDE:
        offs_hw = offs_hw.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    return offs_hw[:, None] * stride_hw + offs_c[None, :] * stride_c

"""Excite: z1 = W1 q + b1, z2 = W2 act(z1) + b2, and its gradients, as tiled fp32 matrix products.

The pre-activations z1, z2 are what is kept: both non-linearities are recomputed where they are read (O(N*C) work).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import act_grad, apply_act, block_offsets, unravel
from .tuning import LAUNCH_OPTIONS

# 40 to 72 registers on sm_80 to sm_120; with BLOCK_K = 32 the weight gradients spill on sm_90 and later.
BLOCK_M, BLOCK_N, BLOCK_K = 16, 32, 16


@triton.jit
def _linear_kernel(
    a_ptr, b_ptr, bias_ptr, z_ptr, out_ptr, row_sum_ptr,
    M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
    A_ACT: tl.constexpr, B_ACT: tl.constexpr, Z_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, HAS_ROW_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = (act(a) (M, K) @ act(b).T (K, N) + bias) * act'(z), and row_sum (M) = a.sum(1)."""
    _, block_m, block_n = unravel(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M))
    offs_m, mask_m = block_offsets(block_m, BLOCK_M, M)
    offs_n, mask_n = block_offsets(block_n, BLOCK_N, N)
    offs_m = offs_m.to(tl.int64)  # N images of C channels may pass 2**31 elements, on either axis of the product
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        offs_k, mask_k = block_offsets(k, BLOCK_K, K)
        offs_k = offs_k.to(tl.int64)
        mask_a = mask_m[:, None] & mask_k[None, :]
        mask_b = mask_k[:, None] & mask_n[None, :]
        a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak, mask_a, 0.0).to(tl.float32)
        b = tl.load(b_ptr + offs_n[None, :] * stride_bn + offs_k[:, None] * stride_bk, mask_b, 0.0).to(tl.float32)
        # ieee: TF32 would round q and the weights to 10 bits. act(0) = 0 for every act, so padding stays zero.
        acc = tl.dot(apply_act(a, A_ACT), apply_act(b, B_ACT), acc, input_precision="ieee")
        if HAS_ROW_SUM:
            row_sum += tl.sum(a, axis=1)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    offs_out = offs_m[:, None] * N + offs_n[None, :]
    mask_out = mask_m[:, None] & mask_n[None, :]
    if HAS_Z:
        acc *= act_grad(tl.load(z_ptr + offs_out, mask_out, 0.0), Z_GRAD)
    tl.store(out_ptr + offs_out, acc.to(out_ptr.dtype.element_ty), mask_out)
    if HAS_ROW_SUM:  # noqa: SIM102 - one is known when the kernel is compiled, the other when it runs
        if block_n == 0:
            tl.store(row_sum_ptr + offs_m, row_sum.to(row_sum_ptr.dtype.element_ty), mask_m)


def _linear(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    a_act: str = "identity",
    b_act: str = "identity",
    z: Tensor | None = None,
    z_act: str = "identity",
    out_dtype: torch.dtype = torch.float32,
    row_sum: Tensor | None = None,
) -> Tensor:
    """(act(a) @ act(b).T + bias) * act'(z) for a (M, K), b (N, K) of any strides; a.sum(1) into row_sum."""
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=out_dtype)
    # One program owns a (BLOCK_M, BLOCK_N) tile of the output.
    grid = (triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)
    if grid[0]:
        _linear_kernel[grid](
            a, b, None if bias is None else bias.contiguous(), z, out, row_sum,
            m, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
            A_ACT=a_act, B_ACT=b_act, Z_GRAD=z_act,
            HAS_BIAS=bias is not None, HAS_Z=z is not None, HAS_ROW_SUM=row_sum is not None,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


def excite(q: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    """Pre-activations z1 (N, R) and z2 (N, C), fp32, of q (N, C) fp32, w1 (R, C), w2 (C, R)."""
    z1 = _linear(q, w1, bias=b1)
    return z1, _linear(z1, w2, bias=b2, a_act=act)


def excite_backward(
    dz2: Tensor, q: Tensor, z1: Tensor, w1: Tensor, w2: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq (N, C), db1 and db2 in fp32, dw1 and dw2 in their dtypes; sums over N in a fixed order, no atomics."""
    db1, db2 = q.new_empty(w1.shape[0]), q.new_empty(w2.shape[0])
    dz1 = _linear(dz2, w2.t(), z=z1, z_act=act)
    dw2 = _linear(dz2.t(), z1.t(), b_act=act, out_dtype=w2.dtype, row_sum=db2)
    dw1 = _linear(dz1.t(), q.t(), out_dtype=w1.dtype, row_sum=db1)
    return _linear(dz1, w1.t()), dw1, db1, dw2, db2

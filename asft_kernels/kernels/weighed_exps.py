"""What dW multiplies H with where gradients come to a token's figures: E's entries with factors of their own.

    X[t, v] = c (e (A[t] + B[t] L) + M[t])        e = exp(L), L = z - r, e = 0 for v = y_t

weigh_exps takes e from a kept E' (which has no softcap, or only A), where L is its logarithm; weigh_logits takes a
strip's logits. fp32, rounded once into the dtype of E'. Bound by memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.configs import Strips
from asft_kernels.kernels.device_math import narrow, softcap_logits, softcap_slope
from asft_kernels.kernels.exp_epilogue import row_stride
from asft_kernels.kernels.logit_strips import products_in_strips


@triton.jit(do_not_specialize=["N"])
def weigh_exps_kernel(
    out_ptr,  # (N, width) rows stride_om elements apart, every element is written
    exps_ptr,  # (N, width) rows stride_em elements apart: E'
    linear_ptr,  # (N,) fp32: A
    log_ptr,  # (N,) fp32: B, or None
    uniform_ptr,  # (N,) fp32: M, or None
    N,
    width,
    stride_om,
    stride_em,
    HAS_LOG: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token = m < N
    mask = is_token[:, None] & (v < width)[None, :]
    e = tl.load(exps_ptr + (m.to(tl.int64) * stride_em)[:, None] + v[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(linear_ptr + m, mask=is_token, other=0.0)[:, None]
    if HAS_LOG:
        factor += tl.load(log_ptr + m, mask=is_token, other=0.0)[:, None] * tl.log(tl.where(e == 0.0, 1.0, e))
    x = e * factor
    if HAS_UNIFORM:
        x += tl.load(uniform_ptr + m, mask=is_token, other=0.0)[:, None]
    at = (m.to(tl.int64) * stride_om)[:, None] + v[None, :]
    tl.store(out_ptr + at, narrow(x, out_ptr.dtype.element_ty), mask=mask)


def weigh_exps(out: Tensor, exps: Tensor, linear: Tensor, log: Tensor | None, uniform: Tensor | None) -> None:
    """out (N, width) from E' (N, width); factors (N,), None for one that is 0."""
    N, width = exps.shape
    weigh_exps_kernel[(triton.cdiv(N, 4), triton.cdiv(width, 512))](
        out, exps, linear, log, uniform, N, width, row_stride(out), row_stride(exps),
        HAS_LOG=log is not None, HAS_UNIFORM=uniform is not None, BLOCK_M=4, BLOCK_V=512, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "first"])
def weigh_logits_kernel(
    # data
    out_ptr,  # (N, width) rows stride_om elements apart, every element is written
    products_ptr,  # (N, width) fp32, rows stride_um elements apart: H W^T
    bias_ptr,  # (width,) or None
    labels_ptr,  # (N,) int64 in [0, V)
    ref_ptr,  # (N,) fp32: r, final
    linear_ptr,  # (N,) fp32: A
    log_ptr,  # (N,) fp32: B, or None
    uniform_ptr,  # (N,) fp32: M, or None
    # shapes and strides
    N,
    width,
    first,  # the vocabulary row that the strip starts with
    stride_om,
    stride_um,
    # constants
    scale,
    softcap,  # looked at only under HAS_SOFTCAP
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOG: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token = m < N
    mask = is_token[:, None] & (v < width)[None, :]
    u = tl.load(products_ptr + (m.to(tl.int64) * stride_um)[:, None] + v[None, :], mask=mask, other=0.0)
    if HAS_BIAS:
        u += tl.load(bias_ptr + tl.minimum(v, width - 1).to(tl.int64)).to(tl.float32)[None, :]
    u *= scale
    z = u
    if HAS_SOFTCAP:
        z = softcap_logits(u, softcap)
    own = tl.load(labels_ptr + m, mask=is_token, other=-1) - first
    there = (v[None, :] != own[:, None]) & (z != float("-inf"))
    exponent = tl.where(there, z - tl.load(ref_ptr + m, mask=is_token, other=0.0)[:, None], 0.0)
    factor = tl.load(linear_ptr + m, mask=is_token, other=0.0)[:, None]
    if HAS_LOG:
        factor += tl.load(log_ptr + m, mask=is_token, other=0.0)[:, None] * exponent
    x = tl.where(there, tl.exp(exponent) * factor, 0.0)
    if HAS_UNIFORM:
        x += tl.load(uniform_ptr + m, mask=is_token, other=0.0)[:, None]
    if HAS_SOFTCAP:
        x *= softcap_slope(u, softcap)
    at = (m.to(tl.int64) * stride_om)[:, None] + v[None, :]
    tl.store(out_ptr + at, narrow(x, out_ptr.dtype.element_ty), mask=mask)


def weigh_logits(
    out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref: Tensor,
    linear: Tensor,
    log: Tensor | None,
    uniform: Tensor | None,
    *,
    first: int,
    scale: float,
    softcap: float | None,
    strips: Strips,
) -> None:
    """out (N, width) of the chunk that starts with vocabulary row first; hidden (N, D), weight and bias the chunk's."""
    N = len(hidden)
    for part, U in products_in_strips(hidden, weight, strips):
        width = U.shape[1]
        weigh_logits_kernel[(triton.cdiv(N, strips.BLOCK_M), triton.cdiv(width, strips.BLOCK_V))](
            out[:, part], U, None if bias is None else bias[part], labels, ref, linear, log, uniform,
            N, width, first + part.start, row_stride(out), U.stride(0), float(scale), float(softcap or 0.0),
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_LOG=log is not None,
            HAS_UNIFORM=uniform is not None, BLOCK_M=strips.BLOCK_M, BLOCK_V=strips.BLOCK_V,
            num_warps=strips.num_warps,
        )  # fmt: skip

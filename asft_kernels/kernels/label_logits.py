"""The label's logit of each token, a row dot, or the softcap's slope there.

    z_y[t] = logit( H[t] . W[y_t] + b[y_t] ),   logit(u) = softcap * tanh(scale * u / softcap)
    c_y[t] = dz_y / d(scale * u), from u: z_y has lost it where the cap saturates

Accumulated and stored in fp32. Moves 2*N*D*itemsize bytes: bound by memory, nothing to tune.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import softcap_logits, softcap_slope


@triton.jit(do_not_specialize=["N"])
def label_logits_kernel(
    # data
    out_ptr,  # (N,) fp32: z_y, or c_y under SLOPE; every element is written
    hidden_ptr,  # (M, D) rows stride_hm elements apart
    weight_ptr,  # (V, D) strides stride_wv, stride_wd
    bias_ptr,  # (V,) or None
    rows_ptr,  # (N,) int64: token t is row rows[t] of hidden
    labels_ptr,  # (N,) int64 in [0, V)
    # shapes and strides
    N,
    D,
    stride_hm,
    stride_wv,
    stride_wd,
    # constants
    scale,
    softcap,  # looked at only under HAS_SOFTCAP
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,  # only with HAS_SOFTCAP
    BLOCK_D: tl.constexpr,
):
    """Program t writes out[t]."""
    t = tl.program_id(0)
    row = tl.load(rows_ptr + t)  # int64, and so are the products with it
    label = tl.load(labels_ptr + t)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)  # D * stride_wd of a transposed head
        in_row = d < D
        h = tl.load(hidden_ptr + row * stride_hm + d, mask=in_row, other=0.0)
        w = tl.load(weight_ptr + label * stride_wv + d * stride_wd, mask=in_row, other=0.0)
        acc += h.to(tl.float32) * w.to(tl.float32)
    u = tl.sum(acc, 0)
    if HAS_BIAS:
        u += tl.load(bias_ptr + label).to(tl.float32)
    u *= scale
    if SLOPE:
        u = softcap_slope(u, softcap)
    elif HAS_SOFTCAP:
        u = softcap_logits(u, softcap)
    tl.store(out_ptr + t, u)


def label_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    *,
    scale: float,
    softcap: float | None,
    slope: bool = False,
) -> Tensor:
    """z_y (N,) fp32, or c_y where the slope is asked for; arguments as in the kernel."""
    assert softcap is not None or not slope, "backend bug: only a softcap has a slope"
    N, D = rows.shape[0], hidden.shape[1]
    out = torch.empty(N, dtype=torch.float32, device=hidden.device)
    label_logits_kernel[(N,)](
        out, hidden, weight, bias, rows, labels,
        N, D, hidden.stride(0), weight.stride(0), weight.stride(1),
        float(scale), float(softcap or 0.0),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, SLOPE=slope,
        BLOCK_D=min(triton.next_power_of_2(D), 1024), num_warps=4,
    )  # fmt: skip
    return out

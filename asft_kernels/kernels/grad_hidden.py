"""dH without a GEMM: a row scale of what phase 1 accumulated.

    dH[rows[t]] = pull[t] * W[y_t] - push[t] * O[t]        (row_statistics.py states the factors)

O[t] = sum over v != y_t of exp(z_v - r) * c_v * W[v] is phase 1's. fp32 throughout; rounded once, at
the store. Moves N*D*(4 + 2*itemsize) bytes, no matrix product: bound by memory, nothing to tune.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow


@triton.jit
def grad_hidden_kernel(
    # data
    out_ptr,  # (M, D) contiguous, dtype of hidden: rows[t] are written whole, others not touched
    acc_ptr,  # (N, D) fp32, contiguous: O
    weight_ptr,  # (V, D) strides stride_wv, stride_wd
    rows_ptr,  # (N,) int64, distinct
    labels_ptr,  # (N,) int64 in [0, V)
    pull_ptr,  # (N,) fp32
    push_ptr,  # (N,) fp32
    # shapes and strides
    D,
    stride_wv,
    stride_wd,
    BLOCK_D: tl.constexpr,
):
    """Program (t, j) writes out[rows[t], j*BLOCK_D : (j+1)*BLOCK_D]."""
    t = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # as t: D * stride_wd
    in_row = d < D
    label = tl.load(labels_ptr + t)
    w_y = tl.load(weight_ptr + label * stride_wv + d * stride_wd, mask=in_row, other=0.0)
    acc = tl.load(acc_ptr + t * D + d, mask=in_row, other=0.0)
    grad = tl.load(pull_ptr + t) * w_y.to(tl.float32) - tl.load(push_ptr + t) * acc
    row = tl.load(rows_ptr + t)
    tl.store(out_ptr + row * D + d, narrow(grad, out_ptr.dtype.element_ty), mask=in_row)


def grad_hidden(
    hidden: Tensor,
    acc: Tensor,
    weight: Tensor,
    rows: Tensor,
    labels: Tensor,
    pull: Tensor,
    push: Tensor,
) -> Tensor:
    """Gradient in hidden's shape (M, D) and dtype, zero outside rows; arguments as in the kernel."""
    N, D = acc.shape
    out = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    BLOCK_D = min(triton.next_power_of_2(D), 1024)  # 4 warps * 32 lanes * 8 elements
    grad_hidden_kernel[(N, triton.cdiv(D, BLOCK_D))](
        out, acc, weight, rows, labels, pull, push, D, weight.stride(0), weight.stride(1),
        BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return out

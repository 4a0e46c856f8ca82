"""The hidden rows with their factor, the right-hand side of dW's product.

    Hs[t] = -push[t] * H[rows[t]],    softmax part of dW_k = E'_k^T Hs

Factor and row meet in fp32; rounded once, into the products' dtype, so that E' is used as stored.
Moves N*D*2*itemsize bytes: bound by memory, nothing to tune.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow


@triton.jit
def scaled_hidden_kernel(
    out_ptr,  # (N, D) contiguous, every element is written
    hidden_ptr,  # (M, D) rows stride_hm elements apart
    rows_ptr,  # (N,) int64
    push_ptr,  # (N,) fp32
    D,
    stride_hm,
    BLOCK_D: tl.constexpr,
):
    """Program (t, j) writes out[t, j*BLOCK_D : (j+1)*BLOCK_D]."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    h = tl.load(hidden_ptr + tl.load(rows_ptr + t) * stride_hm + d, mask=in_row, other=0.0)
    scaled = -tl.load(push_ptr + t) * h.to(tl.float32)
    tl.store(out_ptr + t * D + d, narrow(scaled, out_ptr.dtype.element_ty), mask=in_row)


def scaled_hidden(hidden: Tensor, rows: Tensor, push: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Hs (N, D) in dtype; arguments as in the kernel."""
    N, D = rows.shape[0], hidden.shape[1]
    assert hidden.stride(1) == 1 or D == 1, "backend bug: needs row-major H"
    out = torch.empty((N, D), dtype=dtype, device=hidden.device)
    BLOCK_D = min(triton.next_power_of_2(D), 1024)
    scaled_hidden_kernel[(N, triton.cdiv(D, BLOCK_D))](
        out, hidden, rows, push, D, hidden.stride(0), BLOCK_D=BLOCK_D, num_warps=4
    )
    return out

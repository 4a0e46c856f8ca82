"""db of one vocabulary chunk: column sums of what dW multiplies H with.

    db[v] = sum over tokens t of ( [y_t = v] * pull[t] - push[t] * E'[t, v] )

Summed in fp32, in the tokens' order, rounded once. Reads N*Vc stored exponentials: bound by memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow


@triton.jit(do_not_specialize=["N", "first"])
def grad_bias_kernel(
    out_ptr,  # (width,) dtype of the bias, every element is written
    exps_ptr,  # (N, width) rows stride_em elements apart: E'
    labels_ptr,  # (N,) int64
    pull_ptr,  # (N,) fp32
    push_ptr,  # (N,) fp32
    N,
    width,  # vocabulary rows in this chunk
    first,  # the vocabulary row that the chunk starts with
    stride_em,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program j writes out[j*BLOCK_V : (j+1)*BLOCK_V]."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_chunk = v < width
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        is_token = m < N
        at = (m.to(tl.int64) * stride_em)[:, None] + v[None, :]
        e = tl.load(exps_ptr + at, mask=is_token[:, None] & in_chunk[None, :], other=0.0)
        own = tl.load(labels_ptr + m, mask=is_token, other=-1) - first
        pull = tl.load(pull_ptr + m, mask=is_token, other=0.0)
        push = tl.load(push_ptr + m, mask=is_token, other=0.0)
        label_part = tl.where(own[:, None] == v[None, :], pull[:, None], 0.0)
        acc += tl.sum(label_part - push[:, None] * e.to(tl.float32), 0)
    tl.store(out_ptr + v, narrow(acc, out_ptr.dtype.element_ty), mask=in_chunk)


def grad_bias(out: Tensor, exps: Tensor, labels: Tensor, pull: Tensor, push: Tensor, *, first: int) -> None:
    """Fills out (width,), the chunk that starts with vocabulary row first; exps (N, width)."""
    N, width = exps.shape
    assert out.is_contiguous(), "backend bug: needs contiguous db"
    grad_bias_kernel[(triton.cdiv(width, 128),)](
        out, exps, labels, pull, push, N, width, first, exps.stride(0), BLOCK_M=32, BLOCK_V=128, num_warps=4
    )

"""Per-token numbers after the last chunk (settle.py has those between chunks): log-probabilities, row factors.

    close:  total = s + exp(z_y - r);  1 - p_y = s / total;  logp = -softplus(r + log s - z_y)
    factors of a row, given g = dL/dlogp and c_y = dz_y/du_y, the softcap's slope (1 without one):
            pull = scale * g * (1 - p_y) * c_y        on W[y] in dH, on h in dW[y]
            push = scale * g / total                  on O in dH, on E'^T h in dW

s leaves the label out, so logp and 1 - p keep their digits for confident tokens. s = 0 (a vocabulary
of one) gives logp = 0 and 1 - p = 0. fp32 throughout, nothing to tune.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import softplus


@triton.jit(do_not_specialize=["N"])
def close_statistics_kernel(
    logps_ptr,  # (N,) fp32, every element of the three outputs is written
    one_minus_p_ptr,  # (N,) fp32
    inv_total_ptr,  # (N,) fp32
    label_logits_ptr,  # (N,) fp32: z_y
    ref_ptr,  # (N,) fp32: r, final, never below z_y
    others_ptr,  # (N,) fp32: s
    N,
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = m < N
    z_y = tl.load(label_logits_ptr + m, mask=is_token, other=0.0)
    ref = tl.load(ref_ptr + m, mask=is_token, other=0.0)
    others = tl.load(others_ptr + m, mask=is_token, other=0.0)
    total = others + tl.exp(z_y - ref)
    # r - z_y first: it is exactly 0 for almost every token. A NaN in s stays one.
    alone = others == 0.0
    x = (ref - z_y) + tl.log(tl.where(alone, 1.0, others))
    tl.store(logps_ptr + m, tl.where(alone, 0.0, -softplus(x)), mask=is_token)
    tl.store(one_minus_p_ptr + m, others / total, mask=is_token)
    tl.store(inv_total_ptr + m, 1.0 / total, mask=is_token)


def close_statistics(label_logits: Tensor, ref: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, one_minus_p, inv_total), (N,) each; arguments as in the kernel."""
    N = ref.shape[0]
    logps, one_minus_p, inv_total = (torch.empty_like(ref) for _ in range(3))
    close_statistics_kernel[(triton.cdiv(N, 256),)](
        logps, one_minus_p, inv_total, label_logits, ref, others, N, BLOCK_M=256, num_warps=4
    )
    return logps, one_minus_p, inv_total


@triton.jit(do_not_specialize=["N"])
def row_factors_kernel(
    pull_ptr,  # (N,) fp32, every element of both outputs is written
    push_ptr,  # (N,) fp32
    grad_logps_ptr,  # (N,) fp32: g
    one_minus_p_ptr,  # (N,) fp32
    inv_total_ptr,  # (N,) fp32
    label_slopes_ptr,  # (N,) fp32: c_y, or None without HAS_SOFTCAP
    N,
    scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = m < N
    g = scale * tl.load(grad_logps_ptr + m, mask=is_token, other=0.0)
    pull = g * tl.load(one_minus_p_ptr + m, mask=is_token, other=0.0)
    if HAS_SOFTCAP:
        pull *= tl.load(label_slopes_ptr + m, mask=is_token, other=0.0)
    tl.store(pull_ptr + m, pull, mask=is_token)
    inv_total = tl.load(inv_total_ptr + m, mask=is_token, other=0.0)
    tl.store(push_ptr + m, g * inv_total, mask=is_token)


def row_factors(
    grad_logps: Tensor,
    one_minus_p: Tensor,
    inv_total: Tensor,
    label_slopes: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(pull, push), (N,) each; label_slopes is None without a softcap."""
    N = grad_logps.shape[0]
    pull, push = torch.empty_like(one_minus_p), torch.empty_like(one_minus_p)
    row_factors_kernel[(triton.cdiv(N, 256),)](
        pull, push, grad_logps, one_minus_p, inv_total, label_slopes,
        N, float(scale), HAS_SOFTCAP=label_slopes is not None, BLOCK_M=256, num_warps=4,
    )  # fmt: skip
    return pull, push

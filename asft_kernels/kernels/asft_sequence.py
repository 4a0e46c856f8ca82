"""ASFT from token log-probabilities to loss terms and coefficients, and back: one launch each.

For sequence i with m_i tokens: S_i = sum logp, avg_i = S_i / m_i (0 without tokens), and

    a = min(avg, -FLOOR),  1 - p = -expm1(a),  f = a - log(1 - p)
    chosen:    A_w = softplus(-beta * f),  dA_w/da = -beta * sigmoid(-beta * f) / (1 - p)
    rejected:  A_l = softplus( beta * f),  dA_l/da =  beta * sigmoid( beta * f) / (1 - p)
    both continue linearly above -FLOOR:   A(avg) = A(a) + dA/da(a) * (avg - a)

    sft = -avg_w,   align = A_w + A_l,   loss = sft_weight * sft + lam * align
    coef_i = dloss / dlogp of each token of i = (-sft_weight * [chosen] + lam * dA/da) / m_i
    g[t] = grad_pair[pair of t] * coef[sequence of t]

softplus(-beta f) is -log sigmoid(beta f) of arXiv 2409.10571's loss, with the temperature beta of
arXiv 2502.01237. A pair counts only if both its sequences have tokens; else loss, sft, align and coef
are 0. fp32; sums in blocks of BLOCK_T tokens in a fixed order. Reads 4*N bytes, writes 4*N.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import expm1, sigmoid, softplus

FLOOR = tl.constexpr(1e-6)


class ASFTTerms(NamedTuple):
    sums: Tensor  # (2B,) fp32: S, chosen sequences first
    avgs: Tensor  # (2B,) fp32
    sft: Tensor  # (B,) fp32
    align: Tensor  # (B,) fp32
    loss: Tensor  # (B,) fp32
    coef: Tensor  # (2B,) fp32: dloss/dlogp of every token of a sequence


@triton.jit
def _token_sum(logps_ptr, start, stop, BLOCK_T: tl.constexpr):
    acc = tl.zeros((BLOCK_T,), tl.float32)
    for at in range(start, stop, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        acc += tl.load(logps_ptr + t, mask=t < stop, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def _align(avg, sign, beta):
    """softplus(sign * beta * f) and its derivative, continued linearly above -FLOOR."""
    a = tl.minimum(avg, -FLOOR)
    one_minus_p = -expm1(a)
    x = sign * beta * (a - tl.log(one_minus_p))
    slope = sign * beta * sigmoid(x) / one_minus_p
    return softplus(x) + slope * (avg - a), slope


@triton.jit(do_not_specialize=["B"])
def asft_sequence_kernel(
    # data; every element of the six outputs is written
    sums_ptr,  # (2B,) fp32
    avgs_ptr,  # (2B,) fp32
    sft_ptr,  # (B,) fp32
    align_ptr,  # (B,) fp32
    loss_ptr,  # (B,) fp32
    coef_ptr,  # (2B,) fp32
    logps_ptr,  # (N,) fp32
    offsets_ptr,  # (2B+1,) int64: sequence i holds tokens offsets[i] : offsets[i+1]
    # shapes and constants
    B,
    lam,
    beta,
    sft_weight,
    BLOCK_T: tl.constexpr,
):
    """Program i does pair i: sequences i (chosen) and B + i (rejected)."""
    i = tl.program_id(0)
    start_w = tl.load(offsets_ptr + i)
    stop_w = tl.load(offsets_ptr + i + 1)
    start_l = tl.load(offsets_ptr + B + i)
    stop_l = tl.load(offsets_ptr + B + i + 1)
    sum_w = _token_sum(logps_ptr, start_w, stop_w, BLOCK_T)
    sum_l = _token_sum(logps_ptr, start_l, stop_l, BLOCK_T)
    m_w = tl.maximum(stop_w - start_w, 1).to(tl.float32)
    m_l = tl.maximum(stop_l - start_l, 1).to(tl.float32)
    avg_w = sum_w / m_w
    avg_l = sum_l / m_l
    tl.store(sums_ptr + i, sum_w)
    tl.store(sums_ptr + B + i, sum_l)
    tl.store(avgs_ptr + i, avg_w)
    tl.store(avgs_ptr + B + i, avg_l)

    align_w, slope_w = _align(avg_w, -1.0, beta)
    align_l, slope_l = _align(avg_l, 1.0, beta)
    counts = (stop_w > start_w) & (stop_l > start_l)
    align = align_w + align_l
    tl.store(sft_ptr + i, tl.where(counts, -avg_w, 0.0))
    tl.store(align_ptr + i, tl.where(counts, align, 0.0))
    tl.store(loss_ptr + i, tl.where(counts, lam * align - sft_weight * avg_w, 0.0))
    coef_w = (lam * slope_w - sft_weight) / m_w
    tl.store(coef_ptr + i, tl.where(counts, coef_w, 0.0))
    tl.store(coef_ptr + B + i, tl.where(counts, lam * slope_l / m_l, 0.0))


def asft_sequence(logps: Tensor, offsets: Tensor, *, lam: float, beta: float, sft_weight: float) -> ASFTTerms:
    """Sequence sums, loss terms and coefficients of B pairs; arguments as in the kernel."""
    B = (offsets.shape[0] - 1) // 2
    assert offsets.shape[0] == 2 * B + 1, "backend bug: offsets of chosen and rejected sequences"
    terms = ASFTTerms(
        *(torch.empty(n, dtype=torch.float32, device=logps.device) for n in (2 * B, 2 * B, B, B, B, 2 * B))
    )
    if B > 0:
        with torch.cuda.device_of(logps):
            asft_sequence_kernel[(B,)](
                *terms, logps.contiguous(), offsets, B, float(lam), float(beta), float(sft_weight),
                BLOCK_T=1024, num_warps=4,
            )  # fmt: skip
    return terms


@triton.jit(do_not_specialize=["B"])
def asft_sequence_grad_kernel(
    grad_logps_ptr,  # (N,) fp32: g, written up to offsets[2B]
    grad_pair_ptr,  # (B,) fp32
    coef_ptr,  # (2B,) fp32
    offsets_ptr,  # (2B+1,) int64
    B,
    BLOCK_T: tl.constexpr,
):
    """Program i writes the tokens of sequence i."""
    i = tl.program_id(0)
    start = tl.load(offsets_ptr + i)
    stop = tl.load(offsets_ptr + i + 1)
    g = tl.load(grad_pair_ptr + i % B) * tl.load(coef_ptr + i)
    for at in range(start, stop, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        tl.store(grad_logps_ptr + t, tl.zeros((BLOCK_T,), tl.float32) + g, mask=t < stop)


def asft_sequence_grad(grad_pair: Tensor, coef: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    """g (N,) fp32 from the gradient of each pair's loss, (B,), and asft_sequence's coef (2B,).

    0 past the last sequence: n_tokens may be a bound that the batch stays below.
    """
    B = grad_pair.shape[0]
    grad_logps = torch.zeros(n_tokens, dtype=torch.float32, device=coef.device)
    if B > 0:
        with torch.cuda.device_of(coef):
            asft_sequence_grad_kernel[(2 * B,)](
                grad_logps, grad_pair.float().contiguous(), coef, offsets, B,
                BLOCK_T=1024, num_warps=4,
            )  # fmt: skip
    return grad_logps

"""What a chunk's tiles say about each token, once they are all there: one launch between two products.

    r' = max(r, q of every tile)
    s' = s * exp(r - r') + sum over tiles of sum * exp(q - r')
    E'[t, v] *= exp(q of v's tile - r'),   O[t] *= exp(r - r')       where a reference has moved

Exponents are never above 0. r and q are -inf while all logits of a token are. On real data nothing has moved: a program
then reads 8 bytes a token and tile, and writes 8 bytes a token. Where something has, the one program of those 32 tokens
walks their rows, tile after tile: rare enough to be slow. fp32 throughout, sums in the tiles' order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow


@triton.jit
def rescale(x_ptr, m, stride_xm, start, stop, old, new, moved, BLOCK: tl.constexpr):
    """x[m, start:stop] *= exp(old - new) in the rows that have moved."""
    base = tl.where(new == float("-inf"), 0.0, new)  # -inf, and so is old: a row that stays
    factor = tl.exp(old - base)
    for column in range(start, stop, BLOCK):
        j = column + tl.arange(0, BLOCK)
        at = (m.to(tl.int64) * stride_xm)[:, None] + j[None, :]
        mask = moved[:, None] & (j < stop)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(x_ptr + at, narrow(x, x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "tiles"])
def settle_kernel(
    # data
    ref_out_ptr,  # (N,) fp32: r', every element is written
    others_ptr,  # (N,) fp32: s, becomes s' in place
    ref_ptr,  # (N,) fp32: r
    tile_sums_ptr,  # (tiles, N) fp32
    tile_refs_ptr,  # (tiles, N) fp32: q, never below r
    exps_ptr,  # (N, width) rows stride_em elements apart: E', changed in place; None without HAS_EXPS
    acc_ptr,  # (N, D) fp32 contiguous: O, likewise; None without HAS_ACC
    # shapes and strides
    N,
    tiles,
    width,
    D,
    stride_em,
    # constants
    TILE_WIDTH: tl.constexpr,  # columns of exps that share a row of tile_refs
    HAS_EXPS: tl.constexpr,
    HAS_ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i looks after BLOCK_M tokens: BLOCK_T tiles at a time, BLOCK columns at a time where one has moved."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = m < N
    before = tl.load(ref_ptr + m, mask=is_token, other=0.0)
    others = tl.load(others_ptr + m, mask=is_token, other=0.0)
    ref = before
    apart = 0  # whether any tile's reference is not the last
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        at = (tile.to(tl.int64) * N)[:, None] + m[None, :]
        there = (tile < tiles)[:, None] & is_token[None, :]
        q = tl.load(tile_refs_ptr + at, mask=there, other=float("-inf"))
        sums = tl.load(tile_sums_ptr + at, mask=there, other=0.0)
        apart = tl.maximum(apart, tl.max(tl.max((there & (q != ref[None, :])).to(tl.int32), 1), 0))
        now = tl.maximum(ref, tl.max(q, 0))
        base = tl.where(now == float("-inf"), 0.0, now)  # no finite logit so far: exp(-inf - 0) is 0
        others = others * tl.exp(ref - base) + tl.sum(sums * tl.exp(q - base[None, :]), 0)
        ref = now
    tl.store(ref_out_ptr + m, ref, mask=is_token)
    tl.store(others_ptr + m, others, mask=is_token)
    if apart == 0:
        return
    if HAS_ACC:
        rescale(acc_ptr, m, D, 0, D, before, ref, is_token & (before != ref), BLOCK)
    if HAS_EXPS:
        for i in range(0, tiles):
            at = (tl.zeros_like(m).to(tl.int64) + i) * N + m
            old = tl.load(tile_refs_ptr + at, mask=is_token, other=0.0)
            moved = is_token & (old != ref)
            if tl.max(moved.to(tl.int32), 0) != 0:
                stop = tl.minimum((i + 1) * TILE_WIDTH, width)
                rescale(exps_ptr, m, stride_em, i * TILE_WIDTH, stop, old, ref, moved, BLOCK)


def settle(
    tile_sums: Tensor,
    tile_refs: Tensor,
    ref: Tensor,
    others: Tensor,
    *,
    exps: Tensor | None = None,
    acc: Tensor | None = None,
    tile_width: int = 1,
) -> Tensor:
    """Returns r' (N,); updates others (N,), exps (N, width) and acc (N, D) in place.

    tile_sums, tile_refs (tiles, N), tile_width columns of exps each. acc is O of the earlier chunks.
    """
    tiles, N = tile_sums.shape
    ref_out = torch.empty_like(ref)
    assert acc is None or acc.is_contiguous(), "backend bug: O"
    settle_kernel[(triton.cdiv(N, 32),)](  # 128 bytes of each tile's row: whole sectors, and enough programs for a GPU
        ref_out, others, ref, tile_sums, tile_refs, exps, acc,
        N, tiles, 0 if exps is None else exps.shape[1], 0 if acc is None else acc.shape[1],
        0 if exps is None else exps.stride(0),
        TILE_WIDTH=tile_width, HAS_EXPS=exps is not None, HAS_ACC=acc is not None,
        BLOCK_M=32, BLOCK_T=32, BLOCK=128, num_warps=4 if tile_width <= 256 else 8,  # those of strips spill with 4
    )  # fmt: skip
    return ref_out


@triton.jit(do_not_specialize=["N"])
def resettle_kernel(
    exps_ptr,  # (N, width) rows stride_em elements apart, changed in place
    old_ptr,  # (N,) fp32: the reference that they were written against
    new_ptr,  # (N,) fp32: r at the end, never below
    N,
    width,
    stride_em,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i looks after BLOCK_M tokens."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    old = tl.load(old_ptr + m, mask=m < N, other=0.0)
    new = tl.load(new_ptr + m, mask=m < N, other=0.0)
    moved = old != new  # tokens past N load 0 twice: not moved
    if tl.max(moved.to(tl.int32), 0) != 0:
        rescale(exps_ptr, m, stride_em, 0, width, old, new, moved, BLOCK)


def resettle(exps: Tensor, old: Tensor, new: Tensor) -> None:
    """Brings a cached chunk, settled when the reference was old (N,), to the final one."""
    N, width = exps.shape
    resettle_kernel[(triton.cdiv(N, 32),)](exps, old, new, N, width, exps.stride(0), BLOCK_M=32, BLOCK=128, num_warps=4)

"""What a chunk's tiles say of each token's figures, before settle.py moves the reference that they are relative to.

    r' = max(r, q of every tile),  d = r - r' for what was summed before, q - r' for a tile
    sums of e L:   a' = sum over parts of exp(d) (a + d s),   s being the part's sum of e
    sums of e^2:   a' = sum over parts of exp(2 d) a
    E' L of the chunk and O2 likewise, element by element: x' = exp(d) (x + d y),  y = E' or O, not yet settled

Sums of z and largest u need no reference. fp32 throughout, sums in the tiles' order. As there, rows of E' L and O2 are
walked only where a reference has moved.
"""

import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow
from asft_kernels.kernels.exp_epilogue import TileSums
from asft_kernels.kernels.logit_stats import ChunkStats


@triton.jit
def shift(x_ptr, y_ptr, m, stride_xm, stride_ym, start, stop, old, new, moved, BLOCK: tl.constexpr):
    """x[m, start:stop] = exp(d) (x + d y), d = old - new, in the rows that have moved."""
    base = tl.where(new == float("-inf"), 0.0, new)
    factor = tl.exp(old - base)
    d = tl.where(old == float("-inf"), 0.0, old - base)  # then x and y are 0
    for column in range(start, stop, BLOCK):
        j = column + tl.arange(0, BLOCK)
        mask = moved[:, None] & (j < stop)[None, :]
        at = (m.to(tl.int64) * stride_xm)[:, None] + j[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + (m.to(tl.int64) * stride_ym)[:, None] + j[None, :], mask=mask, other=0.0).to(tl.float32)
        x = (x + d[:, None] * y) * factor[:, None]
        tl.store(x_ptr + at, narrow(x, x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "tiles"])
def settle_stats_kernel(
    # data
    stats_ptr,  # (4, N) fp32: sum of z, largest u, sum of e L, sum of e^2; those with their bit in STATS, in place
    tile_stats_ptr,  # (4, tiles, N) fp32, likewise
    others_ptr,  # (N,) fp32: s before this chunk
    ref_ptr,  # (N,) fp32: r before this chunk
    tile_sums_ptr,  # (tiles, N) fp32
    tile_refs_ptr,  # (tiles, N) fp32: q, never below r
    log_exps_ptr,  # (N, width) rows stride_lm elements apart: E' L, in place; None without HAS_LOGS
    exps_ptr,  # (N, width) rows stride_em elements apart: E', relative to q
    log_acc_ptr,  # (N, D) fp32 contiguous: O2, in place; None without HAS_ACC
    acc_ptr,  # (N, D) fp32 contiguous: O, relative to r
    # shapes and strides
    N,
    tiles,
    width,
    D,
    stride_lm,
    stride_em,
    # constants
    STATS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,  # columns that share a row of tile_refs
    HAS_LOGS: tl.constexpr,
    HAS_ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i looks after BLOCK_M tokens."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = m < N
    m64 = m.to(tl.int64)
    plane, plane_of_tiles = tl.full((), 1, tl.int64) * N, tl.full((), 1, tl.int64) * N * tiles
    before = tl.load(ref_ptr + m, mask=is_token, other=0.0)
    others = tl.load(others_ptr + m, mask=is_token, other=0.0)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    logits, top, logs, squares = zero, zero, zero, zero
    if STATS & 1:
        logits = tl.load(stats_ptr + m64, mask=is_token, other=0.0)
    if STATS & 2:
        top = tl.load(stats_ptr + plane + m64, mask=is_token, other=0.0)
    if STATS & 4:
        logs = tl.load(stats_ptr + 2 * plane + m64, mask=is_token, other=0.0)
    if STATS & 8:
        squares = tl.load(stats_ptr + 3 * plane + m64, mask=is_token, other=0.0)
    ref = before
    apart = 0
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        at = (tile.to(tl.int64) * N)[:, None] + m[None, :]
        there = (tile < tiles)[:, None] & is_token[None, :]
        if STATS & 1:
            logits += tl.sum(tl.load(tile_stats_ptr + at, mask=there, other=0.0), 0)
        if STATS & 2:
            tops = tl.load(tile_stats_ptr + plane_of_tiles + at, mask=there, other=float("-inf"))
            top = tl.maximum(top, tl.max(tops, 0))
        q = tl.load(tile_refs_ptr + at, mask=there, other=float("-inf"))
        sums = tl.load(tile_sums_ptr + at, mask=there, other=0.0)
        apart = tl.maximum(apart, tl.max(tl.max((there & (q != ref[None, :])).to(tl.int32), 1), 0))
        now = tl.maximum(ref, tl.max(q, 0))
        base = tl.where(now == float("-inf"), 0.0, now)
        shrink, shrinks = tl.exp(ref - base), tl.exp(q - base[None, :])
        if STATS & 4:
            d = tl.where(ref == float("-inf"), 0.0, ref - base)
            ds = tl.where(q == float("-inf"), 0.0, q - base[None, :])
            of_tiles = tl.load(tile_stats_ptr + 2 * plane_of_tiles + at, mask=there, other=0.0)
            logs = (logs + d * others) * shrink + tl.sum((of_tiles + ds * sums) * shrinks, 0)
        if STATS & 8:
            of_tiles = tl.load(tile_stats_ptr + 3 * plane_of_tiles + at, mask=there, other=0.0)
            squares = squares * shrink * shrink + tl.sum(of_tiles * shrinks * shrinks, 0)
        others = others * shrink + tl.sum(sums * shrinks, 0)
        ref = now
    if STATS & 1:
        tl.store(stats_ptr + m64, logits, mask=is_token)
    if STATS & 2:
        tl.store(stats_ptr + plane + m64, top, mask=is_token)
    if STATS & 4:
        tl.store(stats_ptr + 2 * plane + m64, logs, mask=is_token)
    if STATS & 8:
        tl.store(stats_ptr + 3 * plane + m64, squares, mask=is_token)
    if apart == 0:
        return
    if HAS_ACC:
        shift(log_acc_ptr, acc_ptr, m, D, D, 0, D, before, ref, is_token & (before != ref), BLOCK)
    if HAS_LOGS:
        for i in range(0, tiles):
            at = (tl.zeros_like(m).to(tl.int64) + i) * N + m
            old = tl.load(tile_refs_ptr + at, mask=is_token, other=0.0)
            moved = is_token & (old != ref)
            if tl.max(moved.to(tl.int32), 0) != 0:
                stop = tl.minimum((i + 1) * TILE_WIDTH, width)
                shift(log_exps_ptr, exps_ptr, m, stride_lm, stride_em, i * TILE_WIDTH, stop, old, ref, moved, BLOCK)


def settle_stats(
    running: Tensor,
    chunk: ChunkStats,
    tiles: TileSums,
    ref: Tensor,
    others: Tensor,
    *,
    exps: Tensor | None,
    log_acc: Tensor | None,
    acc: Tensor | None,
) -> None:
    """Adds a chunk's figures to running (4, N), before settle is called for it.

    chunk.log_exps goes with exps (N, width), log_acc with acc (N, D): those of earlier chunks, None for the first.
    """
    count, N = tiles.sums.shape
    logs = chunk.log_exps
    assert logs is None or exps is not None, "backend bug: E' L without E'"
    settle_stats_kernel[(triton.cdiv(N, 32),)](
        running, chunk.planes, others, ref, tiles.sums, tiles.refs, logs, exps, log_acc, acc,
        N, count, 0 if logs is None else logs.shape[1], 0 if acc is None else acc.shape[1],
        0 if logs is None else logs.stride(0), 0 if exps is None else exps.stride(0),
        STATS=chunk.flags, TILE_WIDTH=tiles.width, HAS_LOGS=logs is not None, HAS_ACC=log_acc is not None,
        BLOCK_M=32, BLOCK_T=16, BLOCK=64, num_warps=4,
    )  # fmt: skip

"""Figures of a strip's logits (logit_strips.py makes them), tile by tile as their exponentials.

    u, z, c, q as in exp_epilogue.py;  L = z - q, e = exp(L), both over v != y_t
    planes of tile_stats:  sum of z, largest u, sum of e L, sum of e^2
    own[t]   = u[t, y_t], from the same product as the others, so that equal rows of the head stay equal
    log_exps = e L c,  slopes = c (the label's too)

fp32; log_exps and slopes are rounded once, at the store. An own kernel, which reads the strip once more while L2 has
it: the one for exponentials stays short where no figure is asked for. Bound by memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow, softcap_logits, softcap_slope

LOGITS, TOPS, LOGS, SQUARES = FLAGS = 1, 2, 4, 8  # bits of STATS; plane i belongs to bit i


class ChunkStats(NamedTuple):
    """Where a chunk's figures go. planes (4, tiles, N) fp32, written where flags has the bit."""

    flags: int
    planes: Tensor
    own: Tensor  # (N,) fp32
    log_exps: Tensor | None  # (N, width) of `empty_exps`
    slopes: Tensor | None  # likewise


@triton.jit(do_not_specialize=["N", "first"])
def stats_of_logits_kernel(
    # data
    tile_stats_ptr,  # (4, tiles, N) fp32, planes stride_sp elements apart: those with their bit in STATS are written
    own_ptr,  # (N,) fp32: written for labels inside the strip, under TOPS
    log_exps_ptr,  # (N, width) rows stride_lm elements apart, room to a multiple of 16; None without STORE_LOGS
    slopes_ptr,  # (N, width) rows stride_cm elements apart, likewise; None without STORE_SLOPES
    products_ptr,  # (N, width) fp32, rows stride_um elements apart: H W^T
    bias_ptr,  # (width,) or None
    labels_ptr,  # (N,) int64 in [0, V)
    tile_refs_ptr,  # (tiles, N) fp32: q
    # shapes and strides
    N,
    width,  # vocabulary rows in this strip
    first,  # the vocabulary row that the strip starts with
    stride_sp,
    stride_lm,
    stride_cm,
    stride_um,
    # constants
    scale,
    softcap,  # looked at only under HAS_SOFTCAP
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    STORE_LOGS: tl.constexpr,
    STORE_SLOPES: tl.constexpr,  # only with HAS_SOFTCAP
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program i writes one tile's entries of each plane, and of log_exps and slopes."""
    tiles_v = tl.cdiv(width, BLOCK_V)
    tile_v = tl.program_id(0) % tiles_v
    m = tl.program_id(0) // tiles_v * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token, in_chunk = m < N, v < width
    has_room = v < (width + 15) // 16 * 16
    at = (tl.minimum(m, N - 1).to(tl.int64) * stride_um)[:, None] + v[None, :]
    u = tl.load(products_ptr + at, mask=has_room[None, :], other=0.0)
    if HAS_BIAS:
        u += tl.load(bias_ptr + tl.minimum(v, width - 1).to(tl.int64)).to(tl.float32)[None, :]
    u *= scale
    own = tl.load(labels_ptr + m, mask=is_token, other=-1) - first
    own = tl.where((own >= 0) & (own < width), own, -1).to(tl.int32)
    is_own = v[None, :] == own[:, None]
    counts = in_chunk[None, :] & (v[None, :] != own[:, None])
    place = tile_v.to(tl.int64) * N + m
    if STATS & 2:
        in_tile = (own >= tile_v * BLOCK_V) & (own < (tile_v + 1) * BLOCK_V)
        tl.store(own_ptr + m, tl.sum(tl.where(is_own, u, 0.0), 1), mask=is_token & in_tile)
        top = tl.max(tl.where(counts, u, float("-inf")), 1)
        tl.store(tile_stats_ptr + stride_sp.to(tl.int64) + place, top, mask=is_token)
    if STORE_SLOPES:
        at = (m.to(tl.int64) * stride_cm)[:, None] + v[None, :]
        c = tl.where(in_chunk[None, :], softcap_slope(u, softcap), 0.0)
        c = narrow(c, slopes_ptr.dtype.element_ty)
        tl.store(slopes_ptr + at, c, mask=is_token[:, None] & has_room[None, :])
    z = u
    if HAS_SOFTCAP:
        z = softcap_logits(u, softcap)
    if STATS & 1:
        tl.store(tile_stats_ptr + place, tl.sum(tl.where(counts, z, 0.0), 1), mask=is_token)
    if (STATS & 12) or STORE_LOGS:
        q = tl.load(tile_refs_ptr + place, mask=is_token, other=0.0)
        there = counts & (z != float("-inf"))  # elsewhere e is 0, and so is e L
        exponent = tl.where(there, z - tl.where(q == float("-inf"), 0.0, q)[:, None], 0.0)
        e = tl.where(there, tl.exp(exponent), 0.0)
        if STATS & 8:
            squares = tl.sum(e * e, 1)  # q bounds e by exp(30)
            tl.store(tile_stats_ptr + 3 * stride_sp.to(tl.int64) + place, squares, mask=is_token)
        e *= exponent
        if STATS & 4:
            tl.store(tile_stats_ptr + 2 * stride_sp.to(tl.int64) + place, tl.sum(e, 1), mask=is_token)
        if STORE_LOGS:
            if HAS_SOFTCAP:
                e *= softcap_slope(u, softcap)
            at = (m.to(tl.int64) * stride_lm)[:, None] + v[None, :]
            e = narrow(e, log_exps_ptr.dtype.element_ty)
            tl.store(log_exps_ptr + at, e, mask=is_token[:, None] & has_room[None, :])


def stats_of_logits(
    stats: ChunkStats,
    products: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    tile_refs: Tensor,
    *,
    part: slice,
    tiles: slice,
    first: int,
    scale: float,
    softcap: float | None,
    block: tuple[int, int],
    num_warps: int,
) -> None:
    """The strip `part` of a chunk, whose tiles are `tiles` of the chunk's; bias and tile_refs are the strip's own.

    first: the vocabulary row that the strip starts with. block: a tile, in tokens and vocabulary rows.
    """
    N, width = products.shape
    log_exps, slopes = (None if x is None else x[:, part] for x in (stats.log_exps, stats.slopes))
    stats_of_logits_kernel[(triton.cdiv(N, block[0]) * triton.cdiv(width, block[1]),)](
        stats.planes[:, tiles], stats.own, log_exps, slopes, products, bias, labels, tile_refs,
        N, width, first, stats.planes.stride(0), 0 if log_exps is None else log_exps.stride(0),
        0 if slopes is None else slopes.stride(0), products.stride(0), float(scale), float(softcap or 0.0),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, STATS=stats.flags,
        STORE_LOGS=log_exps is not None, STORE_SLOPES=slopes is not None,
        BLOCK_M=block[0], BLOCK_V=block[1], num_warps=num_warps,
    )  # fmt: skip


def empty_planes(tiles: int, N: int, device: torch.device) -> Tensor:
    return torch.empty((len(FLAGS), tiles, N), dtype=torch.float32, device=device)

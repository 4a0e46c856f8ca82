"""Logits by the library, a strip of the chunk at a time, and one pass of exponentials (exp_epilogue.py).

    per strip of Vs vocabulary rows:  torch: U = H W_s^T in fp32 (N, Vs);  exps_of_logits: E', tile sums

Where the library's kernels are better than Triton's its product is faster than logits_exp's; the price is U, written
and read once: 8*N*Vs bytes, of which L2 keeps a part as strips are a few ten MiB. The pass is bound by memory.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.configs import Strips
from asft_kernels.kernels.exp_epilogue import TileSums, row_stride, store_exponentials
from asft_kernels.kernels.logit_stats import ChunkStats, stats_of_logits
from asft_kernels.kernels.products import add_product


@triton.jit(do_not_specialize=["N", "first"])
def exps_of_logits_kernel(
    # data
    exps_ptr,  # (N, width) of `empty_exps`: E', every element is written; None without STORE_EXPS
    tile_sums_ptr,  # (tiles, N) fp32, every element is written; None without STORE_SUMS
    tile_refs_ptr,  # (tiles, N) fp32: q, likewise
    products_ptr,  # (N, width) fp32, rows stride_um elements apart: H W^T
    bias_ptr,  # (width,) or None
    labels_ptr,  # (N,) int64 in [0, V)
    ref_ptr,  # (N,) fp32: r
    # shapes and strides
    N,
    width,  # vocabulary rows in this strip
    first,  # the vocabulary row that the strip starts with
    stride_em,
    stride_um,
    # constants
    scale,
    softcap,  # looked at only under HAS_SOFTCAP
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_EXPS: tl.constexpr,
    STORE_SUMS: tl.constexpr,  # False: r is final, no z passes it by more than MOVE
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program i writes exps[m, v], tile_sums[tile_v, m] and tile_refs[tile_v, m] of one tile."""
    tiles_v = tl.cdiv(width, BLOCK_V)
    tile_v = tl.program_id(0) % tiles_v
    m = tl.program_id(0) // tiles_v * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    at = (tl.minimum(m, N - 1).to(tl.int64) * stride_um)[:, None] + v[None, :]
    has_room = v < (width + 15) // 16 * 16  # of the products, too
    acc = tl.load(products_ptr + at, mask=has_room[None, :], other=0.0)
    store_exponentials(
        acc, tile_v, m, v, exps_ptr, tile_sums_ptr, tile_refs_ptr, bias_ptr, labels_ptr, ref_ptr,
        N, width, first, stride_em, scale, softcap, HAS_BIAS, HAS_SOFTCAP, STORE_EXPS, STORE_SUMS,
    )  # fmt: skip


def products_in_strips(hidden: Tensor, weight: Tensor, strips: Strips) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the chunk's weight, strip by strip, and U = H W_s^T (N, their number) in fp32, valid until the next."""
    (N, _), width = hidden.shape, weight.shape[0]
    step = strips.rows(N, width)
    products = torch.empty((N, triton.cdiv(step, 16) * 16), dtype=torch.float32, device=hidden.device)
    for start in range(0, width, step):
        part = slice(start, min(start + step, width))
        U = products[:, : part.stop - start]
        add_product(hidden, weight[part].t(), out=U, fresh=True)
        yield part, U


def logits_exp_in_strips(
    exps: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref: Tensor,
    *,
    first: int,
    scale: float,
    softcap: float | None,
    sums: bool,
    strips: Strips,
    stats: ChunkStats | None = None,
) -> TileSums | None:
    """As logits_exp; hidden (N, D) holds the tokens' rows in their order. stats, with sums only, is filled, too."""
    (N, _), width = hidden.shape, weight.shape[0]
    tile_sums = tile_refs = None
    if sums:
        tiles = triton.cdiv(width, strips.BLOCK_V)
        tile_sums, tile_refs = torch.empty((2, tiles, N), device=ref.device, dtype=torch.float32)
    for part, U in products_in_strips(hidden, weight, strips):
        of_tiles = slice(part.start // strips.BLOCK_V, triton.cdiv(part.stop, strips.BLOCK_V))
        exps_of_logits_kernel[(triton.cdiv(N, strips.BLOCK_M) * (of_tiles.stop - of_tiles.start),)](
            None if exps is None else exps[:, part],
            *(None if x is None else x[of_tiles] for x in (tile_sums, tile_refs)),
            U, None if bias is None else bias[part], labels, ref,
            N, U.shape[1], first + part.start, row_stride(exps), U.stride(0), float(scale), float(softcap or 0.0),
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            STORE_EXPS=exps is not None, STORE_SUMS=sums,
            BLOCK_M=strips.BLOCK_M, BLOCK_V=strips.BLOCK_V, num_warps=strips.num_warps,
        )  # fmt: skip
        if stats is not None and tile_refs is not None:
            stats_of_logits(
                stats, U, None if bias is None else bias[part], labels, tile_refs[of_tiles], part=part,
                tiles=of_tiles, first=first + part.start, scale=scale, softcap=softcap,
                block=(strips.BLOCK_M, strips.BLOCK_V), num_warps=strips.num_warps,
            )  # fmt: skip
    return TileSums(tile_sums, tile_refs, strips.BLOCK_V) if tile_sums is not None and tile_refs is not None else None

"""GEMM with an exponential epilogue, for one vocabulary chunk: E' and what sums need of it.

    u = scale * (H[t] . W[v] + b[v]),  z = softcap * tanh(u / softcap),  c = dz/du
    E'[t, v] = exp(z - q) * c,  0 for v = y_t          stored in exps' dtype, its only rounding
    tile sum = sum over v != y_t of exp(z - q)         fp32, without c
    q = r[t], or the tile's largest z where that passes r[t] by more than MOVE = 30 (-inf if both are)

r is the label's logit for almost every token, so one pass suffices: no running maximum. A tile that
had to move its q says so in tile_refs, and fixup.py brings it to the common reference afterwards.
u stays in fp32 accumulators, and z is made of it where the exponential is: the largest z is that of the
largest u. Moves about N*D*(Vc/BLOCK_V) + Vc*D*(N/BLOCK_M) operand elements (L2 serves most) and N*Vc
stored ones; 2*N*Vc*D operations: bound by the matrix units. Tiles and their reasons: configs.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asft_kernels.kernels.configs import Tile, multiprocessors
from asft_kernels.kernels.device_math import dot, narrow, softcap_logits, softcap_slope

# exp(30) = 1e13: room for 1e25 such entries in fp32, and 13 digits below the reference.
MOVE = tl.constexpr(30.0)


@triton.jit(do_not_specialize=["N", "first"])
def logits_exp_kernel(
    # data
    exps_ptr,  # (N, width) contiguous: E', every element is written; None without STORE_EXPS
    tile_sums_ptr,  # (tiles, N) fp32, every element is written; None without STORE_SUMS
    tile_refs_ptr,  # (tiles, N) fp32: q, likewise
    hidden_ptr,  # (M, D) rows stride_hm elements apart; DESCRIPTORS: a descriptor of the tokens' rows (N, D)
    weight_ptr,  # (width, D) the chunk's rows of the head, stride_wv elements apart, or a descriptor of them
    bias_ptr,  # (width,) the chunk's, or None
    rows_ptr,  # (N,) int64: token t is row rows[t] of hidden; not looked at with DESCRIPTORS
    labels_ptr,  # (N,) int64 in [0, V)
    ref_ptr,  # (N,) fp32: r
    # shapes and strides
    N,
    D,
    width,  # vocabulary rows in this chunk
    first,  # the vocabulary row that the chunk starts with
    stride_hm,
    stride_wv,
    # constants
    scale,
    softcap,  # looked at only under HAS_SOFTCAP
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_EXPS: tl.constexpr,
    STORE_SUMS: tl.constexpr,  # False: r is final, no z passes it by more than MOVE
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """A tile is exps[m, v], tile_sums[tile_v, m] and tile_refs[tile_v, m]. A program writes one, or, if
    PERSISTENT, every num_programs-th: other warps then multiply the next while it is written."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_v = tl.cdiv(width, BLOCK_V)
    stop = tiles_m * tiles_v if PERSISTENT else pid + 1  # a loop of one turn is no loop in machine code
    step = tl.num_programs(0) if PERSISTENT else 1
    for tile in tl.range(pid, stop, step, warp_specialize=PERSISTENT):
        # GROUP token tiles take turns at one vocabulary tile while that is in L2.
        per_group = GROUP * tiles_v
        group_start = tile // per_group * GROUP
        group_size = min(tiles_m - group_start, GROUP)
        tile_m = group_start + tile % per_group % group_size
        tile_v = tile % per_group // group_size

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        is_token = m < N
        in_chunk = v < width
        v64 = tl.minimum(v, width - 1).to(tl.int64)
        if not DESCRIPTORS:
            # Tokens and vocabulary rows past the end repeat a valid one: their results are never stored.
            row = tl.load(rows_ptr + tl.minimum(m, N - 1))  # int64
            hidden_row = hidden_ptr + (row * stride_hm)[:, None]
            weight_row = weight_ptr + (v64 * stride_wv)[None, :]

        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start in range(0, D, BLOCK_D):
            if DESCRIPTORS:  # zeros past the ends
                h = hidden_ptr.load([tile_m * BLOCK_M, start])
                w = weight_ptr.load([tile_v * BLOCK_V, start]).T
            else:
                d = start + tl.arange(0, BLOCK_D)
                h = tl.load(hidden_row + d[None, :], mask=(d < D)[None, :], other=0.0)
                w = tl.load(weight_row + d[:, None], mask=(d < D)[:, None], other=0.0)
            acc = dot(h, w, acc)

        if HAS_BIAS:
            acc += tl.load(bias_ptr + v64).to(tl.float32)[None, :]
        u = acc * scale
        own = tl.load(labels_ptr + m, mask=is_token, other=-1) - first
        own = tl.where((own >= 0) & (own < width), own, -1).to(tl.int32)
        u = tl.where(in_chunk[None, :] & (v[None, :] != own[:, None]), u, float("-inf"))

        ref = tl.load(ref_ptr + m, mask=is_token, other=float("inf"))  # nothing passes inf: e = 0
        if STORE_SUMS:
            top = tl.max(u, 1)
            if HAS_SOFTCAP:
                top = tl.where(top == float("-inf"), top, softcap_logits(top, softcap))
            ref = tl.where(top > ref + MOVE, top, ref)
        base = tl.where(ref == float("-inf"), 0.0, ref)  # no finite logit so far: exp(-inf - 0) is 0
        if HAS_SOFTCAP:
            # A logit of -inf is capped, too; the entries that do not count are not.
            z = softcap_logits(u, softcap)
            z = tl.where(in_chunk[None, :] & (v[None, :] != own[:, None]), z, float("-inf"))
        else:
            z = u
        e = tl.exp(z - base[:, None])
        if STORE_SUMS:
            at = tile_v.to(tl.int64) * N + m
            tl.store(tile_sums_ptr + at, tl.sum(e, 1), mask=is_token)
            tl.store(tile_refs_ptr + at, ref, mask=is_token)
        if STORE_EXPS:
            if HAS_SOFTCAP:
                e *= softcap_slope(u, softcap)
            at = (m.to(tl.int64) * width)[:, None] + v[None, :]
            e = narrow(e, exps_ptr.dtype.element_ty)
            tl.store(exps_ptr + at, e, mask=is_token[:, None] & in_chunk[None, :])


class TileSums(NamedTuple):
    sums: Tensor  # (tiles, N) fp32
    refs: Tensor  # (tiles, N) fp32: q
    width: int  # vocabulary rows of a tile


def operand_rows(hidden: Tensor, rows: Tensor, tile: Tile) -> Tensor:
    """The hidden that logits_exp reads: descriptors copy boxes, so the tokens' rows must stand side by side."""
    return hidden.index_select(0, rows) if tile.descriptors else hidden


def logits_exp(
    exps: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    ref: Tensor,
    *,
    first: int,
    scale: float,
    softcap: float | None,
    sums: bool,
    tile: Tile,
) -> TileSums | None:
    """Fills exps (N, width) unless it is None, and returns the tiles' sums and references if asked.

    weight and bias are the chunk's, whose first row is vocabulary row `first`. Without sums, ref must
    be final: phase 2 recomputes E' with it. hidden is what operand_rows made of it for that tile.
    """
    N, D, width = rows.shape[0], hidden.shape[1], weight.shape[0]
    assert weight.stride(1) == 1 or D == 1, "backend bug: needs row-major W"
    assert hidden.stride(1) == 1 or D == 1, "backend bug: needs row-major H"
    assert exps is None or (exps.is_contiguous() and exps.shape == (N, width)), "backend bug: E"
    tiles_v = triton.cdiv(width, tile.BLOCK_V)
    programs = triton.cdiv(N, tile.BLOCK_M) * tiles_v
    if tile.persistent:
        programs = min(programs, multiprocessors(hidden.device))
    operands = (hidden, weight)
    if tile.descriptors:
        boxes = ([tile.BLOCK_M, tile.BLOCK_D], [tile.BLOCK_V, tile.BLOCK_D])
        operands = [TensorDescriptor.from_tensor(x, box) for x, box in zip(operands, boxes, strict=True)]
    tile_sums = tile_refs = None
    if sums:
        tile_sums, tile_refs = torch.empty((2, tiles_v, N), device=ref.device, dtype=torch.float32)
    logits_exp_kernel[(programs,)](
        exps, tile_sums, tile_refs, *operands, bias, rows, labels, ref,
        N, D, width, first, hidden.stride(0), weight.stride(0),
        float(scale), float(softcap or 0.0),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        STORE_EXPS=exps is not None, STORE_SUMS=sums,
        BLOCK_M=tile.BLOCK_M, BLOCK_V=tile.BLOCK_V, BLOCK_D=tile.BLOCK_D, GROUP=tile.GROUP,
        DESCRIPTORS=tile.descriptors, PERSISTENT=tile.persistent,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return TileSums(tile_sums, tile_refs, tile.BLOCK_V) if sums else None

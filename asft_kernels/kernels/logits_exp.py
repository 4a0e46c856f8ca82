"""GEMM with an exponential epilogue, for one vocabulary chunk: E' and what sums need of it (exp_epilogue.py).

Logits stay in fp32 accumulators. Moves about N*D*(Vc/BLOCK_V) + Vc*D*(N/BLOCK_M) operand elements (L2 serves most)
and N*Vc stored ones; 2*N*Vc*D operations: bound by the matrix units. Tiles and their reasons: configs.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asft_kernels.kernels.configs import Strips, Tile, multiprocessors
from asft_kernels.kernels.device_math import dot
from asft_kernels.kernels.exp_epilogue import TileSums, row_stride, store_exponentials
from asft_kernels.kernels.logit_strips import logits_exp_in_strips


@triton.jit(do_not_specialize=["N", "first"])
def logits_exp_kernel(
    # data
    exps_ptr,  # (N, width) from `empty_exps`: E', every element is written; None without STORE_EXPS
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
    stride_em,
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
    ONE_LOOP: tl.constexpr,
):
    """A tile is exps[m, v], tile_sums[tile_v, m] and tile_refs[tile_v, m]. A program writes one, or, if PERSISTENT or
    ONE_LOOP, every num_programs-th: the next one's operands come while it is written; if PERSISTENT, other warps
    multiply them meanwhile."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_v = tl.cdiv(width, BLOCK_V)
    stop = tiles_m * tiles_v if PERSISTENT or ONE_LOOP else pid + 1  # a loop of one turn is no loop in machine code
    step = tl.num_programs(0) if PERSISTENT or ONE_LOOP else 1
    for tile in tl.range(pid, stop, step, warp_specialize=PERSISTENT, flatten=ONE_LOOP):
        # GROUP token tiles take turns at one vocabulary tile while that is in L2.
        per_group = GROUP * tiles_v
        group_start = tile // per_group * GROUP
        group_size = min(tiles_m - group_start, GROUP)
        tile_m = group_start + tile % per_group % group_size
        tile_v = tile % per_group // group_size

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        if not DESCRIPTORS:
            # Tokens and vocabulary rows past the end repeat a valid one: their results are never stored.
            row = tl.load(rows_ptr + tl.minimum(m, N - 1))  # int64
            hidden_row = hidden_ptr + (row * stride_hm)[:, None]
            weight_row = weight_ptr + (tl.minimum(v, width - 1).to(tl.int64) * stride_wv)[None, :]

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

        store_exponentials(
            acc, tile_v, m, v, exps_ptr, tile_sums_ptr, tile_refs_ptr, bias_ptr, labels_ptr, ref_ptr,
            N, width, first, stride_em, scale, softcap, HAS_BIAS, HAS_SOFTCAP, STORE_EXPS, STORE_SUMS,
        )  # fmt: skip


def operand_rows(hidden: Tensor, rows: Tensor, tile: Tile | Strips) -> Tensor:
    """The hidden that logits_exp reads: descriptors copy boxes and the library multiplies matrices, so the tokens' rows
    must stand side by side."""
    gathers = isinstance(tile, Tile) and not tile.descriptors
    return hidden if gathers else hidden.index_select(0, rows)


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
    tile: Tile | Strips,
) -> TileSums | None:
    """Fills exps (N, width) unless it is None, and returns the tiles' sums and references if asked.

    weight and bias are the chunk's, whose first row is vocabulary row `first`. Without sums, ref must
    be final: phase 2 recomputes E' with it. hidden is what operand_rows made of it for that tile.
    """
    N, D, width = rows.shape[0], hidden.shape[1], weight.shape[0]
    assert weight.stride(1) == 1 or D == 1, "backend bug: needs row-major W"
    assert hidden.stride(1) == 1 or D == 1, "backend bug: needs row-major H"
    assert exps is None or exps.shape == (N, width), "backend bug: E"
    if isinstance(tile, Strips):
        return logits_exp_in_strips(
            exps, hidden, weight, bias, labels, ref, first=first, scale=scale, softcap=softcap, sums=sums, strips=tile
        )
    tiles_v = triton.cdiv(width, tile.BLOCK_V)
    programs = triton.cdiv(N, tile.BLOCK_M) * tiles_v
    one_loop = tile.in_one_loop(None if exps is None else exps.dtype, bias is not None)
    if tile.persistent or one_loop:
        programs = min(programs, multiprocessors(hidden.device) or 3)  # off a GPU nothing runs side by side: a few
    operands = (hidden, weight)
    if tile.descriptors:
        boxes = ([tile.BLOCK_M, tile.BLOCK_D], [tile.BLOCK_V, tile.BLOCK_D])
        operands = [TensorDescriptor.from_tensor(x, box) for x, box in zip(operands, boxes, strict=True)]
    tile_sums = tile_refs = None
    if sums:
        tile_sums, tile_refs = torch.empty((2, tiles_v, N), device=ref.device, dtype=torch.float32)
    logits_exp_kernel[(programs,)](
        exps, tile_sums, tile_refs, *operands, bias, rows, labels, ref,
        N, D, width, first, row_stride(exps), hidden.stride(0), weight.stride(0),
        float(scale), float(softcap or 0.0),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        STORE_EXPS=exps is not None, STORE_SUMS=sums,
        BLOCK_M=tile.BLOCK_M, BLOCK_V=tile.BLOCK_V, BLOCK_D=tile.BLOCK_D, GROUP=tile.GROUP,
        DESCRIPTORS=tile.descriptors, PERSISTENT=tile.persistent, ONE_LOOP=one_loop,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return TileSums(tile_sums, tile_refs, tile.BLOCK_V) if sums else None

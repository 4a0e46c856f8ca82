"""What becomes of a tile of products H[t] . W[v]: exponentials, and what sums need of them.

    u = scale * (H[t] . W[v] + b[v]),  z = softcap * tanh(u / softcap),  c = dz/du
    E'[t, v] = exp(z - q) * c,  0 for v = y_t          stored in exps' dtype, its only rounding
    tile sum = sum over v != y_t of exp(z - q)         fp32, without c
    q = r[t], or the tile's largest z where that passes r[t] by more than MOVE = 30 (-inf if both are)

r is the label's logit for almost every token, so one pass suffices: no running maximum. A tile that had to move its q
says so in tile_refs, and settle.py brings it to the common reference afterwards. z is made of u where the exponential
is: the largest z is that of the largest u.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow, softcap_logits, softcap_slope

# exp(30) = 1e13: room for 1e25 such entries in fp32, and 13 digits below the reference.
MOVE = tl.constexpr(30.0)


class TileSums(NamedTuple):
    sums: Tensor  # (tiles, N) fp32
    refs: Tensor  # (tiles, N) fp32: q
    width: int  # vocabulary rows of a tile


def empty_exps(N: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, width) of a tensor whose rows begin at multiples of 16 elements: stores and products then move vectors."""
    return torch.empty((N, triton.cdiv(width, 16) * 16), dtype=dtype, device=device)[:, :width]


def row_stride(exps: Tensor | None) -> int:
    """exps' own, once it is sure that store_exponentials has the room that it needs."""
    if exps is None:
        return 0
    room = exps.stride(0) % 16 == 0 and exps.stride(0) >= exps.shape[1] and exps.stride(1) == 1
    assert room, "backend bug: E needs rows of a multiple of 16 elements"
    return exps.stride(0)


@triton.jit
def store_exponentials(
    acc,  # (BLOCK_M, BLOCK_V) fp32: products of tokens m with vocabulary rows v
    tile_v,  # the tile's row of tile_sums and tile_refs
    m,
    v,
    exps_ptr,  # (N, width) rows stride_em elements apart, with room to a multiple of 16; None without STORE_EXPS
    tile_sums_ptr,  # (tiles, N) fp32; None without STORE_SUMS
    tile_refs_ptr,
    bias_ptr,  # (width,), or None
    labels_ptr,  # (N,) int64
    ref_ptr,  # (N,) fp32: r
    N,
    width,
    first,  # the vocabulary row that is column 0
    stride_em,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_EXPS: tl.constexpr,
    STORE_SUMS: tl.constexpr,  # False: r is final, no z passes it by more than MOVE
):
    is_token = m < N
    in_chunk = v < width
    if HAS_BIAS:
        v64 = tl.minimum(v, width - 1).to(tl.int64)
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
        at = (m.to(tl.int64) * stride_em)[:, None] + v[None, :]
        # To the next multiple of 16, zeros past the width: a mask that is constant over 16 columns stores vectors.
        has_room = v < (width + 15) // 16 * 16
        tl.store(exps_ptr + at, narrow(e, exps_ptr.dtype.element_ty), mask=is_token[:, None] & has_room[None, :])

"""Brings rows that were written against an older reference to the newer one.

    x[t, j] *= exp(old[tile of j, t] - new[t])   where old != new; old <= new, so never above 1

Serves three matrices: E' of a chunk after its tiles were merged (a reference a tile), O when a row's
reference moved in a later chunk, and cached chunks at the end of phase 1 (one tile each). On real
data nothing has moved: a program then reads 8 bytes a token and returns.
"""

import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import narrow


@triton.jit(do_not_specialize=["N"])
def fixup_kernel(
    x_ptr,  # (N, width) contiguous, changed in place
    old_ptr,  # (tiles, N) fp32
    new_ptr,  # (N,) fp32
    N,
    width,
    tile_width,  # columns of x that share a row of old: a multiple of BLOCK, or at least width
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i of a row block's cdiv(width, BLOCK) looks after BLOCK_M x BLOCK elements."""
    blocks = tl.cdiv(width, BLOCK)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(0) % blocks * BLOCK
    tile = (start // tile_width).to(tl.int64)
    is_token = m < N
    old = tl.load(old_ptr + tile * N + m, mask=is_token, other=0.0)
    new = tl.load(new_ptr + m, mask=is_token, other=0.0)
    moved = old != new
    if tl.max(moved.to(tl.int32), 0) == 0:
        return
    j = start + tl.arange(0, BLOCK)
    at = (m.to(tl.int64) * width)[:, None] + j[None, :]
    mask = moved[:, None] & (j < width)[None, :]  # rows past N load 0 twice: not moved
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    base = tl.where(new == float("-inf"), 0.0, new)  # -inf, and so is old: a row that stays
    x *= tl.exp(old - base)[:, None]
    tl.store(x_ptr + at, narrow(x, x_ptr.dtype.element_ty), mask=mask)


def fixup(x: Tensor, old: Tensor, new: Tensor, *, tile_width: int) -> None:
    """Rescales x (N, width) in place; old (tiles, N), new (N,), tile_width a power of 2 or width."""
    N, width = x.shape
    assert x.is_contiguous(), "backend bug: fixup needs contiguous rows"
    BLOCK = min(triton.next_power_of_2(width), 128)
    if tile_width < width:
        BLOCK = min(BLOCK, tile_width)
        assert tile_width % BLOCK == 0, "backend bug: a block would straddle two references"
    BLOCK_M = 32  # 32 elements a thread where something moved, one program for 32 rows where not
    fixup_kernel[(triton.cdiv(N, BLOCK_M) * triton.cdiv(width, BLOCK),)](
        x, old, new, N, width, tile_width, BLOCK_M=BLOCK_M, BLOCK=BLOCK, num_warps=4
    )

"""Everything elementwise of one vocabulary chunk of noisy logits, each way, from the two products of its rows.

    x = H[t] . W[v],  s = H[t] . Wn[v]                    the products, (N, width) fp32
    z = softcap * tanh(scale * (x + b) / softcap)
    std = s + bn;  z~ = z + std * eps(seed, t, v)
    statistics  q = largest z~ of a tile, v = y_t left out (-inf if none is finite)
                tile sum = sum over v != y_t of exp(z~ - q);  tile power = sum over v of std^2;  z~_y
    gradient    C = -g * (p~ - [v = y_t]) * eps + (2 / V) * g' * std,  p~ = exp(z~ - log_total)

eps(seed, t, v) is entry v mod 4 of tl.randn4x(seed, (t << 32) + v div 4), as philox.py says: a tile begins
at a multiple of 4 of the vocabulary and masks what lies before the chunk. Its cosines and sines are device_math's.
g and g' are the gradients to logp and to the mean of std^2; p~ - 1 at the label is expm1(logp), which keeps its digits.
fp32 throughout, with no rounding beside those of the operations. Reads 8*N*width bytes; the gradient writes 4*N*width,
in the place of s. Bound by the arithmetic of eps as much as by memory (docs/kernels.md).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import cos_sin, expm1, softcap_logits


@triton.jit
def _tile(N, width, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, SHIFT: tl.constexpr):
    """(tile of the vocabulary, tokens (BLOCK_M,), columns of the chunk (BLOCK_V,)): those of this program."""
    tiles_v = tl.cdiv(width + SHIFT, BLOCK_V)
    tile_v = tl.program_id(0) % tiles_v
    m = tl.program_id(0) // tiles_v * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile_v, m, tile_v * BLOCK_V + tl.arange(0, BLOCK_V) - SHIFT


@triton.jit
def _normal_pair(u0, u1):
    """As Triton's own Box and Muller, of numbers in [0, 1), but for cos and sin without a stack."""
    cos, sin = cos_sin(6.283185307179586 * u1)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(1.0e-7, u0)))
    return radius * cos, radius * sin


@triton.jit
def _normals(seed, m, first_group, BLOCK_V: tl.constexpr):
    """eps (BLOCK_M, BLOCK_V) of tokens m and the vocabulary entries from 4 * first_group on."""
    group = first_group + tl.arange(0, BLOCK_V // 4)
    u0, u1, u2, u3 = tl.rand4x(seed, (m.to(tl.int64) << 32)[:, None] + group[None, :])
    n0, n1 = _normal_pair(u0, u1)
    n2, n3 = _normal_pair(u2, u3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _logits_and_std(
    products_ptr, noise_ptr, bias_ptr, noise_bias_ptr, at, there, column, in_chunk, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_NOISE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(z, std) of a tile."""
    z = tl.load(products_ptr + at, mask=there, other=0.0)
    std = tl.load(noise_ptr + at, mask=there, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=in_chunk, other=0.0).to(tl.float32)[None, :]
    if HAS_NOISE_BIAS:
        std += tl.load(noise_bias_ptr + column, mask=in_chunk, other=0.0).to(tl.float32)[None, :]
    z *= scale
    if HAS_SOFTCAP:
        z = softcap_logits(z, softcap)
    return z, std


@triton.jit
def _own_columns(labels_ptr, m, is_token, first, width):
    """(BLOCK_M,) int32: the chunk's column of each token's label, -1 where it is of another chunk."""
    own = tl.load(labels_ptr + m, mask=is_token, other=-1) - first
    return tl.where((own >= 0) & (own < width), own, -1).to(tl.int32)


@triton.jit(do_not_specialize=["N", "first", "seed"])
def noisy_statistics_kernel(
    # data
    sums_ptr,  # (tiles, N) fp32; every element of these three is written
    refs_ptr,  # (tiles, N) fp32: q
    powers_ptr,  # (tiles, N) fp32
    label_logits_ptr,  # (N,) fp32: z~_y, written where the label is of this chunk
    products_ptr,  # (N, width) fp32, contiguous: x
    noise_ptr,  # (N, width) fp32, contiguous: s
    bias_ptr,  # (width,) the chunk's b, or None
    noise_bias_ptr,  # (width,) the chunk's bn, or None
    labels_ptr,  # (N,) int64 in [0, V)
    # shapes
    N,
    width,  # vocabulary rows in this chunk
    first,  # the vocabulary row that the chunk starts with
    # constants
    seed,
    scale,
    softcap,  # looked at only under HAS_SOFTCAP
    HAS_BIAS: tl.constexpr,
    HAS_NOISE_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,  # first mod 4
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program has BLOCK_M x BLOCK_V entries, and writes what no other does."""
    tile_v, m, column = _tile(N, width, BLOCK_M, BLOCK_V, SHIFT)
    is_token, in_chunk = m < N, (column >= 0) & (column < width)
    there = is_token[:, None] & in_chunk[None, :]
    at = (m.to(tl.int64) * width)[:, None] + column[None, :]
    z, std = _logits_and_std(
        products_ptr, noise_ptr, bias_ptr, noise_bias_ptr, at, there, column, in_chunk, scale, softcap,
        HAS_BIAS, HAS_NOISE_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    z += std * _normals(seed, m, first // 4 + tile_v * (BLOCK_V // 4), BLOCK_V)

    is_own = _own_columns(labels_ptr, m, is_token, first, width)[:, None] == column[None, :]
    tl.store(tl.broadcast_to((label_logits_ptr + m)[:, None], z.shape), z, mask=is_own & there)
    z = tl.where(there & ~is_own, z, float("-inf"))
    ref = tl.max(z, 1)
    base = tl.where(ref == float("-inf"), 0.0, ref)  # no finite logit here: exp(-inf - 0) is 0
    at = tile_v.to(tl.int64) * N + m
    tl.store(sums_ptr + at, tl.sum(tl.exp(z - base[:, None]), 1), mask=is_token)
    tl.store(refs_ptr + at, ref, mask=is_token)
    tl.store(powers_ptr + at, tl.sum(std * std, 1), mask=is_token)  # std is 0 beside the chunk


@triton.jit(do_not_specialize=["N", "first", "seed"])
def noisy_gradient_kernel(
    # data
    noise_ptr,  # (N, width) fp32, contiguous: s, becomes C in place, every element
    products_ptr,  # (N, width) fp32, contiguous: x
    bias_ptr,  # (width,) the chunk's b, or None
    noise_bias_ptr,  # (width,) the chunk's bn, or None
    labels_ptr,  # (N,) int64 in [0, V)
    logps_ptr,  # (N,) fp32
    log_total_ptr,  # (N,) fp32: log of the sum over the vocabulary of exp(z~)
    grad_logps_ptr,  # (N,) fp32: g
    grad_power_ptr,  # (N,) fp32: g'
    # shapes
    N,
    width,
    first,
    # constants
    seed,
    scale,
    softcap,
    shrink,  # 2 / V
    HAS_BIAS: tl.constexpr,
    HAS_NOISE_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Programs, and arguments without a comment, as above."""
    tile_v, m, column = _tile(N, width, BLOCK_M, BLOCK_V, SHIFT)
    is_token, in_chunk = m < N, (column >= 0) & (column < width)
    there = is_token[:, None] & in_chunk[None, :]
    at = (m.to(tl.int64) * width)[:, None] + column[None, :]
    z, std = _logits_and_std(
        products_ptr, noise_ptr, bias_ptr, noise_bias_ptr, at, there, column, in_chunk, scale, softcap,
        HAS_BIAS, HAS_NOISE_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    eps = _normals(seed, m, first // 4 + tile_v * (BLOCK_V // 4), BLOCK_V)

    p = tl.exp(z + std * eps - tl.load(log_total_ptr + m, mask=is_token, other=0.0)[:, None])
    at_label = expm1(tl.load(logps_ptr + m, mask=is_token, other=0.0))
    is_own = _own_columns(labels_ptr, m, is_token, first, width)[:, None] == column[None, :]
    p = tl.where(is_own, at_label[:, None], p)
    pull = -tl.load(grad_logps_ptr + m, mask=is_token, other=0.0)
    shrink = shrink * tl.load(grad_power_ptr + m, mask=is_token, other=0.0)
    tl.store(noise_ptr + at, pull[:, None] * p * eps + shrink[:, None] * std, mask=there)


# 16 entries a thread: 4 to 8 programs on a multiprocessor (docs/kernels.md). A warp reads 512 bytes of a row at once
# and needs no other warp for a row's sum.
BLOCK_M, BLOCK_V = 16, 128


class NoisyTiles(NamedTuple):
    sums: Tensor  # (tiles, N) fp32
    refs: Tensor  # (tiles, N) fp32: q
    powers: Tensor  # (tiles, N) fp32


def noisy_statistics(
    label_logits: Tensor,
    products: Tensor,
    noise: Tensor,
    bias: Tensor | None,
    noise_bias: Tensor | None,
    labels: Tensor,
    *,
    first: int,
    seed: int,
    scale: float,
    softcap: float | None,
) -> NoisyTiles:
    """The tiles' statistics; label_logits (N,) is filled where labels are of the chunk, which starts with row first."""
    N, width = products.shape
    grid, constants = _launch(products, noise, first, bias, noise_bias, softcap)
    tiles_v = triton.cdiv(width + first % 4, BLOCK_V)
    sums, refs, powers = torch.empty((3, tiles_v, N), device=products.device, dtype=torch.float32)
    noisy_statistics_kernel[grid](
        sums, refs, powers, label_logits, products, noise, bias, noise_bias, labels,
        N, width, first, seed, float(scale), float(softcap or 0.0), **constants,
    )  # fmt: skip
    return NoisyTiles(sums, refs, powers)


def noisy_gradient(
    noise: Tensor,
    products: Tensor,
    bias: Tensor | None,
    noise_bias: Tensor | None,
    labels: Tensor,
    logps: Tensor,
    log_total: Tensor,
    grad_logps: Tensor,
    grad_power: Tensor,
    *,
    first: int,
    vocab: int,
    seed: int,
    scale: float,
    softcap: float | None,
) -> None:
    """noise (N, width) becomes C; arguments as in the kernel."""
    N, width = products.shape
    grid, constants = _launch(products, noise, first, bias, noise_bias, softcap)
    noisy_gradient_kernel[grid](
        noise, products, bias, noise_bias, labels, logps, log_total, grad_logps, grad_power,
        N, width, first, seed, float(scale), float(softcap or 0.0), 2.0 / vocab, **constants,
    )  # fmt: skip


def _launch(products, noise, first, bias, noise_bias, softcap) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, constants) of either kernel."""
    N, width = products.shape
    assert products.is_contiguous(), "backend bug: needs contiguous products"
    assert noise.is_contiguous(), "backend bug: needs contiguous products"
    assert all(b is None or b.is_contiguous() for b in (bias, noise_bias)), "backend bug: needs contiguous biases"
    grid = (triton.cdiv(N, BLOCK_M) * triton.cdiv(width + first % 4, BLOCK_V),)
    constants = dict(
        HAS_BIAS=bias is not None, HAS_NOISE_BIAS=noise_bias is not None, HAS_SOFTCAP=softcap is not None,
        SHIFT=first % 4, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, num_warps=4,
    )  # fmt: skip
    return grid, constants

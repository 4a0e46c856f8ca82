"""Standard normal numbers by counter: number (t, v) of a seed is computed from t, v and seed alone.

    eps(t, v) = normal v mod 4 of Philox4x32-10(counter = (v div 4, t, 0, 0), key = (seed mod 2^32, seed div 2^32))

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Its four words w become uniform
numbers u = min(w, 2^32 - 1 - w) / 2^31, and these, by Box and Muller, four normal ones. It is what Triton calls
tl.randn4x(seed, (t << 32) + v // 4): the same words to the bit, the same normals up to the rounding of log, cos
and sin. fp32, so |eps| <= 5.68 (u is kept above 1e-7).
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
KEY_STEP_A, KEY_STEP_B = 0x9E3779B9, 0xBB67AE85
UNIFORM = 4.6566127342e-10  # Triton's 2^-31, such that the largest word stays below 1 in fp32


def normals(seed: int, tokens: Tensor, start: int, stop: int) -> Tensor:
    """eps(t, v) for every t of tokens (N,) int64 and v in [start, stop): (N, stop - start) fp32."""
    first, last = start // 4, -(-stop // 4)
    groups = torch.arange(first, last, device=tokens.device)
    words = philox(seed, groups[None, :], tokens[:, None])
    out = torch.empty(len(tokens), last - first, 4, device=tokens.device)
    for k in (0, 2):
        radius = _uniform(words[k]).clamp_(min=1e-7).log_().mul_(-2).sqrt_()
        angle = _uniform(words[k + 1]).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=out[..., k])
        torch.mul(radius, angle.sin_(), out=out[..., k + 1])
    return out.view(len(tokens), -1)[:, start - 4 * first : stop - 4 * first]


def philox(seed: int, c0: Tensor, c1: Tensor) -> list[Tensor]:
    """The four words of counter (c0, c1, 0, 0), int64 in [0, 2^32), in the shape that c0 and c1 broadcast to.

    32-bit words in int64: a product's wrapped 64 bits are the right ones, and what a word carries above its 32 bits
    is masked off before the next product reads it.
    """
    shape = torch.broadcast_shapes(c0.shape, c1.shape)
    c0, c1 = (c.expand(shape).clone() for c in (c0, c1))
    c2, c3, high = (torch.zeros_like(c0) for _ in range(3))
    key_a, key_b = seed & MASK, seed >> 32 & MASK
    for _ in range(ROUNDS):
        c2.mul_(MULTIPLIER_B)
        c0.mul_(MULTIPLIER_A)
        torch.bitwise_right_shift(c2, 32, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(key_a).bitwise_and_(MASK)
        torch.bitwise_right_shift(c0, 32, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(key_b).bitwise_and_(MASK)
        c0, c1, c2, c3 = c1, c2, c3, c0
        key_a, key_b = key_a + KEY_STEP_A & MASK, key_b + KEY_STEP_B & MASK
    return [c0, c1.bitwise_and_(MASK), c2, c3.bitwise_and_(MASK)]


def _uniform(words: Tensor) -> Tensor:
    """In [0, 1), fp32."""
    return torch.minimum(words, MASK - words).float().mul_(UNIFORM)

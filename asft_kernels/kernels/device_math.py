"""Scalar maths and products that behave alike compiled and interpreted, in one place.

    log1p(x)   = 2 atanh(x / (2 + x)),  a series below |x| = 1/2, log(1 + x) above
    expm1(x)   = its Taylor polynomial below |x| = 1/2, exp(x) - 1 above
    softplus(x) = max(x, 0) + log1p(exp(-|x|)),  sigmoid(x) = 1 / (1 + exp(-x))
    softcap:     z = cap * tanh(u / cap),  slope c = dz/du = 4 q / (1 + q)^2,  q = exp(-2 |u| / cap)
    cos, sin:    their Taylor polynomials in a - k pi/2, |a - k pi/2| <= pi/4

Written from exp and log because device libraries (libdevice) cannot be interpreted, and as
polynomials near 0 because a GPU's approximate log has no relative accuracy next to 1. Those libraries' cos and
sin also have a branch for large angles that takes a stack.
The slope is 1 - (z / cap)^2, too, but where tanh saturates that has no digits left.
All in fp32.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, or for -1/2 < x < 0."""
    # The series' next term, q^13/13 with q <= 1/5, is 1e-9 of the first.
    small = tl.abs(x) < 0.5
    near = tl.where(small, x, 0.0)
    q = near / (2.0 + near)
    t = q * q
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11)))))
    return tl.where(small, 2.0 * q * series, tl.log(1.0 + tl.where(small, 1.0, x)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 88."""
    # The polynomial's next term, x^9/10! with |x| <= 1/2, is 5e-10 of the first.
    small = tl.abs(x) < 0.5
    t = tl.where(small, x, 0.0)
    p = 1 / 5040 + t * (1 / 40320 + t * (1 / 362880))
    p = 1 + t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t * p)))))
    return tl.where(small, t * p, tl.exp(x) - 1.0)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softcap_logits(u, cap):
    """z = cap * tanh(u / cap), from expm1 so that small logits keep their digits."""
    m = expm1(tl.abs(u) * (-2.0 / cap))
    z = cap * (-m / (2.0 + m))
    return tl.where(u < 0, -z, z)


@triton.jit
def softcap_slope(u, cap):
    """c of the logit u before its cap: 1 at 0, 0 for infinite u."""
    q = tl.exp(tl.abs(u) * (-2.0 / cap))
    return 4.0 * q / ((1.0 + q) * (1.0 + q))


# pi/2 = HIGH + LOW: HIGH has 21 bits, so that k HIGH is exact for k <= 4, and a - k HIGH is, too.
HALF_PI_HIGH = tl.constexpr(1.570796012878418)
HALF_PI_LOW = tl.constexpr(3.139164786504813e-07)
TWO_OVER_PI = tl.constexpr(0.6366197723675814)


@triton.jit
def cos_sin(a):
    """(cos(a), sin(a)) for 0 <= a <= 2 pi."""
    # The polynomials' next terms, with |r| <= pi/4, are 3e-9 of sin and 2e-10 of cos.
    k = (a * TWO_OVER_PI + 0.5).to(tl.int32)
    r = a - k.to(tl.float32) * HALF_PI_HIGH
    r = r - k.to(tl.float32) * HALF_PI_LOW
    t = r * r
    s = r + r * t * (-1 / 6 + t * (1 / 120 + t * (-1 / 5040 + t * (1 / 362880))))
    c = 1.0 - t * (1 / 2 - t * (1 / 24 - t * (1 / 720 - t * (1 / 40320 - t * (1 / 3628800)))))
    swaps = k % 2 == 1
    cos, sin = tl.where(swaps, s, c), tl.where(swaps, c, s)
    return tl.where((k + 1) & 2 != 0, -cos, cos), tl.where(k & 2 != 0, -sin, sin)


@triton.jit
def dot(a, b, acc):
    """acc + a.b with fp32 accumulators. fp32 operands stay fp32: tl.dot's own default is tf32."""
    if INTERPRETED:  # bf16 products come out as garbage there
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in the dtype of a store, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # there the cast alone would truncate
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)

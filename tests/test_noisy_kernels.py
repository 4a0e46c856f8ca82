"""The kernels of noisy logits, each alone and both phases whole, against float64: interpreted, emulated, or on a GPU.

Bounds count roundings, u = 2**-24 each, as in test_kernels.py. Fresh memory is NaN (conftest).
"""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from asft_kernels.backends import Logits, triton_runs_on_cpu
from asft_kernels.backends.plan import Plan
from asft_kernels.kernels.device_math import cos_sin
from asft_kernels.methods.dnpo import noisy_logits, noisy_torch, noisy_triton
from asft_kernels.methods.dnpo.noisy_logits import noisy_gradient, noisy_statistics
from asft_kernels.methods.dnpo.philox import normals
from bounds import fp32_bound, relative_error
from test_kernels import DTYPES, assert_within, both, u

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_runs_on_cpu()), reason="Triton has nothing to run on here"
)

# Log, root, cosine and product within 4, 2, 4 and 1 roundings; the log's are halved by the root. Here and in `normals`.
DEPS = 5.68 * 2 * (2 + 2 + 4 + 1) * u


@triton.jit
def _cos_sin_kernel(cos_ptr, sin_ptr, a_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cos, sin = cos_sin(tl.load(a_ptr + i))
    tl.store(cos_ptr + i, cos)
    tl.store(sin_ptr + i, sin)


@pytest.mark.parametrize("points", both([2048], [2048]))
def test_cos_sin(points, device):
    """Within 4 roundings of 1: the reduced angle's 2, and the last two operations of a polynomial."""
    a = torch.linspace(0, 2 * torch.pi, points).to(device)
    cos, sin = torch.full((2, points), torch.nan, device=device)
    _cos_sin_kernel[(points // 256,)](cos, sin, a, BLOCK=256)
    exact = a.cpu().double()
    assert_within(cos, exact.cos(), torch.full_like(exact, 4 * u))
    assert_within(sin, exact.sin(), torch.full_like(exact, 4 * u))


@triton.jit
def _draw_kernel(out_ptr, tokens_ptr, first_group, seed, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    m, v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    eps = noisy_logits._normals(seed, tl.load(tokens_ptr + m), first_group, BLOCK_V)
    tl.store(out_ptr + m[:, None] * BLOCK_V + v[None, :], eps)


@pytest.mark.parametrize("seed", both([0, 1, 2**31 + 5, 2**63 - 1], [3, 2**63 - 1]))
def test_draws_are_those_of_philox(seed, device):
    """Token numbers up to the last of 32 bits, and a tile in the middle of a vocabulary."""
    tokens = torch.tensor([0, 1, 7, 2**20 + 3, 2**31 - 1, 5, 6, 9]).to(device)
    drawn = torch.full((8, 32), torch.nan, device=device)
    _draw_kernel[(1,)](drawn, tokens.int(), 38_000, seed, BLOCK_M=8, BLOCK_V=32)
    exact = normals(seed, tokens.cpu(), 152_000, 152_032).double()
    assert_within(drawn, exact, torch.full_like(exact, DEPS))


class Chunk:
    """Products of one chunk [first, first + width) of a vocabulary, and all that float64 makes of them.

    Labels stand on the chunk's first and last entry, beside both, anywhere. Logits spread over 60, labels' are high.
    """

    def __init__(self, N, width, first, device, *, scale=1.0, softcap=None, bias=False, noise_bias=False, seed=7):
        gen = torch.Generator().manual_seed(N + width)
        self.N, self.width, self.first, self.seed, self.vocab = N, width, first, seed, first + width + 5
        self.scale, self.softcap = scale, softcap
        self.products, self.noise = 12 * torch.randn(N, width, generator=gen), torch.randn(N, width, generator=gen)
        self.bias, self.noise_bias = (
            torch.randn(width, generator=gen) if wanted else None for wanted in (bias, noise_bias)
        )
        self.labels = torch.randint(self.vocab, (N,), generator=gen)
        borders = torch.tensor([first, first + width - 1, max(first - 1, 0), first + width])
        self.labels[:4] = borders[: min(N, 4)]
        self.own = torch.arange(first, first + width) == self.labels[:, None]
        self.products[self.own] += 20 / scale  # a label that a sum would show
        b = 0 if self.bias is None else self.bias.double()
        z = scale * (self.products.double() + b)
        dz = 2 * u * z.abs()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
            dz = dz + 8 * u * z.abs()
        self.std = self.noise.double() + (0 if self.noise_bias is None else self.noise_bias.double())
        self.eps = normals(seed, torch.arange(N), first, first + width).double()
        self.z = z + self.std * self.eps
        self.dz = dz + self.std.abs() * (DEPS + 2 * u * self.eps.abs()) + u * self.z.abs()
        self.inputs = [
            None if x is None else x.clone().to(device)
            for x in (self.products, self.noise, self.bias, self.noise_bias, self.labels)
        ]

    @property
    def constants(self):
        return {"first": self.first, "seed": self.seed, "scale": self.scale, "softcap": self.softcap}


# (N, width, first): one entry; odd sizes within a tile; several tiles either way, chunks that begin between groups
# of four normals; a chunk that ends with a tile, and one that needs a further tile for its shift alone.
SHAPES = [(1, 1, 0), (5, 37, 37), (21, 300, 74), (17, 128, 64), (4, 128, 3)]
OPTIONS = [(1.0, None, False, False), (0.7, None, True, False), (1.3, 8.0, False, True), (0.5, 30.0, True, True)]
SHAPES_AND_OPTIONS = both(
    [(*SHAPES[2], *options) for options in OPTIONS]
    + [(*shape, *options) for shape, options in zip(SHAPES[:2] + SHAPES[3:], OPTIONS, strict=True)],
    [(5, 37, 37, *OPTIONS[3]), (17, 140, 64, *OPTIONS[0])],
)
PARAMETERS = ("N", "width", "first", "scale", "softcap", "bias", "noise_bias")


@pytest.mark.parametrize(PARAMETERS, SHAPES_AND_OPTIONS)
def test_statistics(N, width, first, scale, softcap, bias, noise_bias, device):
    x = Chunk(N, width, first, device, scale=scale, softcap=softcap, bias=bias, noise_bias=noise_bias)
    z_y = torch.full((N,), torch.nan, device=device)
    tiles = noisy_statistics(z_y, *x.inputs, **x.constants)

    here = x.own.any(1)
    assert z_y.cpu()[~here].isnan().all()  # written where the label is of this chunk, and nowhere else
    assert_within(z_y.cpu()[here], x.z[x.own], x.dz[x.own])
    sums, refs, powers = (part.cpu().double() for part in tiles)
    assert all(part.isfinite().all() or part is refs for part in (sums, refs, powers))
    # Squares of one rounding, their own, and a sum of 128: 2 + 1 + 7, and the tiles'.
    assert_within(powers.sum(0), (x.std**2).sum(1), (x.std**2).sum(1) * 16 * u)
    others = x.z.masked_fill(x.own, -torch.inf)
    if width == 1:
        others = others[~here]
        sums, refs = sums[:, ~here], refs[:, ~here]
        assert tiles.sums.cpu()[:, here].eq(0).all()
        assert tiles.refs.cpu()[:, here].eq(-torch.inf).all()
    top = (others - x.dz.max()).amax(1), (others + x.dz.max()).amax(1)
    assert ((refs.amax(0) >= top[0]) & (refs.amax(0) <= top[1])).all()  # the running maximum is one
    # Each term: its logit's error, that of the difference to q and of exp's argument, 4 of exp; 7 of the sum.
    got = (refs + sums.log()).logsumexp(0)
    spread = (others.amax(1) - others.masked_fill(x.own, torch.inf).amin(1)).clamp(0, 100)
    assert_within(got, others.logsumexp(1), x.dz.max() + u * (2 * spread + 11))


@pytest.mark.parametrize(PARAMETERS, SHAPES_AND_OPTIONS)
def test_gradient(N, width, first, scale, softcap, bias, noise_bias, device):
    """Sure labels (logp = -1e-6), improbable ones, and rows that the chunk has most of or little of."""
    x = Chunk(N, width, first, device, scale=scale, softcap=softcap, bias=bias, noise_bias=noise_bias)
    gen = torch.Generator().manual_seed(1)
    g, q = torch.randn(2, N, generator=gen)
    log_total = x.z.logsumexp(1).float() + torch.rand(N, generator=gen)
    logps = -torch.tensor([1e-6, 3.0, 0.2, 40.0]).repeat(N)[:N]
    rows = [row.to(device) for row in (logps, log_total, g, q)]
    products, C, *rest = x.inputs
    noisy_gradient(C, products, *rest, *rows, vocab=x.vocab, **x.constants)

    g, q, log_total, logps = (row.double()[:, None] for row in (g, q, log_total, logps))
    p = (x.z - log_total).exp()
    dp = p * (x.dz + u * ((x.z - log_total).abs() * 2 + 4))  # as the sums' terms
    p, dp = torch.where(x.own, logps.expm1(), p), torch.where(x.own, 9 * u * logps.expm1().abs(), dp)
    first_term, second_term = -g * p * x.eps, 2 / x.vocab * q * x.std
    bound = g.abs() * (dp * x.eps.abs() + p.abs() * DEPS) + 3 * u * first_term.abs() + 5 * u * second_term.abs()
    assert_within(C, first_term + second_term, bound + u * (first_term + second_term).abs())
    assert torch.equal(products.cpu(), x.products)


class Problem:
    """Tokens of a small model with a noisy head. Rows 0 to 2 have sure labels, 3 and 4 are sure of another entry, some
    labels stand on chunks' borders."""

    def __init__(self, dtype, device, *, N=21, V=123, D=7, noise_dtype=torch.float32, bias=True, logits=Logits()):  # noqa: B008
        gen = torch.Generator().manual_seed(N)
        hidden, weight = torch.randn(N, D, generator=gen), torch.randn(V, D, generator=gen) / D**0.5
        self.labels = torch.randint(V, (N,), generator=gen)
        if V > 100:
            self.labels[:5] = torch.tensor([0, 36, 37, 73, V - 1])
            for t, v in ((0, 0), (1, 36), (2, 37), (3, 38), (4, 40)):
                h = hidden[t]
                weight[v] = h * 25 / logits.scale / h.square().sum()
        tensors = [hidden.to(dtype), weight.to(dtype), torch.randn(V, generator=gen).to(dtype) if bias else None]
        noise = 0.4 * torch.randn(V, D + 1, generator=gen)
        tensors += [noise[:, :D].to(noise_dtype), noise[:, D].to(noise_dtype) if bias else None]
        self.tensors, self.logits = [None if x is None else x.to(device) for x in tensors], logits
        self.g, self.q = torch.randn(2, N, generator=gen).to(device)
        self.inputs = (*self.tensors, self.labels.to(device))

    def run(self, backend, chunk, seed=2**40 + 3):
        """(logps, sum of std^2, dWn, dbn), as noisy_logps.py closes it."""
        plan = Plan(len(self.tensors[1]), chunk, 0)
        z_y, log_others, power = backend.forward(*self.inputs, seed, self.logits, plan)
        logps, log_total = F.logsigmoid(z_y - log_others), torch.logaddexp(z_y, log_others)
        grads = backend.backward(self.g, self.q, *self.inputs, logps, log_total, seed, self.logits, plan)
        return logps, power, *(x for x in grads if x is not None)

    def exact(self, seed=2**40 + 3):
        hidden, weight, bias, noise_weight, noise_bias = (
            None if x is None else x.cpu().double().requires_grad_() for x in self.tensors
        )
        z = self.logits.scale * F.linear(hidden, weight, bias)
        z = z if self.logits.softcap is None else self.logits.softcap * torch.tanh(z / self.logits.softcap)
        std = F.linear(hidden, noise_weight, noise_bias)
        noisy = z.detach() + std * normals(seed, torch.arange(len(hidden)), 0, len(weight)).double()
        # The log of the others' sum apart: 1 - p keeps its digits in float64, too.
        own = noisy.gather(1, self.labels[:, None])[:, 0]
        logps = F.logsigmoid(own - noisy.scatter(1, self.labels[:, None], -torch.inf).logsumexp(1))
        power = (std**2).sum(1)
        loss = (self.g.cpu().double() * logps).sum() + (self.q.cpu().double() * power).sum() / len(weight)
        leaves = [x for x in (noise_weight, noise_bias) if x is not None]
        return logps.detach(), power.detach(), *torch.autograd.grad(loss, leaves)


CAPPED = Logits(0.5, 20.0)


@pytest.mark.parametrize(
    ("dtype", "logits", "chunk"),
    both(
        [(dtype, logits, 37) for dtype in DTYPES for logits in (Logits(), CAPPED)]
        + [(torch.float32, CAPPED, chunk) for chunk in (11, 64, 123)],
        [(torch.float32, CAPPED, 37), (torch.bfloat16, Logits(), 64)],
    ),
)
def test_both_phases(dtype, logits, chunk, device):
    """Against float64, and against ATen calls. Logits and noise stay below 32; hidden is computed with as it is."""
    x = Problem(dtype, device, logits=logits)
    got, exact, torch_backend = x.run(noisy_triton, chunk), x.exact(), x.run(noisy_torch, 50)
    for a, b, c in zip(got, exact, torch_backend, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) <= fp32_bound(32)
        assert relative_error(a, c) <= 2 * fp32_bound(32)
    # Sure labels one by one: of -1e-6 and the like a difference to 1 would keep few digits.
    assert got[0][:3].abs().max() < 1e-3
    sure = (got[0][:3].cpu() / exact[0][:3] - 1).abs()
    assert sure.max() <= 32 * 8 * u  # logits of 32 with 8 roundings each: their differences' error is relative here


@pytest.mark.parametrize("dtype", both([torch.bfloat16, torch.float16, torch.float64], [torch.bfloat16]))
def test_gradients_come_in_the_noise_head_s_dtype(dtype, device):
    """Rounded once from fp32; a noise head of another dtype than hidden, and without a bias."""
    x = Problem(torch.float32, device, noise_dtype=dtype, bias=False)
    *values, grad = x.run(noisy_triton, 37)
    *exact, exact_grad = x.exact()
    for a, b in zip(values, exact, strict=True):
        assert relative_error(a, b) <= fp32_bound(32)
    assert grad.dtype == dtype
    rounding = 0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    assert relative_error(grad, exact_grad) <= fp32_bound(32) + rounding


@pytest.mark.parametrize("chunk", both([37], [64]))
def test_no_token_at_all(chunk, device):
    x = Problem(torch.float32, device)
    x.inputs = (x.tensors[0][:0], *x.tensors[1:], x.inputs[-1][:0])
    x.g, x.q = x.g[:0], x.q[:0]
    logps, power, grad_weight, grad_bias = x.run(noisy_triton, chunk)
    assert logps.shape == power.shape == (0,)
    assert grad_weight.eq(0).all()
    assert grad_bias.eq(0).all()


@pytest.mark.parametrize("chunk", both([2], [2]))
def test_masked_entries_and_one_word(chunk, device):
    """Whole tiles and chunks of -inf; a vocabulary of one, whose probability is 1."""
    x = Problem(torch.float32, device, N=6, V=9)
    bias = x.inputs[2]
    bias[:5] = -torch.inf
    x.labels = x.labels % 4 + 5
    x.inputs = (*x.tensors, x.labels.to(device))
    got, exact = x.run(noisy_triton, chunk), x.exact()
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) <= fp32_bound(32)

    one = Problem(torch.float32, device, N=6, V=9)
    one.tensors[1:] = [tensor[:1].contiguous() for tensor in one.tensors[1:]]
    one.inputs = (*one.tensors, torch.zeros_like(one.inputs[-1]))
    one.q.zero_()
    logps, _, *grads = one.run(noisy_triton, chunk)
    assert logps.eq(0).all()
    assert all(grad.eq(0).all() for grad in grads)

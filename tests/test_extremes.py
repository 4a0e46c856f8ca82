"""Log-probabilities, gradients and losses at the ends of what numbers can hold, against mpmath with 60 digits."""

from dataclasses import dataclass, field
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from asft_kernels import fused_asft_loss, fused_linear_logps, fused_preference_loss
from bounds import entry_bound, unit_roundoff
from cases import IGNORE

Number = Any  # mpmath.mpf, which has no type
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
FLOOR = mpf("1e-6")  # of -avg: from there on asft's and orpo's terms are straight lines


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60):
        yield


@dataclass
class Extreme:
    """Tokens: hidden (N, D), weight (V, D), bias (V,) or None, labels (N,), gradients of the log-probabilities (N,)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    upstream: Tensor = field(default_factory=lambda: torch.ones(()))

    def exact(self) -> tuple[list, list[Tensor], list[Tensor]]:
        """Log-probabilities, gradients of hidden, weight and bias, and the sums of their terms' sizes."""
        H, W = (x.double().tolist() for x in (self.hidden, self.weight))
        b = [0.0] * len(W) if self.bias is None else self.bias.double().tolist()
        up = self.upstream.double().expand(len(H)).tolist()
        logps, rows = [], []
        for h, label, g in zip(H, self.labels.tolist(), up, strict=True):
            z = [mpmath.fdot(h, w) + mpf(c) for w, c in zip(W, b, strict=True)]
            highest = max(z)
            exps = [mpmath.exp(x - highest) for x in z]
            others = mpmath.fsum(e for v, e in enumerate(exps) if v != label)
            total = others + exps[label]
            ratio = others / exps[label] if exps[label] else mpf("inf")
            logps.append(-mpmath.log1p(ratio))
            slopes = [-e / total for e in exps]
            slopes[label] = others / total
            rows.append([mpf(g) * x for x in slopes])
        of_logits = [rows, [[abs(x) for x in row] for row in rows]]
        grads, sizes = (
            self._products(G, *(([[abs(x) for x in row] for row in M] for M in (H, W)) if k else (H, W)))
            for k, G in enumerate(of_logits)
        )
        return logps, grads, sizes

    def _products(self, G, H, W) -> list[Tensor]:
        D, V = len(W[0]), len(W)
        of_hidden = [[mpmath.fsum(g[v] * W[v][d] for v in range(V)) for d in range(D)] for g in G]
        of_weight = [[mpmath.fsum(G[n][v] * H[n][d] for n in range(len(H))) for d in range(D)] for v in range(V)]
        of_bias = [mpmath.fsum(g[v] for g in G) for v in range(V)]
        hidden, weight, bias = (
            torch.tensor([[float(x) for x in row] for row in M], dtype=torch.float64)
            for M in (of_hidden, of_weight, [of_bias])
        )
        return [hidden, weight, bias[0]]


def assert_exact(case: Extreme, **options: Any) -> None:
    leaves = [x for x in (case.hidden, case.weight, case.bias) if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    head = leaves[1] if case.bias is None else (leaves[1], leaves[2])
    got = fused_linear_logps(leaves[0][:, None], head, case.labels[:, None], shift=False, **options)
    logps, grads, sizes = case.exact()
    bound = entry_bound(case.hidden, case.weight, case.bias)
    tiny = torch.finfo(got.dtype).tiny
    for mine, right in zip(got[:, 0].tolist(), logps, strict=True):
        if mpmath.isinf(right):
            assert mine == float(right)
            continue
        # ln(1 + x) has the absolute error of ln x, and the relative one of x where that is small.
        allowed = 2 * bound * min(abs(right), 1) + 2 * unit_roundoff(got.dtype) * abs(right) + tiny
        assert abs(mpf(mine) - right) <= allowed, (mine, mpmath.nstr(right, 20))
    upstream = case.upstream.to(got.dtype).expand(len(got))[:, None]
    mine_of = torch.autograd.grad(got, leaves, upstream)
    for leaf, mine, right, size in zip(leaves, mine_of, grads, sizes, strict=False):
        assert mine.dtype == leaf.dtype
        assert not mine.isnan().any()
        once = unit_roundoff(leaf.dtype) * 1.01 if leaf.dtype.itemsize == 2 else 0.0
        # The spacing of subnormals, a rounding for each term; 1 / total and its like may not go below tiny.
        spacing = torch.finfo(leaf.dtype).tiny * torch.finfo(leaf.dtype).eps * (len(case.weight) + len(got))
        least = spacing + tiny * leaf.abs().max().item()
        allowed = 4 * bound * size + once * right.abs() + least
        fits = right.abs() <= torch.finfo(leaf.dtype).max
        assert ((mine.double() - right).abs() <= allowed)[fits].all(), (mine, right)
        assert (mine[~fits] == right[~fits].sign() * torch.inf).all()


def line(values: list[float], dtype=torch.float32) -> Tensor:
    """(n, 1)."""
    return torch.tensor(values, dtype=torch.float64).to(dtype)[:, None]


def extremes() -> dict[str, Extreme]:
    g = torch.Generator().manual_seed(0)
    f32, f64, f16, bf16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

    def normal(*shape: int, dtype=f32) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=f64).to(dtype)

    inf, one = torch.inf, torch.ones(1, 1)
    labels = torch.tensor([0, 1, 2, 3])
    cases = {}
    for dtype in (f32, f64, bf16):
        name = str(dtype).removeprefix("torch.")
        hundred = line([128, -128, 128, -128], dtype)
        cases[f"logits of 1e4 and -1e4, {name}"] = Extreme(hundred, line([80, -80, 0, 79], dtype), labels)
        cases[f"equal rows, {name}"] = Extreme(normal(4, 3, dtype=dtype), torch.full((5, 3), 1.5, dtype=dtype), labels)
        cases[f"one-hot, {name}"] = Extreme(30 * torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype), labels)
        upstream = torch.tensor([1e-30, -1e-20, 1e-10, 1e10])
        cases[f"far gradients, {name}"] = Extreme(
            normal(4, 3, dtype=dtype), normal(5, 3, dtype=dtype), labels, upstream=upstream
        )
    cases["gradients of 1e-30 alone"] = Extreme(normal(4, 3), normal(5, 3), labels, upstream=torch.tensor(1e-30))
    some = torch.tensor([0.5, -inf, 1.0, -2.0, -inf])
    cases["some biases -inf"] = Extreme(normal(3, 3), normal(5, 3), torch.tensor([0, 2, 3]), some)
    cases["all other biases -inf"] = Extreme(
        normal(3, 3), normal(5, 3), torch.tensor([2, 2, 2]), torch.tensor([-inf, -inf, 1.0, -inf, -inf])
    )
    cases["subnormal hidden and rows"] = Extreme(normal(4, 3) * 1e-40, normal(5, 3) * 1e-39, labels)
    cases["subnormal hidden, fp16"] = Extreme(normal(4, 3, dtype=f16) * 1e-7, normal(5, 3, dtype=f16), labels)
    cases["products beyond fp16"] = Extreme(
        line([250, -250, 300, 200], f16), line([300, 299, -300, 0], f16), torch.tensor([0, 1, 1, 3])
    )
    cases["gradients beyond fp16"] = Extreme(
        normal(4, 3, dtype=f16), normal(5, 3, dtype=f16), labels, upstream=torch.tensor([1e6, 1.0, -1e6, 1e-3])
    )
    cases["one token, one entry"] = Extreme(one, one, torch.tensor([0]), torch.tensor([3.0]))
    cases["one entry, 4 tokens"] = Extreme(normal(4, 3), normal(1, 3), torch.zeros(4, dtype=torch.int64))
    gaps = [1e-12, 1e-6, 1e-3, 1, 10, 29, 31, 80, 87, 89, 103, 105, 700, 1e4]
    for dtype in (f32, f64):
        cases[f"two entries, {dtype}"] = Extreme(
            line([*gaps, *(-x for x in gaps)], dtype),
            line([1, 0], dtype),
            torch.zeros(2 * len(gaps), dtype=torch.int64),
        )
    cases["one token"] = Extreme(normal(1, 8), normal(33, 8), torch.tensor([32]), normal(33))
    return cases


EXTREMES = extremes()


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1, "cache_bytes": 0}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name, options):
    assert_exact(EXTREMES[name], backend="torch", **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name for name, case in EXTREMES.items() if case.hidden.dtype == torch.float32])
def test_extremes_in_kernels(name):
    """fp32: the bounds of 16 bits have roundings of their own there (tests/bounds.py)."""
    assert_exact(EXTREMES[name], backend="triton", chunk_size=32)


AVERAGES = ["-1e-12", "-1e-9", "-0.99e-6", "-1.01e-6", "-1e-4", "-0.1", "-1", "-30", "-100", "-700", "-800", "-1e4"]


def odds(avg: Number) -> Number:
    return avg - mpmath.log(-mpmath.expm1(avg))


def term(avg: Number, beta: Number) -> Number:
    """-log sigmoid(beta f), a straight line past the floor."""
    at = min(avg, -FLOOR)

    def curve(x: Number) -> Number:
        return mpmath.log1p(mpmath.exp(-beta * odds(x)))

    slope = -beta / (1 + mpmath.exp(beta * odds(at))) / -mpmath.expm1(at)
    return curve(at) + slope * (avg - at)


def asft(chosen: Number, rejected: Number) -> Number:
    beta = mpf("0.5")
    return -mpf("0.3") * chosen + mpf("0.7") * (term(chosen, beta) + term(rejected, -beta))


def orpo(chosen: Number, rejected: Number) -> Number:
    def continued(avg: Number) -> Number:
        at = min(avg, -FLOOR)
        return odds(at) - (avg - at) / mpmath.expm1(at)

    return -chosen + mpf("0.1") * mpmath.log1p(mpmath.exp(-(continued(chosen) - continued(rejected))))


def slopes(loss, chosen: Number, rejected: Number) -> tuple[Number, Number]:
    """Derivatives by central differences of 60 digits: wrong by 1e-20 of them."""

    def along(f, x: Number) -> Number:
        step = x * mpf("1e-20")
        return (f(x + step) - f(x - step)) / (2 * step)

    return along(lambda x: loss(x, rejected), chosen), along(lambda x: loss(chosen, x), rejected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["asft", "orpo"])
def test_averages_from_1e_12_to_1e4(name, backend):
    """Two vocabulary entries whose logits are z and 0 give any average; all pairs of chosen and rejected at once.

    fp32 logits. The call's own log-probabilities go into mpmath, so that what is compared is the loss: float64 up to
    its one rounding, with the roundings of a dozen functions; the ASFT kernel computes terms in fp32.
    """
    averages = [mpf(x) for x in AVERAGES]
    pairs = [(a, b) for a in averages for b in averages]
    if backend == "triton":
        pairs = pairs[::5]  # a program each; every average still stands on either side
    z = [-mpmath.log(mpmath.expm1(-avg)) for side in zip(*pairs, strict=True) for avg in side]
    hidden = torch.zeros(len(z), 2, 1)
    hidden[:, 0, 0] = torch.tensor([float(x) for x in z])
    labels = torch.tensor([[IGNORE, 0]]).repeat(len(z), 1)
    weight = line([1, 0])
    avg = fused_linear_logps(hidden, weight, labels, backend=backend)[:, 0].detach()
    hidden.requires_grad_()
    if name == "asft":
        loss = fused_asft_loss(
            hidden, weight, labels, lam=0.7, beta=0.5, sft_weight=0.3, reduction="none", backend=backend
        )
    else:
        loss = fused_preference_loss(hidden, weight, labels, "orpo", reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    half = len(pairs)
    exact = {"asft": asft, "orpo": orpo}[name]
    error = 24 * unit_roundoff(torch.float32)
    for i in range(half):
        chosen, rejected = (mpf(avg[row].item()) for row in (i, half + i))
        value = exact(chosen, rejected)
        assert abs(mpf(loss[i].item()) - value) <= error * max(abs(value), mpf("1e-30")), (i, AVERAGES)
        for row, slope, own in zip((i, half + i), slopes(exact, chosen, rejected), (chosen, rejected), strict=True):
            right = slope * -mpmath.expm1(own)  # dlogp/dz = 1 - p
            size = abs(right) + abs(mpf("0.3") * mpmath.expm1(own)) * (name == "asft")
            assert abs(mpf(grad[row, 0, 0].item()) - right) <= 2 * error * size + mpf("1e-37"), (i, row, own)

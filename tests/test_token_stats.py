"""Figures beside the log-probabilities: values and gradients against float64 on whole logits, and what they cost."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from asft_kernels import TokenStats, fused_linear_logps
from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES
from bounds import fp32_bound, relative_error, rounded_once
from cases import IGNORE, Case, gemms, make_case, one_label_far_below

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
CAPPED = {"softcap": 20.0, "logit_scale": 0.5}


def oracle(case: Case, *, softcap: float | None = None, logit_scale: float = 1.0) -> tuple[dict[str, Tensor], float]:
    """The figures in float64, in the labels' shape with labels shifted, and the largest |z|."""
    exact = case.to(torch.float64)
    z = exact.hidden[:, :-1] @ exact.weight.T + (0 if exact.bias is None else exact.bias)
    z = logit_scale * z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    labels = case.labels[:, 1:]
    valid = labels != IGNORE
    logp = z.log_softmax(-1)
    p = logp.exp()
    own = labels.clamp(min=0)[..., None]
    figures = {
        "logps": logp.gather(-1, own)[..., 0],
        "lse": z.logsumexp(-1),
        "mean_logits": z.mean(-1),
        "entropy": -(p * logp.clamp(min=-1e300)).sum(-1),
        "is_top1": (z <= z.gather(-1, own)).all(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
    }
    case.exact = exact
    padded = {k: torch.nn.functional.pad(x.masked_fill(~valid, 0), (0, 1)) for k, x in figures.items()}
    return padded, z.detach().masked_fill(z.detach() == -torch.inf, 0).abs().max().item()


def stats_of(case: Case, **options) -> TokenStats:
    stats = fused_linear_logps(case.hidden, case.head, case.labels, return_stats=True, **options)
    assert isinstance(stats, TokenStats)
    return stats


CASES = {
    "plain": dict(),
    "bias": dict(bias=True),
    "odd": dict(rows=2, T=40, D=43, V=251, bias=True),
    "peaked": dict(rows=3, T=30, D=32, V=130, peaked=True, spread=2.0),  # logits of 60 nats, for the label and others
}


@pytest.mark.parametrize("options", [{}, CAPPED, {"logit_scale": 1.7}], ids=["plain", "capped", "scaled"])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend, kind, options):
    """fp32. The entropy is a sum of p ln p: an error dz of the logits makes at most 2 dz of it where all p are alike,
    and log sum p^2 errs by 2 dz."""
    case = make_case(**CASES[kind])
    exact, largest = oracle(case, **options)
    got = stats_of(case, backend=backend, chunk_size=40, **options)
    for name in ("logps", *NAMES):
        value = getattr(got, name)
        assert value.shape == case.labels.shape
        if name == "is_top1":
            assert value.dtype == torch.bool
            assert torch.equal(value, exact[name])
        else:
            assert value.dtype == torch.float32
            print(name, relative_error(value, exact[name]), fp32_bound(largest))
            assert relative_error(value, exact[name]) <= 2 * fp32_bound(largest)


WEIGHTS = {"logps": 1.0, "lse": 0.3, "mean_logits": 4.0, "entropy": -0.7}  # of each figure's part of a loss


def loss_of(figures, names) -> Tensor:
    """Each token's figures with factors of their own, so that no two rows are treated alike."""
    total = 0.0
    for name in names:
        x = figures[name] if isinstance(figures, dict) else getattr(figures, name)
        gen = torch.Generator().manual_seed(len(name))
        total = total + WEIGHTS[name] * (x * torch.randn(x.shape, generator=gen).to(x)).sum()
    return total


def subsets(names):
    return [part for size in range(1, len(names) + 1) for part in combinations(names, size)]


def exact_gradients(case: Case, names, **options) -> tuple[list[Tensor], float]:
    figures, largest = oracle(case, **options)
    return list(torch.autograd.grad(loss_of(figures, names), case.exact.leaves)), largest


def gradients(case: Case, names, **options) -> list[Tensor]:
    asked = [name for name in names if name != "logps"]
    stats = fused_linear_logps(
        case.hidden, case.head, case.labels, return_stats=asked or True, differentiable=asked, **options
    )
    return list(torch.autograd.grad(loss_of(stats, names), case.leaves))


@pytest.mark.parametrize("cache_bytes", [None, 0, 40_000], ids=["cached", "recomputed", "some cached"])
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("names", subsets(("logps", *DIFFERENTIABLE)), ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, names, options, cache_bytes):
    case = make_case(rows=2, T=40, D=43, V=251, bias=True)
    exact, largest = exact_gradients(case, names, **options)
    got = gradients(case, names, backend=backend, chunk_size=100, cache_bytes=cache_bytes, **options)
    for g, want in zip(got, exact, strict=True):
        print(relative_error(g, want))
        assert relative_error(g, want) <= 2 * fp32_bound(largest)

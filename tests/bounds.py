"""Tolerances, each with its derivation. Error is relative in the Frobenius norm, against float64 on the same inputs."""

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    assert got.isfinite().all(), "not finite, or never written"
    norm = exact.norm().item()
    return (got - exact).norm().item() / norm if norm else got.norm().item()


def fp32_bound(max_logit: float) -> float:
    """2e-6 * max(1, max|z| / 32).

    An fp32 logit carries an absolute error of about |z| * 2**-24 * a small constant of the summation order; exp
    turns it into a relative one of the same size. At |z| = 32 that is 32 * 6e-8 = 1.9e-6; below, the roundings
    of sums and products alone stay well under 2e-6.
    """
    return 2e-6 * max(1.0, max_logit / 32)


def rounded_once(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """The error that one rounding of the exact result into dtype makes: what no method can go below."""
    return relative_error(exact.double().to(dtype), exact)


def entry_bound(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, scale=1.0, cap: float | None = None) -> float:
    """Largest relative error of an exponential of a logit, and of what is summed of them.

    A logit is a sum of D products and a bias, then scaled, less a reference and in other units: D + 6 roundings of a
    number up to |scale| (|H||W|' + |b|), and the difference of two such counts twice. Sums over the vocabulary and the
    tokens add a rounding a term; 20 for the functions and products after them. The slope of a softcap has the logit's
    error twice over the cap; the cap itself is rounded once. float32 inside for 16-bit inputs.
    """
    hidden, weight = hidden.detach(), weight.detach()
    offset = 0 if bias is None else bias.detach().double().abs().nan_to_num(0, 0, 0)  # of -inf there is no error
    sizes = hidden.double().abs() @ weight.double().abs().T + offset
    largest = abs(scale) * (sizes.max().item() if sizes.numel() else 0.0)
    exponent = 2 * (hidden.shape[-1] + 6) * largest * (1 if cap is None else 1 + 2 / cap) + (cap or 0)
    unit = unit_roundoff(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return unit * (exponent + len(weight) + hidden[..., 0].numel() + 20)

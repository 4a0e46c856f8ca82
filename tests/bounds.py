"""Tolerances, each with its derivation. Error is relative in the Frobenius norm, against float64 on the same inputs."""

import torch


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

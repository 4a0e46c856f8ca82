"""Figures of a token beside its log-probability, from the same pass: which are wanted, their values, their gradients.

With r the reference, L_v = z_v - r, E_v = exp(L_v) for v != y and total = sum E + exp(z_y - r):

    lse               r + ln total
    mean_logits       r + sum over all v of L_v / V
    entropy           (ln(total) sum E - sum E L) / total - p_y ln p_y
    is_top1           no logit of the token's row passes the label's, both taken from the same product
    log_sum_sq_probs  ln (sum E^2 / total^2 + p_y^2)

As for logp, the label's own part is kept apart, so entropies near 0 keep their digits. With upstream gradients g of
logp, q of lse, e of the entropy H and m of mean_logits, c_v a softcap's slope (1 without one):

    du_v = c_v (E_v (A + B L_v) + M),   A = (q - g + e (ln total - H)) / total,   B = -e / total,   M = m / V
    du_y = c_y (g (1 - p_y) + q p_y - e p_y (ln p_y + H) + M)

so that dH takes O = sum E c W as ever, O2 = sum E L c W (one more product) for e, and sum c W for m: one more product
with a softcap, without one the same for every token.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("lse", "mean_logits", "entropy", "is_top1", "log_sum_sq_probs")
DIFFERENTIABLE = NAMES[:3]


@dataclass(frozen=True)
class Wanted:
    """Names of the figures to compute, and those among them that a gradient may come back for."""

    names: frozenset[str] = frozenset()
    differentiable: frozenset[str] = frozenset()

    @staticmethod
    @lru_cache
    def parse(names: str, differentiable: str) -> "Wanted":
        """From words in a string, which is what an operator takes."""
        return Wanted(frozenset(names.split()), frozenset(differentiable.split()))

    def recomputes(self, softcap: float | None) -> bool:
        """Whether phase 2 cannot do with E c: it then needs E and c apart, so no exponentials are kept for it."""
        return softcap is not None and not self.differentiable.isdisjoint(("entropy", "mean_logits"))


class Stats(NamedTuple):
    """What phase 1 leaves. A tensor of shape (0,) where nothing asks for it."""

    lse: Tensor  # (N,), as the next two in the dtype of the log-probabilities
    mean_logits: Tensor
    entropy: Tensor
    is_top1: Tensor  # (N,) bool
    log_sum_sq_probs: Tensor
    log_acc: Tensor  # (N, D): O2 = sum_{v != y} E_v L_v c_v W_v, L in the backend's unit of logits
    slope_acc: Tensor  # (N, D): sum_v c_v W_v; (1, D) without a softcap


class StatsGrads(NamedTuple):
    """(N,) upstream gradients; None where there is none."""

    lse: Tensor | None
    mean_logits: Tensor | None
    entropy: Tensor | None


class Sums(NamedTuple):
    """What the chunks say of each token, (N,) each, in nats; None where nothing asks for it."""

    mean_logits: Tensor | None = None
    logs: Tensor | None = None  # sum of E L
    squares: Tensor | None = None  # sum of (E / total)^2
    is_top1: Tensor | None = None


def close(
    wanted: Wanted, sums: Sums, *, ref: Tensor, log_total: Tensor, one_minus_p: Tensor,
    inv_total: Tensor, logps: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The five figures of Stats, in order. ref and log_total = ln total in nats."""
    figures = {"lse": ref + log_total} if "lse" in wanted.names else {}
    p_y = logps.exp()
    if sums.mean_logits is not None:
        figures["mean_logits"] = sums.mean_logits
    if sums.logs is not None:
        own = p_y * _finite(logps)
        # No entropy is below 0; the sums' roundings might be.
        figures["entropy"] = (log_total * one_minus_p - sums.logs * inv_total - own).clamp_(min=0)
    if sums.is_top1 is not None:
        figures["is_top1"] = sums.is_top1
    if sums.squares is not None:
        figures["log_sum_sq_probs"] = (sums.squares + p_y.square()).log_().clamp_(max=0)
    return [figures.get(name, logps.new_empty(0, dtype=stat_dtype(name, logps.dtype))) for name in NAMES]


def stat_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.bool if name == "is_top1" else dtype


class RowFactors(NamedTuple):
    """A gradient's factors, (N,) each, with scale: see the head of this file. None where it has no such part."""

    label: Tensor  # du_y, without c_y M
    linear: Tensor  # A
    log: Tensor | None = None  # B
    uniform: Tensor | None = None  # M

    def label_entry(self, label_slope: Tensor | None) -> Tensor:
        """All of du_y."""
        if self.uniform is None:
            return self.label
        return self.label + (self.uniform if label_slope is None else self.uniform * label_slope)


def row_factors(
    grad_logps: Tensor, grads: StatsGrads | None, *, logps: Tensor, one_minus_p: Tensor, inv_total: Tensor,
    entropy: Tensor | None, label_slope: Tensor | None, scale: float, vocab: int,
) -> RowFactors:  # fmt: skip
    g = scale * grad_logps.to(logps.dtype)
    label = g * (one_minus_p if label_slope is None else one_minus_p * label_slope)
    if grads is None:
        return RowFactors(label, -(g * inv_total))
    linear, log, uniform = -g, None, None
    p_y = logps.exp() if label_slope is None else logps.exp() * label_slope
    if grads.lse is not None:
        q = scale * grads.lse
        label, linear = label + q * p_y, linear + q
    if grads.entropy is not None and entropy is not None:
        e = scale * grads.entropy
        label = label - e * (p_y * (_finite(logps) + entropy))
        linear = linear - e * (inv_total.log() + entropy)
        log = -e * inv_total
    if grads.mean_logits is not None:
        uniform = grads.mean_logits * (scale / vocab)
    return RowFactors(label, linear * inv_total, log, uniform)


def _finite(logps: Tensor) -> Tensor:
    """So that p ln p is 0 where p is."""
    return logps.clamp(min=torch.finfo(logps.dtype).min)

"""AOT: distributions of margins or rewards are compared quantile by quantile, not pair by pair."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    LossTerms,
    Objective,
    counting,
    require_input,
    require_number,
    require_smoothing,
    reward_metrics,
)
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class AOT(Objective):
    """Alignment via Optimal Transport, paired, arXiv 2406.05882, as TRL has it.

        L_k = -(1 - e) log sigmoid(beta d_k) - e log sigmoid(-beta d_k)
        d_k = (k-th smallest S_w - S_l) - (k-th smallest ref_S_w - ref_S_l), over the pairs of the batch that count

    A pair's loss is that of its own margin's rank. The batch of one call is sorted, so small batches are noisy, and
    the loss changes with their size and the number of ranks. beta: > 0, default 0.1. label_smoothing e: 0 (default)
    to below 0.5.
    """

    arxiv: ClassVar[str] = "2406.05882"
    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        _check("aot", self.beta, self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("aot", policy, ref_logps)).chunk(2)
        ref_chosen, ref_rejected = require_input("aot", "ref_logps", ref_logps, len(policy.sum)).chunk(2)
        margin = policy.chosen.sum - policy.rejected.sum
        against = _of_same_rank(margin, ref_chosen - ref_rejected, counting(policy, paired=True))
        loss = _smoothed(self.beta * (margin - against), self.label_smoothing)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


@dataclass(frozen=True)
class AOTUnpaired(Objective):
    """Alignment via Optimal Transport, unpaired, arXiv 2406.05882, as TRL has it.

        L_k as in AOT,   d_k = (k-th smallest S_w - ref_S_w) - (k-th smallest S_l - ref_S_l)

    Which rejected answer belongs to which chosen one is not read, but both sides are as many, and a row counts if its
    pair does. A pair's loss is that of its chosen answer's rank. beta, label_smoothing: as AOT's.
    """

    arxiv: ClassVar[str] = "2406.05882"
    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        _check("aot_unpaired", self.beta, self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("aot_unpaired", policy, ref_logps)).chunk(2)
        against = _of_same_rank(chosen, rejected, counting(policy, paired=True))
        loss = _smoothed(chosen - against, self.label_smoothing)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


def _of_same_rank(values: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    """For each of values, (B,), the one of others with the same rank among what counts; the rest is after that."""
    by_value, by_other = (torch.where(counts, x.detach(), torch.inf).argsort(stable=True) for x in (values, others))
    return others.index_select(0, by_other).index_select(0, by_value.argsort())


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    return -logsigmoid(h) + label_smoothing * h  # log sigmoid(-h) = log sigmoid(h) - h


def _check(name: str, beta: float, label_smoothing: float) -> None:
    require_number(name, "beta", beta, above_zero=True)
    require_smoothing(name, label_smoothing)

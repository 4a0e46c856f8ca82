"""Supervised fine-tuning: the plain likelihood of each row, with what is added to it per token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    LossTerms,
    Objective,
    counting,
    require_choice,
    require_number,
    share_of_token_mean,
)

UNIFORM = "uniform_nll"  # lse - mean_logits: the mean of -log p over the vocabulary
LSE_SQUARE = "lse_square"
TOP1 = "is_top1"


@dataclass(frozen=True)
class SFT(Objective):
    """Negative log-likelihood of each row (rows are not paired).

        loss of a token = (1 - e) (-log p) + e mean_v(-log p_v) + lse_square_scale lse^2

    normalization: "sequence" (default): -avg, every row counts the same; "sum": -sum, every token of the batch
        does, and long batches more; "token": shares of the mean over all tokens of the batch, -sum * rows / tokens,
        so that reduction="mean" is that mean, as in language modelling and in TRL's NLL terms.
    lse_square_scale: weight of the z-loss, the square of the log of the sum of exponentials (arXiv 2204.02311,
        section 5), >= 0, default 0. label_smoothing e: 0 (default) to 1, arXiv 1512.00567, section 7.
    token_accuracy: whether to report the share of labels that are the largest logit, each times its token_weights where
        the call has some, as the metric of that name.
        Default False. Each of the three asks the call for figures per token, at no further matrix product.
    """

    normalization: str = "sequence"
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    token_accuracy: bool = False
    paired: ClassVar[bool] = False

    def __post_init__(self):
        require_choice("sft", "normalization", self.normalization, ("sequence", "sum", "token"))
        require_number("sft", "lse_square_scale", self.lse_square_scale)
        require_number("sft", "label_smoothing", self.label_smoothing)
        if self.label_smoothing > 1:
            raise ValueError(f"sft: label_smoothing: got {self.label_smoothing!r}, need a number from 0 to 1")
        if not isinstance(self.token_accuracy, bool):
            raise ValueError(f"sft: token_accuracy: got {self.token_accuracy!r}, need True or False")

    @property
    def stats_with_grad(self) -> tuple[str, ...]:
        if self.label_smoothing:
            return ("lse", "mean_logits")
        return ("lse",) if self.lse_square_scale else ()

    @property
    def stats(self) -> tuple[str, ...]:
        return (*self.stats_with_grad, "is_top1") if self.token_accuracy else self.stats_with_grad

    def per_token(self, logps: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = {}
        if self.label_smoothing:
            terms[UNIFORM] = stats["lse"] - stats["mean_logits"]
        if self.lse_square_scale:
            terms[LSE_SQUARE] = stats["lse"].square()
        if self.token_accuracy:
            terms[TOP1] = stats["is_top1"].double()
        return terms

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        total = -policy.sum
        if self.label_smoothing:
            total = (1 - self.label_smoothing) * total + self.label_smoothing * policy.terms[UNIFORM]
        if self.lse_square_scale:
            total = total + self.lse_square_scale * policy.terms[LSE_SQUARE]
        length = policy.length.clamp(min=1)
        if self.normalization == "sequence":
            loss = total / length
        elif self.normalization == "sum":
            loss = total
        else:
            loss = share_of_token_mean(total, policy.length, counting(policy, paired=False))
        metrics = {"token_accuracy": policy.terms[TOP1] / length} if self.token_accuracy else {}
        return LossTerms(loss, -policy.avg, torch.zeros_like(loss), metrics)

"""Supervised fine-tuning: the plain likelihood of each row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asft_kernels.objectives.base import LossTerms, Objective, require_choice
from asft_kernels.sequence import Logps


@dataclass(frozen=True)
class SFT(Objective):
    """Negative log-likelihood of each row (rows are not paired).

    normalization: "sequence" (default): -avg, every row counts the same; "sum": -sum, every token of the batch
        does, and long batches more; "token": shares of the mean over all tokens of the batch, -sum * rows / tokens,
        so that reduction="mean" is that mean, as in language modelling and in TRL's NLL terms.
    """

    normalization: str = "sequence"
    paired: ClassVar[bool] = False

    def __post_init__(self):
        require_choice("sft", "normalization", self.normalization, ("sequence", "sum", "token"))

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        if self.normalization == "sequence":
            loss = -policy.avg
        elif self.normalization == "sum":
            loss = -policy.sum
        else:
            loss = -policy.sum * (policy.length > 0).sum() / policy.length.sum().clamp(min=1)
        return LossTerms(loss, -policy.avg, torch.zeros_like(loss))

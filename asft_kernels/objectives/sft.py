"""Supervised fine-tuning: the plain likelihood of each row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asft_kernels.objectives.base import LossTerms, Objective
from asft_kernels.sequence import Logps


@dataclass(frozen=True)
class SFT(Objective):
    """L = -avg of each row: a mean per sequence, then the reduction over sequences (rows are not paired)."""

    paired: ClassVar[bool] = False

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        return LossTerms(-policy.avg, -policy.avg, torch.zeros_like(policy.avg))

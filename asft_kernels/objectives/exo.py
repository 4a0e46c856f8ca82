"""EXO: the reverse KL to the preferences' distribution, where DPO minimises the forward one."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    LossTerms,
    Objective,
    require_number,
    require_smoothing,
    reward_metrics,
    sigmoid,
)
from asft_kernels.objectives.divergences import require_divergence
from asft_kernels.objectives.dpo import score


@dataclass(frozen=True)
class ExoPair(Objective):
    """Efficient Exact Optimization on pairs, EXO-pref, arXiv 2402.00856, Eq. 16, as TRL and Liger have it.

        L = q [log q - log(1 - e)] + (1 - q) [log(1 - q) - log e],   q = sigmoid(h),   h as in DPO

    beta: > 0, default 0.1. label_smoothing e: > 0 and below 0.5, default 1e-3, the paper's.
    f_divergence_type, f_alpha_divergence_coef: as DPO's.
    """

    arxiv: ClassVar[str] = "2402.00856"
    beta: float = 0.1
    label_smoothing: float = 1e-3
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("exo_pair", "beta", self.beta, above_zero=True)
        require_number("exo_pair", "label_smoothing", self.label_smoothing, above_zero=True)
        require_smoothing("exo_pair", self.label_smoothing)
        require_divergence("exo_pair", self.f_divergence_type, self.f_alpha_divergence_coef)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * score("exo_pair", self, policy, ref_logps)).chunk(2)
        h = chosen - rejected
        e = self.label_smoothing
        loss = sigmoid(h) * (logsigmoid(h) - math.log1p(-e)) + sigmoid(-h) * (logsigmoid(-h) - math.log(e))
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

"""APO: where both answers of a pair should go, not their margin alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics, sigmoid
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class ApoZero(Objective):
    """Anchored Preference Optimization, arXiv 2408.06266, Eq. 7: chosen answers up, rejected ones down.

        L = 1 - sigmoid(r_w) + sigmoid(r_l),   r = beta (S - ref_S)

    For chosen answers that are better than what the model gives by itself. beta: > 0, default 0.1.
    """

    arxiv: ClassVar[str] = "2408.06266"
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("apo_zero", "beta", self.beta, above_zero=True)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("apo_zero", policy, ref_logps)).chunk(2)
        loss = sigmoid(-chosen) + sigmoid(rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


@dataclass(frozen=True)
class ApoDown(Objective):
    """Anchored Preference Optimization, arXiv 2408.06266, Eq. 8: both down, rejected answers further.

        L = sigmoid(r_w) + 1 - sigmoid(r_w - r_l),   r = beta (S - ref_S)

    For chosen answers that are worse than what the model gives by itself. beta: > 0, default 0.1.
    """

    arxiv: ClassVar[str] = "2408.06266"
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("apo_down", "beta", self.beta, above_zero=True)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("apo_down", policy, ref_logps)).chunk(2)
        loss = sigmoid(chosen) + sigmoid(rejected - chosen)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

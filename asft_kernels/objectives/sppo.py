"""SPPO with hard probabilities: each log-ratio is regressed on its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics
from asft_kernels.objectives.dpo import log_ratio, require_squarable


@dataclass(frozen=True)
class SppoHard(Objective):
    """Self-Play Preference Optimization, arXiv 2405.00675, Eq. 4.7, with P = 1 for chosen answers and 0 for the others.

        L = (S_w - ref_S_w - 1 / (2 beta))^2 + (S_l - ref_S_l + 1 / (2 beta))^2

    beta: 1 / eta of the paper, > 0, default 0.1. The paper's own P comes from a preference model, and its answers
    from the policy; this is TRL's and Liger's `sppo_hard`.
    """

    arxiv: ClassVar[str] = "2405.00675"
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("sppo_hard", "beta", self.beta, above_zero=True)
        require_squarable("sppo_hard", self.beta)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = log_ratio("sppo_hard", policy, ref_logps).chunk(2)
        goal = 0.5 / self.beta
        loss = (chosen - goal).square() + (rejected + goal).square()
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(self.beta * chosen, self.beta * rejected))

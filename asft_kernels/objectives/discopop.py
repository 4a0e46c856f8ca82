"""DiscoPOP: a loss found by a language model, between DPO's and the exponential one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics, sigmoid
from asft_kernels.objectives.divergences import require_divergence
from asft_kernels.objectives.dpo import score


@dataclass(frozen=True)
class DiscoPOP(Objective):
    """Log-Ratio Modulated Loss, arXiv 2406.08414, Eq. 5.

        L = (1 - m) [-log sigmoid(h)] + m exp(-h),   m = sigmoid(h / discopop_tau),   h as in DPO

    beta: > 0, default 0.1. discopop_tau: > 0, default 0.05, the paper's; above 1 the exponential has no bound.
    f_divergence_type, f_alpha_divergence_coef: as DPO's.
    """

    arxiv: ClassVar[str] = "2406.08414"
    beta: float = 0.1
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("discopop", "beta", self.beta, above_zero=True)
        require_number("discopop", "discopop_tau", self.discopop_tau, above_zero=True)
        require_divergence("discopop", self.f_divergence_type, self.f_alpha_divergence_coef)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * score("discopop", self, policy, ref_logps)).chunk(2)
        h = chosen - rejected
        mix = h / self.discopop_tau
        # m exp(-h) in one exponential: by itself exp(-h) overflows where m is 0.
        loss = -sigmoid(-mix) * logsigmoid(h) + (logsigmoid(mix) - h).exp()
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

"""Hinge losses of whole answers: SLiC's, without a reference, and the one on DPO's log-ratios."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, relu

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics
from asft_kernels.objectives.divergences import require_divergence
from asft_kernels.objectives.dpo import score


@dataclass(frozen=True)
class Hinge(Objective):
    """SLiC's hinge, arXiv 2305.10425, as RSO (arXiv 2309.06657, section 3) writes it. Needs no reference model.

        L = max(0, 1 - gamma (S_w - S_l))

    gamma: > 0, default 0.05, RSO's best; SLiC's margin is 1 / gamma. SLiC's regulariser is a sum: "hinge + 0.1 sft".
    TRL's `hinge` is hinge_norm.
    """

    arxiv: ClassVar[str] = "2305.10425"
    gamma: float = 0.05

    def __post_init__(self):
        require_number("hinge", "gamma", self.gamma, above_zero=True)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        return _hinge(self.gamma * policy.sum, policy)


@dataclass(frozen=True)
class HingeNorm(Objective):
    """RSO's hinge-norm, arXiv 2309.06657, section 3: the hinge on log-ratios. TRL calls it `hinge`, and gamma beta.

        L = max(0, 1 - gamma [(S_w - ref_S_w) - (S_l - ref_S_l)])

    gamma: > 0, default 0.05. f_divergence_type, f_alpha_divergence_coef: as DPO's.
    """

    arxiv: ClassVar[str] = "2309.06657"
    gamma: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("hinge_norm", "gamma", self.gamma, above_zero=True)
        require_divergence("hinge_norm", self.f_divergence_type, self.f_alpha_divergence_coef)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        return _hinge(self.gamma * score("hinge_norm", self, policy, ref_logps), policy)


def _hinge(reward: Tensor, policy: Logps) -> LossTerms:
    chosen, rejected = reward.chunk(2)
    loss = relu(1 - (chosen - rejected))
    return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

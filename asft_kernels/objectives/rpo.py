"""RPO: DPO that also imitates the chosen answer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    LossTerms,
    Objective,
    counting,
    require_choice,
    require_number,
    reward_metrics,
    share_of_token_mean,
)
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class RPO(Objective):
    """Regularized Preference Optimization, arXiv 2405.16436, Eq. 4.8; the baseline policy's answer is the chosen one.

        L = DPO - eta beta S_w                      "sum" (default): the paper's, weighed by the product eta beta
        L = DPO - eta avg_w                         "sequence": the authors' OpenRLHF code
        L = DPO - eta S_w pairs / (tokens of w)     "token": mean over all chosen tokens of the batch, TRL's "sft"

    beta: of DPO, > 0, default 0.1 (the authors: 0.01 and 0.05; 0.5 for "sequence").
    eta: weight of the likelihood, >= 0, default 0.005, the authors' for "sum"; theirs for "sequence" is 0.2.
    Only in "sum" does changing beta change the weight of the likelihood. Not Iterative Reasoning Preference
    Optimization (2404.19733, the origin of TRL's old rpo_alpha), nor Reward-aware Preference Optimization (2502.00203).
    """

    arxiv: ClassVar[str] = "2405.16436"
    beta: float = 0.1
    eta: float = 0.005
    normalization: str = "sum"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("rpo", "beta", self.beta, above_zero=True)
        require_number("rpo", "eta", self.eta)
        require_choice("rpo", "normalization", self.normalization, ("sum", "sequence", "token"))

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("rpo", policy, ref_logps)).chunk(2)
        dpo = -logsigmoid(chosen - rejected)
        return LossTerms(dpo + self._imitation(policy), -policy.chosen.avg, dpo, reward_metrics(chosen, rejected))

    def _imitation(self, policy: Logps) -> Tensor:
        chosen = policy.chosen
        if self.normalization == "sum":
            return -self.eta * self.beta * chosen.sum
        if self.normalization == "sequence":
            return -self.eta * chosen.avg
        return -self.eta * share_of_token_mean(chosen.sum, chosen.length, counting(policy, paired=True))

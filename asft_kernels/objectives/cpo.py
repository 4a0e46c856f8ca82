"""CPO: DPO without the reference, held up by the likelihood of the chosen answer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics
from asft_kernels.sequence import Logps


@dataclass(frozen=True)
class CPO(Objective):
    """Contrastive Preference Optimization, arXiv 2401.08417, Eq. 3. Needs no reference model.

        L = -log sigmoid(beta (S_w - S_l)) - alpha avg_w

    beta: > 0, default 0.1. alpha: weight of the likelihood term, >= 0, default 1 (TRL's cpo_alpha).
    The likelihood is a mean per sequence. TRL's and Liger's is one over all chosen tokens of the batch:
    `WeightedSum(((1.0, CPO(alpha=0)), (1.0, SFT("token"))))`.
    """

    beta: float = 0.1
    alpha: float = 1.0
    uses_nll_labels: ClassVar[bool] = True

    def __post_init__(self):
        require_number("cpo", "beta", self.beta, above_zero=True)
        require_number("cpo", "alpha", self.alpha)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * policy.sum).chunk(2)
        sft = -policy.chosen.nll_avg
        align = -logsigmoid(chosen - rejected)
        return LossTerms(align + self.alpha * sft, sft, align, reward_metrics(chosen, rejected))

"""CPO: DPO without the reference, held up by the likelihood of the chosen answer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    NLL_NORMALIZATIONS,
    LossTerms,
    Objective,
    chosen_nll,
    require_choice,
    require_number,
    require_smoothing,
    reward_metrics,
)


@dataclass(frozen=True)
class CPO(Objective):
    """Contrastive Preference Optimization, arXiv 2401.08417, Eq. 3. Needs no reference model.

        L = -(1 - e) log sigmoid(h) - e log sigmoid(-h) - alpha avg_w,   h = beta (S_w - S_l)

    beta: > 0, default 0.1. alpha: weight of the likelihood term, >= 0, default 1 (TRL's cpo_alpha).
    label_smoothing e: share of pairs labelled the wrong way round, 0 (default, the paper) to below 0.5.
    nll_normalization: "sequence" (default): the likelihood is a mean per answer; "token": each answer's share of the
        mean over all chosen tokens of the batch, TRL's and Liger's.
    """

    arxiv: ClassVar[str] = "2401.08417"
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    nll_normalization: str = "sequence"
    uses_nll_labels: ClassVar[bool] = True

    def __post_init__(self):
        require_number("cpo", "beta", self.beta, above_zero=True)
        require_number("cpo", "alpha", self.alpha)
        require_smoothing("cpo", self.label_smoothing)
        require_choice("cpo", "nll_normalization", self.nll_normalization, NLL_NORMALIZATIONS)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * policy.sum).chunk(2)
        sft = chosen_nll(policy, self.nll_normalization)
        h = chosen - rejected
        align = -logsigmoid(h) + self.label_smoothing * h  # log sigmoid(-h) = log sigmoid(h) - h
        return LossTerms(align + self.alpha * sft, sft, align, reward_metrics(chosen, rejected))

"""ORPO, arXiv 2403.07691, with the temperature of arXiv 2502.01237."""

from dataclasses import dataclass
from typing import ClassVar

import torch
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
    reward_metrics,
)
from asft_kernels.objectives.log_odds import FLOOR, log_odds


@dataclass(frozen=True)
class ORPO(Objective):
    """Odds-ratio preference optimisation, arXiv 2403.07691, Eq. 6 and 7. Needs no reference model.

        L = -avg_w - lam log sigmoid(beta (f_w - f_l)),   f = log(p / (1 - p)),   p = exp(avg)

    lam: weight of the odds-ratio term, >= 0, default 0.1 (TRL and Liger call it beta).
    beta: temperature on the log-odds ratio, > 0, default 1: the paper's loss.
    nll_normalization: "sequence" (default): the likelihood is a mean per answer; "token": each answer's share of the
        mean over all chosen tokens of the batch, TRL's and Liger's. Over nll_labels where given (the authors take
        prompt and answer).
    """

    arxiv: ClassVar[str] = "2403.07691"
    lam: float = 0.1
    beta: float = 1.0
    nll_normalization: str = "sequence"
    uses_nll_labels: ClassVar[bool] = True

    def __post_init__(self):
        require_number("orpo", "lam", self.lam)
        require_number("orpo", "beta", self.beta, above_zero=True)
        require_choice("orpo", "nll_normalization", self.nll_normalization, NLL_NORMALIZATIONS)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * continued_log_odds(policy.avg)).chunk(2)
        sft = chosen_nll(policy, self.nll_normalization)
        align = -logsigmoid(chosen - rejected)
        return LossTerms(sft + self.lam * align, sft, align, reward_metrics(chosen, rejected))


def continued_log_odds(avg: Tensor) -> Tensor:
    """f, and past -FLOOR the straight line that goes on from there: C1, with a slope of 1 / FLOOR at most.

    A rejected answer of p = 1 is pushed down hardest, not let go; see log_odds.py on why not by a clamp.
    """
    floored = avg.clamp(max=-FLOOR)
    # avg - floored is 0, with gradient 0, below the floor; past it, all the gradient there is.
    return log_odds(avg) - (avg - floored) / torch.expm1(floored)

"""SimPO: a margin between means per token, without a reference."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, require_smoothing, reward_metrics


@dataclass(frozen=True)
class SimPO(Objective):
    """SimPO, arXiv 2405.14734, Eq. 6. Needs no reference model.

        L = -(1 - e) log sigmoid(h) - e log sigmoid(-h),   h = beta (avg_w - avg_l) - gamma

    beta: > 0, default 2. gamma: target margin, >= 0, default 0.5 = beta * gamma_beta_ratio of the authors' code
    (there 0.25), TRL's simpo_gamma. TRL's simpo adds a likelihood term by default (cpo_alpha = 1): here "simpo + sft".
    label_smoothing e: share of pairs labelled the wrong way round, 0 (default, the paper) to below 0.5.
    """

    arxiv: ClassVar[str] = "2405.14734"
    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        require_number("simpo", "beta", self.beta, above_zero=True)
        require_number("simpo", "gamma", self.gamma)
        require_smoothing("simpo", self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * policy.avg).chunk(2)
        h = chosen - rejected - self.gamma
        loss = -logsigmoid(h) + self.label_smoothing * h  # log sigmoid(-h) = log sigmoid(h) - h
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

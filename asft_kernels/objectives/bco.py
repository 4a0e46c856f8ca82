"""BCO: a classifier of good and bad answers, on pairs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class BcoPair(Objective):
    """Binary Classifier Optimization on pairs, arXiv 2404.04656, as TRL 1.16 and Liger have it: delta is 0.

        L = -log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta)),   r = beta (S - ref_S)

    The paper's delta, a running mean of rewards that TRL kept before version 1, is left out as they leave it out.
    beta: > 0, default 0.1.
    """

    arxiv: ClassVar[str] = "2404.04656"
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("bco_pair", "beta", self.beta, above_zero=True)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("bco_pair", policy, ref_logps)).chunk(2)
        loss = -logsigmoid(chosen) - logsigmoid(-rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

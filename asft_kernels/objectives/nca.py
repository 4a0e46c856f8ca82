"""NCA: noise-contrastive alignment of pairs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class NcaPair(Objective):
    """Noise Contrastive Alignment on pairs, arXiv 2402.05369, as TRL and Liger have it.

        L = -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l),   r = beta (S - ref_S)

    beta: > 0, default 0.1.
    """

    arxiv: ClassVar[str] = "2402.05369"
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("nca_pair", "beta", self.beta, above_zero=True)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("nca_pair", policy, ref_logps)).chunk(2)
        loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

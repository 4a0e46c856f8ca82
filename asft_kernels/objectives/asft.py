"""ASFT, arXiv 2409.10571, with the temperature of arXiv 2502.01237."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.asft_fused import asft_sequence_terms
from asft_kernels.objectives.base import LossTerms, Objective, require_number
from asft_kernels.objectives.log_odds import nll_of_odds


@dataclass(frozen=True)
class ASFT(Objective):
    """Aligned Supervised Fine-Tuning through Absolute Likelihood. Needs no reference model.

        L = -sft_weight * avg_w - lam * [ log sigmoid(beta f_w) + log sigmoid(-beta f_l) ]
        f = log(p / (1 - p)),  p = exp(avg)

    arXiv 2409.10571 as given by arXiv 2502.01237, section 2.4 (sum of both terms) and 3.1.2 (beta).
    At beta = 1 it is -(sft_weight + lam) avg_w - lam log(1 - p_l).
    lam: weight of the alignment term, >= 0, default 1 (some codebases call it beta).
    beta: temperature on the log-odds, > 0, default 1; 0.001 to 0.5 in the second of two stages.
    sft_weight: weight of the likelihood term, >= 0, default 1; 0 aligns alone (the second stage).
    """

    arxiv: ClassVar[str] = "2409.10571"
    lam: float = 1.0
    beta: float = 1.0
    sft_weight: float = 1.0
    uses_nll_labels: ClassVar[bool] = True

    def __post_init__(self):
        require_number("asft", "lam", self.lam)
        require_number("asft", "beta", self.beta, above_zero=True)
        require_number("asft", "sft_weight", self.sft_weight)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        sft = -policy.chosen.nll_avg
        align = nll_of_odds(policy.chosen.avg, self.beta) + nll_of_odds(policy.rejected.avg, -self.beta)
        return LossTerms(self.sft_weight * sft + self.lam * align, sft, align)

    def from_tokens(self, logps: Tensor, offsets: Tensor, backend: str) -> tuple[Logps, LossTerms] | None:
        """One Triton launch for all sequences: of its results only .loss is differentiable."""
        if backend != "triton" or type(self).__call__ is not ASFT.__call__:
            return None
        sums, _, sft, align, loss, _ = asft_sequence_terms(logps, offsets, self.lam, self.beta, self.sft_weight)
        return Logps(sums.double(), offsets.diff()), LossTerms(loss, sft, align)

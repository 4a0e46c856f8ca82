"""PoFT: supervised fine-tuning that prefers the model's likelihood to that of aligned models."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_input, require_number


@dataclass(frozen=True)
class PoFT(Objective):
    """Preference-oriented supervised Fine-Tuning, arXiv 2412.12865, Eq. 5 and 6. Rows are not paired.

        L = -log sigmoid(beta (avg - rbar) + gamma)

    ref_logps: (R,) rbar, the mean over aligned models of their mean log-probability per token (not a sum), each in
        its own tokens.
    beta: > 0, default 1. gamma: >= 0, default 0. The paper has neither; its code has both, at these values.
    The gradient is that of SFT times beta tau, tau = sigmoid(beta (rbar - avg) - gamma), reported as `weight`.
    """

    arxiv: ClassVar[str] = "2412.12865"
    beta: float = 1.0
    gamma: float = 0.0
    paired: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    reference_kind: ClassVar[str] = "mean"

    def __post_init__(self):
        require_number("poft", "beta", self.beta, above_zero=True)
        require_number("poft", "gamma", self.gamma)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        rbar = require_input("poft", "ref_logps", ref_logps, len(policy.sum))
        ahead = self.beta * (policy.avg - rbar) + self.gamma
        loss = -logsigmoid(ahead)
        return LossTerms(loss, -policy.avg, loss, {"weight": torch.sigmoid(-ahead.detach())})

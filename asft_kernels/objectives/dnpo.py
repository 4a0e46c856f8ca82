"""DNPO: the loss of the model, and that of the trainable noise on its reference's logits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_input, require_number, reward_metrics
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class DNPO(Objective):
    """Dynamic Noise Preference Optimization, arXiv 2502.05400: SPIN with a reference that is made noisy.

        model   L = -log sigmoid(u)
        noise   L = +log sigmoid(u) + alpha * mean(std^2)
        u = lam [(S_w - ref_S_w) - (S_l - noisy_ref_S_l)]

    ref_logps: (R,) sums, of the chosen rows under the reference as it is, of the rejected rows under its noisy logits
        (`fused_noisy_linear_logps`); without noise this is DPO with beta = lam. Calling the object gives the
        model's loss, `noise_loss` the noise's, each with the other side detached; `methods.dnpo` alternates.
    lam: scale of the margin, > 0. alpha: weight of the noise's mean square, >= 0, of `noise_loss` alone.
    The paper gives neither: 0.1 and 1.0 are our defaults. Its Eq. 10 leaves open what is detached: our reading,
    as docs/objectives/dnpo.md explains.
    """

    arxiv: ClassVar[str] = "2502.05400"
    lam: float = 0.1
    alpha: float = 1.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("dnpo", "lam", self.lam, above_zero=True)
        require_number("dnpo", "alpha", self.alpha)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.lam * log_ratio("dnpo", policy, ref_logps)).chunk(2)
        loss = -logsigmoid(chosen - rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

    def noise_loss(self, policy: Logps, ref_logps: Tensor, noisy_rejected_logps: Tensor, noise_power: Tensor) -> Tensor:
        """(B,) per pair, differentiable in the last two arguments alone.

        ref_logps: (R,) sums under the reference; only those of the chosen rows are read. noisy_rejected_logps: (B,)
        sums under its noisy logits. noise_power: (B,) mean of std^2 over a pair's rejected tokens and the vocabulary.
        """
        policy = policy.detach()
        noisy = require_input("dnpo", "noisy_rejected_logps", noisy_rejected_logps, len(policy.sum) // 2)
        power = require_input("dnpo", "noise_power", noise_power, len(policy.sum) // 2)
        chosen = log_ratio("dnpo", policy, ref_logps).detach().chunk(2)[0]
        return logsigmoid(self.lam * (chosen - (policy.rejected.sum - noisy))) + self.alpha * power

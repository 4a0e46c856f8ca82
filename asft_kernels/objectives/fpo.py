"""FPO: length-normalised DPO that holds the rejected answer's features to the reference's."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_input, require_number, reward_metrics
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class FPO(Objective):
    """Feature-level constrained Preference Optimization, arXiv 2411.07618, Eq. 8 to 11.

        L = -log sigmoid(beta [(avg_w - ref_avg_w) - (avg_l - ref_avg_l) - alpha (D_l - sg D_w)])

    D: mean squared distance between the policy's and the reference's pooled sparse-autoencoder features, the input
        `feature_distance`; asft_kernels.methods.fpo computes it. sg: no gradient.
    ref_logps: (R,) sums under the reference; their lengths are the policy's.
    beta: > 0, default 0.1; means are far smaller than sums, so this is not DPO's scale. alpha: weight of the
    constraint, >= 0, default 0.5; 0 is TRL's sigmoid_norm. top_k: features compared, >= 1, default 50 (the authors'
    code), read where features are pooled.
    """

    arxiv: ClassVar[str] = "2411.07618"
    beta: float = 0.1
    alpha: float = 0.5
    top_k: int = 50
    needs_reference: ClassVar[bool] = True
    inputs: ClassVar[Mapping[str, str]] = {
        "feature_distance": "(R,) mean squared distance of each row's pooled features from the reference's"
    }

    def __post_init__(self):
        require_number("fpo", "beta", self.beta, above_zero=True)
        require_number("fpo", "alpha", self.alpha)
        if not isinstance(self.top_k, Integral) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise ValueError(f"fpo: top_k: got {self.top_k!r}, need an integer >= 1")

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        distance = require_input("fpo", "feature_distance", inputs.get("feature_distance"), len(policy.sum))
        chosen_distance, rejected_distance = distance.double().chunk(2)
        ratio = log_ratio("fpo", policy, ref_logps) / policy.length.clamp(min=1)
        chosen, rejected = (self.beta * ratio).chunk(2)
        drift = self.beta * self.alpha * (rejected_distance - chosen_distance.detach())
        loss = -logsigmoid(chosen - rejected - drift)
        metrics = {
            **reward_metrics(chosen, rejected),
            "chosen_feature_distance": chosen_distance.detach(),
            "rejected_feature_distance": rejected_distance.detach(),
        }
        return LossTerms(loss, -policy.chosen.avg, loss, metrics)

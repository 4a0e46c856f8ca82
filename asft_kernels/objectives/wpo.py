"""WPO: pairs weigh as much as the policy would have written them."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.aot import AOT, AOTUnpaired
from asft_kernels.objectives.base import LossTerms, Objective
from asft_kernels.objectives.composite import Around, weighs_tokens

ALIGNED = "wpo_logps"  # log p - log(sum_v p_v^2)


class WPO(Around):
    """Weighted Preference Optimization, arXiv 2406.11827, Eq. 2 with the sampled alignment, as TRL's use_weighting.

        L = sg(w_w w_l) base loss,   w = exp(mean over the answer's tokens of [log p - log sum_v p_v^2])

    sg: no gradient. Around a sum with sft(normalization="token") each row's share is weighed, where TRL multiplies the
    batch's mean by the mean weight. Nothing clamps the weights: TRL before version 1 held w_w w_l at 1.
    base: a paired objective, its name, or a sum such as "dpo + 0.1 sft". Not aot and aot_unpaired: they take the
    losses of ranks, not of pairs. LDDPO goes around it. `get_objective("dpo", use_weighting=True)` makes one.
    """

    arxiv: ClassVar[str] = "2406.11827"
    fields = ("base",)

    def __init__(self, base: str | Objective = "dpo") -> None:
        super().__init__("wpo", base)
        parts = [part for _, part in getattr(self.base, "terms", ((1.0, self.base),))]
        ranks = any(isinstance(part, (AOT, AOTUnpaired)) for part in parts)
        if not self.base.paired or ranks or weighs_tokens(self.base):
            need = "a paired objective of plain sums that has a loss of each pair, such as dpo"
            raise ValueError(f"wpo: base: got {type(self.base).__name__}, need {need}")
        self.stats = tuple(dict.fromkeys((*self.base.stats, "log_sum_sq_probs")))

    def per_token(self, logps: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        aligned = (logps - stats["log_sum_sq_probs"]).detach()
        return {**self.base.per_token(logps, stats), ALIGNED: aligned}

    def forward(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        terms = self.base(policy, ref_logps, **inputs)
        chosen, rejected = (policy.terms[ALIGNED] / policy.length.clamp(min=1)).exp().chunk(2)
        weight = chosen * rejected
        metrics = {**terms.metrics, "pair_weight": weight}
        return LossTerms(weight * terms.loss, terms.sft, terms.align, metrics)

"""LD-DPO: any loss on log-ratios, with the tokens by which one answer is longer than the other weighed down."""

from typing import ClassVar

import torch
from torch import Tensor

from asft_kernels.objectives.base import Objective, require_number
from asft_kernels.objectives.composite import Around, weighs_tokens


class LDDPO(Around):
    """Length-Desensitised DPO, arXiv 2409.06411, around any paired loss on log-ratios of sums.

        L = base loss on S~ = (sum of the first l log-probabilities) + ld_alpha (sum of the others),   l = min(m_w, m_l)

    for the policy and for the reference, so ref_logps are per token, as `fused_linear_logps` returns them. Means stay
    sums over the plain number of tokens. token_weights of the call multiply these weights.
    base: an objective with a reference (dpo, ipo, exo_pair, ...), its name, or a sum such as "dpo + apo_zero".
    ld_alpha: 0 to 1; 1 is the base itself, 0 reads no token beyond l. It has no default.
    `get_objective("dpo", ld_alpha=0.5)` makes one.
    """

    arxiv: ClassVar[str] = "2409.06411"
    fields = ("base", "ld_alpha")

    def __init__(self, base: str | Objective, ld_alpha: float) -> None:
        super().__init__("ld_dpo", base)
        require_number("ld_dpo", "ld_alpha", ld_alpha)
        if ld_alpha > 1:
            raise ValueError(f"ld_dpo: ld_alpha: got {ld_alpha!r}, need a number from 0 to 1")
        ratios = self.base.needs_reference and self.base.reference_kind == "sum" and not weighs_tokens(self.base)
        if not (ratios and self.base.paired) or self.base.uses_nll_labels:
            need = "a paired objective on log-ratios of plain sums, such as dpo, ipo or exo_pair"
            raise ValueError(f"ld_dpo: base: got {type(self.base).__name__}, need {need}")
        self.ld_alpha = ld_alpha
        self.ref_per_token = True

    def weigh_tokens(self, logps: Tensor, token_weights: Tensor | None, offsets: Tensor) -> Tensor:
        shorter = torch.stack(offsets.diff().chunk(2)).amin(dim=0).repeat(2)
        tokens = torch.arange(len(logps), device=logps.device)
        row = torch.bucketize(tokens, offsets[1:-1], right=True)
        shared = tokens - offsets.index_select(0, row) < shorter.index_select(0, row)
        weights = torch.ones_like(logps, dtype=torch.float64).where(shared, self.ld_alpha)
        return weights if token_weights is None else weights * token_weights

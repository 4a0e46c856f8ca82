"""BMC's modelling: any paired loss, with the tokens in which the two answers differ weighed by the policy's doubt."""

from math import log
from typing import ClassVar

import torch
from torch import Tensor

from asft_kernels.objectives.base import Objective, require_choice, require_number
from asft_kernels.objectives.composite import Around, weighs_tokens


class BMC(Around):
    """Bridging and Modeling Correlations, arXiv 2408.07471: the modelling, Eq. 4 to 6 (second-hand) and its code.

        L = base loss on S~ = sum_t W_t logp_t,   W_t = 1 + M_t min(1 / sg(p_t), delta)

    M: 1 on the tokens in which the answers differ (`asft_kernels.methods.bmc`): the call's token_weights. Means
        stay sums over the plain number of tokens.
    base: a paired objective of sums or means, or its name, or a sum such as "dpo + 0.005 sft"; it has no default.
    delta: largest weight beside 1, > 0, default 2; the authors take 1.5 to 3.
    ref_weighting: how the reference's sums are weighed; no difference to a base without a reference.
        "own" (default, the released code): by the reference's own p_t; ref_logps are `weighted_reference` sums.
        "policy" (the natural reading of Eq. 4): by the policy's; ref_logps are per token, of one reference.
    With orpo, cpo or asft as base the code's likelihood is unweighted: pass nll_labels=labels[:B] for that.
    """

    arxiv: ClassVar[str] = "2408.07471"
    fields = ("base", "delta", "ref_weighting")
    needs_token_weights = True
    weighs_each_token = True

    def __init__(self, base: str | Objective | None = None, delta: float = 2.0, ref_weighting: str = "own") -> None:
        super().__init__("bmc", base)
        require_number("bmc", "delta", delta, above_zero=True)
        require_choice("bmc", "ref_weighting", ref_weighting, ("own", "policy"))
        sums = self.base.reference_kind == "sum" and not weighs_tokens(self.base)
        if not self.base.paired or not sums:
            need = "a paired objective of plain sums, such as dpo, ipo, orpo or simpo"
            raise ValueError(f"bmc: base: got {type(self.base).__name__}, need {need}")
        self.delta, self.ref_weighting = delta, ref_weighting
        self.ref_per_token = self.base.needs_reference and ref_weighting == "policy"

    def weigh_tokens(self, logps: Tensor, token_weights: Tensor, offsets: Tensor) -> Tensor:
        return _weights(logps, token_weights, self.delta)


def weighted_reference(
    logps: Tensor, marks: Tensor, delta: float, *, cu_seqlens: Tensor | None = None, shift: bool = True
) -> Tensor:
    """(R,) sums of the reference's log-probabilities by its own confidence: ref_logps for ref_weighting="own".

    logps: (R, T) or packed (M,), as `fused_linear_logps` returns them with this cu_seqlens and shift.
    marks: in the same shape, aligned with the labels. delta: the objective's, > 0.
    """
    require_number("weighted_reference", "delta", delta, above_zero=True)
    if marks.shape != logps.shape:
        raise ValueError(f"marks: got shape {tuple(marks.shape)}, need {tuple(logps.shape)}, that of logps")
    if shift:  # logps stand one place before their labels; at a sequence's last place they are 0
        marks = torch.nn.functional.pad(marks.flatten()[1:], (0, 1)).view(marks.shape)
    weighted = logps.double() * _weights(logps, marks, delta)
    if cu_seqlens is None:
        return weighted.sum(dim=-1)
    return torch.segment_reduce(weighted, "sum", offsets=cu_seqlens.long(), initial=0)


def _weights(logps: Tensor, marks: Tensor, delta: float) -> Tensor:
    """exp(-logp) alone would overflow."""
    logps = logps.double()
    return 1 + marks.double() * (-logps).clamp(max=log(delta)).exp()

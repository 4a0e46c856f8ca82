"""LigerFusedLinearKTOLoss."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from asft_kernels.liger.answers import answers, logit_means, reference_answers, require_ignored
from asft_kernels.objectives import KTO
from asft_kernels.objectives.base import counting, mean_over


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO (arXiv 2402.01306), called as Liger's class of this name: hidden states come before the weight.

    Args:
        ignore_index: Label of places that carry no loss, default -100.
        beta: > 0, default 0.1.
        compiled, chunk_size: Accepted, without effect.
        use_ref_model: Whether the call gives a reference, default False; without one its log-probabilities are 0.
        average_log_prob: Take means per token instead of sums, default False.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        require_ignored("LigerFusedLinearKTOLoss", compiled, chunk_size)
        self.objective, self.ignore_index = KTO(beta), ignore_index
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and figures of a batch of rows, good and bad ones mixed.

        Args:
            _input: (B, T, H). lin_weight: (V, H). target: (B, T), already shifted. bias: (V,).
            preference_labels: (B,) bool, whether a row's answer is a good one.
            ref_input, ref_weight, ref_bias: The reference's; no gradient goes to them.
            kl: Reference point >= 0, a scalar, (1,) or (B,); None is 0.

        Returns:
            The loss, and (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum,
            chosen_rewards_sum, rejected_rewards_sum), detached, good answers being the chosen ones.
        """
        if preference_labels is None:
            raise ValueError("preference_labels: got None, need a bool tensor (B,), whether a row's answer is good")
        ref = reference_answers(self.use_ref_model, ref_weight, ref_input, target, ref_bias, self.ignore_index)
        policy = answers(lin_weight, _input, target, bias, self.ignore_index)
        sums, ref_sums = policy.sum, torch.zeros_like(policy.sum) if ref is None else ref.sum
        if self.average_log_prob:
            sums, ref_sums = policy.avg, ref_sums / policy.length.clamp(min=1)
        inputs = {} if kl is None else {"kl": kl.reshape(()) if kl.numel() == 1 else kl}
        terms = self.objective(replace(policy, sum=sums), ref_sums, desirable=preference_labels, **inputs)
        loss = mean_over(terms.loss, counting(policy, paired=False))
        logit_sums = logit_means(_input, lin_weight, bias) * (_input.shape[1] * len(lin_weight))
        kinds = (preference_labels, ~preference_labels)
        figures = [
            torch.where(kind, values.detach(), 0).sum()
            for values in (sums, logit_sums, self.objective.beta * (sums - ref_sums))
            for kind in kinds
        ]
        dtype = torch.promote_types(_input.dtype, torch.float32)
        return loss.to(dtype), tuple(x.to(dtype) for x in figures)

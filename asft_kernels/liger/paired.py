"""The call that Liger's paired losses share."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from asft_kernels.core.sequence import Logps
from asft_kernels.liger.answers import answers, logit_means, require_ignored
from asft_kernels.objectives import LossTerms, Objective
from asft_kernels.objectives.base import chosen_nll, counting, mean_over, require_number

Figures = tuple[Tensor, ...]


class PairedLoss(nn.Module):
    """L = align_weight * comparison of answers + alpha * likelihood of the chosen ones, a mean over all their tokens.

    objective: compares the answers, by sums, or by means per token where average. beta: of the rewards.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        beta: float,
        ignore_index: int,
        compute_nll_loss: bool,
        compiled: bool,
        chunk_size: int,
        average: bool,
        alpha: float = 1.0,
        align_weight: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        require_number(name, "alpha", alpha)
        require_ignored(name, compiled, chunk_size)
        self.objective, self.beta, self.average, self.ignore_index = objective, beta, average, ignore_index
        self.alpha, self.compute_nll_loss, self.align_weight = alpha, compute_nll_loss, align_weight

    def run(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        *,
        ref: Logps | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Figures, LossTerms, Tensor]:
        """The loss, Liger's figures up to the rewards, the objective's terms, and which pairs count."""
        if len(target) % 2:
            raise ValueError(f"target: got {len(target)} rows, need an even number: chosen ones, then rejected ones")
        nll_target = nll_target if self.compute_nll_loss else None
        policy = answers(weight, hidden, target, bias, self.ignore_index, nll_target)
        compared = self._compared(policy)
        ref_logps = torch.zeros_like(policy.sum) if ref is None else self._compared(ref).sum
        terms = self.objective(compared, ref_logps if self.objective.needs_reference else None)
        counts = counting(policy, paired=True)
        loss = self.align_weight * mean_over(terms.align, counts)
        nll = policy.sum.new_zeros(())
        if self.compute_nll_loss:
            nll = mean_over(chosen_nll(policy, "token"), counts)
            loss = loss + self.alpha * nll
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = compared.sum.detach()
        rewards = self.beta * (sums - ref_logps)
        means = [side.mean() for side in logit_means(hidden, weight, bias).chunk(2)]
        figures = (*sums.chunk(2), *means, nll.detach(), *rewards.chunk(2))
        return loss.to(dtype), tuple(x.to(dtype) for x in figures), terms, counts

    def _compared(self, policy: Logps) -> Logps:
        """Means per token are as sums of one token."""
        return replace(policy, sum=policy.avg, length=policy.length.clamp(max=1)) if self.average else policy

"""What the public calls return beside the loss: detached figures, read by attribute."""

from dataclasses import dataclass

import torch
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, counting, mean_over
from asft_kernels.objectives.log_odds import log_odds


@dataclass(frozen=True)
class PreferenceOutputs:
    """Holds the figures of a paired batch, detached, fp32 (fp64 for fp64 hidden); those of empty sequences are 0.

    Attributes:
        chosen_logps, rejected_logps: (B,) sums of log-probabilities over the labels that carry loss.
        chosen_avg_logps, rejected_avg_logps: (B,) means per token.
        chosen_log_odds, rejected_log_odds: (B,) f = log(p / (1 - p)), p = exp(avg floored at -1e-6), without beta.
        margins: (B,) chosen - rejected log-odds, 0 for pairs that do not count.
        chosen_lengths, rejected_lengths: (B,) int64, labels that carry loss.
        accuracy: Share of the pairs that count with the chosen avg above the rejected.
        sft_loss: Mean -avg of the chosen over the pairs that count.
        align_loss: Mean unweighted alignment term over the pairs that count.
        num_pairs: Pairs that count: with a label that carries loss on both sides.
        metrics: The objective's own figures by name (DPO's rewards, ...), means over the pairs that count.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_avg_logps: Tensor
    rejected_avg_logps: Tensor
    chosen_log_odds: Tensor
    rejected_log_odds: Tensor
    margins: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    accuracy: Tensor
    sft_loss: Tensor
    align_loss: Tensor
    num_pairs: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class SequenceOutputs:
    """Holds the figures of an unpaired batch, as `PreferenceOutputs` does.

    Attributes:
        logps: (R,) sums of log-probabilities over the labels that carry loss.
        avg_logps: (R,) means per token.
        lengths: (R,) int64, labels that carry loss.
        sft_loss: Mean -avg over the rows that count.
        num_sequences: Rows that count: with a label that carries loss.
        metrics: The objective's own figures by name, means over the rows that count.
    """

    logps: Tensor
    avg_logps: Tensor
    lengths: Tensor
    sft_loss: Tensor
    num_sequences: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class TokenStats:
    """Holds figures of every token in the shape of the labels: 0 or False where no loss is, None if not asked for.

    All logits z are those after scale and softcap.

    Attributes:
        logps: Log-probability of the label, differentiable.
        lse: log sum_v exp(z_v), which z-loss squares.
        mean_logits: Mean of z over the vocabulary; -inf where a logit is.
        entropy: -sum_v p_v log p_v in nats; a logit of -inf adds nothing.
        is_top1: bool, whether no logit is above the label's; a tie counts.
        log_sum_sq_probs: log sum_v p_v^2, by which WPO (arXiv 2406.11827) divides its weights of sampled answers.
    """

    logps: Tensor
    lse: Tensor | None = None
    mean_logits: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


@torch.no_grad()
def summarize(
    policy: Logps, terms: LossTerms, *, paired: bool, dtype: torch.dtype
) -> PreferenceOutputs | SequenceOutputs:
    policy = policy.detach()
    counts = counting(policy, paired)
    sft_loss = mean_over(terms.sft, counts).to(dtype)
    metrics = {name: mean_over(values, counts).to(dtype) for name, values in terms.metrics.items()}
    if not paired:
        return SequenceOutputs(
            policy.sum.to(dtype), policy.avg.to(dtype), policy.length, sft_loss, counts.sum(), metrics
        )
    chosen, rejected = policy.chosen, policy.rejected
    odds = [torch.where(side.length > 0, log_odds(side.avg), 0) for side in (chosen, rejected)]
    return PreferenceOutputs(
        chosen_logps=chosen.sum.to(dtype),
        rejected_logps=rejected.sum.to(dtype),
        chosen_avg_logps=chosen.avg.to(dtype),
        rejected_avg_logps=rejected.avg.to(dtype),
        chosen_log_odds=odds[0].to(dtype),
        rejected_log_odds=odds[1].to(dtype),
        margins=torch.where(counts, odds[0] - odds[1], 0).to(dtype),
        chosen_lengths=chosen.length,
        rejected_lengths=rejected.length,
        accuracy=mean_over((chosen.avg > rejected.avg).double(), counts).to(dtype),
        sft_loss=sft_loss,
        align_loss=mean_over(terms.align, counts).to(dtype),
        num_pairs=counts.sum(),
        metrics=metrics,
    )

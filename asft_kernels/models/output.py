"""What a fused model returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FusedOutput(ModelOutput):
    """What a fused model returns for `fused_lm_head=True`; TRL's names, and lse.

    All but loss and aux_loss are of shape (R, T - 1), or (R, T) with shift_labels, in fp32 (float64 for float64 input),
    0 where the label is -100, None where `fuse` was not asked for them. z: logits, scaled, capped and divided by the
    temperature; p = softmax(z).

    Attributes:
        loss: scalar, -log_probs summed over the labels that are not -100, divided by their number or
            num_items_in_batch; plus router_aux_loss_coef * aux_loss if the model made one.
        log_probs: log p of each label; differentiable.
        entropy: -sum p log p; differentiable.
        mean_logits: mean of z over the vocabulary, detached.
        log_sum_sq_probs: log sum p^2, detached.
        is_top1: bool, whether the label has the largest logit.
        lse: log sum exp z; differentiable.
        label_mask: bool, whether the label is not -100.
        aux_loss: scalar, the load-balancing loss of a mixture of experts, if router logits were asked for.
        hidden_states, attentions: the model's own, if asked for.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    is_top1: Tensor | None = None
    lse: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

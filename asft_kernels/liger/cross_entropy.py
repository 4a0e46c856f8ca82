"""LigerFusedLinearCrossEntropyLoss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels.functional import fused_linear_logps
from asft_kernels.objectives.base import require_choice, require_number

NAME = "LigerFusedLinearCrossEntropyLoss"


@dataclass(frozen=True)
class CrossEntropyOutput:
    """Holds what LigerFusedLinearCrossEntropyLoss returns where more than the loss is asked for.

    Attributes:
        loss: Scalar, or (N,) with reduction="none".
        z_loss: The part of it that lse_square_scale makes, or None.
        token_accuracy: Share of labels that no other logit is above, or (N,) zeros and ones, or None.
        predicted_tokens: None.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of a linear head, called as Liger's class of this name.

        loss of a token = (1 - e) (-log p) + e mean_v(-log p_v) + lse_square_scale lse^2

    Args:
        ce_weight: (V,) weights of the labels; a mean is then over their sum. Not with label_smoothing or
            lse_square_scale.
        ignore_index: Label of places that carry no loss, default -100.
        lse_square_scale: Weight of the z-loss, >= 0, default 0.0.
        label_smoothing: e, 0.0 (default) to 1.
        reduction: "mean" (default), "sum", or "none" for (N,).
        softcap: The cap of the logits, softcap * tanh(z / softcap), or None (default).
        return_z_loss, return_token_accuracy: Return `CrossEntropyOutput` with them, default False.
        accum_dtype: None (default) or torch.float32, without effect: sums are fp32, and gradients rounded once.
        use_token_scaling: Weigh each token's loss by its own probability, detached, default False.
        return_predicted_tokens: Only False; take the argmax of the logits where tokens are wanted.

    Raises:
        ValueError: for what is not supported, by name.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        require_number(NAME, "lse_square_scale", lse_square_scale)
        require_number(NAME, "label_smoothing", label_smoothing)
        require_choice(NAME, "reduction", reduction, ("mean", "sum", "none"))
        if label_smoothing > 1:
            raise ValueError(f"{NAME}: label_smoothing: got {label_smoothing!r}, need a number from 0 to 1")
        if ce_weight is not None and (label_smoothing or lse_square_scale):
            raise ValueError(
                f"{NAME}: ce_weight: got weights beside label_smoothing or lse_square_scale, need one alone"
            )
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                f"{NAME}: accum_dtype: got {accum_dtype}, need None or torch.float32, which is what is done"
            )
        if return_predicted_tokens:
            raise ValueError(f"{NAME}: return_predicted_tokens: got True, need False; no argmax is kept")
        self.ce_weight, self.ignore_index, self.reduction, self.softcap = ce_weight, ignore_index, reduction, softcap
        self.lse_square_scale, self.label_smoothing = lse_square_scale, label_smoothing
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy
        self.use_token_scaling = use_token_scaling

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of N tokens.

        Args:
            lin_weight: (V, H). _input: (N, H). target: (N,). bias: (V,).

        Returns:
            The loss, fp32 (fp64 for fp64 input), or `CrossEntropyOutput`.
        """
        valid = target != self.ignore_index
        logps, figures = self._figures(lin_weight, _input, target, bias)
        loss = (1 - self.label_smoothing) * -logps
        weights = valid.to(logps.dtype)
        if self.ce_weight is not None:
            weights = torch.where(valid, self.ce_weight.to(weights).take(target.where(valid, 0)), 0)
            loss = loss * weights
        if self.label_smoothing:
            loss = loss + self.label_smoothing * (figures["lse"] - figures["mean_logits"])
        z_loss = torch.zeros_like(loss)
        if self.lse_square_scale:
            z_loss = self.lse_square_scale * figures["lse"].square()
            loss = loss + z_loss
        if self.use_token_scaling:
            scale = torch.where(valid, logps.detach().exp(), 0)
            loss, z_loss = loss * scale, z_loss * scale
        total = weights.sum()
        loss = self._reduced(loss, total)
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        accuracy = None
        if self.return_token_accuracy:
            right = figures["is_top1"].to(loss.dtype)
            accuracy = right if self.reduction == "none" else right.sum() / valid.sum().clamp(min=1)
        return CrossEntropyOutput(loss, self._reduced(z_loss, total) if self.return_z_loss else None, accuracy)

    def _figures(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(N,) log-probabilities of the labels, 0 where there is none, and the figures that the loss reads."""
        names = ["lse", "mean_logits"] if self.label_smoothing else ["lse"] if self.lse_square_scale else []
        names += ["is_top1"] if self.return_token_accuracy else []
        call: dict[str, Any] = {"shift": False, "ignore_index": self.ignore_index, "softcap": self.softcap}
        if not names:
            return fused_linear_logps(hidden[None], (weight, bias), target[None], **call)[0], {}
        call.update(return_stats=names, differentiable=[name for name in names if name != "is_top1"])
        stats: Any = fused_linear_logps(hidden[None], (weight, bias), target[None], **call)
        return stats.logps[0], {name: getattr(stats, name)[0] for name in names}

    def _reduced(self, values: Tensor, total: Tensor) -> Tensor:
        if self.reduction == "none":
            return values
        return values.sum() / (total.where(total > 0, 1) if self.reduction == "mean" else 1)

"""LigerFusedLinearDPOLoss, with the ten losses that Liger has under it."""

from collections.abc import Callable

from torch import Tensor

from asft_kernels.liger.answers import reference_answers
from asft_kernels.liger.paired import Figures, PairedLoss
from asft_kernels.objectives import (
    DPO,
    ApoDown,
    ApoZero,
    BcoPair,
    DiscoPOP,
    ExoPair,
    HingeNorm,
    NcaPair,
    Objective,
    Robust,
    SppoHard,
)
from asft_kernels.objectives.base import require_choice

# loss_type: (beta, label_smoothing, discopop_tau) -> objective
LOSS_TYPES: dict[str, Callable[[float, float, float], Objective]] = {
    "sigmoid": lambda beta, smoothing, tau: DPO(beta, smoothing),
    "hinge": lambda beta, smoothing, tau: HingeNorm(beta),
    "exo_pair": lambda beta, smoothing, tau: ExoPair(beta, smoothing),
    "nca_pair": lambda beta, smoothing, tau: NcaPair(beta),
    "robust": lambda beta, smoothing, tau: Robust(beta, smoothing),
    "bco_pair": lambda beta, smoothing, tau: BcoPair(beta),
    "sppo_hard": lambda beta, smoothing, tau: SppoHard(beta),
    "apo_zero": lambda beta, smoothing, tau: ApoZero(beta),
    "apo_down": lambda beta, smoothing, tau: ApoDown(beta),
    "discopop": lambda beta, smoothing, tau: DiscoPOP(beta, tau),
}
SMOOTHED = ("sigmoid", "exo_pair", "robust")


class LigerFusedLinearDPOLoss(PairedLoss):
    """DPO and its relatives (arXiv 2305.18290), called as Liger's class of this name.

    Args:
        ignore_index: Label of places that carry no loss, default -100.
        beta: Of the loss, > 0, default 0.1 (the hinge's is its gamma).
        alpha: Weight of the chosen answers' negative log-likelihood, a mean over all their tokens, default 1.0.
        compute_nll_loss: Whether that is added, default False.
        compiled, chunk_size: Accepted, without effect.
        use_ref_model: Whether the call gives a reference, default True; without one its log-probabilities are 0.
        average_log_prob: Compare means per token instead of sums, default False.
        loss_type: "sigmoid" (default), "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
            "apo_down" or "discopop".
        label_smoothing: Of "sigmoid" (conservative DPO; Liger drops it), "exo_pair" (> 0) and "robust", default 0.0.
        discopop_tau: Of "discopop", default 0.05.

    Raises:
        ValueError: for a parameter that a loss does not have, by name.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        require_choice("LigerFusedLinearDPOLoss", "loss_type", loss_type, tuple(LOSS_TYPES))
        if label_smoothing and loss_type not in SMOOTHED:
            raise ValueError(
                f"LigerFusedLinearDPOLoss: label_smoothing: got {label_smoothing!r} with loss_type={loss_type!r}, need "
                f"0, or one of {', '.join(map(repr, SMOOTHED))}: {loss_type} has no label smoothing"
            )
        super().__init__(
            LOSS_TYPES[loss_type](beta, label_smoothing, discopop_tau),
            beta=beta,
            ignore_index=ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            chunk_size=chunk_size,
            average=average_log_prob,
        )
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Figures]:
        """Loss and figures of a batch: B chosen rows, then the B rejected ones.

        Args:
            lin_weight: (V, H). _input: (2B, T, H). target: (2B, T), already shifted. bias: (V,).
            ref_input, ref_weight, ref_bias: The reference's; no gradient goes to them.

        Returns:
            The loss, and (chosen_logps (B,), rejected_logps (B,), chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards (B,), rejected_rewards (B,)), detached.
        """
        ref = reference_answers(self.use_ref_model, ref_weight, ref_input, target, ref_bias, self.ignore_index)
        return self.run(lin_weight, _input, target, bias, ref=ref)[:2]

"""LigerFusedLinearORPOLoss, LigerFusedLinearCPOLoss, LigerFusedLinearSimPOLoss."""

from torch import Tensor

from asft_kernels.liger.paired import Figures, PairedLoss
from asft_kernels.objectives import CPO, ORPO, SimPO
from asft_kernels.objectives.base import mean_over


class LigerFusedLinearORPOLoss(PairedLoss):
    """ORPO (arXiv 2403.07691), called as Liger's class of this name.

    Args:
        ignore_index: Label of places that carry no loss, default -100.
        beta: Weight of the odds-ratio term, > 0, default 0.1 (lam of `objectives.ORPO`).
        compute_nll_loss: Whether the likelihood of the chosen answers is added, default True.
        compiled, chunk_size: Accepted, without effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ORPO(lam=beta),
            beta=beta,
            average=True,
            ignore_index=ignore_index,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            chunk_size=chunk_size,
            align_weight=beta,
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Figures]:
        """Loss and figures of a batch: B chosen rows, then the B rejected ones.

        Args:
            lin_weight: (V, H). _input: (2B, T, H). target: (2B, T), already shifted. bias: (V,).
            nll_target: (2B, T), labels of the likelihood, say prompt and answer; default target. Its rejected rows
                are not read, and where target has a label, too, it is the same one.

        Returns:
            The loss, and (chosen_logps (B,), rejected_logps (B,), means per token; chosen_logits_mean,
            rejected_logits_mean, nll_loss, chosen_rewards (B,), rejected_rewards (B,), log_odds_ratio,
            log_odds_chosen), detached.
        """
        loss, figures, terms, counts = self.run(lin_weight, _input, target, bias, nll_target=nll_target)
        odds = [mean_over(x.detach(), counts).to(loss.dtype) for x in (-terms.align, terms.metrics["reward_margin"])]
        return loss, (*figures, *odds)


class LigerFusedLinearCPOLoss(PairedLoss):
    """CPO (arXiv 2401.08417), called as Liger's class of this name.

    Args:
        ignore_index: Label of places that carry no loss, default -100.
        beta: Scale of the margin, > 0, default 0.1.
        alpha: Weight of the chosen answers' likelihood, >= 0, default 1.0.
        label_smoothing: 0.0 (default) to below 0.5.
        compute_nll_loss: Whether the likelihood is added, default True.
        compiled, chunk_size: Accepted, without effect.
        average_log_prob: Compare means per token instead of sums, default False.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            CPO(beta, label_smoothing=label_smoothing),
            beta=beta,
            ignore_index=ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            chunk_size=chunk_size,
            average=average_log_prob,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Figures]:
        """Loss and figures, as LigerFusedLinearDPOLoss.forward gives them without a reference."""
        return self.run(lin_weight, _input, target, bias)[:2]


class LigerFusedLinearSimPOLoss(PairedLoss):
    """SimPO (arXiv 2405.14734) with a likelihood term, called as Liger's class of this name.

    Args:
        ignore_index: Label of places that carry no loss, default -100.
        beta: Scale of the margin of means, > 0, default 0.1.
        alpha: Weight of the chosen answers' likelihood, >= 0, default 1.0.
        label_smoothing: 0.0 (default) to below 0.5.
        compute_nll_loss: Whether the likelihood is added, default True (the paper's loss has none).
        compiled, chunk_size: Accepted, without effect.
        gamma: Target margin, >= 0, default 0.5.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            SimPO(beta, gamma, label_smoothing),
            beta=beta,
            average=True,
            ignore_index=ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            chunk_size=chunk_size,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Figures]:
        """Loss and figures, as LigerFusedLinearCPOLoss.forward; log-probabilities and rewards are means per token."""
        return self.run(lin_weight, _input, target, bias)[:2]

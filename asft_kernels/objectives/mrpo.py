"""MRPO: DPO against one virtual reference made of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_number, reward_metrics

GUARD = 1e-6  # the authors': added to denominators that are 0 where two answers score alike


@dataclass(frozen=True)
class MRPO(Objective):
    """Multi-Reference Preference Optimization, arXiv 2405.16388, after its authors' code (made for K = 2).

        L = -log sigmoid(beta [(S_w - V_w) - (S_l - V_l)]),   V = -logsumexp_k(log alpha_k - S_k)

    ref_logps: (K, R) sums under K references, the base (say, the policy as it was) first; (R,) is K = 1, plain DPO.
    beta: > 0, default 0.1.
    alpha: K weights >= 0 of sum 1, the base's first; None (default) adapts them to each pair: alpha_k is reference
        k's share in the sum of |S_k_w - S_k_l|, unclipped; the base takes all where no reference tells them apart.
    clip: >= 0, default 0.1, the radius within which the others stay round the base, None for none. In each answer
        S_k is held between (1 + e) S_base and (1 - e) S_base, with e_w = clip s and e_l = clip (1 - s),
        s = |b_w| / (|b_w| + |b_l|), b the mean of S_base and S_k: the authors' rule, for each other reference alone.
    swap_weights: K = 2 only: each reference takes the other's weight, as the authors' code has it. Default False.
    """

    arxiv: ClassVar[str] = "2405.16388"
    beta: float = 0.1
    alpha: Sequence[float] | None = None
    clip: float | None = 0.1
    swap_weights: bool = False
    needs_reference: ClassVar[bool] = True
    several_references: ClassVar[bool] = True

    def __post_init__(self):
        require_number("mrpo", "beta", self.beta, above_zero=True)
        if not isinstance(self.swap_weights, bool):
            raise ValueError(f"mrpo: swap_weights: got {self.swap_weights!r}, need True or False")
        if self.clip is not None:
            require_number("mrpo", "clip", self.clip)
        if self.alpha is None:
            return
        if not isinstance(self.alpha, Sequence) or isinstance(self.alpha, str) or not self.alpha:
            raise ValueError(f"mrpo: alpha: got {self.alpha!r}, need one weight a reference, or None (adaptive)")
        for weight in self.alpha:
            require_number("mrpo", "alpha", weight)
        if abs(sum(self.alpha) - 1) > GUARD:
            raise ValueError(f"mrpo: alpha: got weights of sum {sum(self.alpha):g}, need sum 1")
        object.__setattr__(self, "alpha", tuple(self.alpha))  # a list would leave the object without a hash

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        refs = self._references(ref_logps, len(policy.sum))
        chosen, rejected = refs.chunk(2, dim=1)  # (K, B) each
        weights = self._weights(chosen, rejected)
        chosen, rejected = self._clipped(chosen, rejected)
        virtual = torch.cat([_virtual(weights, chosen), _virtual(weights, rejected)])
        reward_w, reward_l = (self.beta * (policy.sum - virtual)).chunk(2)
        loss = -logsigmoid(reward_w - reward_l)
        metrics = {**reward_metrics(reward_w, reward_l), "base_weight": weights[0]}
        return LossTerms(loss, -policy.chosen.avg, loss, metrics)

    def check_references(self, number: int) -> None:
        if self.alpha is not None and len(self.alpha) != number:
            raise ValueError(f"mrpo: alpha: got {len(self.alpha)} weights for {number} references, need one each")
        if self.swap_weights and number != 2:
            raise ValueError(f"mrpo: swap_weights: got True with {number} references, need 2 to swap between")

    def _references(self, ref_logps: Tensor | None, rows: int) -> Tensor:
        """(K, R) float64, the base first."""
        refs = ref_logps[None] if isinstance(ref_logps, Tensor) and ref_logps.dim() == 1 else ref_logps
        if not isinstance(refs, Tensor) or refs.dim() != 2 or refs.shape[1] != rows or not len(refs):
            got = tuple(ref_logps.shape) if isinstance(ref_logps, Tensor) else type(ref_logps).__name__
            need = f"a tensor (K, {rows}) of K >= 1 references, or ({rows},)"
            raise ValueError(f"mrpo: ref_logps: got {got}, need {need}")
        self.check_references(len(refs))
        return refs.detach().double()

    def _weights(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(K, B), of sum 1."""
        if self.alpha is None:
            gaps = (chosen - rejected).abs()
            gaps = torch.cat([gaps[:1] + GUARD, gaps[1:]])
            weights = gaps / gaps.sum(dim=0)
        else:
            weights = torch.tensor(self.alpha, dtype=chosen.dtype, device=chosen.device)[:, None].expand_as(chosen)
        return weights.flip(0) if self.swap_weights else weights

    def _clipped(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        if self.clip is None:
            return chosen, rejected
        mean_w, mean_l = ((side[:1] + side).abs() / 2 for side in (chosen, rejected))
        share = mean_w / (mean_w + mean_l + GUARD)
        return _near_base(chosen, self.clip * share), _near_base(rejected, self.clip * (1 - share))


def _near_base(refs: Tensor, radius: Tensor) -> Tensor:
    """The base lies within its own bounds and stays as it is. Log-probabilities are negative: 1 + radius is below."""
    base = refs[:1]
    return refs.clamp(min=(1 + radius) * base, max=(1 - radius) * base)


def _virtual(weights: Tensor, refs: Tensor) -> Tensor:
    return -torch.logsumexp(weights.log() - refs, dim=0)

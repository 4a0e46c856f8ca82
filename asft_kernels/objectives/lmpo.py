"""LMPO: SimPO whose margin grows with the standardised unsureness of each pair. Keeps state."""

from collections.abc import Callable
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    LossTerms,
    Objective,
    counting,
    require_number,
    reward_metrics,
    sum_over_ranks,
)

DECAY = 0.9
TINY = 1e-8  # against a spread of 0: pairs all alike have z = 0


class LMPO(nn.Module, Objective):
    """Length-Controlled Margin-Based Preference Optimization, arXiv 2502.14643, after its authors' code. No reference.

        L = -log sigmoid(beta (avg_w - avg_l) - beta gamma_beta_ratio - lam z),   z = (M - mean) / std, detached
        M = (1 - p_w) (1 - (p_w - p_l)^power) / 2,   p = exp(avg mbar / m),   mbar = (m_w + m_l) / 2

    beta: > 0, default 2. gamma_beta_ratio: >= 0, default 0.25: SimPO's gamma is beta times it.
    lam: >= 0, default 0.2; 0 is SimPO. power: an odd integer >= 1, default 5 (odd: a pair in the wrong order has
        the larger M). The authors fix lam and power.
    mean and std are running ones (0.9 of the old), corrected for their start at 0, over the counting pairs of all
    ranks of torch.distributed; every rank must call, also with no such pair. They are buffers: in state_dict,
    updated by each call in train() and before it is used, fixed in eval(). A call with fewer than two counting
    pairs over all ranks has no spread and is left out; before the first that has, z = 0. They stay float64 when the
    module that holds them is cast.
    """

    arxiv: ClassVar[str] = "2502.14643"
    running_mean: Tensor
    running_std: Tensor
    steps: Tensor

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.25, lam: float = 0.2, power: int = 5) -> None:
        super().__init__()
        require_number("lmpo", "beta", beta, above_zero=True)
        require_number("lmpo", "gamma_beta_ratio", gamma_beta_ratio)
        require_number("lmpo", "lam", lam)
        whole = isinstance(power, Integral) and not isinstance(power, bool)
        if not whole or not 1 <= power < 2**53 or power % 2 == 0:
            raise ValueError(f"lmpo: power: got {power!r}, need an odd integer >= 1 that float64 holds")
        self.beta, self.gamma_beta_ratio, self.lam, self.power = beta, gamma_beta_ratio, lam, power
        self.register_buffer("running_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("running_std", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * policy.avg).chunk(2)
        unsureness = self._unsureness(policy.detach())
        target = self.beta * self.gamma_beta_ratio + self.lam * self._standardised(unsureness, policy)
        loss = -logsigmoid(chosen - rejected - target)
        metrics = {**reward_metrics(chosen, rejected), "unsureness": unsureness, "target_margin": target}
        return LossTerms(loss, -policy.chosen.avg, loss, metrics)

    def _unsureness(self, policy: Logps) -> Tensor:
        """M, (B,)."""
        length = policy.length.clamp(min=1).double()
        mean_length = torch.stack(length.chunk(2)).mean(dim=0).repeat(2)
        p_w, p_l = torch.exp(policy.avg * mean_length / length).chunk(2)
        return (1 - p_w) * (1 - (p_w - p_l) ** self.power) / 2

    def _standardised(self, values: Tensor, policy: Logps) -> Tensor:
        if self.running_mean.device != values.device:
            self.to(values.device)
        if self.training:
            self._update(values, counting(policy, paired=True), policy.copies)
        started = self.steps > 0
        corrected = torch.where(started, 1 - DECAY ** self.steps.double(), 1)
        mean, std = self.running_mean.double() / corrected, self.running_std.double() / corrected
        return torch.where(started, (values - mean) / (std + TINY), 0)

    @torch.no_grad()
    def _update(self, values: Tensor, counts: Tensor, copies: int) -> None:
        """By the mean and the unbiased deviation over all ranks. Reads nothing on the host."""
        sums = torch.stack([counts.sum().double(), torch.where(counts, values, 0).sum()])
        pairs, total = sum_over_ranks(sums) / copies
        mean = total / pairs.clamp(min=1)
        squares = sum_over_ranks(torch.where(counts, (values - mean).square(), 0).sum()) / copies
        std = (squares / (pairs - 1).clamp(min=1)).sqrt()
        weight = (1 - DECAY) * (pairs >= 2).to(self.running_mean)
        # Not lerp_: by a tensor it changes nothing under torch.compile (AOTAutograd in torch 2.13).
        self.running_mean += weight * (mean - self.running_mean)
        self.running_std += weight * (std - self.running_std)
        self.steps += pairs >= 2

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LMPO":
        """Moves the statistics and does not cast them: the 0.1 of a step is less than half precision would keep."""
        before = {"running_mean": self.running_mean, "running_std": self.running_std}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            moved = getattr(self, name)
            if moved.dtype != exact.dtype:
                setattr(self, name, exact.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma_beta_ratio={self.gamma_beta_ratio}, lam={self.lam}, power={self.power}"

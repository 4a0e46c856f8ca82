"""KTO: single answers marked desirable or not, no pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, require_input, require_number, sigmoid, sum_over_ranks
from asft_kernels.objectives.dpo import log_ratio


@dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky Optimization, arXiv 2402.01306, Eq. 7, as TRL has it. Rows are not paired.

        desirable:    L = desirable_weight   [1 - sigmoid(beta (S - ref_S - kl))]
        undesirable:  L = undesirable_weight [1 - sigmoid(beta (kl - S + ref_S))]

    beta: > 0, default 0.1. desirable_weight, undesirable_weight: >= 0, default 1; where the two kinds are unequal
    in number TRL advises desirable_weight * count : undesirable_weight * count of 1 : 1 to 4 : 3.

    kl: a scalar, the paper's mean over the batch, or (R,), one reference point a row, as Liger takes it.
    WITHOUT THE INPUT kl THE REFERENCE POINT IS 0: that is not the paper's loss but its limit at the start of
    training, and it becomes wrong as the policy leaves the reference. Give the estimate of `kto_kl` at every step.
    """

    arxiv: ClassVar[str] = "2402.01306"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    paired: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    inputs: ClassVar[Mapping[str, str]] = {"desirable": "(R,) bool, whether the row's answer is a good one"}
    optional_inputs: ClassVar[Mapping[str, str]] = {
        "kl": "a tensor >= 0, the reference point: a scalar, from kto_kl, or (R,), one a row"
    }

    def __post_init__(self):
        require_number("kto", "beta", self.beta, above_zero=True)
        require_number("kto", "desirable_weight", self.desirable_weight)
        require_number("kto", "undesirable_weight", self.undesirable_weight)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        desirable = require_input("kto", "desirable", inputs.get("desirable"), len(policy.sum))
        if desirable.dtype != torch.bool:
            raise ValueError(f"kto: desirable: got {desirable.dtype}, need torch.bool; compare, as in score > 0")
        kl = inputs.get("kl", policy.sum.new_zeros(())).detach()
        if kl.dim() and kl.shape != policy.sum.shape:
            got, rows = tuple(kl.shape), len(policy.sum)
            raise ValueError(f"kto: kl: got shape {got}, need a scalar, as kto_kl gives it, or ({rows},)")
        if kl.device.type == "cpu" and not torch.compiler.is_compiling() and (kl < 0).any():
            raise ValueError(f"kto: kl: got {kl.min().item():g}, need a number >= 0; kto_kl gives it")
        kl = kl.clamp(min=0)  # as TRL does; elsewhere than on a CPU a look at the value would wait for the device
        ratio = log_ratio("kto", policy, ref_logps)
        over = self.beta * torch.where(desirable, ratio - kl, kl - ratio)
        short = sigmoid(-over)  # 1 - sigmoid(over)
        loss = torch.where(desirable, self.desirable_weight * short, self.undesirable_weight * short)
        metrics = {
            "reward": (self.beta * ratio).detach(),
            "reward_accuracy": (over.detach() > 0).double(),
            "kl": kl.expand_as(loss),
        }
        return LossTerms(loss, -policy.avg, loss, metrics)


def kto_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's reference point: mean of S - ref_S over mismatched answers, at least 0, detached.

    logps, ref_logps: sums (R,) under policy and reference, without gradients, of rows that join each prompt to the
    answer of another one (a batch's answers moved on by one place). With several ranks each gives its own rows, and
    all must call it: the mean is over all of them, and only then held at 0. 0 without rows.
    """
    gains = (logps - ref_logps).detach()
    total, rows = sum_over_ranks(torch.stack([gains.double().sum(), gains.new_tensor(len(gains), dtype=torch.float64)]))
    return (total / rows.clamp(min=1)).clamp(min=0).to(gains.dtype)

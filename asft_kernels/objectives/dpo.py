"""DPO and its relatives on log-ratios to a reference: cDPO, robust DPO, IPO, length-normalised DPO."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.objectives.base import LossTerms, Objective, require_input, require_number, reward_metrics
from asft_kernels.sequence import Logps

SMALLEST_TAU = 4e-155  # 1 / (2 beta) is then 1.25e154, and its square 1.6e308, under float64's 1.8e308


def log_ratio(objective: str, policy: Logps, ref_logps: Tensor | None) -> Tensor:
    """log(pi / pi_ref) of each whole answer, (R,)."""
    return policy.sum - require_input(objective, "ref_logps", ref_logps, len(policy.sum))


@dataclass(frozen=True)
class DPO(Objective):
    """Direct Preference Optimization, arXiv 2305.18290, Eq. 7; with label_smoothing the conservative form, cDPO.

        h = beta [(S_w - ref_S_w) - (S_l - ref_S_l)],   L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    beta: > 0, default 0.1. label_smoothing e: share of pairs labelled the wrong way round, 0 (default) to below 0.5.
    TRL 1.16's `sigmoid` ignores label_smoothing, which only its `robust` reads.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("dpo", "beta", self.beta, above_zero=True)
        _require_smoothing("dpo", self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("dpo", policy, ref_logps)).chunk(2)
        h = chosen - rejected
        loss = -logsigmoid(h) + self.label_smoothing * h  # log sigmoid(-h) = log sigmoid(h) - h
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


@dataclass(frozen=True)
class Robust(Objective):
    """Provably robust DPO, arXiv 2403.00409: the unbiased estimate of DPO's loss where labels are flipped at rate e.

        L = [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e),   h as in DPO

    beta: > 0, default 0.1. label_smoothing e: 0 (default: plain DPO) to below 0.5. L has no lower bound for e > 0.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("robust", "beta", self.beta, above_zero=True)
        _require_smoothing("robust", self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * log_ratio("robust", policy, ref_logps)).chunk(2)
        h = chosen - rejected
        loss = -logsigmoid(h) - self.label_smoothing / (1 - 2 * self.label_smoothing) * h
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


@dataclass(frozen=True)
class IPO(Objective):
    """Identity Preference Optimisation, arXiv 2310.12036, Eq. 17, on log-ratios per token, as TRL has it.

        L = (d - 1 / (2 beta))^2,   d = (S_w - ref_S_w) / m_w - (S_l - ref_S_l) / m_l

    beta: the paper's tau, > 0, default 0.1. On sums instead of means it would be another loss.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("ipo", "beta", self.beta, above_zero=True)
        if self.beta < SMALLEST_TAU:
            raise ValueError(f"ipo: beta: got {self.beta!r}, need 4e-155 at least: float64 has no (1 / (2 beta))^2")

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (log_ratio("ipo", policy, ref_logps) / policy.length.clamp(min=1)).chunk(2)
        loss = (chosen - rejected - 1 / (2 * self.beta)).square()
        metrics = reward_metrics(self.beta * chosen, self.beta * rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, metrics)


@dataclass(frozen=True)
class SigmoidNorm(Objective):
    """DPO on log-ratios per token: TRL's `sigmoid_norm`. RSO's "sigmoid-norm" is another: DPO itself, on sums.

        L = -log sigmoid(beta d),   d as in IPO

    beta: > 0, default 0.1 as in TRL; means are far smaller than sums, so useful values are larger than DPO's.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("sigmoid_norm", "beta", self.beta, above_zero=True)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        ratio = log_ratio("sigmoid_norm", policy, ref_logps) / policy.length.clamp(min=1)
        chosen, rejected = (self.beta * ratio).chunk(2)
        loss = -logsigmoid(chosen - rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


def _require_smoothing(objective: str, value: float) -> None:
    require_number(objective, "label_smoothing", value)
    if value >= 0.5:
        raise ValueError(f"{objective}: label_smoothing: got {value!r}, need a number below 0.5: half is pure noise")

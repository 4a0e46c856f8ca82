"""DPO and its relatives on log-ratios to a reference: cDPO, robust DPO, IPO, length-normalised DPO.

Where f_divergence_type and f_alpha_divergence_coef are parameters, the log-ratios are the scores of `divergences.py`.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import (
    LossTerms,
    Objective,
    require_input,
    require_number,
    require_smoothing,
    reward_metrics,
)
from asft_kernels.objectives.divergences import divergence_score, require_divergence

SMALLEST_TAU = 4e-155  # 1 / (2 beta) is then 1.25e154, and its square 1.6e308, under float64's 1.8e308


def log_ratio(objective: str, policy: Logps, ref_logps: Tensor | None) -> Tensor:
    """log(pi / pi_ref) of each whole answer, (R,)."""
    return policy.sum - require_input(objective, "ref_logps", ref_logps, len(policy.sum))


class Diverging(Protocol):
    """An objective whose log-ratios are scores of an f-divergence."""

    @property
    def f_divergence_type(self) -> str: ...
    @property
    def f_alpha_divergence_coef(self) -> float: ...


def score(name: str, objective: Diverging, policy: Logps, ref_logps: Tensor | None) -> Tensor:
    """What the objective compares of each whole answer, (R,): the log-ratio, unless it has another divergence."""
    ratio = log_ratio(name, policy, ref_logps)
    return divergence_score(ratio, objective.f_divergence_type, objective.f_alpha_divergence_coef)


def require_squarable(objective: str, beta: float) -> None:
    if beta < SMALLEST_TAU:
        raise ValueError(f"{objective}: beta: got {beta!r}, need 4e-155 at least: float64 has no (1 / (2 beta))^2")


@dataclass(frozen=True)
class DPO(Objective):
    """Direct Preference Optimization, arXiv 2305.18290, Eq. 7; with label_smoothing the conservative form, cDPO.

        h = beta [(S_w - ref_S_w) - (S_l - ref_S_l)],   L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    beta: > 0, default 0.1. label_smoothing e: share of pairs labelled the wrong way round, 0 (default) to below 0.5.
    f_divergence_type: "reverse_kl" (default), "forward_kl", "js_divergence" or "alpha_divergence", the last with
        f_alpha_divergence_coef, any finite number, default 0.5: f-DPO, arXiv 2309.16240.
    TRL 1.16's `sigmoid` ignores label_smoothing, which only its `robust` reads.
    """

    arxiv: ClassVar[str] = "2305.18290"
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("dpo", "beta", self.beta, above_zero=True)
        require_divergence("dpo", self.f_divergence_type, self.f_alpha_divergence_coef)
        require_smoothing("dpo", self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * score("dpo", self, policy, ref_logps)).chunk(2)
        h = chosen - rejected
        loss = -logsigmoid(h) + self.label_smoothing * h  # log sigmoid(-h) = log sigmoid(h) - h
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


@dataclass(frozen=True)
class Robust(Objective):
    """Provably robust DPO, arXiv 2403.00409: the unbiased estimate of DPO's loss where labels are flipped at rate e.

        L = [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e),   h as in DPO

    beta: > 0, default 0.1. label_smoothing e: 0 (default: plain DPO) to below 0.5. L has no lower bound for e > 0.
    f_divergence_type, f_alpha_divergence_coef: as DPO's.
    """

    arxiv: ClassVar[str] = "2403.00409"
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("robust", "beta", self.beta, above_zero=True)
        require_divergence("robust", self.f_divergence_type, self.f_alpha_divergence_coef)
        require_smoothing("robust", self.label_smoothing)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (self.beta * score("robust", self, policy, ref_logps)).chunk(2)
        h = chosen - rejected
        loss = -logsigmoid(h) - self.label_smoothing / (1 - 2 * self.label_smoothing) * h
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))


@dataclass(frozen=True)
class IPO(Objective):
    """Identity Preference Optimisation, arXiv 2310.12036, Eq. 17, on log-ratios per token, as TRL has it.

        L = (d - 1 / (2 beta))^2,   d = (S_w - ref_S_w) / m_w - (S_l - ref_S_l) / m_l

    beta: the paper's tau, > 0, default 0.1. On sums instead of means it would be another loss.
    f_divergence_type, f_alpha_divergence_coef: as DPO's.
    """

    arxiv: ClassVar[str] = "2310.12036"
    beta: float = 0.1
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("ipo", "beta", self.beta, above_zero=True)
        require_divergence("ipo", self.f_divergence_type, self.f_alpha_divergence_coef)
        require_squarable("ipo", self.beta)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        chosen, rejected = (score("ipo", self, policy, ref_logps) / policy.length.clamp(min=1)).chunk(2)
        loss = (chosen - rejected - 1 / (2 * self.beta)).square()
        metrics = reward_metrics(self.beta * chosen, self.beta * rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, metrics)


@dataclass(frozen=True)
class SigmoidNorm(Objective):
    """DPO on log-ratios per token: TRL's `sigmoid_norm`. RSO's "sigmoid-norm" is another: DPO itself, on sums.

        L = -log sigmoid(beta d),   d as in IPO

    beta: > 0, default 0.1 as in TRL; means are far smaller than sums, so useful values are larger than DPO's.
    f_divergence_type, f_alpha_divergence_coef: as DPO's.
    """

    beta: float = 0.1
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        require_number("sigmoid_norm", "beta", self.beta, above_zero=True)
        require_divergence("sigmoid_norm", self.f_divergence_type, self.f_alpha_divergence_coef)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        ratio = score("sigmoid_norm", self, policy, ref_logps) / policy.length.clamp(min=1)
        chosen, rejected = (self.beta * ratio).chunk(2)
        loss = -logsigmoid(chosen - rejected)
        return LossTerms(loss, -policy.chosen.avg, loss, reward_metrics(chosen, rejected))

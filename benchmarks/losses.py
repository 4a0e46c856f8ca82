"""The losses of the benchmark, as functions of per-token log-probabilities: (2B, T), 0 where masked.

ASFT is the package's own. The others are those of Liger-Kernel's chunked losses at their defaults, which come with
their loss or not at all; every contestant that yields log-probabilities is given these.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import ASFT

IGNORE = -100


def sequence_logps(logps: Tensor, labels: Tensor) -> Logps:
    """Sums in float64: the number of tokens in a sequence then costs no digits."""
    return Logps(logps.double().sum(1), (labels != IGNORE).sum(1))


def asft(logps: Tensor, labels: Tensor) -> Tensor:
    """-2 avg_w - log(1 - p_l) at the defaults lam = beta = sft_weight = 1."""
    return ASFT()(sequence_logps(logps, labels)).loss.mean()


def simpo(logps: Tensor, labels: Tensor, beta: float = 0.1, gamma: float = 0.5) -> Tensor:
    """-log sigmoid(beta (avg_w - avg_l) - gamma), arXiv 2405.14734."""
    chosen, rejected = sequence_logps(logps, labels).avg.chunk(2)
    return -logsigmoid(beta * (chosen - rejected) - gamma).mean()


def dpo(logps: Tensor, labels: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (sum_w - sum_l)): arXiv 2305.18290 against a reference that is uniform over answers."""
    chosen, rejected = sequence_logps(logps, labels).sum.chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


def orpo(logps: Tensor, labels: Tensor, beta: float = 0.1) -> Tensor:
    """The chosen tokens' mean NLL - beta log sigmoid(f_w - f_l), f = avg - log(1 - exp(avg)), arXiv 2403.07691."""
    policy = sequence_logps(logps, labels)
    odds = policy.avg - torch.log(-torch.expm1(policy.avg))
    chosen, rejected = odds.chunk(2)
    nll = -policy.chosen.sum.sum() / policy.chosen.length.sum()
    return nll - beta * logsigmoid(chosen - rejected).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"asft": asft, "simpo": simpo, "dpo": dpo, "orpo": orpo}

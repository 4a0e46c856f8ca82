"""f-divergences in the place of DPO's reverse KL: what of a log-ratio the loss compares.

    s = f'(pi / pi_ref) up to a constant, as TRL has it, with r = log(pi / pi_ref):

    reverse_kl (default)   r                         DPO
    forward_kl             1 - exp(-r)
    alpha_divergence       (exp((a - 1) r) - 1) / (a - 1)     a = 1 is reverse_kl, a = 0 forward_kl
    js_divergence          log 2 + log sigmoid(r)

f-DPO, arXiv 2309.16240 (its alpha is 1 - a).
"""

import math
import sys
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.objectives.base import require_choice, require_factor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # where TRL clamps it


def divergence_score(log_ratio: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float) -> Tensor:
    """s of each whole answer, (R,)."""
    if f_divergence_type == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if f_divergence_type == "reverse_kl":
        return log_ratio
    power = -1.0 if f_divergence_type == "forward_kl" else f_alpha_divergence_coef - 1
    return log_ratio if power == 0 else _straightened_expm1(power * log_ratio) / power


def _straightened_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, and past LARGEST_EXPONENT the tangent: finite, and not let go by a clamp's gradient of 0."""
    beyond = torch.relu(x - LARGEST_EXPONENT)  # not x - clamped x: exp(80) would cancel in the gradient, and leave none
    return torch.expm1(x.clamp(max=LARGEST_EXPONENT)) + beyond * math.exp(LARGEST_EXPONENT)


def require_divergence(objective: str, f_divergence_type: object, f_alpha_divergence_coef: float) -> None:
    require_choice(objective, "f_divergence_type", f_divergence_type, F_DIVERGENCES)
    coef = f_alpha_divergence_coef
    most = sys.float_info.max
    if not isinstance(coef, Real) or isinstance(coef, bool) or not -most <= coef <= most:
        raise ValueError(f"{objective}: f_alpha_divergence_coef: got {coef!r}, need a finite number")
    require_factor(objective, "f_alpha_divergence_coef", coef)

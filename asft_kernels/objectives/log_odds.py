"""Log-odds of a sequence and their log-sigmoid, with the derivative by hand near p = 1.

    p = exp(avg),  f = log(p / (1 - p)) = avg - log(-expm1(avg)),  df/davg = 1 / (1 - p)

f diverges as avg -> 0. For avg > -FLOOR the loss terms go on as straight lines from -FLOOR: C1, with a
gradient that saturates. A clamp would give gradient 0 to exactly the rejected answers the model is
surest of; `log1p(-exp(avg))` is -inf from avg = -1e-8, and autograd through `where` gives NaN.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

FLOOR = 1e-6


def log_odds(avg: Tensor) -> Tensor:
    """f at the floored avg: finite for every finite avg."""
    floored = avg.clamp(max=-FLOOR)
    return floored - torch.log(-torch.expm1(floored))


def nll_of_odds(avg: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * f(avg)), differentiable; a negative beta gives the rejected side's term."""
    return _NLLOfOdds.apply(avg, beta)


class _NLLOfOdds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, avg: Tensor, beta: float) -> Tensor:
        floored = avg.clamp(max=-FLOOR)
        scaled = beta * log_odds(avg)
        slope = -beta * torch.sigmoid(-scaled) / -torch.expm1(floored)
        ctx.save_for_backward(slope)
        return softplus(-scaled, threshold=40) + slope * (avg - floored)  # past 40, float64 softplus is exact

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None

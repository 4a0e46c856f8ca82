"""Log-odds of a sequence and their log-sigmoid, finite with finite gradients for every finite avg.

    p = exp(avg),  f = log(p / (1 - p)) = avg - log(-expm1(avg)),  df/davg = 1 / (1 - p)

f diverges as avg -> 0. For avg > -FLOOR the loss terms go on as straight lines from -FLOOR: C1, with a
gradient that saturates. A clamp would give gradient 0 to exactly the rejected answers the model is
surest of; `log1p(-exp(avg))` is -inf from avg = -1e-8, and `where` between two forms of it gives NaN
gradients. Below the floor autograd's own derivative, 1 + exp(avg) / -expm1(avg), adds positive numbers
and is exact to rounding.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

FLOOR = 1e-6


def log_odds(avg: Tensor) -> Tensor:
    """f at the floored avg."""
    floored = avg.clamp(max=-FLOOR)
    return floored - torch.log(-torch.expm1(floored))


def nll_of_odds(avg: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * f(avg)); a negative beta gives the rejected side's term."""
    floored = avg.clamp(max=-FLOOR)
    odds = beta * log_odds(avg)
    slope = -beta * torch.sigmoid(-odds) / -torch.expm1(floored)
    # avg - floored is 0, with gradient 0, below the floor; past it, all the gradient there is.
    return softplus(-odds, threshold=40) + slope.detach() * (avg - floored)

"""The losses that the field compares with, as TRL 1.16 defines them unless said; see `reference.losses`."""

import inspect
import math

import torch
from torch.nn.functional import logsigmoid

FLOOR = 1e-6  # nearer to 0 than this, log-odds or the loss of them go on as the straight line from here


def name_of(objective):
    """Of an object: its class's name. Small letters alone, so that HingeNorm and "hinge_norm" are one."""
    name = objective if isinstance(objective, str) else type(objective).__name__
    return name.lower().replace("_", "")


def parameters_of(formula, objective):
    """What the objective's object says of the formula's parameters; nothing for a name: the formula's defaults."""
    names = inspect.signature(formula).parameters
    return {} if isinstance(objective, str) else {k: getattr(objective, k) for k in names if hasattr(objective, k)}


def log_ratio(row):
    return row.S - row.ref


def margin(chosen, rejected):
    return log_ratio(chosen) - log_ratio(rejected)


def margin_per_token(chosen, rejected):
    return log_ratio(chosen) / chosen.m - log_ratio(rejected) / rejected.m


def nll(row):
    """Mean over the row's nll tokens, or over its own (weighted) where it has no others."""
    return -row.S / row.m if row.nll_logps is row.logps else -row.nll_logps.mean()


def log_odds(avg):
    avg = avg.clamp(max=-FLOOR)
    return avg - torch.log(-torch.expm1(avg))


def nll_of_odds(avg, beta):
    if avg <= -FLOOR:
        return -logsigmoid(beta * log_odds(avg))
    odds = -FLOOR - math.log(-math.expm1(-FLOOR))
    value = math.log1p(math.exp(-beta * odds))
    slope = -beta / (1 + math.exp(beta * odds)) / -math.expm1(-FLOOR)
    return value + slope * (avg + FLOOR)


def asft(chosen, rejected, lam=1.0, beta=1.0, sft_weight=1.0):
    """Cross-entropy of the chosen answer, and two binary cross-entropies of the log-odds."""
    align = nll_of_odds(chosen.S / chosen.m, beta) + nll_of_odds(rejected.S / rejected.m, -beta)
    return sft_weight * nll(chosen) + lam * align


def sft(rows, normalization="sequence"):
    """Mean negative log-likelihood: of each row, its sum, or shares of the mean over all tokens of the batch."""
    if normalization == "token":
        tokens = sum(row.m for row in rows)
        return [-row.S * len(rows) / tokens for row in rows]
    return [-row.S / (row.m if normalization == "sequence" else 1) for row in rows]


def dpo(chosen, rejected, beta=0.1, label_smoothing=0.0):
    """Cross-entropy of a classifier of pairs, with a target of 1 - label_smoothing."""
    h = beta * margin(chosen, rejected)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def robust(chosen, rejected, beta=0.1, label_smoothing=0.0):
    h = beta * margin(chosen, rejected)
    clean, flipped = -(1 - label_smoothing) * logsigmoid(h), -label_smoothing * logsigmoid(-h)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def ipo(chosen, rejected, beta=0.1):
    return (margin_per_token(chosen, rejected) - 1 / (2 * beta)) ** 2


def sigmoid_norm(chosen, rejected, beta=0.1):
    return -logsigmoid(beta * margin_per_token(chosen, rejected))


def hinge(chosen, rejected, gamma=0.05):
    return torch.clamp(1 - gamma * (chosen.S - rejected.S), min=0)


def hinge_norm(chosen, rejected, gamma=0.05):
    return torch.clamp(1 - gamma * margin(chosen, rejected), min=0)


def orpo(chosen, rejected, lam=0.1, beta=1.0):
    odds = []
    for row in (chosen, rejected):
        avg = row.S / row.m
        beyond = (avg + FLOOR).clamp(min=0) / -math.expm1(-FLOOR)
        odds.append(log_odds(avg) + beyond)
    return nll(chosen) - lam * logsigmoid(beta * (odds[0] - odds[1]))


def simpo(chosen, rejected, beta=2.0, gamma=0.5):
    return -logsigmoid(beta * (chosen.S / chosen.m - rejected.S / rejected.m) - gamma)


def cpo(chosen, rejected, beta=0.1, alpha=1.0):
    return -logsigmoid(beta * (chosen.S - rejected.S)) + alpha * nll(chosen)


def kto(row, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, kl=0.0):
    if row.desirable:
        return desirable_weight * torch.sigmoid(-beta * (log_ratio(row) - kl))
    return undesirable_weight * torch.sigmoid(-beta * (kl - log_ratio(row)))


FORMULAS = {
    "asft": ("pair", asft),
    "sft": ("rows", sft),
    "dpo": ("pair", dpo),
    "robust": ("pair", robust),
    "ipo": ("pair", ipo),
    "sigmoidnorm": ("pair", sigmoid_norm),
    "hinge": ("pair", hinge),
    "hingenorm": ("pair", hinge_norm),
    "orpo": ("pair", orpo),
    "simpo": ("pair", simpo),
    "cpo": ("pair", cpo),
    "kto": ("row", kto),
}

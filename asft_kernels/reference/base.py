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


def score(row, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5):
    """f'(pi / pi_ref) up to a constant, as f-DPO has it; exponentials go on as straight lines past exp(80)."""
    r = log_ratio(row)
    if f_divergence_type == "js_divergence":
        return torch.log(2 * torch.sigmoid(r)) if r > -700 else math.log(2) + r
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": f_alpha_divergence_coef - 1}[f_divergence_type]
    if power == 0:
        return r
    x = power * r
    grown = torch.exp(x) if x <= 80 else math.exp(80) * (1 + x - 80)
    return (grown - 1) / power


def margin(chosen, rejected, *f):
    return score(chosen, *f) - score(rejected, *f)


def margin_per_token(chosen, rejected, *f):
    return score(chosen, *f) / chosen.m - score(rejected, *f) / rejected.m


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


def nlls(pairs, normalization):
    """Of the chosen rows: means per token, or shares of the mean over all their tokens."""
    if normalization == "sequence":
        return [nll(win) for win, _ in pairs]
    own = [win.nll_logps is win.logps for win, _ in pairs]
    sums = [win.S if mine else win.nll_logps.sum() for (win, _), mine in zip(pairs, own, strict=True)]
    tokens = sum(len(win.nll_logps) for win, _ in pairs)
    return [-total * len(pairs) / max(tokens, 1) for total in sums]


def sft(rows, normalization="sequence", label_smoothing=0.0, lse_square_scale=0.0):
    """Cross-entropy of each row's smoothed labels, with the squared log of the sum of exponentials beside it.

    Its mean, its sum, or shares of the mean over all tokens of the batch.
    """
    losses = []
    tokens = sum(row.m for row in rows)
    for row in rows:
        total = -(1 - label_smoothing) * row.S
        weights = 1 if row.marks is None else row.marks
        if label_smoothing:
            total = total - label_smoothing * (weights * row.logits.log_softmax(-1).mean(-1)).sum()
        if lse_square_scale:
            total = total + lse_square_scale * (weights * row.logits.logsumexp(-1) ** 2).sum()
        shares = {"sequence": 1 / row.m, "sum": 1.0, "token": len(rows) / tokens}
        losses.append(total * shares[normalization])
    return losses


def dpo(chosen, rejected, beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5):
    """Cross-entropy of a classifier of pairs, with a target of 1 - label_smoothing."""
    h = beta * margin(chosen, rejected, f_divergence_type, f_alpha_divergence_coef)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def robust(
    chosen, rejected, beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5
):
    h = beta * margin(chosen, rejected, f_divergence_type, f_alpha_divergence_coef)
    clean, flipped = -(1 - label_smoothing) * logsigmoid(h), -label_smoothing * logsigmoid(-h)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def ipo(chosen, rejected, beta=0.1, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5):
    return (margin_per_token(chosen, rejected, f_divergence_type, f_alpha_divergence_coef) - 1 / (2 * beta)) ** 2


def sigmoid_norm(chosen, rejected, beta=0.1, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5):
    return -logsigmoid(beta * margin_per_token(chosen, rejected, f_divergence_type, f_alpha_divergence_coef))


def hinge(chosen, rejected, gamma=0.05):
    return torch.clamp(1 - gamma * (chosen.S - rejected.S), min=0)


def hinge_norm(chosen, rejected, gamma=0.05, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5):
    return torch.clamp(1 - gamma * margin(chosen, rejected, f_divergence_type, f_alpha_divergence_coef), min=0)


def smoothed(h, label_smoothing):
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def orpo(pairs, lam=0.1, beta=1.0, nll_normalization="sequence"):
    losses = []
    for pair, likelihood in zip(pairs, nlls(pairs, nll_normalization), strict=True):
        odds = []
        for row in pair:
            avg = row.S / row.m
            beyond = (avg + FLOOR).clamp(min=0) / -math.expm1(-FLOOR)
            odds.append(log_odds(avg) + beyond)
        losses.append(likelihood - lam * logsigmoid(beta * (odds[0] - odds[1])))
    return losses


def simpo(chosen, rejected, beta=2.0, gamma=0.5, label_smoothing=0.0):
    return smoothed(beta * (chosen.S / chosen.m - rejected.S / rejected.m) - gamma, label_smoothing)


def cpo(pairs, beta=0.1, alpha=1.0, label_smoothing=0.0, nll_normalization="sequence"):
    likelihoods = nlls(pairs, nll_normalization)
    return [
        smoothed(beta * (win.S - lose.S), label_smoothing) + alpha * likelihood
        for (win, lose), likelihood in zip(pairs, likelihoods, strict=True)
    ]


def kto(row, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, kl=0.0):
    kl = getattr(row, "kl", kl)
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
    "orpo": ("pairs", orpo),
    "simpo": ("pair", simpo),
    "cpo": ("pairs", cpo),
    "kto": ("row", kto),
}

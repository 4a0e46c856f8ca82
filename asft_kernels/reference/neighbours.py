"""The losses of the papers around ASFT, each from its paper or its authors' code; see `reference.losses`."""

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid

from asft_kernels.reference.base import margin


def lmpo(
    pairs, beta=2.0, gamma_beta_ratio=0.25, lam=0.2, power=5, running_mean=0.0, running_std=0.0, steps=0, training=True
):
    """By the statistics that the objective holds; before there are any, in training, by these pairs': its first step.

    Nothing is updated. Call it after the fused call, which updates before it uses them.
    """
    values = []
    for win, lose in pairs:
        length = (win.m + lose.m) / 2
        p_w, p_l = (math.exp(row.S.item() / row.m * length / row.m) for row in (win, lose))
        values.append((1 - p_w) * (1 - (p_w - p_l) ** power) / 2)
    mean, std = 0.0, math.inf
    if steps:
        decayed = 1 - 0.9 ** int(steps)
        mean, std = float(running_mean) / decayed, float(running_std) / decayed
    elif training and len(values) > 1:
        mean = sum(values) / len(values)
        std = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    home = beta * gamma_beta_ratio
    return [
        -logsigmoid(beta * (win.S / win.m - lose.S / lose.m) - home - lam * (x - mean) / (std + 1e-8))
        for (win, lose), x in zip(pairs, values, strict=True)
    ]


def poft(row, beta=1.0, gamma=0.0):
    """row.ref: the mean over aligned models of their mean log-probability per token."""
    return -logsigmoid(beta * row.S / row.m - beta * row.ref + gamma)


def fpo(chosen, rejected, beta=0.1, alpha=0.5):
    reference_margin = beta / chosen.m * chosen.ref - beta / rejected.m * rejected.ref
    delta = alpha * (beta * rejected.feature_distance - (beta * chosen.feature_distance).detach())
    return -logsigmoid(beta / chosen.m * chosen.S - beta / rejected.m * rejected.S - reference_margin - delta)


def bmc(pairs, base, delta=2.0, ref_weighting="own"):
    """base: an objective, as BMC holds it."""
    from asft_kernels.reference.losses import evaluate  # which imports this file

    rows = []
    for row in [pair[0] for pair in pairs] + [pair[1] for pair in pairs]:
        doubt = torch.tensor([min(math.exp(min(-x, 700.0)), delta) for x in row.logps.tolist()])
        weights = 1 + row.marks * doubt.to(row.logps)
        weighted = SimpleNamespace(**vars(row))
        weighted.S = (weights * row.logps).sum()
        if ref_weighting == "policy" and row.ref is not None:
            weighted.ref = (weights * row.ref).sum()
        rows.append(weighted)
    return evaluate(base, rows, {})[0][: len(pairs)]


def rpo(pairs, beta=0.1, eta=0.005, normalization="sum"):
    tokens = sum(win.m for win, _ in pairs)
    losses = []
    for win, lose in pairs:
        if normalization == "sum":
            imitation = eta * beta * -win.S
        elif normalization == "sequence":
            imitation = eta * -win.S / win.m
        else:  # shares of the mean over all chosen tokens, so that the mean over pairs is that mean
            imitation = eta * -win.S * len(pairs) / tokens
        losses.append(imitation - logsigmoid(beta * margin(win, lose)))
    return losses


def mrpo(chosen, rejected, beta=0.1, alpha=None, clip=0.1, swap_weights=False):
    refs = [
        (float(win), float(lose)) for win, lose in zip(chosen.ref.reshape(-1), rejected.ref.reshape(-1), strict=True)
    ]
    if alpha is None:
        total = sum(abs(win - lose) for win, lose in refs) + 1e-6
        alpha = [abs(win - lose) / total for win, lose in refs[1:]]
        alpha = [1 - sum(alpha), *alpha]
    if swap_weights:
        alpha = alpha[::-1]
    base_w, base_l = refs[0]
    if clip is not None:
        for k, (win, lose) in enumerate(refs[1:], start=1):
            mean_w, mean_l = (base_w + win) / 2, (base_l + lose) / 2
            share = abs(mean_w) / (abs(mean_w) + abs(mean_l) + 1e-6)
            e_w, e_l = clip * share, clip * (1 - share)
            refs[k] = (
                min(max(win, (1 + e_w) * base_w), (1 - e_w) * base_w),
                min(max(lose, (1 + e_l) * base_l), (1 - e_l) * base_l),
            )
    virtual = []
    for side in zip(*refs, strict=True):
        least = min(side)
        virtual.append(least - math.log(sum(a * math.exp(least - s) for a, s in zip(alpha, side, strict=True))))
    return -logsigmoid(beta * ((chosen.S - virtual[0]) - (rejected.S - virtual[1])))


FORMULAS = {
    "lmpo": ("pairs", lmpo),
    "poft": ("row", poft),
    "fpo": ("pair", fpo),
    "bmc": ("pairs", bmc),
    "rpo": ("pairs", rpo),
    "mrpo": ("pair", mrpo),
}

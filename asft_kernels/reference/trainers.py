"""The losses on log-ratios by the names of TRL 1.16's DPO trainer, and what it does to any; see `reference.losses`."""

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid

from asft_kernels.reference.base import log_ratio, margin, smoothed


def exo_pair(
    chosen, rejected, beta=0.1, label_smoothing=1e-3, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5
):
    """KL(q || p) of two-way distributions, q the model's and p the labels'."""
    h = beta * margin(chosen, rejected, f_divergence_type, f_alpha_divergence_coef)
    log_q = torch.log_softmax(torch.stack([h, torch.zeros_like(h)]), dim=0)
    log_p = torch.tensor([1 - label_smoothing, label_smoothing], dtype=log_q.dtype).log()
    return (log_q.exp() * (log_q - log_p)).sum()


def nca_pair(chosen, rejected, beta=0.1):
    win, lose = beta * log_ratio(chosen), beta * log_ratio(rejected)
    return -(logsigmoid(win) + (logsigmoid(-win) + logsigmoid(-lose)) / 2)


def bco_pair(chosen, rejected, beta=0.1):
    return -logsigmoid(beta * log_ratio(chosen)) - logsigmoid(-beta * log_ratio(rejected))


def sppo_hard(chosen, rejected, beta=0.1):
    return (log_ratio(chosen) - 1 / (2 * beta)) ** 2 + (log_ratio(rejected) + 1 / (2 * beta)) ** 2


def apo_zero(chosen, rejected, beta=0.1):
    return torch.sigmoid(-beta * log_ratio(chosen)) + torch.sigmoid(beta * log_ratio(rejected))


def apo_down(chosen, rejected, beta=0.1):
    return torch.sigmoid(beta * log_ratio(chosen)) + torch.sigmoid(-beta * margin(chosen, rejected))


def discopop(
    chosen, rejected, beta=0.1, discopop_tau=0.05, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5
):
    h = beta * margin(chosen, rejected, f_divergence_type, f_alpha_divergence_coef)
    share = torch.sigmoid(h / discopop_tau)
    return -(1 - share) * logsigmoid(h) + share * torch.exp(-h)


def aot(pairs, beta=0.1, label_smoothing=0.0):
    ours = [win.S - lose.S for win, lose in pairs]
    theirs = [win.ref - lose.ref for win, lose in pairs]
    return _by_rank(ours, theirs, beta, label_smoothing)


def aot_unpaired(pairs, beta=0.1, label_smoothing=0.0):
    return _by_rank([log_ratio(w) for w, _ in pairs], [log_ratio(x) for _, x in pairs], beta, label_smoothing)


def _by_rank(ours, theirs, beta, label_smoothing):
    """The k-th smallest of ours against the k-th smallest of theirs, given back where ours stood."""
    losses = [torch.empty(0)] * len(ours)
    theirs = sorted(theirs, key=lambda x: x.item())
    for k, i in enumerate(sorted(range(len(ours)), key=lambda i: ours[i].item())):
        losses[i] = smoothed(beta * (ours[i] - theirs[k]), label_smoothing)
    return losses


def ld_dpo(pairs, base, ld_alpha):
    """base: an objective. row.ref is (m,), per token."""
    rows = []
    for side in (0, 1):
        for pair in pairs:
            row, shared = SimpleNamespace(**vars(pair[side])), min(pair[0].m, pair[1].m)
            weights = torch.tensor([1.0] * shared + [ld_alpha] * (row.m - shared), dtype=torch.float64)
            if row.marks is not None:
                weights = weights * row.marks
            row.S, row.ref = (row.logps * weights).sum(), (row.ref * weights).sum()
            rows.append(row)
    return _around(base, rows)


def wpo(pairs, base):
    """base: an objective."""
    rows = [pair[side] for side in (0, 1) for pair in pairs]
    weights = []
    for row in rows:
        probs = row.logits.detach().softmax(-1)
        aligned = row.logps.detach() - (probs**2).sum(-1).log()
        weights.append(math.exp(float(aligned.mean())))
    losses = _around(base, rows)
    return [loss * weights[i] * weights[len(pairs) + i] for i, loss in enumerate(losses)]


def _around(base, rows):
    from asft_kernels.reference.losses import evaluate  # which imports this file

    return evaluate(base, rows, {})[0][: len(rows) // 2]


FORMULAS = {
    "exopair": ("pair", exo_pair),
    "ncapair": ("pair", nca_pair),
    "bcopair": ("pair", bco_pair),
    "sppohard": ("pair", sppo_hard),
    "apozero": ("pair", apo_zero),
    "apodown": ("pair", apo_down),
    "discopop": ("pair", discopop),
    "aot": ("pairs", aot),
    "aotunpaired": ("pairs", aot_unpaired),
    "lddpo": ("pairs", ld_dpo),
    "wpo": ("pairs", wpo),
}

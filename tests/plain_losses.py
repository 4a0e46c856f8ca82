"""The oracle of test_fuzz.py: whole logits and losses in their closed form, float64, of torch alone, row by row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass
class Token:
    """A label that carries loss: where its row of hidden stands in hidden.flatten(0, -2), and where itself."""

    row: int
    label: int
    at: int


def tokens_of(labels: Tensor, borders: Sequence[int], ignore: int, shift: bool) -> list[list[Token]]:
    """Of each sequence [borders[i], borders[i + 1]) of the flat labels."""
    flat = labels.flatten().tolist()
    sequences = []
    for start, stop in pairwise(borders):
        pairs = [(at - 1, at) for at in range(start + 1, stop)] if shift else [(at, at) for at in range(start, stop)]
        sequences.append([Token(row, flat[at], at) for row, at in pairs if flat[at] != ignore])
    return sequences


def capped(raw: Tensor, scale: float, cap: float | None) -> Tensor:
    """cap tanh(scale raw / cap), whose derivative keeps its digits where tanh is 1 to the last of them."""
    u = scale * raw
    if cap is None:
        return u
    return cap * torch.where(u > 0, 1 - 2 * torch.sigmoid(-2 * u / cap), 2 * torch.sigmoid(2 * u / cap) - 1)


def label_logps(z: Tensor, labels: Tensor) -> Tensor:
    """(N,) of (N, V) logits, by the logits of the others: 1 - p keeps no digits where p is near 1."""
    own = torch.nn.functional.one_hot(labels, z.shape[1]).bool()
    return -nls(z[own] - z.masked_fill(own, -torch.inf).logsumexp(-1))


@dataclass
class Rows:
    """Of each row: the sum of its weighted log-probabilities, its tokens, its likelihood's mean, its reference."""

    sums: list[Tensor]
    lengths: list[int]
    nll: list[Tensor]
    refs: list[float]

    def avg(self, row: int) -> Tensor:
        return self.sums[row] / self.lengths[row]

    def ratio(self, row: int) -> Tensor:
        return self.sums[row] - self.refs[row]


def nls(x: Tensor) -> Tensor:
    """-log sigmoid(x)."""
    return torch.nn.functional.softplus(-x, threshold=50)  # where e^-50 adds nothing


def odds(avg: Tensor) -> Tensor:
    return avg - torch.log(-torch.expm1(avg))


def smoothed(h: Tensor, e: float) -> Tensor:
    return (1 - e) * nls(h) + e * nls(-h)


PAIRS: dict[str, Callable[..., Tensor]] = {  # rows, chosen row, rejected row, parameters -> the pair's loss
    "asft": lambda r, w, x, lam, beta, sft_weight: (
        sft_weight * r.nll[w] + lam * (nls(beta * odds(r.avg(w))) + nls(-beta * odds(r.avg(x))))
    ),
    "orpo": lambda r, w, x, lam, beta: r.nll[w] + lam * nls(beta * (odds(r.avg(w)) - odds(r.avg(x)))),
    "simpo": lambda r, w, x, beta, gamma, label_smoothing: smoothed(
        beta * (r.avg(w) - r.avg(x)) - gamma, label_smoothing
    ),
    "cpo": lambda r, w, x, beta, alpha, label_smoothing: (
        smoothed(beta * (r.sums[w] - r.sums[x]), label_smoothing) + alpha * r.nll[w]
    ),
    "hinge": lambda r, w, x, gamma: torch.relu(1 - gamma * (r.sums[w] - r.sums[x])),
    "dpo": lambda r, w, x, beta, label_smoothing: smoothed(beta * (r.ratio(w) - r.ratio(x)), label_smoothing),
    "robust": lambda r, w, x, beta, label_smoothing: (
        (1 - label_smoothing) * nls(beta * (r.ratio(w) - r.ratio(x)))
        - label_smoothing * nls(beta * (r.ratio(x) - r.ratio(w)))
    ) / (1 - 2 * label_smoothing),
    "ipo": lambda r, w, x, beta: (
        (r.ratio(w) / r.lengths[w] - r.ratio(x) / r.lengths[x] - 1 / (2 * beta)) ** 2
    ),
    "sigmoid_norm": lambda r, w, x, beta: nls(beta * (r.ratio(w) / r.lengths[w] - r.ratio(x) / r.lengths[x])),
    "hinge_norm": lambda r, w, x, gamma: torch.relu(1 - gamma * (r.ratio(w) - r.ratio(x))),
    "sppo_hard": lambda r, w, x, beta: (r.ratio(w) - 0.5 / beta) ** 2 + (r.ratio(x) + 0.5 / beta) ** 2,
    "nca_pair": lambda r, w, x, beta: (
        nls(beta * r.ratio(w)) + 0.5 * nls(-beta * r.ratio(w)) + 0.5 * nls(-beta * r.ratio(x))
    ),
    "apo_zero": lambda r, w, x, beta: 1 - torch.sigmoid(beta * r.ratio(w)) + torch.sigmoid(beta * r.ratio(x)),
    "apo_down": lambda r, w, x, beta: (
        torch.sigmoid(beta * r.ratio(w)) + 1 - torch.sigmoid(beta * (r.ratio(w) - r.ratio(x)))
    ),
}  # fmt: skip


def losses_of(name: str, rows: Rows, parameters: dict[str, float]) -> tuple[list[Tensor], list[bool]]:
    """(loss of each pair, or of each row for sft; whether it counts)."""
    if name == "sft":
        counts = [n > 0 for n in rows.lengths]
        return [-s / max(n, 1) for s, n in zip(rows.sums, rows.lengths, strict=True)], counts
    half = len(rows.sums) // 2
    counts = [rows.lengths[i] > 0 < rows.lengths[half + i] for i in range(half)]
    nothing = torch.zeros((), dtype=torch.float64)
    losses = [PAIRS[name](rows, i, half + i, **parameters) if counts[i] else nothing for i in range(half)]
    return losses, counts


def reduced(losses: list[Tensor], counts: list[bool], reduction: str) -> Tensor:
    each = torch.stack([x if counted else 0 * x for x, counted in zip(losses, counts, strict=True)])
    if reduction == "none":
        return each
    return each.sum() / (max(sum(counts), 1) if reduction == "mean" else 1)


def saturated(rows: Rows) -> bool:
    """Whether the log-odds of some row are beyond where asft's and orpo's go on as straight lines."""
    return any(n and math.exp(s.item() / n) > 1 - 1e-5 for s, n in zip(rows.sums, rows.lengths, strict=True))

"""The same calls, plain and slow: full logits, one sequence after another, in the dtype given.

Written from the papers, importing nothing of this package, so that a shared mistake cannot cancel.
Use it to check the fused path, or where a double backward is needed. Keywords that only steer speed
or memory (backend, cache_bytes, chunk_size, num_valid) are accepted and ignored.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fused_linear_logps(
    hidden,
    lm_head,
    labels,
    *,
    cu_seqlens=None,
    shift=True,
    ignore_index=-100,
    logit_scale=1.0,
    softcap=None,
    **_steering,
) -> Tensor:
    """log p of every label, in the shape of labels; 0 at masked places, and label t+1's at index t if shifted."""
    rows = []
    for states, targets in zip(*_sequences(hidden, labels, cu_seqlens), strict=True):
        at = [
            (t, t + 1 if shift else t)
            for t in range(len(targets) - 1 if shift else len(targets))
            if targets[t + 1 if shift else t] != ignore_index
        ]
        row = states.new_zeros(len(targets))
        if at:
            positions, label_positions = (torch.tensor(x, device=labels.device) for x in zip(*at, strict=True))
            logits = _logits(states[positions], lm_head, logit_scale, softcap)
            label = targets[label_positions].long()
            row = row.index_put((positions,), F.log_softmax(logits, dim=-1).gather(1, label[:, None])[:, 0])
        rows.append(row)
    return (torch.cat(rows) if rows else hidden.new_zeros(0)).view(labels.shape)


def fused_asft_loss(
    hidden, lm_head, labels, *, lam=1.0, beta=1.0, sft_weight=1.0, cu_seqlens=None, reduction="mean",
    return_outputs=False, **options,
):  # fmt: skip
    """ASFT, arXiv 2409.10571: cross-entropy of the chosen answer, and two binary cross-entropies of the log-odds."""
    sums, lengths = _sums(hidden, lm_head, labels, cu_seqlens, **options)
    pairs = len(sums) // 2
    losses, sfts, aligns, margins, better = [], [], [], [], []
    avgs = [s / m if m else s for s, m in zip(sums, lengths, strict=True)]
    for i in range(pairs):
        if not (lengths[i] and lengths[pairs + i]):
            losses.append(sums[i] * 0)
            margins.append(sums[i] * 0)
            continue
        chosen, rejected = avgs[i], avgs[pairs + i]
        sfts.append(-chosen)
        aligns.append(_nll_of_odds(chosen, beta) + _nll_of_odds(rejected, -beta))
        losses.append(sft_weight * sfts[-1] + lam * aligns[-1])
        margins.append(_log_odds(chosen) - _log_odds(rejected))
        better.append((chosen > rejected).to(chosen.dtype))
    return _finish(
        losses,
        len(sfts),
        reduction,
        return_outputs,
        hidden,
        sums,
        avgs,
        lengths,
        margins,
        sfts,
        aligns,
        better,
    )


def fused_preference_loss(
    hidden,
    lm_head,
    labels,
    objective,
    *,
    cu_seqlens=None,
    reduction="mean",
    return_outputs=False,
    **options,
):
    """The same by name: "asft" with its defaults, or "sft", the mean negative log-likelihood of each row."""
    if objective == "asft":
        return fused_asft_loss(
            hidden,
            lm_head,
            labels,
            cu_seqlens=cu_seqlens,
            reduction=reduction,
            return_outputs=return_outputs,
            **options,
        )
    if objective != "sft":
        raise ValueError(f"objective: got {objective!r}, need 'asft' or 'sft'")
    sums, lengths = _sums(hidden, lm_head, labels, cu_seqlens, **options)
    avgs = [s / m if m else s for s, m in zip(sums, lengths, strict=True)]
    counted = sum(m > 0 for m in lengths)
    loss = _reduce([-a for a in avgs], counted, reduction, hidden)
    if not return_outputs:
        return loss
    return loss, SimpleNamespace(
        logps=_stack(sums, hidden).detach(),
        avg_logps=_stack(avgs, hidden).detach(),
        lengths=torch.tensor(lengths, device=hidden.device),
        sft_loss=_reduce([-a for a in avgs], counted, "mean", hidden).detach(),
        num_sequences=torch.tensor(counted),
    )


def _sequences(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None):
    if cu_seqlens is None:
        return list(hidden), list(labels)
    sizes = cu_seqlens.diff().tolist()
    return hidden.split(sizes), labels.split(sizes)


def _logits(states: Tensor, lm_head, logit_scale: float, softcap: float | None) -> Tensor:
    if isinstance(lm_head, nn.Linear):
        lm_head = (lm_head.weight, lm_head.bias)
    weight, bias = lm_head if isinstance(lm_head, tuple) else (lm_head, None)
    logits = logit_scale * F.linear(states, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _sums(
    hidden, lm_head, labels, cu_seqlens, shift=True, ignore_index=-100, **options
) -> tuple[list[Tensor], list[int]]:
    logps = fused_linear_logps(
        hidden,
        lm_head,
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        **options,
    )
    states, targets = _sequences(logps, labels, cu_seqlens)
    counts = [int(((t[1:] if shift else t) != ignore_index).sum()) for t in targets]
    return [s.sum() for s in states], counts


FLOOR = 1e-6  # nearer to 0 than this, the loss goes on as the straight line from here


def _log_odds(avg: Tensor) -> Tensor:
    avg = avg.clamp(max=-FLOOR)
    return avg - torch.log(-torch.expm1(avg))


def _nll_of_odds(avg: Tensor, beta: float) -> Tensor:
    if avg <= -FLOOR:
        return -F.logsigmoid(beta * _log_odds(avg))
    odds = -FLOOR - math.log(-math.expm1(-FLOOR))
    value = math.log1p(math.exp(-beta * odds))
    slope = -beta / (1 + math.exp(beta * odds)) / -math.expm1(-FLOOR)
    return value + slope * (avg + FLOOR)


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0)


def _reduce(losses: list[Tensor], counted: int, reduction: str, like: Tensor) -> Tensor:
    stacked = _stack(losses, like)
    if reduction == "none":
        return stacked
    return stacked.sum() if reduction == "sum" else stacked.sum() / max(counted, 1)


def _finish(
    losses,
    counted,
    reduction,
    return_outputs,
    hidden,
    sums,
    avgs,
    lengths,
    margins,
    sfts,
    aligns,
    better,
):
    loss = _reduce(losses, counted, reduction, hidden)
    if not return_outputs:
        return loss
    half = len(sums) // 2
    odds = [_log_odds(a) if m else a for a, m in zip(avgs, lengths, strict=True)]
    figures = {
        f"{side}_{name}": _stack(values[part], hidden).detach()
        for name, values in (("logps", sums), ("avg_logps", avgs), ("log_odds", odds))
        for side, part in (("chosen", slice(half)), ("rejected", slice(half, None)))
    }
    count = torch.tensor(lengths, device=hidden.device)
    means = {
        name: _reduce(v, counted, "mean", hidden).detach()
        for name, v in (("accuracy", better), ("sft_loss", sfts), ("align_loss", aligns))
    }
    return loss, SimpleNamespace(
        **figures, **means, margins=_stack(margins, hidden).detach(), chosen_lengths=count[:half],
        rejected_lengths=count[half:], num_pairs=torch.tensor(counted),
    )  # fmt: skip

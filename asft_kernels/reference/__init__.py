"""The same calls, plain and slow: full logits, one sequence after another, in the dtype given.

Written from the papers, importing nothing of this package, so that a shared mistake cannot cancel.
Use it to check the fused path, or where a double backward is needed. Keywords that only steer speed
or memory (backend, cache_bytes, chunk_size, num_valid) are accepted and ignored.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asft_kernels.reference import losses
from asft_kernels.reference.base import log_odds, nll_of_odds


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
    backend=None,
    cache_bytes=None,
    chunk_size=None,
    num_valid=None,
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


def fused_asft_loss(hidden, lm_head, labels, *, lam=1.0, beta=1.0, sft_weight=1.0, **options):
    """ASFT, arXiv 2409.10571: cross-entropy of the chosen answer, and two binary cross-entropies of the log-odds."""
    return _asft(hidden, lm_head, labels, lam, beta, sft_weight, **options)


def fused_preference_loss(hidden, lm_head, labels, objective, **options):
    """The same by name, with the paper's defaults, or by an object that carries the parameters.

    "asft" as above, "sft" the mean negative log-likelihood of each row, the others by `reference.losses`.
    """
    name = objective if isinstance(objective, str) else type(objective).__name__.lower()
    if name == "asft":
        parameters = {"lam": 1.0, "beta": 1.0, "sft_weight": 1.0}
        if objective != name:
            parameters = {key: getattr(objective, key) for key in parameters}
        return _asft(hidden, lm_head, labels, **parameters, **options)
    plain = getattr(objective, "normalization", "sequence") == "sequence" and not getattr(objective, "stats", ())
    if name == "sft" and plain:
        return _sft(hidden, lm_head, labels, **options)
    return _by_formula(hidden, lm_head, labels, objective, **options)


def _by_formula(
    hidden, lm_head, labels, objective, *, reduction="mean", return_outputs=False, ref_logps=None, token_weights=None,
    nll_labels=None, objective_inputs=None, **options,
):  # fmt: skip
    """By the plain formulas of `reference.losses`; return_outputs is not for them."""
    if return_outputs:
        raise ValueError("return_outputs: got True, need False for this objective: the reference gives its loss alone")
    rows = _rows(hidden, lm_head, labels, **options)
    nll_rows = rows
    if nll_labels is not None:
        nll_rows = _rows(hidden[: len(nll_labels)], lm_head, nll_labels, **options)
    weights = refs = None
    if token_weights is not None:
        weights = _at_valid(token_weights.detach(), labels, aligned_with_labels=True, **options)
    if ref_logps is not None and getattr(objective, "ref_per_token", False):
        refs = _at_valid(ref_logps, labels, aligned_with_labels=False, **options)
    logits = _row_logits(hidden, lm_head, labels, **options) if getattr(objective, "stats", ()) else None
    inputs = objective_inputs or {}
    seen = []
    for i, logps in enumerate(rows):
        ref = None if ref_logps is None else refs[i] if refs else ref_logps[..., i]
        row = SimpleNamespace(logps=logps, m=len(logps), marks=weights[i] if weights else None, ref=ref)
        row.S = logps.sum() if weights is None else (logps * weights[i]).sum()
        row.logits = None if logits is None else logits[i]
        row.nll_logps = nll_rows[i] if i < len(nll_rows) else logps
        for name, values in inputs.items():
            if values.dim():
                setattr(row, name, values[i])
        seen.append(row)
    shared = {name: value for name, value in inputs.items() if not value.dim()}
    values, counted = losses.evaluate(objective, seen, shared)
    return _reduce(values, counted, reduction, hidden)


def _rows(hidden, lm_head, labels, *, cu_seqlens=None, shift=True, ignore_index=-100, **options):
    """Of each row: log-probabilities (m,) of its valid tokens, in order."""
    where = {"cu_seqlens": cu_seqlens, "shift": shift, "ignore_index": ignore_index}
    logps = fused_linear_logps(hidden, lm_head, labels, **where, **options)
    return _at_valid(logps, labels, aligned_with_labels=False, **where)


def _row_logits(
    hidden, lm_head, labels, *, cu_seqlens=None, shift=True, ignore_index=-100, logit_scale=1.0, softcap=None, **options
):
    """Of each row: logits (m, V) at its valid tokens."""
    rows = []
    for states, targets in zip(*_sequences(hidden, labels, cu_seqlens), strict=True):
        if shift:
            states, targets = states[:-1], targets[1:]
        rows.append(_logits(states[targets != ignore_index], lm_head, logit_scale, softcap))
    return rows


def _at_valid(values, labels, *, aligned_with_labels, cu_seqlens=None, shift=True, ignore_index=-100, **options):
    """Of each row: the values (m,) at its valid tokens; they stand at the labels, or at what predicts these."""
    rows = []
    for row, targets in zip(*(_sequences(x, labels, cu_seqlens)[0] for x in (values, labels)), strict=True):
        if shift:
            row = row[1:] if aligned_with_labels else row[:-1]
            targets = targets[1:]
        rows.append(row[targets != ignore_index])
    return rows


def _asft(
    hidden, lm_head, labels, lam, beta, sft_weight, *, reduction="mean", return_outputs=False, token_weights=None,
    nll_labels=None, **options,
):  # fmt: skip
    sums, lengths = _sums(hidden, lm_head, labels, token_weights=token_weights, **options)
    pairs = len(sums) // 2
    avgs = [s / m if m else s for s, m in zip(sums, lengths, strict=True)]
    nll_avgs = avgs
    if nll_labels is not None:
        nll_sums, nll_lengths = _sums(hidden[:pairs], lm_head, nll_labels, **options)
        nll_avgs = [s / m if m else s for s, m in zip(nll_sums, nll_lengths, strict=True)]
    losses, sfts, aligns, margins, better = [], [], [], [], []
    for i in range(pairs):
        if not (lengths[i] and lengths[pairs + i]):
            losses.append(sums[i] * 0)
            margins.append(sums[i] * 0)
            continue
        chosen, rejected = avgs[i], avgs[pairs + i]
        sfts.append(-nll_avgs[i])
        aligns.append(nll_of_odds(chosen, beta) + nll_of_odds(rejected, -beta))
        losses.append(sft_weight * sfts[-1] + lam * aligns[-1])
        margins.append(log_odds(chosen) - log_odds(rejected))
        better.append((chosen > rejected).to(chosen.dtype))
    loss = _reduce(losses, len(sfts), reduction, hidden)
    if not return_outputs:
        return loss
    odds = [log_odds(a) if m else a for a, m in zip(avgs, lengths, strict=True)]
    figures = {
        f"{side}_{name}": _stack(values[part], hidden).detach()
        for name, values in (("logps", sums), ("avg_logps", avgs), ("log_odds", odds))
        for side, part in (("chosen", slice(pairs)), ("rejected", slice(pairs, None)))
    }
    means = {"accuracy": better, "sft_loss": sfts, "align_loss": aligns}
    count = torch.tensor(lengths, device=hidden.device)
    return loss, SimpleNamespace(
        **figures,
        **{name: _reduce(values, len(sfts), "mean", hidden).detach() for name, values in means.items()},
        margins=_stack(margins, hidden).detach(),
        chosen_lengths=count[:pairs],
        rejected_lengths=count[pairs:],
        num_pairs=torch.tensor(len(sfts)),
    )


def _sft(hidden, lm_head, labels, *, reduction="mean", return_outputs=False, token_weights=None, **options):
    sums, lengths = _sums(hidden, lm_head, labels, token_weights=token_weights, **options)
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
    hidden, lm_head, labels, *, cu_seqlens=None, shift=True, ignore_index=-100, token_weights=None, **options
) -> tuple[list[Tensor], list[int]]:
    """Of each sequence: the (weighted) sum of its log-probabilities, and how many they are."""
    logps = fused_linear_logps(
        hidden, lm_head, labels, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index, **options
    )
    if token_weights is None:
        token_weights = torch.ones_like(logps)
    sums, counts = [], []
    for row, targets, weights in zip(
        *(_sequences(x, labels, cu_seqlens)[0] for x in (logps, labels, token_weights.detach())), strict=True
    ):
        first = 1 if shift else 0  # a sequence's first label has no position before it
        sums.append((row[: len(row) - first] * weights[first:]).sum())
        counts.append(int((targets[first:] != ignore_index).sum()))
    return sums, counts


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0)


def _reduce(losses: list[Tensor], counted: int, reduction: str, like: Tensor) -> Tensor:
    stacked = _stack(losses, like)
    if reduction == "none":
        return stacked
    return stacked.sum() if reduction == "sum" else stacked.sum() / max(counted, 1)

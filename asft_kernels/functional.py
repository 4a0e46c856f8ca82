"""The public calls: check, pack, primitive, objective, reduce."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels import checks
from asft_kernels.backends import Logits, choose_backend
from asft_kernels.backends.plan import default_cache_bytes
from asft_kernels.batch import TokenBatch, pack
from asft_kernels.linear_logps import linear_logps
from asft_kernels.objectives import ASFT, Objective, get_objective
from asft_kernels.objectives.base import counting, reduce_loss
from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, summarize
from asft_kernels.sequence import Logps, reduce

Head = nn.Linear | Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Options:
    """How hidden states become log-probabilities; the keywords that all public calls share.

    cu_seqlens: (R+1,) int32 or int64 borders of packed sequences, None (default) for padded rows.
    shift: position t predicts label t+1 (Hugging Face's convention, default); False if labels are shifted.
    ignore_index: label of places that carry no loss, default -100.
    logit_scale, softcap: z = softcap * tanh(logit_scale * (h.W + b) / softcap); defaults 1.0, None (no cap).
    backend: "torch", "triton" or None (default): triton on CUDA and ROCm, torch elsewhere and for float64.
    cache_bytes: exponentials kept for the head's gradient, in bytes; None (default) is 1 GiB on a CPU and 2.5 GiB
        on a GPU; 0 keeps none and pays one more matrix product.
    chunk_size: rows of the vocabulary held at a time, None (default) chooses.
    num_valid: a bound on the number of valid labels (those of nll_labels included), if you know one: spares
        the call's one read of the device. Under torch.compile without it every position is computed, masked
        ones included. What the read would check is then asserted on the device, as a RuntimeError.
    """

    cu_seqlens: Tensor | None = None
    shift: bool = True
    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    backend: str | None = None
    cache_bytes: int | None = None
    chunk_size: int | None = None
    num_valid: int | None = None


def fused_linear_logps(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
    cache_bytes: int | None = None,
    chunk_size: int | None = None,
    num_valid: int | None = None,
) -> Tensor:
    """Log-probability of every label, without the logits: the primitive, for your own loss.

    hidden: (R, T, D), or packed (M, D) with cu_seqlens; fp32, bf16, fp16 or fp64.
    lm_head: nn.Linear, weight (V, D) or (weight, bias), in hidden's dtype (under autocast: cast to it).
    labels: (R, T) or (M,) integers. Keywords: `asft_kernels.functional.Options`.
    Returns logps in the shape of labels, fp32 (fp64 for fp64 input), 0 at masked places, differentiable in
    hidden, weight and bias. With shift=True label t+1's logp stands at index t; each last index is 0.
    Raises ValueError that names the argument, what it was and what it must be.

    >>> hidden, head = torch.randn(2, 5, 8), nn.Linear(8, 32)
    >>> fused_linear_logps(hidden, head, torch.randint(32, (2, 5))).shape
    torch.Size([2, 5])
    """
    options = Options(
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
        cache_bytes=cache_bytes,
        chunk_size=chunk_size,
        num_valid=num_valid,
    )
    logps, batch, _ = _token_logps(hidden, lm_head, labels, options)
    return batch.spread(logps)


def fused_asft_loss(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    *,
    lam: float = 1.0,
    beta: float = 1.0,
    sft_weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_outputs: bool = False,
    backend: str | None = None,
    cache_bytes: int | None = None,
    chunk_size: int | None = None,
    num_valid: int | None = None,
) -> Tensor | tuple[Tensor, PreferenceOutputs]:
    """ASFT (Aligned Supervised Fine-Tuning through Absolute Likelihood, arXiv 2409.10571) from hidden states.

        L = -sft_weight avg_w - lam [log sigmoid(beta f_w) + log sigmoid(-beta f_l)]
        f = log(p / (1 - p)),  p = exp(avg)

    avg is a sequence's mean log-probability, w chosen, l rejected; beta is arXiv 2502.01237's temperature.
    A pair counts only if both its sequences have a valid token; the others have loss and gradient 0.

    hidden: (2B, T, D), chosen rows first, row B+i rejected for row i; or packed (M, D) with cu_seqlens (2B+1,).
    lm_head: nn.Linear, weight (V, D) or (weight, bias). labels: (2B, T) or (M,), aligned with input_ids.
    lam >= 0, beta > 0, sft_weight >= 0: `asft_kernels.objectives.ASFT`. The others: `asft_kernels.functional.Options`.
    reduction: over the pairs that count: "mean" (default), "sum", or "none" for (B,).
    Returns the loss, fp32 (fp64 for fp64 input); with return_outputs=True also `PreferenceOutputs`.
    Raises ValueError for what the caller got wrong; RuntimeError on double backward.

    >>> hidden, head = torch.randn(4, 7, 16, requires_grad=True), nn.Linear(16, 50)
    >>> fused_asft_loss(hidden, head, torch.randint(50, (4, 7))).backward()
    """
    options = Options(
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
        cache_bytes=cache_bytes,
        chunk_size=chunk_size,
        num_valid=num_valid,
    )
    return _preference_loss(hidden, lm_head, labels, ASFT(lam, beta, sft_weight), options, reduction, return_outputs)


def fused_preference_loss(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    objective: str | Objective,
    *,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    nll_labels: Tensor | None = None,
    objective_inputs: Mapping[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_outputs: bool = False,
    backend: str | None = None,
    cache_bytes: int | None = None,
    chunk_size: int | None = None,
    num_valid: int | None = None,
) -> Tensor | tuple[Tensor, PreferenceOutputs | SequenceOutputs]:
    """Any objective from hidden states, at the matrix products of ASFT.

    objective: a name (`asft_kernels.objectives.OBJECTIVES`: the paper's defaults), a sum of names ("dpo + 0.005 sft")
        or an object (`get_objective(name, ...)`, or your own: see `asft_kernels.objectives.Objective`).
        Paired ones take rows as fused_asft_loss does, unpaired ones (sft, poft, kto) any number of rows.
    ref_logps: (R,) sums under a frozen reference, or (K, R) for K of them, for objectives that need them; for those
        that weigh tokens after the policy, log-probabilities per token as `fused_linear_logps` returns them.
    token_weights: like labels, floating: weight of each label's logp in its sequence's sum; detached.
    nll_labels: (B, T), a second label set of the chosen rows for the likelihood term (say, prompt and answer);
        where both sets have a label it is the same one.
    objective_inputs: what else an objective needs, by name (kto: desirable; fpo: feature_distance; ...).
    Everything else, returns and errors: as fused_asft_loss; unpaired objectives give `SequenceOutputs`.
    """
    if isinstance(objective, str):
        objective = get_objective(objective)
    checks.objective_object(objective)
    options = Options(
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
        cache_bytes=cache_bytes,
        chunk_size=chunk_size,
        num_valid=num_valid,
    )
    return _preference_loss(
        hidden,
        lm_head,
        labels,
        objective,
        options,
        reduction,
        return_outputs,
        ref_logps,
        token_weights,
        nll_labels,
        objective_inputs,
    )


def _preference_loss(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    objective: Objective,
    options: Options,
    reduction: str,
    return_outputs: bool,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    nll_labels: Tensor | None = None,
    objective_inputs: Mapping[str, Tensor] | None = None,
) -> Any:
    name = type(objective).__name__
    checks.hidden_layout(hidden)
    checks.label_layout(hidden, labels, options.cu_seqlens)
    rows = hidden.shape[0] if options.cu_seqlens is None else options.cu_seqlens.numel() - 1
    per_token = getattr(objective, "ref_per_token", False)
    checks.reference_logps(ref_logps, labels if per_token else rows, name, objective.needs_reference)
    weigh = getattr(objective, "weigh_tokens", None)
    if token_weights is not None or weigh is not None:
        checks.weights_like_labels(token_weights, labels)
    if nll_labels is not None:
        checks.nll_layout(nll_labels, labels, options.cu_seqlens, name, objective.uses_nll_labels)
        nll_labels = torch.cat([nll_labels, torch.full_like(nll_labels, options.ignore_index)])
    inputs = checks.objective_inputs(objective, objective_inputs)
    checks.same_place(hidden=hidden, ref_logps=ref_logps, token_weights=token_weights, nll_labels=nll_labels, **inputs)
    logps, batch, backend = _token_logps(
        hidden, lm_head, labels, options, reduction=reduction, paired=objective.paired, nll_labels=nll_labels
    )

    if backend == "triton" and type(objective) is ASFT and token_weights is None and nll_labels is None:
        policy, terms = objective.from_tokens(logps, batch.offsets)
    else:
        weights = None if token_weights is None else batch.take_at_labels(token_weights)
        if weigh is not None:
            weights = weigh(logps.detach(), weights)
        policy = _sequence_logps(logps, batch, labels, options.ignore_index, weights, nll_labels)
        ref = None if ref_logps is None else ref_logps.detach()
        if per_token and ref is not None:
            ref = reduce(batch.take_at_rows(ref), batch, weights)
        terms = objective(policy, ref, **inputs)
    loss = reduce_loss(terms.loss, counting(policy, objective.paired), reduction).to(logps.dtype)
    if not return_outputs:
        return loss
    return loss, summarize(policy, terms, paired=objective.paired, dtype=logps.dtype)


def _token_logps(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    options: Options,
    *,
    reduction: str = "mean",
    paired: bool = False,
    nll_labels: Tensor | None = None,
) -> tuple[Tensor, TokenBatch, str]:
    """All checks, then the primitive: logps (N,) of the compacted tokens, where they stand, the backend."""
    o = options
    checks.options(
        reduction=reduction, shift=o.shift, logit_scale=o.logit_scale, softcap=o.softcap, cache_bytes=o.cache_bytes,
        chunk_size=o.chunk_size, num_valid=o.num_valid, ignore_index=o.ignore_index,
    )  # fmt: skip
    weight, bias = checks.head_tensors(lm_head)
    checks.hidden_layout(hidden)
    checks.hidden_size(hidden, weight)
    checks.label_layout(hidden, labels, o.cu_seqlens)
    if paired:
        checks.even_rows(hidden, o.cu_seqlens)
    checks.same_place(
        hidden=hidden, **{"lm_head weight": weight, "lm_head bias": bias}, labels=labels, cu_seqlens=o.cu_seqlens
    )  # fmt: skip
    hidden, weight = _as_autocast(hidden), _as_autocast(weight)
    bias = None if bias is None else _as_autocast(bias)
    checks.same_dtype(hidden, weight, bias)
    backend = choose_backend(o.backend, hidden.device, hidden.dtype)

    batch = pack(
        labels, vocab=weight.shape[0], cu_seqlens=o.cu_seqlens, shift=o.shift, ignore_index=o.ignore_index,
        num_valid=o.num_valid, extra_labels=nll_labels,
    )  # fmt: skip
    logps = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, batch.rows, batch.labels, backend=backend,
        logits=Logits(float(o.logit_scale), None if o.softcap is None else float(o.softcap)),
        chunk_size=o.chunk_size, padded=batch.padded,
        cache_bytes=default_cache_bytes(hidden.device.type) if o.cache_bytes is None else o.cache_bytes,
    )  # fmt: skip
    return logps, batch, backend


def _as_autocast(tensor: Tensor) -> Tensor:
    """What autocast would hand to a matrix product: its dtype, but float64 as it is."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _sequence_logps(
    logps: Tensor,
    batch: TokenBatch,
    labels: Tensor,
    ignore_index: int,
    weights: Tensor | None,
    nll_labels: Tensor | None,
) -> Logps:
    if nll_labels is None:
        return Logps(reduce(logps, batch, weights), batch.lengths)
    # The batch holds the union of both label sets: each sum takes its own tokens.
    own, nll = (batch.take_at_labels(x).ne(ignore_index).double() for x in (labels, nll_labels))
    ones = torch.ones_like(own)
    return Logps(
        reduce(logps, batch, own if weights is None else own * weights),
        reduce(ones, batch, own).long(),
        reduce(logps, batch, nll),
        reduce(ones, batch, nll).long(),
    )

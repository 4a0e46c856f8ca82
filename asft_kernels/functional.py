"""The public calls: log-probabilities, objective, reduction."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from asft_kernels import checks
from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES, Wanted
from asft_kernels.objectives import ASFT, Objective, get_objective
from asft_kernels.objectives.base import counting, counting_rows, reduce_loss
from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, TokenStats, summarize
from asft_kernels.sequence import Logps, reduce
from asft_kernels.token_logps import Head, Keywords, Options, token_logps, token_stats

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def fused_linear_logps(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, return_stats: Literal[False] = False,
    differentiable: Collection[str] = ..., **options: "Unpack[Keywords]",
) -> Tensor: ...  # fmt: skip
@overload
def fused_linear_logps(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, return_stats: Literal[True] | Collection[str],
    differentiable: Collection[str] = ..., **options: "Unpack[Keywords]",
) -> TokenStats: ...  # fmt: skip
@overload
def fused_linear_logps(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, return_stats: bool | Collection[str],
    differentiable: Collection[str] = ..., **options: "Unpack[Keywords]",
) -> Tensor | TokenStats: ...  # fmt: skip
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
    return_stats: bool | Collection[str] = False,
    differentiable: Collection[str] = ("lse",),
) -> Tensor | TokenStats:
    """Log-probability of every label, without the logits: the primitive, for your own loss.

    hidden: (R, T, D), or packed (M, D) with cu_seqlens; fp32, bf16, fp16 or fp64.
    lm_head: nn.Linear, weight (V, D) or (weight, bias), in hidden's dtype (under autocast: cast to it).
    labels: (R, T) or (M,) integers. Keywords: `asft_kernels.token_logps.Options`, and
    return_stats: True for all figures of `TokenStats`, or the names of some; False (default) for none.
    differentiable: those of return_stats that gradients go through: "lse" (default) at no further matrix product,
        "entropy" at one more, "mean_logits" at none, with a softcap at one; docs/algorithm.md counts them. The others
        are detached.
    Returns logps in the shape of labels, fp32 (fp64 for fp64 input), 0 at masked places, differentiable in
    hidden, weight and bias; with return_stats a `TokenStats`, which has them too. With shift=True label t+1's logp
    stands at index t; each last index is 0.
    Raises ValueError that names the argument, what it was and what it must be.

    >>> hidden, head = torch.randn(2, 5, 8), torch.nn.Linear(8, 32)
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
    names, grads = checks.stat_names(return_stats, differentiable, NAMES, DIFFERENTIABLE)
    if return_stats is False:
        logps, batch, _ = token_logps(hidden, lm_head, labels, options)
        return batch.spread(logps)
    logps, stats, batch, _ = token_stats(hidden, lm_head, labels, options, Wanted(names, grads))
    return TokenStats(batch.spread(logps), **{name: batch.spread(x) for name, x in stats.items()})


@overload
def fused_asft_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, lam: float = ..., beta: float = ..., sft_weight: float = ...,
    reduction: str = ..., return_outputs: Literal[False] = False, **options: "Unpack[Keywords]",
) -> Tensor: ...  # fmt: skip
@overload
def fused_asft_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, lam: float = ..., beta: float = ..., sft_weight: float = ...,
    reduction: str = ..., return_outputs: Literal[True], **options: "Unpack[Keywords]",
) -> tuple[Tensor, PreferenceOutputs]: ...  # fmt: skip
@overload
def fused_asft_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, lam: float = ..., beta: float = ..., sft_weight: float = ...,
    reduction: str = ..., return_outputs: bool, **options: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, PreferenceOutputs]: ...  # fmt: skip
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
    lam >= 0, beta > 0, sft_weight >= 0: `asft_kernels.objectives.ASFT`. The others: `asft_kernels.token_logps.Options`.
    reduction: over the pairs that count: "mean" (default), "sum", or "none" for (B,).
    Returns the loss, fp32 (fp64 for fp64 input); with return_outputs=True also `PreferenceOutputs`.
    Raises ValueError for what the caller got wrong; RuntimeError on double backward.

    >>> hidden, head = torch.randn(4, 7, 16, requires_grad=True), torch.nn.Linear(16, 50)
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


@overload
def fused_preference_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, objective: str | Objective, *, ref_logps: Tensor | None = ...,
    token_weights: Tensor | None = ..., nll_labels: Tensor | None = ...,
    objective_inputs: Mapping[str, Tensor] | None = ..., reduction: str = ...,
    return_outputs: Literal[False] = False, **options: "Unpack[Keywords]",
) -> Tensor: ...  # fmt: skip
@overload
def fused_preference_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, objective: str | Objective, *, ref_logps: Tensor | None = ...,
    token_weights: Tensor | None = ..., nll_labels: Tensor | None = ...,
    objective_inputs: Mapping[str, Tensor] | None = ..., reduction: str = ...,
    return_outputs: Literal[True], **options: "Unpack[Keywords]",
) -> tuple[Tensor, PreferenceOutputs | SequenceOutputs]: ...  # fmt: skip
@overload
def fused_preference_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, objective: str | Objective, *, ref_logps: Tensor | None = ...,
    token_weights: Tensor | None = ..., nll_labels: Tensor | None = ...,
    objective_inputs: Mapping[str, Tensor] | None = ..., reduction: str = ...,
    return_outputs: bool, **options: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, PreferenceOutputs | SequenceOutputs]: ...  # fmt: skip
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
) -> Any:  # what the overloads of the public calls say
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
    logps, batch, backend = token_logps(
        hidden, lm_head, labels, options, reduction=reduction, paired=objective.paired, nll_labels=nll_labels
    )

    if backend == "triton" and type(objective) is ASFT and token_weights is None and nll_labels is None:
        policy, terms = objective.from_tokens(logps, batch.offsets)
    else:
        weights = None if token_weights is None else batch.take_at_labels(token_weights)
        if weigh is not None:
            weights = weigh(logps.detach(), weights)
        lengths, nll_sums, nll_lengths = batch.lengths, None, None
        if nll_labels is not None:
            # The batch holds the union of both label sets: each sum takes its own tokens.
            own, nll = (batch.take_at_labels(x).ne(options.ignore_index) for x in (labels, nll_labels))
            weights = own.double() if weights is None else weights.where(own, 0)
            lengths, nll_lengths = (reduce(x, batch).long() for x in (own, nll))
            nll_sums = reduce(logps, batch, nll)
        # Masked in the loss alone, a NaN of a row that does not count would come back in its gradient, as 0 * NaN.
        rows = counting_rows(lengths, objective.paired)
        if weights is not None:
            tokens = torch.arange(len(weights), device=weights.device)
            row = torch.bucketize(tokens, batch.offsets[1:-1], right=True)
            weights = weights.where(rows.index_select(0, row) | weights.isfinite(), 0)
        policy = Logps(reduce(logps, batch, weights), lengths, nll_sums, nll_lengths)
        ref = None if ref_logps is None else ref_logps.detach()
        if per_token and ref is not None:
            ref = reduce(batch.take_at_rows(ref), batch, weights)
        ref = None if ref is None else ref.where(rows, 0)
        inputs = {
            key: x.where(rows, 0) if x.is_floating_point() and x.shape[-1:] == rows.shape else x
            for key, x in inputs.items()
        }
        terms = objective(policy, ref, **inputs)
    loss = reduce_loss(terms.loss, counting(policy, objective.paired), reduction).to(logps.dtype)
    if not return_outputs:
        return loss
    return loss, summarize(policy, terms, paired=objective.paired, dtype=logps.dtype)

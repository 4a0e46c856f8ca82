"""Log-probabilities of the valid tokens -> sequences -> objective -> loss: what follows the primitive."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from asft_kernels import checks
from asft_kernels.backends import choose_backend
from asft_kernels.batch import TokenBatch, pack
from asft_kernels.objectives import Objective, get_objective
from asft_kernels.objectives.base import counting, counting_rows, reduce_loss
from asft_kernels.options import Options
from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, summarize
from asft_kernels.sequence import Logps, reduce

ANY_VOCABULARY = 2**62  # labels were checked where the log-probabilities were made


@dataclass(frozen=True)
class LossInputs:
    """What a loss is given beside log-probabilities and labels."""

    ref_logps: Tensor | None
    token_weights: Tensor | None
    nll_labels: Tensor | None  # (B, T); once checked in the shape of labels
    objective_inputs: Mapping[str, Tensor] | None
    reduction: str

    def checked(
        self, objective: Objective, values: Tensor, labels: Tensor, rows: int, options: Options
    ) -> "LossInputs":
        """The same, if the objective takes it. values: hidden or logps, on whose device all must be."""
        name = type(objective).__name__
        checks.reduction(self.reduction)
        per_token = getattr(objective, "ref_per_token", False)
        checks.reference_logps(self.ref_logps, labels if per_token else rows, name, objective.needs_reference)
        if self.token_weights is not None or getattr(objective, "needs_token_weights", False):
            checks.weights_like_labels(self.token_weights, labels)
        nll_labels = self.nll_labels
        if nll_labels is not None:
            checks.nll_layout(nll_labels, labels, options.cu_seqlens, name, objective.uses_nll_labels)
            nll_labels = torch.cat([nll_labels, torch.full_like(nll_labels, options.ignore_index)])
        inputs = checks.objective_inputs(objective, self.objective_inputs)
        checks.same_place(
            hidden=values, ref_logps=self.ref_logps, token_weights=self.token_weights, nll_labels=nll_labels, **inputs
        )
        return replace(self, nll_labels=nll_labels, objective_inputs=inputs)


def preference_loss_from_logps(
    logps: Tensor,
    labels: Tensor,
    objective: str | Objective,
    *,
    stats: Mapping[str, Tensor] | None = None,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    nll_labels: Tensor | None = None,
    objective_inputs: Mapping[str, Tensor] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, PreferenceOutputs | SequenceOutputs]:
    """Computes any objective from log-probabilities of the labels, such as a fused model's `log_probs`.

    Args:
        logps: (R, T - 1) or (R, T), that of label t + 1 at t, as `fuse` and `fused_linear_logps` return them.
        labels: (R, T) integers, aligned with input_ids; ignore_index where no loss is.
        objective: As in `fused_preference_loss`.
        stats: Figures per token in the shape of logps, by name, for objectives that read some (`Objective.stats`).
        ref_logps, token_weights, nll_labels, objective_inputs, reduction, return_outputs: As in
            `fused_preference_loss`; log-probabilities are then those of both label sets. ref_logps per token may have
            the shape of logps.
        ignore_index: The label of positions without loss, default -100.

    Returns:
        The loss; with return_outputs=True (loss, `PreferenceOutputs`), or `SequenceOutputs` for unpaired objectives.

    Raises:
        ValueError: What the caller got wrong: the argument, what it was, what it must be.
    """
    if isinstance(objective, str):
        objective = get_objective(objective)
    checks.objective_object(objective)
    if labels.dim() != 2 or logps.dim() != 2 or logps.shape[0] != labels.shape[0] or (
        logps.shape[1] not in (labels.shape[1], labels.shape[1] - 1)
    ):  # fmt: skip
        raise ValueError(
            f"logps: got shape {tuple(logps.shape)} and labels {tuple(labels.shape)}, need labels (R, T) and logps "
            "(R, T - 1) or (R, T)"
        )
    missing = [name for name in getattr(objective, "stats", ()) if name not in (stats or {})]
    if missing:
        raise ValueError(
            f"stats: got none called {missing[0]!r}, need it for {type(objective).__name__}; ask the model for it: "
            f"fuse(model, outputs=(..., {missing[0]!r}))"
        )
    if objective.paired and labels.shape[0] % 2:
        raise ValueError(f"labels: got {labels.shape[0]} rows, need chosen and rejected of each pair: an even number")
    to_labels = (0, labels.shape[1] - logps.shape[1])
    if ref_logps is not None and objective.ref_per_token and ref_logps.shape == logps.shape:
        ref_logps = pad(ref_logps, to_labels)
    given = LossInputs(ref_logps, token_weights, nll_labels, objective_inputs, reduction)
    given = given.checked(objective, logps, labels, labels.shape[0], Options(ignore_index=ignore_index))
    batch = pack(
        labels, vocab=ANY_VOCABULARY, cu_seqlens=None, shift=True, ignore_index=ignore_index, num_valid=None,
        extra_labels=given.nll_labels,
    )  # fmt: skip
    of_tokens, *figures = (batch.take_at_rows(pad(x, to_labels)) for x in (logps, *(stats or {}).values()))
    backend = choose_backend(None, logps.device, logps.dtype)
    named = dict(zip(stats or {}, figures, strict=True))
    loss, outputs = loss_of_tokens(of_tokens, named, batch, objective, given, labels, ignore_index, backend)
    return (loss, outputs()) if return_outputs else loss


def loss_of_tokens(
    logps: Tensor,
    stats: Mapping[str, Tensor],
    batch: TokenBatch,
    objective: Objective,
    given: LossInputs,
    labels: Tensor,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Callable[[], Any]]:
    """(N,) log-probabilities and figures of the tokens of batch, checked inputs -> (loss, what makes its figures)."""
    token_weights, nll_labels = given.token_weights, given.nll_labels
    weigh = getattr(objective, "weigh_tokens", None)
    from_tokens = getattr(objective, "from_tokens", None)
    plain = token_weights is None and nll_labels is None
    at_once = from_tokens(logps, batch.offsets, backend) if from_tokens and plain else None
    if at_once is not None:
        policy, terms = at_once
    else:
        own_weights = weights = None if token_weights is None else batch.take_at_labels(token_weights)
        if weigh is not None:
            weights = weigh(logps.detach(), own_weights, batch.offsets)
        lengths, nll_sums, nll_lengths = batch.lengths, None, None
        if nll_labels is not None:
            # The batch holds the union of both label sets: each sum takes its own tokens.
            own, nll = (batch.take_at_labels(x).ne(ignore_index) for x in (labels, nll_labels))
            own_weights, weights = (own.double() if x is None else x.where(own, 0) for x in (own_weights, weights))
            lengths, nll_lengths = (reduce(x, batch).long() for x in (own, nll))
            nll_sums = reduce(logps, batch, nll)
        # Masked in the loss alone, a NaN of a row that does not count would come back in its gradient, as 0 * NaN.
        rows = counting_rows(lengths, objective.paired)
        own_weights, weights = (_finite_weights(x, rows, batch) for x in (own_weights, weights))
        per_token_terms = objective.per_token(logps, stats) if stats else {}
        terms_of_rows = {key: reduce(x, batch, own_weights) for key, x in per_token_terms.items()}
        policy = Logps(reduce(logps, batch, weights), lengths, nll_sums, nll_lengths, terms_of_rows)
        ref = None if given.ref_logps is None else given.ref_logps.detach()
        if ref is not None and getattr(objective, "ref_per_token", False):
            ref = reduce(batch.take_at_rows(ref), batch, weights)
        ref = None if ref is None else ref.where(rows, 0)
        inputs = {
            key: x.where(rows, 0) if x.is_floating_point() and x.shape[-1:] == rows.shape else x
            for key, x in (given.objective_inputs or {}).items()
        }
        terms = objective(policy, ref, **inputs)
        checks.loss_terms(terms, type(objective).__name__)
    loss = reduce_loss(terms.loss, counting(policy, objective.paired), given.reduction).to(logps.dtype)
    return loss, lambda: summarize(policy, terms, paired=objective.paired, dtype=logps.dtype)


def _finite_weights(weights: Tensor | None, counts: Tensor, batch: TokenBatch) -> Tensor | None:
    """(N,) weights with 0 for what is not finite in rows that do not count (counts (R,) bool)."""
    if weights is None:
        return None
    tokens = torch.arange(len(weights), device=weights.device)
    row = torch.bucketize(tokens, batch.offsets[1:-1], right=True)
    return weights.where(counts.index_select(0, row) | weights.isfinite(), 0)

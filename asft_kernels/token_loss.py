"""Log-probabilities of the valid tokens -> sequences -> objective -> loss: what follows the primitive."""

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from asft_kernels.backends import choose_backend
from asft_kernels.core import checks
from asft_kernels.core.batch import TokenBatch, pack
from asft_kernels.core.options import Options
from asft_kernels.core.sequence import Logps, reduce
from asft_kernels.core.sequence_parallel import (
    Facts,
    added,
    failing_together,
    of_whole_sequences,
    process_group,
    refuse_what_needs_whole_sequences,
)
from asft_kernels.objectives import Objective, get_objective
from asft_kernels.objectives.base import counting, counting_rows, reduce_loss
from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, summarize


def text_of(objective: Objective, reduction: str) -> str:
    """Of both, the same in every process; "" while torch.compile traces, as ranks tell nothing then."""
    if torch.compiler.is_compiling():
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", repr((objective, reduction)))


ANY_VOCABULARY = 2**62  # labels were checked where the log-probabilities were made


@dataclass(frozen=True)
class LossInputs:
    """What a loss is given beside log-probabilities and labels."""

    ref_logps: Tensor | None
    token_weights: Tensor | None
    nll_labels: Tensor | None  # (B, T); once checked in the shape of labels
    objective_inputs: Mapping[str, Tensor] | None
    reduction: str
    sequence_group: Any = None  # once `on_group` a ProcessGroup of several ranks, or None
    copies: int = 1  # ranks of a tensor-parallel head, which have the same sequences

    def floats(self) -> dict[str, list[Tensor | None]]:
        """What ranks that have the same sequences have the same of."""
        inputs = [x for _, x in sorted((self.objective_inputs or {}).items()) if isinstance(x, Tensor)]
        return {"token_weights": [self.token_weights], "ref_logps": [self.ref_logps], "objective_inputs": [*inputs]}

    def on_group(self, objective: Objective, shift: bool) -> "LossInputs":
        """The same with its ProcessGroup, if the objective takes sequences in pieces."""
        if self.sequence_group is not None:
            refuse_what_needs_whole_sequences(objective, shift)
        return replace(self, sequence_group=process_group(self.sequence_group))

    def together(self, values: Any, *, reads: bool = True) -> Any:
        """`failing_together` where the call reads the device anyway; what takes the same facts where it does not."""
        group = process_group(self.sequence_group)
        if group is None or not reads or torch.compiler.is_compiling() or not isinstance(values, Tensor):
            return nullcontext(Facts())
        return failing_together(group, values.device)

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
    shift: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    sequence_group: Any = None,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, PreferenceOutputs | SequenceOutputs]:
    """Computes any objective from log-probabilities of the labels, such as a fused model's `log_probs`.

    Args:
        logps: (R, T - 1) or (R, T), that of label t + 1 at t, as `fuse` and `fused_linear_logps` return them; with
            shift=False (R, T), that of label t at t. At most 0; not checked, as that would read the device.
        labels: (R, T) integers, aligned with input_ids; ignore_index where no loss is.
        objective: As in `fused_preference_loss`.
        stats: Figures per token in the shape of logps, by name, for objectives that read some (`Objective.stats`).
        ref_logps, token_weights, nll_labels, objective_inputs, reduction, return_outputs: As in
            `fused_preference_loss`; log-probabilities are then those of both label sets. ref_logps per token may have
            the shape of logps.
        shift: False: labels are shifted already, as shift_labels of the model; default True.
        ignore_index: The label of positions without loss, default -100.
        sequence_group: As in `fused_preference_loss`, with shift=False.

    Returns:
        The loss; with return_outputs=True (loss, `PreferenceOutputs`), or `SequenceOutputs` for unpaired objectives.

    Raises:
        ValueError: What the caller got wrong: the argument, what it was, what it must be.
    """
    given = LossInputs(ref_logps, token_weights, nll_labels, objective_inputs, reduction, sequence_group)
    with given.together(logps) as facts:
        if isinstance(objective, str):
            objective = get_objective(objective)
        checks.objective_object(objective)
        facts.about, facts.rows = text_of(objective, reduction), labels.shape[0] if labels.dim() else 0
        facts.ref_logps = None if objective.ref_per_token else ref_logps
        options = Options(ignore_index=ignore_index, shift=shift)
        given = given.on_group(objective, shift)
        of_tokens, named, batch, given = _compacted(logps, labels, objective, stats or {}, given, options)
    backend = choose_backend(None, logps.device, logps.dtype)
    loss, outputs = loss_of_tokens(of_tokens, named, batch, objective, given, labels, ignore_index, backend)
    return (loss, outputs()) if return_outputs else loss


def _compacted(
    logps: Tensor, labels: Tensor, objective: Objective, stats: Mapping[str, Tensor], given: LossInputs,
    options: Options,
) -> tuple[Tensor, dict[str, Tensor], TokenBatch, LossInputs]:  # fmt: skip
    """Log-probabilities and figures of the valid tokens, where they stand, and the checked inputs."""
    missing = [name for name in getattr(objective, "stats", ()) if name not in stats]
    if missing:
        raise ValueError(
            f"stats: got none called {missing[0]!r}, need it for {type(objective).__name__}; ask the model for it: "
            f"fuse(model, outputs=(..., {missing[0]!r}))"
        )
    widths = (labels.shape[-1], labels.shape[-1] - options.shift) if labels.dim() else ()
    if labels.dim() != 2 or logps.dim() != 2 or len(logps) != len(labels) or logps.shape[1] not in widths:
        need = "labels (R, T) and logps (R, T - 1) or (R, T)" if options.shift else "both (R, T), as shift is False"
        raise ValueError(f"logps: got shape {tuple(logps.shape)} and labels {tuple(labels.shape)}, need {need}")
    if objective.paired and labels.shape[0] % 2:
        raise ValueError(f"labels: got {labels.shape[0]} rows, need chosen and rejected of each pair: an even number")
    to_labels = (0, labels.shape[1] - logps.shape[1])
    if given.ref_logps is not None and objective.ref_per_token and given.ref_logps.shape == logps.shape:
        given = replace(given, ref_logps=pad(given.ref_logps, to_labels))
    given = given.checked(objective, logps, labels, labels.shape[0], options)
    batch = pack(
        labels, vocab=ANY_VOCABULARY, cu_seqlens=None, shift=options.shift, ignore_index=options.ignore_index,
        num_valid=None, extra_labels=given.nll_labels,
        backend=choose_backend(None, labels.device, logps.dtype),
    )  # fmt: skip
    of_tokens, *figures = (batch.take_at_rows(pad(x, to_labels)) for x in (logps, *stats.values()))
    return of_tokens, dict(zip(stats, figures, strict=True)), batch, given


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
    token_weights, nll_labels, group = given.token_weights, given.nll_labels, given.sequence_group
    weigh = getattr(objective, "weigh_tokens", None)
    from_tokens = getattr(objective, "from_tokens", None)
    plain = token_weights is None and nll_labels is None and group is None
    at_once = from_tokens(logps, batch.offsets, backend) if from_tokens is not None and plain else None
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
        if group is not None:  # weights below are those of rows that count as a whole
            of_both = [lengths] if nll_lengths is None else [lengths, nll_lengths]
            lengths, *nll_length = added(torch.stack(of_both), group)
            nll_lengths = nll_length[0] if nll_length else None
        # Masked in the loss alone, a NaN of a row that does not count would come back in its gradient, as 0 * NaN.
        rows = counting_rows(lengths, objective.paired)
        own_weights, weights = (_finite_weights(x, rows, batch) for x in (own_weights, weights))
        per_token_terms = objective.per_token(logps, stats) if stats else {}
        terms_of_rows = {key: reduce(x, batch, own_weights) for key, x in per_token_terms.items()}
        policy = Logps(reduce(logps, batch, weights), lengths, nll_sums, nll_lengths, terms_of_rows, given.copies)
        ref = None if given.ref_logps is None else given.ref_logps.detach()
        pieces = None
        if ref is not None and getattr(objective, "ref_per_token", False):
            pieces = reduce(batch.take_at_rows(ref), batch, weights)
        policy, pieces = of_whole_sequences(policy, pieces, group)
        ref = ref if pieces is None else pieces.detach()
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

"""The public calls: log-probabilities, objective, reduction."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES, Wanted
from asft_kernels.core import checks
from asft_kernels.core.distributed import Agreement, Shard
from asft_kernels.core.heads import Head
from asft_kernels.core.options import NAMES as NAMES_OF_OPTIONS
from asft_kernels.core.options import Keywords, Options, explained, make_options
from asft_kernels.core.tensor_parallel import localised
from asft_kernels.core.token_logps import TellingStreams, token_logps
from asft_kernels.objectives import ASFT, OBJECTIVES, Objective, get_objective
from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, TokenStats
from asft_kernels.token_loss import LossInputs, loss_of_tokens, text_of

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
@explained
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
    """Computes the log-probability of every label without the logits: the primitive, for your own loss.

    Args:
        hidden: Hidden states (R, T, D), or packed (M, D) with cu_seqlens; fp32, bf16, fp16 or fp64.
        lm_head: {lm_head}
        labels: (R, T) or (M,) integers, aligned with input_ids.
        {keywords}
        return_stats: True for all figures of `TokenStats`, or the names of some; False (default) for none.
        differentiable: Those of return_stats that gradients go through: "lse" (default) at no further matrix product,
            "entropy" at one more, "mean_logits" at none, with a softcap at one; docs/algorithm.md counts them. The
            others are detached.

    Returns:
        Log-probabilities in the shape of labels, fp32 (fp64 for fp64 hidden), 0 where no loss is, differentiable in
        hidden, weight and bias; with return_stats a `TokenStats`, which has them too. With shift=True label t+1's
        stands at index t; each row's last is 0.

    Raises:
        ValueError: What the caller got wrong: the argument, what it was, what it must be.
        RuntimeError: On double backward.

    >>> hidden, head = torch.randn(2, 5, 8), torch.nn.Linear(8, 32)
    >>> fused_linear_logps(hidden, head, torch.randint(32, (2, 5))).shape
    torch.Size([2, 5])
    """
    hidden, lm_head = localised(hidden, lm_head)
    with Agreement(lm_head, reads=num_valid is None) as ranks:
        with TellingStreams(lm_head):
            options = Options(
                cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index, logit_scale=logit_scale,
                softcap=softcap, backend=backend, cache_bytes=cache_bytes, chunk_size=chunk_size, num_valid=num_valid,
            )  # fmt: skip
            names, grads = checks.stat_names(return_stats, differentiable, NAMES, DIFFERENTIABLE)
        wanted = Wanted(names, grads) if return_stats is not False else None
        logps, stats, batch, _ = token_logps(hidden, lm_head, labels, options, wanted=wanted, ranks=ranks)
    if wanted is None:
        return batch.spread(logps)
    return TokenStats(batch.spread(logps), **{name: batch.spread(x) for name, x in stats.items()})


@overload
def fused_asft_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, lam: float = ..., beta: float = ..., sft_weight: float = ...,
    reduction: str = ..., sequence_group: Any = ..., return_outputs: Literal[False] = False,
    **options: "Unpack[Keywords]",
) -> Tensor: ...  # fmt: skip
@overload
def fused_asft_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, lam: float = ..., beta: float = ..., sft_weight: float = ...,
    reduction: str = ..., sequence_group: Any = ..., return_outputs: Literal[True], **options: "Unpack[Keywords]",
) -> tuple[Tensor, PreferenceOutputs]: ...  # fmt: skip
@overload
def fused_asft_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, *, lam: float = ..., beta: float = ..., sft_weight: float = ...,
    reduction: str = ..., sequence_group: Any = ..., return_outputs: bool, **options: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, PreferenceOutputs]: ...  # fmt: skip
@explained
def fused_asft_loss(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    *,
    lam: float = 1.0,
    beta: float = 1.0,
    sft_weight: float = 1.0,
    reduction: str = "mean",
    sequence_group: Any = None,
    return_outputs: bool = False,
    **options: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, PreferenceOutputs]:
    """Computes ASFT (Aligned Supervised Fine-Tuning through Absolute Likelihood, arXiv 2409.10571).

        L = -sft_weight avg_w - lam [log sigmoid(beta f_w) + log sigmoid(-beta f_l)]
        f = log(p / (1 - p)),  p = exp(avg)

    avg is a sequence's mean log-probability, w chosen, l rejected; beta is arXiv 2502.01237's temperature (its
    section 3.1.2). A pair counts only if both its sequences have a label; the others have loss and gradient 0.

    Args:
        hidden: Hidden states (2B, T, D), chosen rows first, row B+i rejected for row i; or packed (M, D) with
            cu_seqlens (2B+1,). fp32, bf16, fp16 or fp64.
        lm_head: {lm_head}
        labels: (2B, T) or (M,) integers, aligned with input_ids; ignore_index at prompts and padding.
        lam: Weight of the alignment term, >= 0; default 1.0.
        beta: Temperature on the log-odds, > 0; default 1.0.
        sft_weight: Weight of the likelihood term, >= 0; default 1.0.
        reduction: Over the pairs that count: "mean" (default), "sum", or "none" for (B,).
        sequence_group: As in `fused_preference_loss`.
        return_outputs: True: the loss and `PreferenceOutputs`; default False.
        {keywords}

    Returns:
        The loss, fp32 (fp64 for fp64 hidden); with return_outputs=True (loss, `PreferenceOutputs`).

    Raises:
        ValueError: What the caller got wrong: the argument, what it was, what it must be.
        TypeError: A keyword that does not exist, with the one that was probably meant.
        RuntimeError: On double backward.

    >>> hidden, head = torch.randn(4, 7, 16, requires_grad=True), torch.nn.Linear(16, 50)
    >>> fused_asft_loss(hidden, head, torch.randint(50, (4, 7))).backward()
    """
    own = ("lam", "beta", "sft_weight", "reduction", "sequence_group", "return_outputs")
    given = LossInputs(None, None, None, None, reduction, sequence_group)

    def made() -> tuple[Objective, Options]:
        return ASFT(lam, beta, sft_weight), make_options("fused_asft_loss", options, own)

    return _preference_loss(hidden, lm_head, labels, made, given, options.get("num_valid") is None, return_outputs)


@overload
def fused_preference_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, objective: str | Objective, *, ref_logps: Tensor | None = ...,
    token_weights: Tensor | None = ..., nll_labels: Tensor | None = ...,
    objective_inputs: Mapping[str, Tensor] | None = ..., reduction: str = ...,
    sequence_group: Any = ..., return_outputs: Literal[False] = False, **options: "Unpack[Keywords]",
) -> Tensor: ...  # fmt: skip
@overload
def fused_preference_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, objective: str | Objective, *, ref_logps: Tensor | None = ...,
    token_weights: Tensor | None = ..., nll_labels: Tensor | None = ...,
    objective_inputs: Mapping[str, Tensor] | None = ..., reduction: str = ...,
    sequence_group: Any = ..., return_outputs: Literal[True], **options: "Unpack[Keywords]",
) -> tuple[Tensor, PreferenceOutputs | SequenceOutputs]: ...  # fmt: skip
@overload
def fused_preference_loss(
    hidden: Tensor, lm_head: Head, labels: Tensor, objective: str | Objective, *, ref_logps: Tensor | None = ...,
    token_weights: Tensor | None = ..., nll_labels: Tensor | None = ...,
    objective_inputs: Mapping[str, Tensor] | None = ..., reduction: str = ...,
    sequence_group: Any = ..., return_outputs: bool, **options: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, PreferenceOutputs | SequenceOutputs]: ...  # fmt: skip
@explained
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
    reduction: str = "mean",
    sequence_group: Any = None,
    return_outputs: bool = False,
    **options: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, PreferenceOutputs | SequenceOutputs]:
    """Computes any objective from hidden states, at the matrix products of ASFT.

    Args:
        hidden: Hidden states (R, T, D), or packed (M, D) with cu_seqlens. Paired objectives take R = 2B rows, chosen
            rows first, row B+i rejected for row i; unpaired ones (sft, poft, kto) any number.
        lm_head: {lm_head}
        labels: (R, T) or (M,) integers, aligned with input_ids; ignore_index at prompts and padding.
        objective: A name (`asft_kernels.objectives.OBJECTIVES`: the paper's defaults), a sum of names
            ("dpo(beta=0.2) + 0.005 sft"), or an object (`get_objective(name, ...)`, or your own: `Objective`).
        ref_logps: (R,) sums under a frozen reference, or (K, R) for K of them, for objectives that need them; for
            those that weigh tokens after the policy, log-probabilities per token as `fused_linear_logps` returns them.
        token_weights: Like labels, floating: weight of each label's log-probability in its sequence's sum; detached.
        nll_labels: (B, T), a second label set of the chosen rows for the likelihood term (say, prompt and answer);
            where both sets have a label it is the same one.
        objective_inputs: What else an objective needs, by name (kto: desirable; fpo: feature_distance; ...).
        reduction: Over the pairs or rows that count: "mean" (default), "sum", or "none" for (B,) or (R,).
        sequence_group: A ProcessGroup or a DeviceMesh of one dimension whose ranks hold pieces of the same R sequences
            (sequence or context parallelism), with shift=False; None (default): whole sequences. Sums are added over
            it, so the loss is the same on its ranks, and the mean of their gradients is that of one process. Pieces
            may be in any order and empty; cu_seqlens are the R + 1 borders of this rank's pieces. What is per token
            comes in pieces, what is per sequence (ref_logps, inputs) whole.
        return_outputs: True: the loss and its figures; default False.
        {keywords}

    Returns:
        The loss, fp32 (fp64 for fp64 hidden); with return_outputs=True (loss, `PreferenceOutputs`), or
        `SequenceOutputs` for unpaired objectives.

    Raises:
        ValueError: What the caller got wrong: the argument, what it was, what it must be.
        TypeError: A keyword that does not exist, with the one that was probably meant.
        RuntimeError: On double backward.
    """
    given = LossInputs(ref_logps, token_weights, nll_labels, objective_inputs, reduction, sequence_group)

    def made() -> tuple[Objective, Options]:
        return _objective(objective, options), make_options("fused_preference_loss", options, OF_PREFERENCE_LOSS)

    return _preference_loss(hidden, lm_head, labels, made, given, options.get("num_valid") is None, return_outputs)


OF_PREFERENCE_LOSS = (
    "ref_logps", "token_weights", "nll_labels", "objective_inputs", "reduction", "sequence_group", "return_outputs",
)  # fmt: skip


def _objective(objective: str | Objective, options: Mapping[str, Any]) -> Objective:
    """The objective of a name or an object; TypeError for its own parameters among the call's options."""
    made = get_objective(objective) if isinstance(objective, str) else objective
    checks.objective_object(made)
    others = [name for name in options if name not in NAMES_OF_OPTIONS]
    parameters = inspect.signature(type(made)).parameters if others else {}
    for parameter in (name for name in others if name in parameters):
        name = next((x for x, kind in OBJECTIVES.items() if type(made) is kind), "dpo")
        raise TypeError(
            f"fused_preference_loss() got {parameter!r}, which is the objective's own parameter; need it there: "
            f"get_objective({name!r}, {parameter}=...)"
        )
    return made


def _preference_loss(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    made: Callable[[], tuple[Objective, Options]],
    given: LossInputs,
    reads: bool,
    return_outputs: bool,
) -> Any:  # what the overloads of the public calls say
    """made: the objective and the options. All that a rank may refuse is refused where the others hear of it.

    reads: whether the call reads the device, and ranks may tell each other something.
    """
    hidden, lm_head = localised(hidden, lm_head)
    copies = lm_head.ranks if isinstance(lm_head, Shard) else 1
    with given.together(hidden, reads=reads) as facts, Agreement(lm_head, reads=reads) as ranks:
        with TellingStreams(lm_head):
            objective, options = made()
            ranks.about = facts.about = text_of(objective, given.reduction)
            checks.hidden_layout(hidden)
            given = replace(given.on_group(objective, options.shift), copies=copies)
            checks.label_layout(hidden, labels, options.cu_seqlens)
            rows = hidden.shape[0] if options.cu_seqlens is None else options.cu_seqlens.numel() - 1
            facts.rows, facts.ref_logps = rows, None if getattr(objective, "ref_per_token", False) else given.ref_logps
            given = given.checked(objective, hidden, labels, rows, options)
            ranks.floats = given.floats()
            names, with_grad = (frozenset(getattr(objective, key, ())) for key in ("stats", "stats_with_grad"))
        logps, stats, batch, backend = token_logps(
            hidden, lm_head, labels, options, wanted=Wanted(names, with_grad) if names else None,
            paired=objective.paired, nll_labels=given.nll_labels, ranks=ranks,
        )  # fmt: skip
    loss, outputs = loss_of_tokens(logps, stats, batch, objective, given, labels, options.ignore_index, backend)
    return (loss, outputs()) if return_outputs else loss

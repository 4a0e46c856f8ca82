"""What every objective is, and the reductions, figures and checks that they share."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Rational, Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asft_kernels.core.sequence import Logps

NLL_NORMALIZATIONS = ("sequence", "token")


@dataclass(frozen=True)
class LossTerms:
    """Per pair (paired objectives) or per row (unpaired), differentiable.

    loss: what is minimised. sft: the unweighted likelihood term, -avg of the chosen answer.
    align: the unweighted alignment term, 0 where an objective has none.
    metrics: detached figures of the method's own, by name; reported as means over what counts.
    """

    loss: Tensor
    sft: Tensor
    align: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """A small function of sequence statistics; it sees no hidden states and no kernels.

    arxiv: number of the paper that introduced it, for model cards.
    paired: rows 0..B-1 are chosen and row B+i is the answer rejected for row i; else any rows.
    needs_reference: takes ref_logps, (R,) or (K, R), of each row under the reference.
    several_references: takes (K, R) of them.
    reference_kind: what they are: "sum" of a row's log-probabilities, or "mean" per token.
    uses_nll_labels: reads Logps.nll_avg, so that nll_labels make a difference.
    ref_per_token: ref_logps are given per token, in the labels' shape, and summed as the policy's are.
    inputs, optional_inputs: further tensors by name, with what they are: `objective_inputs` of the call,
        keywords of __call__.

    An objective may also have `weigh_tokens(logps, token_weights, offsets)`: (N,) detached log-probabilities of
    the valid tokens, the caller's (N,) token_weights or None, and the (R+1,) borders of the sequences among the N ->
    the (N,) weights of the sums, the policy's and, where ref_per_token, the reference's.
    weighs_each_token: whether `weigh_tokens` reads of each token that token alone, so that pieces of a sequence may
        stand on several ranks (sequence_group).
    needs_token_weights: the call must give token_weights.
    stats, stats_with_grad: names of figures per token that `per_token` reads ("lse", "mean_logits", "entropy",
        "is_top1", "log_sum_sq_probs"), and those of them that its terms are differentiated in. An instance may have
        its own.
    """

    arxiv: ClassVar[str] = ""
    paired: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    reference_kind: ClassVar[str] = "sum"
    several_references: ClassVar[bool] = False
    uses_nll_labels: ClassVar[bool] = False
    ref_per_token: bool = False
    weighs_each_token: ClassVar[bool] = False
    needs_token_weights: ClassVar[bool] = False
    stats: tuple[str, ...] = ()
    stats_with_grad: tuple[str, ...] = ()
    inputs: ClassVar[Mapping[str, str]] = {}
    optional_inputs: ClassVar[Mapping[str, str]] = {}

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        """policy: of all rows. ref_logps: detached, (R,) or (K, R)."""
        raise NotImplementedError

    def from_tokens(self, logps: Tensor, offsets: Tensor, backend: str) -> "tuple[Logps, LossTerms] | None":
        """The same at once from (N,) token logps and the rows' (R+1,) borders, where there is such a way on backend."""
        return None

    def check_references(self, number: int) -> None:
        """Raises ValueError unless it takes log-probabilities under so many reference models."""
        if number > 1 and self.needs_reference and not self.several_references:
            raise ValueError(f"{type(self).__name__}: got {number} references, need one; mrpo has more")

    def per_token(self, logps: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms of the valid tokens to be summed over each sequence, as `Logps.terms` of the policy.

        The caller's token_weights weigh them as they do the log-probabilities; what `weigh_tokens` gives does not.

        Args:
            logps: (N,) log-probabilities of the valid tokens.
            stats: the figures named by `stats`, (N,) each.

        Returns:
            (N,) terms by name. One name means one thing: parts of a sum may share it.
        """
        return {}


def chosen_of_pairs(policy: Logps) -> Logps:
    """The chosen rows, empty where the pair does not count: what looks at the whole batch must not see those."""
    chosen = policy.chosen
    return replace(chosen, length=torch.where(counting(policy, paired=True), chosen.length, 0))


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def sum_over_ranks(sums: Tensor) -> Tensor:
    """In place, over all processes where torch.distributed runs; each of them must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Implicit rewards of (B,) pairs, as trainers log them."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).double(),
    }


def counting(policy: Logps, paired: bool) -> Tensor:
    """(B,) or (R,) bool: a row counts if it has a valid token, a pair only if both its rows do."""
    return _counting(policy.length, paired)


def counting_rows(length: Tensor, paired: bool) -> Tensor:
    """(R,) bool of (R,) lengths: the rows that count, those of pairs that do if paired."""
    counts = _counting(length, paired)
    return counts.repeat(2) if paired else counts


def _counting(length: Tensor, paired: bool) -> Tensor:
    filled = length > 0
    if not paired:
        return filled
    chosen, rejected = filled.chunk(2)
    return chosen & rejected


def mean_over(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over what counts, 0 if nothing does; the rest has gradient exactly 0."""
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def share_of_token_mean(sums: Tensor, length: Tensor, counts: Tensor) -> Tensor:
    """sums * rows / tokens of what counts: the mean of these over the rows is the mean over all their tokens."""
    return sums * counts.sum() / (length * counts).sum().clamp(min=1)


def chosen_nll(policy: Logps, normalization: str) -> Tensor:
    """Negative log-likelihood of each chosen answer, (B,): its mean per token, or its share of the batch's mean."""
    chosen = policy.chosen
    if normalization == "sequence":
        return -chosen.nll_avg
    length = chosen.length if chosen.nll_length is None else chosen.nll_length
    return -share_of_token_mean(chosen.nll_avg * length, length, counting(policy, paired=True))


def sigmoid(x: Tensor) -> Tensor:
    """As exp(log sigmoid): its derivative s (1 - s) keeps its digits on both sides."""
    return logsigmoid(x).exp()


def reduce_loss(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return mean_over(loss, counts)
    kept = torch.where(counts, loss, 0)
    return kept.sum() if reduction == "sum" else kept


def require_number(objective: str, name: str, value: float, *, above_zero: bool = False) -> None:
    """A ValueError that names the parameter unless it is finite, in float64 too, and >= 0, or > 0."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and (value > 0 if above_zero else value >= 0) and value <= sys.float_info.max):
        raise ValueError(f"{objective}: {name}: got {value!r}, need a finite number {'>' if above_zero else '>='} 0")
    require_factor(objective, name, value)


def require_factor(objective: str, name: str, value: Real | float) -> None:
    """A ValueError for a finite number that torch does not multiply by: a fraction, or an integer from 2**31 on, whose
    product with another could leave 64 bits."""
    # Two parameters are multiplied in places: their product fits, too.
    if isinstance(value, Rational) and (not isinstance(value, Integral) or abs(int(value)) >= 2**31):
        need = f"a float, or an integer below 2**31; write {float(value)}"
        raise ValueError(f"{objective}: {name}: got {value!r}, need {need}")


def require_choice(objective: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{objective}: {name}: got {value!r}, need one of {', '.join(map(repr, choices))}")


def require_smoothing(objective: str, value: float) -> None:
    require_number(objective, "label_smoothing", value)
    if value >= 0.5:
        raise ValueError(f"{objective}: label_smoothing: got {value!r}, need a number below 0.5: half is pure noise")


def require_input(objective: str, name: str, tensor: object, rows: int) -> Tensor:
    """The tensor, or a ValueError unless it has one entry a row."""
    if not isinstance(tensor, Tensor) or tensor.shape != (rows,):
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{objective}: {name}: got {got}, need a tensor ({rows},), one entry a row")
    return tensor

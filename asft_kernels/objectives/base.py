"""What every objective is, and the reduction over pairs that they share."""

from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from asft_kernels.sequence import Logps


@dataclass(frozen=True)
class LossTerms:
    """Per pair (paired objectives) or per row (unpaired), differentiable.

    loss: what is minimised. sft: the unweighted likelihood term, -avg of the chosen answer.
    align: the unweighted alignment term, 0 where an objective has none.
    """

    loss: Tensor
    sft: Tensor
    align: Tensor


class Objective(Protocol):
    """A small function of sequence statistics; it sees no hidden states and no kernels.

    paired: rows 0..B-1 are chosen and row B+i is the answer rejected for row i; else any rows.
    needs_reference: takes ref_logps, sums per row under the reference, (R,) or (K, R).
    uses_nll_labels: reads Logps.nll_avg, so that nll_labels make a difference.
    """

    paired: ClassVar[bool]
    needs_reference: ClassVar[bool]
    uses_nll_labels: ClassVar[bool]

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None) -> LossTerms: ...


def counting(policy: Logps, paired: bool) -> Tensor:
    """(B,) or (R,) bool: a row counts if it has a valid token, a pair only if both its rows do."""
    filled = policy.length > 0
    if not paired:
        return filled
    chosen, rejected = filled.chunk(2)
    return chosen & rejected


def mean_over(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over what counts, 0 if nothing does; the rest has gradient exactly 0."""
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def reduce_loss(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return mean_over(loss, counts)
    kept = torch.where(counts, loss, 0)
    return kept.sum() if reduction == "sum" else kept


def require_number(objective: str, name: str, value: float, *, above_zero: bool = False) -> None:
    """A ValueError that names the parameter unless it is finite and >= 0, or > 0."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and (value > 0 if above_zero else value >= 0) and value < inf):
        raise ValueError(f"{objective}: {name}: got {value!r}, need a finite number {'>' if above_zero else '>='} 0")
